-- Health: what moves, held against alert_rules (17). An alert is a row there, and a line here that
-- says what is measured for it: raised while that is above the threshold. Nothing is remembered.
--
-- Everything it reads is as small as the work in hand or the last fifteen minutes, never as long as
-- history: a monitor may call it every few seconds. It names sessions by pid and application, and
-- never shows a query, a prompt or an input; a monitor is told no ids and nobody's words, which may
-- repeat a prompt in any spelling.

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

-- Whether who asks is more than a monitor: may pause what it would read about.
create function private.is_operator() returns boolean
language sql stable set search_path = pg_catalog, pg_temp as $$
  select has_function_privilege(
    coalesce(nullif(current_setting('role', true), 'none'), session_user),
    'public.pause_model(text, timestamptz, text)', 'execute'
  )
$$;

-- Counts by minute. The error rate is that of attempts: while jobs are retried for an hour, none
-- has failed, and still nothing works. Burned is what the provider may bill and its user canceled.
--
-- Read by time alone: see errors_of (83).
create function private.rates_health() returns jsonb
language sql stable set search_path = pg_catalog, pg_temp set enable_seqscan = off set jit = off
as $$
  with counted as (
    select
      kind.what, coalesce(m.jobs, 0) as jobs, coalesce(m.new_jobs, 0) as new_jobs,
      coalesce(sum(m.jobs) filter (where kind.what <> 'enqueued') over (), 0) as attempts
    from unnest('{enqueued,completed,failed,retried}'::text[]) as kind (what)
    left join (
      select
        a.outcome::text as what, count(*) as jobs,
        count(*) filter (where a.ended_at > now() - interval '1 minute') as new_jobs
      from private.attempts as a
      where a.ended_at > now() - interval '15 minutes' group by a.outcome
      union all
      select
        'enqueued', count(*), count(*) filter (where g.created_at > now() - interval '1 minute')
      from public.generations as g
      where g.id >= private.first_id_of(now() - interval '15 minutes')
        and g.created_at > now() - interval '15 minutes'
    ) as m on m.what = kind.what
  )
  select jsonb_build_object(
    'last_minute', jsonb_object_agg(c.what, c.new_jobs),
    'per_minute_of_15', jsonb_object_agg(c.what, round(c.jobs / 15.0, 2)),
    'attempts_of_15_minutes', max(c.attempts),
    'error_rate', round(
      sum(c.jobs) filter (where c.what in ('failed', 'retried')) / nullif(max(c.attempts), 0), 4
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
  )
  from counted as c
$$;

-- What queue_health answers but for status and alerts, given the queue by model, which is dear to
-- count.
create function private.measure(p_models jsonb) returns jsonb
language sql stable set search_path = pg_catalog, pg_temp as $$
  select jsonb_build_object(
    'depth', (
      select jsonb_build_object(
        'ready', coalesce(sum(m.ready), 0), 'delayed', coalesce(sum(m.delayed), 0),
        'paused', coalesce(sum(m.paused), 0), 'oldest_ready_seconds', max(m.oldest_ready_seconds)
      )
      from jsonb_populate_recordset(null::private.queue_by_model, p_models) as m
    ),
    'running', (
      select jsonb_build_object(
        'jobs', count(*), 'stale', count(*) filter (where l.lasts < '0'),
        'stale_seconds', extract(epoch from max(-l.lasts) filter (where l.lasts < '0'))
      )
      from private.running_now as r
      cross join lateral (select least(r.lease_left, r.deadline_left) as lasts) as l
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
    'paused', (
      select coalesce(jsonb_agg(to_jsonb(p) ||
        case when private.is_operator() then '{}' else '{"pause_reason": null}'::jsonb end
      ), '[]')
      from private.paused_now as p
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
          jsonb_agg(r.result -> 'examples') filter (where private.is_operator()) -> 0, '[]'
        )
      )
      from private.routines as r where r.name = 'check_books' and r.result is not null
    ),
    -- What routines passed over within a day; who was only locked counts from the third time. And
    -- files that Storage would not delete for a day.
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
      ) as s
    )
  )
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
  cross join (
    select
      h -> 'depth' as depth, h -> 'running' as running, h -> 'rates' as rates,
      h -> 'books' as books, h #>> '{depth,ready}' as ready,
      (h #>> '{workers,alive}')::integer as alive,
      (h #>> '{workers,alive}')::integer - (h #>> '{workers,listening}')::integer as deaf
  ) as x
  left join lateral (values
    ('depth', x.ready, null::bigint, x.ready || ' jobs are ready'),
    ('oldest_age', x.depth ->> 'oldest_ready_seconds', null,
      format('a job has waited for %s s', round((x.depth ->> 'oldest_ready_seconds')::numeric))),
    ('error_rate', x.rates ->> 'error_rate', (x.rates ->> 'attempts_of_15_minutes')::bigint,
      format('of %s attempts in 15 minutes, %s %% ended in an error',
        x.rates ->> 'attempts_of_15_minutes', round(100 * (x.rates ->> 'error_rate')::numeric))),
    ('burned', x.rates ->> 'burned_of_15_minutes', null,
      format('%s running jobs canceled in 15 minutes, by %s users: the provider may bill them',
        x.rates ->> 'burned_of_15_minutes', x.rates ->> 'burned_by_users')),
    ('stuck', x.running ->> 'stale_seconds', null,
      format('%s running jobs are past lease or deadline, one for %s s',
        x.running ->> 'stale', round((x.running ->> 'stale_seconds')::numeric))),
    ('no_worker', case when x.alive = 0 then x.ready end, null,
      x.ready || ' jobs are ready and no worker is alive'),
    ('not_listening', x.deaf::text, null, format('%s of %s workers', x.deaf, x.alive)),
    ('cron_silent', (
      select max((r.value ->> 'runs_missed')::numeric)::text from jsonb_each(h -> 'routines') as r
    ), null, (
      select string_agg(
        concat(r.key, ' last ran at ', r.value ->> 'last_run_at'), '; '
        order by (r.value ->> 'runs_missed')::numeric desc
      )
      from jsonb_each(h -> 'routines') as r where r.value ->> 'runs_missed' > '0'
    )),
    ('paused', jsonb_array_length(h -> 'paused')::text, null, (
      select string_agg(concat(
        p.kind, ' ', p.name, ' until ' || p.paused_until, ': ' || p.pause_reason
      ), '; ' order by p.name)
      from jsonb_to_recordset(h -> 'paused')
        as p (kind text, name text, paused_until text, pause_reason text)
    )),
    ('vacuum_held_back', h #>> '{vacuum,oldest_transactions}', null, (
      select string_agg(
        concat_ws(
          ' ', v.kind, v.pid, quote_ident(v.name), v.state,
          'since ' || date_trunc('second', v.since), format('(%s transactions)', v.age_transactions)
        ), '; ' order by v.age_transactions desc
      )
      from (
        select * from private.vacuum_holders as a where a.age_transactions > rule.threshold
        order by a.age_transactions desc limit 5
      ) as v
    )),
    ('dead_deliveries', h #>> '{outbox,dead}', null,
      (h #>> '{outbox,dead}') || ' deliveries to webhooks were given up'),
    ('skipped_rows', h #>> '{skipped,rows}', null,
      format('%s rows since %s: %s', h #>> '{skipped,rows}', h #>> '{skipped,since}', (
        select string_agg(concat(s.key, ' ', s.value), ', ' order by s.key)
        from jsonb_each_text(h #> '{skipped,steps}') as s
      ))),
    ('books', ((x.books ->> 'recent_problems')::integer
      + coalesce((x.books ->> 'problems')::integer, 0))::text, null,
      format('%s problems among what moved last, %s at the check of %s',
        x.books ->> 'recent_problems', coalesce(x.books ->> 'problems', 'none'),
        coalesce(x.books ->> 'checked_at', 'never')))
  ) as m (alert, value, cases, detail) on m.alert = rule.alert
$$;

-- What is measured, under its alerts, the worst first.
create function private.health_of(p_models jsonb) returns json
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_health jsonb := private.measure(p_models);
  v_alerts jsonb := (
    select coalesce(jsonb_agg(jsonb_build_object(
      'alert', s.alert, 'severity', s.severity, 'detail', s.detail, 'hint', s.hint
    ) order by s.severity, s.alert), '[]')
    from private.alert_states(v_health) as s where s.is_raised
  );
begin
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
  'burned_of_15_minutes, burned_by_users}, workers {alive, asleep, listening, slots, slots_used}, '
  'routines {name: {last_run_at, every_seconds, runs_missed}}, paused, vacuum '
  '{oldest_transactions, sees_all_sessions}, outbox {pending, oldest_pending_seconds, dead}, books '
  '{recent_problems, checked_at, problems, examples}, skipped {rows, since, steps}}. A monitor is '
  'shown no reasons and no examples. Thresholds are rows of private.alert_rules.';
