-- Credits: what comes in, what goes back, what ends. With the charge, in accept (50), the only code
-- that moves a balance.
--
-- Every step locks the user's entitlement row, writes its ledger entries, each with the balance
-- after it, and moves the balance by the same amount, in one transaction. Give-backs are keyed by
-- generation: the unique ledger entry goes in first, and the balance moves only if it did.
--
-- Credits with an end lie in buckets (10), and so do those that are to be spent before or after
-- others. Who has none pays nothing for that: entitlements.credits_end_at is null. What has ended
-- leaves the balance before anything else is done with it, whether or not pg_cron is alive.

-- Writes an entry of what is given or, if negative, taken, and moves balance, bucket and debt. A
-- debt is paid first by what comes in; what is to be taken and is not there becomes one. False if
-- the entry is there already or the user is gone, and then nothing moves.
--
-- Locks: the entitlement row, then the bucket.
create function private.book(
  p_user_id uuid, p_kind text, p_given integer, p_bucket_id bigint default null,
  p_generation_id uuid default null, p_external_id text default null
) returns boolean
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_has public.entitlements;
  v_debt integer;
begin
  select * into v_has from public.entitlements where user_id = p_user_id for update;
  if not found then
    return false;
  end if;
  v_debt := case
    when p_given > 0 then -least(p_given, v_has.debt) else greatest(-p_given - v_has.credits, 0)
  end;
  insert into public.credit_ledger (
    user_id, generation_id, kind, amount, balance_after, external_id, bucket_id, debt
  )
  values (
    p_user_id, p_generation_id, p_kind, p_given + v_debt, v_has.credits + p_given + v_debt,
    p_external_id, p_bucket_id, v_debt
  )
  on conflict do nothing;
  if not found then
    return false;
  end if;
  if p_bucket_id is not null then
    update private.credit_buckets set credits = credits + p_given + v_debt where id = p_bucket_id;
    v_has.credits_end_at := (
      select min(b.expires_at) from private.credit_buckets as b
      where b.user_id = p_user_id and b.credits > 0
    );
  end if;
  update public.entitlements set
    credits = credits + p_given + v_debt, debt = debt + v_debt,
    credits_end_at = v_has.credits_end_at
  where user_id = p_user_id;
  return true;
end;
$$;

-- Takes what has ended from the balances of these users. Answers how many there are.
--
-- Locks: the entitlement rows.
create function private.end_credits(p_user_ids uuid[]) returns integer
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_bucket private.credit_buckets;
begin
  perform from public.entitlements where user_id = any (p_user_ids) order by user_id for update;
  for v_bucket in
    select * from private.credit_buckets
    where user_id = any (p_user_ids) and credits > 0 and expires_at <= now() order by id
  loop
    perform private.book(v_bucket.user_id, 'expire', -v_bucket.credits, v_bucket.id);
  end loop;
  return cardinality(p_user_ids);
end;
$$;

create function private.expire_credits(p_at_most integer default 1000) returns integer
language plpgsql security definer set search_path = pg_catalog, pg_temp
set lock_timeout = '100ms' as $$
begin
  return private.skip_failing('select private.end_credits($1)', array(
    select b.user_id from private.credit_buckets as b
    where b.expires_at <= now() and b.credits > 0
    group by b.user_id order by min(b.expires_at)
    limit p_at_most + (select count(*) from private.skipped_rows)
  ));
end;
$$;

comment on function private.expire_credits is
  'Books what has ended (expire), each minute by pg_cron. It cannot be spent before that either. '
  'Answers of how many users.';

-- What can be spent now: what has ended may not be booked yet.
create function private.spendable_credits(p_has public.entitlements) returns integer
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
begin
  if p_has.credits_end_at <= now() then
    return p_has.credits - (
      select coalesce(sum(b.credits), 0) from private.credit_buckets as b
      where b.user_id = p_has.user_id and b.expires_at <= now()
    );
  end if;
  return p_has.credits;
end;
$$;

-- What these credits of a user are made of, the buckets and what is in none, and how much is spent
-- before each.
create function private.credits_in_order(p_user_id uuid, p_credits integer)
returns table (bucket_id bigint, external_id text, credits integer, before bigint)
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
begin
  return query
  with parts as (
    select b.id, b.external_id, b.credits::integer as credits, b.priority, b.expires_at
    from private.credit_buckets as b
    where b.user_id = p_user_id and b.credits > 0
  ),
  all_parts as (
    select * from parts
    union all
    select null, null, p_credits - (select coalesce(sum(p.credits), 0) from parts as p)::integer,
      0, 'infinity'
  )
  select
    a.id, a.external_id, a.credits,
    sum(a.credits) over (order by a.priority, a.expires_at, a.id) - a.credits
  from all_parts as a where a.credits > 0;
end;
$$;

-- Writes the charges of jobs, in their order, for a user who has buckets: an entry for each part of
-- a price that comes from another. p_credits is the balance before; accept (50) moves it.
--
-- Locks: the buckets.
create function private.charge_buckets(
  p_user_id uuid, p_credits integer, p_job_ids uuid[], p_price bigint
) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  with parts as (
    select
      j.id as generation_id, j.place, s.bucket_id, s.before,
      (
        least(s.before + s.credits, j.place * p_price)
        - greatest(s.before, (j.place - 1) * p_price)
      )::integer as credits
    from unnest(p_job_ids) with ordinality as j (id, place)
    inner join private.credits_in_order(p_user_id, p_credits) as s
      on s.before < j.place * p_price and s.before + s.credits > (j.place - 1) * p_price
  ),
  booked as (
    insert into public.credit_ledger (
      user_id, generation_id, kind, amount, balance_after, bucket_id
    )
    select
      p_user_id, p.generation_id, 'charge', -p.credits,
      p_credits - sum(p.credits) over (order by p.place, p.before), p.bucket_id
    from parts as p order by p.place, p.before
  )
  update private.credit_buckets as b set credits = b.credits - p.credits
  from (
    select q.bucket_id, sum(q.credits) as credits from parts as q group by q.bucket_id
  ) as p
  where b.id = p.bucket_id;
  update public.entitlements set credits_end_at = (
    select min(b.expires_at) from private.credit_buckets as b
    where b.user_id = p_user_id and b.credits > 0
  )
  where user_id = p_user_id;
end;
$$;

-- Gives credits of a generation back to where they came from, first what was spent last; the second
-- time does nothing. What has ended meanwhile can be spent for settings.refund_grace: once, for
-- else jobs that fail could keep credits for ever.
--
-- Locks: the entitlement row, then the buckets.
create function private.refund_generation(
  p_user_id uuid, p_generation_id uuid, p_credits integer
) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_left integer := p_credits;
  v_part integer;
  v_paid record;
begin
  perform private.end_credits(array[p_user_id])
  from public.entitlements where user_id = p_user_id and credits_end_at <= now();
  for v_paid in
    with paid as (
      select
        l.bucket_id, l.id, -l.amount as credits, coalesce(b.priority > 0, false) as is_last,
        b.expires_at <= now() as is_over
      from public.credit_ledger as l
      left join private.credit_buckets as b on b.id = l.bucket_id
      where l.generation_id = p_generation_id and l.kind = 'charge' and l.bucket_id is not null
    )
    select * from (
      select * from paid
      union all
      select null, null, g.price_credits - (select coalesce(sum(p.credits), 0) from paid as p),
        false, false
      from public.generations as g where g.id = p_generation_id
    ) as p
    order by p.is_last desc, p.bucket_id is not null, p.id desc
  loop
    v_part := least(v_left, v_paid.credits);
    continue when v_part = 0 and (p_credits > 0 or v_paid.bucket_id is not null);
    if v_paid.is_over then
      update private.credit_buckets set
        expires_at = now() + (select s.refund_grace from private.settings as s), is_extended = true
      where id = v_paid.bucket_id and not is_extended;
    end if;
    exit when not private.book(p_user_id, 'refund', v_part, v_paid.bucket_id, p_generation_id);
    v_left := v_left - v_part;
  end loop;
end;
$$;

-- A user's plan, balance and limits as the API shows them; null if there is no such user.
create function private.entitlement_json(p_user_id uuid) returns json
language sql stable set search_path = pg_catalog, pg_temp as $$
  select json_build_object(
    'user_id', e.user_id,
    'plan', p.name,
    'paid_until', e.paid_until,
    'credits', private.spendable_credits(e),
    'debt', e.debt,
    'credits_ending', (
      select coalesce(
        json_agg(
          json_build_object('credits', b.credits, 'expires_at', b.expires_at) order by b.expires_at
        ), '[]'
      )
      from private.credit_buckets as b
      where b.user_id = p_user_id and b.credits > 0 and b.expires_at < 'infinity'
        and b.expires_at > now()
    ),
    'active_jobs', (select count(*) from private.live_jobs as j where j.user_id = p_user_id),
    'max_active', p.max_active,
    'minute_jobs', case
      when e.minute_started_at > now() - interval '1 minute' then e.minute_jobs
      else 0
    end,
    'max_per_minute', p.max_per_minute,
    'max_batch', p.max_batch,
    'is_busy', private.is_busy(p)
  )
  from public.entitlements as e
  cross join lateral private.plan_of(e) as p
  where e.user_id = p_user_id
$$;

-- Gives or takes credits, once for each external id. What is taken comes first from the bucket of
-- the grant p_of, then from what would be spent last: it leaves its buckets before it is taken.
--
-- Locks: the entitlement row, the buckets.
-- Raises: PT400 invalid_input, PT404 not_found, PT409 idempotency_conflict.
create function private.move_credits(
  p_user_id uuid, p_kind text, p_amount integer, p_external_id text,
  p_expires_at timestamptz default null, p_priority integer default 0, p_of text default null
) returns json
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_has public.entitlements;
  v_known public.credit_ledger;
  v_charged bigint;
  v_bucket_id bigint;
  v_part record;
  v_left bigint := -p_amount::bigint;
  v_is_booked boolean;
begin
  select * into v_has from public.entitlements where user_id = p_user_id for update;
  if not found then
    perform private.refuse_missing('user_id: no such user', 'Use the id of auth.users.');
  end if;
  select * into v_known from public.credit_ledger where external_id = p_external_id;
  if (v_known.user_id, v_known.kind, v_known.amount - v_known.debt)
    = (p_user_id, p_kind, p_amount) then
    return json_build_object(
      'credits', private.spendable_credits(v_has), 'debt', v_has.debt, 'applied', false
    );
  elsif v_known.id is null then
    if v_has.credits_end_at <= now() then
      perform private.end_credits(array[p_user_id]);
      select * into v_has from public.entitlements where user_id = p_user_id;
    end if;
    -- Far below what an integer holds, also once what jobs under way were charged has come back: so
    -- no refund can ever overflow.
    select coalesce(sum(g.price_credits), 0) into v_charged
    from private.live_jobs as j inner join public.generations as g on g.id = j.job_id
    where j.user_id = p_user_id;
    if v_has.credits::bigint - v_has.debt + p_amount
      not between -1000000000 and 1000000000 - v_charged then
      perform private.refuse_input(format(
        'amount: the balance is %s, and %s are in jobs under way', v_has.credits - v_has.debt,
        v_charged
      ));
    end if;
    if p_amount > 0 and (p_expires_at < 'infinity' or p_priority <> 0) then
      insert into private.credit_buckets (user_id, external_id, priority, expires_at, credits)
      values (p_user_id, p_external_id, p_priority, coalesce(p_expires_at, 'infinity'), 0)
      returning id into v_bucket_id;
    elsif v_has.credits_end_at is not null then
      for v_part in
        select s.bucket_id, least(s.credits, greatest(v_left - s.before, 0))::integer as credits
        from (
          select c.bucket_id, c.credits, sum(c.credits) over (
            order by c.external_id = p_of is true desc, c.before desc
          ) - c.credits as before
          from private.credits_in_order(p_user_id, v_has.credits) as c
        ) as s
        where s.bucket_id is not null and v_left > s.before
      loop
        perform private.book(p_user_id, p_kind, -v_part.credits, v_part.bucket_id);
        perform private.book(p_user_id, p_kind, v_part.credits);
      end loop;
    end if;
    v_is_booked := private.book(
      p_user_id, p_kind, p_amount, v_bucket_id, p_external_id => p_external_id
    );
  end if;
  -- Or another user's took it just now.
  if v_is_booked is not true then
    perform private.refuse(
      'idempotency_conflict', 'external_id was used for another grant',
      'Use the payment''s own id, once for each payment.'
    );
  end if;
  select * into v_has from public.entitlements where user_id = p_user_id;
  return json_build_object('credits', v_has.credits, 'debt', v_has.debt, 'applied', true);
end;
$$;

create function public.grant_credits(
  user_id uuid, amount integer, kind text, external_id text, expires_at timestamptz default null,
  priority integer default 0
) returns json
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  perform private.require_writable();
  if ((kind = 'grant' and amount > 0) or (kind = 'adjust' and amount <> 0)) is not true then
    perform private.refuse_input(
      'kind: grant with a positive amount, or adjust with one that is not 0'
    );
  elsif coalesce(octet_length(external_id) not between 1 and 200, true) then
    perform private.refuse_input(
      'external_id: not 1 to 200 bytes', 'Use the payment''s id: repeats are applied once.'
    );
  elsif coalesce(priority not between -100 and 100, true) then
    perform private.refuse_input('priority: not -100 to 100');
  elsif expires_at = '-infinity' or (expires_at < 'infinity' or priority <> 0) and amount < 0 then
    perform private.refuse_input('expires_at, priority: of what is given, not of what is taken');
  end if;
  return private.move_credits(user_id, kind, amount, external_id, expires_at, priority);
end;
$$;

comment on function public.grant_credits is
  'Adds credits to a user: kind grant (amount > 0) or adjust (either sign). They never end, or at '
  'expires_at; of several the smallest priority (-100 to 100) is spent first, of equal ones what '
  'ends first. What adjust takes and is not there becomes a debt, which later grants and refunds '
  'pay first. The same external_id is applied once. Answers {credits, debt, applied}. Errors: '
  'PT400 invalid_input, PT404 not_found, PT409 idempotency_conflict.';

-- Locks: the entitlement row.
create function public.set_paid(user_id uuid, paid_until timestamptz) returns json
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  perform private.require_writable();
  update public.entitlements as e set paid_until = set_paid.paid_until
  where e.user_id = set_paid.user_id;
  if not found then
    perform private.refuse_missing('user_id: no such user', 'Use the id of auth.users.');
  end if;
  return private.entitlement_json(user_id);
end;
$$;

comment on function public.set_paid is
  'Makes a user paid until a time (infinity: without end; null: not paid). Repeating it changes '
  'nothing. Answers the entitlement. Errors: PT404 not_found.';

-- Gives a new user an entitlement with the welcome credits.
create function private.create_entitlement(p_user_id uuid) returns void
language sql set search_path = pg_catalog, pg_temp as $$
  with created as (
    insert into public.entitlements (user_id, credits)
    select p_user_id, s.welcome_credits from private.settings as s
    on conflict (user_id) do nothing
    returning user_id, credits
  )
  insert into public.credit_ledger (user_id, kind, amount, balance_after, external_id)
  select c.user_id, 'grant', c.credits, c.credits, 'welcome:' || c.user_id
  from created as c
  where c.credits > 0
$$;

-- Definer: sign-up runs as the auth server's role, which has no rights here.
create function private.create_entitlement_of_new_user() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  perform private.create_entitlement(new.id);
  return null;
end;
$$;

create trigger darkroom_create_entitlement
after insert on auth.users
for each row execute function private.create_entitlement_of_new_user();
