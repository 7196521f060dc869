-- Claim: the next jobs in fair order move from ready_jobs to running_jobs.
--
-- claim_jobs makes delayed jobs claimable that have come due, locks the jobs with the smallest
-- fair_key that nobody else is claiming (skip locked), puts off those of a paused provider, and
-- moves the rest in one statement.

-- Delayed jobs whose time has come become claimable.
create or replace function private.promote_due_jobs(p_at_most integer)
returns void
language sql
set search_path = ''
as $$
  update private.ready_jobs set run_at = null
  where seq = any (array(
    select r.seq from private.ready_jobs as r
    where r.run_at <= now() order by r.run_at limit p_at_most for update skip locked
  ))
$$;

revoke all on function private.promote_due_jobs(integer)
from public, anon, authenticated, service_role;

-- Locks the next jobs in fair order and answers their seq.
--
-- While a long transaction holds back vacuum, the index begins with every job ever claimed since,
-- and a scan from its start walks them all. So the scan starts a little below the virtual clock.
-- What was queued below that is found by a scan from the start, at least once a second in each
-- session.
create or replace function private.lock_next_jobs(p_at_most integer)
returns bigint[]
language plpgsql
set search_path = ''
as $$
declare
  v_slack constant bigint := 100000;  -- 100 credits of weight 1
  v_last_full bigint := coalesce(
    nullif(current_setting('darkroom.full_scan_ms', true), '')::bigint, 0
  );
  v_now bigint := extract(epoch from clock_timestamp()) * 1000;
  v_from bigint := 0;
begin
  if v_now - v_last_full < 1000 then
    v_from := (select c.last_value - v_slack from private.virtual_clock as c);
  else
    perform set_config('darkroom.full_scan_ms', v_now::text, false);
  end if;
  return array(
    select r.seq from private.ready_jobs as r
    where r.run_at is null and r.fair_key >= v_from
    order by r.fair_key, r.seq limit p_at_most for update skip locked
  );
end;
$$;

revoke all on function private.lock_next_jobs(integer)
from public, anon, authenticated, service_role;

-- Of these locked jobs, those whose provider is paused are put off until it is not; the rest are
-- answered. They keep their place: when due they are claimed by their old fair_key.
create or replace function private.put_off_paused_jobs(p_seqs bigint[])
returns bigint[]
language sql
set search_path = ''
as $$
  with put_off as (
    update private.ready_jobs as r set run_at = p.paused_until
    from public.models as m
    inner join private.providers as p on p.name = m.provider
    where r.seq = any (p_seqs) and m.id = r.model_id and p.paused_until > now()
    returning r.seq
  )
  select coalesce(array_agg(s.seq order by s.place), '{}')
  from unnest(p_seqs) with ordinality as s (seq, place)
  where s.seq not in (select o.seq from put_off as o)
$$;

revoke all on function private.put_off_paused_jobs(bigint[])
from public, anon, authenticated, service_role;

-- The next jobs that may run now. A pile of jobs of a paused provider is passed once, not at every
-- claim.
create or replace function private.pick_jobs(p_at_most integer)
returns bigint[]
language plpgsql
set search_path = ''
as $$
declare
  v_seqs bigint[] := private.lock_next_jobs(p_at_most);
begin
  while v_seqs <> '{}' and exists (
    select from private.providers where paused_until > now()
  ) loop
    v_seqs := private.put_off_paused_jobs(v_seqs);
    exit when v_seqs <> '{}';
    v_seqs := private.lock_next_jobs(p_at_most);
  end loop;
  return v_seqs;
end;
$$;

revoke all on function private.pick_jobs(integer) from public, anon, authenticated, service_role;

-- Every row is reached by its key, whatever the planner thinks of the tables' sizes.
-- Outer joins: a job whose model somebody deleted must fail at the worker, not vanish here.
create or replace function private.claim_jobs(p_worker_id bigint, p_slots integer)
returns table (
  job_id uuid,
  user_id uuid,
  token bigint,
  attempt smallint,
  provider text,
  provider_ref text,
  provider_input jsonb,
  provider_job_id text,
  image_inputs text[],
  image_count smallint,
  deadline_seconds real
)
language plpgsql
security definer
set search_path = ''
as $$
#variable_conflict use_column
declare
  v_seqs bigint[];
begin
  perform private.promote_due_jobs(p_slots);
  v_seqs := private.pick_jobs(p_slots);
  if v_seqs = '{}' then
    return;
  end if;
  update private.workers set asleep = false where id = p_worker_id and asleep;
  perform setval('private.virtual_clock', greatest(c.last_value, r.fair_key))
  from private.virtual_clock as c cross join private.ready_jobs as r
  where r.seq = v_seqs[cardinality(v_seqs)];
  return query
  with claimed as (
    delete from private.ready_jobs as r where r.seq = any (v_seqs) returning r.*
  ),
  running as (
    insert into private.running_jobs as r (
      job_id, user_id, model_id, token, worker_id, attempt,
      lease_until, deadline_at, provider_job_id, create_started_at
    )
    select
      c.job_id, c.user_id, c.model_id, nextval('private.lease_tokens'), p_worker_id, c.attempt + 1,
      now() + st.lease, now() + coalesce(m.deadline, st.lease), c.provider_job_id,
      c.create_started_at
    from claimed as c cross join private.settings as st
    left join public.models as m on m.id = c.model_id
    order by c.fair_key, c.seq
    returning r.*
  ),
  started as (
    update public.generations as g set
      status = 'processing', started_at = coalesce(g.started_at, now()), updated_at = now()
    where g.id = any (array(select r.job_id from running as r))
    returning g.id, g.provider_input, g.image_count
  )
  select
    r.job_id, r.user_id, r.token, r.attempt, m.provider, m.provider_ref, s.provider_input,
    r.provider_job_id, m.image_inputs, s.image_count, extract(epoch from m.deadline)::real
  from running as r
  inner join started as s on s.id = r.job_id
  left join public.models as m on m.id = r.model_id
  order by r.token;
end;
$$;

comment on function private.claim_jobs is
  'Moves up to p_slots jobs in fair order from ready to running and answers them. provider_job_id'
  ' is set where an earlier attempt already bought something at the provider: resume it. Seconds '
  'are durations.';

revoke all on function private.claim_jobs(bigint, integer)
from public, anon, authenticated, service_role;
grant execute on function private.claim_jobs(bigint, integer) to darkroom_worker;
