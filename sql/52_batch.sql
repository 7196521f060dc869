-- Batch: many prompts in one call, all or nothing.
--
-- enqueue_batch writes one generation for each prompt, each charged by an entry of its own, under
-- one lock of the entitlement. It is let in whole while there is room for one job more, up to the
-- plan's max_batch. Fairness needs no rule of its own: the jobs of a batch have fair keys behind
-- one another, so others' jobs go between them.

-- A batch as the API shows it: the jobs that are not deleted. Raises: PT404 not_found if all are.
create function private.batch_json(p_batch public.batches) returns json
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_answer json;
begin
  select json_build_object(
    'batch_id', p_batch.id,
    'job_ids', coalesce(json_agg(g.id order by g.id), '[]'),
    'status', case when bool_or(g.finished_at is null) then 'active' else 'finished' end,
    'queued', count(*) filter (where g.status = 'queued'),
    'processing', count(*) filter (where g.status = 'processing'),
    'completed', count(*) filter (where g.status = 'completed'),
    'failed', count(*) filter (where g.status = 'failed'),
    'canceled', count(*) filter (where g.status = 'canceled'),
    'progress', coalesce(
      round(sum(case when g.finished_at is null then r.progress else 100 end) / count(*)), 0
    ),
    'credits_left', (
      select private.spendable_credits(e)
      from public.entitlements as e where e.user_id = p_batch.user_id
    ),
    'poll_after_ms', case when bool_or(g.finished_at is null)
      then private.poll_after_ms(p_batch.created_at)
    end,
    'created_at', p_batch.created_at
  ) into v_answer
  from unnest(p_batch.job_ids) as j (id)
  cross join lateral (
    select * from public.generations where id = j.id and deleted_at is null offset 0
  ) as g
  left join private.running_jobs as r on r.job_id = g.id
  having count(*) > 0;
  if v_answer is null then
    perform private.refuse_missing(
      'batch_id: its jobs were deleted',
      'restore_generation brings them back. Use a new key for a new request.'
    );
  end if;
  return v_answer;
end;
$$;

-- Locks: the entitlement row.
-- Raises: see the comment on public.enqueue_batch.
create function private.enqueue_batch(
  p_model text, p_prompts text[], p_params jsonb, p_idempotency_key text,
  p_max_price_credits integer
) returns json
language plpgsql security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan set enable_seqscan = off set enable_bitmapscan = off
set jit = off as $$
declare
  v_user_id uuid := private.require_user_id(p_writes => true);
  v_prompts text[];
  v_params jsonb;
  v_gate private.gate;
  v_hash text;
  v_batch public.batches;
begin
  -- 100: the most that any plan may allow.
  if coalesce(cardinality(p_prompts) not between 1 and 100, true) or array_ndims(p_prompts) > 1 then
    perform private.refuse_input('prompts: not 1 to 100 texts');
  end if;
  v_prompts := array(select coalesce(p.prompt, '') from unnest(p_prompts) as p (prompt));
  v_params := private.read_request(v_prompts, p_params, p_idempotency_key, 'prompts[%1$s]');
  if v_params ? 'reuse' then
    perform private.refuse_input('params.reuse: not in a batch');
  end if;
  -- No model has a longer name, and JSON may be six times as long as the text it holds.
  v_hash := md5(jsonb_build_array(left(p_model, 200), p_prompts, v_params)::text);
  v_gate := private.gate(v_user_id, p_model);
  select * into v_batch from public.batches
  where user_id = v_user_id and idempotency_key = p_idempotency_key;
  if v_batch.request_hash <> v_hash then
    perform private.refuse(
      'idempotency_conflict', 'idempotency_key was used with another payload',
      'Use a new key for a new request.'
    );
  elsif v_batch.id is null then
    if cardinality(p_prompts) > v_gate.max_batch then
      perform private.refuse_input(format('prompts: not 1 to %s texts', v_gate.max_batch));
    elsif v_gate.is_model_unclear then
      v_gate.model := private.require_model(v_gate, p_model);
    end if;
    insert into public.batches (user_id, request_hash, idempotency_key)
    values (v_user_id, v_hash, p_idempotency_key)
    returning * into v_batch;
    perform private.accept(
      v_gate, p_model, v_params, v_prompts,
      private.provider_inputs(
        v_gate.model, v_user_id, v_params, v_prompts, 'prompts[%1$s]'
      ),
      p_batch_id => v_batch.id, p_max_price => p_max_price_credits
    );
    select * into v_batch from public.batches where id = v_batch.id;
  end if;
  return private.batch_json(v_batch);
end;
$$;

-- The user's batch. Raises: PT404 not_found.
create function private.require_batch(p_batch_id uuid, p_user_id uuid) returns public.batches
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_batch public.batches;
begin
  select * into v_batch from public.batches where id = p_batch_id and user_id = p_user_id;
  if not found then
    perform private.require_known_user_id();
    perform private.refuse_missing(
      'batch_id: no such batch of yours',
      'Use the batch_id that enqueue_batch answered.'
    );
  end if;
  return v_batch;
end;
$$;

-- Raises: PT401 not_authenticated, PT404 not_found.
create function private.get_batch_status(p_batch_id uuid) returns json
language sql stable security definer set search_path = pg_catalog, pg_temp as $$
  select private.batch_json(private.require_batch(p_batch_id, private.require_user_id()))
$$;
