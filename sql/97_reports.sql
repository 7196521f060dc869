-- Reports: what operators ask beside health (88), and what the operator's page, `make top` and
-- exporters of metrics draw. An optional part: nothing before it knows of it.
--
-- Views are one for each question, which is the view's comment: read them as the owner.
--
-- queue_report() is this moment and the last hour, queue_history() what came to pass over time, in
-- buckets, queue_job() one job: for darkroom_monitor, too, which may call these and queue_health()
-- and reads no table. A monitor is told codes and numbers, of no user, the id of no job, and
-- nothing in a provider's words. They cost what it costs to count the queue and to read the
-- attempts of the window, by time alone and not compiled: see rates_health (88).

-- Views.

create view private.waiting_now with (security_invoker = true) as
select
  r.job_id, r.user_id, (private.plan_of(e)).name as plan, r.model_id,
  case
    when exists (
      select from private.paused_models as p where p.id = r.model_id and p.paused_until > now()
    ) or private.awaits_budget(r.model_id, r.route, r.user_id) then 'paused'
    when r.run_at > now() then 'delayed'
    else 'ready'
  end as state,
  g.created_at, now() - g.created_at as waiting, r.attempt as attempts_used, r.run_at, r.fair_key
from private.ready_jobs as r
inner join public.generations as g on r.job_id = g.id
inner join public.entitlements as e on r.user_id = e.user_id
order by r.fair_key, r.seq;

comment on view private.waiting_now is
  'What waits, since when, and whose turn is next? In the order of the queue.';

create view private.recent_attempts with (security_invoker = true) as
select
  a.generation_id, g.user_id, g.model_id, a.provider, a.attempt, a.worker_id, a.outcome,
  a.error_code, a.error_detail, a.provider_job_id, a.provider_seconds, a.cost_usd, g.created_at,
  a.started_at, a.ended_at, extract(epoch from a.started_at - g.created_at) as wait_seconds,
  extract(epoch from a.ended_at - a.started_at) as run_seconds
from private.attempts as a
inner join public.generations as g on a.generation_id = g.id
where a.ended_at > now() - interval '1 day'
order by a.ended_at desc;

comment on view private.recent_attempts is
  'What was tried within a day, how did it end, and what did the provider say? wait_seconds: from '
  'being asked for to this claim.';

-- Every attempt, whatever came of it, is the provider's side, and the ledger the users'. What
-- subscriptions bring is not in it, nor what retention has removed.
create view private.costs with (security_invoker = true) as
select
  entry.day, entry.user_id, entry.model_id,
  array_remove(array_agg(distinct entry.provider), null) as providers,
  count(entry.outcome)::integer as attempts,
  count(*) filter (where entry.outcome = 'completed')::integer as completed,
  coalesce(sum(entry.images), 0)::integer as images,
  coalesce(sum(entry.provider_seconds), 0)::numeric as provider_seconds,
  coalesce(sum(entry.cost_usd), 0) as cost_usd,
  count(*) filter (where entry.provider_job_id is not null and entry.cost_usd is null)::integer
    as unknown_costs,
  coalesce(-sum(entry.amount) filter (where entry.kind = 'charge'), 0) as credits_charged,
  coalesce(sum(entry.amount) filter (where entry.kind = 'refund'), 0) as credits_refunded,
  -coalesce(sum(entry.amount), 0) * s.credit_usd - coalesce(sum(entry.cost_usd), 0) as margin_usd
from (
  select
    (a.ended_at at time zone 'utc')::date as day, g.user_id, a.model_id, a.provider,
    a.outcome, a.provider_images as images, a.provider_seconds::numeric, a.cost_usd,
    a.provider_job_id, null as kind, null as amount
  from private.attempts as a
  inner join public.generations as g on a.generation_id = g.id
  union all
  select
    (l.created_at at time zone 'utc')::date, l.user_id, g.model_id, null, null, null, null, null,
    null, l.kind, l.amount - l.debt
  from public.credit_ledger as l
  inner join public.generations as g on l.generation_id = g.id
) as entry
cross join private.settings as s
group by entry.day, entry.user_id, entry.model_id, s.credit_usd;

comment on view private.costs is
  'What did each user cost and pay, by model and day? Sum it by what you want to know. Days are '
  'UTC''s: of an attempt the day it ended, of a credit the day it was booked. images are those the '
  'provider billed; unknown_costs counts attempts that asked the provider and whose price is not '
  'known, so that cost_usd is too low by them (a retry that goes on from the same provider job is '
  'one of them); margin_usd is there once settings.credit_usd says what a credit is worth.';

-- Functions.

-- Shown are the running jobs that began first, which are the ones to worry about, the attempts that
-- ended last, and who has held back vacuum for longest.
create function public.queue_report() returns json
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
set enable_seqscan = on set jit = off set max_parallel_workers_per_gather = 0 as $$
declare
  v_began timestamptz := clock_timestamp();
  -- The queue is counted by passing through all of it, and that is as good as can be.
  v_queue jsonb := (select coalesce(jsonb_agg(q), '[]') from private.queue_by_model as q);
  v_health json := private.health_of(v_queue);
  v_is_operator boolean := private.is_operator();
begin
  perform set_config('enable_seqscan', 'off', true);  -- until the function ends
  return json_build_object(
    'at', now(),
    'is_operator', v_is_operator,
    'health', v_health,
    'alerts', (
      select json_agg(json_build_object(
        'alert', s.alert, 'severity', s.severity, 'is_raised', s.is_raised, 'value', s.value,
        'threshold', s.threshold
      ) order by s.alert)
      from private.alert_states(v_health::jsonb) as s
    ),
    -- Seconds from claim to end of completed attempts, and as remembered for eta_seconds.
    'models', (
      select coalesce(json_agg(m), '[]')
      from (
        select
          n.model_id, c.provider, coalesce(q.ready, 0) as ready, coalesce(q.delayed, 0) as delayed,
          coalesce(q.paused, 0) as paused, coalesce(q.running, 0) as running,
          q.oldest_ready_seconds, coalesce(o.completed, 0) as completed,
          coalesce(o.failed, 0) as failed, coalesce(o.retried, 0) as retried,
          o.seconds[1] as p50_seconds, o.seconds[2] as p95_seconds, s.mean_seconds,
          coalesce(o.cost_usd, 0) as cost_usd
        from jsonb_populate_recordset(null::private.queue_by_model, v_queue) as q
        full outer join (
          select
            a.model_id, count(*) filter (where a.outcome = 'completed') as completed,
            count(*) filter (where a.outcome = 'failed') as failed,
            count(*) filter (where a.outcome = 'retried') as retried, sum(a.cost_usd) as cost_usd,
            percentile_cont('{0.5,0.95}'::double precision[])
              within group (order by extract(epoch from a.ended_at - a.started_at))
              filter (where a.outcome = 'completed') as seconds
          from private.attempts as a
          where a.ended_at > now() - interval '1 hour' group by a.model_id
        ) as o on o.model_id = q.model_id
        cross join lateral (select coalesce(q.model_id, o.model_id) as model_id) as n
        left join public.models as c on c.id = n.model_id
        left join private.model_stats as s on s.model_id = n.model_id
        order by coalesce(q.ready, 0) + coalesce(q.running, 0) desc, n.model_id
      ) as m
    ),
    'workers', (
      select coalesce(json_agg(w), '[]')
      from private.worker_activity as w where w.seen_seconds < 86400
    ),
    'errors', (
      select coalesce(json_agg(e), '[]')
      from (
        select
          a.model_id, a.error_code, count(*) as errors,
          array_remove(array_agg(distinct a.provider), null) as providers,
          count(*) filter (where a.outcome = 'failed') as failed,
          count(*) filter (where a.outcome = 'retried') as retried, max(a.ended_at) as last_at
        from private.attempts as a
        where a.ended_at > now() - interval '1 hour'
          and a.error_code is not null and a.outcome <> 'released'
        group by a.model_id, a.error_code
        order by count(*) desc, max(a.ended_at) desc
      ) as e
    ),
    'running', (
      select coalesce(json_agg(j), '[]')
      from (
        select
          case when v_is_operator then r.job_id end as job_id,
          r.model_id, r.provider, r.attempt, r.worker_id, r.stage, r.progress,
          round(extract(epoch from r.running), 1) as running_seconds,
          round(extract(epoch from r.lease_left), 1) as lease_seconds,
          round(extract(epoch from r.deadline_left), 1) as deadline_seconds
        from private.running_now as r order by r.running desc, r.job_id limit 12
      ) as j
    ),
    'recent', (
      select coalesce(json_agg(t), '[]')
      from (
        select
          case when v_is_operator then a.generation_id end as job_id,
          a.model_id, a.provider, a.attempt, a.worker_id, a.outcome, a.error_code, a.ended_at,
          -- No join, which might be made by reading all generations.
          (
            select round(extract(epoch from a.started_at - g.created_at), 1)
            from public.generations as g where g.id = a.generation_id
          ) as waited_seconds,
          round(extract(epoch from a.ended_at - a.started_at), 1) as ran_seconds
        from private.attempts as a where a.ended_at > now() - interval '1 hour'
        order by a.ended_at desc, a.token desc limit 12
      ) as t
    ),
    'vacuum_holders', (
      select coalesce(json_agg(v), '[]')
      from (
        select
          h.kind, h.pid, left(h.name, 100) as name, h.state, h.age_transactions as transactions,
          round(extract(epoch from h.since)) as seconds
        from private.vacuum_holders as h
        order by h.since desc nulls last, h.age_transactions desc limit 5
      ) as v
    ),
    'took_ms', round(extract(epoch from clock_timestamp() - v_began) * 1000, 1)
  );
end;
$$;

comment on function public.queue_report is
  'The queue at a glance: {at, is_operator (the caller may pause models, and is shown job ids), '
  'health (see queue_health), alerts (every rule and what is measured '
  'for it), models, workers, errors, running, recent, vacuum_holders, took_ms}: the queue of each '
  'model and its attempts of the last hour, the workers of the last day, errors of the last hour, '
  'the jobs that run for longest, the attempts that ended last, who has held back vacuum for '
  'longest, and how long the report took.';

-- There is no record of how long the queue was. It is what waits now, less what came and plus what
-- went since.
create function public.queue_history(
  since timestamptz default null, bucket_seconds integer default 900
) returns json
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
set enable_seqscan = off set jit = off set max_parallel_workers_per_gather = 0 as $$
declare
  v_bucket interval := bucket_seconds * interval '1 second';
  -- A day of the buckets that are the default.
  v_since timestamptz := coalesce(since, now() - 96 * v_bucket);
begin
  if coalesce(bucket_seconds not between 10 and 86400, true) then
    perform private.refuse_input('bucket_seconds: not from 10 to 86400');
  elsif v_since not between now() - 400 * v_bucket and now() then
    perform private.refuse_input('since: not within the last 400 buckets', 'Take longer buckets.');
  end if;
  v_since := date_bin(v_bucket, v_since, 'epoch');
  return json_build_object(
    'at', now(), 'since', v_since, 'bucket_seconds', bucket_seconds,
    -- What came into the queue and left it, and the longest wait for a first attempt.
    'queue', (
      with claims as (
        select a.generation_id, a.attempt, a.started_at, a.ended_at, a.outcome
        from private.attempts as a where a.ended_at >= v_since
        union all
        select r.job_id, r.attempt, r.claimed_at, null, null from private.running_jobs as r
      ),
      moves as (
        select
          g.created_at as moved_at, 1 as enqueued, 1 as entered, 0 as went, null::interval as waited
        from public.generations as g
        where g.id >= private.first_id_of(v_since) and g.created_at >= v_since
        union all
        select c.ended_at, 0, 1, 0, null from claims as c where c.outcome in ('retried', 'released')
        union all
        select
          c.started_at, 0, 0, 1, case when c.attempt = 1 then c.started_at - g.created_at end
        from claims as c inner join public.generations as g on g.id = c.generation_id
        where c.started_at >= v_since
        union all
        -- Canceled before any attempt.
        select g.finished_at, 0, 0, 1, null
        from public.generations as g
        where g.id >= private.first_id_of(v_since) and g.finished_at >= v_since
          and g.status = 'canceled' and g.started_at is null
      )
      select coalesce(json_agg(b order by b.at), '[]')
      from (
        select
          date_bin(v_bucket, m.moved_at, 'epoch') as at, sum(m.enqueued) as enqueued,
          sum(m.entered) as entered, sum(m.went) as went,
          round(extract(epoch from max(m.waited)), 1) as waited_seconds
        from moves as m group by 1
      ) as b
    ),
    -- How the attempts of each model ended, what they took and cost.
    'models', (
      select coalesce(json_agg(b order by b.at, b.model_id), '[]')
      from (
        select
          date_bin(v_bucket, a.ended_at, 'epoch') as at, a.model_id,
          count(*) filter (where a.outcome = 'completed') as completed,
          count(*) filter (where a.outcome = 'failed') as failed,
          count(*) filter (where a.outcome = 'retried') as retried,
          round(sum(extract(epoch from a.ended_at - a.started_at))
            filter (where a.outcome = 'completed'), 1) as completed_seconds,
          sum(a.cost_usd) as cost_usd
        from private.attempts as a where a.ended_at >= v_since group by 1, 2
      ) as b
    )
  );
end;
$$;

comment on function public.queue_history is
  'What came to pass in each bucket from the one that holds since (96 back; at most 400) to now: '
  '{at, since, bucket_seconds, queue [{at, enqueued, entered, went, '
  'waited_seconds}], models [{at, model_id, completed, failed, retried, completed_seconds, '
  'cost_usd}]}. entered and went move the length of the queue, retries included; waited_seconds is '
  'the longest until a first attempt. Buckets without anything are left out. Errors: PT400 '
  'invalid_input.';

create function public.queue_job(job_id uuid) returns json
language plpgsql stable security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_job public.generations := (
    select g from public.generations as g where g.id = queue_job.job_id
  );
  v_is_operator boolean := private.is_operator();
begin
  if v_job.id is null then
    perform private.refuse_missing('job_id: no such job', 'The app and the worker''s log name it.');
  end if;
  return json_build_object(
    'job_id', v_job.id, 'user_id', case when v_is_operator then v_job.user_id end,
    'model_id', v_job.model_id, 'status', v_job.status, 'error_code', v_job.error_code,
    'created_at', v_job.created_at, 'started_at', v_job.started_at,
    'finished_at', v_job.finished_at, 'price_credits', v_job.price_credits,
    'image_count', v_job.image_count,
    'images', (select count(*) from public.images as i where i.generation_id = v_job.id),
    'waiting', (
      select json_build_object('state', w.state, 'run_at', w.run_at)
      from private.waiting_now as w where w.job_id = v_job.id
    ),
    'running', (
      select json_build_object(
        'attempt', r.attempt, 'provider', r.provider, 'worker_id', r.worker_id, 'stage', r.stage,
        'progress', r.progress, 'running_seconds', round(extract(epoch from r.running), 1),
        'lease_seconds', round(extract(epoch from r.lease_left), 1),
        'deadline_seconds', round(extract(epoch from r.deadline_left), 1),
        'provider_job_id', case when v_is_operator then r.provider_job_id end
      )
      from private.running_now as r where r.job_id = v_job.id
    ),
    'attempts', (
      select coalesce(json_agg(json_build_object(
        'attempt', a.attempt, 'provider', a.provider, 'worker_id', a.worker_id,
        'outcome', a.outcome, 'error_code', a.error_code, 'started_at', a.started_at,
        'ended_at', a.ended_at, 'provider_seconds', a.provider_seconds, 'cost_usd', a.cost_usd,
        'error_detail', case when v_is_operator then a.error_detail end,
        'provider_job_id', case when v_is_operator then a.provider_job_id end
      ) order by a.token), '[]')
      from private.attempts as a where a.generation_id = v_job.id
    )
  );
end;
$$;

comment on function public.queue_job is
  'One job and its attempts, the first of them first: {job_id, user_id, model_id, status, '
  'error_code, created_at, started_at, finished_at, price_credits, image_count, images (stored), '
  'waiting {state, run_at}, running {attempt, provider, worker_id, stage, progress, '
  'running_seconds, lease_seconds, deadline_seconds, provider_job_id}, attempts [{attempt, '
  'provider, worker_id, outcome, error_code, started_at, ended_at, provider_seconds, cost_usd, '
  'error_detail, provider_job_id}]}. waiting and running are null unless it is there. A monitor '
  'gets null for user_id, error_detail and provider_job_id. Errors: PT404 not_found.';

-- Who may call what: as in 92, what is not named here nobody may call.

revoke all on private.waiting_now, private.recent_attempts, private.costs
from public, anon, authenticated, service_role;
revoke all on function public.queue_history, public.queue_job, public.queue_report
from public, anon, authenticated, service_role;
grant execute on function public.queue_history, public.queue_job, public.queue_report
to service_role, darkroom_monitor;

notify pgrst, 'reload schema';
