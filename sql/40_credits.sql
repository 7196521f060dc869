-- Credits: grant and refund. With the charge, in accept (50), the only code that moves a balance.
--
-- Every step locks the user's entitlement row, writes one ledger entry that holds the new balance,
-- and moves the balance by the same amount, in one transaction. Give-backs are keyed by generation:
-- the unique ledger entry goes in first, and the balance moves only if it did.

-- Gives credits of a generation back; the second time does nothing.
--
-- Locks: the entitlement row.
create function private.refund_generation(
  p_user_id uuid, p_generation_id uuid, p_credits integer
) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_balance integer;
begin
  select credits + p_credits into v_balance
  from public.entitlements where user_id = p_user_id for update;
  if not found then
    return;
  end if;
  insert into public.credit_ledger (user_id, generation_id, kind, amount, balance_after)
  values (p_user_id, p_generation_id, 'refund', p_credits, v_balance)
  on conflict (generation_id) where kind = 'refund' do nothing;
  if found then
    update public.entitlements set credits = v_balance where user_id = p_user_id;
  end if;
end;
$$;

-- A user's plan, balance and limits as the API shows them; null if there is no such user.
create function private.entitlement_json(p_user_id uuid) returns json
language sql stable set search_path = pg_catalog, pg_temp as $$
  select json_build_object(
    'user_id', e.user_id,
    'plan', p.name,
    'paid_until', e.paid_until,
    'blocked_until', e.blocked_until,
    'credits', e.credits,
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

-- Locks: the entitlement row.
create function public.grant_credits(
  user_id uuid, amount integer, kind text, external_id text
) returns json
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
#variable_conflict use_column
declare
  v_user_id uuid := user_id;
  v_amount integer := amount;
  v_external_id text := external_id;
  v_credits integer;
  v_charged bigint;
  v_entry public.credit_ledger;
begin
  perform private.require_writable();
  if ((kind = 'grant' and v_amount > 0) or (kind = 'adjust' and v_amount <> 0)) is not true then
    perform private.refuse_input(
      'kind: grant with a positive amount, or adjust with one that is not 0'
    );
  elsif coalesce(octet_length(v_external_id) not between 1 and 200, true) then
    perform private.refuse_input(
      'external_id: not 1 to 200 bytes', 'Use the payment''s id: repeats are applied once.'
    );
  end if;
  select credits into v_credits from public.entitlements where user_id = v_user_id for update;
  if not found then
    perform private.refuse_missing('user_id: no such user', 'Use the id of auth.users.');
  end if;
  loop  -- once more where another user's grant takes the id just now
    select * into v_entry from public.credit_ledger where external_id = v_external_id;
    if v_entry.id is not null and (v_entry.user_id, v_entry.amount, v_entry.kind)
      is distinct from (v_user_id, v_amount, kind) then
      perform private.refuse(
        'idempotency_conflict', 'external_id was used for another grant',
        'Use the payment''s own id, once for each payment.'
      );
    elsif v_entry.id is not null then
      return json_build_object('credits', v_credits, 'applied', false);
    end if;
    -- Far below what an integer holds, also once what jobs under way were charged has come back: so
    -- no refund can ever overflow.
    select coalesce(sum(g.price_credits), 0) into v_charged
    from private.live_jobs as j inner join public.generations as g on g.id = j.job_id
    where j.user_id = v_user_id;
    if v_credits::bigint + v_amount not between 0 and 1000000000 - v_charged then
      perform private.refuse_input(
        format('amount: the balance is %s, and %s are in jobs under way', v_credits, v_charged)
      );
    end if;
    insert into public.credit_ledger (user_id, kind, amount, balance_after, external_id)
    values (v_user_id, kind, v_amount, v_credits + v_amount, v_external_id)
    on conflict (external_id) where external_id is not null do nothing;
    exit when found;
  end loop;
  update public.entitlements set credits = credits + v_amount where user_id = v_user_id;
  return json_build_object('credits', v_credits + v_amount, 'applied', true);
end;
$$;

comment on function public.grant_credits is
  'Adds credits to a user: kind grant (amount > 0) or adjust (either sign). The same external_id '
  'is applied once. Answers {credits, applied}. Errors: PT400 invalid_input, PT404 not_found, '
  'PT409 idempotency_conflict.';

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
