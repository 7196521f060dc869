-- A worker's own life: register, sleep, heartbeat, progress, unregister.
--
-- darkroom_worker may execute the functions of files 70 to 80 marked so and nothing else. A claim
-- (72) hands out a token; every later call matches (job, token), and where that row is gone the
-- call changes nothing and raises DR001. An attempt ends in 75.
--
-- Lock order: running or ready rows in order of id, then generation, then entitlement.

-- Raises DR001 lease_lost.
create or replace function private.refuse_lost_lease(p_job_id uuid)
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  raise sqlstate 'DR001' using message = 'lease_lost', detail = format('job %s', p_job_id);
end;
$$;

revoke all on function private.refuse_lost_lease(uuid)
from public, anon, authenticated, service_role;

create or replace function private.register_worker(p_host text, p_slots integer, p_version text)
returns table (worker_id bigint, channel text, heartbeat_seconds real, lease_seconds real)
language sql
security definer
set search_path = pg_catalog, pg_temp
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
set search_path = pg_catalog, pg_temp
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
set search_path = pg_catalog, pg_temp
as $$
  update private.workers set asleep = true where id = p_worker_id and not asleep
$$;

comment on function private.sleep is
  'Says that the worker found nothing and waits for NOTIFY. It must claim once more after this '
  'commits, and again a moment later: an enqueue in flight may have seen it awake.';

revoke all on function private.sleep(bigint) from public, anon, authenticated, service_role;
grant execute on function private.sleep(bigint) to darkroom_worker;

create or replace function private.heartbeat(
  p_worker_id bigint,
  p_job_ids uuid[],
  p_tokens bigint[],
  p_progress smallint[],
  p_is_listening boolean default true
)
returns table (job_id uuid, verdict text)
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_lease interval := (select s.lease from private.settings as s);
  v_at integer;
begin
  update private.workers set seen_at = now(), is_listening = p_is_listening
  where id = p_worker_id;
  -- A loop, not a join: each row is reached by its key also when the table is full of dead rows. In
  -- order of id, as cancel_jobs (77) takes several.
  for v_at in
    select j.place from unnest(p_job_ids) with ordinality as j (id, place)
    order by j.id, j.place
  loop
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
  'null), and whether its LISTEN works. Answers for each job, in order of id: ok, lost (drop it) '
  'or canceled (stop it).';

revoke all on function private.heartbeat(bigint, uuid[], bigint[], smallint[], boolean)
from public, anon, authenticated, service_role;
grant execute on function private.heartbeat(bigint, uuid[], bigint[], smallint[], boolean)
to darkroom_worker;

create or replace function private.report_progress(
  p_job_id uuid,
  p_token bigint,
  p_stage text,
  p_progress smallint
)
returns void
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
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
