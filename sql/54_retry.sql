-- Again: a failed or canceled generation as a new one.
--
-- retry_generation is the user's and is charged as any request; redrive_failed is the operator's,
-- after an outage, and is free. Either way the old generation stays what it was, so each is
-- charged once or refunded once, and retry_of says where the new one comes from. While that one is
-- under way or done, a further retry answers with it: a double tap buys once. A generation and its
-- retries, and theirs, are the tries of one wish, of which an operator gives one picture.

-- The generation that repeats this one and is under way or done; all null if there is none.
create function private.find_retry(p_generation_id uuid) returns public.generations
language sql stable set search_path = pg_catalog, pg_temp as $$
  select g.* from public.generations as g
  where g.retry_of = p_generation_id and g.status not in ('failed', 'canceled')
  order by g.deleted_at nulls first, g.id limit 1
$$;

-- The user's generation, if it failed or was canceled.
--
-- Raises: PT404 not_found, PT409 not_finished, PT409 already_finished.
create function private.require_retryable(p_job_id uuid, p_user_id uuid) returns public.generations
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_generation public.generations := private.require_generation(p_job_id, p_user_id);
begin
  if v_generation.finished_at is null then
    raise sqlstate 'PT409' using
      message = 'not_finished',
      detail = format('the job is %s', v_generation.status),
      hint = 'Wait for its end, or cancel it first.';
  elsif v_generation.status = 'completed' then
    raise sqlstate 'PT409' using
      message = 'already_finished',
      detail = 'the job is completed',
      hint = 'Enqueue a new one.';
  end if;
  return v_generation;
end;
$$;

-- Locks: the entitlement row.
-- Raises: see the comment on public.retry_generation.
create function private.retry_generation(p_job_id uuid) returns json
language plpgsql security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan set enable_seqscan = off set enable_bitmapscan = off
set jit = off as $$
declare
  v_user_id uuid := private.require_user_id(p_writes => true);
  v_entitlement public.entitlements := private.lock_entitlement(v_user_id);
  v_plan private.plans := private.plan_of(v_entitlement);
  v_old public.generations := private.require_retryable(p_job_id, v_user_id);
  v_known public.generations := private.find_retry(p_job_id);
  v_model public.models;
  v_draft public.generations;
begin
  if v_known.id is not null and v_known.deleted_at is null then
    return private.enqueue_answer(v_known);
  end if;
  v_model := private.require_model(v_old.model_id, v_user_id, v_plan.name);
  v_draft := private.draft_generation(
    v_model, coalesce(v_old.alias_id, v_model.id), v_user_id, v_old.prompt, v_old.input
  );
  v_draft.retry_of := p_job_id;
  perform private.check_limits(v_entitlement, v_plan);
  v_known := private.insert_generations(
    v_entitlement, v_plan, v_model, v_draft, array[v_draft.prompt], array[v_draft.provider_input]
  );
  return private.enqueue_answer(v_known);
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
    from tries as t inner join public.generations as g on g.retry_of = t.id
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
  v_entitlement public.entitlements := private.lock_entitlement(p_old.user_id);
  v_plan private.plans := private.plan_of(v_entitlement);
  v_seed jsonb := p_old.provider_input -> 'seed';
  v_model public.models;
  v_draft public.generations;
begin
  select * into v_model from public.models where id = p_old.model_id and is_active;
  if not found then
    perform private.refuse_missing('model: not active', 'Activate it.');
  elsif v_model.requires_paid and v_plan.name <> 'paid' then
    raise sqlstate 'PT403' using message = 'requires_paid_plan';
  end if;
  v_draft := private.draft_generation(
    v_model, coalesce(p_old.alias_id, v_model.id), p_old.user_id, p_old.prompt, p_old.input
  );
  v_draft.retry_of := p_old.id;
  if private.input_problem(v_seed, v_model.input_schema #> '{properties,seed}') is null then
    v_draft.provider_input := v_draft.provider_input || jsonb_build_object('seed', v_seed);
  end if;
  perform private.insert_generations(
    v_entitlement, v_plan, v_model, v_draft,
    array[v_draft.prompt], array[v_draft.provider_input], p_is_free => true
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
-- Raises: PT400 invalid_input.
create function private.redrive_failed(
  p_code text, p_since timestamptz, p_at_most integer
) returns json
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_user_id uuid;
  v_credits bigint;
  v_wish record;
  v_redriven integer := 0;
  v_reason text;
  v_skipped jsonb := '{}'::jsonb;
begin
  perform private.require_writable();
  if not exists (select from private.error_codes where code = p_code) then
    perform private.refuse_input('code: not a code of private.error_codes');
  elsif p_since is null or coalesce(p_at_most not between 1 and 10000, true) then
    perform private.refuse_input('since: missing, or at_most: not between 1 and 10000');
  end if;
  <<users>>
  for v_user_id in
    select distinct g.user_id from public.generations as g
    where g.status = 'failed' and g.error_code = p_code and g.finished_at >= p_since
      and g.deleted_at is null
    order by g.user_id
  loop
    select e.credits into v_credits
    from public.entitlements as e where e.user_id = v_user_id for update;
    v_credits := v_credits - (
      select coalesce(sum(w.price_credits), 0) from private.wishes_of(v_user_id) as w
      where w.given_at >= p_since
    );
    for v_wish in
      select g as last, w.price_credits as price
      from private.wishes_of(v_user_id) as w
      inner join public.generations as g on g.id = w.last_id
      where w.is_open and g.status = 'failed' and g.error_code = p_code
        and g.finished_at >= p_since
      order by g.id
    loop
      exit users when v_redriven = p_at_most;
      begin
        v_reason := 'insufficient_credits';
        if v_wish.price <= v_credits is not false then
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
  return json_strip_nulls(
    json_build_object('redriven', v_redriven, 'skipped', nullif(v_skipped, '{}'))
  );
end;
$$;
