-- Takes Darkroom out of a database: all of it, and nothing else. The one file here that is no part
-- of the database's definition. What stays on purpose stands in docs/database.md.
--
--   psql "$DATABASE_URL" -X -v ON_ERROR_STOP=1 -f sql/uninstall.sql
--
-- For the role that installed it. It is one statement: it is done whole or not at all. It refuses
-- while workers live or jobs have not ended, while there are files in the buckets, and where
-- something of the app's depends on something of Darkroom's. Before it may be said:
--
--   set darkroom.uninstall_despite = 'jobs, files';  -- jobs are lost; the buckets and files stay

do $uninstall$
declare
  v_despite text := coalesce(current_setting('darkroom.uninstall_despite', true), '');
  v_buckets text[] := '{generations,inputs}';
  v_policy record;
  v_tables oid[];
  v_functions oid[];
  v_domains oid[];
  v_found text;
  v_role text;
begin
  if to_regclass('private.ready_jobs') is null then
    raise notice 'Darkroom: there is nothing of it here';
    return;
  end if;
  perform set_config('lock_timeout', '5s', true);  -- sign-ups would queue behind it
  perform set_config('client_min_messages', 'warning', true);  -- a line for each that is dropped

  lock table private.ready_jobs, private.running_jobs, private.workers in exclusive mode;
  if v_despite !~ 'jobs' and (
    exists (select from private.worker_activity as w where w.is_alive)
    or exists (select from private.ready_jobs) or exists (select from private.running_jobs)
  ) then
    raise exception 'Darkroom: a worker lives, or jobs have not ended' using
      errcode = 'object_in_use', hint = 'Stop the app, let the jobs end, stop the workers. To lose '
        'the jobs: set darkroom.uninstall_despite = ''jobs'';';
  end if;

  -- Schema private is Darkroom's alone. In public it goes by names, and where a part was left out,
  -- by what only Darkroom's own refer to: an app may have a table or function of such a name then.
  select array_agg(c.oid) into v_tables
  from pg_class as c
  where c.relnamespace = 'public'::regnamespace and c.relkind in ('r', 'p') and (
    c.relname in (
      'batches', 'credit_ledger', 'credit_products', 'entitlements', 'generations', 'images',
      'model_aliases', 'models'
    ) or to_regclass('private.shared_paths') is not null
    and c.relname in ('generation_tags', 'image_likes', 'prompt_templates')
  );
  select array_agg(p.oid) into v_functions
  from pg_proc as p
  where p.pronamespace = 'public'::regnamespace and p.proname in (
    'apply_billing_event', 'cancel_batch', 'cancel_generation', 'delete_generation',
    'delete_prompt_template', 'delete_webhook', 'enable_webhook', 'enqueue_batch',
    'enqueue_generation', 'export_user', 'get_batch_status', 'get_entitlement', 'get_job_status',
    'grant_credits', 'like_image', 'list_active_jobs', 'list_deliveries', 'list_generations',
    'list_models', 'list_prompt_templates', 'list_public_images', 'list_webhooks', 'merge_user',
    'pause_model', 'ping', 'queue_health', 'queue_history', 'queue_job', 'queue_report',
    'redeliver', 'redeliver_dead', 'redrive_failed', 'register_push_token', 'register_webhook',
    'restore_generation', 'resume_model', 'retry_generation', 'rotate_webhook_secret',
    'save_prompt_template', 'set_favorite', 'set_paid', 'set_tags', 'share_image',
    'unregister_push_token'
  ) and (
    p.oid = to_regprocedure('public.ping()')
    or p.prokind = 'f' and pg_get_functiondef(p.oid) ~ 'private\.'
  );
  select array_agg(t.oid) into v_domains
  from pg_type as t
  where t.typnamespace = 'public'::regnamespace and t.typtype = 'd'
    and t.typname in ('credits', 'image_count', 'job_status', 'ledger_kind', 'params');

  for v_policy in
    select p.policyname, p.schemaname, p.tablename from pg_policies as p
    where concat(p.qual, p.with_check) ~ '''(generations|inputs|user:)'''
      and ((p.schemaname, p.tablename) = ('storage', 'objects') and p.policyname in (
        'Users read their own generated images', 'Everybody reads shared images',
        'Users read their own input images', 'Users add their own input images',
        'Users replace their own input images', 'Users delete their own input images'
      ) or (p.schemaname, p.tablename, p.policyname)
        = ('realtime', 'messages', 'Users receive hints about their own jobs'))
  loop
    execute format(
      'drop policy %I on %I.%I', v_policy.policyname, v_policy.schemaname, v_policy.tablename
    );
  end loop;

  -- What `drop … restrict` would say of all of it together: an app's view, foreign key, default.
  with recursive ours (class, id) as (
    select 'pg_class'::regclass, c.oid from pg_class as c
    where c.relnamespace = 'private'::regnamespace or c.oid = any (v_tables)
    union
    select 'pg_proc'::regclass, p.oid from pg_proc as p
    where p.pronamespace = 'private'::regnamespace or p.oid = any (v_functions)
    union
    select 'pg_type'::regclass, t.oid from pg_type as t
    where t.typnamespace = 'private'::regnamespace or t.oid = any (v_domains)
    union
    select 'pg_trigger'::regclass, t.oid from pg_trigger as t
    where t.tgrelid = to_regclass('auth.users') and t.tgname like 'darkroom\_%'
    union
    select d.classid, d.objid from ours as o
    inner join pg_depend as d on (d.refclassid, d.refobjid) = (o.class, o.id) and d.deptype <> 'n'
  )
  select string_agg(distinct pg_describe_object(d.classid, d.objid, d.objsubid), ', ') into v_found
  from ours as o
  inner join pg_depend as d on (d.refclassid, d.refobjid) = (o.class, o.id) and d.deptype = 'n'
  where (d.classid, d.objid) not in (select ours.class, ours.id from ours);
  if v_found is not null then
    raise exception 'Darkroom: what is not Darkroom''s depends on it: %', v_found using
      errcode = 'dependent_objects_still_exist', hint = 'Drop or change that first.';
  end if;

  if to_regclass('storage.objects') is not null and v_despite !~ 'files' then
    if exists (select from storage.objects as o where o.bucket_id = any (v_buckets)) then
      raise exception 'Darkroom: there are files in the buckets generations or inputs' using
        errcode = 'object_in_use', hint = 'Empty both by the Storage API or the dashboard: a row '
          'that is deleted here leaves its file. To keep buckets and files: '
          'set darkroom.uninstall_despite = ''files'';';
    end if;
    perform set_config('storage.allow_delete_query', 'true', true);  -- Storage asks for that
    delete from storage.buckets where id = any (v_buckets);
  end if;

  execute format('drop function %s', array_to_string(v_functions::regprocedure[], ', '));
  -- It takes the triggers on auth.users, too, which is not ours to drop something from.
  execute 'drop schema private cascade';
  execute format('drop table %s', array_to_string(v_tables::regclass[], ', '));
  execute format('drop domain %s', array_to_string(v_domains::regtype[], ', '));

  if to_regclass('cron.job') is not null then
    perform cron.unschedule(j.jobid) from cron.job as j
    where j.jobname like 'darkroom\_%' and j.database = current_database();
  end if;

  if to_regclass('supabase_migrations.schema_migrations') is not null then
    delete from supabase_migrations.schema_migrations where name in (
      'create_darkroom', 'darkroom_gallery', 'darkroom_webhooks', 'darkroom_reports',
      'upgrade_first_edition', 'providers_are_rows', 'what_apps_sell', 'what_operators_see', 'cells'
    );
  end if;
  if to_regclass('supabase_migrations.seed_files') is not null then
    -- An app with migrations of its own may have its own seed of this name: that one stays.
    delete from supabase_migrations.seed_files where path = 'supabase/seed.sql'
      and not exists (select from supabase_migrations.schema_migrations);
  end if;

  perform set_config('client_min_messages', 'notice', true);
  foreach v_role in array array['darkroom_worker', 'darkroom_monitor'] loop
    begin
      if to_regrole(v_role) is not null then
        execute format('drop role %I', v_role);
      end if;
    exception when dependent_objects_still_exist or insufficient_privilege then
      get stacked diagnostics v_found = pg_exception_detail;
      raise notice 'Darkroom: %: %', sqlerrm, v_found;
    end;
  end loop;
  raise notice 'Darkroom: it is uninstalled';
  notify pgrst, 'reload schema';
end;
$uninstall$;
