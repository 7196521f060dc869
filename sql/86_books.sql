-- The books: do money and places add up?
--
-- broken_books names whatever breaks one of eight rules; it is empty at every moment between
-- transactions. Read in full it reads all history. So check_books does that nightly and keeps what
-- it found, and queue_health() (88) shows that and reads the view only for what moved lately.

create view private.broken_books with (security_invoker = true) as
select
  'balance' as rule, e.user_id, null::uuid as generation_id,
  format('credits are %s, the ledger ends at %s', e.credits, coalesce(l.balance_after, 0)) as detail
from public.entitlements as e
-- Not c.user_id = e.user_id: the planner may then walk the ids of all users down to this one's.
left join lateral (
  select c.user_id, c.balance_after
  from public.credit_ledger as c
  where (c.user_id, c.id) <= (e.user_id, 9223372036854775807)
  order by c.user_id desc, c.id desc limit 1
) as l on e.user_id = l.user_id
where e.credits <> coalesce(l.balance_after, 0)
union all
select
  'ledger', l.user_id, l.generation_id,
  format('entry %s: %s and %s are not %s', l.id, l.balance_before, l.amount, l.balance_after)
from (
  select
    c.*, lag(c.balance_after, 1, 0) over (partition by c.user_id order by c.id) as balance_before
  from public.credit_ledger as c
  -- Of a user who is gone the oldest entries may be, too.
  inner join public.entitlements as e on c.user_id = e.user_id
) as l
-- As bigint: a sum that does not fit is wrong, too.
where l.balance_before::bigint + l.amount <> l.balance_after
union all
select
  'place', g.user_id, g.id,
  format('%s, and %s', g.status, case
    when ready.job_id is not null then 'ready'
    when running.job_id is not null then 'running'
    else 'neither ready nor running'
  end)
from public.generations as g
left join private.ready_jobs as ready on g.id = ready.job_id
left join private.running_jobs as running on g.id = running.job_id
where (g.status = 'queued', g.status = 'processing')
  <> (ready.job_id is not null, running.job_id is not null)
union all
select 'place', j.user_id, j.job_id, 'queued or running, and no generation of its user'
from private.live_jobs as j
left join public.generations as g on j.job_id = g.id and j.user_id = g.user_id
where g.id is null
union all
select
  'charge', g.user_id, g.id,
  format('the price is %s, charged were %s', g.price_credits, coalesce(-l.amount, 0))
from public.generations as g
left join (
  select c.generation_id, sum(c.amount) as amount
  from public.credit_ledger as c where c.kind = 'charge' group by c.generation_id
) as l on g.id = l.generation_id
where coalesce(-l.amount, 0) <> g.price_credits
union all
-- By the rule by which jobs end (75).
select
  'refund', g.user_id, g.id,
  format('%s at the price of %s, refunded were %s', g.status, g.price_credits, l.amount)
from public.generations as g
cross join lateral (
  select sum(k.amount - k.debt)::integer as amount from public.credit_ledger as k
  where k.generation_id = g.id and k.kind = 'refund'
) as l
where case
  when g.status in ('queued', 'processing') then l.amount is not null
  else coalesce(l.amount, 0) <> private.refund_due(
    g.status, g.price_credits, g.image_count,
    (select count(*) from public.images as i where i.generation_id = g.id)::integer,
    coalesce(g.refund_percent, 100)
  )
end
union all
select
  'debt', e.user_id, null,
  format(
    'the debt is %s beside %s credits, its entries say %s', e.debt, e.credits, coalesce(l.debt, 0)
  )
from public.entitlements as e
left join (
  select c.user_id, sum(c.debt) as debt
  from public.credit_ledger as c where c.debt <> 0 group by c.user_id
) as l on e.user_id = l.user_id
where e.debt <> coalesce(l.debt, 0) or (e.debt > 0 and e.credits > 0)
union all
select
  'bucket', b.user_id, null,
  format('bucket %s has %s, its entries say %s', b.id, b.credits, coalesce(l.amount, 0))
from private.credit_buckets as b
left join (
  select c.bucket_id, sum(c.amount) as amount
  from public.credit_ledger as c where c.bucket_id is not null group by c.bucket_id
) as l on b.id = l.bucket_id
where b.credits <> coalesce(l.amount, 0)
union all
select
  'end', e.user_id, null,
  format('credits are %s and end at %s, in buckets are %s until %s',
    e.credits, e.credits_end_at, b.credits, b.ends_at)
from public.entitlements as e
cross join lateral (
  select coalesce(sum(k.credits), 0) as credits, min(k.expires_at) as ends_at
  from private.credit_buckets as k where k.user_id = e.user_id and k.credits > 0
) as b
where e.credits < b.credits or e.credits_end_at is distinct from b.ends_at;

comment on view private.broken_books is
  'Are the books right? One row for each broken rule: balance and ledger (each entry follows from '
  'the one before, the balance is the last), place (queued is ready, processing is running, and '
  'nothing else is), charge (the price, once), refund (what was charged but not made), debt and '
  'bucket (each the sum of its entries), end (no more is in buckets than there is, and nothing '
  'ends before credits_end_at).';

-- What is broken among the users and generations that moved last.
--
-- Whatever the planner thinks: a few hundred rows, each reached by its key.
create function private.recent_broken_books(
  p_at_most integer default 200
) returns setof private.broken_books
language plpgsql stable set search_path = pg_catalog, pg_temp
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off as $$
declare
  v_ids uuid[] := array(select g.id from public.generations as g order by g.id desc limit p_at_most)
    || array(
      select a.generation_id from private.attempts as a
      where a.ended_at > now() - interval '15 minutes' order by a.ended_at desc limit p_at_most
    );
begin
  return query
  select b.* from private.broken_books as b
  where b.rule in ('balance', 'end') and b.user_id = any (array(
    select g.user_id from public.generations as g where g.id = any (v_ids)
  ))
  union all
  select b.* from private.broken_books as b
  where b.rule in ('place', 'refund') and b.generation_id = any (v_ids);
end;
$$;

-- Holds all books against the rules and keeps what is broken. Answers how much that is.
create function private.check_books() returns integer
language sql set search_path = pg_catalog, pg_temp as $$
  insert into private.routines as r (name, result)
  select 'check_books', jsonb_build_object(
    'problems', count(*),
    'examples', coalesce(jsonb_agg(b.problem) filter (where b.place <= 20), '[]')
  )
  from (
    select to_jsonb(broken) as problem, row_number() over () as place
    from private.broken_books as broken
  ) as b
  on conflict (name) do update set last_run_at = excluded.last_run_at, result = excluded.result
  returning (r.result ->> 'problems')::integer
$$;

comment on function private.check_books is
  'Reads all history, nightly by pg_cron, and keeps what broken_books finds in routines.';
