-- What operators ask while it runs: one view for each question, which is the view's comment.
--
-- Read them as the owner (psql, the SQL editor): nobody is granted anything, and security_invoker
-- keeps row level security in force should somebody ever be. Each fact stands once, here: health,
-- alerts and reports (88, 89) are these views as JSON. What happened lately is what ended within
-- settings.watch_window, found through the index on attempts.ended_at.

-- The first id that uuid_v7 could have made at this time.
create function private.first_id_of(p_time timestamptz) returns uuid
language sql immutable set search_path = pg_catalog, pg_temp as $$
  select rpad(lpad(to_hex((extract(epoch from p_time) * 1000)::bigint), 12, '0'), 32, '0')::uuid
$$;

-- The queue.

create view private.paused_now with (security_invoker = true) as
select
  case when b.name like '%/%' then 'model' else 'provider' end as kind,
  b.name, b.paused_until, b.pause_reason, b.times_opened,
  cardinality(b.failed_users) as failed_users
from private.breakers as b
where b.paused_until > now();

comment on view private.paused_now is
  'Which models and providers are paused, until when, and why? times_opened 0: by an operator. '
  'failed_users: only so many users wait, others are tried; 0: everybody waits.';

create view private.waiting_now with (security_invoker = true) as
select
  r.job_id, r.user_id, (private.plan_of(e)).name as plan, r.model_id,
  case
    when exists (select from private.paused_now as p where p.name in (r.model_id, m.provider))
      then 'paused'
    when r.run_at > now() then 'delayed'
    else 'ready'
  end as state,
  g.created_at, now() - g.created_at as waiting, r.attempt as attempts_used, r.run_at, r.fair_key
from private.ready_jobs as r
inner join public.generations as g on r.job_id = g.id
inner join public.entitlements as e on r.user_id = e.user_id
left join public.models as m on r.model_id = m.id
order by r.fair_key, r.seq;

comment on view private.waiting_now is
  'What waits, since when, and whose turn is next? In the order of the queue.';

create view private.running_now with (security_invoker = true) as
select
  r.job_id, r.user_id, r.model_id, r.worker_id, w.host, now() - r.claimed_at as running, r.stage,
  r.progress, r.attempt, r.provider_job_id, r.cancel_requested, r.lease_until - now() as lease_left,
  r.deadline_at - now() as deadline_left
from private.running_jobs as r
left join private.workers as w on r.worker_id = w.id
order by r.claimed_at;

comment on view private.running_now is 'What runs now, where, for how long, and how far is it?';

-- The queue is passed once: a job costs no more than to be counted.
create view private.queue_by_model with (security_invoker = true) as
select
  q.model_id, m.provider,
  case when p.is_paused then 0 else q.waiting - q.delayed end as ready,
  case when p.is_paused then 0 else q.delayed end as delayed,
  case when p.is_paused then q.waiting else 0 end as paused,
  q.running,
  extract(epoch from now() - (
    select g.created_at
    from private.ready_jobs as r inner join public.generations as g on r.job_id = g.id
    where r.job_id = q.first_id::uuid and p.is_paused is null
  )) as oldest_ready_seconds
from (
  select
    j.model_id, sum(j.waiting)::bigint as waiting, sum(j.running)::bigint as running,
    coalesce(sum(j.waiting) filter (where j.is_delayed), 0)::bigint as delayed,
    min(j.first_id) filter (where j.is_delayed is not true) as first_id
  from (
    select
      r.model_id, r.run_at > now() as is_delayed, count(*) as waiting,
      min(r.job_id::text) as first_id, 0 as running
    from private.ready_jobs as r
    group by r.model_id, r.run_at > now()
    union all
    select r.model_id, false, 0, null, count(*) from private.running_jobs as r group by r.model_id
  ) as j
  group by j.model_id
) as q
left join public.models as m on q.model_id = m.id
left join lateral (
  select true as is_paused
  from private.paused_now as x where x.name in (q.model_id, m.provider)
  order by x.name limit 1
) as p on true
order by q.model_id;

comment on view private.queue_by_model is
  'How many jobs of each model wait or run? ready (may be claimed now), delayed (a retry that is '
  'put off), paused, running; oldest_ready_seconds: since the first of the ready was asked for.';

create view private.queue_by_plan with (security_invoker = true) as
select
  (private.plan_of(e)).name as plan,
  count(*) filter (where job.state = 'ready') as ready,
  count(*) filter (where job.state = 'delayed') as delayed,
  count(*) filter (where job.state = 'running') as running,
  count(distinct e.user_id) as users
from (
  select r.user_id, case when r.run_at > now() then 'delayed' else 'ready' end as state
  from private.ready_jobs as r
  union all
  select r.user_id, 'running' as state from private.running_jobs as r
) as job
inner join public.entitlements as e on job.user_id = e.user_id
group by (private.plan_of(e)).name
order by plan;

comment on view private.queue_by_plan is
  'How many jobs of free and of paid users wait or run, and of how many users?';

create view private.stuck_jobs with (security_invoker = true) as
select
  r.job_id, r.user_id, r.model_id,
  case when r.lease_left < '0' then 'lease ran out' else 'deadline passed' end as problem,
  greatest(-r.lease_left, -r.deadline_left) as since, r.worker_id
from private.running_now as r
where least(r.lease_left, r.deadline_left) < '0'
union all
select r.job_id, r.user_id, r.model_id, 'not claimed', now() - g.created_at, null
from private.ready_jobs as r
inner join public.generations as g on r.job_id = g.id
where (r.run_at is null or r.run_at <= now()) and g.created_at < now() - (
  select rule.threshold * interval '1 second'
  from private.alert_rules as rule where rule.alert = 'oldest_age'
)
order by since desc;

comment on view private.stuck_jobs is
  'Is anything stuck? Running jobs whose lease or deadline has passed, and jobs that may be claimed'
  ' and are older than the rule oldest_age allows.';

-- What happened lately.

create view private.recent_attempts with (security_invoker = true) as
select
  a.generation_id, g.user_id, g.model_id, a.attempt, a.worker_id, a.outcome, a.error_code,
  a.error_detail, a.provider_job_id, a.provider_seconds, a.cost_usd, g.created_at, a.started_at,
  a.ended_at, extract(epoch from a.started_at - g.created_at) as wait_seconds,
  extract(epoch from a.ended_at - a.started_at) as run_seconds
from private.attempts as a
inner join public.generations as g on a.generation_id = g.id
where a.ended_at > now() - (select s.watch_window from private.settings as s);

comment on view private.recent_attempts is
  'What was tried lately, and how did it end? wait_seconds: from being asked for to this claim.';

create view private.recent_failures with (security_invoker = true) as
select
  a.ended_at, a.error_code, a.error_detail, a.outcome, a.model_id, a.generation_id, a.user_id,
  a.attempt, a.worker_id, a.provider_job_id
from private.recent_attempts as a
where a.error_code is not null
order by a.ended_at desc;

comment on view private.recent_failures is
  'What failed lately, and why? In the provider''s own words; outcome retried: it was tried again.';

-- Of so long as is asked for. Read by time alone: the planner may think a scan of all history as
-- good. Nothing here is compiled: that would take longer than running it.
create function private.errors_of(p_window interval) returns table (
  model_id text, error_code text, errors bigint, failed bigint, retried bigint,
  share_of_attempts numeric, last_at timestamptz, last_detail text
)
language sql stable set search_path = pg_catalog, pg_temp set enable_seqscan = off set jit = off
as $$
  select
    e.model_id, e.error_code, e.errors, e.failed, e.retried, round(e.errors / e.attempts, 4),
    e.last_at, e.last_detail
  from (
    select
      a.model_id, a.error_code, count(*) as errors,
      count(*) filter (where a.outcome = 'failed') as failed,
      count(*) filter (where a.outcome = 'retried') as retried,
      sum(count(*)) over (partition by a.model_id) as attempts,
      max(a.ended_at) as last_at,
      (array_agg(a.error_detail order by a.ended_at desc) filter (where a.error_code <> ''))[1]
        as last_detail
    from private.attempts as a
    where a.ended_at > now() - p_window and a.outcome <> 'released'
    group by a.model_id, a.error_code
  ) as e
  where e.error_code is not null
  order by e.errors desc, e.last_at desc
$$;

create view private.errors_by_model with (security_invoker = true) as
select e.* from private.errors_of((select s.watch_window from private.settings as s)) as e;

comment on view private.errors_by_model is
  'Which errors does each model make, how often, and what did the provider say last?';

-- How the attempts of each model ended, what completed ones took, and what all of them cost.
create function private.outcomes_of(p_window interval) returns table (
  model_id text, completed bigint, failed bigint, retried bigint, success_rate numeric,
  p50_seconds double precision, p95_seconds double precision,
  p50_provider_seconds double precision, p95_provider_seconds double precision, cost_usd numeric
)
language sql stable set search_path = pg_catalog, pg_temp set enable_seqscan = off set jit = off
as $$
  select
    o.model_id, o.completed, o.failed, o.retried,
    round(o.completed::numeric / nullif(o.completed + o.failed + o.retried, 0), 4),
    extract(epoch from o.ran[1]), extract(epoch from o.ran[2]), o.provider_seconds[1],
    o.provider_seconds[2], o.cost_usd
  from (
    select
      a.model_id,
      count(*) filter (where a.outcome = 'completed') as completed,
      count(*) filter (where a.outcome = 'failed') as failed,
      count(*) filter (where a.outcome = 'retried') as retried,
      percentile_cont('{0.5,0.95}'::double precision[])
        within group (order by a.ended_at - a.started_at)
        filter (where a.outcome = 'completed') as ran,
      percentile_cont('{0.5,0.95}'::double precision[]) within group (order by a.provider_seconds)
        filter (where a.outcome = 'completed') as provider_seconds,
      sum(a.cost_usd) as cost_usd
    from private.attempts as a
    where a.ended_at > now() - p_window
    group by a.model_id
  ) as o
  order by o.ran[1] desc nulls last
$$;

create view private.model_performance with (security_invoker = true) as
select
  o.model_id, o.completed, o.failed, o.retried, o.success_rate, o.p50_seconds, o.p95_seconds,
  o.p50_provider_seconds, o.p95_provider_seconds
from private.outcomes_of((select s.watch_window from private.settings as s)) as o
where o.success_rate is not null;

comment on view private.model_performance is
  'Which model is slow or fails? success_rate is that of attempts; seconds are those of completed'
  ' ones, from claim to stored, and the provider''s own.';

create view private.waiting_times with (security_invoker = true) as
select
  g.model_id, (private.plan_of(e)).name as plan, count(*) as completed,
  percentile_cont(0.5) within group (order by t.wait_seconds) as p50_wait_seconds,
  percentile_cont(0.95) within group (order by t.wait_seconds) as p95_wait_seconds,
  percentile_cont(0.5) within group (order by t.run_seconds) as p50_run_seconds,
  percentile_cont(0.95) within group (order by t.run_seconds) as p95_run_seconds
from private.recent_attempts as a
inner join public.generations as g on a.generation_id = g.id
inner join public.entitlements as e on g.user_id = e.user_id
cross join lateral (
  select
    extract(epoch from g.started_at - g.created_at) as wait_seconds,
    extract(epoch from g.finished_at - g.started_at) as run_seconds
) as t
where a.outcome = 'completed'
group by g.model_id, (private.plan_of(e)).name
order by g.model_id, plan;

comment on view private.waiting_times is
  'How long do users wait? Of completed generations: wait until the first claim, run from there to'
  ' the end, retries included.';

create view private.throughput_per_hour with (security_invoker = true) as
select
  date_trunc('hour', a.ended_at) as hour,
  count(*) filter (where a.outcome = 'completed') as completed,
  count(*) filter (where a.outcome = 'failed') as failed,
  count(*) filter (where a.outcome = 'retried') as retried,
  count(*) filter (where a.outcome = 'canceled') as canceled
from private.recent_attempts as a
group by date_trunc('hour', a.ended_at)
order by hour desc;

comment on view private.throughput_per_hour is 'How many succeed in an hour, lately?';

create view private.throughput_per_day with (security_invoker = true) as
select
  date_trunc('day', a.ended_at) as day,
  count(*) filter (where a.outcome = 'completed') as completed,
  count(*) filter (where a.outcome = 'failed') as failed,
  count(*) filter (where a.outcome = 'retried') as retried,
  count(*) filter (where a.outcome = 'canceled') as canceled
from private.attempts as a
group by date_trunc('day', a.ended_at)
order by day desc;

comment on view private.throughput_per_day is
  'How many succeed in a day? As far back as attempts are kept.';

create view private.worker_activity with (security_invoker = true) as
select
  w.id as worker_id, w.host, w.version,
  w.seen_at > now() - (select s.lease from private.settings as s) as is_alive,
  w.asleep, w.is_listening, w.slots, coalesce(running.jobs, 0) as slots_used,
  coalesce(done.completed, 0) as completed, coalesce(done.errors, 0) as errors,
  done.last_ended_at, w.started_at, w.seen_at
from private.workers as w
left join (
  select r.worker_id, count(*) as jobs from private.running_jobs as r group by r.worker_id
) as running on w.id = running.worker_id
left join (
  select
    a.worker_id, count(*) filter (where a.outcome = 'completed') as completed,
    count(*) filter (where a.outcome in ('failed', 'retried')) as errors,
    max(a.ended_at) as last_ended_at
  from private.recent_attempts as a
  group by a.worker_id
) as done on w.id = done.worker_id
order by is_alive desc, w.id asc;

comment on view private.worker_activity is
  'Which worker lives, and what does it do? completed and errors: of its attempts, lately. One that'
  ' stopped without unregistering is alive until its lease would have run out.';

create view private.busiest_users with (security_invoker = true) as
select
  g.user_id, (private.plan_of(e)).name as plan, count(*) as generations,
  count(*) filter (where g.status = 'completed') as completed,
  count(*) filter (where g.status = 'failed') as failed,
  count(*) filter (where g.status = 'canceled') as canceled,
  sum(g.price_credits) as price_credits,
  (select count(*) from private.live_jobs as j where j.user_id = g.user_id) as active_jobs,
  e.credits
from public.generations as g
inner join public.entitlements as e on g.user_id = e.user_id
where g.id >= (select private.first_id_of(now() - s.watch_window) from private.settings as s)
group by e.user_id, g.user_id
order by generations desc, g.user_id asc;

comment on view private.busiest_users is
  'Who asks for most, and whose jobs fail most? price_credits are those charged, refunds included.';

create view private.alias_arms with (security_invoker = true) as
select
  coalesce(tried.alias_id, arm.id) as alias_id, coalesce(tried.model_id, arm.model_id) as model_id,
  arm.weight, coalesce(tried.generations, 0) as generations, tried.success_rate, tried.p50_seconds,
  tried.p95_seconds, round(tried.cost_usd / nullif(tried.images, 0), 6) as cost_usd_per_image,
  coalesce(tried.favorites, 0) as favorites, coalesce(tried.likes, 0) as likes
from (
  select
    g.alias_id, g.model_id, count(*) as generations,
    round(avg((g.status = 'completed')::integer)
    filter (where g.status in ('completed', 'failed')), 4) as success_rate,
    percentile_cont(0.5) within group (order by of_each.seconds) as p50_seconds,
    percentile_cont(0.95) within group (order by of_each.seconds) as p95_seconds,
    sum(of_each.cost_usd) as cost_usd, sum(of_each.images) as images,
    count(*) filter (where g.is_favorite) as favorites, sum(of_each.likes) as likes
  from public.generations as g
  cross join lateral (
    select
      case when g.status = 'completed' then extract(epoch from g.finished_at - g.started_at) end
        as seconds,
      (select sum(a.cost_usd) from private.attempts as a where a.generation_id = g.id) as cost_usd,
      (select count(*) from public.images as i where i.generation_id = g.id) as images,
      private.likes_of(g.id) as likes
  ) as of_each
  where g.alias_id is not null
  group by g.alias_id, g.model_id
) as tried
full join public.model_aliases as arm
  on tried.alias_id = arm.id and tried.model_id = arm.model_id
order by alias_id, model_id;

comment on view private.alias_arms is
  'Which model behind an alias does better? Of all generations kept that asked for the alias. '
  'success_rate leaves out canceled and live ones; cost_usd_per_image holds what failed attempts '
  'cost; favorites are the users'' own, likes those of shared images. weight null: an arm no more.';
