-- How an attempt ends: complete_jobs, fail_jobs, release_job, cancel_job, and the two steps that
-- cancel (77) and recovery (80) share with them.
--
-- Whoever deletes the running row has the right to settle. What follows is one of two: end_jobs
-- ends the job for good, as completed, failed or canceled, or requeue_job puts it back into the
-- queue. Either leaves one row in attempts for the claim that has ended.

-- Deletes the running rows that these tokens hold and answers them in order of id.
create function private.end_leases(
  p_job_ids uuid[], p_tokens bigint[]
) returns private.running_jobs[]
language plpgsql set search_path = pg_catalog, pg_temp as $$
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

-- Ends the lease of one job and answers its running row. All null if the token already ended an
-- attempt in one of these ways: the call is a repeat whose first answer was lost.
--
-- Raises: DR001 lease_lost.
create function private.end_lease(
  p_job_id uuid, p_token bigint, p_outcomes text[]
) returns private.running_jobs
language plpgsql set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan set enable_seqscan = off set enable_bitmapscan = off
set jit = off as $$
declare
  v_job private.running_jobs := (private.end_leases(array[p_job_id], array[p_token]))[1];
begin
  if v_job.job_id is null and not exists (
    select from private.attempts as a
    where a.generation_id = p_job_id and a.token = p_token and a.outcome = any (p_outcomes)
  ) then
    perform private.refuse_lost_lease(p_job_id);
  end if;
  return v_job;
end;
$$;

-- Writes ended claims into the operators' history, with what each cost at the provider where that
-- is known. Whether it bills what failed or was stopped is said by is_billed.
create function private.record_attempts(
  p_jobs private.running_jobs[], p_outcome text, p_metrics jsonb[], p_code text, p_detail text
) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  insert into private.attempts (
    generation_id, token, model_id, provider, attempt, worker_id, started_at, outcome,
    error_code, error_detail, provider_job_id, provider_seconds, provider_images, cost_usd
  )
  select
    j.job_id, j.token, j.model_id, w.provider, j.attempt, j.worker_id, j.claimed_at, p_outcome,
    p_code, left(p_detail, 2000), j.provider_job_id,
    t.seconds, t.images,
    case
      when p_metrics[j.ordinality] @@ '$.is_asked == false || $.is_billed == false' then 0
      when jsonb_typeof(p_metrics[j.ordinality] -> 'cost_usd') = 'number' then greatest(0, least(
        100000, (p_metrics[j.ordinality] ->> 'cost_usd')::numeric
      ))
      when w.cost_unit = 'image' then w.cost_usd * t.images
      when w.cost_unit = 'second' then w.cost_usd * t.seconds
    end
  from unnest(p_jobs) with ordinality as j
  -- Within bounds: what a provider says of itself keeps no job from ending.
  cross join lateral (select
    case when jsonb_typeof(p_metrics[j.ordinality] -> 'provider_seconds') = 'number' then
      round(greatest(0, least(1000000, (p_metrics[j.ordinality] ->> 'provider_seconds')::numeric)), 6)
    end as seconds,
    case when jsonb_typeof(p_metrics[j.ordinality] -> 'images') = 'number' then
      greatest(0, least(1000000, (p_metrics[j.ordinality] ->> 'images')::numeric))
    end as images
  ) as t
  left join private.routes as w on w.model_id = j.model_id and w.place = j.route
  where j.token is not null;
end;
$$;

-- What goes back of the price of a job that has ended: of a completed one the share of the images
-- that were not stored, each of which costs a whole number; else this percentage, rounded up.
create function private.refund_due(
  p_status text, p_price integer, p_charged integer, p_stored integer, p_percent integer
) returns integer
language plpgsql immutable set search_path = pg_catalog, pg_temp as $$
begin
  return case p_status
    when 'completed' then p_price / p_charged * (p_charged - p_stored)
    else ceil(p_price::numeric * p_percent / 100)
  end;
end;
$$;

-- Ends jobs for good, the one place where that is done: the generations say how, what is due goes
-- back, and the claims that ended go into history. p_metrics and p_stored, the number of images
-- that are there, are in the order of the jobs. A job that was queued has no token.
--
-- What a user cancels is burned if it was running and the provider may bill us: only the share of
-- settings.running_cancel_refund_percent goes back then, for nobody gets anything because the user
-- did not want it any more. That counts, for else it could be had without end: see refuse_limits
-- (30). What failed by itself was not stopped by its user: it gives back what error_codes says of
-- its code, canceled or not. A share that is not the whole stays with the generation, so that the
-- books are exact whatever is set later.
--
-- Locks: generations, then entitlements in order of id.
-- Raises: 22023 if of a completed job there is no image or more than were charged.
create function private.end_jobs(
  p_jobs private.running_jobs[], p_status text, p_metrics jsonb[] default '{}',
  p_stored integer[] default '{}', p_code text default null, p_detail text default null
) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_ids uuid[] := array(select j.job_id from unnest(p_jobs) as j);
  v_burned uuid[] := '{}'::uuid[];
  v_ended record;
  v_message text;
  v_percent integer;
begin
  if p_code is not null then
    select e.message, e.refund_percent into v_message, v_percent
    from private.error_codes as e where e.code = p_code;
  elsif p_status = 'canceled' then
    v_burned := array(
      select j.job_id from unnest(p_jobs) with ordinality as j
      where j.token is not null and p_metrics[j.ordinality]
        @@ '$.is_asked == false || $.is_billed == false' is not true
    );
    select s.running_cancel_refund_percent into v_percent from private.settings as s;
  end if;
  for v_ended in
    with ended as (
      update public.generations as g set
        status = p_status, finished_at = now(), updated_at = now(),
        error_code = case p_status when 'failed' then p_code end,
        error_message = case p_status when 'failed' then v_message end,
        refund_percent = case
          when p_code is not null or g.id = any (v_burned) then nullif(v_percent, 100)
        end
      where g.id = any (v_ids)
      returning
        g.id, g.user_id, g.price_credits, g.image_count, g.refund_percent,
        array_position(v_ids, g.id) as place
    )
    select e.*, p_stored[e.place] as stored from ended as e
    where p_stored[e.place] is distinct from e.image_count
    order by e.user_id
  loop
    if v_ended.stored not between 1 and v_ended.image_count then
      raise exception '% images stored, % charged', v_ended.stored, v_ended.image_count using
        errcode = 'invalid_parameter_value', detail = format('job %s', v_ended.id);
    end if;
    if v_ended.id = any (v_burned) then
      update public.entitlements set day_burned = day_burned + 1
      where user_id = v_ended.user_id;
    end if;
    perform private.refund_generation(v_ended.user_id, v_ended.id, private.refund_due(
      p_status, v_ended.price_credits, v_ended.image_count, v_ended.stored,
      coalesce(v_ended.refund_percent, 100)
    ));
  end loop;
  perform private.record_attempts(p_jobs, p_status, p_metrics, p_code, p_detail);
end;
$$;

-- Puts a job whose lease has ended back into the queue, next in line, at once or after a delay.
create function private.requeue_job(
  p_job private.running_jobs, p_outcome text, p_attempts_used integer, p_delay interval,
  p_resumes boolean, p_metrics jsonb default '{}', p_code text default null,
  p_detail text default null, p_route smallint default null
) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  insert into private.ready_jobs (
    job_id, user_id, model_id, fair_key, attempt, run_at,
    provider_job_id, create_started_at, handles, sent_input, reserved_usd, route
  )
  select
    p_job.job_id, p_job.user_id, p_job.model_id, c.last_value, p_attempts_used,
    case when p_delay > interval '0' then now() + p_delay end,
    case when p_resumes then p_job.provider_job_id end,
    case when p_resumes then p_job.create_started_at end,
    case when p_resumes then p_job.handles end,
    case when p_resumes then p_job.sent_input end,
    case when p_resumes then p_job.reserved_usd end, coalesce(p_route, p_job.route)
  from private.virtual_clock as c;
  update public.generations set status = 'queued', updated_at = now() where id = p_job.job_id;
  perform private.record_attempts(array[p_job], p_outcome, array[p_metrics], p_code, p_detail);
end;
$$;

-- Wakes workers for those of these jobs that may be claimed again at once. The last thing to do: a
-- claim (72) that has locked a budget or a breaker may wait for the row of its worker.
create function private.wake_for(p_jobs private.running_jobs[]) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_model_id text;
  v_route smallint;
begin
  for v_model_id, v_route in
    select r.model_id, r.route from private.ready_jobs as r
    where r.job_id = any (array(select j.job_id from unnest(p_jobs) as j)) and r.run_at is null
  loop
    perform private.wake_workers(1, array(
      select w.provider from private.routes as w
      where w.model_id = v_model_id order by w.place <> v_route, w.place
    ));
  end loop;
end;
$$;

create function private.complete_jobs(
  p_job_ids uuid[], p_tokens bigint[], p_images jsonb[], p_metrics jsonb[]
) returns table (token bigint, verdict text)
language plpgsql security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan set enable_seqscan = off set enable_bitmapscan = off
set jit = off as $$
#variable_conflict use_column
declare
  v_jobs private.running_jobs[] := private.end_leases(p_job_ids, p_tokens);
  v_metrics jsonb[];
  v_stored integer[];
begin
  if cardinality(v_jobs) < cardinality(p_tokens) then
    return query select a.token, 'repeated' from private.attempts as a
    where a.generation_id = any (p_job_ids) and a.token = any (p_tokens)
      and a.outcome = 'completed';
  end if;
  with ended as (
    select j.*, array_position(p_tokens, j.token) as place
    from unnest(v_jobs) with ordinality as j
  ),
  written as (
    insert into public.images (
      generation_id, position, user_id, storage_path, preview_path, content_type,
      width, height, bytes, blurhash
    )
    select
      e.job_id, i.position, e.user_id, i.storage_path, i.preview_path, i.content_type,
      i.width, i.height, i.bytes, i.blurhash
    from ended as e
    cross join lateral jsonb_populate_recordset(null::public.images, p_images[e.place]) as i
  )
  select
    array_agg(p_metrics[e.place] order by e.ordinality),
    array_agg(coalesce(jsonb_array_length(p_images[e.place]), 0) order by e.ordinality)
  into v_metrics, v_stored
  from ended as e;
  perform private.end_jobs(v_jobs, 'completed', v_metrics, v_stored);
  perform private.book_costs(v_jobs);
  if exists (
    select from private.breakers as b where b.failures > 0 or b.times_opened > 0
  ) then
    perform private.note_successes(v_jobs);
  end if;
  return query select j.token, 'completed' from unnest(v_jobs) as j;
end;
$$;

comment on function private.complete_jobs is
  'Ends jobs well: stores what was made and settles on it, for images that were charged but not '
  'made are given back. p_images, of each job: [{position, storage_path, preview_path, '
  'content_type, width, height, bytes, blurhash}]; p_metrics: {provider_seconds, images (as many '
  'as the provider made), is_billed (false: the provider asks nothing for it)}. Answers each job '
  'whose lease held: completed, or repeated (the call was made before). Errors, which change '
  'nothing for any of the jobs: 22023 bad images, and what breaks a constraint.';

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

-- How many seconds a Retry-After asks to wait: a number, of several the first, or until a date to
-- come. Null if its words are neither.
create function private.asked_seconds(p_words text) returns double precision
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
begin
  return coalesce(
    substring(p_words, '^\s*(\d{1,15}(?:\.\d{1,15})?)\s*(?:,|$)')::double precision,
    -- HTTP's dates are in GMT, also in the form that does not say so.
    nullif(greatest(0, extract(epoch from (
      substring(p_words, '^\s*((?:Mon|Tue|Wed|Thu|Fri|Sat|Sun).{10,40})$')::timestamp
      at time zone 'UTC' - now()
    ))), 0)
  );
exception when data_exception then
  return null;
end;
$$;

-- How long to wait before the next attempt: exponential backoff, or longer if the provider asks for
-- it. Jitter, so that jobs that failed together do not come back together, takes half at most: one
-- job makes six creates in its first minute and two in a later one, whatever a provider asks for.
create function private.retry_delay(
  p_failures_before integer, p_retry_after_seconds double precision
) returns interval
language sql set search_path = pg_catalog, pg_temp as $$
  select private.asked_delay(
    (1 - random() / 2) * least(s.retry_cap, s.retry_base * power(2, least(p_failures_before, 20))),
    p_retry_after_seconds, 3600
  )
  from private.settings as s
$$;

-- Retries a failed attempt while it may: by the next route, if there is one, with as many attempts
-- again once those of its own are used up. Or fails the job for good, or cancels it if the user
-- wants that. Answers 'retried', 'failed' or 'canceled'. What uses no attempt is bounded, too: by
-- the job's age and by settings.max_claims; but for what waits for an operator to mend its model.
create function private.end_failed_attempt(
  p_job private.running_jobs, p_code text, p_detail text,
  p_retry_after_seconds double precision default null, p_metrics jsonb default '{}'
) returns text
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_error private.error_codes;
  v_settings private.settings;
  v_attempts_used integer;
  v_claims_before integer;
  v_route smallint := p_job.route;
  v_resumes boolean;
  v_detail text;
begin
  if p_job.cancel_requested then
    perform private.end_jobs(
      array[p_job], 'canceled', array[p_metrics], p_code => p_code, p_detail => p_detail
    );
    return 'canceled';
  end if;
  select * into strict v_settings from private.settings;
  -- A code that is not ours becomes internal; what came is kept in the detail.
  select * into strict v_error from private.error_codes
  where code in (p_code, 'internal') order by code = p_code desc limit 1;
  v_detail := concat_ws(': ', nullif(p_code, v_error.code), p_detail);
  v_attempts_used := p_job.attempt - case when v_error.uses_attempt then 0 else 1 end;
  v_resumes := v_error.resumes and not p_metrics @> '{"is_asked": false}';
  select count(*) into v_claims_before from private.attempts where generation_id = p_job.job_id;
  if v_attempts_used >= v_settings.max_attempts then
    select min(w.place) into v_route from private.model_routes as w
    where w.model_id = p_job.model_id and w.place > p_job.route;
    v_attempts_used := 0;
    v_resumes := false;
  end if;
  if v_error.pauses_model
    or v_error.is_retryable and v_route is not null
    and v_claims_before + 1 < v_settings.max_claims and exists (
      select from public.generations
      where id = p_job.job_id and created_at > now() - v_settings.give_up_after
    ) then
    perform private.requeue_job(
      p_job, 'retried', v_attempts_used,
      case
        when v_error.pauses_model or v_route <> p_job.route then '0'
        else private.retry_delay(v_claims_before, p_retry_after_seconds)
      end,
      v_resumes,
      -- What the next attempt resumes is paid once: it will be booked there.
      case when v_resumes then '{}' else p_metrics end, v_error.code, v_detail, v_route
    );
    return 'retried';
  end if;
  perform private.end_jobs(
    array[p_job], 'failed', array[p_metrics], p_code => v_error.code, p_detail => v_detail
  );
  return 'failed';
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
    return query select a.token, 'repeated' from private.attempts as a
    where a.generation_id = any (p_job_ids) and a.token = any (p_tokens)
      and a.outcome in ('retried', 'failed', 'canceled');
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
  perform private.book_costs(v_jobs);
  perform private.note_failures(v_jobs);
  perform private.wake_for(v_jobs);
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
    p_job_id, p_token, '{released,canceled,failed}'
  );
begin
  if v_job.cancel_requested then
    perform private.end_jobs(
      array[v_job], 'canceled',
      array[case when p_resumes then '{}'::jsonb else '{"is_asked": false}' end]
    );
  elsif exists (
    select from public.generations as g cross join private.settings as s
    where g.id = v_job.job_id and (
      select count(*) from private.attempts as a where a.generation_id = g.id
    ) >= case
      when g.created_at < now() - s.give_up_after then s.max_attempts
      else s.max_claims - 1
    end
  ) then
    perform private.end_jobs(array[v_job], 'failed', p_code => 'internal');
  elsif v_job.job_id is not null then
    perform private.requeue_job(
      v_job, 'released', v_job.attempt - 1, interval '0', p_resumes,
      case when p_resumes then '{}'::jsonb else '{"is_asked": false}' end
    );
  end if;
  perform private.book_costs(array[v_job]);
  perform private.wake_for(array[v_job]);
end;
$$;

comment on function private.release_job is
  'Gives a job back unfinished (graceful stop, refused account): next in line, the attempt does '
  'not count, the checkpoint is kept; or canceled, if the user asked for that; or failed, if it '
  'has been claimed max_claims times, or is older than give_up_after and has been claimed more '
  'than max_attempts times. p_resumes false: nothing was bought at the provider. Errors: DR001 '
  'lease_lost.';

create function private.cancel_job(
  p_job_id uuid, p_token bigint, p_metrics jsonb default null
) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_job private.running_jobs := private.end_lease(p_job_id, p_token, '{canceled}');
begin
  if v_job.cancel_requested then
    perform private.end_jobs(array[v_job], 'canceled', array[p_metrics]);
    perform private.book_costs(array[v_job]);
  elsif v_job.job_id is not null then
    raise exception 'nobody asked to cancel job %', p_job_id
      using errcode = 'invalid_parameter_value';
  end if;
end;
$$;

comment on function private.cancel_job is
  'Ends a job whose cancel the heartbeat told of; p_metrics as fail_jobs takes them. Repeating it '
  'changes nothing. Errors: DR001 lease_lost, 22023 nobody asked for it.';
