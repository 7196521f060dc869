-- How an attempt ends: complete_job, fail_job, release_job, cancel_job, and the pieces that
-- recovery (80) and cancel (77) share.
--
-- end_lease takes the running row, and with it the right to settle. What follows is one of four:
-- the generation is completed (and settled on the images stored), finally failed (and refunded),
-- canceled (and refunded by the rule of finish_canceled), or its job goes back to ready_jobs. Each
-- ended claim leaves one row in attempts.

-- Deletes the running row if the token holds it and answers it. All null if this token already
-- ended the attempt in one of these ways: the call is a repeat whose first answer was lost.
--
-- Raises: DR001 lease_lost.
create or replace function private.end_lease(p_job_id uuid, p_token bigint, p_outcomes text[])
returns private.running_jobs
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_job private.running_jobs;
begin
  delete from private.running_jobs
  where job_id = p_job_id and token = p_token
  returning * into v_job;
  if not found and not exists (
    select from private.attempts
    where generation_id = p_job_id and token = p_token and outcome = any (p_outcomes)
  ) then
    perform private.refuse_lost_lease(p_job_id);
  end if;
  return v_job;
end;
$$;

revoke all on function private.end_lease(uuid, bigint, text[])
from public, anon, authenticated, service_role;

-- What an attempt cost at the provider, in US dollars; null where it is not known. Whether it bills
-- what failed or was stopped is said by is_billed.
create or replace function private.provider_cost(p_model_id text, p_metrics jsonb)
returns numeric
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
  select case
    when p_metrics @> '{"is_billed": false}' then 0
    when m.cost_unit = 'image' then m.cost_usd * (p_metrics ->> 'images')::numeric
    when m.cost_unit = 'second' then m.cost_usd * (p_metrics ->> 'provider_seconds')::numeric
  end
  from public.models as m
  where m.id = p_model_id
$$;

revoke all on function private.provider_cost(text, jsonb)
from public, anon, authenticated, service_role;

-- Writes the ended claim into the operators' history.
create or replace function private.record_attempt(
  p_job private.running_jobs,
  p_outcome text,
  p_error_code text default null,
  p_error_detail text default null,
  p_metrics jsonb default '{}'
)
returns void
language sql
set search_path = pg_catalog, pg_temp
as $$
  insert into private.attempts (
    generation_id, token, model_id, attempt, worker_id, started_at, outcome,
    error_code, error_detail, provider_job_id, provider_seconds, provider_images, cost_usd
  )
  values (
    p_job.job_id, p_job.token, p_job.model_id, p_job.attempt, p_job.worker_id, p_job.claimed_at,
    p_outcome, p_error_code, left(p_error_detail, 2000), p_job.provider_job_id,
    (p_metrics ->> 'provider_seconds')::real, (p_metrics ->> 'images')::numeric::smallint,
    private.provider_cost(p_job.model_id, p_metrics)
  )
$$;

revoke all on function private.record_attempt(private.running_jobs, text, text, text, jsonb)
from public, anon, authenticated, service_role;

-- Puts a job whose lease has ended back into the queue, next in line, at once or after a delay.
create or replace function private.requeue_job(
  p_job private.running_jobs,
  p_attempts_used integer,
  p_delay interval,
  p_resumes boolean
)
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  insert into private.ready_jobs (
    job_id, user_id, model_id, fair_key, attempt, run_at, provider_job_id, create_started_at
  )
  select
    p_job.job_id, p_job.user_id, p_job.model_id, c.last_value, p_attempts_used,
    case when p_delay > interval '0' then now() + p_delay end,
    case when p_resumes then p_job.provider_job_id end,
    case when p_resumes then p_job.create_started_at end
  from private.virtual_clock as c;
  update public.generations set status = 'queued', updated_at = now() where id = p_job.job_id;
  if p_delay <= interval '0' then
    perform private.wake_workers();
  end if;
end;
$$;

revoke all on function private.requeue_job(private.running_jobs, integer, interval, boolean)
from public, anon, authenticated, service_role;

-- Ends a generation: the one place where a job becomes completed, failed or canceled, and where it
-- is written down who will be told.
create or replace function private.finish_generation(
  p_job_id uuid,
  p_status text,
  p_error private.error_codes default null
)
returns public.generations
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_generation public.generations;
begin
  update public.generations set
    status = p_status, error_code = p_error.code, error_message = p_error.message,
    finished_at = now(), updated_at = now()
  where id = p_job_id
  returning * into strict v_generation;
  perform private.record_event(v_generation);
  return v_generation;
end;
$$;

revoke all on function private.finish_generation(uuid, text, private.error_codes)
from public, anon, authenticated, service_role;

-- Fails a job for good: the generation keeps its input and tells why, the whole price goes back.
--
-- Locks: the entitlement row.
create or replace function private.finish_failed(
  p_job private.running_jobs,
  p_error private.error_codes
)
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_generation public.generations := private.finish_generation(p_job.job_id, 'failed', p_error);
begin
  perform private.refund_generation(p_job.user_id, p_job.job_id, v_generation.price_credits);
  perform private.release_slot(p_job.user_id);
end;
$$;

revoke all on function private.finish_failed(private.running_jobs, private.error_codes)
from public, anon, authenticated, service_role;

-- Cancels a job for good. The refund rule: the whole price, but only the share of
-- settings.running_cancel_refund_percent, rounded up, once the provider was asked and may bill us.
--
-- Locks: the entitlement row.
create or replace function private.finish_canceled(
  p_user_id uuid,
  p_job_id uuid,
  p_was_begun boolean
)
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_percent integer := case
    when p_was_begun then (select s.running_cancel_refund_percent from private.settings as s)
    else 100
  end;
  v_generation public.generations := private.finish_generation(p_job_id, 'canceled');
begin
  perform private.refund_generation(
    p_user_id, p_job_id, ceil(v_generation.price_credits::numeric * v_percent / 100)::integer
  );
  perform private.release_slot(p_user_id);
end;
$$;

revoke all on function private.finish_canceled(uuid, uuid, boolean)
from public, anon, authenticated, service_role;

-- The same for a job whose lease has just ended.
create or replace function private.finish_canceled_job(
  p_job private.running_jobs,
  p_code text default null,
  p_detail text default null,
  p_metrics jsonb default '{}'
)
returns void
language sql
set search_path = pg_catalog, pg_temp
as $$
  select private.finish_canceled(
    p_job.user_id, p_job.job_id, p_job.create_started_at is not null
  );
  select private.record_attempt(p_job, 'canceled', p_code, p_detail, p_metrics);
$$;

revoke all on function private.finish_canceled_job(private.running_jobs, text, text, jsonb)
from public, anon, authenticated, service_role;

-- Claims of a job that have ended so far.
create or replace function private.count_claims(p_job_id uuid)
returns integer
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
  select count(*)::integer from private.attempts where generation_id = p_job_id
$$;

revoke all on function private.count_claims(uuid)
from public, anon, authenticated, service_role;

-- How long to wait before the next attempt: what the provider asked for, else exponential backoff
-- with full jitter, so that jobs that failed together do not come back together.
create or replace function private.retry_delay(
  p_failures_before integer,
  p_retry_after_seconds double precision
)
returns interval
language sql
volatile
set search_path = pg_catalog, pg_temp
as $$
  select case
    when p_retry_after_seconds is not null
      then greatest(0, least(p_retry_after_seconds, 3600)) * interval '1 second'
    else random() * least(s.retry_cap, s.retry_base * power(2, least(p_failures_before, 20)))
  end
  from private.settings as s
$$;

revoke all on function private.retry_delay(integer, double precision)
from public, anon, authenticated, service_role;

-- Retries a failed attempt while it may, or fails the job for good, or cancels it if the user wants
-- that. Answers 'retried', 'failed' or 'canceled'.
create or replace function private.end_failed_attempt(
  p_job private.running_jobs,
  p_code text,
  p_detail text,
  p_retry_after_seconds double precision default null,
  p_metrics jsonb default '{}'
)
returns text
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_error private.error_codes;
  v_settings private.settings;
  v_attempts_used integer;
  v_outcome text := 'failed';
begin
  if p_job.cancel_requested then
    perform private.finish_canceled_job(p_job, p_code, p_detail, p_metrics);
    return 'canceled';
  end if;
  select * into strict v_settings from private.settings;
  -- A code that is not ours becomes internal; what came is kept in the detail.
  select * into strict v_error from private.error_codes
  where code in (p_code, 'internal') order by code = p_code desc limit 1;
  v_attempts_used := p_job.attempt - case when v_error.uses_attempt then 0 else 1 end;
  if v_error.is_retryable and v_attempts_used < v_settings.max_attempts and exists (
    select from public.generations
    where id = p_job.job_id and created_at > now() - v_settings.give_up_after
  ) then
    v_outcome := 'retried';
    perform private.requeue_job(
      p_job, v_attempts_used,
      private.retry_delay(private.count_claims(p_job.job_id), p_retry_after_seconds),
      v_error.resumes
    );
  else
    perform private.finish_failed(p_job, v_error);
  end if;
  perform private.record_attempt(
    p_job, v_outcome, v_error.code, concat_ws(': ', nullif(p_code, v_error.code), p_detail),
    -- What the next attempt resumes is paid once: it will be booked there.
    case when v_outcome = 'retried' and v_error.resumes then '{}' else p_metrics end
  );
  return v_outcome;
end;
$$;

revoke all on function private.end_failed_attempt(
  private.running_jobs, text, text, double precision, jsonb
)
from public, anon, authenticated, service_role;

-- Counts a failure against the model and its provider, if its code is their fault. Comes after all
-- other locks are taken.
create or replace function private.blame_provider(p_job private.running_jobs, p_code text)
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  if exists (select from private.error_codes where code = p_code and trips_breaker) then
    perform private.note_failure(p_job, p_code);
  end if;
end;
$$;

revoke all on function private.blame_provider(private.running_jobs, text)
from public, anon, authenticated, service_role;

create or replace function private.fail_job(
  p_job_id uuid,
  p_token bigint,
  p_code text,
  p_detail text,
  p_retry_after_seconds double precision default null,
  p_metrics jsonb default null
)
returns text
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_job private.running_jobs := private.end_lease(p_job_id, p_token, '{retried,failed,canceled}');
  v_outcome text;
begin
  if v_job.job_id is null then
    return 'repeated';
  end if;
  v_outcome := private.end_failed_attempt(
    v_job, p_code, p_detail, p_retry_after_seconds, coalesce(p_metrics, '{}')
  );
  perform private.blame_provider(v_job, p_code);
  return v_outcome;
end;
$$;

comment on function private.fail_job is
  'Ends an attempt with a code of error_codes: retried while attempts remain, else failed and '
  'refunded. p_detail is for operators only; p_retry_after_seconds is the provider''s own wish; '
  'p_metrics as complete_job takes them. '
  'Answers retried, failed, canceled (the user had asked for it), or repeated (the call was made '
  'before). Errors: DR001 lease_lost.';

revoke all on function private.fail_job(uuid, bigint, text, text, double precision, jsonb)
from public, anon, authenticated, service_role;
grant execute on function private.fail_job(uuid, bigint, text, text, double precision, jsonb)
to darkroom_worker;

create or replace function private.release_job(
  p_job_id uuid,
  p_token bigint,
  p_resumes boolean default true
)
returns void
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_job private.running_jobs := private.end_lease(
    p_job_id, p_token, '{released,canceled}'
  );
begin
  if v_job.job_id is null then
    return;
  elsif v_job.cancel_requested then
    perform private.finish_canceled_job(v_job);
    return;
  end if;
  perform private.requeue_job(v_job, v_job.attempt - 1, interval '0', p_resumes);
  perform private.record_attempt(v_job, 'released');
end;
$$;

comment on function private.release_job is
  'Gives a job back unfinished (graceful stop): next in line, the attempt does not count, the '
  'checkpoint is kept; or canceled, if the user asked for that. p_resumes false: nothing was begun'
  ' at the provider. Errors: DR001 lease_lost.';

revoke all on function private.release_job(uuid, bigint, boolean)
from public, anon, authenticated, service_role;
grant execute on function private.release_job(uuid, bigint, boolean) to darkroom_worker;

create or replace function private.cancel_job(
  p_job_id uuid,
  p_token bigint,
  p_metrics jsonb default null
)
returns void
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_job private.running_jobs := private.end_lease(p_job_id, p_token, '{canceled}');
begin
  if v_job.cancel_requested then
    perform private.finish_canceled_job(v_job, p_metrics => coalesce(p_metrics, '{}'));
  elsif v_job.job_id is not null then
    raise exception 'nobody asked to cancel job %', p_job_id
      using errcode = 'invalid_parameter_value';
  end if;
end;
$$;

comment on function private.cancel_job is
  'Ends a job whose cancel the heartbeat told of; p_metrics as complete_job takes them. Repeating '
  'it changes nothing. Errors: DR001 lease_lost, 22023 nobody asked for it.';

revoke all on function private.cancel_job(uuid, bigint, jsonb)
from public, anon, authenticated, service_role;
grant execute on function private.cancel_job(uuid, bigint, jsonb) to darkroom_worker;

-- Stores what was made and settles on it: images that were charged but not made are given back.
--
-- Locks: the entitlement row.
-- Raises: DR001 lease_lost, 22023 if there is no image or more than were charged.
create or replace function private.complete_job(
  p_job_id uuid,
  p_token bigint,
  p_images jsonb,
  p_metrics jsonb
)
returns void
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_stored integer := coalesce(jsonb_array_length(p_images), 0);
  v_job private.running_jobs := private.end_lease(p_job_id, p_token, '{completed}');
  v_generation public.generations;
begin
  if v_job.job_id is null then
    return;
  end if;
  v_generation := private.finish_generation(p_job_id, 'completed');
  if v_stored not between 1 and v_generation.image_count then
    raise exception '% images stored, % charged', v_stored, v_generation.image_count
      using errcode = 'invalid_parameter_value';
  end if;
  insert into public.images (
    generation_id, position, user_id, storage_path, preview_path, content_type,
    width, height, bytes, blurhash
  )
  select
    p_job_id, i.position, v_job.user_id, i.storage_path, i.preview_path, i.content_type,
    i.width, i.height, i.bytes, i.blurhash
  from jsonb_populate_recordset(null::public.images, p_images) as i;
  if v_stored < v_generation.image_count then
    perform private.refund_generation(
      v_job.user_id, p_job_id,
      -- Without a rest: the price is a whole number for each image.
      v_generation.price_credits * (v_generation.image_count - v_stored) / v_generation.image_count
    );
  end if;
  perform private.release_slot(v_job.user_id);
  perform private.record_attempt(v_job, 'completed', p_metrics => coalesce(p_metrics, '{}'));
  perform private.note_success(v_job);
end;
$$;

comment on function private.complete_job is
  'Ends a job well. p_images: [{position, storage_path, preview_path, content_type, width, '
  'height, bytes, blurhash}]; p_metrics: {provider_seconds, images (as many as the provider '
  'made), is_billed (false: the provider asks nothing for it)}. Repeating it changes nothing. '
  'Errors: DR001 lease_lost, 22023 bad images.';

revoke all on function private.complete_job(uuid, bigint, jsonb, jsonb)
from public, anon, authenticated, service_role;
grant execute on function private.complete_job(uuid, bigint, jsonb, jsonb) to darkroom_worker;
