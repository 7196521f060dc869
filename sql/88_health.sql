-- Health: queue_health() counts what moves, and holds it against alert_rules (17).
--
-- Everything it reads is as small as the work in hand or the last fifteen minutes, never as long as
-- history: a monitor may call it every few seconds. What needs more is a view (89) or runs nightly
-- (86). It names sessions by pid and application, and never shows a query, a prompt or an input.

create view private.vacuum_holders with (security_invoker = true) as
select
  'session' as kind,
  a.pid,
  coalesce(nullif(a.application_name, ''), a.backend_type) as name,
  a.state,
  greatest(age(a.backend_xid), age(a.backend_xmin)) as age_transactions,
  now() - a.xact_start as since
from pg_stat_activity as a
where (a.backend_xmin is not null or a.backend_xid is not null)
  and (a.datname = current_database() or a.datname is null)
  and a.pid <> pg_backend_pid()
  -- Its own snapshot holds back nothing.
  and a.backend_type <> 'autovacuum worker'
union all
select
  'prepared transaction' as kind,
  null as pid,
  p.gid as name,
  'prepared' as state,
  age(p.transaction) as age_transactions,
  now() - p.prepared as since
from pg_prepared_xacts as p
where p.database = current_database()
union all
select
  'replication slot' as kind,
  s.active_pid as pid,
  s.slot_name::text as name,
  case when s.active then 'active' else 'inactive' end as state,
  age(s.xmin) as age_transactions,
  null as since
from pg_replication_slots as s
where s.xmin is not null
order by age_transactions desc;

comment on view private.vacuum_holders is
  'Who holds back vacuum? While one of these is old, no dead row can be cleaned up, and the tables '
  'of the queue grow. Sessions of other roles show only to members of pg_read_all_stats.';

revoke all on table private.vacuum_holders from public, anon, authenticated, service_role;

-- Whether who asks is more than a monitor: may pause what it would read about. A monitor is told no
-- ids and nobody's words, which may repeat a prompt in any spelling.
create function private.is_operator() returns boolean
language sql stable set search_path = pg_catalog, pg_temp as $$
  select has_function_privilege(
    coalesce(nullif(current_setting('role', true), 'none'), session_user),
    'private.pause_model(text, timestamptz, text)', 'execute'
  )
$$;

-- Notes that a routine ran to its end; pg_cron calls it after the routine.
create function private.note_run(p_name text) returns void
language sql set search_path = pg_catalog, pg_temp as $$
  update private.routines set last_run_at = now() where name = p_name
$$;

-- Jobs that wait, and how long the one has that came first of those that may be claimed.
create function private.depth_health() returns jsonb
language sql stable set search_path = pg_catalog, pg_temp as $$
  select jsonb_build_object(
    'ready', coalesce(sum(q.ready), 0),
    'delayed', coalesce(sum(q.delayed), 0),
    'paused', coalesce(sum(q.paused), 0),
    'oldest_ready_seconds', max(q.oldest_ready_seconds)
  )
  from private.queue_by_model as q
$$;

create function private.running_health() returns jsonb
language sql stable set search_path = pg_catalog, pg_temp as $$
  select jsonb_build_object(
    'jobs', count(*),
    'stale', count(*) filter (where s.ended_at < now()),
    'stale_seconds', extract(epoch from max(now() - s.ended_at) filter (where s.ended_at < now()))
  )
  from private.running_jobs as r
  cross join lateral (select least(r.lease_until, r.deadline_at) as ended_at) as s
$$;

-- Counts by minute. The error rate is that of attempts: while jobs are retried for an hour, none
-- has failed, and still nothing works.
--
-- Read by time alone: the planner may think a scan of all history as good.
create function private.rates_health() returns jsonb
language sql stable set search_path = pg_catalog, pg_temp
set enable_seqscan = off set jit = off as $$
  select jsonb_build_object(
    'last_minute', jsonb_build_object(
      'enqueued', asked.new, 'completed', ended.new_completed, 'failed', ended.new_failed,
      'retried', ended.new_retried
    ),
    'per_minute_of_15', jsonb_build_object(
      'enqueued', round(asked.jobs / 15.0, 2), 'completed', round(ended.completed / 15.0, 2),
      'failed', round(ended.failed / 15.0, 2), 'retried', round(ended.retried / 15.0, 2)
    ),
    'attempts_of_15_minutes', ended.completed + ended.failed + ended.retried,
    'burned_of_15_minutes', ended.burned,
    'burned_by_users', ended.burned_by_users,
    'error_rate', round(
      (ended.failed + ended.retried)::numeric
      / nullif(ended.completed + ended.failed + ended.retried, 0), 4
    )
  )
  from (
    select
      count(*) as jobs,
      count(*) filter (where g.created_at > now() - interval '1 minute') as new
    from public.generations as g
    where g.id >= private.first_id_of(now() - interval '15 minutes')
      and g.created_at > now() - interval '15 minutes'
  ) as asked
  cross join (
    select
      count(*) filter (where a.outcome = 'completed') as completed,
      count(*) filter (where a.outcome = 'failed') as failed,
      count(*) filter (where a.outcome = 'retried') as retried,
      count(*) filter (where a.outcome = 'completed' and a.is_new) as new_completed,
      count(*) filter (where a.outcome = 'failed' and a.is_new) as new_failed,
      count(*) filter (where a.outcome = 'retried' and a.is_new) as new_retried,
      count(a.burned_by) as burned,
      count(distinct a.burned_by) as burned_by_users
    from (
      select
        e.outcome,
        e.ended_at > now() - interval '1 minute' as is_new,
        -- See end_jobs (75). What costs nothing is not burned.
        case when e.outcome = 'canceled' and e.error_code is null and e.cost_usd is distinct from 0
          then (select g.user_id from public.generations as g where g.id = e.generation_id)
        end as burned_by
      from private.attempts as e
      where e.ended_at > now() - interval '15 minutes'
    ) as a
  ) as ended
$$;

-- A worker that stopped without unregistering counts until its lease would have run out.
create function private.worker_health() returns jsonb
language sql stable set search_path = pg_catalog, pg_temp as $$
  select jsonb_build_object(
    'alive', count(*),
    'asleep', count(*) filter (where w.asleep),
    'listening', count(*) filter (where w.is_listening),
    'slots', coalesce(sum(w.slots), 0),
    'slots_used', (
      select count(*) from private.running_jobs as r where r.worker_id = any (array_agg(w.id))
    )
  )
  from private.workers as w
  where w.seen_at > now() - (select s.lease from private.settings as s)
$$;

create function private.routine_health() returns jsonb
language sql stable set search_path = pg_catalog, pg_temp as $$
  select coalesce(jsonb_object_agg(r.name, jsonb_build_object(
    'last_run_at', r.last_run_at,
    'every_seconds', extract(epoch from r.every),
    'runs_missed', trunc(extract(epoch from now() - r.last_run_at) / extract(epoch from r.every))
  )), '{}')
  from private.routines as r
  where r.every is not null
$$;

create function private.books_health() returns jsonb
language sql stable set search_path = pg_catalog, pg_temp as $$
  select jsonb_build_object(
    'recent_problems', (select count(*) from private.recent_broken_books()),
    'checked_at', max(r.last_run_at),
    'problems', (max(r.result ->> 'problems'))::integer,
    'examples', coalesce(
      jsonb_agg(r.result -> 'examples') filter (where private.is_operator()) -> 0, '[]'
    )
  )
  from private.routines as r
  where r.name = 'check_books' and r.result is not null
$$;

-- What routines passed over within a day; who was only locked counts from the third time. And files
-- that Storage would not delete for a day.
create function private.skipped_health() returns jsonb
language sql stable set search_path = pg_catalog, pg_temp as $$
  select jsonb_build_object(
    'rows', coalesce(sum(s.rows), 0),
    'since', min(s.first_at),
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
$$;

-- Dead deliveries count while their webhook is there: deleting it says that nobody misses them. A
-- push that found no device any more is nothing to mend.
create function private.outbox_health() returns jsonb
language sql stable set search_path = pg_catalog, pg_temp as $$
  select jsonb_build_object(
    'pending', count(*),
    'oldest_pending_seconds', extract(epoch from now() - min(d.created_at)),
    'dead', (
      select count(*)
      from private.webhook_endpoints as e
      inner join private.deliveries as dead on dead.lane = e.id::text and dead.state = 'dead'
    )
  )
  from private.deliveries as d
  where d.state = 'pending'
$$;
