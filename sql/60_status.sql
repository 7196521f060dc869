-- What users may read through the API: ping, one job, all active jobs, the plan, the catalogue.
--
-- All of it is STABLE, so GET works and repeats are harmless. Polling get_job_status is the
-- contract; Realtime (65) is only a hint to poll sooner.

-- The images of a generation as the API shows them, in order.
create function private.images_json(p_generation_id uuid) returns json
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_images json;
begin
  select json_agg(json_build_object(
    'position', i.position, 'path', i.storage_path, 'preview_path', i.preview_path,
    'content_type', i.content_type,
    'width', i.width, 'height', i.height, 'bytes', i.bytes, 'blurhash', i.blurhash,
    'is_public', i.share_id is not null
  ) order by i.position) into v_images
  from public.images as i where i.generation_id = p_generation_id;
  return coalesce(v_images, '[]');
end;
$$;

-- The running row of a live job. While it waits, all null but the attempts used up.
create function private.running_job(p_job_id uuid) returns private.running_jobs
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_running private.running_jobs;
begin
  select * into v_running from private.running_jobs where job_id = p_job_id;
  if not found then
    select r.attempt into v_running.attempt from private.ready_jobs as r where r.job_id = p_job_id;
  end if;
  return v_running;
end;
$$;

-- One job as the API shows it, with its forecast where the caller has it: who shows many asks for
-- all at once. Progress is read from the running row: it is not history.
create function private.job_json(
  p_generation public.generations, p_forecast private.forecast default null
) returns json
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_running private.running_jobs;
  v_forecast private.forecast := coalesce(p_forecast, private.forecast(p_generation));
  v_refunded integer;
begin
  if p_generation.finished_at is null then
    v_running := private.running_job(p_generation.id);
  else
    select l.amount into v_refunded from public.credit_ledger as l
    where l.generation_id = p_generation.id and l.kind = 'refund';
  end if;
  return json_build_object(
    'job_id', p_generation.id,
    'status', p_generation.status,
    'stage', v_running.stage,
    'progress', v_running.progress,
    'attempt', v_running.attempt,
    'cancel_requested', coalesce(v_running.cancel_requested, false),
    'queue_position', v_forecast.queue_position,
    'eta_seconds', v_forecast.eta_seconds,
    'poll_after_ms', case when p_generation.finished_at is null then
      private.poll_after_ms(p_generation.created_at, v_forecast.due_seconds) end,
    'model', p_generation.model_id,
    'alias', p_generation.alias_id,
    'batch_id', p_generation.batch_id,
    'retry_of', p_generation.retry_of,
    'idempotency_key', p_generation.idempotency_key,
    'prompt', p_generation.prompt,
    'params', p_generation.input,
    'price_credits', p_generation.price_credits,
    'refunded_credits', coalesce(v_refunded, 0),
    'error', case when p_generation.error_code is not null then
      json_build_object('code', p_generation.error_code, 'message', p_generation.error_message) end,
    'images', private.images_json(p_generation.id),
    'is_favorite', p_generation.is_favorite,
    'tags', private.tags_of(p_generation.id),
    'created_at', p_generation.created_at,
    'started_at', p_generation.started_at,
    'finished_at', p_generation.finished_at
  );
end;
$$;

-- Raises: PT401 not_authenticated, PT404 not_found.
create function private.get_job_status(p_job_id uuid) returns json
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan set enable_seqscan = off set enable_bitmapscan = off
set jit = off as $$
begin
  return private.job_json(private.require_generation(p_job_id, private.require_user_id()));
end;
$$;

-- Raises: PT400 invalid_input, PT401 not_authenticated.
create function private.list_active_jobs(p_job_ids uuid[]) returns json
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan set enable_seqscan = off set enable_bitmapscan = off
set jit = off as $$
declare
  v_user_id uuid := private.require_known_user_id();
  v_ids uuid[];
begin
  if cardinality(p_job_ids) > 100 or array_ndims(p_job_ids) > 1 then
    perform private.refuse_input('job_ids: not a list of at most 100');
  end if;
  v_ids := array(select j.job_id from private.live_jobs as j where j.user_id = v_user_id);
  return (
    select coalesce(json_agg(private.job_json(g, f) order by g.id desc), '[]')
    from public.generations as g
    left join unnest(private.forecast_jobs(v_ids)) as f on f.job_id = g.id
    where g.id = any (v_ids || p_job_ids) and g.user_id = v_user_id and g.deleted_at is null
  );
end;
$$;

-- Raises: PT401 not_authenticated.
create function private.get_entitlement() returns json
language plpgsql stable security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_entitlement json := private.entitlement_json(private.require_user_id());
begin
  if v_entitlement is null then
    perform private.refuse_unknown_user();
  end if;
  return v_entitlement;
end;
$$;

create function private.list_models() returns json
language sql stable security definer set search_path = pg_catalog, pg_temp as $$
  select coalesce(json_agg(json_build_object(
    'id', m.id,
    'title', m.title,
    'price_credits', m.price_credits,
    'paid_price_credits', m.paid_price_credits,
    'requires_paid', m.requires_paid,
    'paused_until', private.paused_until(m, auth.uid()),
    'max_images', m.max_images,
    'inputs', (
      select coalesce(json_object_agg(p.key, p.value order by p.key), '{}')
      from jsonb_each(m.input_schema -> 'properties') as p
      where p.key = any (m.client_inputs)
    ),
    'image_inputs', array(
      select i.name from unnest(m.image_inputs) as i (name) where i.name = any (m.client_inputs)
    )
  ) order by m.id), '[]')
  from public.models as m
  where m.is_active
$$;
