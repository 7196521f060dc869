-- The one way in: gate, charge, and enqueue in one transaction, or nothing at all.
--
-- Lock order: enqueue locks the entitlement row first, and everything else it writes is a new row.
-- All other functions lock running or ready row -> generation -> entitlement, so none of them can
-- wait for another in a circle. The lock also serialises one user's requests: limits, balance and
-- idempotency key are read and written without a race.

-- Raises PT409 idempotency_conflict.
create function private.refuse_used_key() returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  raise sqlstate 'PT409' using
    message = 'idempotency_conflict',
    detail = 'idempotency_key was used with another payload',
    hint = 'Use a new key for a new request.';
end;
$$;

-- The generation this user's key named before; all null if the key is new. A deleted one is found
-- by no read, so it is no answer either; nor is it made anew, for its key was charged. Once it is
-- erased its key is new.
--
-- Raises: PT409 idempotency_conflict if the payload differs, PT404 not_found if it is deleted.
create function private.find_generation_by_key(
  p_user_id uuid, p_key text, p_model text, p_prompt text, p_params jsonb
) returns public.generations
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_generation public.generations;
begin
  select * into v_generation
  from public.generations where user_id = p_user_id and idempotency_key = p_key;
  if found and (
    coalesce(v_generation.alias_id, v_generation.model_id), v_generation.prompt, v_generation.input
  ) is distinct from (p_model, p_prompt, p_params) then
    perform private.refuse_used_key();
  elsif v_generation.deleted_at is not null then
    perform private.refuse_missing(
      'idempotency_key: its job was deleted',
      'restore_generation brings it back. Use a new key for a new request.'
    );
  end if;
  return v_generation;
end;
$$;

-- The user's finished generation of just this input, all images there; all null if there is none.
--
-- What was made from a source image is not reused: the file of that path may be another one now.
create function private.find_reusable(
  p_user_id uuid, p_model public.models, p_provider_input jsonb
) returns public.generations
language sql stable set search_path = pg_catalog, pg_temp as $$
  select g.*
  from public.generations as g
  where g.user_id = p_user_id
    and md5(g.provider_input::text) = md5(p_provider_input::text) and g.input ? 'seed'
    and (g.model_id, g.provider_input, g.status) = (p_model.id, p_provider_input, 'completed')
    and g.deleted_at is null and not g.input ?| p_model.image_inputs
    and g.image_count = (select count(*) from public.images as i where i.generation_id = g.id)
  order by g.id desc limit 1
$$;

-- What the ways in answer, the first time and for every repeat. Looks at no more of the queue than
-- a request should pay for: get_job_status counts on.
create function private.enqueue_answer(
  p_generation public.generations, p_is_reused boolean default false
) returns json
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_forecast private.forecast := case when p_generation.finished_at is null
    then (private.forecast_jobs(array[p_generation.id], 20))[1] end;
  v_credits integer;
begin
  select e.credits into v_credits
  from public.entitlements as e where e.user_id = p_generation.user_id;
  return json_build_object(
    'job_id', p_generation.id,
    'status', p_generation.status,
    'reused', p_is_reused,
    'credits_left', v_credits,
    'queue_position', v_forecast.queue_position,
    'eta_seconds', v_forecast.eta_seconds,
    'poll_after_ms', case when p_generation.finished_at is null
      then private.poll_after_ms(p_generation.created_at, v_forecast.due_seconds)
    end
  );
end;
$$;

-- With generic plans, here and in all it calls: every row is
-- reached by its key, and a plan made for one request would cost more than the request. By indexes
-- only: a plan made while the queue was empty would else read all of it once it is long.
--
-- Locks: the entitlement row.
-- Raises: see the comment on public.enqueue_generation.
create function private.enqueue_generation(
  p_model text, p_prompt text, p_params jsonb, p_idempotency_key text
) returns json
language plpgsql security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan set enable_seqscan = off set enable_bitmapscan = off
set jit = off as $$
declare
  v_user_id uuid := private.require_user_id(p_writes => true);
  v_prompt text := coalesce(p_prompt, '');
  v_params jsonb := private.read_request(array[v_prompt], p_params, p_idempotency_key);
  v_entitlement public.entitlements;
  v_plan private.plans;
  v_model public.models;
  v_draft public.generations;
  v_known public.generations;
begin
  v_entitlement := private.lock_entitlement(v_user_id);
  if p_idempotency_key is not null then
    v_known := private.find_generation_by_key(
      v_user_id, p_idempotency_key, p_model, v_prompt, v_params
    );
    if v_known.id is not null then
      return private.enqueue_answer(v_known);
    end if;
  end if;
  v_plan := private.plan_of(v_entitlement);
  v_model := private.require_model(p_model, v_user_id, v_plan.name);
  v_draft := private.draft_generation(v_model, p_model, v_user_id, v_prompt, v_params);
  if v_params @> '{"reuse": true}' then
    v_known := private.find_reusable(v_user_id, v_model, v_draft.provider_input);
    if v_known.id is not null then
      return private.enqueue_answer(v_known, true);
    end if;
  end if;
  perform private.check_limits(v_entitlement, v_plan);
  v_draft.idempotency_key := p_idempotency_key;
  v_known := private.insert_generations(
    v_entitlement, v_plan, v_model, v_draft, array[v_prompt], array[v_draft.provider_input]
  );
  return private.enqueue_answer(v_known);
end;
$$;
