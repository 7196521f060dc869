-- Reports: what the operator's page and `make top` draw.
--
-- queue_report() is this moment and the last hour, queue_history() what came to pass over time, in
-- buckets. Both are for darkroom_monitor, which may call these, queue_health() and the measures and
-- nothing else: it reads no table. Who draws every few seconds asks for the history once, and then
-- for its last buckets only.
--
-- There is no record of how long the queue was. It is what waits now, less what came and plus what
-- went since.

-- Compiling would take longer than running, and a second process would only cost more.
create function private.queue_report() returns json
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
set jit = off set max_parallel_workers_per_gather = 0 as $$
declare
  v_began timestamptz := clock_timestamp();
  v_models jsonb := (
    select coalesce(jsonb_agg(to_jsonb(m)), '[]') from private.report_models() as m
  );
  v_health json := private.health_with((
    select jsonb_build_object(
      'ready', coalesce(sum((m.value ->> 'ready')::bigint), 0),
      'delayed', coalesce(sum((m.value ->> 'delayed')::bigint), 0),
      'paused', coalesce(sum((m.value ->> 'paused')::bigint), 0),
      'oldest_ready_seconds', max((m.value ->> 'oldest_ready_seconds')::numeric)
    )
    from jsonb_array_elements(v_models) as m
  ));
begin
  return json_build_object(
    'at', now(),
    'health', v_health,
    'models', v_models,
    'workers', (select coalesce(json_agg(w), '[]') from private.report_workers() as w),
    'errors', (select coalesce(json_agg(e), '[]') from private.report_errors() as e),
    'running', (select coalesce(json_agg(r), '[]') from private.report_running() as r),
    'recent', (select coalesce(json_agg(r), '[]') from private.report_recent() as r),
    'vacuum_holders', (select coalesce(json_agg(h), '[]') from private.report_holders() as h),
    'took_ms', round(extract(epoch from clock_timestamp() - v_began) * 1000, 1)
  );
end;
$$;

-- What came into the queue and left it in each bucket since a time, the longest that a job of the
-- bucket had waited for its first attempt, and how many were asked for.
--
-- Read by time alone: the planner may think a scan of all history as good.
create function private.history_of_queue(p_since timestamptz, p_bucket interval)
returns table (at timestamptz, enqueued bigint, entered bigint, went bigint, waited_seconds numeric)
language sql stable set search_path = pg_catalog, pg_temp
set enable_seqscan = off set jit = off as $$
  with claims as (
    select a.generation_id, a.attempt, a.started_at, a.ended_at, a.outcome
    from private.attempts as a where a.ended_at >= p_since
    union all
    select r.job_id, r.attempt, r.claimed_at, null, null from private.running_jobs as r
  ),
  moves as (
    select
      g.created_at as moved_at, 1 as enqueued, 1 as entered, 0 as went, null::interval as waited
    from public.generations as g
    where g.id >= private.first_id_of(p_since) and g.created_at >= p_since
    union all
    select c.ended_at, 0, 1, 0, null from claims as c where c.outcome in ('retried', 'released')
    union all
    select
      c.started_at, 0, 0, 1, case when c.attempt = 1 then c.started_at - g.created_at end
    from claims as c
    inner join public.generations as g on g.id = c.generation_id
    where c.started_at >= p_since
    union all
    -- Canceled before any attempt.
    select g.finished_at, 0, 0, 1, null
    from public.generations as g
    where g.id >= private.first_id_of(p_since) and g.finished_at >= p_since
      and g.status = 'canceled' and g.started_at is null
  )
  select
    date_bin(p_bucket, m.moved_at, 'epoch'), sum(m.enqueued), sum(m.entered), sum(m.went),
    round(extract(epoch from max(m.waited)), 1)
  from moves as m
  group by date_bin(p_bucket, m.moved_at, 'epoch')
$$;

-- How the attempts of each model ended in each bucket since a time, what they took and cost.
create function private.history_of_models(p_since timestamptz, p_bucket interval)
returns table (
  at timestamptz, model_id text, completed bigint, failed bigint, retried bigint,
  completed_seconds numeric, cost_usd numeric
)
language sql stable set search_path = pg_catalog, pg_temp
set enable_seqscan = off set jit = off as $$
  select
    date_bin(p_bucket, a.ended_at, 'epoch'),
    a.model_id,
    count(*) filter (where a.outcome = 'completed'),
    count(*) filter (where a.outcome = 'failed'),
    count(*) filter (where a.outcome = 'retried'),
    round(
      sum(extract(epoch from a.ended_at - a.started_at)) filter (where a.outcome = 'completed'), 1
    ),
    sum(a.cost_usd)
  from private.attempts as a
  where a.ended_at >= p_since
  group by date_bin(p_bucket, a.ended_at, 'epoch'), a.model_id
$$;

-- Raises: PT400 invalid_input.
create function private.queue_history(
  p_since timestamptz, p_bucket_seconds integer, p_at_most integer default 400
) returns json
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
set jit = off set max_parallel_workers_per_gather = 0 as $$
declare
  v_bucket interval := p_bucket_seconds * interval '1 second';
  -- A day of the buckets that are the default.
  v_since timestamptz := coalesce(p_since, now() - 96 * v_bucket);
begin
  if coalesce(p_bucket_seconds not between 10 and 86400, true) then
    perform private.refuse_input('bucket_seconds: not from 10 to 86400');
  elsif v_since not between now() - p_at_most * v_bucket and now() then
    perform private.refuse_input(
      format('since: not within the last %s buckets', p_at_most), 'Take longer buckets.'
    );
  end if;
  v_since := date_bin(v_bucket, v_since, 'epoch');
  return json_build_object(
    'at', now(),
    'since', v_since,
    'bucket_seconds', p_bucket_seconds,
    'queue', (
      select coalesce(json_agg(h order by h.at), '[]')
      from private.history_of_queue(v_since, v_bucket) as h
    ),
    'models', (
      select coalesce(json_agg(h order by h.at, h.model_id), '[]')
      from private.history_of_models(v_since, v_bucket) as h
    )
  );
end;
$$;
