-- What users may read through the API: ping, one job, all active jobs, the plan, the catalogue.
--
-- All of it is STABLE, so GET works and repeats are harmless. Polling get_job_status is the
-- contract; Realtime (65) is only a hint to poll sooner.

-- These jobs as the API shows them, newest first: all of them, or those of a user that are not
-- deleted. One statement for all, for each costs its start, and the queue is looked at once, if
-- there is a live one among them. Progress is read from the running row: it is not history.
create function private.jobs_json(p_ids uuid[], p_user_id uuid default null) returns json[]
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
begin
  return (
    select array_agg(json_build_object(
      'job_id', j.id,
      'status', j.status,
      'stage', (j.running).stage,
      'progress', (j.running).progress,
      'attempt', case when j.finished_at is null then coalesce(
        (j.running).attempt,
        (select r.attempt from private.ready_jobs as r where r.job_id = j.id)
      ) end,
      'cancel_requested', coalesce((j.running).cancel_requested, false),
      'queue_position', (j.forecast).queue_position,
      'eta_seconds', (j.forecast).eta_seconds,
      'poll_after_ms', case when j.finished_at is null then
        private.poll_after_ms(j.created_at, (j.forecast).due_seconds) end,
      'model', j.model_id,
      'alias', j.alias_id,
      'batch_id', j.batch_id,
      'retry_of', j.retry_of,
      'idempotency_key', j.idempotency_key,
      'prompt', j.prompt,
      'params', j.input,
      'price_credits', j.price_credits,
      'refunded_credits', coalesce((
        select sum(l.amount - l.debt) from public.credit_ledger as l
        where l.generation_id = j.id and l.kind = 'refund'
      ), 0),
      'error', case when j.error_code is not null then
        json_build_object('code', j.error_code, 'message', j.error_message) end,
      'images', coalesce((
        select json_agg(json_build_object(
          'position', i.position, 'path', i.storage_path, 'preview_path', i.preview_path,
          'content_type', i.content_type,
          'width', i.width, 'height', i.height, 'bytes', i.bytes, 'blurhash', i.blurhash,
          'is_public', i.share_id is not null
        ) order by i.position)
        from public.images as i where i.generation_id = j.id
      ), '[]'),
      'is_favorite', j.is_favorite,
      'tags', j.tags,
      'created_at', j.created_at,
      'started_at', j.started_at,
      'finished_at', j.finished_at
    ) order by j.id desc)
    from (
      select
        g.*,
        case when g.finished_at is null then (
          select r from private.running_jobs as r where r.job_id = g.id
        ) end as running,
        case when g.finished_at is null then (
          select f from unnest(private.forecast_jobs(p_ids)) as f where f.job_id = g.id
        ) end as forecast
      -- Not any (p_ids), which would look into all partitions.
      from (select distinct unnest(p_ids) as id) as i
      cross join lateral (
        select h.* from public.generations as h where h.id = i.id offset 0
      ) as g
      where (p_user_id is null or (g.user_id = p_user_id and g.deleted_at is null))
      offset 0  -- else what is looked up once is looked up for each of its fields
    ) as j
  );
end;
$$;

create function private.job_json(p_generation public.generations) returns json
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
begin
  return (private.jobs_json(array[p_generation.id]))[1];
end;
$$;

-- Raises: PT401 not_authenticated, PT404 not_found.
create function private.get_job_status(p_job_id uuid) returns json
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan set enable_seqscan = off set enable_bitmapscan = off
set jit = off as $$
declare
  v_job json := (private.jobs_json(array[p_job_id], private.require_user_id()))[1];
begin
  if v_job is null then
    perform private.refuse_unknown_job();
  end if;
  return v_job;
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
  return coalesce(array_to_json(private.jobs_json(v_ids || p_job_ids, v_user_id)), '[]');
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
    'paused_until', greatest(
      private.paused_until(m, auth.uid()),
      case when (select count(*) > 0 from private.budgets)
        then private.budget_spent_until(m, auth.uid())
      end
    ),
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
