-- Who may call what: the whole matrix, and the last word. What is not named here nobody may call.
--
-- Names without arguments: no function has two forms. In schema public only our own are touched.

revoke all on all functions in schema private from public, anon, authenticated, service_role;
revoke all on all tables in schema private from public, anon, authenticated, service_role;
revoke all on all sequences in schema private from public, anon, authenticated, service_role;

do $$
begin
  execute (
    select string_agg(format('alter table private.%I enable row level security', c.relname), ';')
    from pg_class as c where c.relnamespace = 'private'::regnamespace and c.relkind in ('r', 'p')
  );
end;
$$;

revoke all on function
public.cancel_batch, public.cancel_generation, public.delete_generation, public.enqueue_batch,
public.enqueue_generation, public.export_user, public.get_batch_status, public.get_entitlement,
public.get_job_status, public.grant_credits, public.list_active_jobs, public.list_generations,
public.list_models, public.pause_model, public.ping, public.queue_health, public.redrive_failed,
public.restore_generation, public.resume_model, public.retry_generation, public.set_paid
from public, anon, authenticated, service_role;

-- Everybody, signed in or not.
grant execute on function
private.cancel_batch, private.cancel_generation, private.delete_generation, private.enqueue_batch,
private.enqueue_generation, private.get_batch_status, private.get_entitlement,
private.get_job_status, private.list_active_jobs, private.list_generations, private.list_models,
private.restore_generation, private.retry_generation, public.cancel_batch,
public.cancel_generation, public.delete_generation, public.enqueue_batch,
public.enqueue_generation, public.get_batch_status, public.get_entitlement, public.get_job_status,
public.list_active_jobs, public.list_generations, public.list_models, public.ping,
public.restore_generation, public.retry_generation
to anon, authenticated;

-- Users: the door and the definer behind it.
grant execute on function
private.caller_id, private.may_store_input
to authenticated;

-- The operator's backend.
grant execute on function
private.list_models, public.export_user, public.grant_credits, public.list_models,
public.pause_model, public.ping, public.queue_health, public.redrive_failed, public.resume_model,
public.set_paid
to service_role;

-- Workers.
grant execute on function
private.apply_retention, private.cancel_job, private.check_setup, private.claim_jobs,
private.claim_receipts, private.complete_jobs, private.due_lanes, private.fail_jobs,
private.forget_files, private.heartbeat, private.list_expired_files, private.list_providers,
private.next_steps, private.pause_provider, private.recover_stale_jobs, private.register_worker,
private.release_job, private.report_progress, private.sleep, private.unregister_worker
to darkroom_worker;

-- Workers of the release before (76).
grant execute on function
private.adopt_provider_job, private.begin_creates, private.checkpoint_jobs, private.recall_create
to darkroom_worker;

-- Who looks on.
grant execute on function public.queue_health to darkroom_monitor;
