-- Again: a failed or canceled generation as a new one.
--
-- retry_generation is the user's and is charged as any request; redrive_failed is the operator's,
-- after an outage, and is free. Either way the old generation stays what it was, so each is
-- charged once or refunded once, and retry_of says where the new one comes from. While that one is
-- under way or done, a further retry answers with it: a double tap buys once. A generation and its
-- retries, and theirs, are the tries of one wish, of which an operator gives one picture.

-- Locks: the entitlement row.
-- Raises: see the comment on public.retry_generation.
create function private.retry_generation(
  p_job_id uuid, p_max_price_credits integer
) returns json
language plpgsql security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan set enable_seqscan = off set enable_bitmapscan = off
set jit = off as $$
declare
  v_user_id uuid := private.require_user_id(p_writes => true);
  v_old public.generations := private.require_generation(p_job_id, v_user_id);
  v_gate private.gate := private.gate(v_user_id, v_old.model_id);
  v_known public.generations;
begin
  if v_old.finished_at is null then
    perform private.refuse(
      'not_finished', format('the job is %s', v_old.status),
      'Wait for its end, or cancel it first.'
    );
  elsif v_old.status = 'completed' then
    perform private.refuse('already_finished', 'the job is completed', 'Enqueue a new one.');
  end if;
  select g.* into v_known
  from private.retries as r inner join public.generations as g on g.id = r.generation_id
  where r.retry_of = p_job_id and g.status not in ('failed', 'canceled') and g.deleted_at is null
  order by g.id limit 1;
  if found then
    return private.known_answer(v_known, v_gate.credits);
  end if;
  if v_gate.is_model_unclear then
    v_gate.model := private.require_model(v_gate, v_old.model_id);
  end if;
  return private.accept(
    v_gate, coalesce(v_old.alias_id, v_old.model_id), v_old.input, array[v_old.prompt],
    private.provider_inputs(v_gate.model, v_user_id, v_old.input, array[v_old.prompt]),
    p_retry_of => p_job_id, p_max_price => p_max_price_credits
  );
end;
$$;

-- What a user wished for, each wish with all its tries: the last of them that is not deleted, the
-- price of one, whether none is under way or done, and since when one is that was free.
--
-- Each try is reached by its key, whatever the planner thinks of how many there are.
create function private.wishes_of(p_user_id uuid)
returns table (last_id uuid, price_credits integer, is_open boolean, given_at timestamptz)
language sql stable set search_path = pg_catalog, pg_temp
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off as $$
  with recursive tries as (
    select
      g.id as wish_id, g.id, g.retry_of, g.price_credits, g.created_at, g.deleted_at,
      g.status in ('failed', 'canceled') as is_lost
    from public.generations as g
    where g.user_id = p_user_id
      and not exists (select from public.generations as o where o.id = g.retry_of)
    union all
    select
      t.wish_id, g.id, g.retry_of, g.price_credits, g.created_at, g.deleted_at,
      g.status in ('failed', 'canceled')
    from tries as t
    inner join private.retries as r on r.retry_of = t.id
    inner join public.generations as g on g.id = r.generation_id
  )
  select
    (array_agg(t.id order by t.id desc) filter (where t.deleted_at is null))[1],
    max(t.price_credits),
    bool_and(t.is_lost),
    min(t.created_at) filter (
      where not t.is_lost and t.price_credits = 0 and t.retry_of is not null
    )
  from tries as t
  group by t.wish_id
$$;

-- Queues one failed generation again, free, with what was sent before, as far as the model still
-- takes that. A pause is no reason against it: the job waits.
--
-- Locks: the entitlement row.
-- Raises: PT400 invalid_input, PT401 not_authenticated, PT403 requires_paid_plan, PT404 not_found.
create function private.redrive_generation(p_old public.generations) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_gate private.gate := private.gate(p_old.user_id, p_old.model_id);
  v_seed jsonb := p_old.provider_input -> 'seed';
  v_inputs jsonb[];
begin
  if (v_gate.model).id is null then
    perform private.refuse_missing('model: not active', 'Activate it.');
  elsif (v_gate.model).requires_paid and v_gate.plan <> 'paid' then
    perform private.refuse('requires_paid_plan', 'model: for paid users');
  end if;
  v_inputs := private.provider_inputs(
    v_gate.model, p_old.user_id, p_old.input, array[p_old.prompt]
  );
  if v_seed is not null and private.input_problem(
    v_seed, (v_gate.model).input_schema #> '{properties,seed}'
  ) is null then
    v_inputs[1] := v_inputs[1] || jsonb_build_object('seed', v_seed);
  end if;
  perform private.accept(
    v_gate, coalesce(p_old.alias_id, p_old.model_id), p_old.input, array[p_old.prompt], v_inputs,
    p_retry_of => p_old.id, p_is_free => true
  );
end;
$$;

-- Users in order, so that two runs lock in the same order; and each
-- user's wishes are read once nobody else can add a try.
--
-- What is given is free, for the failed tries were refunded: so it may cost no more than the user
-- has, or failures at the same credits would each become a picture. What was given since the same
-- time counts.
--
-- Locks: the users' entitlement rows.
create function public.redrive_failed(
  code text, since timestamptz, at_most integer default 1000
) returns json
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_user_id uuid;
  v_credits bigint;
  v_is_blocked boolean;
  v_wish record;
  v_redriven integer := 0;
  v_reason text;
  v_skipped jsonb := '{}'::jsonb;
begin
  perform private.require_writable();
  if not exists (select from private.error_codes as c where c.code = redrive_failed.code) then
    perform private.refuse_input('code: not a code of private.error_codes');
  elsif since is null or coalesce(at_most not between 1 and 10000, true) then
    perform private.refuse_input('since: missing, or at_most: not between 1 and 10000');
  end if;
  <<users>>
  for v_user_id in
    select distinct g.user_id from public.generations as g
    where g.status = 'failed' and g.error_code = redrive_failed.code and g.finished_at >= since
      and g.deleted_at is null
    order by g.user_id
  loop
    select private.spendable_credits(e), e.blocked_until > now() into v_credits, v_is_blocked
    from public.entitlements as e where e.user_id = v_user_id for update;
    v_credits := v_credits - (
      select coalesce(sum(w.price_credits), 0) from private.wishes_of(v_user_id) as w
      where w.given_at >= since
    );
    for v_wish in
      select g as last, w.price_credits as price
      from private.wishes_of(v_user_id) as w
      inner join public.generations as g on g.id = w.last_id
      where w.is_open and g.status = 'failed' and g.error_code = redrive_failed.code
        and g.finished_at >= since
      order by g.id
    loop
      exit users when v_redriven = at_most;
      begin
        v_reason := case when v_is_blocked then 'account_blocked' else 'insufficient_credits' end;
        if v_wish.price <= v_credits is not false and v_is_blocked is not true then
          perform private.redrive_generation(v_wish.last);
          v_reason := null;
        end if;
      exception
        -- One that fits no more must not stop all others.
        when others then
          v_reason := case when sqlstate like 'PT%' then sqlerrm else 'internal' end;
          if v_reason = 'internal' then
            raise warning 'redrive_failed: %: % %', (v_wish.last).id, sqlstate, sqlerrm
              using errcode = '01000';
          end if;
      end;
      if v_reason is null then
        v_redriven := v_redriven + 1;
        v_credits := v_credits - v_wish.price;
      else
        v_skipped := v_skipped
          || jsonb_build_object(v_reason, coalesce((v_skipped ->> v_reason)::integer, 0) + 1);
      end if;
    end loop;
  end loop;
  perform private.wake_workers(v_redriven);
  return json_strip_nulls(
    json_build_object('redriven', v_redriven, 'skipped', nullif(v_skipped, '{}'))
  );
end;
$$;

comment on function public.redrive_failed is
  'Queues again what failed with a code since a time, free, with the same input: of each wish the '
  'last try, unless one is under way or done, and for each user no more than the credits at hand '
  'would buy. Answers {redriven, skipped: {reason: count} if any}; reasons are '
  'insufficient_credits, those of retry_generation, and internal. Call again while redriven is '
  'at_most. It reads the whole history: an operator''s tool. Errors: PT400 invalid_input.';
