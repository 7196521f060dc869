-- How an attempt ends that made nothing: fail_jobs, release_job, cancel_job, and the pieces that
-- completion (76), recovery (80) and cancel (77) share.
--
-- Whoever deletes the running row has the right to settle. What follows is one of four: the
-- generation is completed (76), finally failed (and refunded), canceled (and refunded by the rule
-- of finish_canceled), or its job goes back to ready_jobs. Each ended claim leaves one row in
-- attempts.

-- Deletes the running rows that these tokens hold and answers them in order of id.
create function private.end_leases(
  p_job_ids uuid[], p_tokens bigint[]
) returns private.running_jobs[]
language plpgsql set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan set enable_seqscan = off set enable_bitmapscan = off
set jit = off as $$
declare
  v_jobs private.running_jobs[];
begin
  with ended as (
    delete from private.running_jobs as r
    where r.job_id = any (p_job_ids) and r.token = any (p_tokens)
    returning r as job
  )
  select array_agg(e.job order by (e.job).job_id) into v_jobs from ended as e;
  return coalesce(v_jobs, '{}'::private.running_jobs[]);
end;
$$;

-- Of these tokens, those that already ended an attempt in one of these ways: the call is a repeat
-- whose first answer was lost.
create function private.ended_before(
  p_job_ids uuid[], p_tokens bigint[], p_outcomes text[]
) returns setof bigint
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  return query
  select a.token from private.attempts as a
  where a.generation_id = any (p_job_ids) and a.token = any (p_tokens)
    and a.outcome = any (p_outcomes);
end;
$$;

-- Ends the lease of one job and answers its running row. All null if that is a repeat.
--
-- Raises: DR001 lease_lost.
create function private.end_lease(
  p_job_id uuid, p_token bigint, p_outcomes text[]
) returns private.running_jobs
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_job private.running_jobs := (private.end_leases(array[p_job_id], array[p_token]))[1];
begin
  if v_job.job_id is null and not exists (
    select from private.ended_before(array[p_job_id], array[p_token], p_outcomes)
  ) then
    perform private.refuse_lost_lease(p_job_id);
  end if;
  return v_job;
end;
$$;

-- Writes ended claims into the operators' history, with what each cost at the provider where that
-- is known. Whether it bills what failed or was stopped is said by is_billed.
create function private.record_attempts(
  p_jobs private.running_jobs[], p_outcome text, p_metrics jsonb[], p_error_code text default null,
  p_error_detail text default null
) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  insert into private.attempts (
    generation_id, token, model_id, attempt, worker_id, started_at, outcome,
    error_code, error_detail, provider_job_id, provider_seconds, provider_images, cost_usd
  )
  select
    j.job_id, j.token, j.model_id, j.attempt, j.worker_id, j.claimed_at, p_outcome,
    p_error_code, left(p_error_detail, 2000), j.provider_job_id,
    t.seconds, t.images,
    case
      when p_metrics[j.ordinality] @@ '$.is_asked == false || $.is_billed == false' then 0
      when m.cost_unit = 'image' then m.cost_usd * t.images
      when m.cost_unit = 'second' then m.cost_usd * t.seconds
    end
  from unnest(p_jobs) with ordinality as j
  -- Within bounds: what a provider says of itself keeps no job from ending.
  cross join lateral (select
    case when jsonb_typeof(p_metrics[j.ordinality] -> 'provider_seconds') = 'number' then
      greatest(0, least(1000000, (p_metrics[j.ordinality] ->> 'provider_seconds')::numeric))
    end as seconds,
    case when jsonb_typeof(p_metrics[j.ordinality] -> 'images') = 'number' then
      greatest(0, least(1000000, (p_metrics[j.ordinality] ->> 'images')::numeric))
    end as images
  ) as t
  left join public.models as m on m.id = j.model_id;
end;
$$;

-- Puts a job whose lease has ended back into the queue, next in line, at once or after a delay.
create function private.requeue_job(
  p_job private.running_jobs, p_attempts_used integer, p_delay interval, p_resumes boolean
) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  insert into private.ready_jobs (
    job_id, user_id, model_id, fair_key, attempt, run_at,
    provider_job_id, create_started_at, input_sha256
  )
  select
    p_job.job_id, p_job.user_id, p_job.model_id, c.last_value, p_attempts_used,
    case when p_delay > interval '0' then now() + p_delay end,
    case when p_resumes then p_job.provider_job_id end,
    case when p_resumes then p_job.create_started_at end,
    case when p_resumes then p_job.input_sha256 end
  from private.virtual_clock as c;
  update public.generations set status = 'queued', updated_at = now() where id = p_job.job_id;
  if p_delay <= interval '0' then
    perform private.wake_workers();
  end if;
end;
$$;

-- Ends a generation that is not completed and answers what was charged.
create function private.finish_generation(
  p_job_id uuid, p_status text, p_error private.error_codes default null
) returns integer
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_price integer;
begin
  update public.generations set
    status = p_status, error_code = p_error.code, error_message = p_error.message,
    finished_at = now(), updated_at = now()
  where id = p_job_id
  returning price_credits into strict v_price;
  return v_price;
end;
$$;

-- Fails a job for good: the generation keeps its input and tells why, the whole price goes back.
--
-- Locks: the entitlement row.
create function private.finish_failed(
  p_job private.running_jobs, p_error private.error_codes
) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_price integer := private.finish_generation(p_job.job_id, 'failed', p_error);
begin
  perform private.refund_generation(p_job.user_id, p_job.job_id, v_price);
end;
$$;

-- Cancels a job for good. The refund rule: the whole price, but only the share of
-- settings.running_cancel_refund_percent, rounded up, of what is burned: the provider may bill us,
-- and nobody gets anything, because the user did not want it any more. That counts, for else it
-- could be had without end: see check_limits (30).
--
-- Locks: the entitlement row.
create function private.finish_canceled(
  p_user_id uuid, p_job_id uuid, p_is_burned boolean
) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_percent integer := case
    when p_is_burned then (select s.running_cancel_refund_percent from private.settings as s)
    else 100
  end;
  v_price integer := private.finish_generation(p_job_id, 'canceled');
begin
  if p_is_burned then
    update public.entitlements set day_burned = day_burned + 1 where user_id = p_user_id;
  end if;
  perform private.refund_generation(
    p_user_id, p_job_id, ceil(v_price::numeric * v_percent / 100)::integer
  );
end;
$$;

-- The same for a job whose lease has just ended. What failed by itself was not stopped by its user,
-- and our failures are nobody's to pay.
create function private.finish_canceled_job(
  p_job private.running_jobs, p_code text default null, p_detail text default null,
  p_metrics jsonb default '{}'
) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  perform private.finish_canceled(
    p_job.user_id, p_job.job_id,
    p_code is null and not p_metrics @@ '$.is_asked == false || $.is_billed == false'
  );
  perform private.record_attempts(array[p_job], 'canceled', array[p_metrics], p_code, p_detail);
end;
$$;

-- Claims of a job that have ended so far.
create function private.count_claims(p_job_id uuid) returns integer
language sql stable set search_path = pg_catalog, pg_temp as $$
  select count(*)::integer from private.attempts where generation_id = p_job_id
$$;

-- How long to wait where somebody else asks for it: not less than we would by ourselves, and not
-- more than they may ask for, whatever a number they write (negative, infinite, NaN).
create function private.asked_delay(
  p_own interval, p_asked_seconds double precision, p_most_seconds integer
) returns interval
language sql immutable set search_path = pg_catalog, pg_temp as $$
  select greatest(
    p_own, greatest(0, least(coalesce(p_asked_seconds, 0), p_most_seconds)) * interval '1 second'
  )
$$;

-- How long to wait before the next attempt: exponential backoff with full jitter, so that jobs that
-- failed together do not come back together, or longer if the provider asks for it. One that asks
-- for no pause has its way once.
create function private.retry_delay(
  p_failures_before integer, p_retry_after_seconds double precision
) returns interval
language sql set search_path = pg_catalog, pg_temp as $$
  select private.asked_delay(
    case
      when p_failures_before = 0 and p_retry_after_seconds is not null then interval '0'
      else random() * least(s.retry_cap, s.retry_base * power(2, least(p_failures_before, 20)))
    end,
    p_retry_after_seconds, 3600
  )
  from private.settings as s
$$;

-- Retries a failed attempt while it may, or fails the job for good, or cancels it if the user wants
-- that. Answers 'retried', 'failed' or 'canceled'.
create function private.end_failed_attempt(
  p_job private.running_jobs, p_code text, p_detail text,
  p_retry_after_seconds double precision default null, p_metrics jsonb default '{}'
) returns text
language plpgsql set search_path = pg_catalog, pg_temp as $$
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
      v_error.resumes and not p_metrics @> '{"is_asked": false}'
    );
  else
    perform private.finish_failed(p_job, v_error);
  end if;
  perform private.record_attempts(
    array[p_job], v_outcome,
    -- What the next attempt resumes is paid once: it will be booked there.
    array[case when v_outcome = 'retried' and v_error.resumes then '{}' else p_metrics end],
    v_error.code, concat_ws(': ', nullif(p_code, v_error.code), p_detail)
  );
  return v_outcome;
end;
$$;

-- Counts failures against the models and their providers, where the code is their fault. Comes
-- after all other locks are taken; breakers in order.
create function private.blame_providers(p_jobs private.running_jobs[], p_codes text[]) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_at bigint;
begin
  for v_at in
    select j.ordinality
    from unnest(p_jobs) with ordinality as j
    inner join private.error_codes as e on e.code = p_codes[j.ordinality] and e.trips_breaker
    left join public.models as m on m.id = j.model_id
    order by m.provider, j.model_id, j.ordinality
  loop
    perform private.note_failure(p_jobs[v_at], p_codes[v_at]);
  end loop;
end;
$$;

-- Users in order of id, so that two calls lock entitlements in the same order; and all of them
-- before any breaker.
create function private.fail_jobs(
  p_job_ids uuid[], p_tokens bigint[], p_codes text[], p_details text[],
  p_retry_after_seconds double precision[], p_metrics jsonb[]
) returns table (token bigint, verdict text)
language plpgsql security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan set enable_seqscan = off set enable_bitmapscan = off
set jit = off as $$
#variable_conflict use_column
declare
  v_jobs private.running_jobs[] := private.end_leases(p_job_ids, p_tokens);
  v_job private.running_jobs;
  v_at integer;
begin
  if cardinality(v_jobs) < cardinality(p_tokens) then
    return query select e.token, 'repeated'
    from private.ended_before(p_job_ids, p_tokens, '{retried,failed,canceled}') as e (token);
  end if;
  foreach v_job in array array(select j from unnest(v_jobs) as j order by j.user_id, j.job_id) loop
    v_at := array_position(p_tokens, v_job.token);
    token := v_job.token;
    verdict := private.end_failed_attempt(
      v_job, p_codes[v_at], p_details[v_at], p_retry_after_seconds[v_at],
      coalesce(p_metrics[v_at], '{}')
    );
    return next;
  end loop;
  perform private.blame_providers(v_jobs, array(
    select p_codes[array_position(p_tokens, j.token)]
    from unnest(v_jobs) with ordinality as j order by j.ordinality
  ));
end;
$$;

comment on function private.fail_jobs is
  'Ends attempts, each with a code of error_codes: retried while attempts remain, else failed and '
  'refunded. p_details are for operators only; p_retry_after_seconds is the provider''s own wish '
  'or null; p_metrics as complete_jobs takes them, and is_asked (false: the provider never was, so '
  'nothing can have been bought). Answers each job whose lease held: retried, '
  'failed, canceled (the user had asked for it), or repeated (the call was made before).';

create function private.release_job(
  p_job_id uuid, p_token bigint, p_resumes boolean default true
) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_job private.running_jobs := private.end_lease(
    p_job_id, p_token, '{released,canceled}'
  );
begin
  if v_job.job_id is null then
    return;
  elsif v_job.cancel_requested then
    perform private.finish_canceled_job(
      v_job, p_metrics => case when p_resumes then '{}'::jsonb else '{"is_asked": false}' end
    );
    return;
  elsif exists (
    select from public.generations as g cross join private.settings as s
    where g.id = p_job_id and g.created_at < now() - s.give_up_after
      and private.count_claims(p_job_id) >= s.max_attempts
  ) then
    perform private.finish_failed(
      v_job, (select e from private.error_codes as e where e.code = 'internal')
    );
  else
    perform private.requeue_job(v_job, v_job.attempt - 1, interval '0', p_resumes);
  end if;
  perform private.record_attempts(array[v_job], 'released', array['{}'::jsonb]);
end;
$$;

comment on function private.release_job is
  'Gives a job back unfinished (graceful stop, refused account): next in line, the attempt does '
  'not count, the checkpoint is kept; or canceled, if the user asked for that; or failed, if it is '
  'older than give_up_after and has been claimed more than max_attempts times. p_resumes false: '
  'nothing was bought at the provider. Errors: DR001 lease_lost.';

create function private.cancel_job(
  p_job_id uuid, p_token bigint, p_metrics jsonb default null
) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
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
  'Ends a job whose cancel the heartbeat told of; p_metrics as fail_jobs takes them. Repeating it '
  'changes nothing. Errors: DR001 lease_lost, 22023 nobody asked for it.';
