-- Cancel: a queued job at once, a running one through its worker.
--
-- A queued job's ready row is deleted, and whoever deleted it settles. A running job is only
-- marked: its worker is told by NOTIFY and asks the heartbeat, stops the provider, and ends the
-- job with cancel_job (75). Whatever ends the attempt otherwise honours the mark too; only a
-- result that is already stored wins over it. The refund rule is in end_jobs (75).
--
-- All rows of the queue are taken before the first entitlement is, or two calls could wait for one
-- another.

-- Takes these jobs of a user out of the queue or marks them, and settles those taken out.
--
-- Locks: ready and running rows in order of id, the generations, the entitlement row.
create function private.cancel_jobs(p_user_id uuid, p_job_ids uuid[]) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_job_id uuid;
  v_worker_id bigint;
  v_job private.running_jobs;  -- without a lease
  v_taken private.running_jobs[] := array[]::private.running_jobs[];
begin
  foreach v_job_id in array array(select j.id from unnest(p_job_ids) as j (id) order by j.id) loop
    -- A job may go from ready to running, or back, between two looks.
    for v_look in 1 .. 5 loop
      delete from private.ready_jobs where job_id = v_job_id and user_id = p_user_id
      returning job_id, user_id, model_id, route, reserved_usd
      into v_job.job_id, v_job.user_id, v_job.model_id, v_job.route, v_job.reserved_usd;
      if found then
        v_taken := v_taken || v_job;
        exit;
      end if;
      update private.running_jobs set cancel_requested = true
      where job_id = v_job_id and user_id = p_user_id and not cancel_requested
      returning worker_id into v_worker_id;
      if found then
        perform pg_notify('darkroom_worker_' || v_worker_id, 'cancel');
        exit;
      end if;
    end loop;
  end loop;
  -- No attempt is under way. If an earlier one was billed, it was we who broke it off.
  perform private.end_jobs(v_taken, 'canceled');
  perform private.book_costs(v_taken);
end;
$$;

-- Raises: see the comment on public.cancel_generation.
create function private.cancel_generation(p_job_id uuid) returns json
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_user_id uuid := private.require_user_id(p_writes => true);
  v_generation public.generations;
begin
  perform private.cancel_jobs(v_user_id, array[p_job_id]);
  v_generation := private.require_generation(p_job_id, v_user_id);
  if v_generation.status in ('completed', 'failed') then
    perform private.refuse(
      'already_finished', format('the job is %s', v_generation.status),
      'Read it with get_job_status.'
    );
  end if;
  return private.job_json(v_generation);
end;
$$;

-- Raises: PT401 not_authenticated, PT404 not_found.
create function private.cancel_batch(p_batch_id uuid) returns json
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_user_id uuid := private.require_user_id(p_writes => true);
begin
  perform private.cancel_jobs(v_user_id, array(
    select j.job_id
    from public.batches as b inner join private.live_jobs as j on j.job_id = any (b.job_ids)
    where b.id = p_batch_id and b.user_id = v_user_id and j.user_id = v_user_id
  ));
  return private.batch_json(private.require_batch(p_batch_id, v_user_id));
end;
$$;
