-- What `worker.py check` asks: may this role do a worker's work, does pg_cron do its own, is
-- Storage as Darkroom made it, and does every request of a user end? It looks at catalogs and at
-- routines, never at jobs or users.

create function private.check_setup(p_functions text[])
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

comment on function private.check_setup is
  'For `worker.py check`: whether its role may call these functions of schema private, whether '
  'pg_cron runs its jobs, whether buckets and policies of Storage are there, and, where they do '
  'not, whether requests of the API end. Answers part, verdict (ok | note (works, but know it) | '
  'wrong) and detail, in words for people.';
