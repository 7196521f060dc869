-- Darkroom: the backend of an app whose users generate images, living in PostgreSQL.
--
-- Read these files in order. A user asks for a picture with enqueue_generation (50), which gates
-- (30, 32), charges (40) and queues (45) in one transaction. A worker claims the job (72), makes
-- the picture and completes or fails it (75). What a dead worker left is picked up by
-- recover_stale_jobs (80). The user reads the state with get_job_status (60).
--
-- Schema `public` is what PostgREST exposes: tables with row level security and thin security
-- invoker wrappers. Schema `private` holds the queue and the security definer bodies. NEVER add
-- `private` to the exposed schemas.
--
-- Every function has `search_path = pg_catalog, pg_temp`. With an empty path types are looked for
-- among the caller's temporary objects first, and a `uuid` of theirs would run in a definer.
--
-- Errors for clients. The stable token is the `message`; `detail` is for people, `hint` says what
-- to do. Those marked * carry a Retry-After header through PostgREST's PGRST form.
--   PT400 invalid_input           an argument is missing, too long, of the wrong type or not
--                                 allowed
--   PT401 not_authenticated       no user in the token, or the user is gone
--   PT402 insufficient_credits    the price is more than the balance
--   PT403 requires_paid_plan      the model is for paid users
--   PT404 not_found               no such job or model, or not yours
--   PT409 idempotency_conflict    the key was used before with another payload
--   PT409 not_finished            the job is queued or running: wait for it or cancel it
--   PT409 already_finished        the job has ended: there is nothing to cancel or to retry
--   PT429 too_many_active *       as many jobs are queued or running as the plan allows
--   PT429 rate_limited *          as many requests in this minute as the plan allows
--   PT503 busy *                  jobs wait longer than the plan's busy_after
--   PT503 model_paused *          the model or its provider is paused
-- Errors for the worker.
--   DR001 lease_lost              the token no longer holds the job: drop everything
--   DR002 canceled                the user canceled: stop and clean up
-- SQLSTATE 40001 is never raised: PostgREST before 16 retries it for ever.

do $$
begin
  if to_regclass('auth.users') is null or to_regprocedure('auth.uid()') is null then
    raise exception 'Darkroom needs Supabase Auth: auth.users and auth.uid() are missing'
      using errcode = 'undefined_object',
        hint = 'Install on a Supabase database, or start Supabase Lite on this one first.';
  end if;
  if to_regclass('private.ready_jobs') is not null then
    raise exception 'Darkroom is installed here already'
      using errcode = 'duplicate_schema', hint = 'Nothing was changed.';
  end if;
  if to_regnamespace('private') is not null then
    raise exception 'Darkroom needs the schema private for itself, and there is one'
      using errcode = 'duplicate_schema', hint = 'Rename yours. Nothing was changed.';
  end if;
  if to_regclass('storage.objects') is not null then
    -- What it does not know there, it takes for left over and deletes after a day.
    if exists (select from storage.objects where bucket_id in ('generations', 'inputs')) then
      raise exception 'Darkroom needs the buckets generations and inputs for itself'
        using errcode = 'object_not_in_prerequisite_state',
          hint = 'Move what is in them to another bucket. Nothing was changed.';
    end if;
  end if;
  if to_regrole('anon') is null then
    create role anon nologin noinherit;
  end if;
  if to_regrole('authenticated') is null then
    create role authenticated nologin noinherit;
  end if;
  if to_regrole('service_role') is null then
    create role service_role nologin noinherit bypassrls;
  end if;
  if to_regrole('darkroom_worker') is null then
    -- No password: it cannot log in until the DBA gives it one.
    create role darkroom_worker login noinherit;
  end if;
end;
$$;

-- A worker's call takes milliseconds; one that hangs must not hold locks for ever.
alter role darkroom_worker set statement_timeout = '30s';
alter role darkroom_worker set idle_in_transaction_session_timeout = '15s';

create schema private;

comment on schema private is
  'Darkroom''s queue and function bodies. Never expose it through PostgREST.';

revoke all on schema private from public;
grant usage on schema private to anon, authenticated, service_role, darkroom_worker;

-- Supabase projects from before 2026-10-30 grant every new object in public to the API roles.
alter default privileges in schema public revoke all on tables
from anon, authenticated, service_role;
alter default privileges in schema public revoke all on sequences
from anon, authenticated, service_role;
alter default privileges in schema public revoke all on functions
from anon, authenticated, service_role;
