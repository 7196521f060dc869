-- Rows and schedules: the only file that writes any. Running it again changes nothing that an
-- operator has set. What is not installed here is skipped with a notice.

insert into private.settings default values on conflict do nothing;
insert into private.queue_state default values on conflict do nothing;

insert into private.retention_walks (name) values
('generations'), ('attempts'), ('ledger'), ('files')
on conflict do nothing;

insert into private.plans (
  name, max_active, max_per_minute, max_batch, weight, busy_after
) values
('free', 3, 10, 3, 1, '10 minutes'),
('paid', 20, 60, 100, 4, '30 minutes')
on conflict do nothing;

insert into private.error_codes (
  code, message, is_retryable, uses_attempt, resumes, trips_breaker
) values
(
  'moderated', 'The safety filter refused this picture. Try another prompt.', false, true, false,
  false
),
('invalid_input', 'The model did not accept this request.', false, true, false, false),
('provider_busy', 'The image service is busy. Try again later.', true, false, false, false),
('provider_timeout', 'The image service did not answer in time.', true, true, true, true),
('provider_error', 'The image service failed to make this picture.', true, true, false, true),
('result_lost', 'The finished picture could not be fetched in time.', true, true, false, true),
('timeout', 'The picture took too long.', false, true, false, true),
('worker_full', 'We have no room for your picture. Try again later.', true, false, true, false),
('internal', 'Something went wrong on our side.', true, true, true, false)
on conflict do nothing;

insert into private.push_texts (event_type, title, body) values
('generation.completed', 'Your picture is ready', 'Tap to see it.'),
('generation.failed', 'Your picture could not be made', 'Your credits are back.')
on conflict do nothing;

insert into private.alert_rules (alert, threshold, unit, min_cases, severity, hint) values
(
  'depth', 10000, 'ready jobs', 0, 'warning',
  'Start more workers, or give them more slots. Which model: private.queue_by_model.'
),
(
  'oldest_age', 300, 'seconds', 0, 'warning',
  'Start more workers, or give them more slots. Whose: private.waiting_now.'
),
(
  'error_rate', 0.25, 'share of attempts', 20, 'critical',
  'private.errors_by_model says which model and in which words. A model that only fails is taken '
  'off the list with is_active = false.'
),
(
  'stuck', 120, 'seconds', 0, 'critical',
  'Nobody recovers them: start a worker or pg_cron, or select private.recover_stale_jobs(). '
  'Which: private.stuck_jobs.'
),
(
  'no_worker', 0, 'ready jobs', 0, 'critical',
  'Start a worker, or look into the log of the one that stopped.'
),
(
  'not_listening', 0, 'workers', 0, 'warning',
  'They find jobs by polling only. Give them a direct or session-mode connection: LISTEN does not '
  'work through a transaction pooler. Which: private.worker_activity.'
),
(
  'cron_silent', 3, 'runs missed', 0, 'warning',
  'See cron.job_run_details and that pg_cron runs. Set routines.every to null if a routine is no '
  'longer to run.'
),
(
  'paused', 0, 'pauses', 0, 'warning',
  'Jobs of what is paused wait. If the provider refused the account, see its billing and key.'
),
(
  'vacuum_held_back', 1000000, 'transactions', 0, 'warning',
  'Dead rows pile up in the queue. End the transaction (pg_terminate_backend(pid)), the prepared '
  'transaction or the replication slot. All of them: private.vacuum_holders.'
),
(
  'dead_deliveries', 0, 'deliveries', 0, 'warning',
  'private.undelivered says why. Once the receiver works: enable_webhook, redeliver_dead; or '
  'delete_webhook.'
),
(
  'books', 0, 'problems', 0, 'critical',
  'See private.broken_books: the ledger is right, and entitlements have to follow it. Once mended, '
  'select private.check_books() to check anew.'
)
on conflict do nothing;

-- Users from before the installation.
do $$
begin
  perform private.create_entitlement(u.id) from auth.users as u
  where not exists (select from public.entitlements as e where e.user_id = u.id);
end;
$$;

do $$
begin
  if to_regclass('storage.buckets') is null then
    raise notice 'Darkroom: no storage.buckets here; create the private buckets yourself';
    return;
  end if;
  insert into storage.buckets (id, name, public, file_size_limit, allowed_mime_types) values
  -- octet-stream: what SVGs are stored as, so that no browser runs one.
  (
    'generations', 'generations', false, 33554432,
    '{image/png,image/jpeg,image/webp,image/avif,image/gif,application/octet-stream}'
  ),
  ('inputs', 'inputs', false, 10485760, '{image/png,image/jpeg,image/webp}')
  on conflict do nothing;
  if exists (select from storage.buckets where id in ('generations', 'inputs') and public) then
    raise warning 'Darkroom: a bucket of its own is public: everybody who knows a path reads it'
      using errcode = '01000';
  end if;
end;
$$;

-- Each leaves its time in routines when it has run to its end.
do $$
declare
  v_job record;
begin
  if current_database() is distinct from current_setting('cron.database_name', true) then
    raise notice 'Darkroom: no pg_cron for this database; workers do its work on their own';
    return;
  end if;
  create extension if not exists pg_cron with schema pg_catalog;
  for v_job in
    select * from (values
      ('recover_stale_jobs', '* * * * *', interval '1 minute'),
      ('apply_retention', '* * * * *', interval '1 minute'),
      ('trim_history', '17 3 * * *', interval '1 day'),
      ('check_books', '47 3 * * *', interval '1 day')
    ) as job (name, schedule, every)
  loop
    perform cron.schedule(
      'darkroom_' || v_job.name, v_job.schedule,
      format('select private.%1$s(), private.note_run(%1$L)', v_job.name)
    );
    insert into private.routines (name, every) values (v_job.name, v_job.every)
    on conflict (name) do update set every = coalesce(routines.every, excluded.every);
  end loop;
end;
$$;

notify pgrst, 'reload schema';
