-- Alerts: what health counts (88) against alert_rules, and queue_health(), which answers both.
--
-- Each measure names its rule, a value, how many cases that rests on, and what to tell people. The
-- alert is raised while the value is above the rule's threshold, and is gone with the next call
-- after that: nothing is remembered here.

-- Who has held back vacuum for longest, beyond the rule's threshold.
create function private.name_vacuum_holders() returns text
language sql stable set search_path = pg_catalog, pg_temp as $$
  select string_agg(
    concat_ws(
      ' ', v.kind, v.pid, quote_ident(v.name), v.state, 'since ' || date_trunc('second', v.since),
      format('(%s transactions)', v.age_transactions)
    ), '; ' order by v.age_transactions desc
  )
  from (
    select h.* from private.vacuum_holders as h
    where h.age_transactions > (
      select rule.threshold from private.alert_rules as rule
      where rule.alert = 'vacuum_held_back'
    )
    order by h.age_transactions desc limit 5
  ) as v
$$;

create function private.measure_queue(p_health jsonb)
returns table (alert text, value numeric, cases bigint, detail text)
language sql stable set search_path = pg_catalog, pg_temp as $$
  select m.alert, m.value, m.cases, m.detail
  from (
    select p_health -> 'depth' as d, p_health -> 'running' as r, p_health -> 'rates' as t
  ) as h
  cross join lateral (values
    (
      'depth', (h.d ->> 'ready')::numeric, null::bigint, concat(h.d ->> 'ready', ' jobs are ready')
    ),
    (
      'oldest_age', (h.d ->> 'oldest_ready_seconds')::numeric, null,
      format('a job has waited for %s s', round((h.d ->> 'oldest_ready_seconds')::numeric))
    ),
    (
      'error_rate', (h.t ->> 'error_rate')::numeric, (h.t ->> 'attempts_of_15_minutes')::bigint,
      format('of %s attempts in 15 minutes, %s %% ended in an error',
        h.t ->> 'attempts_of_15_minutes', round(100 * (h.t ->> 'error_rate')::numeric))
    ),
    (
      'burned', (h.t ->> 'burned_of_15_minutes')::numeric, null,
      format('%s running jobs canceled in 15 minutes, by %s users: the provider may bill them',
        h.t ->> 'burned_of_15_minutes', h.t ->> 'burned_by_users')
    ),
    (
      'stuck', (h.r ->> 'stale_seconds')::numeric, null,
      format('%s running jobs are past lease or deadline, one for %s s',
        h.r ->> 'stale', round((h.r ->> 'stale_seconds')::numeric))
    )
  ) as m (alert, value, cases, detail)
$$;

create function private.measure_workers(p_health jsonb)
returns table (alert text, value numeric, cases bigint, detail text)
language sql stable set search_path = pg_catalog, pg_temp as $$
  select m.alert, m.value, null::bigint, m.detail
  from (
    select
      (p_health #>> '{workers,alive}')::numeric as alive,
      (p_health #>> '{workers,listening}')::numeric as listening,
      (p_health #>> '{depth,ready}')::numeric as ready
  ) as h
  cross join lateral (values
    (
      'no_worker', case when h.alive = 0 then h.ready end,
      format('%s jobs are ready and no worker is alive', h.ready)
    ),
    (
      'not_listening', h.alive - h.listening,
      format('%s of %s workers', h.alive - h.listening, h.alive)
    )
  ) as m (alert, value, detail)
$$;

create function private.measure_surroundings(p_health jsonb)
returns table (alert text, value numeric, cases bigint, detail text)
language sql stable set search_path = pg_catalog, pg_temp as $$
  select m.alert, m.value, null::bigint, m.detail
  from (select p_health -> 'books' as b, p_health #>> '{outbox,dead}' as dead) as h
  cross join (
    select
      max((r.value ->> 'runs_missed')::numeric) as missed,
      string_agg(
        concat(r.key, ' last ran at ', r.value ->> 'last_run_at'), '; '
        order by (r.value ->> 'runs_missed')::numeric desc
      ) filter (where r.value ->> 'runs_missed' > '0') as detail
    from jsonb_each(p_health -> 'routines') as r
  ) as cron
  cross join lateral (values
    ('cron_silent', cron.missed, cron.detail),
    (
      'paused', jsonb_array_length(p_health -> 'paused')::numeric,
      (
        select string_agg(
          concat_ws(
            ' ', p.value ->> 'kind', p.value ->> 'name', 'until', p.value ->> 'paused_until'
          ) || coalesce(': ' || (p.value ->> 'pause_reason'), ''), '; ' order by p.value ->> 'name'
        )
        from jsonb_array_elements(p_health -> 'paused') as p
      )
    ),
    (
      'vacuum_held_back', (p_health #>> '{vacuum,oldest_transactions}')::numeric,
      private.name_vacuum_holders()
    ),
    (
      'dead_deliveries', h.dead::numeric, concat(h.dead, ' deliveries to webhooks were given up')
    ),
    (
      'skipped_rows', (p_health #>> '{skipped,rows}')::numeric,
      format('%s rows since %s: %s', p_health #>> '{skipped,rows}',
        p_health #>> '{skipped,since}', (
          select string_agg(concat(s.key, ' ', s.value), ', ' order by s.key)
          from jsonb_each_text(p_health #> '{skipped,steps}') as s
        ))
    ),
    (
      'books',
      (h.b ->> 'recent_problems')::numeric + coalesce((h.b ->> 'problems')::numeric, 0),
      format('%s problems among what moved last, %s at the check of %s',
        h.b ->> 'recent_problems', coalesce(h.b ->> 'problems', 'none'),
        coalesce(h.b ->> 'checked_at', 'never'))
    )
  ) as m (alert, value, detail)
$$;

-- Every rule with what is measured, and whether its alert is raised.
create function private.alert_states(p_health jsonb)
returns table (
  alert text, severity text, is_raised boolean, value numeric, threshold numeric, detail text,
  hint text
)
language sql stable set search_path = pg_catalog, pg_temp as $$
  select
    rule.alert,
    rule.severity,
    coalesce(m.value > rule.threshold and coalesce(m.cases >= rule.min_cases, true), false),
    m.value,
    rule.threshold,
    m.detail,
    rule.hint
  from private.alert_rules as rule
  left join (
    select * from private.measure_queue(p_health)
    union all
    select * from private.measure_workers(p_health)
    union all
    select * from private.measure_surroundings(p_health)
  ) as m on rule.alert = m.alert
$$;

-- The worst first.
create function private.health_alerts(p_health jsonb) returns jsonb
language sql stable set search_path = pg_catalog, pg_temp as $$
  select coalesce(jsonb_agg(jsonb_build_object(
    'alert', s.alert, 'severity', s.severity, 'detail', s.detail, 'hint', s.hint
  ) order by s.severity, s.alert), '[]')
  from private.alert_states(p_health) as s
  where s.is_raised
$$;

-- What queue_health answers, given the depth of the queue, which is dear to count.
create function private.health_with(p_depth jsonb) returns json
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_alerts jsonb;
  v_health jsonb := jsonb_build_object(
    'depth', p_depth,
    'running', private.running_health(),
    'rates', private.rates_health(),
    'workers', private.worker_health(),
    'routines', private.routine_health(),
    'paused', (
      select coalesce(jsonb_agg(to_jsonb(p) || case
        when private.is_operator() then '{}' else '{"pause_reason": null}'::jsonb
      end), '[]')
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
    'books', private.books_health(),
    'skipped', private.skipped_health()
  );
begin
  v_alerts := private.health_alerts(v_health);
  return json_build_object(
    'status', coalesce(v_alerts #>> '{0,severity}', 'ok'),
    'alerts', v_alerts,
    'depth', v_health -> 'depth',
    'running', v_health -> 'running',
    'rates', v_health -> 'rates',
    'workers', v_health -> 'workers',
    'routines', v_health -> 'routines',
    'paused', v_health -> 'paused',
    'vacuum', v_health -> 'vacuum',
    'outbox', v_health -> 'outbox',
    'books', v_health -> 'books',
    'skipped', v_health -> 'skipped'
  );
end;
$$;

-- Compiling would take longer than running, and a second process would only cost more.
create function private.queue_health() returns json
language sql stable security definer set search_path = pg_catalog, pg_temp
set jit = off set max_parallel_workers_per_gather = 0 as $$
  select private.health_with(private.depth_health())
$$;
