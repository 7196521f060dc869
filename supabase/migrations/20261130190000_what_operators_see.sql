-- One job by its id for operators, an alert where few jobs fail often, and a check for old policies.
--
-- `sql/` is the truth: this brings a database at work to it, in one statement, so in one transaction,
-- whoever applies it. It takes its locks first, and gives up after some five seconds: nothing is
-- changed then. Workers of the release before go on.

do $upgrade$
declare
  v_has_95 boolean := to_regclass('public.image_likes') is not null;
  v_has_96 boolean := to_regclass('private.deliveries') is not null;
  v_has_97 boolean := to_regclass('private.costs') is not null;
begin
-- In the order of requests, as far as they have one. Who waits for a second looks for a deadlock, and
-- may be its victim: so this waits less, lets go of what it has, and tries again.
for v_try in 1..30 loop
  begin
    perform set_config('lock_timeout', '250ms', true);
    lock table
    private.settings,
    public.entitlements,
    public.batches,
    public.generations,
    public.credit_ledger,
    private.ready_jobs,
    private.running_jobs,
    private.alert_rules,
    private.attempts,
    private.billing_customers,
    private.billing_events,
    private.billing_providers,
    private.billing_purchases,
    private.billing_subscriptions,
    private.budget_spendings,
    private.budgets,
    private.credit_buckets,
    private.error_codes,
    private.expired_files,
    private.exported_tables,
    private.merged_users,
    private.model_routes,
    private.model_stats,
    private.plans,
    private.provider_words,
    private.providers,
    private.purchases,
    private.retention_walks,
    private.retries,
    private.routines,
    private.skipped_rows,
    private.sources,
    private.welcomed_identities,
    private.workers,
    public.credit_products,
    public.images,
    public.model_aliases,
    public.models,
    private.breakers
    in access exclusive mode;
    exit;
  exception when lock_not_available then
    if v_try = 30 then
      raise;
    end if;
  end;
  perform pg_sleep(0.1 * random());
end loop;
perform set_config('lock_timeout', '5s', true);

-- What goes, or comes anew.

-- What comes, from sql/.

alter table private.error_codes
  add column if not exists blames_user boolean default false not null;

comment on column private.error_codes.blames_user is
  'True: what the user asked for is the cause, so it raises no recent_failures.';

create or replace function private.require_model(p_gate private.gate, p_name text) returns public.models
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_model public.models := p_gate.model;
  v_token text := 'model_paused';
  v_until timestamptz;
begin
  if v_model.id is null then
    select m.* into v_model
    from public.model_aliases as a
    inner join public.models as m on m.id = a.model_id
    cross join lateral (
      select
        ('x' || left(md5(concat_ws(' ', p_gate.user_id, a.id, m.id)), 12))::bit(48)::bigint as n
    ) as drawn
    where a.id = p_name and a.weight > 0 and m.is_active
      and (p_gate.plan = 'paid' or not m.requires_paid)
    order by
      coalesce(
        private.paused_until(m, p_gate.user_id), private.budget_spent_until(m, p_gate.user_id)
      ) is not null,
      -ln((drawn.n + 1) / 281474976710657.0) / a.weight
    limit 1;
  end if;
  if v_model.id is null then
    perform private.refuse_missing('model: no such model', 'list_models() names them.');
  elsif v_model.requires_paid and p_gate.plan <> 'paid' then
    perform private.refuse(
      'requires_paid_plan', format('%s is for paid users', v_model.id),
      'Choose another model or a paid plan.'
    );
  end if;
  v_until := private.paused_until(v_model, p_gate.user_id);
  if v_until is null and exists (
    select from private.budgets as b
    where b.on_breach <> 'alert' and coalesce(b.user_id, p_gate.user_id) = p_gate.user_id
      and (b.spent_until > now() or v_model.cost_usd is null)
  ) then
    v_token := 'budget_spent';
    v_until := private.budget_spent_until(v_model, p_gate.user_id);
  end if;
  if v_until is not null then
    perform private.refuse(
      v_token, format(case v_token
        when 'model_paused' then '%s is paused' else 'what %s may cost is spent, or not known'
      end, v_model.id),
      p_retry_after => ceil(extract(
        epoch from least(v_until, now() + interval '1 hour') - now()
      ))::integer
    );
  end if;
  return v_model;
end;
$$;

create or replace function private.rates_health() returns jsonb
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

create or replace function private.alert_states(h jsonb) returns table (
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

create or replace function private.is_operator() returns boolean
language sql stable set search_path = pg_catalog, pg_temp as $$
  select has_function_privilege(
    coalesce(nullif(current_setting('role', true), 'none'), session_user),
    'public.pause_model(text, timestamptz, text)', 'execute'
  )
$$;

create or replace function private.health_of(p_models jsonb) returns json
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

create or replace function private.check_setup(p_functions text[])
returns table (part text, verdict text, detail text)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_faults text;
begin
  return query
  select
    'database',
    case when r.rolsuper or r.rolbypassrls or f.missing is not null then 'wrong' else 'ok' end,
    case
      when r.rolsuper or r.rolbypassrls
        then format('DATABASE_URL: role %s may do everything; use darkroom_worker', r.rolname)
      when f.missing is not null
        then format('role %s may not call %s: apply supabase/migrations', r.rolname, f.missing)
      else format(
        'PostgreSQL %s; role %s may call all it needs',
        split_part(current_setting('server_version'), ' ', 1), r.rolname
      )
    end
  from pg_roles as r
  cross join (
    select string_agg('private.' || name, ', ' order by name) as missing
    from unnest(p_functions) as name
    where not exists (
      select from pg_proc as p
      where p.proname = name and p.pronamespace = to_regnamespace('private')
        and has_function_privilege(session_user, p.oid, 'execute')
    ) and (
      to_regclass('private.deliveries') is not null  -- without webhooks (96) nothing is told
      or name <> all ('{claim_deliveries,finish_delivery,finish_receipts}')
    )
  ) as f
  where r.rolname = session_user;

  -- What keeps each routine that pg_cron is to run from running.
  if not exists (select from private.routines as r where r.every is not null) then
    return query select
      'cron', 'note', 'no pg_cron for this database: workers do its work on their own';
  else
    if to_regclass('cron.job') is null then
      v_faults := 'pg_cron is not installed any more';
    else
      select string_agg(format('job darkroom_%s is %s', r.name, case
        when j.jobid is null then 'missing'
        when not j.active then 'switched off'
        else format('silent: it last ran at %s', r.last_run_at)
      end), '; ' order by r.name) into v_faults
      from private.routines as r
      left join cron.job as j on j.jobname = 'darkroom_' || r.name
      where r.every is not null
        and (j.active is not true or now() - r.last_run_at > r.every * (1 + (
          select coalesce(rule.threshold, 3) from private.alert_rules as rule
          where rule.alert = 'cron_silent'
        )::double precision));
    end if;
    return query
    select
      'cron', case when v_faults is null then 'ok' else 'wrong' end,
      coalesce(v_faults || '; see cron.job_run_details', format(
        '%s jobs, the last ran at %s', count(*), date_trunc('second', max(r.last_run_at))
      ))
    from private.routines as r where r.every is not null;
  end if;

  -- What differs in Storage from what the installation made.
  if to_regclass('storage.objects') is null then
    return query select
      'policies', 'note', 'no schema storage here: PostgreSQL does not know who may read files';
  else
    select string_agg(f.fault, '; ') into v_faults
    from (
      select
        format('bucket %s is %s', b.id, case when s.id is null then 'missing' else 'public' end)
      from unnest(array['generations', 'inputs']) as b (id)
      left join storage.buckets as s on s.id = b.id
      where s.id is null or s.public
      union all
      select 'row level security is off on storage.objects'
      from pg_class as c
      where c.oid = to_regclass('storage.objects') and not c.relrowsecurity
      union all
      select format('policy "%s" is missing on storage.objects, or another release''s', wanted.name)
      from (values
        ('Users read their own generated images', 'own_folders'),
        ('Everybody reads shared images', 'shared_paths'),
        ('Users read their own input images', 'own_folders'),
        ('Users add their own input images', 'may_store_input'),
        ('Users replace their own input images', 'may_store_input'),
        ('Users delete their own input images', 'own_folders')
      ) as wanted (name, asks)
      where (wanted.asks <> 'shared_paths' or to_regclass('private.shared_paths') is not null)
        and not exists (
          select from pg_policies as p
          where p.schemaname = 'storage' and p.tablename = 'objects'
            and p.policyname = wanted.name
            and position(wanted.asks in concat(p.qual, p.with_check)) > 0
        )
    ) as f (fault);
    return query select
      'policies', case when v_faults is null then 'ok' else 'wrong' end,
      coalesce(
        v_faults || ': see sql/20_access.sql, sql/90_schedule.sql and sql/95_gallery.sql',
        'both buckets are private, and users reach their own folders'
      );
  end if;

  -- A role of PostgREST's whose requests nothing ends: no setting of its own, of the login, or of
  -- the database. No row where all have one.
  return query
  select 'timeouts', 'wrong', format(
    'one request may hold a connection for ever: alter role %s set statement_timeout = ''8s''',
    r.rolname
  )
  from pg_roles as r
  where r.rolname in ('anon', 'authenticated') and not exists (
    select from pg_db_role_setting as s cross join unnest(s.setconfig) as c (setting)
    where c.setting ~ '^statement_timeout=[^0]' and (
      s.setdatabase = 0 and s.setrole in (r.oid, coalesce(to_regrole('authenticator'), 0))
      or s.setrole = 0 and s.setdatabase = (
        select d.oid from pg_database as d where d.datname = current_database()
      )
    )
  )
  order by r.rolname limit 1;
end;
$$;

do $$
begin
  execute (
    select string_agg(format('alter table private.%I enable row level security', c.relname), ';')
    from pg_class as c where c.relnamespace = 'private'::regnamespace and c.relkind in ('r', 'p')
  );
end;
$$;

-- Data, by hand.

update private.error_codes set blames_user = true where code in ('moderated', 'invalid_input');

-- What holds from now on.

insert into private.error_codes (
  code, message, is_retryable, blames_user
) values
('moderated', 'The safety filter refused this picture. Try another prompt.', false, true),
('invalid_input', 'The model did not accept this request.', false, true)
on conflict do nothing;

insert into private.error_codes (
  code, message, is_retryable, uses_attempt, resumes, trips_breaker
) values
('provider_busy', 'The image service is busy. Try again later.', true, false, false, false),
('provider_timeout', 'The image service did not answer in time.', true, true, true, true),
('provider_error', 'The image service failed to make this picture.', true, true, false, true),
('result_lost', 'The finished picture could not be fetched in time.', true, true, false, true),
('timeout', 'The picture took too long.', false, true, false, true),
('provider_refused', 'The image service refused to make this picture.',
  true, true, true, true),
('outcome_unknown', 'The image service did not say whether it made this picture.',
  false, true, false, true),
('output_refused', 'The model made something that is no picture we can show.',
  false, true, false, false),
('worker_full', 'We have no room for your picture. Try again later.', true, false, true, false),
('storage_unavailable', 'Your picture could not be kept. Try again later.',
  true, false, true, false),
('internal', 'Something went wrong on our side.', true, true, true, false)
on conflict do nothing;

insert into private.alert_rules (alert, threshold, unit, min_cases, severity, hint) values
('depth', 10000, 'ready jobs', 0, 'warning',
  'Start more workers, or give them more slots. Which model: private.queue_by_model.'),
('oldest_age', 300, 'seconds', 0, 'warning',
  'Start more workers, or give them more slots. Which model: private.queue_by_model.'),
('error_rate', 0.25, 'share of attempts', 20, 'critical',
  'private.attempts says of which model and in which words; is_active = false takes one off.'),
('recent_failures', 0.25, 'share of the last jobs', 4, 'warning',
  'private.attempts says of which model and in which words. It ends as later jobs succeed.'),
('burned', 20, 'purchases', 0, 'warning',
  'Users cancel what the provider bills: lower plans.max_burned_per_day.'),
('stuck', 120, 'seconds', 0, 'critical',
  'Nobody recovers them, see private.running_now: start a worker or pg_cron.'),
('no_worker', 0, 'ready jobs', 0, 'critical',
  'Start a worker, or look into the log of the one that stopped.'),
('unserved', 0, 'ready jobs', 0, 'critical',
  'Give a worker the key that private.providers names, and restart it; or pause the model.'),
('not_listening', 0, 'workers', 0, 'warning',
  'They only poll: LISTEN does not work through a transaction pooler. Connect them directly.'),
('cron_silent', 3, 'runs missed', 0, 'warning',
  'See cron.job_run_details. Where a routine is no longer to run, set routines.every to null.'),
('paused', 0, 'pauses', 0, 'warning',
  'Jobs of private.paused_now wait. If the provider refused, see its billing and key.'),
('budget', 0.8, 'share of a limit', 0, 'warning',
  'See private.budget_states: raise limit_usd in private.budgets, or look who asks for so much.'),
('vacuum_held_back', 1000000, 'transactions', 0, 'warning',
  'Dead rows pile up in the queue. End what private.vacuum_holders names.'),
('skipped_rows', 0, 'rows', 0, 'warning',
  'Mend what private.skipped_rows names: it is tried again. storage: see the worker''s log.'),
('books', 0, 'problems', 0, 'critical',
  'See private.broken_books. Once it is mended, select private.check_books() to check anew.')
on conflict do nothing;

notify pgrst, 'reload schema';

notify pgrst, 'reload config';

revoke all on function private.is_operator() from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

-- The optional parts, where they are.

if v_has_97 then
create or replace function public.queue_report() returns json
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

create or replace function public.queue_job(job_id uuid) returns json
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

revoke all on function public.queue_job(uuid) from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

grant execute on function public.queue_job(uuid) to darkroom_monitor, service_role;
end if;
end;
$upgrade$;
