-- A worker's own life: register, sleep, heartbeat, progress, unregister.
--
-- darkroom_worker may execute what 92 grants it and nothing else. A claim (72) hands out a token;
-- every later call matches (job, token), and where that row is gone the call changes nothing and
-- raises DR001. An attempt ends in 75.
--
-- What every job needs is called for many at once, with arrays of the same length, and answers one
-- row for each job whose lease holds: one without a row has lost it, which is no other's concern. A
-- token belongs to one claim of one job, so whoever names it holds that lease.
--
-- Lock order: running or ready rows in order of id, then generation, then entitlement. A function
-- that takes several rows in one statement forbids every plan but the walk of their index: that is
-- in the order of the index, and a table full of dead rows costs it nothing. Plans are made once in
-- a session, and without jit, which takes such a ban for an expensive plan.

-- Raises DR001 lease_lost.
create function private.refuse_lost_lease(p_job_id uuid) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  raise sqlstate 'DR001' using message = 'lease_lost', detail = format('job %s', p_job_id);
end;
$$;

create function private.register_worker(
  p_host text, p_slots integer, p_version text, p_keys text[] default '{REPLICATE_API_TOKEN}'
)
returns table (worker_id bigint, channel text, heartbeat_seconds real, lease_seconds real)
language sql security definer set search_path = pg_catalog, pg_temp as $$
  with registered as (
    insert into private.workers (host, slots, version, keys)
    values (left(p_host, 200), p_slots, left(p_version, 50), p_keys)
    returning id
  )
  select
    r.id,
    'darkroom_worker_' || r.id,
    extract(epoch from s.heartbeat)::real,
    extract(epoch from s.lease)::real
  from registered as r
  cross join private.settings as s
$$;

comment on function private.register_worker is
  'Enters a worker process. p_keys are names of variables, never what they hold. Answers its id, '
  'the channel to LISTEN on, and the intervals in seconds.';

create function private.unregister_worker(p_worker_id bigint) returns void
language sql security definer set search_path = pg_catalog, pg_temp as $$
  delete from private.workers where id = p_worker_id
$$;

comment on function private.unregister_worker is
  'Takes a worker that stops off the list, so that nobody tries to wake it.';

create function private.sleep(p_worker_id bigint) returns void
language sql security definer set search_path = pg_catalog, pg_temp as $$
  update private.workers set asleep = true where id = p_worker_id and not asleep
$$;

comment on function private.sleep is
  'Says that the worker found nothing and waits for NOTIFY. It must claim once more after this '
  'commits, and again a moment later: an enqueue in flight may have seen it awake.';

create function private.heartbeat(
  p_worker_id bigint, p_job_ids uuid[], p_tokens bigint[], p_progress smallint[],
  p_is_listening boolean default true
) returns table (job_id uuid, verdict text)
language plpgsql security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan set enable_seqscan = off set enable_bitmapscan = off
set jit = off as $$
#variable_conflict use_column
begin
  update private.running_jobs as r set
    lease_until = now() + s.lease,
    progress = case
      when p_progress[array_position(p_tokens, r.token)] is null then r.progress
      else least(100, greatest(0, p_progress[array_position(p_tokens, r.token)]))
    end
  from private.settings as s
  where r.job_id = any (p_job_ids) and r.token = any (p_tokens);
  -- Last: a claim of the same worker, which holds jobs that others may wait for, waits for it.
  update private.workers set seen_at = now(), is_listening = p_is_listening
  where id = p_worker_id;
  -- A new look, for the first may have waited.
  return query
  select j.id, case
    when held.is_canceled is false then 'ok'
    -- Where even the generation is gone, no other worker stops what was bought.
    when held.is_canceled is null
      and exists (select from public.generations as g where g.id = j.id) then 'lost'
    else 'canceled'
  end
  from unnest(p_job_ids) with ordinality as j (id, place)
  cross join lateral (
    select (
      select r.cancel_requested from private.running_jobs as r
      where r.job_id = j.id and r.token = p_tokens[j.place]
    ) as is_canceled
  ) as held
  order by j.id, j.place;
end;
$$;

comment on function private.heartbeat is
  'One beat for all jobs of a worker: extends their leases and takes in progress (percent or '
  'null), and whether its LISTEN works. Answers for each job, in order of id: ok, lost (drop it) '
  'or canceled (stop it: its user wants that, or is gone).';

create function private.report_progress(
  p_job_ids uuid[], p_tokens bigint[], p_stages text[], p_progress smallint[]
) returns table (token bigint, verdict text)
language plpgsql security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan set enable_seqscan = off set enable_bitmapscan = off
set jit = off as $$
#variable_conflict use_column
declare
  v_reported integer;
begin
  return query
  update private.running_jobs as r set
    stage = p_stages[array_position(p_tokens, r.token)],
    progress = case
      when p_progress[array_position(p_tokens, r.token)] is null then r.progress
      else least(100, greatest(0, p_progress[array_position(p_tokens, r.token)]))
    end
  where r.job_id = any (p_job_ids) and r.token = any (p_tokens) and not r.cancel_requested
  returning r.token, 'ok';
  get diagnostics v_reported = row_count;
  if v_reported < cardinality(p_tokens) then
    return query
    select r.token, 'canceled' from private.running_jobs as r
    where r.job_id = any (p_job_ids) and r.token = any (p_tokens) and r.cancel_requested;
  end if;
end;
$$;

comment on function private.report_progress is
  'Says at once what the next heartbeat would: stage (generating | storing) and percent or null. '
  'Answers each job whose lease holds: ok, or canceled (stop it).';
