-- Recovery: what a dead worker left.
--
-- Two clocks end an attempt from outside. The lease runs out when the worker is silent: the job
-- goes to another worker, which resumes the checkpointed provider job. The deadline runs out when
-- the job is stuck, beats or not: it fails with timeout. pg_cron calls recover_stale_jobs every
-- minute and every worker calls it too; both may run at once.

-- Users in order of id, so that two runs lock entitlements in the same order.
create or replace function private.recover_stale_jobs(p_at_most integer default 100)
returns integer
language plpgsql
security definer
set search_path = ''
as $$
declare
  v_job private.running_jobs;
  v_count integer := 0;
begin
  for v_job in
    select * from private.running_jobs
    where lease_until < now() or deadline_at < now()
    order by user_id limit p_at_most for update skip locked
  loop
    delete from private.running_jobs where job_id = v_job.job_id;
    -- The lease first: after an outage both have passed, and the result may be there to fetch.
    if v_job.lease_until < now() then
      perform private.end_failed_attempt(
        v_job, 'internal', format('lease of worker %s ran out', v_job.worker_id)
      );
    else
      perform private.end_failed_attempt(v_job, 'timeout', 'deadline passed');
    end if;
    v_count := v_count + 1;
  end loop;
  perform private.refresh_model_stats();
  return v_count;
end;
$$;

comment on function private.recover_stale_jobs is
  'Requeues or finally fails up to p_at_most jobs whose lease or deadline has passed, and renews '
  'model_stats. Answers how many.';

revoke all on function private.recover_stale_jobs(integer)
from public, anon, authenticated, service_role;
grant execute on function private.recover_stale_jobs(integer) to darkroom_worker;

-- Forgets worker processes and cron runs of more than a week ago, and old deliveries.
create or replace function private.trim_history()
returns void
language plpgsql
set search_path = ''
as $$
begin
  delete from private.workers where seen_at < now() - interval '7 days';
  perform private.trim_deliveries();
  if to_regclass('cron.job_run_details') is not null then
    delete from cron.job_run_details where end_time < now() - interval '7 days';
  end if;
end;
$$;

comment on function private.trim_history is
  'Housekeeping, nightly by pg_cron, which never trims its own run history.';

revoke all on function private.trim_history() from public, anon, authenticated, service_role;
