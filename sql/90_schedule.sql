-- Rows and schedules: the only file that writes any. Running it again changes nothing that an
-- operator has set. What is not installed here is skipped with a notice.

insert into private.settings default values on conflict do nothing;

insert into private.retention_walks (name) values
('generations'), ('attempts'), ('ledger'), ('files')
on conflict do nothing;

insert into private.plans (name, max_active, max_per_minute, max_batch, weight) values
('free', 3, 10, 3, 1),
('paid', 20, 60, 100, 4)
on conflict do nothing;

insert into private.providers (name) values ('preview'), ('replicate') on conflict do nothing;

insert into private.error_codes (code, message, is_retryable, uses_attempt, resumes) values
('moderated', 'The safety filter refused this picture. Try another prompt.', false, true, false),
('invalid_input', 'The model did not accept this request.', false, true, false),
('provider_busy', 'The image service is busy. Try again later.', true, false, false),
('provider_timeout', 'The image service did not answer in time.', true, true, true),
('provider_error', 'The image service failed to make this picture.', true, true, false),
('result_lost', 'The finished picture could not be fetched in time.', true, true, false),
('timeout', 'The picture took too long.', false, true, false),
('internal', 'Something went wrong on our side.', true, true, true)
on conflict do nothing;

insert into private.push_texts (event_type, title, body) values
('generation.completed', 'Your picture is ready', 'Tap to see it.'),
('generation.failed', 'Your picture could not be made', 'Your credits are back.')
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
end;
$$;

do $$
begin
  if current_database() is distinct from current_setting('cron.database_name', true) then
    raise notice 'Darkroom: no pg_cron for this database; workers do its work on their own';
    return;
  end if;
  create extension if not exists pg_cron with schema pg_catalog;
  perform cron.schedule(
    'darkroom_recover_stale_jobs', '* * * * *', 'select private.recover_stale_jobs()'
  );
  perform cron.schedule(
    'darkroom_apply_retention', '* * * * *', 'select private.apply_retention()'
  );
  perform cron.schedule('darkroom_trim_history', '17 3 * * *', 'select private.trim_history()');
end;
$$;

notify pgrst, 'reload schema';
