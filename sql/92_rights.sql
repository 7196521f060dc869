-- Who may call what: the whole matrix, and the last word. What is not named here nobody may call.
--
-- Names without arguments: no function has two forms. In schema public only our own are touched.

revoke all on all functions in schema private from public, anon, authenticated, service_role;
revoke all on all tables in schema private from public, anon, authenticated, service_role;
grant select on table private.shared_paths to anon, authenticated;

revoke all on function
public.cancel_batch, public.cancel_generation, public.delete_generation,
public.delete_prompt_template, public.delete_webhook, public.enable_webhook, public.enqueue_batch,
public.enqueue_generation, public.get_batch_status, public.get_entitlement, public.get_job_status,
public.grant_credits, public.like_image, public.list_active_jobs, public.list_deliveries,
public.list_generations, public.list_models, public.list_prompt_templates,
public.list_public_images, public.list_webhooks, public.pause_model, public.ping,
public.queue_health, public.queue_history, public.queue_report, public.redeliver,
public.redeliver_dead, public.redrive_failed, public.register_push_token, public.register_webhook,
public.restore_generation, public.resume_model, public.retry_generation,
public.rotate_webhook_secret, public.save_prompt_template, public.set_favorite, public.set_paid,
public.set_tags, public.share_image, public.unregister_push_token
from public, anon, authenticated, service_role;

-- Everybody, signed in or not.
grant execute on function
private.cancel_batch, private.cancel_generation, private.delete_generation,
private.delete_prompt_template, private.enqueue_batch, private.enqueue_generation,
private.get_batch_status, private.get_entitlement, private.get_job_status, private.like_image,
private.list_active_jobs, private.list_generations, private.list_models,
private.list_prompt_templates, private.list_public_images, private.register_push_token,
private.restore_generation, private.retry_generation, private.save_prompt_template,
private.set_favorite, private.set_tags, private.share_image, private.unregister_push_token,
public.cancel_batch, public.cancel_generation, public.delete_generation,
public.delete_prompt_template, public.enqueue_batch, public.enqueue_generation,
public.get_batch_status, public.get_entitlement, public.get_job_status, public.like_image,
public.list_active_jobs, public.list_generations, public.list_models, public.list_prompt_templates,
public.list_public_images, public.ping, public.register_push_token, public.restore_generation,
public.retry_generation, public.save_prompt_template, public.set_favorite, public.set_tags,
public.share_image, public.unregister_push_token
to anon, authenticated;

-- Users: the door and the definer behind it.
grant execute on function
private.caller_id, private.may_store_input
to authenticated;

-- The operator's backend.
grant execute on function
private.delete_webhook, private.enable_webhook, private.grant_credits, private.list_deliveries,
private.list_models, private.list_webhooks, private.pause_model, private.redeliver,
private.redeliver_dead, private.redrive_failed, private.register_webhook, private.resume_model,
private.rotate_webhook_secret, private.set_paid, public.delete_webhook, public.enable_webhook,
public.grant_credits, public.list_deliveries, public.list_models, public.list_webhooks,
public.pause_model, public.ping, public.queue_health, public.queue_history, public.queue_report,
public.redeliver, public.redeliver_dead, public.redrive_failed, public.register_webhook,
public.resume_model, public.rotate_webhook_secret, public.set_paid
to service_role;

-- Workers.
grant execute on function
private.adopt_provider_job, private.apply_retention, private.begin_creates, private.cancel_job,
private.check_setup, private.checkpoint_jobs, private.claim_deliveries, private.claim_jobs,
private.claim_receipts, private.complete_jobs, private.due_lanes, private.fail_jobs,
private.finish_delivery, private.finish_receipts, private.forget_files, private.heartbeat,
private.list_expired_files, private.pause_provider, private.recall_create,
private.recover_stale_jobs, private.register_worker, private.release_job, private.report_progress,
private.sleep, private.unregister_worker
to darkroom_worker;

-- Who looks on.
grant execute on function
private.report_alerts, private.report_errors, private.report_models, private.report_workers,
public.queue_health, public.queue_history, public.queue_report
to darkroom_monitor;
