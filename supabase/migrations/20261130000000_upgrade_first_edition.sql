-- Moves a database of the first edition to the second. In any other it does nothing.
--
-- Written once by comparing both, with what no catalogue tells by hand; it is never changed again.
-- All of it is one statement, so one transaction, whoever applies it. It takes its locks first, and
-- gives up after some five seconds: nothing is changed then. Workers of the first edition go on:
-- their calls are answered as before.
--
-- `supabase db push` and `make migrate` apply what has no row in their history, in order. A database
-- of the first edition has the row of create_darkroom, and none of the optional parts that it was
-- one with: so their files, like this one, look first whether there is anything to do.

do $upgrade$
begin
if to_regclass('private.ready_jobs') is null or to_regclass('private.purchases') is not null then
  return;
end if;
-- In the order of requests, as far as they have one. Who waits for a second looks for a deadlock, and
-- may be its victim: so this waits less, lets go of what it has, and tries again.
for v_try in 1..30 loop
  begin
    perform set_config('lock_timeout', '250ms', true);
    lock table
    private.settings,
    public.entitlements,
    public.batches,
    public.generations,
    public.credit_ledger,
    private.ready_jobs,
    private.running_jobs,
    private.alert_rules,
    private.attempts,
    private.deliveries,
    private.error_codes,
    private.expired_files,
    private.model_stats,
    private.plans,
    private.push_texts,
    private.push_tokens,
    private.queue_state,
    private.retention_walks,
    private.routines,
    private.webhook_endpoints,
    private.workers,
    public.generation_tags,
    public.image_likes,
    public.images,
    public.model_aliases,
    public.models,
    public.prompt_templates,
    private.breakers
    in access exclusive mode;
    exit;
  exception when lock_not_available then
    if v_try = 30 then
      raise;
    end if;
  end;
  perform pg_sleep(0.1 * random());
end loop;
perform set_config('lock_timeout', '5s', true);

-- Held jobs wait in the queue like any other: a claim passes over what is paused.
update private.ready_jobs set run_at = null, is_held = false where is_held;

-- Who is paid is said by paid_until alone.
update public.entitlements set paid_until = null where not is_paid and paid_until is not null;

-- What differs from the second edition.

do $$ begin if to_regclass('storage.objects') is not null then drop policy if exists "Everybody reads shared images" on storage.objects; end if;
exception when insufficient_privilege then null; end $$;

do $$ begin if to_regclass('storage.objects') is not null then drop policy if exists "Users add their own input images" on storage.objects; end if;
exception when insufficient_privilege then null; end $$;

do $$ begin if to_regclass('storage.objects') is not null then drop policy if exists "Users delete their own input images" on storage.objects; end if;
exception when insufficient_privilege then null; end $$;

do $$ begin if to_regclass('storage.objects') is not null then drop policy if exists "Users read their own generated images" on storage.objects; end if;
exception when insufficient_privilege then null; end $$;

do $$ begin if to_regclass('storage.objects') is not null then drop policy if exists "Users read their own input images" on storage.objects; end if;
exception when insufficient_privilege then null; end $$;

do $$ begin if to_regclass('realtime.messages') is not null then drop policy if exists "Users receive hints about their own jobs" on realtime.messages; end if;
exception when insufficient_privilege then null; end $$;

do $$ begin if to_regclass('storage.objects') is not null then drop policy if exists "Users replace their own input images" on storage.objects; end if;
exception when insufficient_privilege then null; end $$;

do $$ begin if to_regclass('public.generations') is not null then drop trigger if exists generations_broadcast_insert on public.generations; end if;
exception when insufficient_privilege then null; end $$;

do $$ begin if to_regclass('public.generations') is not null then drop trigger if exists generations_broadcast_status on public.generations; end if;
exception when insufficient_privilege then null; end $$;

drop trigger credit_ledger_is_kept_while_user_exists on public.credit_ledger;

drop trigger entitlements_erase_generations on public.entitlements;

drop trigger entitlements_erase_ledger on public.entitlements;

drop trigger entitlements_expire_files on public.entitlements;

drop trigger models_set_default_input on public.models;

drop policy "Users read their own batches" on public.batches;

drop policy "Users read their own entitlement" on public.entitlements;

drop policy "Users read their own generations" on public.generations;

drop policy "Users read their own images" on public.images;

drop policy "Users read their own ledger" on public.credit_ledger;

drop policy "Users read their own likes" on public.image_likes;

drop policy "Users read their own prompt templates" on public.prompt_templates;

drop policy "Users read their own tags" on public.generation_tags;

alter table public.batches drop constraint batches_user_id_fkey;

alter table public.generation_tags drop constraint generation_tags_generation_id_fkey;

alter table public.image_likes drop constraint image_likes_image_fkey;

alter table public.image_likes drop constraint image_likes_user_id_fkey;

alter table public.images drop constraint images_generation_id_fkey;

alter table public.prompt_templates drop constraint prompt_templates_user_id_fkey;

alter table private.deliveries drop constraint deliveries_push_token_matches_lane;

alter table private.expired_files drop constraint expired_files_path_is_the_users;

alter table private.plans drop constraint plans_busy_after_is_positive;

alter table private.plans drop constraint plans_limits_are_positive;

alter table private.ready_jobs drop constraint ready_jobs_held_ones_are_never_due;

alter table private.ready_jobs drop constraint ready_jobs_job_id_key;

alter table private.ready_jobs drop constraint ready_jobs_pkey;

alter table private.retention_walks drop constraint retention_walks_name_is_known;

alter table private.settings drop constraint settings_delivery_times_are_not_negative;

alter table private.settings drop constraint settings_keep_ledger_outlives_ninety_days;

alter table private.settings drop constraint settings_watch_window_is_positive;

alter table public.batches drop constraint batches_job_count_is_positive;

alter table public.credit_ledger drop constraint credit_ledger_balance_is_not_negative;

alter table public.credit_ledger drop constraint credit_ledger_pkey;

alter table public.entitlements drop constraint entitlements_credits_are_not_negative;

alter table public.entitlements drop constraint entitlements_paid_users_have_an_end;

alter table public.generations drop constraint generations_deleted_ones_are_finished;

alter table public.generations drop constraint generations_error_code_matches_status;

alter table public.generations drop constraint generations_finished_at_matches_status;

alter table public.generations drop constraint generations_image_count_is_positive;

alter table public.generations drop constraint generations_input_is_an_object;

alter table public.generations drop constraint generations_price_is_not_negative;

drop index if exists private.attempts_provider_job_id_idx;

drop index if exists private.ready_jobs_held_idx;

drop index if exists public.credit_ledger_user_id_id_idx;

drop index if exists public.generations_batch_id_idx;

drop index if exists public.generations_retry_of_idx;

drop index if exists public.generations_reuse_idx;

alter table private.webhook_endpoints alter column secret drop default;

drop view
private.alias_arms,
private.busiest_users,
private.cost_by_day,
private.cost_by_model,
private.cost_by_user,
private.errors_by_model,
private.model_performance,
private.queue_by_model,
private.queue_by_plan,
private.recent_failures,
private.running_now,
private.stuck_jobs,
private.throughput_per_day,
private.throughput_per_hour,
private.undelivered,
private.vacuum_holders,
private.waiting_now,
private.waiting_times,
private.worker_activity;

drop function
private.admit_probes(p_seqs bigint[]),
private.alert_states(p_health jsonb),
private.begin_creates(p_job_ids uuid[], p_tokens bigint[]),
private.begin_probe(p_name text, p_seq bigint),
private.begin_walk(p_name text),
private.blame_providers(p_jobs private.running_jobs[], p_codes text[]),
private.blocked_models(),
private.books_health(),
private.bury_deliveries(p_lane text),
private.charge_credits(p_entitlement public.entitlements, p_generation_ids uuid[], p_credits integer, p_last_fair_key bigint),
private.check_batch_size(p_prompts text[], p_max_batch integer),
private.check_cron(),
private.check_import_options(p_options jsonb),
private.check_limits(p_entitlement public.entitlements, p_plan private.plans),
private.check_model(p_model public.models),
private.check_params(p_model public.models, p_params jsonb),
private.check_reuse(p_params jsonb),
private.check_rights(p_functions text[]),
private.check_storage(),
private.check_template(p_title text, p_prompt text, p_model text),
private.check_template_count(p_user_id uuid),
private.check_webhook_url(p_url text),
private.compact_ledger(p_user_id uuid, p_at_most integer),
private.complete_input(p_model public.models, p_prepared jsonb, p_prompt text),
private.count_claims(p_job_id uuid),
private.count_images(p_model public.models, p_provider_input jsonb),
private.counts_images(p_snake text, p_rules jsonb),
private.delete_webhook(p_webhook_id uuid),
private.depth_health(),
private.draft_generation(p_model public.models, p_name text, p_user_id uuid, p_prompt text, p_params jsonb),
private.enable_webhook(p_webhook_id uuid),
private.end_pauses(),
private.end_shares(p_generation_ids uuid[]),
private.end_walk(p_name text, p_place text, p_is_at_end boolean),
private.ended_before(p_job_ids uuid[], p_tokens bigint[], p_outcomes text[]),
private.enqueue_answer(p_generation public.generations, p_is_reused boolean),
private.erase_generations_of_deleted_user(),
private.erase_ledger(p_user_id uuid),
private.erase_ledger_of_deleted_user(),
private.expire_deleted(p_at_most integer),
private.expire_files_of_deleted_user(),
private.expire_generations(p_ids uuid[], p_only_deleted boolean),
private.expire_old(p_at_most integer),
private.expire_orphans(p_at_most integer),
private.find_batch_by_key(p_user_id uuid, p_key text, p_request_hash text),
private.find_count(p_schemas jsonb),
private.find_generation_by_key(p_user_id uuid, p_key text, p_model text, p_prompt text, p_params jsonb),
private.find_grant(p_user_id uuid, p_amount integer, p_kind text, p_external_id text),
private.find_prompt(p_schemas jsonb),
private.find_retry(p_generation_id uuid),
private.find_reusable(p_user_id uuid, p_model public.models, p_provider_input jsonb),
private.finish_canceled(p_user_id uuid, p_job_id uuid, p_was_begun boolean),
private.finish_canceled_job(p_job private.running_jobs, p_code text, p_detail text, p_metrics jsonb),
private.finish_completed(p_job_ids uuid[], p_tokens bigint[], p_images jsonb[], p_metrics jsonb[], OUT jobs private.running_jobs[], OUT metrics jsonb[], OUT stored integer[], OUT charged integer[], OUT prices integer[]),
private.finish_delivery(p_delivery_id uuid, p_token bigint, p_outcome text, p_status integer, p_error text, p_retry_after_seconds double precision),
private.finish_failed(p_job private.running_jobs, p_error private.error_codes),
private.finish_generation(p_job_id uuid, p_status text, p_error private.error_codes),
private.fit_side(p_rules jsonb, p_pixels numeric),
private.forecast(p_generation public.generations, p_at_most integer, OUT queue_position integer, OUT eta_seconds numeric, OUT due_seconds double precision),
private.forget_held(p_model_id text),
private.found_webhook(p_endpoint private.webhook_endpoints),
private.free_slots(p_else double precision),
private.grant_credits(p_user_id uuid, p_amount integer, p_kind text, p_external_id text),
private.has_image(p_path text),
private.has_later_push(p_delivery private.deliveries, p_batch_id uuid),
private.has_waited(p_interval interval),
private.health_alerts(p_health jsonb),
private.health_with(p_depth jsonb),
private.history_of_models(p_since timestamp with time zone, p_bucket interval),
private.history_of_queue(p_since timestamp with time zone, p_bucket interval),
private.hold_passed_jobs(p_blocked jsonb, p_from bigint, p_last bigint),
private.host_problem(p_host text),
private.images_json(p_generation_id uuid),
private.import_model(p_model jsonb, p_options jsonb, p_dry_run boolean),
private.input_problem(p_value jsonb, p_property jsonb),
private.insert_generations(p_entitlement public.entitlements, p_plan private.plans, p_model public.models, p_draft public.generations, p_prompts text[], p_inputs jsonb[], p_is_free boolean),
private.is_free_text(p_rules jsonb),
private.is_live(p_job_id uuid),
private.is_needed_again(p_file private.expired_files),
private.is_operators(p_snake text, p_rules jsonb, p_prose text),
private.is_orphan(p_bucket text, p_path text, p_changed_at timestamp with time zone),
private.is_public_address(p_host text),
private.is_put_off(p_due regclass),
private.is_shared_path(p_path text),
private.items_problem(p_value jsonb, p_items jsonb),
private.lease_deliveries(p_lane text, p_at_most integer),
private.length_problem(p_length integer, p_property jsonb, p_unit text, p_default_max integer),
private.limit_rules(p_snake text, p_rules jsonb, p_takes_image boolean),
private.list_deliveries(p_state text, p_at_most integer),
private.list_webhooks(),
private.lock_entitlement(p_user_id uuid),
private.lock_jobs(p_user_id uuid),
private.lock_models_to_hold(p_blocked jsonb, p_model_ids text[]),
private.lock_next_jobs(p_at_most integer, p_from bigint, p_blocked jsonb),
private.lock_stale_jobs(p_at_most integer),
private.map_inputs(p_schemas jsonb),
private.map_model(p_model jsonb),
private.measure_queue(p_health jsonb),
private.measure_surroundings(p_health jsonb),
private.measure_workers(p_health jsonb),
private.merge_client_inputs(p_old public.models, p_mapped jsonb, p_options jsonb),
private.merge_model(p_old public.models, p_mapped jsonb, p_options jsonb),
private.model_properties(p_schemas jsonb),
private.model_schemas(p_model jsonb),
private.name_cron_faults(),
private.name_storage_faults(),
private.name_vacuum_holders(),
private.nearest_size(p_model public.models, p_width numeric, p_height numeric),
private.needs_prompt(p_model public.models),
private.new_webhook_secret(),
private.note_failure(p_job private.running_jobs, p_code text),
private.number_problem(p_number numeric, p_property jsonb),
private.open_breaker(p_name text, p_reason text),
private.outcomes_by_model(p_window interval),
private.output_problem(p_output jsonb, p_prose text),
private.output_prose(p_model jsonb, p_schemas jsonb),
private.overtaking_share(p_distance bigint, p_slot_count integer),
private.pause_model(p_model text, p_until timestamp with time zone, p_reason text),
private.pause_provider(p_provider text, p_seconds integer, p_reason text),
private.paused_until(p_model public.models),
private.pick_jobs(p_at_most integer),
private.pick_unblocked_jobs(p_at_most integer),
private.pixels_of_shape(p_model public.models, p_shape numeric),
private.play_queue(p_slots double precision[], p_ahead double precision[], p_exactly integer),
private.prepare_batch(p_model public.models, p_user_id uuid, p_prompts text[], p_params jsonb),
private.prepare_params(p_model public.models, p_user_id uuid, p_params jsonb),
private.promote_due_jobs(p_at_most integer),
private.push_body(p_delivery private.deliveries),
private.put_off(p_due regclass, p_began timestamp with time zone, p_at_most double precision),
private.queue_health(),
private.queue_history(p_since timestamp with time zone, p_bucket_seconds integer, p_at_most integer),
private.queue_report(),
private.queued_seconds(p_job private.ready_jobs, p_position integer, p_mean_seconds double precision),
private.read_request(p_prompts text[], p_params jsonb, p_idempotency_key text),
private.read_side(p_params jsonb, p_name text),
private.recent_broken_books(p_at_most integer),
private.record_attempts(p_jobs private.running_jobs[], p_outcome text, p_metrics jsonb[], p_error_code text, p_error_detail text),
private.record_events(p_job_ids uuid[], p_status text),
private.redeliver(p_delivery_id uuid),
private.redeliver_dead(p_webhook_id uuid),
private.redelivery_delay(p_delivery private.deliveries, p_retry_after_seconds double precision),
private.redrive_failed(p_code text, p_since timestamp with time zone, p_at_most integer),
private.redrive_generation(p_old public.generations),
private.refund_missing_images(p_jobs private.running_jobs[], p_stored integer[], p_charged integer[], p_prices integer[]),
private.refuse_for_now(p_status integer, p_token text, p_detail text, p_retry_after_seconds integer),
private.refuse_model(p_reason text),
private.refuse_paused(p_model_id text, p_until timestamp with time zone),
private.refuse_price(p_entitlement public.entitlements, p_credits bigint),
private.refuse_unknown_template(),
private.refuse_used_key(),
private.register_webhook(p_url text, p_events text[], p_description text),
private.release_held_jobs(p_at_most integer, p_blocked jsonb),
private.remaining_seconds(p_job private.running_jobs, p_mean_seconds double precision),
private.report_alerts(),
private.report_errors(p_window interval),
private.report_holders(p_at_most integer),
private.report_models(p_window interval),
private.report_recent(p_at_most integer, p_window interval),
private.report_running(p_at_most integer),
private.report_workers(),
private.requeue_job(p_job private.running_jobs, p_attempts_used integer, p_delay interval, p_resumes boolean),
private.require_breaker_name(p_name text),
private.require_known_user_id(),
private.require_model(p_name text, p_user_id uuid, p_plan text),
private.require_retryable(p_job_id uuid, p_user_id uuid),
private.require_user_id(),
private.resolve_alias(p_alias_id text, p_user_id uuid, p_plan text),
private.resolve_schema(p_node jsonb, p_schemas jsonb, p_path text[]),
private.resolve_union(p_node jsonb, p_schemas jsonb, p_path text[]),
private.resume_model(p_model text),
private.rotate_webhook_secret(p_webhook_id uuid),
private.routine_health(),
private.rules_of(p_node jsonb),
private.running_health(),
private.running_job(p_job_id uuid),
private.scan_start(p_pause double precision),
private.schedule_scan(p_from bigint, p_began timestamp with time zone),
private.set_default_input(),
private.set_paid(p_user_id uuid, p_paid_until timestamp with time zone),
private.shared_image_json(p_image public.images, p_user_id uuid),
private.snake_case(p_name text),
private.takes_file(p_rules jsonb),
private.takes_image(p_snake text, p_rules jsonb, p_prose text),
private.trim_attempts(p_at_most integer),
private.trim_deliveries(p_at_most integer),
private.trim_ledger(p_at_most integer),
private.unwrap_params(p_text text),
private.waiting_seconds(p_job private.ready_jobs, p_ahead double precision[], p_else double precision),
private.walk_generations(p_user_id uuid, p_before uuid, p_only_favorites boolean, p_tag text, p_at_most integer),
private.webhook_body(p_delivery private.deliveries),
private.without_prompt(p_detail text, p_prompt text),
private.worker_health();

drop view
private.broken_books,
private.costs,
private.paused_now,
private.recent_attempts;

alter table private.breakers drop column has_held;

alter table private.ready_jobs drop column is_held;

alter table private.settings drop column keep_ledger, drop column watch_window;

alter table public.batches drop column job_count;

alter table public.entitlements drop column is_paid;

drop table private.queue_state;

drop sequence if exists private.full_scan_due;

drop sequence if exists private.low_scan_due;

-- The second edition, but for what was there already.

revoke all on all tables in schema private from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

revoke all on all sequences in schema private from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

revoke all on public.batches from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

revoke all on public.credit_ledger from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

revoke all on public.entitlements from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

revoke all on public.generation_tags from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

revoke all on public.generations from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

revoke all on public.image_likes from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

revoke all on public.images from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

revoke all on public.model_aliases from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

revoke all on public.models from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

revoke all on public.prompt_templates from public, anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

alter role darkroom_worker set statement_timeout = '30s';

alter role darkroom_worker set idle_in_transaction_session_timeout = '15s';

alter role darkroom_monitor set statement_timeout = '10s';

alter role darkroom_monitor set idle_in_transaction_session_timeout = '15s';

alter role darkroom_monitor set default_transaction_read_only = on;

revoke all on schema private from public;

grant usage on schema private
to anon, authenticated, service_role, darkroom_worker, darkroom_monitor;

create or replace function private.uuid_v7() returns uuid
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_us bigint := date_part('epoch', clock_timestamp()) * 1000000;
begin
  return encode(
    int8send(v_us / 1000 * 65536 + 28672 + v_us % 1000 * 4096 / 1000)
    || substring(uuid_send(gen_random_uuid()) from 9),
    'hex'
  )::uuid;
end;
$$;

create domain public.credits as integer constraint credits_are_not_negative check (value >= 0);

create domain public.image_count as smallint
constraint image_count_is_positive check (value > 0);

create domain public.params as jsonb
constraint params_are_an_object check (jsonb_typeof(value) = 'object');

create or replace function private.fits_status(
  p_status text, p_error_code text, p_finished_at timestamptz, p_deleted_at timestamptz
) returns boolean
language plpgsql immutable set search_path = pg_catalog, pg_temp as $$
begin
  return (p_finished_at is null) = (p_status in ('queued', 'processing'))
    and (p_error_code is not null) = (p_status = 'failed')
    -- A deleted one is hidden: no job may run unseen, nor be counted as active.
    and (p_deleted_at is null or p_finished_at is not null);
end;
$$;

alter table public.entitlements
  alter column credits type public.credits,
  add column if not exists day_started_at timestamp with time zone default '-infinity'::timestamp with time zone not null,
  add column if not exists day_jobs integer default 0 not null,
  add column if not exists day_burned integer default 0 not null;

comment on column public.entitlements.paid_until is
  'End of the paid plan; infinity for one without end, null for none.';

comment on column public.entitlements.credits is
  'Balance in credits: the sum of the user''s ledger amounts.';

comment on column public.entitlements.minute_jobs is
  'Jobs enqueued since minute_started_at, also those canceled since.';

comment on column public.entitlements.day_burned is
  'Jobs canceled since day_started_at that the provider may bill us.';

alter table public.credit_ledger
  alter column balance_after type public.credits;

comment on table public.credit_ledger is
  'Append-only entries that explain every balance. No row is ever updated, and none of a user who '
  'is here is deleted.';

comment on column public.credit_ledger.kind is
  'grant, charge (of a generation), refund (of one), adjust, or carry: the sum of older entries, '
  'as the first edition made it.';

alter table public.batches
  add column if not exists job_ids uuid[] default '{}'::uuid[] not null;

comment on column public.batches.job_ids is 'In the order of the prompts; also those erased since.';

alter table public.generations
  add column if not exists tags text[] default '{}'::text[] not null,
  alter column image_count type public.image_count,
  alter column input type public.params,
  alter column price_credits type public.credits;

comment on column public.generations.status is
  'queued -> processing (claim) -> completed | failed | canceled | queued again (retry, release).';

comment on column public.generations.price_credits is
  'Credits charged for the whole generation at enqueue.';

create table private.retries (
  retry_of uuid,
  generation_id uuid,
  primary key (retry_of, generation_id)
);

comment on table private.retries is 'generations.retry_of, to be found by it.';

alter table public.models
  add column if not exists required_inputs text[] default '{}'::text[] not null,
  add column if not exists lowest_seed bigint,
  add column if not exists highest_seed bigint;

comment on column public.models.default_input is
  'What input_schema gives for what nobody says. This and the next three are kept by a trigger.';

comment on column public.models.required_inputs is
  'The client inputs that nobody else gives a value.';

comment on column public.models.lowest_seed is
  'From here to highest_seed a seed is chosen where nobody says one; null: the model has none.';

create or replace function private.set_derived_inputs() returns trigger
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  new.default_input := (
    select coalesce(jsonb_object_agg(p.key, p.value -> 'default'), '{}')
    from jsonb_each(new.input_schema -> 'properties') as p
    where p.value ? 'default' and not (p.key = 'seed' and p.value ->> 'type' = 'integer')
  );
  new.required_inputs := array(
    select i.name from unnest(new.client_inputs) as i (name)
    where new.input_schema -> 'required' ? i.name and i.name <> 'seed'
      and not new.input_schema #> array['properties', i.name] ? 'default'
      and not new.operator_input ? i.name
  );
  new.lowest_seed := null;
  new.highest_seed := null;
  if new.input_schema #>> '{properties,seed,type}' = 'integer' then
    new.lowest_seed := greatest(
      0, (new.input_schema #>> '{properties,seed,minimum}')::numeric
    );
    new.highest_seed := least(
      2147483647, (new.input_schema #>> '{properties,seed,maximum}')::numeric
    );
  end if;
  return new;
end;
$$;

create sequence private.scan_due minvalue 0 start 0;

comment on sequence private.scan_due is
  'When ready_jobs may next be read from its start, in milliseconds since 1970: see '
  'private.put_off().';

alter table private.ready_jobs
  add column if not exists input_sha256 bytea;

comment on column private.ready_jobs.input_sha256 is
  'What it asked for then: see running_jobs.input_sha256.';

create index ready_jobs_model_idx on private.ready_jobs (model_id, fair_key, seq)
where run_at is null;

alter table private.running_jobs
  add column if not exists input_sha256 bytea;

comment on column private.running_jobs.input_sha256 is
  'Of what the provider was last asked to create, where that has addresses of sources: they are '
  'made anew each time. null with such a job: nothing was asked for.';

alter table private.attempts
  alter column cost_usd type numeric(18,6),
  alter column provider_images type integer;

comment on column private.attempts.provider_images is 'Images the provider made, as it bills them.';

create table private.purchases (
  generation_id uuid not null references public.generations (id) on delete cascade,
  provider_job_id text not null,
  primary key (generation_id, provider_job_id),
  unique (provider_job_id)
);

comment on table private.purchases is
  'The provider''s jobs that ours have bought, from when the id is known until the generation is '
  'erased. No two jobs have the same one, whatever a provider answers.';

alter table private.plans
  add column if not exists full_minutes_per_day smallint default 30 not null,
  add column if not exists max_burned_per_day integer default 5 not null,
  add column if not exists looked_at timestamp with time zone default now() not null,
  add column if not exists oldest_ready_at timestamp with time zone;

alter table private.plans set (fillfactor=50);

comment on column private.plans.full_minutes_per_day is
  'Times max_per_minute: jobs enqueued in a day, each of which keeps its row.';

comment on column private.plans.max_burned_per_day is
  'Jobs of a day that a user may cancel when the provider may bill us already; then no more are '
  'let in.';

comment on column private.plans.oldest_ready_at is
  'queued_at of the job that could be claimed longest at looked_at; null: there was none. Too dear '
  'to look up in every enqueue, and here because each of them reads its plan.';

alter table private.settings
  add column if not exists broadcasts boolean default true not null,
  alter column breaker_users set default 3,
  alter column keep_inputs set default '30 days'::interval,
  add column if not exists max_input_files integer default 100 not null;

comment on column private.settings.broadcasts is
  'Whether each new state of a job is broadcast where Supabase Realtime is; else clients poll.';

comment on column private.settings.breaker_users is
  'From how many users the failures must come, for no few users'' input pauses a model for all.';

comment on table private.alert_rules is
  'When queue_health() raises an alert, how bad that is (warning: look today; critical: users '
  'notice now), and what to do about it.';

comment on column private.alert_rules.threshold is
  'Raised above so many of the unit; null: never.';

comment on table private.routines is
  'What runs by itself, when it last ran to its end, and what it found, where that is worth '
  'keeping (check_books).';

create table private.skipped_rows (
  step text,
  key text,
  code text not null,
  problem text not null,
  times integer not null default 1,
  first_at timestamptz not null default now(),
  last_at timestamptz not null default now(),
  primary key (step, key)
);

comment on table private.skipped_rows is
  'What routines over many users could not do and passed over. Forgotten once it is done, or a '
  'week after the last try; whoever mends a row may delete its line.';

comment on column private.skipped_rows.step is 'The function or table the row was met in.';

comment on column private.skipped_rows.key is 'Which row; * if the step failed as a whole.';

comment on column private.skipped_rows.code is 'SQLSTATE of the last try; problem is its message.';

create or replace function private.note_skipped(
  p_step text, p_key text, p_code text, p_problem text
) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  update private.skipped_rows
  set code = p_code, problem = left(p_problem, 500), times = times + 1, last_at = now()
  where ctid = any (array(
    select s.ctid from private.skipped_rows as s
    where (s.step, s.key) = (p_step, left(p_key, 200)) for update skip locked
  ));
  if not found then
    insert into private.skipped_rows (step, key, code, problem)
    select p_step, left(p_key, 200), p_code, left(p_problem, 500)
    where (select count(*) < 1000 from private.skipped_rows)
    on conflict (step, key) do nothing;
  end if;
end;
$$;

create or replace function private.skip_failing(p_statement text, p_keys anyarray) returns integer
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_step text := substring(p_statement from 'private\.(\w+)');
  v_half integer := cardinality(p_keys) / 2;
  v_done text;
begin
  if coalesce(cardinality(p_keys), 0) = 0 then
    return 0;
  end if;
  begin
    execute p_statement into v_done using p_keys;
    delete from private.skipped_rows where ctid = any (array(
      select s.ctid from private.skipped_rows as s
      where s.step = v_step and s.key = any (p_keys::text[]) for update skip locked
    ));
    return coalesce(nullif(v_done, '')::integer, 0);
  exception when others then
    if sqlstate ~ '^(25|42|53|57|58)' then
      raise;
    elsif v_half = 0 then
      perform private.note_skipped(v_step, p_keys[1]::text, sqlstate, sqlerrm);
      return 0;
    end if;
  end;
  return private.skip_failing(p_statement, p_keys[:v_half])
    + private.skip_failing(p_statement, p_keys[v_half + 1:]);
end;
$$;

revoke all on table public.entitlements, public.credit_ledger, public.models,
public.model_aliases, public.batches, public.generations, public.images
from public, anon, authenticated, service_role;

revoke all on sequence public.credit_ledger_id_seq from public, anon, authenticated, service_role;

revoke all on domain public.job_status, public.ledger_kind, public.credits, public.image_count,
public.params, private.job_stage, private.attempt_outcome
from public, anon, authenticated, service_role;

grant select on table public.entitlements, public.credit_ledger, public.batches,
public.generations, public.images to authenticated, service_role;

grant select, insert, update on table public.models to service_role;

grant select, insert, update, delete on table public.model_aliases to service_role;

create or replace function private.caller_id() returns uuid
language plpgsql stable security definer set search_path = pg_catalog, pg_temp as $$
begin
  return coalesce(
    nullif(current_setting('request.jwt.claim.sub', true), ''),
    nullif(current_setting('request.jwt.claims', true), '')::jsonb ->> 'sub'
  )::uuid;
exception when data_exception then
  perform private.refuse(
    'not_authenticated', 'The sub of the token is no user''s id.', 'Sign in again.'
  );
  return null;
end;
$$;

create policy "Users read their own entitlement" on public.entitlements
for select to authenticated using (user_id = (select private.caller_id()));

create policy "Users read their own ledger" on public.credit_ledger
for select to authenticated using (user_id = (select private.caller_id()));

create policy "Users read their own batches" on public.batches
for select to authenticated using (user_id = (select private.caller_id()));

create policy "Users read their own generations" on public.generations
for select to authenticated using (user_id = (select private.caller_id()) and deleted_at is null);

create policy "Users read their own images" on public.images
for select to authenticated using (
  user_id = (select private.caller_id())
  and exists (
    select from public.generations as g
    where g.id = images.generation_id
  )
);

create or replace function private.may_store_input(p_path text) returns boolean
language plpgsql stable security definer set search_path = pg_catalog, pg_temp as $$
begin
  return octet_length(p_path) <= 512
    and p_path ~ '^[^/]+(/[^/]+)+$' and p_path !~ '/\.\.?(/|$)'
    and (
      -- As a filter: the planner may else read the whole bucket.
      select count(*) filter (where o.bucket_id = 'inputs' and o.name <> p_path)
        < (select s.max_input_files from private.settings as s)
      from storage.objects as o
      -- From <id>/ up to <id>0, the next character: operators that the index of names serves.
      where o.name ~>=~ concat(auth.uid(), '/') and o.name ~<~ concat(auth.uid(), '0')
    );
end;
$$;

do $do$
declare
  v_policies text := $policies$
  create policy "Users read their own generated images" on storage.objects
  for select to authenticated using (
    bucket_id = 'generations' and split_part(name, '/', 1) = (select auth.uid())::text
  );
  create policy "Users read their own input images" on storage.objects
  for select to authenticated using (
    bucket_id = 'inputs' and split_part(name, '/', 1) = (select auth.uid())::text
  );
  create policy "Users add their own input images" on storage.objects
  for insert to authenticated with check (
    bucket_id = 'inputs' and split_part(name, '/', 1) = (select auth.uid())::text
    and private.may_store_input(name)
  );
  create policy "Users replace their own input images" on storage.objects
  for update to authenticated using (
    bucket_id = 'inputs' and split_part(name, '/', 1) = (select auth.uid())::text
  ) with check (
    bucket_id = 'inputs' and split_part(name, '/', 1) = (select auth.uid())::text
    and private.may_store_input(name)
  );
  create policy "Users delete their own input images" on storage.objects
  for delete to authenticated using (
    bucket_id = 'inputs' and split_part(name, '/', 1) = (select auth.uid())::text
  );
$policies$;
begin
  if to_regclass('storage.objects') is null then
    raise notice 'Darkroom: no storage.objects here; buckets and their policies are skipped';
    return;
  end if;
  begin
    execute v_policies;
  exception when insufficient_privilege then
    raise notice 'Darkroom: no right to make policies on storage.objects; until its owner, or '
      'Supabase''s SQL editor, has run these, users reach no file: %', v_policies;
  end;
end;
$do$;

alter table private.breakers
  add column if not exists doubted_users uuid[] default '{}'::uuid[] not null,
  add column if not exists doubted_at timestamp with time zone,
  add column if not exists resumed_at timestamp with time zone;

comment on column private.breakers.failed_users is
  'Different users among the failures. While it is paused their jobs wait and others are tried; '
  'where there are none, everybody''s wait.';

comment on column private.breakers.resumed_at is 'When its last pause ended.';

comment on column private.breakers.doubted_users is
  'Users who failed where others then succeeded: for breaker_pause_cap from doubted_at their '
  'failures count for nobody else.';

create view private.paused_models with (security_invoker = true) as
select
  m.id,
  b.paused_until,
  b.resumed_at
from private.breakers as b
inner join public.models as m on b.name in (m.id, m.provider)
where b.paused_until is not null or b.resumed_at is not null;

comment on view private.paused_models is
  'Models that are or were paused, themselves or with their provider.';

create or replace function private.paused_until(p_model public.models, p_user_id uuid) returns timestamptz
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_until timestamptz;
  v_is_suspected boolean;
begin
  select
    max(b.paused_until) filter (
      where b.paused_until > now() and (b.failed_users = '{}' or p_user_id = any (b.failed_users))
    ),
    bool_or(p_user_id = any (b.failed_users || b.doubted_users))
  into v_until, v_is_suspected
  from private.breakers as b where b.name in (p_model.id, p_model.provider);
  if v_is_suspected then
    v_until := greatest(v_until, (
      select recent.finished_at + s.breaker_window
      from private.settings as s
      cross join lateral (
        select g.finished_at from (
          select * from public.generations where user_id = p_user_id order by id desc limit 100
        ) as g
        inner join private.error_codes as e on e.code = g.error_code and e.trips_breaker
        where g.model_id = p_model.id and g.finished_at > now() - s.breaker_window
        order by g.finished_at desc offset s.breaker_failures - 1 limit 1
      ) as recent
    ));
  end if;
  return v_until;
end;
$$;

create or replace function private.pause_length(p_times integer) returns interval
language sql stable set search_path = pg_catalog, pg_temp as $$
  select least(s.breaker_pause_cap, s.breaker_pause * power(2, least(p_times - 1, 20)))
  from private.settings as s
$$;

create or replace function private.breaker_state(p_breaker private.breakers) returns text
language sql stable set search_path = pg_catalog, pg_temp as $$
  select case
    when p_breaker.paused_until is null then 'closed'
    when p_breaker.times_opened = 0
      then case when p_breaker.paused_until > now() then 'open' else 'closed' end
    when exists (
      select from private.running_jobs as r
      where r.job_id = p_breaker.probe_job_id
        and r.claimed_at > now() - private.pause_length(p_breaker.times_opened)
    ) then 'probing'
    when p_breaker.paused_until > now() then 'open'
    else 'half-open'
  end
$$;

create or replace function private.breaker_json(p_breaker private.breakers) returns json
language sql stable set search_path = pg_catalog, pg_temp as $$
  select json_build_object(
    'name', p_breaker.name,
    'state', b.state,
    'paused_until', case when p_breaker.paused_until > now() then p_breaker.paused_until end,
    'reason', case when b.state <> 'closed' then p_breaker.pause_reason end,
    'failures', p_breaker.failures,
    'times_opened', p_breaker.times_opened
  )
  from (select private.breaker_state(p_breaker) as state) as b
$$;

create or replace function private.admits(p_breaker private.breakers, p_user_id uuid) returns boolean
language sql stable set search_path = pg_catalog, pg_temp as $$
  select case private.breaker_state(p_breaker)
    when 'open' then cardinality(p_breaker.failed_users) between 1 and 99
      and not p_user_id = any (p_breaker.failed_users)
    when 'probing' then false
    else true
  end
$$;

create or replace function private.is_doubted(p_breaker private.breakers, p_user_id uuid) returns boolean
language sql stable set search_path = pg_catalog, pg_temp as $$
  select coalesce(
    p_user_id = any (p_breaker.doubted_users)
      and p_breaker.doubted_at > now() - s.breaker_pause_cap,
    false
  )
  from private.settings as s
$$;

create or replace function private.count_failure(
  p_name text, p_job private.running_jobs, p_code text, p_threshold integer
) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_breaker private.breakers := (select b from private.breakers as b where b.name = p_name);
  v_settings private.settings := (select s from private.settings as s);
  v_is_closed boolean := private.breaker_state(v_breaker) = 'closed';
  v_opens boolean;
begin
  -- Neither who is doubted counts, nor what fails while an operator's pause lasts.
  if (v_is_closed and private.is_doubted(v_breaker, p_job.user_id))
    or (not v_is_closed and v_breaker.times_opened = 0) then
    return;
  end if;
  if v_is_closed and v_breaker.failing_since > now() - v_settings.breaker_window is not true then
    v_breaker.failures := 0;
    v_breaker.failing_since := now();
    v_breaker.failed_users := '{}';
  end if;
  -- Where everybody waits, nobody in particular does.
  if cardinality(v_breaker.failed_users) between (not v_is_closed)::integer and 99
    and not p_job.user_id = any (v_breaker.failed_users) then
    v_breaker.failed_users := v_breaker.failed_users || p_job.user_id;
  end if;
  if v_is_closed then
    v_breaker.failures := v_breaker.failures + 1;
    v_opens := v_breaker.failures >= p_threshold
      and cardinality(v_breaker.failed_users) >= v_settings.breaker_users;
  else
    v_opens := v_breaker.probe_job_id = p_job.job_id and v_breaker.paused_until <= now();
  end if;
  if v_opens then
    v_breaker.pause_reason := case
      when v_is_closed then format('%s failures in a row, the last: %s', v_breaker.failures, p_code)
      else format('the probe failed: %s', p_code)
    end;
    v_breaker.failures := 0;
    v_breaker.times_opened := least(v_breaker.times_opened + 1, 1000);
    v_breaker.paused_until := now() + private.pause_length(v_breaker.times_opened);
  end if;
  update private.breakers set
    failures = v_breaker.failures, failing_since = v_breaker.failing_since,
    failed_users = v_breaker.failed_users, times_opened = v_breaker.times_opened,
    paused_until = v_breaker.paused_until, pause_reason = v_breaker.pause_reason
  where name = p_name;
end;
$$;

create or replace function private.note_failures(p_jobs private.running_jobs[], p_codes text[]) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_settings private.settings := (select s from private.settings as s);
  v_job private.running_jobs;
  v_at bigint;
  v_provider text;
begin
  for v_at, v_provider in
    select j.ordinality, m.provider
    from unnest(p_jobs) with ordinality as j
    inner join private.error_codes as e on e.code = p_codes[j.ordinality] and e.trips_breaker
    inner join public.models as m on m.id = j.model_id
    order by m.provider, j.model_id, j.ordinality
  loop
    v_job := p_jobs[v_at];
    insert into private.breakers (name) values (v_provider), (v_job.model_id)
    on conflict do nothing;
    perform from private.breakers where name = v_provider for update;
    perform from private.breakers where name = v_job.model_id for update;
    if exists (
      select from private.breakers as b
      where (b.name = v_provider and b.probe_job_id = v_job.job_id)
        or (b.name = v_job.model_id and private.breaker_state(b) = 'closed')
    ) then
      perform private.count_failure(
        v_provider, v_job, p_codes[v_at], v_settings.breaker_provider_failures
      );
    end if;
    perform private.count_failure(
      v_job.model_id, v_job, p_codes[v_at], v_settings.breaker_failures
    );
  end loop;
end;
$$;

create or replace function private.note_successes(p_jobs private.running_jobs[]) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_job record;
  v_is_resumed boolean;
begin
  for v_job in
    select j.job_id, j.user_id, j.claimed_at, names.name
    from unnest(p_jobs) as j
    left join public.models as m on m.id = j.model_id
    cross join lateral (values (1, m.provider), (2, j.model_id)) as names (place, name)
    order by m.provider, names.place, j.model_id
  loop
    update private.breakers as b set
      doubted_users = case
        when b.failed_users <> '{}' and (b.times_opened = 0 or b.paused_until > now())
          then (array_remove(
            b.failed_users
            || case when b.doubted_at > now() - s.breaker_pause_cap then b.doubted_users end,
            v_job.user_id
          ))[:200]
        else b.doubted_users
      end,
      doubted_at = case
        when b.failed_users <> '{}' and (b.times_opened = 0 or b.paused_until > now()) then now()
        else b.doubted_at
      end,
      failures = 0, failing_since = null, failed_users = '{}', times_opened = 0,
      paused_until = null, pause_reason = null, probe_job_id = null,
      resumed_at = case when b.times_opened > 0 then now() else b.resumed_at end
    from private.settings as s
    where b.name = v_job.name and case b.times_opened
      when 0 then b.failures > 0
      else v_job.claimed_at > b.failing_since or v_job.job_id = b.probe_job_id
    end
    returning b.resumed_at = now() into v_is_resumed;
    if v_is_resumed then
      perform setval('private.scan_due', 0);  -- what waited may be far below the virtual clock
      perform private.wake_workers();
    end if;
  end loop;
end;
$$;

create or replace function private.pause_provider(
  p_provider text, p_seconds integer, p_reason text, p_user_id uuid default null
) returns boolean
language sql security definer set search_path = pg_catalog, pg_temp as $$
  insert into private.breakers as b (
    name, paused_until, pause_reason, times_opened, failing_since, failed_users
  )
  select
    p_provider, now() + least(p_seconds, 3600) * interval '1 second', left(p_reason, 500), 1,
    now(), array_remove(array[p_user_id], null)
  where exists (select from public.models as m where m.provider = p_provider)
  on conflict (name) do update set
    paused_until = greatest(b.paused_until, excluded.paused_until),
    pause_reason = excluded.pause_reason,
    times_opened = greatest(b.times_opened, 1),
    failing_since = case when b.times_opened = 0 then now() else b.failing_since end,
    failed_users = case
      when b.times_opened = 0 then excluded.failed_users
      when p_user_id is null or b.failed_users = '{}' then '{}'
      when p_user_id = any (b.failed_users) then b.failed_users
      else b.failed_users || p_user_id
    end,
    probe_job_id = null
  where (b.times_opened > 0 or b.paused_until > now() is not true)
    and (b.times_opened > 0 or not private.is_doubted(b, p_user_id));
  select exists (
    select from private.breakers as b where b.name = p_provider and b.paused_until > now()
  )
$$;

comment on function private.pause_provider is
  'Keeps the jobs of a provider from being claimed for a while: the account was refused, and no '
  'job is to blame. Nothing fails and nobody is charged for it. With a user, where it is not sure '
  'that others would be refused, too: theirs wait, others'' are tried one by one. Answers whether '
  'it is paused now; not where others were served lately though this user failed: then the job is '
  'to blame.';

create or replace function private.set_pause(p_name text, p_until timestamptz, p_reason text) returns json
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_breaker private.breakers;
begin
  if not exists (select from public.models as m where p_name in (m.id, m.provider)) then
    perform private.refuse_missing(
      'model: no such model or provider',
      'Use the id of a model or the name of a provider in public.models.'
    );
  end if;
  insert into private.breakers as b (name, paused_until, pause_reason)
  values (p_name, p_until, p_reason)
  on conflict (name) do update set
    failures = 0, failing_since = null, failed_users = '{}', times_opened = 0, probe_job_id = null,
    paused_until = excluded.paused_until, pause_reason = excluded.pause_reason,
    resumed_at = case
      when p_until is null and b.paused_until is not null then now()
      else b.resumed_at
    end
  returning * into v_breaker;
  return private.breaker_json(v_breaker);
end;
$$;

create or replace function public.pause_model(
  model text, until timestamptz default 'infinity', reason text default null
) returns json
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  perform private.require_writable();
  if coalesce(until <= now(), true) then
    perform private.refuse_input(
      'until: not in the future', 'Leave it out to pause until resumed.'
    );
  elsif length(reason) > 500 then
    perform private.refuse_input('reason: longer than 500 characters');
  end if;
  return private.set_pause(model, until, reason);
end;
$$;

create or replace function public.resume_model(model text) returns json
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_answer json;
begin
  perform private.require_writable();
  v_answer := private.set_pause(model, null, null);
  perform setval('private.scan_due', 0);
  perform private.wake_workers();
  return v_answer;
end;
$$;

create or replace function private.refuse(
  p_token text, p_detail text, p_hint text default null, p_retry_after integer default null
) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_status integer := (jsonb '{
    "invalid_input": 400, "not_authenticated": 401, "insufficient_credits": 402,
    "requires_paid_plan": 403, "not_found": 404, "method_not_allowed": 405,
    "idempotency_conflict": 409, "not_finished": 409, "already_finished": 409,
    "too_many_active": 429, "rate_limited": 429,
    "busy": 503, "model_paused": 503, "unavailable": 503
  }' ->> p_token)::integer;
begin
  if p_retry_after is null then
    raise exception using
      errcode = 'PT' || v_status, message = p_token, detail = p_detail, hint = coalesce(
        p_hint, 'Correct the argument and call again.'
      );
  end if;
  raise sqlstate 'PGRST' using
    message = json_build_object(
      'code', 'PT' || v_status,
      'message', p_token,
      'details', p_detail,
      'hint', format('Try again in %s seconds.', p_retry_after)
    )::text,
    detail = json_build_object(
      'status', v_status, 'headers', json_build_object('Retry-After', p_retry_after::text)
    )::text;
end;
$$;

create or replace function private.refuse_input(p_detail text, p_hint text default null) returns void
language sql set search_path = pg_catalog, pg_temp
return private.refuse('invalid_input', p_detail, p_hint);

create or replace function private.refuse_missing(p_detail text, p_hint text) returns void
language sql set search_path = pg_catalog, pg_temp
return private.refuse('not_found', p_detail, p_hint);

create or replace function private.refuse_unknown_user() returns void
language sql set search_path = pg_catalog, pg_temp
return private.refuse(
  'not_authenticated', 'There is no such user any more.', 'Sign in again.'
);

create or replace function private.require_writable() returns void
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
begin
  if current_setting('transaction_read_only') = 'off'
    and current_setting('default_transaction_read_only') = 'off' then
    return;
  elsif current_setting('request.method', true) in ('GET', 'HEAD') then
    perform private.refuse(
      'method_not_allowed', 'This function changes something.', 'Call it by POST.'
    );
  end if;
  perform private.refuse(
    'unavailable', 'The database takes no changes at the moment.', p_retry_after => 30
  );
end;
$$;

create or replace function private.require_user_id(p_writes boolean default false) returns uuid
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_user_id uuid := private.caller_id();
begin
  if v_user_id is null then
    perform private.refuse(
      'not_authenticated', 'The request carries no user.',
      'Sign in and send the access token as Authorization: Bearer.'
    );
  elsif p_writes then
    perform private.require_writable();
  end if;
  return v_user_id;
end;
$$;

create or replace function private.require_known_user_id(p_writes boolean default false) returns uuid
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_user_id uuid := private.require_user_id(p_writes);
begin
  if not exists (select from public.entitlements where user_id = v_user_id) then
    perform private.refuse_unknown_user();
  end if;
  return v_user_id;
end;
$$;

create or replace function private.refuse_unknown_job() returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  perform private.require_known_user_id();
  perform private.refuse_missing(
    'job_id: no such job of yours', 'Use the job_id that enqueue_generation answered.'
  );
end;
$$;

create or replace function private.read_request(
  p_prompts text[], p_params jsonb, p_idempotency_key text, p_field text default 'prompt'
) returns jsonb
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_params jsonb := coalesce(p_params, '{}');
  v_max_bytes integer;
  v_max_chars integer;
begin
  select s.max_params_bytes, s.max_prompt_chars into v_max_bytes, v_max_chars
  from private.settings as s;
  if jsonb_typeof(v_params) = 'string' and pg_column_size(v_params) <= 2 * v_max_bytes then
    begin
      v_params := (v_params #>> '{}')::jsonb;
    exception
      when invalid_text_representation or untranslatable_character or numeric_value_out_of_range
        or statement_too_complex then
        v_params := 'null';
    end;
  end if;
  -- Measured before anything is written out: in memory no JSON has more than eight times the bytes
  -- of its text, and what has less than 500 holds too few numbers to come to much. 1e131071 is
  -- eight bytes on the way in, sixteen here, and 131 kB once it is written, 0e-16383 likewise. No
  -- schema has a use for one.
  if pg_column_size(v_params) between 500 and 8 * v_max_bytes and exists (
    select from jsonb_path_query(v_params, 'strict $.** ? (@.type() == "number")') as n (value)
    where abs(n.value::numeric) >= 1e400 or scale(n.value::numeric) > 400
  ) then
    perform private.refuse_input('params: a number of more than 400 digits');
  elsif pg_column_size(v_params) > 8 * v_max_bytes
    or octet_length(v_params::text) > v_max_bytes then
    perform private.refuse_input(format('params: longer than %s bytes', v_max_bytes));
  elsif jsonb_typeof(v_params) <> 'object' then
    perform private.refuse_input(
      'params: not a JSON object', 'Send an object such as {"seed": 7}, or leave it out.'
    );
  elsif octet_length(p_idempotency_key) not between 1 and 200 then
    perform private.refuse_input(
      'idempotency_key: not 1 to 200 bytes', 'Use a UUID made on the device.'
    );
  end if;
  for v_at in 1 .. cardinality(p_prompts) loop
    -- Bytes first: counting the characters of a hundred megabytes is work for nothing.
    if octet_length(p_prompts[v_at]) > 4 * v_max_chars
      or length(p_prompts[v_at]) > v_max_chars then
      perform private.refuse_input(
        format(p_field || ': longer than %2$s characters', v_at - 1, v_max_chars)
      );
    end if;
  end loop;
  return v_params;
end;
$$;

create or replace function private.plan_of(p_entitlement public.entitlements) returns private.plans
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
begin
  return (select p from private.plans as p where p.name = case
    when p_entitlement.paid_until > now() then 'paid' else 'free'
  end);
end;
$$;

create type private.gate as (
  user_id uuid,
  credits integer,
  last_fair_key bigint,
  plan text,
  weight integer,
  max_active integer,
  max_batch integer,
  may_be_over_limits boolean,
  is_model_unclear boolean,
  model public.models
);

comment on type private.gate is
  'What a request is held against: the user''s balance and plan, the model, and whether there is '
  'anything to look at more closely. See private.gate().';

create or replace function private.gate(p_user_id uuid, p_model text) returns private.gate
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_gate private.gate;
begin
  select
    e.user_id, e.credits, e.last_fair_key, p.name, p.weight, p.max_active, p.max_batch,
    -- A minute or a day that is over, too: refuse_limits looks closer.
    e.minute_jobs >= p.max_per_minute or e.day_burned >= p.max_burned_per_day
    or e.day_jobs >= p.max_per_minute::bigint * p.full_minutes_per_day
    or least(p.oldest_ready_at, p.looked_at) < now() - p.busy_after,
    m.id is null or (m.requires_paid and p.name <> 'paid') or exists (
      select from private.breakers as b
      where b.paused_until > now() or e.user_id = any (b.failed_users || b.doubted_users)
    ),
    m
  into v_gate
  from (select * from public.entitlements where user_id = p_user_id for update) as e
  inner join private.plans as p
    on p.name = case when e.paid_until > now() then 'paid' else 'free' end
  left join public.models as m on m.id = p_model and m.is_active;
  if not found then
    perform private.refuse_unknown_user();
  end if;
  return v_gate;
end;
$$;

create or replace function private.require_model(p_gate private.gate, p_name text) returns public.models
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_model public.models := p_gate.model;
  v_paused_until timestamptz;
begin
  if v_model.id is null then
    select m.* into v_model
    from public.model_aliases as a
    inner join public.models as m on m.id = a.model_id
    cross join lateral (
      select
        ('x' || left(md5(concat_ws(' ', p_gate.user_id, a.id, m.id)), 12))::bit(48)::bigint as n
    ) as drawn
    where a.id = p_name and a.weight > 0 and m.is_active
      and (p_gate.plan = 'paid' or not m.requires_paid)
    order by
      private.paused_until(m, p_gate.user_id) is not null,
      -ln((drawn.n + 1) / 281474976710657.0) / a.weight
    limit 1;
  end if;
  if v_model.id is null then
    perform private.refuse_missing('model: no such model', 'list_models() names them.');
  elsif v_model.requires_paid and p_gate.plan <> 'paid' then
    perform private.refuse(
      'requires_paid_plan', format('%s is for paid users', v_model.id),
      'Choose another model or a paid plan.'
    );
  end if;
  v_paused_until := private.paused_until(v_model, p_gate.user_id);
  if v_paused_until is not null then
    perform private.refuse(
      'model_paused', format('%s is paused', v_model.id), p_retry_after => ceil(
        extract(epoch from least(v_paused_until, now() + interval '1 hour') - now())
      )::integer
    );
  end if;
  return v_model;
end;
$$;

create or replace function private.is_busy(p_plan private.plans) returns boolean
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  if least(p_plan.oldest_ready_at, p_plan.looked_at) < now() - p_plan.busy_after then
    return exists (
      select from (
        select r.user_id, r.model_id, r.queued_at from private.ready_jobs as r
        where r.run_at is null and r.fair_key >= (select f.fair_key from private.queue_floor as f)
        order by r.fair_key, r.seq limit 1000
      ) as next
      where next.queued_at < now() - p_plan.busy_after
        and next.user_id not in (select r.user_id from private.running_jobs as r)
        -- Nor does it wait for us while its model is paused.
        and not exists (
          select from private.paused_models as p
          where p.id = next.model_id
            and (p.paused_until is not null or p.resumed_at > now() - p_plan.busy_after)
        )
    );
  end if;
  return false;
end;
$$;

create or replace function private.refuse_limits(p_user_id uuid) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_used public.entitlements := (
    select e from public.entitlements as e where e.user_id = p_user_id
  );
  v_plan private.plans := private.plan_of(v_used);
  v_max_per_day bigint := v_plan.max_per_minute::bigint * v_plan.full_minutes_per_day;
begin
  if v_plan.max_active <= (
    select count(*) from (
      select from private.live_jobs as j where j.user_id = p_user_id limit v_plan.max_active
    ) as live
  ) then
    perform private.refuse(
      'too_many_active',
      format('%s jobs are queued or running, the plan''s limit', v_plan.max_active),
      p_retry_after => 5
    );
  elsif v_used.minute_started_at > now() - interval '1 minute'
    and v_used.minute_jobs >= v_plan.max_per_minute then
    perform private.refuse(
      'rate_limited', format('%s jobs in this minute, the plan''s limit', v_plan.max_per_minute),
      p_retry_after => ceil(
        extract(epoch from v_used.minute_started_at + interval '1 minute' - now())
      )::integer
    );
  elsif v_used.day_started_at > now() - interval '1 day' and (
    v_used.day_jobs >= v_max_per_day or v_used.day_burned >= v_plan.max_burned_per_day
  ) then
    perform private.refuse(
      'rate_limited', format(
        '%s jobs in this day, %s of them canceled when they ran: the plan''s limits are %s and %s',
        v_used.day_jobs, v_used.day_burned, v_max_per_day, v_plan.max_burned_per_day
      ),
      p_retry_after => ceil(
        extract(epoch from v_used.day_started_at + interval '1 day' - now())
      )::integer
    );
  elsif private.is_busy(v_plan) then
    perform private.refuse('busy', 'Jobs wait too long to take in more.', p_retry_after => 60);
  end if;
end;
$$;

create or replace function private.input_problem(p_value jsonb, p_rules jsonb) returns text
language plpgsql immutable set search_path = pg_catalog, pg_temp as $$
declare
  v_type text := p_rules ->> 'type';
  v_least numeric;
  v_most numeric;
  v_size numeric;
begin
  if p_value = 'null' and p_rules @> '{"nullable": true}' then
    return null;
  elsif p_rules ? 'anyOf' then
    return case when (
      select bool_and(private.input_problem(p_value, o.value) is not null)
      from jsonb_array_elements(p_rules -> 'anyOf') as o
    ) then 'none of its types: ' || left(p_rules ->> 'anyOf', 1000) end;
  elsif jsonb_typeof(p_value) is distinct from replace(v_type, 'integer', 'number')
    or (v_type = 'integer' and p_value::numeric % 1 <> 0) then
    return 'not of type ' || coalesce(v_type, 'allowed here');
  elsif p_rules ? 'enum' and not (p_rules -> 'enum') @> jsonb_build_array(p_value) then
    return 'not one of ' || left(p_rules ->> 'enum', 1000);
  elsif v_type in ('integer', 'number') then
    v_least := coalesce((p_rules ->> 'minimum')::numeric, -9007199254740991);
    v_most := coalesce((p_rules ->> 'maximum')::numeric, 9007199254740991);
    v_size := p_value::numeric;
    if v_size not between v_least and v_most then
      return format('not between %s and %s', v_least, v_most);
    elsif p_rules ?| '{exclusiveMinimum,exclusiveMaximum,multipleOf}' then
      return case
        when v_size <= (p_rules ->> 'exclusiveMinimum')::numeric
          then 'not above ' || (p_rules ->> 'exclusiveMinimum')
        when v_size >= (p_rules ->> 'exclusiveMaximum')::numeric
          then 'not below ' || (p_rules ->> 'exclusiveMaximum')
        when v_size % (p_rules ->> 'multipleOf')::numeric <> 0
          then 'not a multiple of ' || (p_rules ->> 'multipleOf')
      end;
    end if;
  elsif v_type = 'string' and p_rules ?| '{maxLength,minLength}' then
    v_size := length(p_value #>> '{}');
    return case
      when v_size > (p_rules ->> 'maxLength')::numeric
        then format('longer than %s characters', p_rules ->> 'maxLength')
      when v_size < (p_rules ->> 'minLength')::numeric
        then format('shorter than %s characters', p_rules ->> 'minLength')
    end;
  elsif v_type = 'array' then
    v_most := coalesce((p_rules ->> 'maxItems')::numeric, 16);
    v_size := jsonb_array_length(p_value);
    return case
      when v_size > v_most then format('longer than %s items', v_most)
      when v_size < (p_rules ->> 'minItems')::numeric
        then format('shorter than %s items', p_rules ->> 'minItems')
      else (
        select 'an item is ' || q.problem
        from jsonb_array_elements(p_value) with ordinality as i (value, place)
        cross join private.input_problem(i.value, p_rules -> 'items') as q (problem)
        where q.problem is not null order by i.place limit 1
      )
    end;
  end if;
  return null;
end;
$$;

create or replace function private.map_size(p_model public.models, p_params jsonb) returns jsonb
language plpgsql immutable set search_path = pg_catalog, pg_temp as $$
declare
  v_properties jsonb := p_model.input_schema -> 'properties';
  v_takes_pixels boolean := p_model.client_inputs @> '{width,height}';
  v_sides numeric[] := array(
    select s.side from unnest('{width,height}'::text[]) with ordinality as n (name, place)
    cross join lateral (
      select case jsonb_typeof(p_params -> n.name) when 'number' then (p_params ->> n.name)::numeric
      end as side
    ) as s
    where s.side % 1 = 0 and s.side between 1 and 16384 order by n.place
  );
  v_ratio numeric[] := regexp_match(
    p_params ->> 'aspect_ratio', '^0*([1-9]\d{0,3}):0*([1-9]\d{0,3})$'
  )::numeric[];
  v_unknown text[] := array['aspect_ratio'];
  v_size jsonb;
begin
  if cardinality(v_sides) = 2 and not v_takes_pixels then
    v_ratio := v_sides;
    v_unknown := array['width', 'height'];
  elsif v_ratio is null or 'aspect_ratio' = any (p_model.client_inputs) then
    if cardinality(v_sides) = 2 then
      -- Some models look at pixels only when asked for a custom shape.
      select coalesce(jsonb_object_agg(c.name, 'custom'), '{}') into v_size
      from unnest('{aspect_ratio,size}'::text[]) as c (name)
      where v_properties #> array[c.name, 'enum'] @> '["custom"]';
    end if;
    return coalesce(v_size, '{}') || p_params;
  end if;
  if v_takes_pixels then
    select jsonb_object_agg(s.name, coalesce(
      (
        select e.value::numeric from jsonb_array_elements(r.rules -> 'enum') as e
        order by abs(e.value::numeric - s.pixels) limit 1
      ),
      least(
        floor(coalesce((r.rules ->> 'maximum')::numeric, 2048) / r.step) * r.step,
        greatest(
          ceil(coalesce((r.rules ->> 'minimum')::numeric, 64) / r.step) * r.step,
          round(s.pixels / r.step) * r.step
        )
      )
    )) into v_size
    from (
      select coalesce((v_properties #>> '{width,default}')::numeric, 1024)
        * coalesce((v_properties #>> '{height,default}')::numeric, 1024) as area
    ) as a
    cross join lateral (values
      ('width', sqrt(a.area * v_ratio[1] / v_ratio[2])),
      ('height', sqrt(a.area * v_ratio[2] / v_ratio[1]))
    ) as s (name, pixels)
    cross join lateral (
      -- Multiples of 64, as diffusion models like them.
      select v_properties -> s.name as rules, case
        when 64 % coalesce((v_properties #>> array[s.name, 'multipleOf'])::numeric, 1) = 0 then 64
        else (v_properties #>> array[s.name, 'multipleOf'])::numeric
      end as step
    ) as r;
  else
    select jsonb_build_object(p.name, o.option) into v_size
    from unnest('{aspect_ratio,size,image_size,resolution}'::text[])
      with ordinality as p (name, place)
    cross join jsonb_array_elements_text(
      coalesce(v_properties #> array[p.name, 'enum'], '[]')
    ) as o (option)
    cross join regexp_match(o.option, '^(\d{1,5}) ?[:x*×] ?(\d{1,5})$') as m
    where p.name = any (p_model.client_inputs) and m[1]::numeric > 0 and m[2]::numeric > 0
    order by
      p.place,
      abs(ln(m[1]::numeric / m[2]::numeric) - ln(v_ratio[1] / v_ratio[2])),
      abs(ln(m[1]::numeric * m[2]::numeric) - ln(v_ratio[1] * v_ratio[2]))
    limit 1;
  end if;
  return case when v_size is null then p_params else v_size || (p_params - v_unknown) end;
end;
$$;

create or replace function private.is_blank(p_text text) returns boolean
language plpgsql immutable set search_path = pg_catalog, pg_temp as $$
begin
  return p_text !~ (
    '[^\u0001-\u0020\u007f-\u00a0\u00ad\u0300-\u036f\u0600-\u0605\u061c\u06dd\u070f\u0890\u0891'
    '\u08e2\u115f\u1160\u1680\u17b4\u17b5\u180b-\u180f\u1ab0-\u1aff\u1dc0-\u1dff\u2000-\u200f'
    '\u2028-\u202f\u205f-\u206f\u20d0-\u20ff\u2800\u3000\u3164\ufe00-\ufe0f\ufe20-\ufe2f\ufeff'
    '\uffa0\ufff0-\ufffb\U000110bd\U000110cd\U00013430-\U0001343f\U00016fe4'
    '\U0001bca0-\U0001bca3\U0001d159\U0001d173-\U0001d17a\U000e0000-\U000e0fff]'
  ) is not false;
end;
$$;

create or replace function private.provider_inputs(
  p_model public.models, p_user_id uuid, p_params jsonb, p_prompts text[],
  p_field text default 'prompt'
) returns jsonb[]
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_params jsonb := p_params;
  v_rules jsonb := p_model.input_schema -> 'properties';
  v_prompt_rules jsonb;
  v_name text;
  v_problem text;
  v_inputs jsonb[];
begin
  if v_params - p_model.client_inputs <> '{}' or v_params ? 'aspect_ratio'
    or v_params ?& '{width,height}' or v_params ?| p_model.image_inputs then
    if jsonb_typeof(v_params -> 'reuse') <> 'boolean' then
      perform private.refuse_input('params.reuse: not of type boolean');
    elsif v_params @> '{"reuse": true}' and not v_params ? 'seed' then
      perform private.refuse_input(
        'params.reuse: needs params.seed', 'Without a seed every picture is another one.'
      );
    end if;
    v_params := private.map_size(p_model, v_params - 'reuse');
    v_name := (
      select min(f.name) from jsonb_object_keys(v_params - p_model.client_inputs) as f (name)
    );
    if v_name is not null then
      perform private.refuse_input(
        format('params.%s: not an input of %s', left(v_name, 60), p_model.id),
        'Allowed: ' || array_to_string(p_model.client_inputs, ', ')
      );
    end if;
  end if;
  foreach v_name in array p_model.client_inputs loop
    -- A plain number, what is asked most, costs no call.
    if (case when v_params ? v_name then (
      jsonb_typeof(v_params -> v_name) = 'number' and (v_params -> v_name)::numeric % 1 = 0
      and (v_rules -> v_name) - '{default,maximum,minimum}'::text[] = '{"type": "integer"}'
      and v_params -> v_name >= v_rules -> v_name -> 'minimum'
      and v_params -> v_name <= v_rules -> v_name -> 'maximum'
    ) is not true else v_name = any (p_model.required_inputs) end) then
      v_problem := case when v_params ? v_name
        then private.input_problem(v_params -> v_name, v_rules -> v_name) else 'missing'
      end;
      if v_problem is not null then
        perform private.refuse_input(format('params.%s: %s', v_name, v_problem));
      end if;
    end if;
  end loop;
  if v_params ?| p_model.image_inputs then
    perform private.check_source_images(p_model, p_user_id, v_params);
  end if;
  v_params := p_model.default_input || v_params || p_model.operator_input;
  for v_at in 1 .. cardinality(p_prompts) loop
    if (
      p_prompts[v_at] ~ '[0-9A-Za-z]'
      and (v_rules -> p_model.prompt_input) - 'default'::text = '{"type": "string"}'
    ) is not true then
      v_prompt_rules := v_rules -> p_model.prompt_input;
      if not private.is_blank(p_prompts[v_at]) then
        v_problem := case when v_prompt_rules ?| '{anyOf,enum,maxLength,minLength}'
          then private.input_problem(to_jsonb(p_prompts[v_at]), v_prompt_rules)
        end;
      -- One that needs a picture and has a prompt of its own, an upscaler say, does without.
      elsif p_model.prompt_input is null or (
        p_model.input_schema -> 'required' ?| p_model.image_inputs
        and not p_model.input_schema -> 'required' ? p_model.prompt_input
        and v_prompt_rules ? 'default'
      ) then
        p_prompts[v_at] := null;
      else
        v_problem := 'missing or blank';
      end if;
      if v_problem is not null then
        perform private.refuse_input(format(p_field || ': %2$s', v_at - 1, v_problem));
      end if;
    end if;
    v_inputs[v_at] := v_params || case
      when p_model.prompt_input is not null and p_prompts[v_at] is not null
        then jsonb_build_object(p_model.prompt_input, p_prompts[v_at])
      else '{}'
    end || case
      when p_model.highest_seed is not null and not v_params ? 'seed'
        then jsonb_build_object('seed', p_model.lowest_seed + floor(
          random() * (p_model.highest_seed - p_model.lowest_seed + 1)
        )::bigint)
      else '{}'
    end;
  end loop;
  return v_inputs;
end;
$$;

create or replace function public.grant_credits(
  user_id uuid, amount integer, kind text, external_id text
) returns json
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
#variable_conflict use_column
declare
  v_user_id uuid := user_id;
  v_amount integer := amount;
  v_external_id text := external_id;
  v_credits integer;
  v_charged bigint;
  v_entry public.credit_ledger;
begin
  perform private.require_writable();
  if ((kind = 'grant' and v_amount > 0) or (kind = 'adjust' and v_amount <> 0)) is not true then
    perform private.refuse_input(
      'kind: grant with a positive amount, or adjust with one that is not 0'
    );
  elsif coalesce(octet_length(v_external_id) not between 1 and 200, true) then
    perform private.refuse_input(
      'external_id: not 1 to 200 bytes', 'Use the payment''s id: repeats are applied once.'
    );
  end if;
  select credits into v_credits from public.entitlements where user_id = v_user_id for update;
  if not found then
    perform private.refuse_missing('user_id: no such user', 'Use the id of auth.users.');
  end if;
  loop  -- once more where another user's grant takes the id just now
    select * into v_entry from public.credit_ledger where external_id = v_external_id;
    if v_entry.id is not null and (v_entry.user_id, v_entry.amount, v_entry.kind)
      is distinct from (v_user_id, v_amount, kind) then
      perform private.refuse(
        'idempotency_conflict', 'external_id was used for another grant',
        'Use the payment''s own id, once for each payment.'
      );
    elsif v_entry.id is not null then
      return json_build_object('credits', v_credits, 'applied', false);
    end if;
    -- Far below what an integer holds, also once what jobs under way were charged has come back: so
    -- no refund can ever overflow.
    select coalesce(sum(g.price_credits), 0) into v_charged
    from private.live_jobs as j inner join public.generations as g on g.id = j.job_id
    where j.user_id = v_user_id;
    if v_credits::bigint + v_amount not between 0 and 1000000000 - v_charged then
      perform private.refuse_input(
        format('amount: the balance is %s, and %s are in jobs under way', v_credits, v_charged)
      );
    end if;
    insert into public.credit_ledger (user_id, kind, amount, balance_after, external_id)
    values (v_user_id, kind, v_amount, v_credits + v_amount, v_external_id)
    on conflict (external_id) where external_id is not null do nothing;
    exit when found;
  end loop;
  update public.entitlements set credits = credits + v_amount where user_id = v_user_id;
  return json_build_object('credits', v_credits + v_amount, 'applied', true);
end;
$$;

create or replace function public.set_paid(user_id uuid, paid_until timestamptz) returns json
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  perform private.require_writable();
  update public.entitlements as e set paid_until = set_paid.paid_until
  where e.user_id = set_paid.user_id;
  if not found then
    perform private.refuse_missing('user_id: no such user', 'Use the id of auth.users.');
  end if;
  return private.entitlement_json(user_id);
end;
$$;

create or replace function private.refresh_model_stats(
  p_memory integer default 200, p_requests integer default 2000
) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_since timestamptz := coalesce(
    (select max(s.refreshed_at) from private.model_stats as s), now() - interval '1 day'
  );
begin
  if v_since > now() - interval '15 seconds' then
    return;
  end if;
  -- One session at a time: by a row's lock, for one by number could be held by anybody.
  perform from private.plans where name = 'free' for update skip locked;
  if not found then
    return;
  end if;
  insert into private.model_stats as s (model_id, mean_seconds, sample_count, refreshed_at)
  select
    a.model_id, avg(extract(epoch from a.ended_at - a.started_at)), least(count(*), p_memory), now()
  from private.attempts as a
  where a.ended_at > v_since and a.outcome = 'completed'
    and isfinite(a.started_at) and isfinite(a.ended_at)
  group by a.model_id
  on conflict (model_id) do update set
    mean_seconds = s.mean_seconds + (excluded.mean_seconds - s.mean_seconds)
      * excluded.sample_count / least(p_memory, s.sample_count + excluded.sample_count),
    sample_count = least(p_memory, s.sample_count + excluded.sample_count);
  with latest as (
    select g.model_id, g.queue_distance, g.created_at
    from public.generations as g order by g.id desc limit p_requests
  ),
  recent as (
    select
      l.model_id, count(*) as jobs, avg(l.queue_distance) as distance,
      case sum(count(*)) over ()
        when p_requests then extract(epoch from now() - min(min(l.created_at)) over ())
        else 300
      end as seconds
    from latest as l where l.created_at > now() - interval '5 minutes' group by l.model_id
  )
  update private.model_stats as s set
    requests_per_second = coalesce(
      (select r.jobs / r.seconds from recent as r where r.model_id = s.model_id), 0
    ),
    queue_distance = (select r.distance from recent as r where r.model_id = s.model_id),
    refreshed_at = now();
end;
$$;

create type private.forecast as (
  job_id uuid,
  queue_position integer,
  eta_seconds numeric,
  due_seconds double precision
);

create or replace function private.forecast_jobs(
  p_job_ids uuid[], p_at_most integer default 1000
) returns private.forecast[]
language plpgsql stable set search_path = pg_catalog, pg_temp
set enable_sort = off set jit = off as $$
declare
  v_queued private.ready_jobs[] := array(
    select q.job from (
      select r as job from private.ready_jobs as r where r.job_id = any (p_job_ids) offset 0
    ) as q order by (q.job).fair_key desc, (q.job).seq desc
  );
  v_forecasts private.forecast[];
  v_keys bigint[];  -- of the queue, in its order
  v_seqs bigint[];
  v_lengths double precision[];
  v_begins double precision[];  -- when the first of them begins, the second, and one behind all
  v_slots double precision[];  -- in how many seconds each is free, soonest first
  v_count integer;
  v_place integer;
  v_seconds double precision;
begin
  if cardinality(v_queued) < cardinality(p_job_ids) then
    v_forecasts := array(
      select row(
        r.job_id, null, round(greatest(0.25 * s.mean_seconds, due.seconds)::numeric, 1), due.seconds
      )::private.forecast
      from private.running_jobs as r
      left join private.model_stats as s on s.model_id = r.model_id
      cross join lateral private.due_seconds(r, s.mean_seconds) as due (seconds)
      where r.job_id = any (p_job_ids)
    );
  end if;
  if v_queued = '{}' then
    return v_forecasts;
  end if;
  select
    coalesce(array_agg(q.fair_key), '{}'), coalesce(array_agg(q.seq), '{}'),
    coalesce(array_agg(q.seconds), '{}')
  into v_keys, v_seqs, v_lengths
  from (
    select r.fair_key, r.seq, coalesce(
      s.mean_seconds, (select avg(a.mean_seconds) from private.model_stats as a)
    ) as seconds
    from private.ready_jobs as r
    left join private.model_stats as s on s.model_id = r.model_id
    where r.run_at is null and r.fair_key >= (select f.fair_key from private.queue_floor as f)
      and (r.fair_key, r.seq) < (v_queued[1].fair_key, v_queued[1].seq)
      and not r.model_id = any (array(
        select p.id from private.paused_models as p where p.paused_until is not null
      ))
    order by r.fair_key, r.seq limit p_at_most
  ) as q;
  select sum(w.slots)::integer into v_count
  from private.workers as w
  where w.seen_at > now() - (select s.lease from private.settings as s)
    and exists (select from private.model_stats);
  if v_count is not null and (cardinality(v_keys) < p_at_most or cardinality(v_queued) > 1) then
    v_slots := array(
      select greatest(0.25 * m.seconds, private.due_seconds(r, m.seconds))
      from private.running_jobs as r
      left join private.model_stats as s on s.model_id = r.model_id
      cross join lateral (
        select coalesce(
          s.mean_seconds, (select avg(a.mean_seconds) from private.model_stats as a)
        ) as seconds
      ) as m
      order by 1
    );
    v_slots := array_fill(0::float, array[greatest(v_count - cardinality(v_slots), 0)]) || v_slots;
    v_begins := v_slots[1:1];
    -- The first of the queue take the slot that is free first each, the rest all of them evenly.
    for v_at in 1 .. least(20, cardinality(v_lengths)) loop
      v_seconds := v_slots[1] + v_lengths[v_at];
      v_place := width_bucket(v_seconds, v_slots[2:]);
      v_slots := v_slots[2:v_place + 1] || v_seconds || v_slots[v_place + 2:];
      v_begins[v_at + 1] := v_slots[1];
    end loop;
    v_begins := v_begins || array(
      select v_slots[1] + sum(q.seconds) over (order by q.place) / cardinality(v_slots)
      from unnest(v_lengths[21:]) with ordinality as q (seconds, place)
    );
  end if;
  return v_forecasts || array(
    select row(q.job_id, p.place, round(due.seconds::numeric, 1), due.seconds)::private.forecast
    from unnest(v_queued) as q
    cross join lateral (
      select width_bucket(q.fair_key - 1, v_keys) as first, width_bucket(q.fair_key, v_keys) as last
    ) as same
    cross join lateral (
      select same.first + width_bucket(q.seq - 1, v_seqs[same.first + 1:same.last]) as place
    ) as p
    left join lateral (
      -- A share of the slots goes to jobs that come later and are put before it: at first all that
      -- are put nearer to the queue's present, ever fewer as it moves up.
      select s.mean_seconds + greatest(
        v_begins[p.place + 1] / (1 - case when v_begins[p.place + 1] > 0 then least(
          0.6, coalesce(later.slots, 0) / cardinality(v_slots)
        ) else 0 end),
        date_part('epoch', q.run_at - now()),
        date_part('epoch', pause.until - now())
      ) as seconds
      from private.model_stats as s
      cross join lateral (
        select max(b.paused_until) as until from private.breakers as b
        where b.name in (
            s.model_id, (select m.provider from public.models as m where m.id = s.model_id)
          )
          and (b.paused_until > now() or (b.paused_until is not null and b.times_opened > 0))
      ) as pause
      cross join lateral (
        select sum(
          a.requests_per_second * a.mean_seconds
          * greatest(0, 1 - a.queue_distance / greatest(q.fair_key - c.last_value, 1))
        ) as slots
        from private.model_stats as a cross join private.virtual_clock as c
      ) as later
      where s.model_id = q.model_id and v_slots is not null and p.place < p_at_most
        and (pause.until is null or (pause.until > now() and pause.until < 'infinity'))
    ) as due on true
  );
end;
$$;

create or replace function private.forecast(
  p_generation public.generations, p_at_most integer default 1000
) returns private.forecast
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
begin
  if p_generation.finished_at is null then
    return (private.forecast_jobs(array[p_generation.id], p_at_most))[1];
  end if;
  return null;
end;
$$;

create or replace function private.known_answer(
  p_known public.generations, p_credits integer, p_is_reused boolean default false
) returns json
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
begin
  return json_build_object(
    'job_id', p_known.id,
    'status', p_known.status,
    'reused', p_is_reused,
    'credits_left', p_credits,
    'queue_position', null,
    'eta_seconds', null,
    'poll_after_ms', case
      when p_known.finished_at is null then private.poll_after_ms(p_known.created_at)
    end
  );
end;
$$;

create or replace function private.accept(
  p_gate private.gate, p_name text, p_params jsonb, p_prompts text[], p_inputs jsonb[],
  p_idempotency_key text default null, p_batch_id uuid default null, p_retry_of uuid default null,
  p_is_free boolean default false
) returns json
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_model public.models := p_gate.model;
  v_jobs integer := cardinality(p_inputs);
  v_images numeric := case jsonb_typeof(p_inputs[1] -> v_model.image_count_input)
    when 'number' then (p_inputs[1] -> v_model.image_count_input)::numeric  -- the same in each
    else v_model.max_images
  end;
  v_price bigint := v_images * case
    when p_is_free then 0
    when p_gate.plan = 'paid' then v_model.paid_price_credits
    else v_model.price_credits
  end;
  v_clock bigint := coalesce(pg_sequence_last_value('private.virtual_clock'), 0);
  v_us bigint := date_part('epoch', clock_timestamp()) * 1000000;
  v_ids uuid[];
  v_is_anybody_asleep boolean;
begin
  if p_gate.may_be_over_limits and not p_is_free then
    perform private.refuse_limits(p_gate.user_id);
  end if;
  with queue as (
    select
      greatest(v_clock, case when live.jobs > 0 then p_gate.last_fair_key end) as base,
      greatest(v_model.price_credits * v_images, 1)::bigint * 1000 / p_gate.weight as step
    from (
      select count(*) as jobs from (
        select from private.live_jobs as j
        where j.user_id = p_gate.user_id limit p_gate.max_active
      ) as counted
    ) as live
    where v_images between 1 and v_model.max_images and v_price * v_jobs <= p_gate.credits
      and (p_is_free or live.jobs < p_gate.max_active)
  ),
  jobs as materialized (
    select
      encode(
        int8send(
          (v_us + j.place) / 1000 * 65536 + 28672 + (v_us + j.place) % 1000 * 4096 / 1000
        ) || substring(uuid_send(gen_random_uuid()) from 9),
        'hex'
      )::uuid as id,
      j.prompt, j.input, j.place, q.base + q.step * j.place as fair_key
    from queue as q
    cross join unnest(p_prompts, p_inputs) with ordinality as j (prompt, input, place)
  ),
  charged as (
    update public.entitlements as e set
      credits = e.credits - v_price * v_jobs,
      last_fair_key = q.base + q.step * v_jobs,
      minute_started_at = case
        when e.minute_started_at > now() - interval '1 minute' then e.minute_started_at else now()
      end,
      minute_jobs = v_jobs + case
        when e.minute_started_at > now() - interval '1 minute' then e.minute_jobs else 0
      end,
      day_started_at = case
        when e.day_started_at > now() - interval '1 day' then e.day_started_at else now()
      end,
      day_jobs = v_jobs + case
        when e.day_started_at > now() - interval '1 day' then e.day_jobs else 0
      end,
      day_burned = case
        when e.day_started_at > now() - interval '1 day' then e.day_burned else 0
      end
    from queue as q
    where e.user_id = p_gate.user_id
  ),
  booked as (
    insert into public.credit_ledger (user_id, generation_id, kind, amount, balance_after)
    select p_gate.user_id, j.id, 'charge', -v_price, p_gate.credits - v_price * j.place
    from jobs as j
  ),
  made as (
    insert into public.generations (
      id, user_id, model_id, alias_id, batch_id, retry_of, prompt, input, provider_input,
      price_credits, image_count, queue_distance, idempotency_key
    )
    select
      j.id, p_gate.user_id, v_model.id, nullif(p_name, v_model.id), p_batch_id,
      p_retry_of, j.prompt, p_params, j.input, v_price, v_images, j.fair_key - v_clock,
      p_idempotency_key
    from jobs as j
  ),
  queued as (
    insert into private.ready_jobs (job_id, user_id, model_id, fair_key)
    select j.id, p_gate.user_id, v_model.id, j.fair_key from jobs as j
  )
  select
    array(select j.id from jobs as j), exists (select from private.workers as w where w.asleep)
  into v_ids, v_is_anybody_asleep;
  if v_ids = '{}' then
    if not p_is_free then
      perform private.refuse_limits(p_gate.user_id);
    end if;
    if v_images not between 1 and v_model.max_images then
      perform private.refuse_input(format(
        'params.%s: not between 1 and %s', v_model.image_count_input, v_model.max_images
      ));
    end if;
    if v_price * v_jobs > p_gate.credits then
      perform private.refuse(
        'insufficient_credits', format('need %s, have %s', v_price * v_jobs, p_gate.credits),
        'Buy credits or choose a cheaper model.'
      );
    end if;
    -- One of those counted has ended since.
    perform private.refuse(
      'too_many_active',
      format('%s jobs were queued or running, the plan''s limit', p_gate.max_active),
      p_retry_after => 1
    );
  end if;
  if coalesce(p_batch_id, p_retry_of) is not null then
    update public.batches set job_ids = v_ids where id = p_batch_id;
    insert into private.retries (retry_of, generation_id)
    select p_retry_of, v_ids[1] where p_retry_of is not null;
  end if;
  if v_is_anybody_asleep then
    perform private.wake_workers(v_jobs);
  end if;
  return json_build_object(
    'job_id', v_ids[1],
    'status', 'queued',
    'reused', false,
    'credits_left', p_gate.credits - v_price * v_jobs,
    'queue_position', null,
    'eta_seconds', null,
    'poll_after_ms', 1000
  );
end;
$$;

create or replace function private.enqueue_generation(
  p_model text, p_prompt text, p_params jsonb, p_idempotency_key text
) returns json
language plpgsql security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan set enable_seqscan = off set enable_bitmapscan = off
set jit = off as $$
declare
  v_user_id uuid;
  v_prompts text[] := array[coalesce(p_prompt, '')];
  v_params jsonb := coalesce(p_params, '{}');
  v_gate private.gate;
  v_inputs jsonb[];
  v_known public.generations;
begin
  -- As caller_id() and require_writable() do, whose calls would cost more than all they do.
  begin
    v_user_id := coalesce(
      nullif(current_setting('request.jwt.claim.sub', true), ''),
      nullif(current_setting('request.jwt.claims', true), '')::jsonb ->> 'sub'
    )::uuid;
  exception when data_exception then
    null;
  end;
  if v_user_id is null or current_setting('transaction_read_only') <> 'off'
    or current_setting('default_transaction_read_only') <> 'off' then
    v_user_id := private.require_user_id(p_writes => true);
  end if;
  v_gate := private.gate(v_user_id, p_model);
  -- Sizes first, by what they take in memory. What is longer may still be right.
  if (
    jsonb_typeof(v_params) = 'object' and pg_column_size(v_params) < 500
    and octet_length(v_params::text) <= 1000 and octet_length(v_prompts[1]) <= 1000
    and octet_length(p_idempotency_key) between 1 and 200 is not false
  ) is not true then
    v_params := private.read_request(v_prompts, v_params, p_idempotency_key);
  end if;
  if p_idempotency_key is not null then
    select * into v_known from public.generations
    where user_id = v_user_id and idempotency_key = p_idempotency_key;
    if found and (coalesce(v_known.alias_id, v_known.model_id), v_known.prompt, v_known.input)
      is distinct from (p_model, v_prompts[1], v_params) then
      perform private.refuse(
        'idempotency_conflict', 'idempotency_key was used with another payload',
        'Use a new key for a new request.'
      );
    elsif v_known.deleted_at is not null then
      perform private.refuse_missing(
        'idempotency_key: its job was deleted',
        'restore_generation brings it back. Use a new key for a new request.'
      );
    elsif found then
      return private.known_answer(v_known, v_gate.credits);
    end if;
  end if;
  if v_gate.is_model_unclear then
    v_gate.model := private.require_model(v_gate, p_model);
  end if;
  v_inputs := private.provider_inputs(v_gate.model, v_user_id, v_params, v_prompts);
  if v_params @> '{"reuse": true}' then
    select * into v_known
    from (
      select * from public.generations where user_id = v_user_id order by id desc limit 200
    ) as g
    where g.input ? 'seed'
      and (g.model_id, g.provider_input, g.status) = ((v_gate.model).id, v_inputs[1], 'completed')
      and g.deleted_at is null and not g.input ?| (v_gate.model).image_inputs
      and g.image_count = (select count(*) from public.images as i where i.generation_id = g.id)
    order by g.id desc limit 1;
    if found then
      return private.known_answer(v_known, v_gate.credits, true);
    end if;
  end if;
  return private.accept(v_gate, p_model, v_params, v_prompts, v_inputs, p_idempotency_key);
end;
$$;

create or replace function private.batch_json(p_batch public.batches) returns json
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_answer json;
begin
  select json_build_object(
    'batch_id', p_batch.id,
    'job_ids', coalesce(json_agg(g.id order by g.id), '[]'),
    'status', case when bool_or(g.finished_at is null) then 'active' else 'finished' end,
    'queued', count(*) filter (where g.status = 'queued'),
    'processing', count(*) filter (where g.status = 'processing'),
    'completed', count(*) filter (where g.status = 'completed'),
    'failed', count(*) filter (where g.status = 'failed'),
    'canceled', count(*) filter (where g.status = 'canceled'),
    'progress', coalesce(
      round(sum(case when g.finished_at is null then r.progress else 100 end) / count(*)), 0
    ),
    'credits_left', (
      select e.credits from public.entitlements as e where e.user_id = p_batch.user_id
    ),
    'poll_after_ms', case when bool_or(g.finished_at is null)
      then private.poll_after_ms(p_batch.created_at)
    end,
    'created_at', p_batch.created_at
  ) into v_answer
  from unnest(p_batch.job_ids) as j (id)
  cross join lateral (
    select * from public.generations where id = j.id and deleted_at is null offset 0
  ) as g
  left join private.running_jobs as r on r.job_id = g.id
  having count(*) > 0;
  if v_answer is null then
    perform private.refuse_missing(
      'batch_id: its jobs were deleted',
      'restore_generation brings them back. Use a new key for a new request.'
    );
  end if;
  return v_answer;
end;
$$;

create or replace function private.enqueue_batch(
  p_model text, p_prompts text[], p_params jsonb, p_idempotency_key text
) returns json
language plpgsql security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan set enable_seqscan = off set enable_bitmapscan = off
set jit = off as $$
declare
  v_user_id uuid := private.require_user_id(p_writes => true);
  v_prompts text[];
  v_params jsonb;
  v_gate private.gate;
  v_hash text;
  v_batch public.batches;
begin
  -- 100: the most that any plan may allow.
  if coalesce(cardinality(p_prompts) not between 1 and 100, true) or array_ndims(p_prompts) > 1 then
    perform private.refuse_input('prompts: not 1 to 100 texts');
  end if;
  v_prompts := array(select coalesce(p.prompt, '') from unnest(p_prompts) as p (prompt));
  v_params := private.read_request(v_prompts, p_params, p_idempotency_key, 'prompts[%1$s]');
  if v_params ? 'reuse' then
    perform private.refuse_input('params.reuse: not in a batch');
  end if;
  -- No model has a longer name, and JSON may be six times as long as the text it holds.
  v_hash := md5(jsonb_build_array(left(p_model, 200), p_prompts, v_params)::text);
  v_gate := private.gate(v_user_id, p_model);
  select * into v_batch from public.batches
  where user_id = v_user_id and idempotency_key = p_idempotency_key;
  if v_batch.request_hash <> v_hash then
    perform private.refuse(
      'idempotency_conflict', 'idempotency_key was used with another payload',
      'Use a new key for a new request.'
    );
  elsif v_batch.id is null then
    if cardinality(p_prompts) > v_gate.max_batch then
      perform private.refuse_input(format('prompts: not 1 to %s texts', v_gate.max_batch));
    elsif v_gate.is_model_unclear then
      v_gate.model := private.require_model(v_gate, p_model);
    end if;
    insert into public.batches (user_id, request_hash, idempotency_key)
    values (v_user_id, v_hash, p_idempotency_key)
    returning * into v_batch;
    perform private.accept(
      v_gate, p_model, v_params, v_prompts,
      private.provider_inputs(
        v_gate.model, v_user_id, v_params, v_prompts, 'prompts[%1$s]'
      ),
      p_batch_id => v_batch.id
    );
    select * into v_batch from public.batches where id = v_batch.id;
  end if;
  return private.batch_json(v_batch);
end;
$$;

create or replace function private.require_batch(p_batch_id uuid, p_user_id uuid) returns public.batches
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_batch public.batches;
begin
  select * into v_batch from public.batches where id = p_batch_id and user_id = p_user_id;
  if not found then
    perform private.require_known_user_id();
    perform private.refuse_missing(
      'batch_id: no such batch of yours',
      'Use the batch_id that enqueue_batch answered.'
    );
  end if;
  return v_batch;
end;
$$;

create or replace function private.retry_generation(p_job_id uuid) returns json
language plpgsql security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan set enable_seqscan = off set enable_bitmapscan = off
set jit = off as $$
declare
  v_user_id uuid := private.require_user_id(p_writes => true);
  v_old public.generations := private.require_generation(p_job_id, v_user_id);
  v_gate private.gate := private.gate(v_user_id, v_old.model_id);
  v_known public.generations;
begin
  if v_old.finished_at is null then
    perform private.refuse(
      'not_finished', format('the job is %s', v_old.status),
      'Wait for its end, or cancel it first.'
    );
  elsif v_old.status = 'completed' then
    perform private.refuse('already_finished', 'the job is completed', 'Enqueue a new one.');
  end if;
  select g.* into v_known
  from private.retries as r inner join public.generations as g on g.id = r.generation_id
  where r.retry_of = p_job_id and g.status not in ('failed', 'canceled') and g.deleted_at is null
  order by g.id limit 1;
  if found then
    return private.known_answer(v_known, v_gate.credits);
  end if;
  if v_gate.is_model_unclear then
    v_gate.model := private.require_model(v_gate, v_old.model_id);
  end if;
  return private.accept(
    v_gate, coalesce(v_old.alias_id, v_old.model_id), v_old.input, array[v_old.prompt],
    private.provider_inputs(v_gate.model, v_user_id, v_old.input, array[v_old.prompt]),
    p_retry_of => p_job_id
  );
end;
$$;

create or replace function private.wishes_of(p_user_id uuid)
returns table (last_id uuid, price_credits integer, is_open boolean, given_at timestamptz)
language sql stable set search_path = pg_catalog, pg_temp
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off as $$
  with recursive tries as (
    select
      g.id as wish_id, g.id, g.retry_of, g.price_credits, g.created_at, g.deleted_at,
      g.status in ('failed', 'canceled') as is_lost
    from public.generations as g
    where g.user_id = p_user_id
      and not exists (select from public.generations as o where o.id = g.retry_of)
    union all
    select
      t.wish_id, g.id, g.retry_of, g.price_credits, g.created_at, g.deleted_at,
      g.status in ('failed', 'canceled')
    from tries as t
    inner join private.retries as r on r.retry_of = t.id
    inner join public.generations as g on g.id = r.generation_id
  )
  select
    (array_agg(t.id order by t.id desc) filter (where t.deleted_at is null))[1],
    max(t.price_credits),
    bool_and(t.is_lost),
    min(t.created_at) filter (
      where not t.is_lost and t.price_credits = 0 and t.retry_of is not null
    )
  from tries as t
  group by t.wish_id
$$;

create or replace function private.redrive_generation(p_old public.generations) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_gate private.gate := private.gate(p_old.user_id, p_old.model_id);
  v_seed jsonb := p_old.provider_input -> 'seed';
  v_inputs jsonb[];
begin
  if (v_gate.model).id is null then
    perform private.refuse_missing('model: not active', 'Activate it.');
  elsif (v_gate.model).requires_paid and v_gate.plan <> 'paid' then
    perform private.refuse('requires_paid_plan', 'model: for paid users');
  end if;
  v_inputs := private.provider_inputs(
    v_gate.model, p_old.user_id, p_old.input, array[p_old.prompt]
  );
  if v_seed is not null and private.input_problem(
    v_seed, (v_gate.model).input_schema #> '{properties,seed}'
  ) is null then
    v_inputs[1] := v_inputs[1] || jsonb_build_object('seed', v_seed);
  end if;
  perform private.accept(
    v_gate, coalesce(p_old.alias_id, p_old.model_id), p_old.input, array[p_old.prompt], v_inputs,
    p_retry_of => p_old.id, p_is_free => true
  );
end;
$$;

create or replace function public.redrive_failed(
  code text, since timestamptz, at_most integer default 1000
) returns json
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_user_id uuid;
  v_credits bigint;
  v_wish record;
  v_redriven integer := 0;
  v_reason text;
  v_skipped jsonb := '{}'::jsonb;
begin
  perform private.require_writable();
  if not exists (select from private.error_codes as c where c.code = redrive_failed.code) then
    perform private.refuse_input('code: not a code of private.error_codes');
  elsif since is null or coalesce(at_most not between 1 and 10000, true) then
    perform private.refuse_input('since: missing, or at_most: not between 1 and 10000');
  end if;
  <<users>>
  for v_user_id in
    select distinct g.user_id from public.generations as g
    where g.status = 'failed' and g.error_code = redrive_failed.code and g.finished_at >= since
      and g.deleted_at is null
    order by g.user_id
  loop
    select e.credits into v_credits
    from public.entitlements as e where e.user_id = v_user_id for update;
    v_credits := v_credits - (
      select coalesce(sum(w.price_credits), 0) from private.wishes_of(v_user_id) as w
      where w.given_at >= since
    );
    for v_wish in
      select g as last, w.price_credits as price
      from private.wishes_of(v_user_id) as w
      inner join public.generations as g on g.id = w.last_id
      where w.is_open and g.status = 'failed' and g.error_code = redrive_failed.code
        and g.finished_at >= since
      order by g.id
    loop
      exit users when v_redriven = at_most;
      begin
        v_reason := 'insufficient_credits';
        if v_wish.price <= v_credits is not false then
          perform private.redrive_generation(v_wish.last);
          v_reason := null;
        end if;
      exception
        -- One that fits no more must not stop all others.
        when others then
          v_reason := case when sqlstate like 'PT%' then sqlerrm else 'internal' end;
          if v_reason = 'internal' then
            raise warning 'redrive_failed: %: % %', (v_wish.last).id, sqlstate, sqlerrm
              using errcode = '01000';
          end if;
      end;
      if v_reason is null then
        v_redriven := v_redriven + 1;
        v_credits := v_credits - v_wish.price;
      else
        v_skipped := v_skipped
          || jsonb_build_object(v_reason, coalesce((v_skipped ->> v_reason)::integer, 0) + 1);
      end if;
    end loop;
  end loop;
  return json_strip_nulls(
    json_build_object('redriven', v_redriven, 'skipped', nullif(v_skipped, '{}'))
  );
end;
$$;

comment on function public.redrive_failed is
  'Queues again what failed with a code since a time, free, with the same input: of each wish the '
  'last try, unless one is under way or done, and for each user no more than the credits at hand '
  'would buy. Answers {redriven, skipped: {reason: count} if any}; reasons are '
  'insufficient_credits, those of retry_generation, and internal. Call again while redriven is '
  'at_most. It reads the whole history: an operator''s tool. Errors: PT400 invalid_input.';

create or replace function private.walk_tag(
  p_user_id uuid, p_tag text, p_before uuid, p_at_most integer
) returns uuid[]
language sql immutable set search_path = pg_catalog, pg_temp
return '{}'::uuid[];

create or replace function private.due_lanes() returns setof text
language sql stable security definer set search_path = pg_catalog, pg_temp as $$
  select null::text where false
$$;

create or replace function private.claim_receipts(p_at_most integer)
returns table (delivery_id uuid, ticket text)
language sql security definer set search_path = pg_catalog, pg_temp as $$
  select null::uuid, null::text where false
$$;

comment on function private.claim_receipts is
  'Tickets of pushes that Expo took a quarter of an hour ago or more, and whose receipt was not '
  'read yet; a quarter of an hour later they are answered again.';

create or replace function private.jobs_json(p_ids uuid[], p_user_id uuid default null) returns json[]
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
begin
  return (
    select array_agg(json_build_object(
      'job_id', j.id,
      'status', j.status,
      'stage', (j.running).stage,
      'progress', (j.running).progress,
      'attempt', case when j.finished_at is null then coalesce(
        (j.running).attempt,
        (select r.attempt from private.ready_jobs as r where r.job_id = j.id)
      ) end,
      'cancel_requested', coalesce((j.running).cancel_requested, false),
      'queue_position', (j.forecast).queue_position,
      'eta_seconds', (j.forecast).eta_seconds,
      'poll_after_ms', case when j.finished_at is null then
        private.poll_after_ms(j.created_at, (j.forecast).due_seconds) end,
      'model', j.model_id,
      'alias', j.alias_id,
      'batch_id', j.batch_id,
      'retry_of', j.retry_of,
      'idempotency_key', j.idempotency_key,
      'prompt', j.prompt,
      'params', j.input,
      'price_credits', j.price_credits,
      'refunded_credits', coalesce((
        select l.amount from public.credit_ledger as l
        where l.generation_id = j.id and l.kind = 'refund'
      ), 0),
      'error', case when j.error_code is not null then
        json_build_object('code', j.error_code, 'message', j.error_message) end,
      'images', coalesce((
        select json_agg(json_build_object(
          'position', i.position, 'path', i.storage_path, 'preview_path', i.preview_path,
          'content_type', i.content_type,
          'width', i.width, 'height', i.height, 'bytes', i.bytes, 'blurhash', i.blurhash,
          'is_public', i.share_id is not null
        ) order by i.position)
        from public.images as i where i.generation_id = j.id
      ), '[]'),
      'is_favorite', j.is_favorite,
      'tags', j.tags,
      'created_at', j.created_at,
      'started_at', j.started_at,
      'finished_at', j.finished_at
    ) order by j.id desc)
    from (
      select
        g.*,
        case when g.finished_at is null then (
          select r from private.running_jobs as r where r.job_id = g.id
        ) end as running,
        case when g.finished_at is null then (
          select f from unnest(private.forecast_jobs(p_ids)) as f where f.job_id = g.id
        ) end as forecast
      -- Not any (p_ids), which would look into all partitions.
      from (select distinct unnest(p_ids) as id) as i
      cross join lateral (
        select h.* from public.generations as h where h.id = i.id offset 0
      ) as g
      where (p_user_id is null or (g.user_id = p_user_id and g.deleted_at is null))
      offset 0  -- else what is looked up once is looked up for each of its fields
    ) as j
  );
end;
$$;

create or replace function private.job_json(p_generation public.generations) returns json
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
begin
  return (private.jobs_json(array[p_generation.id]))[1];
end;
$$;

create or replace function private.get_job_status(p_job_id uuid) returns json
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan set enable_seqscan = off set enable_bitmapscan = off
set jit = off as $$
declare
  v_job json := (private.jobs_json(array[p_job_id], private.require_user_id()))[1];
begin
  if v_job is null then
    perform private.refuse_unknown_job();
  end if;
  return v_job;
end;
$$;

create or replace function private.list_active_jobs(p_job_ids uuid[]) returns json
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan set enable_seqscan = off set enable_bitmapscan = off
set jit = off as $$
declare
  v_user_id uuid := private.require_known_user_id();
  v_ids uuid[];
begin
  if cardinality(p_job_ids) > 100 or array_ndims(p_job_ids) > 1 then
    perform private.refuse_input('job_ids: not a list of at most 100');
  end if;
  v_ids := array(select j.job_id from private.live_jobs as j where j.user_id = v_user_id);
  return coalesce(array_to_json(private.jobs_json(v_ids || p_job_ids, v_user_id)), '[]');
end;
$$;

create or replace function private.list_models() returns json
language sql stable security definer set search_path = pg_catalog, pg_temp as $$
  select coalesce(json_agg(json_build_object(
    'id', m.id,
    'title', m.title,
    'price_credits', m.price_credits,
    'paid_price_credits', m.paid_price_credits,
    'requires_paid', m.requires_paid,
    'paused_until', private.paused_until(m, auth.uid()),
    'max_images', m.max_images,
    'inputs', (
      select coalesce(json_object_agg(p.key, p.value order by p.key), '{}')
      from jsonb_each(m.input_schema -> 'properties') as p
      where p.key = any (m.client_inputs)
    ),
    'image_inputs', array(
      select i.name from unnest(m.image_inputs) as i (name) where i.name = any (m.client_inputs)
    )
  ) order by m.id), '[]')
  from public.models as m
  where m.is_active
$$;

create or replace function private.list_generations(
  p_before uuid, p_page_size integer, p_only_favorites boolean, p_tag text, p_status text
) returns json
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan set enable_seqscan = off set enable_bitmapscan = off
set jit = off as $$
declare
  c_walk constant integer := 200;
  v_user_id uuid := private.require_known_user_id();
  v_before uuid := coalesce(p_before, 'ffffffff-ffff-ffff-ffff-ffffffffffff');
  v_tag text := case when p_tag is not null then private.read_tag('tag', p_tag) end;
  v_ids uuid[];
  v_page uuid[];
  v_last_id uuid;
begin
  perform private.check_page_size(p_page_size);
  if p_status not in ('queued', 'processing', 'completed', 'failed', 'canceled') then
    perform private.refuse_input(
      'status: not one of queued, processing, completed, failed, canceled'
    );
  end if;
  -- The ids, newest first, in the order of an index.
  if v_tag is not null then
    v_ids := private.walk_tag(v_user_id, v_tag, v_before, c_walk);
  elsif p_only_favorites then
    v_ids := array(
      select g.id from public.generations as g
      where g.user_id = v_user_id and g.is_favorite and g.id < v_before
      order by g.id desc limit c_walk
    );
  else
    v_ids := array(
      select g.id from public.generations as g
      where g.user_id = v_user_id and g.id < v_before
      order by g.id desc limit c_walk
    );
  end if;
  -- Those that are to be shown, by their key, until the page is full.
  v_page := array(
    select walk.id
    from (
      select w.* from unnest(v_ids) with ordinality as w (id, place) order by w.place
    ) as walk
    cross join lateral (
      select from public.generations as g
      where g.id = walk.id and g.deleted_at is null
        and (p_only_favorites is not true or g.is_favorite)
        and (p_status is null or g.status = p_status)
      limit 1
    ) as found
    order by walk.place limit p_page_size
  );
  v_last_id := case cardinality(v_page)
    when p_page_size then v_page[p_page_size]
    else v_ids[cardinality(v_ids)]
  end;
  return json_build_object(
    'generations', coalesce(array_to_json(private.jobs_json(v_page, v_user_id)), '[]'),
    'next_before', case
      when v_last_id <> v_ids[cardinality(v_ids)] or cardinality(v_ids) = c_walk then v_last_id
    end
  );
end;
$$;

create or replace function private.broadcast_generation() returns trigger
language plpgsql set search_path = pg_catalog, pg_temp
set lock_timeout = '50ms' as $$
begin
  if not (select s.broadcasts from private.settings as s) then
    return null;
  end if;
  perform realtime.send(
    jsonb_build_object('job_id', new.id, 'status', new.status),
    'generation',
    'user:' || new.user_id,
    true
  );
  return null;
exception
  -- The schema is Supabase's: it may go or close one day, and jobs go on.
  when undefined_function or invalid_schema_name or insufficient_privilege then
    raise warning 'Darkroom: not broadcast: %', sqlerrm using errcode = '01000';
    return null;
end;
$$;

do $$
begin
  if to_regprocedure('realtime.send(jsonb, text, text, boolean)') is null
    or to_regprocedure('realtime.topic()') is null or to_regclass('realtime.messages') is null then
    raise notice 'Darkroom: no % here; broadcasts are skipped, clients poll',
      case when to_regnamespace('realtime') is null then 'schema realtime'
        else 'realtime.send, realtime.topic or realtime.messages' end;
    return;
  end if;
  create trigger generations_broadcast_insert after insert on public.generations
  for each row execute function private.broadcast_generation();
  create trigger generations_broadcast_status after update of status on public.generations
  for each row when (old.status is distinct from new.status)
  execute function private.broadcast_generation();
  begin
    -- Realtime asks when a client joins: it writes one message of each extension on the topic,
    -- looks which of them the client sees, and rolls back.
    create policy "Users receive hints about their own jobs" on realtime.messages
    for select to authenticated using (
      extension = 'broadcast'
      and topic = (select realtime.topic())
      and topic = 'user:' || (select auth.uid())::text
    );
  exception when insufficient_privilege then
    raise notice 'Darkroom: no right to make policies on realtime.messages; until the one in '
      'sql/65_realtime.sql is made in the SQL editor, clients cannot join and poll';
  end;
  begin
    if exists (select from pg_catalog.pg_publication where pubname = 'supabase_realtime')
      and not exists (
        select from pg_catalog.pg_publication_tables
        where pubname = 'supabase_realtime'
          and schemaname = 'public' and tablename = 'generations'
      ) then
      alter publication supabase_realtime add table public.generations;
    end if;
  exception when insufficient_privilege then
    raise notice 'Darkroom: no right to change publication supabase_realtime; postgres_changes '
      'will not tell of generations';
  end;
end;
$$;

create or replace function private.heartbeat(
  p_worker_id bigint, p_job_ids uuid[], p_tokens bigint[], p_progress smallint[],
  p_is_listening boolean default true
) returns table (job_id uuid, verdict text)
language plpgsql security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan set enable_seqscan = off set enable_bitmapscan = off
set jit = off as $$
#variable_conflict use_column
begin
  update private.workers set seen_at = now(), is_listening = p_is_listening
  where id = p_worker_id;
  update private.running_jobs as r set
    lease_until = now() + s.lease,
    progress = case
      when p_progress[array_position(p_tokens, r.token)] is null then r.progress
      else least(100, greatest(0, p_progress[array_position(p_tokens, r.token)]))
    end
  from private.settings as s
  where r.job_id = any (p_job_ids) and r.token = any (p_tokens);
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

create or replace function private.is_due(p_due regclass, p_patience integer default 0) returns boolean
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_now double precision := 1000 * extract(epoch from clock_timestamp());
begin
  return coalesce(
    pg_sequence_last_value(p_due) not between v_now - p_patience and v_now + 60000, true
  );
end;
$$;

create or replace function private.put_off(p_due regclass, p_began timestamptz) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_now double precision := extract(epoch from clock_timestamp());
  v_pause double precision := 50 * (v_now - extract(epoch from p_began));
begin
  if v_pause < 0.5 then
    v_pause := 0;
  end if;
  perform setval(p_due, (1000 * (v_now + least(v_pause, 10)))::bigint);
end;
$$;

create or replace function private.gate_of(
  p_model_id text, p_provider text, out is_open boolean, out is_shut boolean, out is_over boolean,
  out failed_users uuid[], out failed_at_provider uuid[]
)
language sql stable set search_path = pg_catalog, pg_temp as $$
  select
    count(*) = 0,
    coalesce(bool_or(private.admits(b, null) is false), false),
    bool_and(private.admits(b, null) is true),
    array(
      select unnest(f.failed_users) from private.breakers as f
      where f.name in (p_model_id, p_provider) and f.times_opened > 0
    ),
    array(
      select unnest(f.failed_users) from private.breakers as f
      where f.name = p_provider and f.times_opened > 0
    )
  from private.breakers as b
  where b.name in (p_model_id, p_provider) and private.breaker_state(b) <> 'closed'
$$;

create or replace function private.pick_admitted_jobs(p_at_most integer) returns uuid[]
language plpgsql set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan as $$
declare
  v_began timestamptz := clock_timestamp();
  v_from bigint := 0;
  v_breaker private.breakers;
  v_own uuid[];
  v_ids uuid[];
begin
  -- Operators' pauses that are over.
  update private.breakers set paused_until = null, pause_reason = null, resumed_at = now()
  where name = any (array(
    select b.name from private.breakers as b
    where b.paused_until <= now() and b.times_opened = 0 for update skip locked
  ));
  if not found and not private.is_due('private.scan_due') then
    select c.last_value into v_from from private.virtual_clock as c;
  end if;
  v_ids := array(
    select r.job_id from private.ready_jobs as r
    where r.run_at is null and r.job_id = any (array(
      -- From model to model through the index.
      with recursive waiting as (
        (
          select r.model_id from private.ready_jobs as r
          where r.run_at is null order by r.model_id limit 1
        )
        union all
        select (
          select r.model_id from private.ready_jobs as r
          where r.run_at is null and r.model_id > w.model_id order by r.model_id limit 1
        )
        from waiting as w where w.model_id is not null
      )
      select c.job_id from (
        select
          next.job_id,
          next.has_failed,
          bool_and(next.has_failed) over (partition by w.model_id) as all_of_model,
          next.failed_at_provider,
          bool_and(next.failed_at_provider) over (partition by m.provider) as all_of_provider
        from waiting as w
        left join public.models as m on m.id = w.model_id
        cross join lateral private.gate_of(w.model_id, m.provider) as gate
        cross join lateral (
          (
            select r.job_id, false as has_failed, false as failed_at_provider
            from private.ready_jobs as r
            where r.run_at is null and r.model_id between w.model_id and w.model_id
              and r.fair_key >= v_from and not r.user_id = any (gate.failed_users)
            order by r.model_id, r.fair_key, r.seq
            limit case when gate.is_open then p_at_most else 1 end
          )
          union all
          (
            select
              r.job_id, r.user_id = any (gate.failed_users),
              r.user_id = any (gate.failed_at_provider)
            from private.ready_jobs as r
            where r.run_at is null and r.model_id between w.model_id and w.model_id
              and r.fair_key >= v_from and gate.is_over
            order by r.model_id, r.fair_key, r.seq limit 1
          )
        ) as next
        where w.model_id is not null and not gate.is_shut
      ) as c
      where (c.all_of_model or not c.has_failed) and (c.all_of_provider or not c.failed_at_provider)
    ))
    order by r.fair_key, r.seq limit p_at_most for update skip locked
  );
  if v_from = 0 then
    perform private.put_off('private.scan_due', v_began);
  end if;
  -- Of each breaker that is not closed one job may go, as its probe. Providers first: their one job
  -- may be that of a model, too.
  for v_breaker in
    select b.* from private.breakers as b where b.times_opened > 0
    order by position('/' in b.name) > 0, b.name
  loop
    v_own := array(
      select r.job_id from private.ready_jobs as r
      left join public.models as m on m.id = r.model_id
      where r.job_id = any (v_ids) and v_breaker.name in (r.model_id, m.provider)
      order by r.user_id = any (v_breaker.failed_users), array_position(v_ids, r.job_id)
    );
    continue when v_own = '{}';
    perform from private.breakers
    where name = v_breaker.name and times_opened > 0 for update skip locked;
    if found then
      -- A new look, now that nobody else can begin one.
      update private.breakers as b set probe_job_id = r.job_id
      from private.ready_jobs as r
      where b.name = v_breaker.name and r.job_id = v_own[1] and private.admits(b, r.user_id);
    end if;
    if found then
      v_own := v_own[2:];
    end if;
    v_ids := array(
      select s.job_id from unnest(v_ids) with ordinality as s (job_id, place)
      where not s.job_id = any (v_own) order by s.place
    );
  end loop;
  return v_ids;
end;
$$;

create or replace function private.claim_jobs(p_worker_id bigint, p_slots integer)
returns table (
  job_id uuid, user_id uuid, token bigint, attempt smallint, provider text, provider_ref text,
  provider_input jsonb, provider_job_id text, image_inputs text[], image_count smallint,
  deadline_seconds real, begun_before timestamptz
)
language plpgsql security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan set enable_seqscan = off set enable_bitmapscan = off
set jit = off as $$
#variable_conflict use_column
declare
  v_from bigint := 0;
  v_began timestamptz;
  v_ids uuid[];
begin
  -- Delayed jobs whose time has come.
  if exists (select from private.ready_jobs as r where r.run_at <= now()) then
    update private.ready_jobs set run_at = null, queued_at = now()
    where job_id = any (array(
      select r.job_id from private.ready_jobs as r
      where r.run_at <= now() order by r.run_at limit p_slots for update skip locked
    ));
  end if;
  if exists (select from private.breakers as b where b.paused_until is not null) then
    v_ids := private.pick_admitted_jobs(p_slots);
  else
    if not private.is_due('private.scan_due', 500) then
      select c.last_value into v_from from private.virtual_clock as c;
    end if;
    loop
      v_began := clock_timestamp();
      v_ids := array(
        select r.job_id from private.ready_jobs as r
        where r.run_at is null and r.fair_key >= v_from
        order by r.fair_key, r.seq limit p_slots for update skip locked
      );
      if v_from = 0 then
        perform private.put_off('private.scan_due', v_began);
        exit;
      end if;
      exit when cardinality(v_ids) = p_slots or not private.is_due('private.scan_due');
      v_from := 0;
    end loop;
  end if;
  if v_ids = '{}' then
    return;
  end if;
  update private.workers set asleep = false where id = p_worker_id and asleep;
  perform setval('private.virtual_clock', greatest(c.last_value, r.fair_key))
  from private.virtual_clock as c cross join private.ready_jobs as r
  where r.job_id = v_ids[cardinality(v_ids)];
  return query
  with claimed as (
    delete from private.ready_jobs as r where r.job_id = any (v_ids) returning r.*
  ),
  running as (
    insert into private.running_jobs as r (
      job_id, user_id, model_id, token, worker_id, attempt,
      lease_until, deadline_at, provider_job_id, create_started_at, input_sha256
    )
    select
      c.job_id, c.user_id, c.model_id, nextval('private.lease_tokens'), p_worker_id, c.attempt + 1,
      now() + st.lease, now() + coalesce(m.deadline, st.lease), c.provider_job_id,
      coalesce(c.create_started_at, now()), c.input_sha256
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
    r.job_id, r.user_id, r.token, r.attempt, m.provider, m.provider_ref, s.provider_input,
    r.provider_job_id, m.image_inputs, s.image_count::smallint,
    extract(epoch from m.deadline)::real, nullif(r.create_started_at, now())
  from running as r
  inner join started as s on s.id = r.job_id
  left join public.models as m on m.id = r.model_id
  order by r.token;
end;
$$;

create or replace function private.begin_creates(
  p_job_ids uuid[], p_tokens bigint[], p_inputs bytea[] default null
) returns table (token bigint, create_started_at timestamptz)
language plpgsql security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan set enable_seqscan = off set enable_bitmapscan = off
set jit = off as $$
#variable_conflict use_column
begin
  return query
  update private.running_jobs as r
  set input_sha256 = coalesce(p_inputs[array_position(p_tokens, r.token)], r.input_sha256)
  where r.job_id = any (p_job_ids) and r.token = any (p_tokens)
  returning r.token, r.create_started_at;
end;
$$;

comment on function private.begin_creates is
  'Called before the provider is asked to create these jobs, where seconds have passed since their '
  'claim, or where the input has addresses of sources: p_inputs are its SHA-256 then, else null. '
  'Answers each whose lease holds, and since when something may have been bought for it.';

create or replace function private.recall_create(p_job_id uuid, p_token bigint)
returns table (create_started_at timestamptz, input_sha256 bytea)
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
#variable_conflict use_column
begin
  return query
  select r.create_started_at, r.input_sha256 from private.running_jobs as r
  where r.job_id = p_job_id and r.token = p_token;
  if not found then
    perform private.refuse_lost_lease(p_job_id);
  end if;
end;
$$;

comment on function private.recall_create is
  'Since when something may have been bought for a job, and the SHA-256 that begin_creates saved '
  'last. Errors: DR001 lease_lost.';

create or replace function private.checkpoint_jobs(
  p_job_ids uuid[], p_tokens bigint[], p_provider_job_ids text[]
) returns table (token bigint, verdict text)
language plpgsql security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan set enable_seqscan = off set enable_bitmapscan = off
set jit = off as $$
#variable_conflict use_column
begin
  return query
  with saved as (
    update private.running_jobs as r
    set provider_job_id = p_provider_job_ids[array_position(p_tokens, r.token)]
    where r.job_id = any (p_job_ids) and r.token = any (p_tokens)
    returning r.token, r.job_id, r.provider_job_id
  ),
  bought as (
    insert into private.purchases (generation_id, provider_job_id)
    select s.job_id, s.provider_job_id from saved as s order by s.provider_job_id
    on conflict (generation_id, provider_job_id) do nothing  -- said before; another's is an error
  )
  select s.token, 'ok' from saved as s;
end;
$$;

comment on function private.checkpoint_jobs is
  'Saves the provider''s ids of jobs the moment they are known, so that no attempt buys one twice. '
  'Answers each job whose lease holds: ok. Errors, which change nothing for any of the jobs: 23505 '
  'the provider''s job is another''s.';

create or replace function private.adopt_provider_job(
  p_job_id uuid, p_token bigint, p_candidates text[]
) returns text
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_adopted text;
begin
  select r.provider_job_id into v_adopted from private.running_jobs as r
  where r.job_id = p_job_id and r.token = p_token for update;
  if not found then
    perform private.refuse_lost_lease(p_job_id);
  elsif v_adopted is not null then
    return v_adopted;  -- the answer to the first call was lost
  end if;
  foreach v_adopted in array p_candidates loop
    insert into private.purchases (generation_id, provider_job_id)
    values (p_job_id, v_adopted) on conflict do nothing;
    if found then
      update private.running_jobs set provider_job_id = v_adopted where job_id = p_job_id;
      return v_adopted;
    end if;
  end loop;
  return null;
end;
$$;

comment on function private.adopt_provider_job is
  'Checkpoints the first of these provider ids, oldest first, that no job has had, and answers it; '
  'null if there is none. For creates whose answer was lost. Errors: DR001 lease_lost.';

create or replace function private.end_leases(
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

create or replace function private.end_lease(
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

create or replace function private.record_attempts(
  p_jobs private.running_jobs[], p_outcome text, p_metrics jsonb[], p_code text, p_detail text
) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  insert into private.attempts (
    generation_id, token, model_id, attempt, worker_id, started_at, outcome,
    error_code, error_detail, provider_job_id, provider_seconds, provider_images, cost_usd
  )
  select
    j.job_id, j.token, j.model_id, j.attempt, j.worker_id, j.claimed_at, p_outcome,
    p_code, left(p_detail, 2000), j.provider_job_id,
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
  left join public.models as m on m.id = j.model_id
  where j.token is not null;
end;
$$;

create or replace function private.refund_due(
  p_status text, p_price integer, p_charged integer, p_stored integer, p_percent integer
) returns integer
language plpgsql immutable set search_path = pg_catalog, pg_temp as $$
begin
  return case p_status
    when 'completed' then p_price / p_charged * (p_charged - p_stored)
    when 'canceled' then ceil(p_price::numeric * p_percent / 100)
    else p_price
  end;
end;
$$;

create or replace function private.end_jobs(
  p_jobs private.running_jobs[], p_status text, p_metrics jsonb[] default '{}',
  p_stored integer[] default '{}', p_code text default null, p_detail text default null
) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_ids uuid[] := array(select j.job_id from unnest(p_jobs) as j);
  v_ended record;
  v_percent integer;
begin
  for v_ended in
    with ended as (
      update public.generations as g set
        status = p_status, finished_at = now(), updated_at = now(),
        error_code = case p_status when 'failed' then p_code end,
        error_message = case p_status when 'failed' then (
          select e.message from private.error_codes as e where e.code = p_code
        ) end
      where g.id = any (v_ids)
      returning
        g.id, g.user_id, g.price_credits, g.image_count, array_position(v_ids, g.id) as place
    )
    select e.*, p_stored[e.place] as stored from ended as e
    where p_stored[e.place] is distinct from e.image_count
    order by e.user_id
  loop
    if v_ended.stored not between 1 and v_ended.image_count then
      raise exception '% images stored, % charged', v_ended.stored, v_ended.image_count using
        errcode = 'invalid_parameter_value', detail = format('job %s', v_ended.id);
    end if;
    v_percent := 100;
    if p_status = 'canceled' and p_code is null and (p_jobs[v_ended.place]).token is not null
      and p_metrics[v_ended.place] @@ '$.is_asked == false || $.is_billed == false' is not true then
      select s.running_cancel_refund_percent into v_percent from private.settings as s;
      update public.entitlements set day_burned = day_burned + 1
      where user_id = v_ended.user_id;
    end if;
    perform private.refund_generation(v_ended.user_id, v_ended.id, private.refund_due(
      p_status, v_ended.price_credits, v_ended.image_count, v_ended.stored, v_percent
    ));
  end loop;
  perform private.record_attempts(p_jobs, p_status, p_metrics, p_code, p_detail);
end;
$$;

create or replace function private.requeue_job(
  p_job private.running_jobs, p_outcome text, p_attempts_used integer, p_delay interval,
  p_resumes boolean, p_metrics jsonb default '{}', p_code text default null,
  p_detail text default null
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
  perform private.record_attempts(array[p_job], p_outcome, array[p_metrics], p_code, p_detail);
  if p_delay <= interval '0' then
    perform private.wake_workers();
  end if;
end;
$$;

create or replace function private.complete_jobs(
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
  if exists (
    select from private.breakers as b where b.failures > 0 or b.times_opened > 0
  ) then
    perform private.note_successes(v_jobs);
  end if;
  return query select j.token, 'completed' from unnest(v_jobs) as j;
end;
$$;

create or replace function private.asked_delay(
  p_own interval, p_asked_seconds double precision, p_most_seconds integer
) returns interval
language sql immutable set search_path = pg_catalog, pg_temp as $$
  select greatest(
    p_own, greatest(0, least(coalesce(p_asked_seconds, 0), p_most_seconds)) * interval '1 second'
  )
$$;

create or replace function private.retry_delay(
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

create or replace function private.end_failed_attempt(
  p_job private.running_jobs, p_code text, p_detail text,
  p_retry_after_seconds double precision default null, p_metrics jsonb default '{}'
) returns text
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_error private.error_codes;
  v_settings private.settings;
  v_attempts_used integer;
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
  if v_error.is_retryable and v_attempts_used < v_settings.max_attempts and exists (
    select from public.generations
    where id = p_job.job_id and created_at > now() - v_settings.give_up_after
  ) then
    perform private.requeue_job(
      p_job, 'retried', v_attempts_used,
      private.retry_delay(
        (select count(*)::integer from private.attempts where generation_id = p_job.job_id),
        p_retry_after_seconds
      ),
      v_error.resumes and not p_metrics @> '{"is_asked": false}',
      -- What the next attempt resumes is paid once: it will be booked there.
      case when v_error.resumes then '{}' else p_metrics end, v_error.code, v_detail
    );
    return 'retried';
  end if;
  perform private.end_jobs(
    array[p_job], 'failed', array[p_metrics], p_code => v_error.code, p_detail => v_detail
  );
  return 'failed';
end;
$$;

create or replace function private.fail_jobs(
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
  perform private.note_failures(v_jobs, array(
    select p_codes[array_position(p_tokens, j.token)]
    from unnest(v_jobs) with ordinality as j order by j.ordinality
  ));
end;
$$;

create or replace function private.release_job(
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
    where g.id = v_job.job_id and g.created_at < now() - s.give_up_after
      and s.max_attempts <= (
        select count(*) from private.attempts as a where a.generation_id = g.id
      )
  ) then
    perform private.end_jobs(array[v_job], 'failed', p_code => 'internal');
  elsif v_job.job_id is not null then
    perform private.requeue_job(v_job, 'released', v_job.attempt - 1, interval '0', p_resumes);
  end if;
end;
$$;

comment on function private.release_job is
  'Gives a job back unfinished (graceful stop, refused account): next in line, the attempt does '
  'not count, the checkpoint is kept; or canceled, if the user asked for that; or failed, if it is '
  'older than give_up_after and has been claimed more than max_attempts times. p_resumes false: '
  'nothing was bought at the provider. Errors: DR001 lease_lost.';

create or replace function private.cancel_job(
  p_job_id uuid, p_token bigint, p_metrics jsonb default null
) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_job private.running_jobs := private.end_lease(p_job_id, p_token, '{canceled}');
begin
  if v_job.cancel_requested then
    perform private.end_jobs(array[v_job], 'canceled', array[p_metrics]);
  elsif v_job.job_id is not null then
    raise exception 'nobody asked to cancel job %', p_job_id
      using errcode = 'invalid_parameter_value';
  end if;
end;
$$;

create or replace function private.cancel_jobs(p_user_id uuid, p_job_ids uuid[]) returns void
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
      returning job_id, user_id into v_job.job_id, v_job.user_id;
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
end;
$$;

create or replace function private.cancel_generation(p_job_id uuid) returns json
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

create or replace function private.cancel_batch(p_batch_id uuid) returns json
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

create or replace function private.refresh_queue_state() returns void
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
      ))
    ),
    looked_at = now()
  where name in (select d.name from due as d)
$$;

create or replace function private.end_stale_jobs(p_ids uuid[]) returns integer
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_id uuid;
  v_job private.running_jobs;
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
  end loop;
  return cardinality(p_ids);
end;
$$;

create or replace function private.recover_stale_jobs(p_at_most integer default 100) returns integer
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
  perform private.skip_failing(
    'select private.note_failures($1, array_fill(''timeout''::text, array[cardinality($1)]))',
    array(
      select j from unnest(v_stale) as j
      where j.lease_until >= now()
        and not exists (select from private.running_jobs as r where r.job_id = j.job_id)
    )
  );
  perform private.refresh_queue_state();
  return v_recovered;
end;
$$;

comment on function private.recover_stale_jobs is
  'Requeues or finally fails up to p_at_most jobs whose lease or deadline has passed, and renews '
  'model_stats and the state of the queue in plans. Answers how many. What cannot be done is '
  'passed over: see private.skipped_rows. Looks less often, once in ten seconds at least, while a '
  'long transaction makes each look dear.';

create or replace function private.trim_history() returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  delete from private.workers where seen_at < now() - interval '7 days';
  delete from private.skipped_rows where last_at < now() - interval '7 days';
  if to_regclass('cron.job_run_details') is not null then
    delete from cron.job_run_details where end_time < now() - interval '7 days';
  end if;
end;
$$;

create index expired_files_marked_at_idx on private.expired_files (marked_at);

create or replace function private.lock_own_generation(
  p_job_id uuid, p_may_be_deleted boolean default false
) returns public.generations
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_user_id uuid := private.require_user_id(p_writes => true);
  v_generation public.generations;
begin
  select * into v_generation from public.generations
  where id = p_job_id and user_id = v_user_id and (deleted_at is null or p_may_be_deleted)
  for no key update;
  if not found then
    perform private.refuse_unknown_job();
  end if;
  return v_generation;
end;
$$;

create or replace function private.delete_generation(p_job_id uuid) returns json
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_generation public.generations := private.lock_own_generation(p_job_id, true);
  v_deleted_at timestamptz := coalesce(v_generation.deleted_at, now());
begin
  if v_generation.finished_at is null then
    perform private.refuse(
      'not_finished', 'job_id: the job is ' || v_generation.status,
      'Cancel it first, with cancel_generation.'
    );
  end if;
  update public.generations set deleted_at = v_deleted_at
  where id = p_job_id and deleted_at is null;
  return json_build_object('job_id', p_job_id, 'deleted_at', v_deleted_at);
end;
$$;

create or replace function private.is_output(p_path text) returns boolean
language sql stable set search_path = pg_catalog, pg_temp as $$
  select exists (
    select from public.images as i
    where i.generation_id = private.path_id(p_path, 2)
      and p_path in (i.storage_path, i.preview_path)
  ) or exists (select from private.live_jobs as j where j.job_id = private.path_id(p_path, 2))
$$;

create or replace function private.mark_files(p_files text[]) returns integer
language sql set search_path = pg_catalog, pg_temp as $$
  with marked as (
    insert into private.expired_files (bucket, path, user_id)
    select f.bucket, f.path, private.path_id(f.path, 1)
    from unnest(p_files) as gone (name)
    cross join lateral (
      select split_part(gone.name, '/', 1), substr(gone.name, strpos(gone.name, '/') + 1)
    ) as f (bucket, path)
    order by f.path, f.bucket
    on conflict (bucket, path) do nothing
    returning 1
  )
  select count(*)::integer from marked
$$;

create or replace function private.list_expired_files(p_at_most integer default 100)
returns table (bucket text, path text)
language sql security definer set search_path = pg_catalog, pg_temp as $$
  with due as (
    select f.ctid, case
      when f.bucket = 'inputs' then (
        select private.file_changed_at(f.bucket, f.path) > f.marked_at
        from public.entitlements as e where e.user_id = f.user_id
      )
      when f.generation_id is null then private.is_output(f.path)
      else (select g.deleted_at is null from public.generations as g where g.id = f.generation_id)
    end as is_needed
    from private.expired_files as f
    where f.try_at <= now() order by f.try_at limit p_at_most for update skip locked
  ),
  kept as (
    delete from private.expired_files as f
    where f.ctid = any (array(select d.ctid from due as d where d.is_needed))
  )
  update private.expired_files as f
  set try_at = now() + (select s.lease from private.settings as s)
  where f.ctid = any (array(select d.ctid from due as d where d.is_needed is not true))
  returning f.bucket, f.path
$$;

create or replace function private.erase_generations(p_ids uuid[]) returns integer
language sql set search_path = pg_catalog, pg_temp as $$
  with erased as (
    delete from public.generations as g
    where g.id = any (p_ids) and g.finished_at is not null and g.deleted_at is not null
      and not exists (select from private.expired_files as f where f.generation_id = g.id)
    returning g.id, g.batch_id
  ),
  emptied as (
    delete from public.batches as b
    where b.id = any (array(select e.batch_id from erased as e)) and not exists (
      select from unnest(b.job_ids) as j (id) inner join public.generations as g on g.id = j.id
      where g.id <> all (array(select e.id from erased as e))
    )
  )
  select count(*)::integer from erased
$$;

create or replace function private.forget(p_files text[]) returns integer
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_ids uuid[] := array(
    select g.id from public.generations as g
    where g.id = any (array(
      select f.generation_id
      from unnest(p_files) as gone (name)
      inner join private.expired_files as f
        on f.bucket = split_part(gone.name, '/', 1)
        and f.path = substr(gone.name, strpos(gone.name, '/') + 1)
    ))
    order by g.id for update
  );
begin
  delete from private.expired_files as f
  using unnest(p_files) as gone (name)
  where f.bucket = split_part(gone.name, '/', 1)
    and f.path = substr(gone.name, strpos(gone.name, '/') + 1)
    and private.file_changed_at(f.bucket, f.path) is null;
  return private.erase_generations(v_ids);
end;
$$;

create or replace function private.forget_files(p_buckets text[], p_paths text[]) returns integer
language plpgsql security definer set search_path = pg_catalog, pg_temp
set lock_timeout = '100ms' as $$
begin
  perform private.skip_failing('select private.forget($1)', array(
    select concat(gone.bucket, '/', gone.path)
    from unnest(p_buckets, p_paths) as gone (bucket, path)
    inner join private.expired_files as f on f.bucket = gone.bucket and f.path = gone.path
    order by f.generation_id, gone.path
  ));
  return (
    select count(*)
    from unnest(p_buckets, p_paths) as kept (bucket, path)
    inner join private.expired_files as f on f.bucket = kept.bucket and f.path = kept.path
  );
end;
$$;

comment on function private.forget_files is
  'Says that these files are gone from Storage. A generation whose last one it was is erased with '
  'all its rows. What Storage still has on record, or cannot be erased here, is not forgotten: '
  'answers how many. Repeating it changes nothing.';

create or replace function private.erase_images_of_generation() returns trigger
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  delete from public.images where generation_id = old.id;
  delete from private.retries where retry_of = old.id;
  return null;
end;
$$;

create or replace function private.lock_jobs_of_deleted_user() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_id uuid;
  v_locked integer;
begin
  for v_look in 1 .. 20 loop
    v_locked := 0;
    for v_id in
      select j.job_id from private.live_jobs as j where j.user_id = old.id order by j.job_id
    loop
      while exists (select from private.live_jobs as j where j.job_id = v_id) loop
        perform from private.ready_jobs where job_id = v_id for update;
        if not found then
          perform from private.running_jobs where job_id = v_id for update;
        end if;
        if found then
          v_locked := v_locked + 1;
          exit;
        end if;
      end loop;
    end loop;
    begin
      perform from public.entitlements where user_id = old.id for update;
      exit when v_locked = (
        select count(*) from private.live_jobs as j where j.user_id = old.id
      );
      raise sqlstate 'DR003' using message = 'jobs_moved';
    exception when sqlstate 'DR003' then
      null;
    end;
  end loop;
  return old;
end;
$$;

create or replace function private.erase_deleted_user() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_files text[];
  v_worker_id bigint;
begin
  perform from public.generations where user_id = old.user_id order by id for update;
  v_files := array(
    select concat('generations/', f.path)
    from public.images as i
    cross join lateral (values (i.storage_path), (i.preview_path)) as f (path)
    where i.user_id = old.user_id and f.path is not null
    order by f.path
  );
  if to_regclass('storage.objects') is not null then
    -- From <id>/ up to <id>0, the next character: operators that the index of names serves.
    v_files := v_files || array(
      select concat(o.bucket_id, '/', o.name)
      from storage.objects as o
      where o.name ~>=~ concat(old.user_id, '/') and o.name ~<~ concat(old.user_id, '0')
        and o.bucket_id in ('generations', 'inputs')
      order by o.name
    );
  end if;
  perform private.skip_failing('select private.mark_files($1)', v_files);
  delete from private.ready_jobs where user_id = old.user_id;
  for v_worker_id in
    delete from private.running_jobs where user_id = old.user_id returning worker_id
  loop
    perform pg_notify('darkroom_worker_' || v_worker_id, 'cancel');
  end loop;
  delete from public.generations where user_id = old.user_id;
  delete from public.batches where user_id = old.user_id;
  perform private.erase_ledgers(array[old.user_id]);
  return null;
end;
$$;

comment on column private.settings.max_input_files is
  'How many source images a user may keep in bucket inputs.';

comment on table private.retention_walks is
  'The steps of retention: functions of this schema, and how far each has come.';

create or replace function private.take_step(p_name text, p_at_most integer) returns integer
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_place text;
  v_done integer;
begin
  select w.place into v_place from private.retention_walks as w
  where w.name = p_name for update skip locked;
  if not found then
    return 0;
  end if;
  execute format('select * from private.%I($1, $2)', p_name) into v_place, v_done
  using v_place, p_at_most;
  update private.retention_walks
  set place = coalesce(v_place, '00000000-0000-0000-0000-000000000000') where name = p_name;
  return v_done;
end;
$$;

create or replace function private.apply_retention(p_at_most integer default 500) returns integer
language sql security definer set search_path = pg_catalog, pg_temp
set lock_timeout = '100ms' as $$
  select private.skip_failing(
    format('select sum(private.take_step(step, %s)) from unnest($1) as step', p_at_most),
    array(select w.name from private.retention_walks as w order by w.name)
  )
$$;

comment on function private.apply_retention is
  'Looks at up to p_at_most rows of each kind: marks the files of what has been kept long enough '
  'and erases what has none. Answers how many rows it marked or erased; safe from several places '
  'at once. What cannot be done is passed over: see private.skipped_rows.';

create or replace function private.expire_generations(p_ids uuid[]) returns integer
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_settings private.settings := (select s from private.settings as s);
  v_files integer;
  v_ids uuid[] := array(
    select g.id from public.generations as g
    where g.id = any (p_ids) and g.finished_at is not null and (
      g.deleted_at <= now() - v_settings.keep_deleted
      or g.finished_at <= now() - v_settings.keep_generations and not g.is_favorite
    )
    order by g.id for update skip locked
  );
begin
  update public.generations set deleted_at = now()
  where id = any (v_ids) and deleted_at is null;
  insert into private.expired_files (bucket, path, user_id, generation_id)
  select 'generations', f.path, i.user_id, i.generation_id
  from public.images as i
  cross join lateral (values (i.storage_path), (i.preview_path)) as f (path)
  where i.generation_id = any (v_ids) and f.path is not null
  order by f.path
  on conflict (bucket, path) do nothing;
  get diagnostics v_files = row_count;
  return v_files + private.erase_generations(v_ids);
end;
$$;

create or replace function private.expire_deleted(
  p_place text, p_at_most integer, out place text, out done integer
)
language sql set search_path = pg_catalog, pg_temp as $$
  select null, private.skip_failing('select private.expire_generations($1)', array(
    select g.id from public.generations as g
    where g.deleted_at <= now() - (select s.keep_deleted from private.settings as s)
      and g.finished_at is not null
      and not exists (select from private.expired_files as f where f.generation_id = g.id)
    order by g.deleted_at limit p_at_most + (select count(*) from private.skipped_rows)
  ))
$$;

create or replace function private.expire_old(
  p_place text, p_at_most integer, out place text, out done integer
)
language sql set search_path = pg_catalog, pg_temp as $$
  select
    case when count(*) = p_at_most and not bool_or(w.is_young) then max(w.id::text collate "C") end,
    private.skip_failing('select private.expire_generations($1)', array_agg(w.id))
  from (
    select g.id, g.created_at between now() - s.keep_generations and now() as is_young
    from private.settings as s
    inner join public.generations as g on g.id > p_place::uuid
    where s.keep_generations is not null order by g.id limit p_at_most
  ) as w
$$;

create or replace function private.trim_attempts(
  p_place text, p_at_most integer, out place text, out done integer
)
language sql set search_path = pg_catalog, pg_temp as $$
  select
    case when count(*) = p_at_most and not bool_or(w.created_at between w.before and now())
      then max(w.generation_id::text collate "C") end,
    private.skip_failing(
      'with gone as (delete from private.attempts as a using private.settings as s'
      ' where a.generation_id = any ($1) and a.ended_at <= now() - s.keep_attempts returning 1)'
      ' select count(*) from gone',
      array_agg(distinct w.generation_id) filter (
        where w.ended_at <= w.before and w.finished_at is not null
      )
    )
  from (
    select
      a.generation_id, a.ended_at, g.created_at, g.finished_at, now() - s.keep_attempts as before
    from private.settings as s
    cross join (
      select * from private.attempts
      where generation_id > p_place::uuid order by generation_id, token limit p_at_most
    ) as a
    cross join lateral (
      select created_at, finished_at from public.generations where id = a.generation_id limit 1
    ) as g
  ) as w
$$;

create or replace function private.erase_ledgers(p_user_ids uuid[]) returns integer
language sql set search_path = pg_catalog, pg_temp as $$
  with erased as (
    delete from public.credit_ledger as l
    using private.settings as s
    where l.user_id = any (p_user_ids)
      and l.created_at <= clock_timestamp() - s.keep_ledger_of_deleted_users
    returning l.id
  )
  select count(*)::integer from erased
$$;

create or replace function private.trim_ledger(
  p_place text, p_at_most integer, out place text, out done integer
)
language sql set search_path = pg_catalog, pg_temp as $$
  with recursive walk (user_id, step) as (
    select p_place::uuid, 0
    union all
    select (
      select l.user_id from public.credit_ledger as l
      where l.user_id > w.user_id order by l.user_id limit 1
    ), w.step + 1
    from walk as w where w.user_id is not null and w.step < p_at_most
  )
  select
    case when count(w.user_id) > p_at_most then max(w.user_id::text collate "C") end,
    private.skip_failing('select private.erase_ledgers($1)', array_agg(w.user_id) filter (
      where not exists (select from public.entitlements as e where e.user_id = w.user_id)
    ))
  from walk as w
$$;

create or replace function private.expire_orphans(
  p_place text, p_at_most integer, out place text, out done integer
)
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_files text[];
begin
  if to_regclass('storage.objects') is not null then
    select
      case when count(*) >= p_at_most then max(o.name collate "C") end,
      array_agg(concat(o.bucket_id, '/', o.name)) filter (
        where o.changed_at < now() - interval '1 day' and private.path_id(o.name, 1) is not null
          and case o.bucket_id
            when 'generations' then
              private.path_id(o.name, 2) is not null and split_part(o.name, '/', 3) <> ''
              and not private.is_output(o.name)
            when 'inputs' then not exists (
              select from public.entitlements as e cross join private.settings as s
              where e.user_id = private.path_id(o.name, 1) and (
                coalesce(o.changed_at >= now() - s.keep_inputs, true)
                or exists (select from private.live_jobs as j where j.user_id = e.user_id)
              )
            )
          end
      )
    into place, v_files
    from (
      select bucket_id, name, coalesce(updated_at, created_at) as changed_at from storage.objects
      where name ~>~ p_place order by name using ~<~ fetch first p_at_most rows with ties
    ) as o;
  end if;
  done := private.skip_failing('select private.mark_files($1)', v_files);
end;
$$;

create view private.broken_books with (security_invoker = true) as
select
  'balance' as rule, e.user_id, null::uuid as generation_id,
  format('credits are %s, the ledger ends at %s', e.credits, coalesce(l.balance_after, 0)) as detail
from public.entitlements as e
-- Not c.user_id = e.user_id: the planner may then walk the ids of all users down to this one's.
left join lateral (
  select c.user_id, c.balance_after
  from public.credit_ledger as c
  where (c.user_id, c.id) <= (e.user_id, 9223372036854775807)
  order by c.user_id desc, c.id desc limit 1
) as l on e.user_id = l.user_id
where e.credits <> coalesce(l.balance_after, 0)
union all
select
  'ledger', l.user_id, l.generation_id,
  format('entry %s: %s and %s are not %s', l.id, l.balance_before, l.amount, l.balance_after)
from (
  select
    c.*, lag(c.balance_after, 1, 0) over (partition by c.user_id order by c.id) as balance_before
  from public.credit_ledger as c
  -- Of a user who is gone the oldest entries may be, too.
  inner join public.entitlements as e on c.user_id = e.user_id
) as l
-- As bigint: a sum that does not fit is wrong, too.
where l.balance_before::bigint + l.amount <> l.balance_after
union all
select
  'place', g.user_id, g.id,
  format('%s, and %s', g.status, case
    when ready.job_id is not null then 'ready'
    when running.job_id is not null then 'running'
    else 'neither ready nor running'
  end)
from public.generations as g
left join private.ready_jobs as ready on g.id = ready.job_id
left join private.running_jobs as running on g.id = running.job_id
where (g.status = 'queued', g.status = 'processing')
  <> (ready.job_id is not null, running.job_id is not null)
union all
select 'place', j.user_id, j.job_id, 'queued or running, and no generation of its user'
from private.live_jobs as j
left join public.generations as g on j.job_id = g.id and j.user_id = g.user_id
where g.id is null
union all
select
  'charge', g.user_id, g.id,
  format('the price is %s, charged were %s', g.price_credits, coalesce(-l.amount, 0))
from public.generations as g
left join (
  select c.generation_id, sum(c.amount) as amount
  from public.credit_ledger as c where c.kind = 'charge' group by c.generation_id
) as l on g.id = l.generation_id
where coalesce(-l.amount, 0) <> g.price_credits
union all
-- By the rule by which jobs end (75). Of a canceled one the share was a setting of that day: any
-- is right, but one there is.
select
  'refund', g.user_id, g.id,
  format('%s at the price of %s, refunded were %s', g.status, g.price_credits, l.amount)
from public.generations as g
left join public.credit_ledger as l on g.id = l.generation_id and l.kind = 'refund'
where case
  when g.status in ('queued', 'processing') then l.amount is not null
  when g.status = 'canceled'
    then coalesce(l.amount > g.price_credits, g.price_credits > 0)
  else coalesce(l.amount, 0) <> private.refund_due(
    g.status, g.price_credits, g.image_count,
    (select count(*) from public.images as i where i.generation_id = g.id)::integer, 100
  )
end;

comment on view private.broken_books is
  'Are the books right? One row for each broken rule: balance and ledger (each entry follows from '
  'the one before, the balance is the last), place (queued is ready, processing is running, and '
  'nothing else is), charge (the price, once), refund (what was charged but not made).';

create or replace function private.recent_broken_books(
  p_at_most integer default 200
) returns setof private.broken_books
language plpgsql stable set search_path = pg_catalog, pg_temp
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off as $$
declare
  v_ids uuid[] := array(select g.id from public.generations as g order by g.id desc limit p_at_most)
    || array(
      select a.generation_id from private.attempts as a
      where a.ended_at > now() - interval '15 minutes' order by a.ended_at desc limit p_at_most
    );
begin
  return query
  select b.* from private.broken_books as b
  where b.rule = 'balance' and b.user_id = any (array(
    select g.user_id from public.generations as g where g.id = any (v_ids)
  ))
  union all
  select b.* from private.broken_books as b
  where b.rule in ('place', 'refund') and b.generation_id = any (v_ids);
end;
$$;

create or replace function private.first_id_of(p_time timestamptz) returns uuid
language sql immutable set search_path = pg_catalog, pg_temp as $$
  select rpad(lpad(to_hex((extract(epoch from p_time) * 1000)::bigint), 12, '0'), 32, '0')::uuid
$$;

create view private.paused_now with (security_invoker = true) as
select
  case when b.name like '%/%' then 'model' else 'provider' end as kind,
  b.name, b.paused_until, b.pause_reason, b.times_opened,
  cardinality(b.failed_users) as failed_users
from private.breakers as b
where b.paused_until > now();

comment on view private.paused_now is
  'Which models and providers are paused, until when, and why? times_opened 0: by an operator. '
  'failed_users: only so many users wait, others are tried; 0: everybody waits.';

create view private.queue_by_model with (security_invoker = true) as
select
  n.model_id, m.provider,
  coalesce(case when not p.is_paused then q.waiting - q.delayed end, 0) as ready,
  coalesce(case when not p.is_paused then q.delayed end, 0) as delayed,
  coalesce(case when p.is_paused then q.waiting end, 0) as paused,
  coalesce(r.running, 0) as running,
  case when not p.is_paused and q.waiting > q.delayed then extract(epoch from now() - q.ready_since)
  end as oldest_ready_seconds
from (
  select
    j.model_id, count(*) as waiting, count(*) filter (where j.run_at > now()) as delayed,
    min(coalesce(j.run_at, j.queued_at)) as ready_since
  from private.ready_jobs as j group by j.model_id
) as q
full outer join (
  select j.model_id, count(*) as running from private.running_jobs as j group by j.model_id
) as r on q.model_id = r.model_id
cross join lateral (select coalesce(q.model_id, r.model_id) as model_id) as n
left join public.models as m on n.model_id = m.id
cross join lateral (
  select count(*) > 0 as is_paused
  from private.paused_now as x where x.name in (n.model_id, m.provider)
) as p
order by n.model_id;

comment on view private.queue_by_model is
  'How many jobs of each model wait or run? ready (may be claimed now), delayed (a retry that is '
  'put off), paused, running; oldest_ready_seconds: since the first of the ready may be claimed.';

create view private.running_now with (security_invoker = true) as
select
  r.job_id, r.user_id, r.model_id, r.worker_id, w.host, now() - r.claimed_at as running, r.stage,
  r.progress, r.attempt, r.provider_job_id, r.cancel_requested, r.lease_until - now() as lease_left,
  r.deadline_at - now() as deadline_left,
  greatest(now() - least(r.lease_until, r.deadline_at), '0') as stuck_for
from private.running_jobs as r
left join private.workers as w on r.worker_id = w.id
order by r.claimed_at;

comment on view private.running_now is
  'What runs now, where, for how long, and how far is it? stuck_for: its lease or its deadline has '
  'passed so long ago, and nobody has taken it back.';

create view private.worker_activity with (security_invoker = true) as
select
  w.id as worker_id, w.host, w.version, a.is_alive, w.asleep, w.is_listening, w.slots,
  coalesce(r.jobs, 0) as slots_used,
  case
    when not a.is_alive then 'silent'
    when r.jobs > 0 then 'busy'
    when w.asleep then 'asleep'
    else 'idle'
  end as state,
  round(extract(epoch from now() - w.seen_at), 1) as seen_seconds,
  round(extract(epoch from now() - w.started_at)) as up_seconds
from private.workers as w
cross join lateral (
  select w.seen_at > now() - s.lease as is_alive from private.settings as s
) as a
left join (
  select j.worker_id, count(*) as jobs from private.running_jobs as j group by j.worker_id
) as r on w.id = r.worker_id
order by a.is_alive, w.id;

comment on view private.worker_activity is
  'Which worker lives, and what does it do? First those that went silent without stopping, for as '
  'long as a lease. is_listening false: it finds jobs by polling only.';

create view private.vacuum_holders with (security_invoker = true) as
select
  'session' as kind, a.pid, coalesce(nullif(a.application_name, ''), a.backend_type) as name,
  a.state, greatest(age(a.backend_xid), age(a.backend_xmin)) as age_transactions,
  now() - a.xact_start as since
from pg_stat_activity as a
where (a.backend_xmin is not null or a.backend_xid is not null)
  and (a.datname = current_database() or a.datname is null)
  and a.pid <> pg_backend_pid()
  -- Its own snapshot holds back nothing.
  and a.backend_type <> 'autovacuum worker'
union all
select 'prepared transaction', null, p.gid, 'prepared', age(p.transaction), now() - p.prepared
from pg_prepared_xacts as p
where p.database = current_database()
union all
select
  'replication slot', s.active_pid, s.slot_name,
  case when s.active then 'active' else 'inactive' end, age(s.xmin), null
from pg_replication_slots as s
where s.xmin is not null
order by age_transactions desc;

comment on view private.vacuum_holders is
  'Who holds back vacuum? While one of these is old, no dead row can be cleaned up, and the tables '
  'of the queue grow. Sessions of other roles show only to members of pg_read_all_stats.';

create or replace function private.rates_health() returns jsonb
language sql stable set search_path = pg_catalog, pg_temp set enable_seqscan = off set jit = off
as $$
  with moved as (
    select
      a.outcome::text as what, count(*) as jobs,
      count(*) filter (where a.ended_at > now() - interval '1 minute') as new_jobs
    from private.attempts as a
    where a.ended_at > now() - interval '15 minutes' group by a.outcome
    union all
    select 'enqueued', count(*), count(*) filter (where g.created_at > now() - interval '1 minute')
    from public.generations as g
    where g.id >= private.first_id_of(now() - interval '15 minutes')
      and g.created_at > now() - interval '15 minutes'
  )
  select jsonb_build_object(
    'last_minute', jsonb_object_agg(m.what, m.new_jobs),
    'per_minute_of_15', jsonb_object_agg(m.what, round(m.jobs / 15.0, 2)),
    'attempts_of_15_minutes', coalesce(sum(m.jobs) filter (where m.what <> 'enqueued'), 0),
    'error_rate', round(
      sum(m.jobs) filter (where m.what in ('failed', 'retried'))
      / nullif(sum(m.jobs) filter (where m.what <> 'enqueued'), 0), 4
    )
  ) || (
    -- No join, which might be made by reading all generations.
    select jsonb_build_object(
      'burned_of_15_minutes', count(*), 'burned_by_users', count(distinct (
        select g.user_id from public.generations as g where g.id = a.generation_id
      ))
    )
    from private.attempts as a
    where a.ended_at > now() - interval '15 minutes' and a.outcome = 'canceled'
      and a.error_code is null and a.cost_usd is distinct from 0
  )
  from (
    select k.what, coalesce(c.jobs, 0) as jobs, coalesce(c.new_jobs, 0) as new_jobs
    from unnest('{enqueued,completed,failed,retried}'::text[]) as k (what)
    left join moved as c on c.what = k.what
  ) as m
$$;

create or replace function private.alert_states(h jsonb) returns table (
  alert text, severity text, is_raised boolean, value numeric, threshold numeric, detail text,
  hint text
)
language sql stable set search_path = pg_catalog, pg_temp as $$
  select
    rule.alert, rule.severity,
    coalesce(m.value::numeric > rule.threshold and (m.cases >= rule.min_cases) is not false, false),
    m.value::numeric, rule.threshold, m.detail, rule.hint
  from private.alert_rules as rule
  cross join jsonb_to_record(h) as x (
    depth jsonb, running jsonb, rates jsonb, workers jsonb, routines jsonb, paused jsonb,
    vacuum jsonb, outbox jsonb, books jsonb, skipped jsonb
  )
  cross join lateral (
    select (x.workers ->> 'alive')::integer as alive, (x.workers ->> 'listening')::integer as listen
  ) as w
  left join lateral (
    select s.* from jsonb_each(x.routines) as s
    order by (s.value ->> 'runs_missed')::numeric desc nulls last limit 1
  ) as r on true
  left join lateral (values
    ('depth', x.depth ->> 'ready', null::bigint, (x.depth ->> 'ready') || ' jobs are ready'),
    ('oldest_age', x.depth ->> 'oldest_ready_seconds', null,
      format('a job has waited for %s s', round((x.depth ->> 'oldest_ready_seconds')::numeric))),
    ('error_rate', x.rates ->> 'error_rate', (x.rates ->> 'attempts_of_15_minutes')::bigint,
      format('of %s attempts in 15 minutes, %s %% ended in an error',
        x.rates ->> 'attempts_of_15_minutes', round(100 * (x.rates ->> 'error_rate')::numeric))),
    ('burned', x.rates ->> 'burned_of_15_minutes', null,
      format('%s running jobs canceled in 15 minutes, by %s users: the provider may bill them',
        x.rates ->> 'burned_of_15_minutes', x.rates ->> 'burned_by_users')),
    ('stuck', x.running ->> 'stale_seconds', null,
      format('%s running jobs are past lease or deadline, one for %s s',
        x.running ->> 'stale', round((x.running ->> 'stale_seconds')::numeric))),
    ('no_worker', case when w.alive = 0 then x.depth ->> 'ready' end, null,
      (x.depth ->> 'ready') || ' jobs are ready and no worker is alive'),
    ('not_listening', (w.alive - w.listen)::text, null,
      format('%s of %s workers', w.alive - w.listen, w.alive)),
    ('cron_silent', r.value ->> 'runs_missed', null,
      concat(r.key, ' last ran at ', r.value ->> 'last_run_at')),
    ('paused', jsonb_array_length(x.paused)::text, null, (
      select string_agg(concat(
        p.kind, ' ', p.name, ' until ' || p.paused_until, ': ' || p.pause_reason
      ), '; ' order by p.name)
      from jsonb_to_recordset(x.paused)
        as p (kind text, name text, paused_until text, pause_reason text)
    )),
    ('vacuum_held_back', x.vacuum ->> 'oldest_transactions', null, (
      select concat_ws(
        ' ', v.kind, v.pid, quote_ident(v.name), v.state,
        'since ' || date_trunc('second', v.since), format('(%s transactions)', v.age_transactions)
      )
      from private.vacuum_holders as v order by v.age_transactions desc nulls last limit 1
    )),
    ('dead_deliveries', x.outbox ->> 'dead', null,
      (x.outbox ->> 'dead') || ' deliveries to webhooks were given up'),
    ('skipped_rows', x.skipped ->> 'rows', null,
      format('%s rows since %s: %s', x.skipped ->> 'rows', x.skipped ->> 'since', (
        select string_agg(concat(s.key, ' ', s.value), ', ' order by s.key)
        from jsonb_each_text(x.skipped -> 'steps') as s
      ))),
    ('books', ((x.books ->> 'recent_problems')::integer
      + coalesce((x.books ->> 'problems')::integer, 0))::text, null,
      format('%s problems among what moved last, %s at the check of %s',
        x.books ->> 'recent_problems', coalesce(x.books ->> 'problems', 'none'),
        coalesce(x.books ->> 'checked_at', 'never')))
  ) as m (alert, value, cases, detail) on m.alert = rule.alert
$$;

create or replace function private.health_of(p_models jsonb) returns json
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  -- More than a monitor: who asks may pause what the reasons are about.
  v_is_operator boolean := has_function_privilege(
    coalesce(nullif(current_setting('role', true), 'none'), session_user),
    'public.pause_model(text, timestamptz, text)', 'execute'
  );
  v_health jsonb;
  v_alerts jsonb;
begin
  v_health := jsonb_build_object(
    'depth', (
      select jsonb_build_object(
        'ready', coalesce(sum(m.ready), 0), 'delayed', coalesce(sum(m.delayed), 0),
        'paused', coalesce(sum(m.paused), 0), 'oldest_ready_seconds', max(m.oldest_ready_seconds)
      )
      from jsonb_populate_recordset(null::private.queue_by_model, p_models) as m
    ),
    'running', (
      select jsonb_build_object(
        'jobs', count(*), 'stale', count(*) filter (where r.stuck_for > '0'),
        'stale_seconds', extract(epoch from max(r.stuck_for) filter (where r.stuck_for > '0'))
      )
      from private.running_now as r
    ),
    'rates', private.rates_health(),
    'workers', (
      select jsonb_build_object(
        'alive', count(*), 'asleep', count(*) filter (where w.asleep),
        'listening', count(*) filter (where w.is_listening),
        'slots', coalesce(sum(w.slots), 0), 'slots_used', coalesce(sum(w.slots_used), 0)
      )
      from private.worker_activity as w where w.is_alive
    ),
    'routines', (
      select coalesce(jsonb_object_agg(r.name, jsonb_build_object(
        'last_run_at', r.last_run_at, 'every_seconds', extract(epoch from r.every),
        'runs_missed',
        trunc(extract(epoch from now() - r.last_run_at) / extract(epoch from r.every))
      )), '{}')
      from private.routines as r where r.every is not null
    ),
    'paused', (
      select coalesce(jsonb_agg(to_jsonb(p) ||
        case when v_is_operator then '{}' else '{"pause_reason": null}'::jsonb end
      ), '[]')
      from private.paused_now as p
    ),
    'vacuum', (
      select jsonb_build_object(
        'oldest_transactions', coalesce(max(h.age_transactions), 0),
        'sees_all_sessions', pg_has_role(current_user, 'pg_read_all_stats', 'usage')
      )
      from private.vacuum_holders as h
    ),
    'outbox', private.outbox_health(),
    'books', (
      select jsonb_build_object(
        'recent_problems', (select count(*) from private.recent_broken_books()),
        'checked_at', max(r.last_run_at), 'problems', (max(r.result ->> 'problems'))::integer,
        'examples', coalesce(
          jsonb_agg(r.result -> 'examples') filter (where v_is_operator) -> 0, '[]'
        )
      )
      from private.routines as r where r.name = 'check_books' and r.result is not null
    ),
    -- What routines passed over within a day; who was only locked counts from the third time. And
    -- files that Storage would not delete for a day.
    'skipped', (
      select jsonb_build_object(
        'rows', coalesce(sum(s.rows), 0), 'since', min(s.first_at),
        'steps', coalesce(jsonb_object_agg(s.step, s.rows), '{}')
      )
      from (
        select r.step, count(*) as rows, min(r.first_at) as first_at
        from private.skipped_rows as r
        where r.last_at > now() - interval '1 day'
          and (r.times > 2 or r.code not in ('40P01', '55P03'))
        group by r.step
        union all
        select 'storage', count(*), min(o.marked_at)
        from (
          select f.marked_at from private.expired_files as f
          where f.marked_at < now() - interval '1 day' order by f.marked_at limit 1000
        ) as o
        having count(*) > 0
      ) as s
    )
  );
  select coalesce(jsonb_agg(jsonb_build_object(
    'alert', s.alert, 'severity', s.severity, 'detail', s.detail, 'hint', s.hint
  ) order by s.severity, s.alert), '[]') into v_alerts
  from private.alert_states(v_health) as s where s.is_raised;
  return (
    select json_object_agg(p.key, p.value order by p.key <> 'status', p.key <> 'alerts')
    from jsonb_each(v_health || jsonb_build_object(
      'status', coalesce(v_alerts #>> '{0,severity}', 'ok'), 'alerts', v_alerts
    )) as p
  );
end;
$$;

create or replace function public.queue_health() returns json
language sql stable security definer set search_path = pg_catalog, pg_temp set jit = off
set max_parallel_workers_per_gather = 0 as $$
  select private.health_of((select jsonb_agg(q) from private.queue_by_model as q))
$$;

comment on function public.queue_health is
  'How the queue is, for monitors: {status (ok | warning | critical), alerts [{alert, severity, '
  'detail, hint}], depth {ready, delayed, paused, oldest_ready_seconds}, running {jobs, stale, '
  'stale_seconds}, rates {last_minute, per_minute_of_15, attempts_of_15_minutes, error_rate, '
  'burned_of_15_minutes, burned_by_users}, workers {alive, asleep, listening, slots, slots_used}, '
  'routines {name: {last_run_at, every_seconds, runs_missed}}, paused, vacuum '
  '{oldest_transactions, sees_all_sessions}, outbox {pending, oldest_pending_seconds, dead}, books '
  '{recent_problems, checked_at, problems, examples}, skipped {rows, since, steps}}. A monitor is '
  'shown no reasons and no examples. Thresholds are rows of private.alert_rules.';

create or replace function private.check_setup(p_functions text[])
returns table (part text, verdict text, detail text)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_faults text;
begin
  return query
  select
    'database',
    case when r.rolsuper or r.rolbypassrls or f.missing is not null then 'wrong' else 'ok' end,
    case
      when r.rolsuper or r.rolbypassrls
        then format('DATABASE_URL: role %s may do everything; use darkroom_worker', r.rolname)
      when f.missing is not null
        then format('role %s may not call %s: apply supabase/migrations', r.rolname, f.missing)
      else format(
        'PostgreSQL %s; role %s may call all it needs',
        split_part(current_setting('server_version'), ' ', 1), r.rolname
      )
    end
  from pg_roles as r
  cross join (
    select string_agg('private.' || name, ', ' order by name) as missing
    from unnest(p_functions) as name
    where not exists (
      select from pg_proc as p
      where p.proname = name and p.pronamespace = to_regnamespace('private')
        and has_function_privilege(session_user, p.oid, 'execute')
    ) and (
      to_regclass('private.deliveries') is not null  -- without webhooks (96) nothing is told
      or name <> all ('{claim_deliveries,finish_delivery,finish_receipts}')
    )
  ) as f
  where r.rolname = session_user;

  -- What keeps each routine that pg_cron is to run from running.
  if not exists (select from private.routines as r where r.every is not null) then
    return query select
      'cron', 'note', 'no pg_cron for this database: workers do its work on their own';
  else
    if to_regclass('cron.job') is null then
      v_faults := 'pg_cron is not installed any more';
    else
      select string_agg(format('job darkroom_%s is %s', r.name, case
        when j.jobid is null then 'missing'
        when not j.active then 'switched off'
        else format('silent: it last ran at %s', r.last_run_at)
      end), '; ' order by r.name) into v_faults
      from private.routines as r
      left join cron.job as j on j.jobname = 'darkroom_' || r.name
      where r.every is not null
        and (j.active is not true or now() - r.last_run_at > r.every * (1 + (
          select coalesce(rule.threshold, 3) from private.alert_rules as rule
          where rule.alert = 'cron_silent'
        )::double precision));
    end if;
    return query
    select
      'cron', case when v_faults is null then 'ok' else 'wrong' end,
      coalesce(v_faults || '; see cron.job_run_details', format(
        '%s jobs, the last ran at %s', count(*), date_trunc('second', max(r.last_run_at))
      ))
    from private.routines as r where r.every is not null;
  end if;

  -- What differs in Storage from what the installation made.
  if to_regclass('storage.objects') is null then
    return query select
      'policies', 'note', 'no schema storage here: PostgreSQL does not know who may read files';
  else
    select string_agg(f.fault, '; ') into v_faults
    from (
      select
        format('bucket %s is %s', b.id, case when s.id is null then 'missing' else 'public' end)
      from unnest(array['generations', 'inputs']) as b (id)
      left join storage.buckets as s on s.id = b.id
      where s.id is null or s.public
      union all
      select 'row level security is off on storage.objects'
      from pg_class as c
      where c.oid = to_regclass('storage.objects') and not c.relrowsecurity
      union all
      select format('policy "%s" is missing on storage.objects', wanted.name)
      from unnest(array[
        'Users read their own generated images', 'Everybody reads shared images',
        'Users read their own input images', 'Users add their own input images',
        'Users replace their own input images', 'Users delete their own input images'
      ]) as wanted (name)
      where (wanted.name !~ '^Everybody' or to_regclass('private.shared_paths') is not null)
        and not exists (
          select from pg_policies as p
          where p.schemaname = 'storage' and p.tablename = 'objects'
            and p.policyname = wanted.name
        )
    ) as f (fault);
    return query select
      'policies', case when v_faults is null then 'ok' else 'wrong' end,
      coalesce(
        v_faults || ': see sql/20_access.sql, sql/90_schedule.sql and sql/95_gallery.sql',
        'both buckets are private, and users reach their own folders'
      );
  end if;

  -- A role of PostgREST's whose requests nothing ends: no setting of its own, of the login, or of
  -- the database. No row where all have one.
  return query
  select 'timeouts', 'wrong', format(
    'one request may hold a connection for ever: alter role %s set statement_timeout = ''8s''',
    r.rolname
  )
  from pg_roles as r
  where r.rolname in ('anon', 'authenticated') and not exists (
    select from pg_db_role_setting as s cross join unnest(s.setconfig) as c (setting)
    where c.setting ~ '^statement_timeout=[^0]' and (
      s.setdatabase = 0 and s.setrole in (r.oid, coalesce(to_regrole('authenticator'), 0))
      or s.setrole = 0 and s.setdatabase = (
        select d.oid from pg_database as d where d.datname = current_database()
      )
    )
  )
  order by r.rolname limit 1;
end;
$$;

comment on function private.check_setup is
  'For `worker.py check`: whether its role may call these functions of schema private, whether '
  'pg_cron runs its jobs, whether buckets and policies of Storage are there, and, where they do '
  'not, whether requests of the API end. Answers part, verdict (ok | note (works, but know it) | '
  'wrong) and detail, in words for people.';

create or replace function public.enqueue_generation(
  model text, prompt text, params jsonb default '{}', idempotency_key text default null
) returns json
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  return private.enqueue_generation(model, prompt, params, idempotency_key);
end;
$$;

comment on function public.enqueue_generation is
  'Asks for a picture: checks, charges and queues in one transaction. Answers {job_id, status, '
  'reused, credits_left, queue_position and eta_seconds (null here: get_job_status tells them), '
  'poll_after_ms}. The same idempotency_key and payload answer with the same job and charge '
  'nothing. With params.reuse = true and a seed, a finished generation of the same input is '
  'answered, free, if it is among your last 200. Errors: PT400 invalid_input, PT401 '
  'not_authenticated, PT402 insufficient_credits, PT403 requires_paid_plan, PT404 not_found (also '
  'where the job of the key is deleted), PT409 idempotency_conflict, PT429 too_many_active | '
  'rate_limited, PT503 busy | model_paused | unavailable.';

create or replace function public.enqueue_batch(
  model text, prompts text[], params jsonb default '{}', idempotency_key text default null
) returns json
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  return private.enqueue_batch(model, prompts, params, idempotency_key);
end;
$$;

comment on function public.enqueue_batch is
  'Asks for one generation of each prompt (as many as your plan''s max_batch), all or nothing. '
  'Answers as get_batch_status does. The same idempotency_key and request answer with the same '
  'batch and charge nothing; once all its jobs are deleted it is not found. An error of one prompt '
  'names it in details, prompts[0] being the first. Errors: those of enqueue_generation.';

create or replace function public.get_batch_status(batch_id uuid) returns json
language sql stable set search_path = pg_catalog, pg_temp
return private.get_batch_status(batch_id);

create or replace function public.retry_generation(job_id uuid) returns json
language sql set search_path = pg_catalog, pg_temp
return private.retry_generation(job_id);

create or replace function public.get_job_status(job_id uuid) returns json
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
begin
  return private.get_job_status(job_id);
end;
$$;

create or replace function public.list_active_jobs(job_ids uuid[] default '{}') returns json
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
begin
  return private.list_active_jobs(job_ids);
end;
$$;

create or replace function public.get_entitlement() returns json
language sql stable set search_path = pg_catalog, pg_temp
return private.get_entitlement();

create or replace function public.list_models() returns json
language sql stable set search_path = pg_catalog, pg_temp
return private.list_models();

create or replace function public.list_generations(
  before uuid default null, page_size integer default 20, only_favorites boolean default false,
  tag text default null, status text default null
) returns json
language sql stable set search_path = pg_catalog, pg_temp
return private.list_generations(before, page_size, only_favorites, tag, status);

create or replace function public.delete_generation(job_id uuid) returns json
language sql set search_path = pg_catalog, pg_temp
return private.delete_generation(job_id);

create or replace function public.restore_generation(job_id uuid) returns json
language sql set search_path = pg_catalog, pg_temp
return private.restore_generation(job_id);

create or replace function public.cancel_generation(job_id uuid) returns json
language sql set search_path = pg_catalog, pg_temp
return private.cancel_generation(job_id);

create or replace function public.cancel_batch(batch_id uuid) returns json
language sql set search_path = pg_catalog, pg_temp
return private.cancel_batch(batch_id);

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
public.enqueue_generation, public.get_batch_status, public.get_entitlement, public.get_job_status,
public.grant_credits, public.list_active_jobs, public.list_generations, public.list_models,
public.pause_model, public.ping, public.queue_health, public.redrive_failed,
public.restore_generation, public.resume_model, public.retry_generation, public.set_paid
from public, anon, authenticated, service_role;

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

grant execute on function
private.caller_id, private.may_store_input
to authenticated;

grant execute on function
private.list_models, public.grant_credits, public.list_models, public.pause_model, public.ping,
public.queue_health, public.redrive_failed, public.resume_model, public.set_paid
to service_role;

grant execute on function
private.adopt_provider_job, private.apply_retention, private.begin_creates, private.cancel_job,
private.check_setup, private.checkpoint_jobs, private.claim_jobs, private.claim_receipts,
private.complete_jobs, private.due_lanes, private.fail_jobs, private.forget_files,
private.heartbeat, private.list_expired_files, private.pause_provider, private.recall_create,
private.recover_stale_jobs, private.register_worker, private.release_job, private.report_progress,
private.sleep, private.unregister_worker
to darkroom_worker;

grant execute on function public.queue_health to darkroom_monitor;

revoke all on table public.generation_tags, public.image_likes, public.prompt_templates
from public, anon, authenticated, service_role;

grant select on table public.generation_tags, public.image_likes to authenticated, service_role;

grant select on table public.prompt_templates to authenticated;

grant select, insert, update, delete on table public.prompt_templates to service_role;

create policy "Users read their own tags" on public.generation_tags
for select to authenticated using (
  user_id = (select private.caller_id())
  and exists (
    select from public.generations as g
    where g.id = generation_tags.generation_id
  )
);

create policy "Users read their own likes" on public.image_likes
for select to authenticated using (user_id = (select private.caller_id()));

create policy "Users read their own prompt templates" on public.prompt_templates
for select to authenticated using (user_id = (select private.caller_id()));

create view private.shared_paths as
select i.storage_path as path from public.images as i
where i.share_id is not null
union all
select i.preview_path as path from public.images as i
where i.share_id is not null;

comment on view private.shared_paths is
  'Files and previews of shared images in bucket generations, as list_public_images shows them.';

revoke all on private.shared_paths from public, anon, authenticated, service_role;

grant select on private.shared_paths to anon, authenticated;

do $do$
declare
  v_policy text := $policy$
  create policy "Everybody reads shared images" on storage.objects
  for select to anon, authenticated using (
    bucket_id = 'generations'
    and exists (select from private.shared_paths as s where s.path = objects.name)
  );
$policy$;
begin
  if to_regclass('storage.objects') is not null then
    execute v_policy;
  end if;
exception when insufficient_privilege then
  raise notice 'Darkroom: no right to make policies on storage.objects; until its owner, or '
    'Supabase''s SQL editor, has run this, nobody sees what others share: %', v_policy;
end;
$do$;

create or replace function private.end_shares() returns trigger
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  update public.images set share_id = null, shows_prompt = false
  where generation_id = new.id and share_id is not null;
  return null;
end;
$$;

create or replace function private.erase_gallery_of_generation() returns trigger
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  delete from public.image_likes where generation_id = old.id;
  delete from public.generation_tags where generation_id = old.id;
  return null;
end;
$$;

create or replace function private.erase_gallery_of_user() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  delete from public.image_likes where user_id = old.user_id;
  delete from public.prompt_templates where user_id = old.user_id;
  return null;
end;
$$;

create or replace function private.walk_tag(
  p_user_id uuid, p_tag text, p_before uuid, p_at_most integer
) returns uuid[]
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
begin
  return array(
    select t.generation_id from public.generation_tags as t
    where t.user_id = p_user_id and t.tag = p_tag and t.generation_id < p_before
    order by t.generation_id desc limit p_at_most
  );
end;
$$;

create or replace function private.set_favorite(p_job_id uuid, p_is_favorite boolean) returns json
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  perform private.lock_own_generation(p_job_id);
  if p_is_favorite is null then
    perform private.refuse_input('is_favorite: neither true nor false');
  end if;
  update public.generations set is_favorite = p_is_favorite
  where id = p_job_id and is_favorite <> p_is_favorite;
  return json_build_object('job_id', p_job_id, 'is_favorite', p_is_favorite);
end;
$$;

create or replace function private.set_tags(p_job_id uuid, p_tags text[]) returns json
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_generation public.generations := private.lock_own_generation(p_job_id);
  v_tags text[];
begin
  if (cardinality(p_tags) <= 20) is not true then
    perform private.refuse_input('tags: not a list of at most 20');
  end if;
  v_tags := array(
    select distinct private.read_tag('tags', t.tag) from unnest(p_tags) as t (tag) order by 1
  );
  delete from public.generation_tags where generation_id = p_job_id and tag <> all (v_tags);
  insert into public.generation_tags (user_id, tag, generation_id)
  select v_generation.user_id, t.tag, p_job_id from unnest(v_tags) as t (tag)
  on conflict do nothing;
  update public.generations set tags = v_tags where id = p_job_id and tags <> v_tags;
  return json_build_object('job_id', p_job_id, 'tags', v_tags);
end;
$$;

create or replace function public.set_favorite(job_id uuid, is_favorite boolean default true) returns json
language sql set search_path = pg_catalog, pg_temp
return private.set_favorite(job_id, is_favorite);

create or replace function public.set_tags(job_id uuid, tags text[]) returns json
language sql set search_path = pg_catalog, pg_temp
return private.set_tags(job_id, tags);

create or replace function private.share_image(
  p_job_id uuid, p_position integer, p_is_public boolean, p_shows_prompt boolean
) returns json
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_image public.images;
begin
  perform private.lock_own_generation(p_job_id);
  if p_is_public is null or p_shows_prompt is null then
    perform private.refuse_input('is_public, shows_prompt: neither true nor false');
  end if;
  update public.images set
    share_id = case when p_is_public then coalesce(share_id, private.uuid_v7()) end,
    shows_prompt = p_is_public and p_shows_prompt
  where generation_id = p_job_id and position = p_position
  returning * into v_image;
  if not found then
    perform private.refuse_unknown_image();
  end if;
  return json_build_object(
    'job_id', p_job_id, 'position', p_position, 'share_id', v_image.share_id,
    'is_public', v_image.share_id is not null, 'shows_prompt', v_image.shows_prompt
  );
end;
$$;

create or replace function private.count_likes(
  p_job_id uuid, p_position integer, p_at_most integer default 1000
) returns integer
language sql stable set search_path = pg_catalog, pg_temp as $$
  select count(*)::integer
  from (
    select 1 from public.image_likes as l
    where l.generation_id = p_job_id and l.position = p_position limit p_at_most
  ) as likes
$$;

create or replace function private.like_image(
  p_job_id uuid, p_position integer, p_is_liked boolean
) returns json
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_user_id uuid := private.require_known_user_id(p_writes => true);
  v_image public.images;
begin
  if p_is_liked is null then
    perform private.refuse_input('is_liked: neither true nor false');
  end if;
  select * into v_image from public.images
  where generation_id = p_job_id and position = p_position and share_id is not null
  for key share;  -- no like outlives its image
  if not found then
    perform private.refuse_unknown_image();
  elsif p_is_liked then
    insert into public.image_likes (generation_id, position, user_id)
    values (p_job_id, v_image.position, v_user_id)
    on conflict do nothing;
  else
    delete from public.image_likes
    where generation_id = p_job_id and position = p_position and user_id = v_user_id;
  end if;
  return json_build_object(
    'job_id', p_job_id, 'position', p_position,
    'is_liked', p_is_liked, 'like_count', private.count_likes(p_job_id, p_position)
  );
end;
$$;

create or replace function private.list_public_images(p_before uuid, p_page_size integer) returns json
language plpgsql stable security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_user_id uuid := private.caller_id();
  v_answer json;
begin
  perform private.check_page_size(p_page_size);
  select json_build_object(
    'images', coalesce(json_agg(json_build_object(
      'share_id', i.share_id, 'job_id', i.generation_id, 'position', i.position,
      'path', i.storage_path, 'preview_path', i.preview_path, 'content_type', i.content_type,
      'width', i.width, 'height', i.height, 'bytes', i.bytes, 'blurhash', i.blurhash,
      'model', i.model_id,
      'prompt', case when i.shows_prompt then i.prompt end,
      'created_at', i.created_at,
      'like_count', private.count_likes(i.generation_id, i.position),
      'is_liked', exists (
        select from public.image_likes as l
        where l.generation_id = i.generation_id and l.position = i.position
          and l.user_id = v_user_id
      ),
      'is_own', coalesce(i.user_id = v_user_id, false)
    ) order by i.share_id desc), '[]'),
    'next_before', case count(*) when p_page_size
      then (array_agg(i.share_id order by i.share_id))[1]
    end
  ) into v_answer
  from (
    select shared.*, g.model_id, g.prompt
    from (
      select * from public.images
      where share_id < coalesce(p_before, 'ffffffff-ffff-ffff-ffff-ffffffffffff')
      order by share_id desc limit p_page_size
    ) as shared
    cross join lateral (
      select model_id, prompt from public.generations where id = shared.generation_id limit 1
    ) as g
  ) as i;
  return v_answer;
end;
$$;

create or replace function public.share_image(
  job_id uuid, image_position integer default 0, is_public boolean default true,
  shows_prompt boolean default false
) returns json
language sql set search_path = pg_catalog, pg_temp
return private.share_image(job_id, image_position, is_public, shows_prompt);

create or replace function public.like_image(
  job_id uuid, image_position integer default 0, is_liked boolean default true
) returns json
language sql set search_path = pg_catalog, pg_temp
return private.like_image(job_id, image_position, is_liked);

create or replace function public.list_public_images(
  before uuid default null, page_size integer default 20
) returns json
language sql stable set search_path = pg_catalog, pg_temp
return private.list_public_images(before, page_size);

create or replace function private.template_json(p_template public.prompt_templates) returns json
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
begin
  if p_template.id is null then
    perform private.refuse_missing(
      'id: no such template of yours', 'list_prompt_templates() names them.'
    );
  end if;
  return json_build_object(
    'id', p_template.id, 'is_own', p_template.user_id is not null,
    'title', p_template.title, 'prompt', p_template.prompt,
    'placeholders', array(
      select distinct m.names[1]
      from regexp_matches(p_template.prompt, '\{(\w+)\}', 'g') as m (names) order by 1
    ),
    'model', p_template.model_id, 'params', p_template.params,
    'created_at', p_template.created_at
  );
end;
$$;

create or replace function private.save_prompt_template(
  p_title text, p_prompt text, p_model text, p_params jsonb, p_id uuid
) returns json
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_user_id uuid := private.require_known_user_id(p_writes => true);
  v_params jsonb := private.read_request(array[p_prompt], p_params, null);
  v_template public.prompt_templates;
begin
  if private.is_blank(p_prompt) then
    perform private.refuse_input('prompt: empty');
  elsif octet_length(p_title) > 400 or length(p_title) > 100 or private.is_blank(p_title) then
    perform private.refuse_input('title: not 1 to 100 characters');
  elsif octet_length(p_model) not between 1 and 100 then
    perform private.refuse_input('model: not 1 to 100 bytes');
  elsif p_id is not null then
    update public.prompt_templates
    set title = p_title, prompt = p_prompt, model_id = p_model, params = v_params
    where id = p_id and user_id = v_user_id
    returning * into v_template;
  elsif (select count(*) >= 100 from public.prompt_templates where user_id = v_user_id) then
    -- Not exact for one who saves many in the same moment; what matters is that there is an end.
    perform private.refuse_input('title: you have 100 templates', 'Delete one first.');
  else
    insert into public.prompt_templates (user_id, title, prompt, model_id, params)
    values (v_user_id, p_title, p_prompt, p_model, v_params)
    returning * into v_template;
  end if;
  return private.template_json(v_template);
end;
$$;

create or replace function private.delete_prompt_template(p_id uuid) returns json
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_user_id uuid := private.require_known_user_id(p_writes => true);
  v_template public.prompt_templates;
begin
  delete from public.prompt_templates where id = p_id and user_id = v_user_id
  returning * into v_template;
  return json_build_object('id', private.template_json(v_template) -> 'id');
end;
$$;

create or replace function private.list_prompt_templates() returns json
language plpgsql stable security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_user_id uuid := private.require_known_user_id();
begin
  return (
    select coalesce(
      json_agg(private.template_json(t) order by t.user_id is null, t.created_at desc, t.id), '[]'
    )
    from public.prompt_templates as t
    where t.user_id = v_user_id or t.user_id is null
  );
end;
$$;

create or replace function public.save_prompt_template(
  title text, prompt text, model text default null, params jsonb default '{}', id uuid default null
) returns json
language sql set search_path = pg_catalog, pg_temp
return private.save_prompt_template(title, prompt, model, params, id);

create or replace function public.delete_prompt_template(id uuid) returns json
language sql set search_path = pg_catalog, pg_temp
return private.delete_prompt_template(id);

create or replace function public.list_prompt_templates() returns json
language sql stable set search_path = pg_catalog, pg_temp
return private.list_prompt_templates();

revoke all on function
private.count_likes, private.delete_prompt_template, private.end_shares,
private.erase_gallery_of_generation, private.erase_gallery_of_user, private.like_image,
private.list_prompt_templates, private.list_public_images, private.refuse_unknown_image,
private.save_prompt_template, private.set_favorite, private.set_tags, private.share_image,
private.template_json,
public.delete_prompt_template, public.like_image, public.list_prompt_templates,
public.list_public_images, public.save_prompt_template, public.set_favorite, public.set_tags,
public.share_image
from public, anon, authenticated, service_role;

grant execute on function
private.delete_prompt_template, private.like_image, private.list_prompt_templates,
private.list_public_images, private.save_prompt_template, private.set_favorite, private.set_tags,
private.share_image,
public.delete_prompt_template, public.like_image, public.list_prompt_templates,
public.list_public_images, public.save_prompt_template, public.set_favorite, public.set_tags,
public.share_image
to anon, authenticated;

alter table private.webhook_endpoints
  alter column secret set default ('whsec_'::text || encode(sha256((uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid()))), 'base64'::text));

comment on table private.push_tokens is
  'Devices that are told when a job of their user ends, by the token Expo gave them. A token is '
  'its last caller''s: who signs in on a borrowed phone leaves no news of his jobs to its owner.';

alter table private.deliveries
  add column if not exists ticket text,
  add column if not exists user_id uuid;

comment on column private.deliveries.user_id is 'Whose push it is: users take turns.';

comment on column private.deliveries.run_at is
  'Not before this time: backoff, the lease of the worker that sends it, or until a receipt.';

comment on column private.deliveries.last_status is 'Of HTTP; null: no answer.';

comment on column private.deliveries.ticket is
  'Of a push that Expo took: what its receipt is asked for by, until it is read.';

create index deliveries_ticket_idx on private.deliveries (run_at) where ticket is not null;

create or replace function private.record_event() returns trigger
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_event_type text;
begin
  if not exists (select from private.webhook_endpoints)
    and not exists (select from private.push_tokens where user_id = new.user_id) then
    return null;
  end if;
  v_event_type := 'generation.' || new.status;
  insert into private.deliveries as d (generation_id, event_type, lane, push_token, user_id)
  select new.id, v_event_type, w.id::text, null, null
  from private.webhook_endpoints as w
  where w.disabled_at is null and v_event_type = any (w.events)
  union all
  select new.id, v_event_type, 'expo', t.token, new.user_id
  from private.push_tokens as t
  where t.user_id = new.user_id
    and exists (select from private.push_texts as x where x.event_type = v_event_type)
  on conflict (generation_id, lane, push_token) do update set
    id = excluded.id, event_type = excluded.event_type, state = 'pending', attempts = 0,
    run_at = now(), token = null, last_status = null, last_error = null, ticket = null,
    user_id = excluded.user_id, created_at = now(), finished_at = null;
  return null;
end;
$$;

create or replace function private.due_lanes() returns setof text
language sql stable security definer set search_path = pg_catalog, pg_temp as $$
  with recursive lanes as (
    (select d.lane from private.deliveries as d where d.state = 'pending' order by d.lane limit 1)
    union all
    select (
      select d.lane from private.deliveries as d
      where d.state = 'pending' and d.lane > l.lane order by d.lane limit 1
    )
    from lanes as l where l.lane is not null
  )
  select l.lane
  from lanes as l
  where l.lane is not null and (
    select d.run_at from private.deliveries as d
    where d.state = 'pending' and d.lane = l.lane order by d.run_at limit 1
  ) <= now()
$$;

create or replace function private.delivery_body(p_delivery private.deliveries) returns jsonb
language sql stable set search_path = pg_catalog, pg_temp as $$
  select jsonb_build_object(
    'type', p_delivery.event_type,
    'timestamp', p_delivery.created_at,
    'data',
    to_jsonb(private.job_json(g))
    - '{stage,progress,queue_position,eta_seconds,poll_after_ms}'::text[]
    || jsonb_build_object('user_id', g.user_id)
  )
  from public.generations as g
  where g.id = p_delivery.generation_id and p_delivery.lane <> 'expo'
  union all
  select jsonb_build_array(jsonb_build_object(
    'to', t.token, 'title', x.title, 'body', x.body,
    'collapseId', coalesce(g.batch_id, g.id), 'tag', coalesce(g.batch_id, g.id),
    'data', jsonb_build_object('job_id', g.id, 'status', g.status, 'batch_id', g.batch_id)
  ))
  from public.generations as g
  cross join private.settings as s
  inner join private.push_tokens as t on t.token = p_delivery.push_token and t.user_id = g.user_id
  inner join private.push_texts as x on x.event_type = p_delivery.event_type
  where g.id = p_delivery.generation_id and p_delivery.created_at > now() - s.push_expires
    and not exists (
      select from public.batches as b
      cross join unnest(b.job_ids) as j (id)
      inner join public.generations as o on o.id = j.id
      left join private.deliveries as d
        on d.generation_id = o.id and d.lane = 'expo' and d.push_token = p_delivery.push_token
      where b.id = g.batch_id and (
        o.finished_at is null or (d.state = 'pending' and d.id > p_delivery.id)
      )
    )
$$;

create or replace function private.claim_deliveries(p_lane text, p_at_most integer)
returns table (delivery_id uuid, token bigint, url text, secrets text[], body text)
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_endpoint private.webhook_endpoints;
  v_delivery private.deliveries;
  v_pushes uuid[];
begin
  if p_lane = 'expo' then
    -- Users take turns, and who has a push under way waits for its end: whatever tokens somebody
    -- invents, they hold up his own pushes only.
    v_pushes := array(
      select t.id
      from (
        select d.id, d.run_at, row_number() over (partition by d.user_id order by d.run_at) as turn
        from private.deliveries as d
        where d.state = 'pending' and d.lane = 'expo' and d.run_at <= now() and not exists (
          select from private.deliveries as u
          where u.state = 'pending' and u.lane = 'expo' and u.run_at > now()
            and u.token is not null and u.user_id = d.user_id
        )
      ) as t
      order by t.turn, t.run_at limit p_at_most
    );
  else
    select * into v_endpoint from private.webhook_endpoints as w
    where w.id = p_lane::uuid and w.disabled_at is null;
    if not found then
      update private.deliveries as d
      set state = 'dead', finished_at = now(), last_error = 'the endpoint is gone or disabled'
      where d.id = any (array(
        select d.id from private.deliveries as d where d.state = 'pending' and d.lane = p_lane
        order by d.run_at limit 1000 for update skip locked
      ));
      return;
    end if;
    url := v_endpoint.url;
    secrets := array_remove(array[v_endpoint.secret, case
      when v_endpoint.previous_secret_until > now() then v_endpoint.previous_secret
    end], null);
  end if;
  for v_delivery in
    update private.deliveries as d set
      token = nextval('private.lease_tokens'),
      run_at = now() + (select s.lease from private.settings as s)
    where d.id = any (array(
      select d.id from private.deliveries as d
      where d.state = 'pending' and d.lane = p_lane and d.run_at <= now()
        and (v_pushes is null or d.id = any (v_pushes))
      order by d.run_at limit p_at_most for update skip locked
    ))
    returning d.*
  loop
    delivery_id := v_delivery.id;
    token := v_delivery.token;
    begin
      body := private.delivery_body(v_delivery);
    exception when others then
      perform private.note_skipped('claim_deliveries', v_delivery.id::text, sqlstate, sqlerrm);
      update private.deliveries as d
      set state = 'dead', finished_at = now(), last_error = left(sqlerrm, 200)
      where d.id = v_delivery.id;
      continue;
    end;
    if body is null then
      delete from private.deliveries as d where d.id = v_delivery.id;
    end if;
    return next;
  end loop;
end;
$$;

create or replace function private.finish_delivery(
  p_delivery_id uuid, p_token bigint, p_outcome text, p_status integer, p_error text,
  p_retry_after_seconds double precision default null, p_ticket text default null
) returns text
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_settings private.settings := (select s from private.settings as s);
  v_delivery private.deliveries;
  v_delay interval;
  v_state text;
begin
  select * into v_delivery from private.deliveries as d
  where d.id = p_delivery_id and d.token = p_token and d.state = 'pending' for update;
  if not found then
    return 'lost';
  end if;
  v_delay := private.asked_delay(
    v_settings.delivery_retries[v_delivery.attempts + 1] * (0.8 + 0.4 * random()),
    p_retry_after_seconds, 86400
  );
  v_state := case
    when p_outcome = 'delivered' then 'delivered'
    when p_outcome = 'gone'
      or v_delivery.attempts >= cardinality(v_settings.delivery_retries)
      or v_delivery.lane = 'expo'
      and now() + v_delay >= v_delivery.created_at + v_settings.push_expires then 'dead'
    else 'pending'
  end;
  update private.deliveries set
    state = v_state, attempts = attempts + 1, token = null,
    last_status = p_status, last_error = left(p_error, 200),
    ticket = case when v_state = 'delivered' then p_ticket end,
    run_at = case v_state
      when 'pending' then now() + v_delay
      when 'delivered' then now() + interval '15 minutes'
      else run_at
    end,
    finished_at = case when v_state <> 'pending' then now() end
  where id = p_delivery_id;
  if p_outcome = 'gone' then
    delete from private.push_tokens where token = v_delivery.push_token;
    update private.webhook_endpoints set disabled_at = now()
    where id::text = v_delivery.lane and disabled_at is null;
  end if;
  return v_state;
end;
$$;

comment on function private.finish_delivery is
  'Says what became of a try: delivered (a push with the ticket to ask for its receipt by), failed '
  '(tried again while settings.delivery_retries says so), or gone (the endpoint is disabled, the '
  'push token forgotten). Answers delivered, pending, dead, or lost: the lease is not held any '
  'more, nothing was changed.';

create or replace function private.claim_receipts(p_at_most integer)
returns table (delivery_id uuid, ticket text)
language sql security definer set search_path = pg_catalog, pg_temp as $$
  with claimed as (
    update private.deliveries as d set
      run_at = now() + interval '15 minutes',
      ticket = case when d.finished_at > now() - interval '1 day' then d.ticket end
    where d.id = any (array(
      select o.id from private.deliveries as o
      where o.ticket is not null and o.run_at <= now()
      order by o.run_at limit p_at_most for update skip locked
    ))
    returning d.id, d.ticket
  )
  select c.id, c.ticket from claimed as c where c.ticket is not null
$$;

create or replace function private.finish_receipts(p_delivery_ids uuid[], p_errors text[]) returns void
language sql security definer set search_path = pg_catalog, pg_temp as $$
  with told as (
    update private.deliveries as d
    set ticket = null, last_error = left(r.error, 200)
    from unnest(p_delivery_ids, p_errors) as r (id, error)
    where d.id = r.id and d.ticket is not null
    returning d.push_token, d.finished_at, r.error
  )
  delete from private.push_tokens as t using told
  where told.error = 'DeviceNotRegistered' and t.token = told.push_token
    and t.registered_at < told.finished_at
$$;

comment on function private.finish_receipts is
  'What the receipts of these pushes say: null, or an error. With DeviceNotRegistered the token is '
  'forgotten, unless it was registered anew since.';

create or replace function private.trim_deliveries(
  p_place text, p_at_most integer, out place text, out done integer
)
language sql set search_path = pg_catalog, pg_temp as $$
  select null, private.skip_failing(
    'delete from private.deliveries where id = any ($1) returning 0',
    array(
      select d.id from private.deliveries as d
      where d.finished_at < now() - (select s.keep_deliveries from private.settings as s)
      order by d.finished_at limit p_at_most
    )
  )
$$;

create or replace function private.register_push_token(p_token text) returns json
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_user_id uuid := private.require_user_id(p_writes => true);
begin
  if p_token is null or p_token !~ '^Expo(nent)?PushToken\[[A-Za-z0-9_-]{1,100}\]$' then
    perform private.refuse_input(
      'token: not an Expo push token', 'Send what getExpoPushTokenAsync() answers.'
    );
  end if;
  perform from public.entitlements where user_id = v_user_id for update;
  if not found then
    perform private.refuse_unknown_user();
  end if;
  insert into private.push_tokens as t (token, user_id) values (p_token, v_user_id)
  on conflict (token) do update set user_id = excluded.user_id, registered_at = clock_timestamp();
  -- More devices than anybody has: those not heard of longest are forgotten.
  delete from private.push_tokens where token = any (array(
    select t.token from private.push_tokens as t
    where t.user_id = v_user_id order by t.registered_at desc offset 5 for update skip locked
  ));
  return json_build_object('registered', true);
end;
$$;

create or replace function private.unregister_push_token(p_token text) returns json
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_user_id uuid := private.require_known_user_id(p_writes => true);
begin
  delete from private.push_tokens where token = p_token and user_id = v_user_id;
  return json_build_object('registered', false);
end;
$$;

create or replace function public.register_push_token(token text) returns json
language sql set search_path = pg_catalog, pg_temp
return private.register_push_token(token);

comment on function public.register_push_token is
  'Has this device told by an Expo push notification when your jobs end. Call it at each start of '
  'the app: a token is its last caller''s, and the 5 last registered of a user are kept. Answers '
  '{registered}. Errors: PT400 invalid_input, PT401 not_authenticated.';

create or replace function public.unregister_push_token(token text) returns json
language sql set search_path = pg_catalog, pg_temp
return private.unregister_push_token(token);

create or replace function public.register_webhook(
  url text, events text[] default null, description text default ''
) returns json
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
#variable_conflict use_variable
declare
  v_all text[] := '{generation.completed,generation.failed,generation.canceled}'::text[];
  v_events text[] := coalesce(events, v_all);
  -- Scheme, host, port, and the rest: no user, no password, no fragment.
  v_parts text[] := regexp_match(
    url, '^(https?)://(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::([0-9]{1,5}))?(?:[/?][!"$-\[\]-~]*)?$', 'i'
  );
  v_problem text;
  v_endpoint private.webhook_endpoints;
begin
  perform private.require_writable();
  if v_parts is null or length(url) > 2000 or v_parts[3]::integer not between 1 and 65535 then
    perform private.refuse_input(
      'url: not an address', 'Send one such as https://api.example.com/hooks/darkroom.'
    );
  elsif not (select s.webhook_allows_private from private.settings as s) then
    v_problem := case
      when lower(v_parts[1]) <> 'https' then 'not https'
      when v_parts[3]::integer < 1024 and v_parts[3]::integer <> 443
        then 'neither port 443 nor one from 1024 on'
      when length(v_parts[2]) > 253 or lower(v_parts[2])
        !~ '^([a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?\.)+[a-z][a-z0-9-]{0,61}[a-z0-9]$'
        then 'not a full host name'
      when lower(v_parts[2])
        ~ '\.(localhost|localdomain|local|internal|intranet|lan|home|corp|arpa|test|onion)$'
        then 'a name of a private network'
    end;
  end if;
  if v_problem is not null then
    perform private.refuse_input(
      'url: ' || v_problem, 'For development see private.settings.webhook_allows_private.'
    );
  elsif cardinality(v_events) not between 1 and 3 or not v_events <@ v_all then
    perform private.refuse_input('events: not some of ' || array_to_string(v_all, ', '));
  elsif length(description) > 200 or description <> '' and private.is_blank(description) then
    perform private.refuse_input('description: blank, or longer than 200 characters');
  elsif (select count(*) from private.webhook_endpoints) >= 20 then
    perform private.refuse_input('url: there are 20 webhooks', 'Delete one first.');
  end if;
  insert into private.webhook_endpoints (url, events, description)
  values (url, v_events, coalesce(description, ''))
  returning * into v_endpoint;
  return json_build_object('webhook_id', v_endpoint.id, 'secret', v_endpoint.secret);
end;
$$;

create or replace function private.webhook_json(p_endpoint private.webhook_endpoints) returns json
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  if p_endpoint.id is null then
    perform private.refuse_missing('webhook_id: no such webhook', 'list_webhooks() shows them.');
  end if;
  return json_build_object(
    'webhook_id', p_endpoint.id, 'url', p_endpoint.url, 'events', p_endpoint.events,
    'description', p_endpoint.description, 'created_at', p_endpoint.created_at,
    'disabled_at', p_endpoint.disabled_at
  );
end;
$$;

create or replace function public.list_webhooks() returns json
language sql stable security definer set search_path = pg_catalog, pg_temp as $$
  select coalesce(json_agg(private.webhook_json(w) order by w.id), '[]')
  from private.webhook_endpoints as w
$$;

create or replace function public.delete_webhook(webhook_id uuid) returns json
language sql security definer set search_path = pg_catalog, pg_temp as $$
  select private.require_writable();
  delete from private.deliveries where lane = webhook_id::text and state = 'pending';
  with deleted as (delete from private.webhook_endpoints as w where w.id = webhook_id returning w)
  select private.webhook_json((select d.w from deleted as d));
$$;

create or replace function public.enable_webhook(webhook_id uuid) returns json
language sql security definer set search_path = pg_catalog, pg_temp as $$
  select private.require_writable();
  with enabled as (
    update private.webhook_endpoints as w set disabled_at = null where w.id = webhook_id returning w
  )
  select private.webhook_json((select e.w from enabled as e));
$$;

create or replace function public.rotate_webhook_secret(webhook_id uuid) returns json
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_endpoint private.webhook_endpoints;
begin
  perform private.require_writable();
  update private.webhook_endpoints set
    secret = default, previous_secret = secret, previous_secret_until = now() + interval '1 day'
  where id = webhook_id returning * into v_endpoint;
  perform private.webhook_json(v_endpoint);
  return json_build_object(
    'webhook_id', v_endpoint.id, 'secret', v_endpoint.secret,
    'previous_secret_until', v_endpoint.previous_secret_until
  );
end;
$$;

create or replace function private.delivery_json(p_delivery private.deliveries) returns json
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  if p_delivery.id is null then
    perform private.refuse_missing(
      'delivery_id: no such delivery', 'list_deliveries() shows them.'
    );
  end if;
  return json_build_object(
    'delivery_id', p_delivery.id, 'lane', p_delivery.lane, 'event', p_delivery.event_type,
    'job_id', p_delivery.generation_id, 'state', p_delivery.state,
    'attempts', p_delivery.attempts,
    'run_at', case when p_delivery.state = 'pending' then p_delivery.run_at end,
    'last_status', p_delivery.last_status, 'last_error', p_delivery.last_error,
    'created_at', p_delivery.created_at, 'finished_at', p_delivery.finished_at
  );
end;
$$;

create or replace function public.list_deliveries(
  state text default null, at_most integer default 100
) returns json
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_custom_plan as $$
#variable_conflict use_variable
begin
  if state not in ('pending', 'delivered', 'dead') then
    perform private.refuse_input('state: not one of pending, delivered, dead');
  elsif at_most is null or at_most not between 1 and 1000 then
    perform private.refuse_input('at_most: not between 1 and 1000');
  end if;
  return (
    select coalesce(json_agg(private.delivery_json(last) order by last.id desc), '[]')
    from (
      select * from private.deliveries as d
      where state is null or d.state = state
      order by d.id desc limit at_most
    ) as last
  );
end;
$$;

create or replace function private.revive_deliveries(p_ids uuid[]) returns setof private.deliveries
language sql set search_path = pg_catalog, pg_temp as $$
  update private.deliveries set
    state = 'pending', attempts = 0, run_at = now(), token = null, finished_at = null, ticket = null
  where id = any (p_ids) returning *
$$;

create or replace function public.redeliver(delivery_id uuid) returns json
language sql security definer set search_path = pg_catalog, pg_temp as $$
  select private.require_writable();
  select private.delivery_json((select d from private.revive_deliveries(array[delivery_id]) as d));
$$;

create or replace function public.redeliver_dead(webhook_id uuid) returns json
language sql security definer set search_path = pg_catalog, pg_temp as $$
  select private.require_writable();
  select json_build_object('redelivered', count(*)) from private.revive_deliveries(array(
    select d.id from private.deliveries as d
    where d.state = 'dead' and d.lane = webhook_id::text
    order by d.id limit 10000 for update skip locked
  ));
$$;

revoke all on table private.webhook_endpoints, private.push_tokens, private.push_texts,
private.deliveries
from public, anon, authenticated, service_role;

revoke all on function
private.claim_deliveries, private.delivery_body, private.delivery_json, private.finish_delivery,
private.finish_receipts, private.record_event, private.register_push_token,
private.revive_deliveries, private.trim_deliveries, private.unregister_push_token,
private.webhook_json,
public.delete_webhook, public.enable_webhook, public.list_deliveries, public.list_webhooks,
public.redeliver, public.redeliver_dead, public.register_push_token, public.register_webhook,
public.rotate_webhook_secret, public.unregister_push_token
from public, anon, authenticated, service_role;

grant execute on function
private.register_push_token, private.unregister_push_token,
public.register_push_token, public.unregister_push_token
to anon, authenticated;

grant execute on function
public.delete_webhook, public.enable_webhook, public.list_deliveries, public.list_webhooks,
public.redeliver, public.redeliver_dead, public.register_webhook, public.rotate_webhook_secret
to service_role;

grant execute on function
private.claim_deliveries, private.finish_delivery, private.finish_receipts
to darkroom_worker;

create view private.waiting_now with (security_invoker = true) as
select
  r.job_id, r.user_id, (private.plan_of(e)).name as plan, r.model_id,
  case
    when exists (select from private.paused_now as p where p.name in (r.model_id, m.provider))
      then 'paused'
    when r.run_at > now() then 'delayed'
    else 'ready'
  end as state,
  g.created_at, now() - g.created_at as waiting, r.attempt as attempts_used, r.run_at, r.fair_key
from private.ready_jobs as r
inner join public.generations as g on r.job_id = g.id
inner join public.entitlements as e on r.user_id = e.user_id
left join public.models as m on r.model_id = m.id
order by r.fair_key, r.seq;

comment on view private.waiting_now is
  'What waits, since when, and whose turn is next? In the order of the queue.';

create view private.recent_attempts with (security_invoker = true) as
select
  a.generation_id, g.user_id, g.model_id, a.attempt, a.worker_id, a.outcome, a.error_code,
  a.error_detail, a.provider_job_id, a.provider_seconds, a.cost_usd, g.created_at, a.started_at,
  a.ended_at, extract(epoch from a.started_at - g.created_at) as wait_seconds,
  extract(epoch from a.ended_at - a.started_at) as run_seconds
from private.attempts as a
inner join public.generations as g on a.generation_id = g.id
where a.ended_at > now() - interval '1 day'
order by a.ended_at desc;

comment on view private.recent_attempts is
  'What was tried within a day, how did it end, and what did the provider say? wait_seconds: from '
  'being asked for to this claim.';

create view private.costs with (security_invoker = true) as
select
  entry.day, entry.user_id, entry.model_id,
  count(entry.outcome)::integer as attempts,
  count(*) filter (where entry.outcome = 'completed')::integer as completed,
  coalesce(sum(entry.images), 0)::integer as images,
  coalesce(sum(entry.provider_seconds), 0)::numeric as provider_seconds,
  coalesce(sum(entry.cost_usd), 0) as cost_usd,
  count(*) filter (where entry.provider_job_id is not null and entry.cost_usd is null)::integer
    as unknown_costs,
  coalesce(-sum(entry.amount) filter (where entry.kind = 'charge'), 0) as credits_charged,
  coalesce(sum(entry.amount) filter (where entry.kind = 'refund'), 0) as credits_refunded,
  -coalesce(sum(entry.amount), 0) * s.credit_usd - coalesce(sum(entry.cost_usd), 0) as margin_usd
from (
  select
    (a.ended_at at time zone 'utc')::date as day, g.user_id, a.model_id, a.outcome,
    a.provider_images as images, a.provider_seconds::numeric, a.cost_usd, a.provider_job_id,
    null as kind, null as amount
  from private.attempts as a
  inner join public.generations as g on a.generation_id = g.id
  union all
  select
    (l.created_at at time zone 'utc')::date, l.user_id, g.model_id, null, null, null, null, null,
    l.kind, l.amount
  from public.credit_ledger as l
  inner join public.generations as g on l.generation_id = g.id
) as entry
cross join private.settings as s
group by entry.day, entry.user_id, entry.model_id, s.credit_usd;

comment on view private.costs is
  'What did each user cost and pay, by model and day? Sum it by what you want to know. Days are '
  'UTC''s: of an attempt the day it ended, of a credit the day it was booked. images are those the '
  'provider billed; unknown_costs counts attempts that asked the provider and whose price is not '
  'known, so that cost_usd is too low by them (a retry that goes on from the same provider job is '
  'one of them); margin_usd is there once settings.credit_usd says what a credit is worth.';

create or replace function public.queue_report() returns json
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
set enable_seqscan = on set jit = off set max_parallel_workers_per_gather = 0 as $$
declare
  v_began timestamptz := clock_timestamp();
  -- The queue is counted by passing through all of it, and that is as good as can be.
  v_queue jsonb := (select coalesce(jsonb_agg(q), '[]') from private.queue_by_model as q);
  v_health json := private.health_of(v_queue);
begin
  perform set_config('enable_seqscan', 'off', true);  -- until the function ends
  return json_build_object(
    'at', now(),
    'health', v_health,
    'alerts', (
      select json_agg(json_build_object(
        'alert', s.alert, 'severity', s.severity, 'is_raised', s.is_raised, 'value', s.value,
        'threshold', s.threshold
      ) order by s.alert)
      from private.alert_states(v_health::jsonb) as s
    ),
    -- Seconds from claim to end of completed attempts, and as remembered for eta_seconds.
    'models', (
      select coalesce(json_agg(m), '[]')
      from (
        select
          n.model_id, c.provider, coalesce(q.ready, 0) as ready, coalesce(q.delayed, 0) as delayed,
          coalesce(q.paused, 0) as paused, coalesce(q.running, 0) as running,
          q.oldest_ready_seconds, coalesce(o.completed, 0) as completed,
          coalesce(o.failed, 0) as failed, coalesce(o.retried, 0) as retried,
          o.seconds[1] as p50_seconds, o.seconds[2] as p95_seconds, s.mean_seconds,
          coalesce(o.cost_usd, 0) as cost_usd
        from jsonb_populate_recordset(null::private.queue_by_model, v_queue) as q
        full outer join (
          select
            a.model_id, count(*) filter (where a.outcome = 'completed') as completed,
            count(*) filter (where a.outcome = 'failed') as failed,
            count(*) filter (where a.outcome = 'retried') as retried, sum(a.cost_usd) as cost_usd,
            percentile_cont('{0.5,0.95}'::double precision[])
              within group (order by extract(epoch from a.ended_at - a.started_at))
              filter (where a.outcome = 'completed') as seconds
          from private.attempts as a
          where a.ended_at > now() - interval '1 hour' group by a.model_id
        ) as o on o.model_id = q.model_id
        cross join lateral (select coalesce(q.model_id, o.model_id) as model_id) as n
        left join public.models as c on c.id = n.model_id
        left join private.model_stats as s on s.model_id = n.model_id
        order by coalesce(q.ready, 0) + coalesce(q.running, 0) desc, n.model_id
      ) as m
    ),
    'workers', (
      select coalesce(json_agg(w), '[]')
      from private.worker_activity as w where w.seen_seconds < 86400
    ),
    'errors', (
      select coalesce(json_agg(e), '[]')
      from (
        select
          a.model_id, a.error_code, count(*) as errors,
          count(*) filter (where a.outcome = 'failed') as failed,
          count(*) filter (where a.outcome = 'retried') as retried, max(a.ended_at) as last_at
        from private.attempts as a
        where a.ended_at > now() - interval '1 hour'
          and a.error_code is not null and a.outcome <> 'released'
        group by a.model_id, a.error_code
        order by count(*) desc, max(a.ended_at) desc
      ) as e
    ),
    'running', (
      select coalesce(json_agg(j), '[]')
      from (
        select
          r.model_id, r.attempt, r.worker_id, r.stage, r.progress,
          round(extract(epoch from r.running), 1) as running_seconds,
          round(extract(epoch from r.lease_left), 1) as lease_seconds,
          round(extract(epoch from r.deadline_left), 1) as deadline_seconds
        from private.running_now as r order by r.running desc, r.job_id limit 12
      ) as j
    ),
    'recent', (
      select coalesce(json_agg(t), '[]')
      from (
        select
          a.model_id, a.attempt, a.worker_id, a.outcome, a.error_code, a.ended_at,
          -- No join, which might be made by reading all generations.
          (
            select round(extract(epoch from a.started_at - g.created_at), 1)
            from public.generations as g where g.id = a.generation_id
          ) as waited_seconds,
          round(extract(epoch from a.ended_at - a.started_at), 1) as ran_seconds
        from private.attempts as a where a.ended_at > now() - interval '1 hour'
        order by a.ended_at desc, a.token desc limit 12
      ) as t
    ),
    'vacuum_holders', (
      select coalesce(json_agg(v), '[]')
      from (
        select
          h.kind, h.pid, left(h.name, 100) as name, h.state, h.age_transactions as transactions,
          round(extract(epoch from h.since)) as seconds
        from private.vacuum_holders as h
        order by h.since desc nulls last, h.age_transactions desc limit 5
      ) as v
    ),
    'took_ms', round(extract(epoch from clock_timestamp() - v_began) * 1000, 1)
  );
end;
$$;

comment on function public.queue_report is
  'The queue at a glance: {at, health (see queue_health), alerts (every rule and what is measured '
  'for it), models, workers, errors, running, recent, vacuum_holders, took_ms}: the queue of each '
  'model and its attempts of the last hour, the workers of the last day, errors of the last hour, '
  'the jobs that run for longest, the attempts that ended last, who has held back vacuum for '
  'longest, and how long the report took.';

create or replace function public.queue_history(
  since timestamptz default null, bucket_seconds integer default 900
) returns json
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
set enable_seqscan = off set jit = off set max_parallel_workers_per_gather = 0 as $$
declare
  v_bucket interval := bucket_seconds * interval '1 second';
  -- A day of the buckets that are the default.
  v_since timestamptz := coalesce(since, now() - 96 * v_bucket);
begin
  if coalesce(bucket_seconds not between 10 and 86400, true) then
    perform private.refuse_input('bucket_seconds: not from 10 to 86400');
  elsif v_since not between now() - 400 * v_bucket and now() then
    perform private.refuse_input('since: not within the last 400 buckets', 'Take longer buckets.');
  end if;
  v_since := date_bin(v_bucket, v_since, 'epoch');
  return json_build_object(
    'at', now(), 'since', v_since, 'bucket_seconds', bucket_seconds,
    -- What came into the queue and left it, and the longest wait for a first attempt.
    'queue', (
      with claims as (
        select a.generation_id, a.attempt, a.started_at, a.ended_at, a.outcome
        from private.attempts as a where a.ended_at >= v_since
        union all
        select r.job_id, r.attempt, r.claimed_at, null, null from private.running_jobs as r
      ),
      moves as (
        select
          g.created_at as moved_at, 1 as enqueued, 1 as entered, 0 as went, null::interval as waited
        from public.generations as g
        where g.id >= private.first_id_of(v_since) and g.created_at >= v_since
        union all
        select c.ended_at, 0, 1, 0, null from claims as c where c.outcome in ('retried', 'released')
        union all
        select
          c.started_at, 0, 0, 1, case when c.attempt = 1 then c.started_at - g.created_at end
        from claims as c inner join public.generations as g on g.id = c.generation_id
        where c.started_at >= v_since
        union all
        -- Canceled before any attempt.
        select g.finished_at, 0, 0, 1, null
        from public.generations as g
        where g.id >= private.first_id_of(v_since) and g.finished_at >= v_since
          and g.status = 'canceled' and g.started_at is null
      )
      select coalesce(json_agg(b order by b.at), '[]')
      from (
        select
          date_bin(v_bucket, m.moved_at, 'epoch') as at, sum(m.enqueued) as enqueued,
          sum(m.entered) as entered, sum(m.went) as went,
          round(extract(epoch from max(m.waited)), 1) as waited_seconds
        from moves as m group by 1
      ) as b
    ),
    -- How the attempts of each model ended, what they took and cost.
    'models', (
      select coalesce(json_agg(b order by b.at, b.model_id), '[]')
      from (
        select
          date_bin(v_bucket, a.ended_at, 'epoch') as at, a.model_id,
          count(*) filter (where a.outcome = 'completed') as completed,
          count(*) filter (where a.outcome = 'failed') as failed,
          count(*) filter (where a.outcome = 'retried') as retried,
          round(sum(extract(epoch from a.ended_at - a.started_at))
            filter (where a.outcome = 'completed'), 1) as completed_seconds,
          sum(a.cost_usd) as cost_usd
        from private.attempts as a where a.ended_at >= v_since group by 1, 2
      ) as b
    )
  );
end;
$$;

revoke all on private.waiting_now, private.recent_attempts, private.costs
from public, anon, authenticated, service_role;

revoke all on function public.queue_history, public.queue_report
from public, anon, authenticated, service_role;

grant execute on function public.queue_history, public.queue_report
to service_role, darkroom_monitor;

-- Data, by hand.

-- Whose push it is. One for a generation that is gone goes with it, so each has a user.
update private.deliveries as d set user_id = g.user_id
from public.generations as g where g.id = d.generation_id and d.lane = 'expo';

-- The provider's jobs that ours have bought. Where two had the same, it is the first one's.
insert into private.purchases (generation_id, provider_job_id)
select b.generation_id, b.provider_job_id from (
  select a.generation_id, a.provider_job_id, a.started_at from private.attempts as a
  union all
  select r.job_id, r.provider_job_id, r.claimed_at from private.running_jobs as r
  union all
  select r.job_id, r.provider_job_id, r.create_started_at from private.ready_jobs as r
) as b
inner join public.generations as g on b.generation_id = g.id
where b.provider_job_id is not null
order by b.started_at on conflict do nothing;

-- New settings have their defaults. What was left at an old default follows; what an operator has
-- set stays, and input images are kept as long as before: settings.keep_inputs says how long.
update private.plans set full_minutes_per_day = 100, max_burned_per_day = 50 where name = 'paid';
update private.settings set breaker_users = 3 where breaker_users = 2;

-- A batch knows its jobs, and who repeats a job is found beside it.
update public.batches as b set job_ids = g.ids
from (
  select batch_id, array_agg(id order by id) as ids from public.generations
  where batch_id is not null group by batch_id
) as g
where g.batch_id = b.id;
insert into private.retries (retry_of, generation_id)
select retry_of, id from public.generations where retry_of is not null;

-- What is shown of a job stands in its row.
update public.generations as g set tags = t.tags
from (
  select generation_id, array_agg(tag order by tag) as tags from public.generation_tags
  group by generation_id
) as t
where g.id = t.generation_id;

update private.settings set
  max_prompt_chars = greatest(max_prompt_chars, 1000),
  max_params_bytes = greatest(max_params_bytes, 1000);

-- What holds from now on.

alter table public.credit_ledger add constraint credit_ledger_pkey PRIMARY KEY (user_id, id);

alter table public.generations add constraint generations_end_matches_status CHECK (private.fits_status((status)::text, error_code, finished_at, deleted_at));

alter table public.models add constraint models_prices_are_at_most_a_million CHECK ((GREATEST(price_credits, paid_price_credits) <= 1000000));

alter table private.ready_jobs add constraint ready_jobs_pkey PRIMARY KEY (job_id);

alter table private.plans add constraint plans_limits_are_positive CHECK (((LEAST(max_active, max_per_minute, (full_minutes_per_day)::integer, max_burned_per_day) > 0) AND ((max_batch >= 1) AND (max_batch <= 100))));

alter table private.plans add constraint plans_busy_after_is_positive CHECK (((busy_after > '00:00:00'::interval) AND (busy_after <= '1000 years'::interval)));

alter table private.settings add constraint settings_sizes_are_a_thousand_at_least CHECK ((LEAST(max_prompt_chars, max_params_bytes) >= 1000));

alter table private.settings add constraint settings_welcome_credits_are_at_most_a_million CHECK ((welcome_credits <= 1000000));

alter table private.settings add constraint settings_max_input_files_is_not_negative CHECK ((max_input_files >= 0));

alter table private.settings add constraint settings_times_are_in_reach CHECK ((GREATEST(keep_generations, keep_deleted, keep_inputs, keep_attempts, keep_ledger_of_deleted_users, lease, heartbeat, retry_base, retry_cap, give_up_after, breaker_window, breaker_pause, breaker_pause_cap) <= '1000 years'::interval));

alter table private.settings add constraint settings_delivery_times_are_in_reach CHECK (((array_position(delivery_retries, NULL::interval) IS NULL) AND ('00:00:00'::interval <= ALL (delivery_retries)) AND (LEAST(push_expires, keep_deliveries) >= '00:00:00'::interval) AND (GREATEST(push_expires, keep_deliveries) <= '1000 years'::interval)));

alter table private.expired_files add constraint expired_files_path_is_the_users CHECK (starts_with(concat(path, '/'), concat(user_id, '/')));

alter table private.deliveries add constraint deliveries_push_token_matches_lane CHECK ((((push_token IS NOT NULL) = (lane = 'expo'::text)) AND ((user_id IS NOT NULL) = (lane = 'expo'::text))));

create trigger credit_ledger_is_kept_while_user_exists
before delete on public.credit_ledger
for each row execute function private.refuse_change_while_user_exists();

create trigger models_set_derived_inputs
before insert or update on public.models
for each row execute function private.set_derived_inputs();

create trigger generations_erase_images after delete on public.generations
for each row execute function private.erase_images_of_generation();

create trigger entitlements_erase_rows
after delete on public.entitlements
for each row execute function private.erase_deleted_user();

create trigger generations_end_shares after update of deleted_at on public.generations
for each row when (old.deleted_at is null and new.deleted_at is not null)
execute function private.end_shares();

create trigger generations_erase_gallery after delete on public.generations
for each row execute function private.erase_gallery_of_generation();

create trigger entitlements_erase_gallery after delete on public.entitlements
for each row execute function private.erase_gallery_of_user();

create trigger generations_record_event after update of status on public.generations
for each row when (old.status is distinct from new.status and new.finished_at is not null)
execute function private.record_event();

insert into private.settings default values on conflict do nothing;

update private.settings
set welcome_credits = current_setting('darkroom.welcome_credits', true)::integer
where current_setting('darkroom.welcome_credits', true) <> ''
  and not exists (select from public.entitlements);

insert into private.retention_walks (name) values
('expire_deleted'), ('expire_old'), ('expire_orphans'), ('trim_attempts'), ('trim_ledger')
on conflict do nothing;

insert into private.plans (
  name, max_active, max_per_minute, full_minutes_per_day, max_burned_per_day, max_batch, weight,
  busy_after
) values
('free', 3, 10, 30, 5, 3, 1, '10 minutes'),
('paid', 20, 60, 100, 50, 100, 4, '30 minutes')
on conflict do nothing;

insert into private.error_codes (
  code, message, is_retryable, uses_attempt, resumes, trips_breaker
) values
('moderated', 'The safety filter refused this picture. Try another prompt.',
  false, true, false, false),
('invalid_input', 'The model did not accept this request.', false, true, false, false),
('provider_busy', 'The image service is busy. Try again later.', true, false, false, false),
('provider_timeout', 'The image service did not answer in time.', true, true, true, true),
('provider_error', 'The image service failed to make this picture.', true, true, false, true),
('result_lost', 'The finished picture could not be fetched in time.', true, true, false, true),
('timeout', 'The picture took too long.', false, true, false, true),
('provider_refused', 'The image service refused to make this picture.',
  true, true, true, true),
('worker_full', 'We have no room for your picture. Try again later.', true, false, true, false),
('storage_unavailable', 'Your picture could not be kept. Try again later.',
  true, false, true, false),
('internal', 'Something went wrong on our side.', true, true, true, false)
on conflict do nothing;

insert into private.alert_rules (alert, threshold, unit, min_cases, severity, hint) values
('depth', 10000, 'ready jobs', 0, 'warning',
  'Start more workers, or give them more slots. Which model: private.queue_by_model.'),
('oldest_age', 300, 'seconds', 0, 'warning',
  'Start more workers, or give them more slots. Which model: private.queue_by_model.'),
('error_rate', 0.25, 'share of attempts', 20, 'critical',
  'private.attempts says of which model and in which words; is_active = false takes one off.'),
('burned', 20, 'purchases', 0, 'warning',
  'Users cancel what the provider bills: lower plans.max_burned_per_day.'),
('stuck', 120, 'seconds', 0, 'critical',
  'Nobody recovers them, see private.running_now: start a worker or pg_cron.'),
('no_worker', 0, 'ready jobs', 0, 'critical',
  'Start a worker, or look into the log of the one that stopped.'),
('not_listening', 0, 'workers', 0, 'warning',
  'They only poll: LISTEN does not work through a transaction pooler. Connect them directly.'),
('cron_silent', 3, 'runs missed', 0, 'warning',
  'See cron.job_run_details. Where a routine is no longer to run, set routines.every to null.'),
('paused', 0, 'pauses', 0, 'warning',
  'Jobs of private.paused_now wait. If the provider refused, see its billing and key.'),
('vacuum_held_back', 1000000, 'transactions', 0, 'warning',
  'Dead rows pile up in the queue. End what private.vacuum_holders names.'),
('skipped_rows', 0, 'rows', 0, 'warning',
  'Mend what private.skipped_rows names: it is tried again. storage: see the worker''s log.'),
('books', 0, 'problems', 0, 'critical',
  'See private.broken_books. Once it is mended, select private.check_books() to check anew.')
on conflict do nothing;

do $$
begin
  perform private.skip_failing(
    'select count(private.create_entitlement(u)) from unnest($1) as u',
    array(
      select u.id from auth.users as u
      where not exists (select from public.entitlements as e where e.user_id = u.id)
    )
  );
end;
$$;

do $$
begin
  if to_regclass('storage.buckets') is null then
    raise notice 'Darkroom: no storage.buckets here; create the private buckets yourself';
    return;
  elsif not has_table_privilege('storage.buckets', 'select, insert') then
    raise notice 'Darkroom: no right to make buckets; create the private buckets yourself';
    return;
  end if;
  insert into storage.buckets (id, name, public, file_size_limit, allowed_mime_types) values
  -- octet-stream: what SVGs are stored as, so that no browser runs one.
  (
    'generations', 'generations', false, 33554432,
    '{image/png,image/jpeg,image/webp,image/avif,image/gif,application/octet-stream}'
  ),
  ('inputs', 'inputs', false, 10485760, '{image/png,image/jpeg,image/webp}')
  on conflict do nothing;
  if exists (select from storage.buckets where id in ('generations', 'inputs') and public) then
    raise warning 'Darkroom: a bucket of its own is public: everybody who knows a path reads it'
      using errcode = '01000';
  end if;
end;
$$;

do $$
declare
  v_job record;
begin
  if current_database() is distinct from current_setting('cron.database_name', true) then
    raise notice 'Darkroom: no pg_cron for this database; workers do its work on their own';
    return;
  end if;
  create extension if not exists pg_cron with schema pg_catalog;
  for v_job in
    select * from (values
      ('recover_stale_jobs', '* * * * *', interval '1 minute'),
      ('apply_retention', '* * * * *', interval '1 minute'),
      ('trim_history', '17 3 * * *', interval '1 day'),
      ('check_books', '47 3 * * *', interval '1 day')
    ) as job (name, schedule, every)
  loop
    perform cron.schedule(
      'darkroom_' || v_job.name, v_job.schedule,
      format('select private.%1$s(), private.note_run(%1$L)', v_job.name)
    );
    insert into private.routines (name, every) values (v_job.name, v_job.every)
    on conflict (name) do update set every = coalesce(routines.every, excluded.every);
  end loop;
end;
$$;

notify pgrst, 'reload schema';

notify pgrst, 'reload config';

notify pgrst, 'reload schema';

insert into private.push_texts (event_type, title, body) values
('generation.completed', 'Your picture is ready', 'Tap to see it.'),
('generation.failed', 'Your picture could not be made', 'Your credits are back.')
on conflict do nothing;

insert into private.retention_walks (name) values ('trim_deliveries')
on conflict do nothing;

insert into private.alert_rules (alert, threshold, unit, min_cases, severity, hint) values (
  'dead_deliveries', 0, 'deliveries', 0, 'warning',
  'list_deliveries(''dead'') says why. Then enable_webhook and redeliver_dead, or delete_webhook.'
)
on conflict do nothing;

notify pgrst, 'reload schema';

notify pgrst, 'reload schema';

update private.alert_rules set hint = 'Start more workers, or give them more slots. Which model: private.queue_by_model.'
where alert = 'oldest_age' and hint::text = 'Start more workers, or give them more slots. Whose: private.waiting_now.';

update private.alert_rules set hint = 'private.attempts says of which model and in which words; is_active = false takes one off.'
where alert = 'error_rate' and hint::text = 'private.errors_by_model says which model and in which words. A model that only fails is taken off the list with is_active = false.';

update private.alert_rules set hint = 'Nobody recovers them, see private.running_now: start a worker or pg_cron.'
where alert = 'stuck' and hint::text = 'Nobody recovers them: start a worker or pg_cron, or select private.recover_stale_jobs(). Which: private.stuck_jobs.';

update private.alert_rules set hint = 'They only poll: LISTEN does not work through a transaction pooler. Connect them directly.'
where alert = 'not_listening' and hint::text = 'They find jobs by polling only. Give them a direct or session-mode connection: LISTEN does not work through a transaction pooler. Which: private.worker_activity.';

update private.alert_rules set hint = 'See cron.job_run_details. Where a routine is no longer to run, set routines.every to null.'
where alert = 'cron_silent' and hint::text = 'See cron.job_run_details and that pg_cron runs. Set routines.every to null if a routine is no longer to run.';

update private.alert_rules set hint = 'Jobs of private.paused_now wait. If the provider refused, see its billing and key.'
where alert = 'paused' and hint::text = 'Jobs of what is paused wait. If the provider refused the account, see its billing and key.';

update private.alert_rules set hint = 'Dead rows pile up in the queue. End what private.vacuum_holders names.'
where alert = 'vacuum_held_back' and hint::text = 'Dead rows pile up in the queue. End the transaction (pg_terminate_backend(pid)), the prepared transaction or the replication slot. All of them: private.vacuum_holders.';

update private.alert_rules set hint = 'See private.broken_books. Once it is mended, select private.check_books() to check anew.'
where alert = 'books' and hint::text = 'See private.broken_books: the ledger is right, and entitlements have to follow it. Once mended, select private.check_books() to check anew.';

update private.alert_rules set hint = 'list_deliveries(''dead'') says why. Then enable_webhook and redeliver_dead, or delete_webhook.'
where alert = 'dead_deliveries' and hint::text = 'private.undelivered says why. Once the receiver works: enable_webhook, redeliver_dead; or delete_webhook.';

delete from private.retention_walks where name = 'attempts';

delete from private.retention_walks where name = 'files';

delete from private.retention_walks where name = 'generations';

delete from private.retention_walks where name = 'ledger';

comment on column private.alert_rules.hint is null;

comment on column private.alert_rules.severity is null;

comment on column private.alert_rules.unit is null;

comment on column private.attempts.cost_usd is null;

comment on column private.attempts.provider_seconds is null;

comment on column private.breakers.failures is null;

comment on column private.breakers.name is null;

comment on column private.deliveries.attempts is null;

comment on column private.error_codes.message is null;

comment on column private.model_stats.requests_per_second is null;

comment on column private.model_stats.sample_count is null;

comment on column private.plans.max_active is null;

comment on column private.plans.max_per_minute is null;

comment on column private.push_tokens.registered_at is null;

comment on column private.ready_jobs.run_at is null;

comment on column private.routines.result is null;

comment on column private.running_jobs.attempt is null;

comment on column private.running_jobs.deadline_at is null;

comment on column private.running_jobs.progress is null;

comment on column private.running_jobs.token is null;

comment on column private.settings.max_attempts is null;

comment on column private.workers.slots is null;

comment on column public.credit_ledger.balance_after is null;

comment on column public.entitlements.minute_started_at is null;

comment on column public.generations.batch_id is null;

comment on column public.generations.id is null;

comment on column public.generations.image_count is null;

comment on column public.generations.input is null;

comment on column public.images.blurhash is null;

comment on column public.images.bytes is null;

comment on column public.images.shows_prompt is null;

comment on column public.images.width is null;

comment on column public.models.client_inputs is null;

comment on column public.models.deadline is null;

comment on column public.models.is_active is null;

comment on column public.models.prompt_input is null;

comment on domain private.attempt_outcome is null;

comment on domain private.job_stage is null;

comment on domain public.job_status is null;

comment on domain public.ledger_kind is null;

-- What is taken out of a model's schema once.
update public.models set id = id;
comment on column public.images.position is null;
end;
$upgrade$;
