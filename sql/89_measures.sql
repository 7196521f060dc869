-- Measures: what the report (89_report) and exporters of metrics are made of, one table for each.
--
-- They speak of this moment and of the last hour, in codes and numbers: never of a user or a job,
-- and never in a provider's words, which may repeat a prompt in any spelling. Those are in views
-- (83), for the owner. darkroom_monitor may call the measures an exporter has a use for.
--
-- They cost what it costs to count the queue and to read the attempts that ended in the window.

-- How the attempts of each model ended in the window, what completed ones took, what all cost.
--
-- Read by time alone: the planner may think a scan of all history as good.
create function private.outcomes_by_model(p_window interval)
returns table (
  model_id text, completed bigint, failed bigint, retried bigint, p50_seconds double precision,
  p95_seconds double precision, cost_usd numeric
)
language sql stable set search_path = pg_catalog, pg_temp
set enable_seqscan = off set jit = off as $$
  select
    a.model_id,
    count(*) filter (where a.outcome = 'completed'),
    count(*) filter (where a.outcome = 'failed'),
    count(*) filter (where a.outcome = 'retried'),
    percentile_cont(0.5) within group (order by extract(epoch from a.ended_at - a.started_at))
      filter (where a.outcome = 'completed'),
    percentile_cont(0.95) within group (order by extract(epoch from a.ended_at - a.started_at))
      filter (where a.outcome = 'completed'),
    sum(a.cost_usd)
  from private.attempts as a
  where a.ended_at > now() - p_window
  group by a.model_id
$$;

create function private.report_models(p_window interval default '1 hour')
returns table (
  model_id text, provider text, ready bigint, delayed bigint, paused bigint, running bigint,
  oldest_ready_seconds numeric, completed bigint, failed bigint, retried bigint,
  p50_seconds double precision, p95_seconds double precision, mean_seconds double precision,
  cost_usd numeric
)
language sql stable security definer set search_path = pg_catalog, pg_temp
set jit = off set max_parallel_workers_per_gather = 0 as $$
  select
    n.model_id, m.provider, coalesce(q.ready, 0), coalesce(q.delayed, 0), coalesce(q.paused, 0),
    coalesce(q.running, 0), q.oldest_ready_seconds, coalesce(a.completed, 0),
    coalesce(a.failed, 0), coalesce(a.retried, 0), a.p50_seconds, a.p95_seconds, s.mean_seconds,
    coalesce(a.cost_usd, 0)
  from private.queue_by_model as q
  full join private.outcomes_by_model(p_window) as a on a.model_id = q.model_id
  cross join lateral (select coalesce(q.model_id, a.model_id) as model_id) as n
  left join public.models as m on m.id = n.model_id
  left join private.model_stats as s on s.model_id = n.model_id
  order by coalesce(q.ready, 0) + coalesce(q.running, 0) desc, n.model_id
$$;

comment on function private.report_models is
  'The queue of each model that has jobs or had some in the window, and how those ended: seconds '
  'from claim to end of completed attempts, and mean_seconds as remembered for eta_seconds.';

create function private.report_workers()
returns table (
  worker_id bigint, host text, version text, state text, is_listening boolean, slots smallint,
  slots_used bigint, seen_seconds numeric, up_seconds numeric
)
language sql stable security definer set search_path = pg_catalog, pg_temp as $$
  select
    w.id, w.host, w.version,
    case
      when w.seen_at <= now() - s.lease then 'silent'
      when coalesce(r.jobs, 0) > 0 then 'busy'
      when w.asleep then 'asleep'
      else 'idle'
    end,
    w.is_listening, w.slots, coalesce(r.jobs, 0),
    round(extract(epoch from now() - w.seen_at), 1), round(extract(epoch from now() - w.started_at))
  from private.workers as w
  cross join private.settings as s
  left join (
    select j.worker_id, count(*) as jobs from private.running_jobs as j group by j.worker_id
  ) as r on r.worker_id = w.id
  where w.seen_at > now() - interval '1 day'
  order by w.seen_at <= now() - s.lease desc, w.id
$$;

comment on function private.report_workers is
  'Workers seen within a day, first those that went silent without stopping: state (silent | busy '
  '| idle | asleep). is_listening false: it finds jobs by polling only.';

create function private.report_errors(p_window interval default '1 hour')
returns table (
  model_id text, error_code text, errors bigint, failed bigint, retried bigint, last_at timestamptz
)
language sql stable security definer set search_path = pg_catalog, pg_temp
set enable_seqscan = off set jit = off as $$
  select
    a.model_id,
    a.error_code,
    count(*) as errors,
    count(*) filter (where a.outcome = 'failed'),
    count(*) filter (where a.outcome = 'retried'),
    max(a.ended_at) as last_at
  from private.attempts as a
  where a.ended_at > now() - p_window and a.error_code is not null
  group by a.model_id, a.error_code
  order by errors desc, last_at desc
$$;

comment on function private.report_errors is
  'Errors of attempts by model and code in the window. What was said: private.recent_failures.';

-- The attempts that ended last, newest first.
create function private.report_recent(
  p_at_most integer default 12, p_window interval default '1 hour'
)
returns table (
  model_id text, attempt smallint, worker_id bigint, outcome text, error_code text,
  ended_at timestamptz, waited_seconds numeric, ran_seconds numeric
)
language sql stable set search_path = pg_catalog, pg_temp
set enable_seqscan = off set jit = off as $$
  select
    a.model_id, a.attempt, a.worker_id, a.outcome, a.error_code, a.ended_at,
    -- No join, which might be made by reading all generations.
    (
      select round(extract(epoch from a.started_at - g.created_at), 1)
      from public.generations as g where g.id = a.generation_id
    ),
    round(extract(epoch from a.ended_at - a.started_at), 1)
  from (
    select * from private.attempts as e
    where e.ended_at > now() - p_window
    order by e.ended_at desc, e.token desc limit p_at_most
  ) as a
  order by a.ended_at desc, a.token desc
$$;

-- The running jobs that began first, which are the ones to worry about.
create function private.report_running(p_at_most integer default 12)
returns table (
  model_id text, attempt smallint, worker_id bigint, stage text, progress smallint,
  running_seconds numeric, lease_seconds numeric, deadline_seconds numeric
)
language sql stable set search_path = pg_catalog, pg_temp as $$
  select
    r.model_id, r.attempt, r.worker_id, r.stage, r.progress,
    round(extract(epoch from now() - r.claimed_at), 1),
    round(extract(epoch from r.lease_until - now()), 1),
    round(extract(epoch from r.deadline_at - now()), 1)
  from private.running_jobs as r
  order by r.claimed_at, r.job_id limit p_at_most
$$;

-- Who has held back vacuum for longest.
create function private.report_holders(p_at_most integer default 5)
returns table (kind text, pid integer, name text, state text, transactions integer, seconds numeric)
language sql stable set search_path = pg_catalog, pg_temp as $$
  select
    h.kind, h.pid, left(h.name, 100), h.state, h.age_transactions,
    round(extract(epoch from h.since))
  from private.vacuum_holders as h
  order by h.since desc nulls last, h.age_transactions desc limit p_at_most
$$;

create function private.report_alerts()
returns table (alert text, severity text, is_raised boolean, value numeric, threshold numeric)
language sql stable security definer set search_path = pg_catalog, pg_temp
set jit = off set max_parallel_workers_per_gather = 0 as $$
  select s.alert, s.severity, s.is_raised, s.value, s.threshold
  from private.alert_states(private.queue_health()::jsonb) as s
  order by s.alert
$$;

comment on function private.report_alerts is
  'Every rule of private.alert_rules, what is measured for it, and whether its alert is raised.';
