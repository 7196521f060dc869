-- Recovery: what a dead worker left.
--
-- Two clocks end an attempt from outside. The lease runs out when the worker is silent: the job
-- goes to another worker, which resumes the checkpointed provider job. The deadline runs out when
-- the job is stuck, beats or not: it fails with timeout. pg_cron calls recover_stale_jobs every
-- minute and every worker calls it too; both may run at once.

-- Renews what plans say of the queue, at most once in ten seconds, whoever asks.
create function private.refresh_queue_state() returns void
language sql set search_path = pg_catalog, pg_temp as $$
  with due as (
    select p.name from private.plans as p
    where p.looked_at < now() - interval '10 seconds' order by p.name for update skip locked
  )
  update private.plans set
    oldest_ready_at = (
      select min(r.queued_at) from private.ready_jobs as r
      where r.run_at is null and not r.model_id = any (array(
        select p.id from private.paused_models as p where p.paused_until is not null
        union all
        select u.id from private.unserved_models as u
      )) and not (
        (select count(*) > 0 from private.budgets as b where b.on_breach <> 'alert')
        and private.awaits_budget(r.model_id, r.route, r.user_id)
      )
    ),
    looked_at = now()
  where name in (select d.name from due as d)
$$;

-- Ends the attempts of jobs that are locked, in the order given.
create function private.end_stale_jobs(p_ids uuid[]) returns integer
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_id uuid;
  v_job private.running_jobs;
  v_jobs private.running_jobs[] := '{}'::private.running_jobs[];
begin
  foreach v_id in array p_ids loop
    delete from private.running_jobs where job_id = v_id returning * into strict v_job;
    -- The lease first: after an outage both have passed, and the result may be there to fetch.
    if v_job.lease_until < now() then
      perform private.end_failed_attempt(
        v_job, 'internal', format('lease of worker %s ran out', v_job.worker_id)
      );
    else
      perform private.end_failed_attempt(v_job, 'timeout', 'deadline passed');
    end if;
    v_jobs := v_jobs || v_job;
  end loop;
  perform private.book_costs(v_jobs);
  return cardinality(p_ids);
end;
$$;

-- Users in order of id, so that two runs lock entitlements in the same order; and all of them
-- before any breaker, those in order too.
create function private.recover_stale_jobs(p_at_most integer default 100) returns integer
language plpgsql security definer set search_path = pg_catalog, pg_temp
set lock_timeout = '100ms' as $$
declare
  v_began timestamptz := clock_timestamp();
  v_stale private.running_jobs[] := '{}'::private.running_jobs[];
  v_recovered integer;
begin
  -- Reads all of running_jobs, for an index on what each heartbeat changes would cost more.
  if private.is_due('private.recovery_due') then
    v_stale := array(
      select r from private.running_jobs as r
      where r.lease_until < now() or r.deadline_at < now()
      -- Those that were skipped before take no places of others.
      order by r.user_id limit p_at_most + (select count(*) from private.skipped_rows)
      for update skip locked
    );
    perform private.put_off('private.recovery_due', v_began);
  end if;
  v_recovered := private.skip_failing(
    'select private.end_stale_jobs($1)', array(select j.job_id from unnest(v_stale) as j)
  );
  perform private.skip_failing('select private.refresh_model_stats()', array['*']);
  perform private.skip_failing('select private.note_failures($1)', v_stale);
  perform private.wake_for(v_stale);
  perform private.refresh_queue_state();
  return v_recovered;
end;
$$;

comment on function private.recover_stale_jobs is
  'Requeues or finally fails up to p_at_most jobs whose lease or deadline has passed, and renews '
  'model_stats and the state of the queue in plans. Answers how many. What cannot be done is '
  'passed over: see private.skipped_rows. Looks less often, once in ten seconds at least, while a '
  'long transaction makes each look dear.';

-- Forgets worker processes and cron runs of more than a week ago.
create function private.trim_history() returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  delete from private.workers where seen_at < now() - interval '7 days';
  delete from private.skipped_rows where last_at < now() - interval '7 days';
  if to_regclass('cron.job_run_details') is not null then
    delete from cron.job_run_details where end_time < now() - interval '7 days';
  end if;
end;
$$;

comment on function private.trim_history is
  'Housekeeping, nightly by pg_cron, which never trims its own run history.';
