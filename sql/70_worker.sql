-- What a worker calls: register, claim, heartbeat, checkpoint, and one of complete, fail, release.
--
-- darkroom_worker may execute these functions and nothing else. A claim moves jobs from ready_jobs
-- to running_jobs and hands out a token; every later call matches (job, token). Whoever deletes the
-- running row has ended the attempt: it alone settles the money and gives the slot back, so a
-- worker that comes late changes nothing. complete, fail and release may be repeated: an attempt
-- this token has already ended that way is left as it is.
--
-- Lock order: running or ready row, then generation, then entitlement.

create or replace function private.register_worker(p_host text, p_slots integer, p_version text)
returns table (worker_id bigint, channel text, heartbeat_seconds real, lease_seconds real)
language sql
security definer
set search_path = ''
as $$
  with registered as (
    insert into private.workers (host, slots, version)
    values (left(p_host, 200), p_slots, left(p_version, 50))
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
  'Enters a worker process. Answers its id, the channel to LISTEN on, and the intervals in '
  'seconds.';

revoke all on function private.register_worker(text, integer, text)
from public, anon, authenticated, service_role;
grant execute on function private.register_worker(text, integer, text) to darkroom_worker;

create or replace function private.unregister_worker(p_worker_id bigint)
returns void
language sql
security definer
set search_path = ''
as $$
  delete from private.workers where id = p_worker_id
$$;

comment on function private.unregister_worker is
  'Takes a worker that stops off the list, so that nobody tries to wake it.';

revoke all on function private.unregister_worker(bigint)
from public, anon, authenticated, service_role;
grant execute on function private.unregister_worker(bigint) to darkroom_worker;

create or replace function private.sleep(p_worker_id bigint)
returns void
language sql
security definer
set search_path = ''
as $$
  update private.workers set asleep = true where id = p_worker_id and not asleep
$$;

comment on function private.sleep is
  'Says that the worker found nothing and waits for NOTIFY. It must claim once more after this '
  'commits, and again a moment later: an enqueue in flight may have seen it awake.';

revoke all on function private.sleep(bigint) from public, anon, authenticated, service_role;
grant execute on function private.sleep(bigint) to darkroom_worker;

-- Delayed jobs whose time has come become claimable.
create or replace function private.promote_due_jobs(p_at_most integer)
returns void
language sql
set search_path = ''
as $$
  update private.ready_jobs set run_at = null
  where seq = any (array(
    select r.seq from private.ready_jobs as r
    where r.run_at <= now() order by r.run_at limit p_at_most for update skip locked
  ))
$$;

revoke all on function private.promote_due_jobs(integer)
from public, anon, authenticated, service_role;

-- Locks the next jobs in fair order and answers their seq.
--
-- While a long transaction holds back vacuum, the index begins with every job ever claimed since,
-- and a scan from its start walks them all. So the scan starts a little below the virtual clock.
-- What was queued below that is found by a scan from the start, at least once a second in each
-- session.
create or replace function private.lock_next_jobs(p_at_most integer)
returns bigint[]
language plpgsql
set search_path = ''
as $$
declare
  v_slack constant bigint := 100000;  -- 100 credits of weight 1
  v_last_full bigint := coalesce(
    nullif(current_setting('darkroom.full_scan_ms', true), '')::bigint, 0
  );
  v_now bigint := extract(epoch from clock_timestamp()) * 1000;
  v_from bigint := 0;
begin
  if v_now - v_last_full < 1000 then
    v_from := (select c.last_value - v_slack from private.virtual_clock as c);
  else
    perform set_config('darkroom.full_scan_ms', v_now::text, false);
  end if;
  return array(
    select r.seq from private.ready_jobs as r
    where r.run_at is null and r.fair_key >= v_from
    order by r.fair_key, r.seq limit p_at_most for update skip locked
  );
end;
$$;

revoke all on function private.lock_next_jobs(integer)
from public, anon, authenticated, service_role;

-- Every row is reached by its key, whatever the planner thinks of the tables' sizes.
-- Outer joins: a job whose model somebody deleted must fail at the worker, not vanish here.
create or replace function private.claim_jobs(p_worker_id bigint, p_slots integer)
returns table (
  job_id uuid,
  user_id uuid,
  token bigint,
  attempt smallint,
  provider text,
  provider_ref text,
  provider_input jsonb,
  provider_job_id text,
  image_count smallint,
  deadline_seconds real
)
language plpgsql
security definer
set search_path = ''
as $$
#variable_conflict use_column
declare
  v_seqs bigint[];
begin
  perform private.promote_due_jobs(p_slots);
  v_seqs := private.lock_next_jobs(p_slots);
  if v_seqs = '{}' then
    return;
  end if;
  update private.workers set asleep = false where id = p_worker_id and asleep;
  perform setval('private.virtual_clock', greatest(c.last_value, r.fair_key))
  from private.virtual_clock as c
  cross join private.ready_jobs as r
  where r.seq = v_seqs[cardinality(v_seqs)];
  return query
  with claimed as (
    delete from private.ready_jobs as r where r.seq = any (v_seqs) returning r.*
  ),
  running as (
    insert into private.running_jobs as r (
      job_id, user_id, model_id, token, worker_id, attempt,
      lease_until, deadline_at, provider_job_id
    )
    select
      c.job_id, c.user_id, c.model_id, nextval('private.lease_tokens'), p_worker_id, c.attempt + 1,
      now() + st.lease, now() + coalesce(m.deadline, st.lease), c.provider_job_id
    from claimed as c cross join private.settings as st
    left join public.models as m on m.id = c.model_id
    order by c.fair_key, c.seq
    returning r.*
  ),
  started as (
    update public.generations as g set
      status = 'processing', started_at = coalesce(g.started_at, now()), updated_at = now()
    where g.id = any (array(select r.job_id from running as r))
    returning g.id, g.provider_input, g.image_count
  )
  select
    r.job_id, r.user_id, r.token, r.attempt, m.provider, m.provider_ref,
    s.provider_input, r.provider_job_id, s.image_count, extract(epoch from m.deadline)::real
  from running as r
  inner join started as s on s.id = r.job_id
  left join public.models as m on m.id = r.model_id
  order by r.token;
end;
$$;

comment on function private.claim_jobs is
  'Moves up to p_slots jobs in fair order from ready to running and answers them. provider_job_id'
  ' is set where an earlier attempt already bought something at the provider: resume it. Seconds '
  'are durations.';

revoke all on function private.claim_jobs(bigint, integer)
from public, anon, authenticated, service_role;
grant execute on function private.claim_jobs(bigint, integer) to darkroom_worker;

create or replace function private.heartbeat(
  p_worker_id bigint,
  p_job_ids uuid[],
  p_tokens bigint[],
  p_progress smallint[]
)
returns table (job_id uuid, verdict text)
language plpgsql
security definer
set search_path = ''
as $$
#variable_conflict use_column
declare
  v_lease interval := (select s.lease from private.settings as s);
begin
  update private.workers set seen_at = now() where id = p_worker_id;
  -- A loop, not a join: each row is reached by its key also when the table is full of dead rows.
  for v_at in 1 .. coalesce(cardinality(p_job_ids), 0) loop
    job_id := p_job_ids[v_at];
    update private.running_jobs as r
    set
      lease_until = now() + v_lease,
      progress = case
        when p_progress[v_at] is null then r.progress
        else least(100, greatest(0, p_progress[v_at]))
      end
    where r.job_id = p_job_ids[v_at] and r.token = p_tokens[v_at]
    returning case when r.cancel_requested then 'canceled' else 'ok' end into verdict;
    verdict := coalesce(verdict, 'lost');
    return next;
    verdict := null;
  end loop;
end;
$$;

comment on function private.heartbeat is
  'One beat for all jobs of a worker: extends their leases and takes in progress (percent or '
  'null). Answers for each job ok, lost (drop it) or canceled (stop it).';

revoke all on function private.heartbeat(bigint, uuid[], bigint[], smallint[])
from public, anon, authenticated, service_role;
grant execute on function private.heartbeat(bigint, uuid[], bigint[], smallint[])
to darkroom_worker;

-- Raises DR001 lease_lost.
create or replace function private.refuse_lost_lease(p_job_id uuid)
returns void
language plpgsql
set search_path = ''
as $$
begin
  raise sqlstate 'DR001' using message = 'lease_lost', detail = format('job %s', p_job_id);
end;
$$;

revoke all on function private.refuse_lost_lease(uuid)
from public, anon, authenticated, service_role;

create or replace function private.checkpoint(p_job_id uuid, p_token bigint, p_provider_job_id text)
returns void
language plpgsql
security definer
set search_path = ''
as $$
begin
  update private.running_jobs set provider_job_id = p_provider_job_id
  where job_id = p_job_id and token = p_token;
  if not found then
    perform private.refuse_lost_lease(p_job_id);
  end if;
end;
$$;

comment on function private.checkpoint is
  'Saves the provider''s id of the job the moment it is known, so that no attempt buys it twice. '
  'Errors: DR001 lease_lost.';

revoke all on function private.checkpoint(uuid, bigint, text)
from public, anon, authenticated, service_role;
grant execute on function private.checkpoint(uuid, bigint, text) to darkroom_worker;

create or replace function private.report_progress(
  p_job_id uuid,
  p_token bigint,
  p_stage text,
  p_progress smallint
)
returns void
language plpgsql
security definer
set search_path = ''
as $$
declare
  v_canceled boolean;
begin
  update private.running_jobs set
    stage = p_stage,
    progress = case
      when p_progress is null then progress
      else least(100, greatest(0, p_progress))
    end
  where job_id = p_job_id and token = p_token
  returning cancel_requested into v_canceled;
  if not found then
    perform private.refuse_lost_lease(p_job_id);
  elsif v_canceled then
    raise sqlstate 'DR002' using message = 'canceled', detail = format('job %s', p_job_id);
  end if;
end;
$$;

comment on function private.report_progress is
  'Says at once what the next heartbeat would: stage (generating | storing) and percent. Errors: '
  'DR001 lease_lost, DR002 canceled.';

revoke all on function private.report_progress(uuid, bigint, text, smallint)
from public, anon, authenticated, service_role;
grant execute on function private.report_progress(uuid, bigint, text, smallint) to darkroom_worker;
