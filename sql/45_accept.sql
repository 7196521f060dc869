-- Accept: what is written when a request has passed every check.
--
-- insert_generations is shared by the ways in: enqueue (50), batch (52), retry and redrive (54).
-- The caller has locked the entitlement row; all that is written here but that row is new.

-- Wakes sleeping workers, as many as there is work for: those heard of last, which are least likely
-- dead.
--
-- NOTIFY serialises commits over the whole instance, so it is sent only when somebody sleeps. A
-- worker another transaction is waking is skipped. A wake-up that falls between is made good by the
-- worker, which claims again after it went to sleep.
create function private.wake_workers(p_at_most integer default 1) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_worker_id bigint;
begin
  for v_worker_id in
    update private.workers set asleep = false
    where id = any (array(
      select w.id from private.workers as w
      where w.asleep and w.seen_at > now() - (select s.lease from private.settings as s)
      order by w.seen_at desc limit p_at_most for update skip locked
    ))
    returning id
  loop
    perform pg_notify('darkroom_worker_' || v_worker_id, '');
  end loop;
end;
$$;

-- How many images this input makes, at most; a schema's default counts where the params are silent.
-- Where nobody can know before (no input says it, or one says "auto"), the most the model makes:
-- that is charged, and complete_jobs gives back what was not made.
create function private.count_images(p_model public.models, p_provider_input jsonb) returns smallint
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_said jsonb := p_provider_input -> p_model.image_count_input;
  v_images numeric := case jsonb_typeof(v_said)
    when 'number' then v_said::numeric
    else p_model.max_images
  end;
begin
  if v_images not between 1 and p_model.max_images then
    perform private.refuse_input(
      format('params.%s: not between 1 and %s', p_model.image_count_input, p_model.max_images)
    );
  end if;
  return v_images;
end;
$$;

-- A request that fits the model, as insert_generations takes it.
--
-- Raises: PT400 invalid_input.
create function private.draft_generation(
  p_model public.models, p_name text, p_user_id uuid, p_prompt text, p_params jsonb
) returns public.generations
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_draft public.generations;
begin
  v_draft.alias_id := nullif(p_name, p_model.id);
  v_draft.prompt := p_prompt;
  v_draft.input := p_params;
  v_draft.provider_input := private.complete_input(
    p_model, private.prepare_params(p_model, p_user_id, p_params), p_prompt
  );
  return v_draft;
end;
$$;

-- Writes an accepted request, one job for each prompt: charge, generations, ready rows; then wakes
-- workers. The draft holds what the jobs have in common, p_inputs what is sent for each prompt;
-- ids, price and times are made here. Answers the first generation, as far as the answer needs it.
--
-- fair_key is a virtual finish time: what the user queued before counts, but never less than the
-- queue's present. A price of 0 counts as 1, or included models would pass everybody.
--
-- Raises: PT402 insufficient_credits.
create function private.insert_generations(
  p_entitlement public.entitlements, p_plan private.plans, p_model public.models,
  p_draft public.generations, p_prompts text[], p_inputs jsonb[], p_is_free boolean default false
) returns public.generations
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_generation public.generations := p_draft;
  v_ids uuid[];
  v_images smallint := private.count_images(p_model, p_inputs[1]);  -- prompts do not change it
  v_step bigint := greatest(p_model.price_credits * v_images, 1)::bigint * 1000 / p_plan.weight;
  v_clock bigint;
  v_base bigint;
  v_price integer := v_images * case
    when p_is_free then 0
    when p_plan.name = 'paid' then p_model.paid_price_credits
    else p_model.price_credits
  end;
begin
  select c.last_value, greatest(c.last_value, case when exists (
    select from private.live_jobs as j where j.user_id = p_entitlement.user_id
  ) then p_entitlement.last_fair_key end) into v_clock, v_base from private.virtual_clock as c;
  for v_place in 1 .. cardinality(p_prompts) loop
    v_ids[v_place] := private.uuid_v7();
  end loop;
  perform private.charge_credits(
    p_entitlement, v_ids, v_price, v_base + v_step * cardinality(v_ids)
  );
  insert into public.generations (
    id, user_id, model_id, alias_id, batch_id, retry_of, prompt, input, provider_input,
    price_credits, image_count, queue_distance, idempotency_key
  )
  select
    j.id, p_entitlement.user_id, p_model.id, p_draft.alias_id, p_draft.batch_id, p_draft.retry_of,
    j.prompt, p_draft.input, j.provider_input, v_price, v_images,
    v_base + v_step * j.place - v_clock, p_draft.idempotency_key
  from unnest(v_ids, p_prompts, p_inputs) with ordinality as j (id, prompt, provider_input, place);
  insert into private.ready_jobs (job_id, user_id, model_id, fair_key)
  select j.id, p_entitlement.user_id, p_model.id, v_base + v_step * j.place
  from unnest(v_ids) with ordinality as j (id, place);
  if exists (select from private.workers as w where w.asleep) then
    perform private.wake_workers(cardinality(v_ids));
  end if;
  v_generation.id := v_ids[1];
  v_generation.user_id := p_entitlement.user_id;
  v_generation.model_id := p_model.id;
  v_generation.status := 'queued';
  v_generation.created_at := now();
  return v_generation;
end;
$$;
