-- Health: what moves, held against alert_rules (17). An alert is a row there, and a line here that
-- says what is measured for it: raised while that is above the threshold. Nothing is remembered.
--
-- Each fact stands once, in a view, which is also what an operator reads who looks closer: as the
-- owner (psql, the SQL editor), for nobody is granted anything, and security_invoker keeps row
-- level security in force should somebody ever be. What more there is to ask is in 97.
--
-- Everything health reads is as small as the work in hand or the last fifteen minutes, never as
-- long as history: a monitor may call it every few seconds. It names sessions by pid and
-- application, and never shows a query, a prompt or an input; a monitor is told no ids and nobody's
-- words, which may repeat a prompt in any spelling.

-- The first id that uuid_v7 could have made at this time.
create function private.first_id_of(p_time timestamptz) returns uuid
language sql immutable set search_path = pg_catalog, pg_temp as $$
  select rpad(lpad(to_hex((extract(epoch from p_time) * 1000)::bigint), 12, '0'), 32, '0')::uuid
$$;

create view private.paused_now with (security_invoker = true) as
select
  case when b.name like '%/%' then 'model' else 'provider' end as kind,
  b.name, b.paused_until, b.pause_reason, b.times_opened,
  cardinality(b.failed_users) as failed_users
from private.breakers as b
where b.paused_until > now();

comment on view private.paused_now is
  'Which models, routes (owner/name#place) and providers are paused, until when, and why? '
  'times_opened 0: by an operator. '
  'failed_users: only so many users wait, others are tried; 0: everybody waits.';

-- The queue is passed once: a job costs no more than to be counted.
create view private.queue_by_model with (security_invoker = true) as
select
  n.model_id, m.provider,
  coalesce(case when not p.is_paused then q.waiting - q.held - q.delayed end, 0) as ready,
  coalesce(case when not p.is_paused then q.delayed end, 0) as delayed,
  coalesce(case when p.is_paused then q.waiting else q.held end, 0) as paused,
  coalesce(r.running, 0) as running,
  case when not p.is_paused and q.waiting - q.held > q.delayed
    then extract(epoch from now() - q.ready_since)
  end as oldest_ready_seconds
from (
  select
    j.model_id, count(*) as waiting, count(*) filter (where b.is_held) as held,
    count(*) filter (where j.run_at > now() and not b.is_held) as delayed,
    min(coalesce(j.run_at, j.queued_at)) filter (where not b.is_held) as ready_since
  from private.ready_jobs as j
  cross join lateral (
    select
      (select count(*) > 0 from private.budgets as o where o.on_breach <> 'alert')
      and private.awaits_budget(j.model_id, j.route, j.user_id) as is_held
  ) as b
  group by j.model_id
) as q
full outer join (
  select j.model_id, count(*) as running from private.running_jobs as j group by j.model_id
) as r on q.model_id = r.model_id
cross join lateral (select coalesce(q.model_id, r.model_id) as model_id) as n
left join public.models as m on n.model_id = m.id
cross join lateral (
  select count(*) > 0 as is_paused
  from private.paused_models as x where x.id = n.model_id and x.paused_until > now()
) as p
order by n.model_id;

comment on view private.queue_by_model is
  'How many jobs of each model wait or run? ready (may be claimed now), delayed (a retry that is '
  'put off), paused (or waiting for a budget), running; oldest_ready_seconds: since the first of '
  'the ready may be claimed.';

create view private.running_now with (security_invoker = true) as
select
  r.job_id, r.user_id, r.model_id, way.provider, r.worker_id, w.host,
  now() - r.claimed_at as running, r.stage, r.progress, r.attempt, r.provider_job_id,
  r.cancel_requested, r.lease_until - now() as lease_left, r.deadline_at - now() as deadline_left,
  greatest(now() - least(r.lease_until, r.deadline_at), '0') as stuck_for
from private.running_jobs as r
left join private.workers as w on r.worker_id = w.id
left join private.routes as way on r.model_id = way.model_id and r.route = way.place
order by r.claimed_at;

comment on view private.running_now is
  'What runs now, where, for how long, and how far is it? stuck_for: its lease or its deadline has '
  'passed so long ago, and nobody has taken it back.';

create view private.worker_activity with (security_invoker = true) as
select
  w.id as worker_id, w.host, w.version, a.is_alive, w.asleep, w.is_listening, w.slots,
  coalesce(r.jobs, 0) as slots_used,
  case
    when not a.is_alive then 'silent'
    when r.jobs > 0 then 'busy'
    when w.asleep then 'asleep'
    else 'idle'
  end as state,
  round(extract(epoch from now() - w.seen_at), 1) as seen_seconds,
  round(extract(epoch from now() - w.started_at)) as up_seconds
from private.workers as w
cross join lateral (
  select w.seen_at > now() - s.lease as is_alive from private.settings as s
) as a
left join (
  select j.worker_id, count(*) as jobs from private.running_jobs as j group by j.worker_id
) as r on w.id = r.worker_id
order by a.is_alive, w.id;

comment on view private.worker_activity is
  'Which worker lives, and what does it do? First those that went silent without stopping, for as '
  'long as a lease. is_listening false: it finds jobs by polling only.';

create view private.vacuum_holders with (security_invoker = true) as
select
  'session' as kind, a.pid, coalesce(nullif(a.application_name, ''), a.backend_type) as name,
  a.state, greatest(age(a.backend_xid), age(a.backend_xmin)) as age_transactions,
  now() - a.xact_start as since
from pg_stat_activity as a
where (a.backend_xmin is not null or a.backend_xid is not null)
  and (a.datname = current_database() or a.datname is null)
  and a.pid <> pg_backend_pid()
  -- Its own snapshot holds back nothing.
  and a.backend_type <> 'autovacuum worker'
union all
select 'prepared transaction', null, p.gid, 'prepared', age(p.transaction), now() - p.prepared
from pg_prepared_xacts as p
where p.database = current_database()
union all
select
  'replication slot', s.active_pid, s.slot_name,
  case when s.active then 'active' else 'inactive' end, age(s.xmin), null
from pg_replication_slots as s
where s.xmin is not null
order by age_transactions desc;

comment on view private.vacuum_holders is
  'Who holds back vacuum? While one of these is old, no dead row can be cleaned up, and the tables '
  'of the queue grow. Sessions of other roles show only to members of pg_read_all_stats.';

-- Counts by minute. The error rate is that of attempts: while jobs are retried for an hour, none
-- has failed, and still nothing works. Burned is what the provider may bill and its user canceled.
--
-- And how the last jobs ended, however long ago, of which an app with few of them hears. Attempts
-- have the ids of jobs, which are in the order of time, so they are read from the end.
--
-- Read by time alone: the planner may think a scan of all history as good. And not compiled, which
-- would take longer than running it.
create function private.rates_health() returns jsonb
language sql stable set search_path = pg_catalog, pg_temp set enable_seqscan = off set jit = off
as $$
  with moved as (
    select
      a.outcome::text as what, count(*) as jobs,
      count(*) filter (where a.ended_at > now() - interval '1 minute') as new_jobs
    from private.attempts as a
    where a.ended_at > now() - interval '15 minutes' group by a.outcome
    union all
    select 'enqueued', count(*), count(*) filter (where g.created_at > now() - interval '1 minute')
    from public.generations as g
    where g.id >= private.first_id_of(now() - interval '15 minutes')
      and g.created_at > now() - interval '15 minutes'
  )
  select jsonb_build_object(
    'last_minute', jsonb_object_agg(m.what, m.new_jobs),
    'per_minute_of_15', jsonb_object_agg(m.what, round(m.jobs / 15.0, 2)),
    'attempts_of_15_minutes', coalesce(sum(m.jobs) filter (where m.what <> 'enqueued'), 0),
    'error_rate', round(
      sum(m.jobs) filter (where m.what in ('failed', 'retried'))
      / nullif(sum(m.jobs) filter (where m.what <> 'enqueued'), 0), 4
    )
  ) || (
    -- No join, which might be made by reading all generations.
    select jsonb_build_object(
      'burned_of_15_minutes', count(*), 'burned_by_users', count(distinct (
        select g.user_id from public.generations as g where g.id = a.generation_id
      ))
    )
    from private.attempts as a
    where a.ended_at > now() - interval '15 minutes' and a.outcome = 'canceled'
      and a.error_code is null and a.cost_usd is distinct from 0
  ) || (
    select jsonb_build_object(
      'last_jobs', count(*), 'last_jobs_failed', count(l.error_code),
      'last_jobs_error', mode() within group (order by l.error_code)
    )
    from (
      select case when a.outcome = 'failed' then a.error_code end as error_code
      from (
        select * from private.attempts as t order by t.generation_id desc, t.token desc limit 100
      ) as a
      left join private.error_codes as e on e.code = a.error_code
      where a.outcome = 'completed' or (a.outcome = 'failed' and e.blames_user is not true)
      order by a.generation_id desc limit 12
    ) as l
  )
  from (
    select k.what, coalesce(c.jobs, 0) as jobs, coalesce(c.new_jobs, 0) as new_jobs
    from unnest('{enqueued,completed,failed,retried}'::text[]) as k (what)
    left join moved as c on c.what = k.what
  ) as m
$$;

-- Every rule with what is measured, and whether its alert is raised: if that is above the
-- threshold, and rests on enough cases.
create function private.alert_states(h jsonb) returns table (
  alert text, severity text, is_raised boolean, value numeric, threshold numeric, detail text,
  hint text
)
language sql stable set search_path = pg_catalog, pg_temp as $$
  select
    rule.alert, rule.severity,
    coalesce(m.value::numeric > rule.threshold and (m.cases >= rule.min_cases) is not false, false),
    m.value::numeric, rule.threshold, m.detail, rule.hint
  from private.alert_rules as rule
  cross join jsonb_to_record(h) as x (
    depth jsonb, running jsonb, rates jsonb, workers jsonb, routines jsonb, paused jsonb,
    unserved jsonb, vacuum jsonb, outbox jsonb, books jsonb, skipped jsonb, budgets jsonb
  )
  cross join lateral (
    select (x.workers ->> 'alive')::integer as alive, (x.workers ->> 'listening')::integer as listen
  ) as w
  left join lateral (
    select s.* from jsonb_each(x.routines) as s
    order by (s.value ->> 'runs_missed')::numeric desc nulls last limit 1
  ) as r on true
  left join lateral (values
    ('depth', x.depth ->> 'ready', null::bigint, (x.depth ->> 'ready') || ' jobs are ready'),
    ('oldest_age', x.depth ->> 'oldest_ready_seconds', null,
      format('a job has waited for %s s', round((x.depth ->> 'oldest_ready_seconds')::numeric))),
    ('error_rate', x.rates ->> 'error_rate', (x.rates ->> 'attempts_of_15_minutes')::bigint,
      format('of %s attempts in 15 minutes, %s %% ended in an error',
        x.rates ->> 'attempts_of_15_minutes', round(100 * (x.rates ->> 'error_rate')::numeric))),
    ('recent_failures',
      round((x.rates ->> 'last_jobs_failed')::numeric
        / nullif((x.rates ->> 'last_jobs')::numeric, 0), 4)::text, (x.rates ->> 'last_jobs')::bigint,
      format('%s of the last %s jobs failed, most of them with %s',
        x.rates ->> 'last_jobs_failed', x.rates ->> 'last_jobs', x.rates ->> 'last_jobs_error')),
    ('burned', x.rates ->> 'burned_of_15_minutes', null,
      format('%s running jobs canceled in 15 minutes, by %s users: the provider may bill them',
        x.rates ->> 'burned_of_15_minutes', x.rates ->> 'burned_by_users')),
    ('stuck', x.running ->> 'stale_seconds', null,
      format('%s running jobs are past lease or deadline, one for %s s',
        x.running ->> 'stale', round((x.running ->> 'stale_seconds')::numeric))),
    ('no_worker', case when w.alive = 0 then x.depth ->> 'ready' end, null,
      (x.depth ->> 'ready') || ' jobs are ready and no worker is alive'),
    ('unserved', (select sum(u.value::integer) from jsonb_each_text(x.unserved) as u)::text, null, (
      select string_agg(
        format('%s jobs wait for %s, which no living worker serves', u.value, u.key), '; '
        order by u.key
      )
      from jsonb_each_text(x.unserved) as u
    )),
    ('not_listening', (w.alive - w.listen)::text, null,
      format('%s of %s workers', w.alive - w.listen, w.alive)),
    ('cron_silent', r.value ->> 'runs_missed', null,
      concat(r.key, ' last ran at ', r.value ->> 'last_run_at')),
    ('paused', jsonb_array_length(x.paused)::text, null, (
      select string_agg(concat(
        p.kind, ' ', p.name, ' until ' || p.paused_until, ': ' || p.pause_reason
      ), '; ' order by p.name)
      from jsonb_to_recordset(x.paused)
        as p (kind text, name text, paused_until text, pause_reason text)
    )),
    ('budget', (select max(b.used) from jsonb_to_recordset(x.budgets) as b (used numeric))::text,
      null, (
        select string_agg(format(
          '%s: %s of %s USD of this %s', b.scope, round(b.used * b.limit_usd, 2),
          round(b.limit_usd, 2), b.period
        ), '; ' order by b.used desc, b.scope)
        from jsonb_to_recordset(x.budgets)
          as b (scope text, period text, limit_usd numeric, used numeric)
        where b.used > rule.threshold
      )),
    ('vacuum_held_back', x.vacuum ->> 'oldest_transactions', null, (
      select concat_ws(
        ' ', v.kind, v.pid, quote_ident(v.name), v.state,
        'since ' || date_trunc('second', v.since), format('(%s transactions)', v.age_transactions)
      )
      from private.vacuum_holders as v order by v.age_transactions desc nulls last limit 1
    )),
    ('dead_deliveries', x.outbox ->> 'dead', null,
      (x.outbox ->> 'dead') || ' deliveries to webhooks were given up'),
    ('skipped_rows', x.skipped ->> 'rows', null,
      format('%s rows since %s: %s', x.skipped ->> 'rows', x.skipped ->> 'since', (
        select string_agg(concat(s.key, ' ', s.value), ', ' order by s.key)
        from jsonb_each_text(x.skipped -> 'steps') as s
      ))),
    ('books', ((x.books ->> 'recent_problems')::integer
      + coalesce((x.books ->> 'problems')::integer, 0))::text, null,
      format('%s problems among what moved last, %s at the check of %s',
        x.books ->> 'recent_problems', coalesce(x.books ->> 'problems', 'none'),
        coalesce(x.books ->> 'checked_at', 'never')))
  ) as m (alert, value, cases, detail) on m.alert = rule.alert
$$;

-- Who asks is more than a monitor: may pause a model, and so is told why one was.
create function private.is_operator() returns boolean
language sql stable set search_path = pg_catalog, pg_temp as $$
  select has_function_privilege(
    coalesce(nullif(current_setting('role', true), 'none'), session_user),
    'public.pause_model(text, timestamptz, text)', 'execute'
  )
$$;

-- All of it, given the queue by model, which is dear to count: status and alerts, the worst first,
-- then what was measured.
create function private.health_of(p_models jsonb) returns json
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_is_operator boolean := private.is_operator();
  v_health jsonb;
  v_alerts jsonb;
begin
  v_health := jsonb_build_object(
    'depth', (
      select jsonb_build_object(
        'ready', coalesce(sum(m.ready), 0), 'delayed', coalesce(sum(m.delayed), 0),
        'paused', coalesce(sum(m.paused), 0), 'oldest_ready_seconds', max(m.oldest_ready_seconds)
      )
      from jsonb_populate_recordset(null::private.queue_by_model, p_models) as m
    ),
    'running', (
      select jsonb_build_object(
        'jobs', count(*), 'stale', count(*) filter (where r.stuck_for > '0'),
        'stale_seconds', extract(epoch from max(r.stuck_for) filter (where r.stuck_for > '0'))
      )
      from private.running_now as r
    ),
    'rates', private.rates_health(),
    'workers', (
      select jsonb_build_object(
        'alive', count(*), 'asleep', count(*) filter (where w.asleep),
        'listening', count(*) filter (where w.is_listening),
        'slots', coalesce(sum(w.slots), 0), 'slots_used', coalesce(sum(w.slots_used), 0)
      )
      from private.worker_activity as w where w.is_alive
    ),
    'routines', (
      select coalesce(jsonb_object_agg(r.name, jsonb_build_object(
        'last_run_at', r.last_run_at, 'every_seconds', extract(epoch from r.every),
        'runs_missed',
        trunc(extract(epoch from now() - r.last_run_at) / extract(epoch from r.every))
      )), '{}')
      from private.routines as r where r.every is not null
    ),
    'unserved', (
      select coalesce(jsonb_object_agg(u.provider, u.jobs), '{}')
      from (
        select m.provider, sum(m.ready) as jobs
        from jsonb_populate_recordset(null::private.queue_by_model, p_models) as m
        where m.ready > 0 and m.model_id in (select n.id from private.unserved_models as n)
        group by m.provider
      ) as u
    ),
    'paused', (
      select coalesce(jsonb_agg(to_jsonb(p) ||
        case when v_is_operator then '{}' else '{"pause_reason": null}'::jsonb end
      ), '[]')
      from private.paused_now as p
    ),
    'budgets', (
      select coalesce(jsonb_agg(to_jsonb(b) order by b.used desc, b.scope), '[]')
      from (
        select
          case when s.user_id is null then s.scope else 'a user' end as scope,
          s.period, s.limit_usd, s.spent_usd, s.reserved_usd, round(s.used, 4) as used,
          s.on_breach, s.ends_at
        from private.budget_states as s order by s.used desc limit 20
      ) as b
    ),
    'vacuum', (
      select jsonb_build_object(
        'oldest_transactions', coalesce(max(h.age_transactions), 0),
        'sees_all_sessions', pg_has_role(current_user, 'pg_read_all_stats', 'usage')
      )
      from private.vacuum_holders as h
    ),
    'outbox', private.outbox_health(),
    'books', (
      select jsonb_build_object(
        'recent_problems', (select count(*) from private.recent_broken_books()),
        'checked_at', max(r.last_run_at), 'problems', (max(r.result ->> 'problems'))::integer,
        'examples', coalesce(
          jsonb_agg(r.result -> 'examples') filter (where v_is_operator) -> 0, '[]'
        )
      )
      from private.routines as r where r.name = 'check_books' and r.result is not null
    ),
    -- What routines passed over within a day; who was only locked counts from the third time. And
    -- files that Storage would not delete for a day, and what was sold to nobody we know, or was
    -- nothing we know, for an hour.
    'skipped', (
      select jsonb_build_object(
        'rows', coalesce(sum(s.rows), 0), 'since', min(s.first_at),
        'steps', coalesce(jsonb_object_agg(s.step, s.rows), '{}')
      )
      from (
        select r.step, count(*) as rows, min(r.first_at) as first_at
        from private.skipped_rows as r
        where r.last_at > now() - interval '1 day'
          and (r.times > 2 or r.code not in ('40P01', '55P03'))
        group by r.step
        union all
        select 'storage', count(*), min(o.marked_at)
        from (
          select f.marked_at from private.expired_files as f
          where f.marked_at < now() - interval '1 day' order by f.marked_at limit 1000
        ) as o
        having count(*) > 0
        union all
        select 'billing', count(*), min(w.received_at)
        from (
          select e.received_at from private.billing_events as e
          where e.outcome = 'waiting' and e.said ? 'sales'
            and e.received_at < now() - interval '1 hour'
          limit 1000
        ) as w
        having count(*) > 0
      ) as s
    )
  );
  select coalesce(jsonb_agg(jsonb_build_object(
    'alert', s.alert, 'severity', s.severity, 'detail', s.detail, 'hint', s.hint
  ) order by s.severity, s.alert), '[]') into v_alerts
  from private.alert_states(v_health) as s where s.is_raised;
  return (
    select json_object_agg(p.key, p.value order by p.key <> 'status', p.key <> 'alerts')
    from jsonb_each(v_health || jsonb_build_object(
      'status', coalesce(v_alerts #>> '{0,severity}', 'ok'), 'alerts', v_alerts
    )) as p
  );
end;
$$;

create function public.queue_health() returns json
language sql stable security definer set search_path = pg_catalog, pg_temp set jit = off
set max_parallel_workers_per_gather = 0 as $$
  select private.health_of((select jsonb_agg(q) from private.queue_by_model as q))
$$;

comment on function public.queue_health is
  'How the queue is, for monitors: {status (ok | warning | critical), alerts [{alert, severity, '
  'detail, hint}], depth {ready, delayed, paused, oldest_ready_seconds}, running {jobs, stale, '
  'stale_seconds}, rates {last_minute, per_minute_of_15, attempts_of_15_minutes, error_rate, '
  'burned_of_15_minutes, burned_by_users, last_jobs, last_jobs_failed, last_jobs_error}, workers '
  '{alive, asleep, listening, slots, slots_used}, routines {name: {last_run_at, every_seconds, '
  'runs_missed}}, paused, unserved {provider: ready jobs}, budgets [{scope, period, limit_usd, '
  'spent_usd, reserved_usd, used, on_breach, ends_at}] (the twenty most used), vacuum '
  '{oldest_transactions, sees_all_sessions}, outbox {pending, oldest_pending_seconds, dead}, '
  'books {recent_problems, checked_at, problems, examples}, skipped {rows, since, steps}}. A '
  'monitor is shown no reasons and no examples. Thresholds are rows of private.alert_rules.';
