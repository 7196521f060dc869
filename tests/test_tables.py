"""sql/10_tables.sql and sql/12_queue_tables.sql: the rules that live in constraints."""

import itertools

import psycopg
import pytest


def test_ids_are_uuids_of_version_7_in_order_of_time(db):
    ids = [str(db.value("select private.uuid_v7()")) for _ in range(50)]

    assert ids == sorted(ids)
    assert {(each[14], each[19] in "89ab") for each in ids} == {("7", True)}


@pytest.mark.parametrize(
    "change",
    [
        "update public.credit_ledger set amount = 1000",
        "delete from public.credit_ledger",
        "truncate public.credit_ledger",
    ],
)
def test_the_ledger_is_append_only_even_for_its_owner(db, alice, change):
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        db.execute(change)

    assert alice.ledger() == [("grant", 10)]


BROKEN_RULES = {
    "entitlements_credits_are_not_negative": "update public.entitlements set credits = -1",
    "entitlements_paid_users_have_an_end": "update public.entitlements set is_paid = true",
    "ledger_kind_is_known": (
        "update private.a_ledger_entry set kind = 'gift', generation_id = null, amount = 1"
    ),
    "credit_ledger_amount_and_generation_match_kind": (
        "update private.a_ledger_entry set amount = 1"
    ),
    "credit_ledger_balance_is_not_negative": "update private.a_ledger_entry set balance_after = -1",
    "models_id_is_owner_slash_name": "update public.models set id = 'Just A Name'",
    "models_provider_is_known": "update public.models set provider = 'somebody'",
    "models_prices_are_not_negative": "update public.models set paid_price_credits = -1",
    "models_prices_are_at_most_a_million": "update public.models set price_credits = 1000001",
    "models_input_schema_has_properties": "update public.models set input_schema = '{}'",
    "models_prompt_input_is_no_client_input": (
        "update public.models set client_inputs = client_inputs || prompt_input"
    ),
    "models_image_inputs_are_client_inputs": "update public.models set image_inputs = '{photo}'",
    "models_operator_input_is_an_object": "update public.models set operator_input = '[]'",
    "models_cost_has_a_unit": "update public.models set cost_usd = 0.1, cost_unit = null",
    "models_image_count_input_is_a_client_input": (
        "update public.models set image_count_input = 'batch'"
    ),
    "models_max_images_is_sane": "update public.models set max_images = 0",
    "models_deadline_is_positive": "update public.models set deadline = '0'",
    "job_status_is_known": (
        "update public.generations set status = 'lost' where finished_at is null"
    ),
    "generations_finished_at_matches_status": "update public.generations set finished_at = null",
    "generations_error_code_matches_status": (
        "update public.generations set error_code = 'internal'"
    ),
    "generations_deleted_ones_are_finished": (
        "update public.generations set deleted_at = now() where finished_at is null"
    ),
    "generations_input_is_an_object": "update public.generations set input = '[]'",
    "generations_price_is_not_negative": "update public.generations set price_credits = -1",
    "generations_image_count_is_positive": "update public.generations set image_count = 0",
    "images_position_is_not_negative": (
        "update public.images"
        " set position = -1, storage_path = replace(storage_path, '/0.', '/-1.')"
    ),
    "images_path_is_the_owners": "update public.images set storage_path = 'someone/else/0.png'",
    "images_preview_path_is_the_owners": (
        "update public.images set preview_path = 'someone/else/0.webp'"
    ),
    "images_prompt_has_a_share": "update public.images set shows_prompt = true",
    "images_content_type_is_an_image": "update public.images set content_type = 'text/html'",
    "images_size_is_positive": "update public.images set bytes = 0",
    "job_stage_is_known": "update private.running_jobs set stage = 'waiting'",
    "running_jobs_progress_is_a_percentage": "update private.running_jobs set progress = 101",
    "workers_slots_are_positive": "update private.workers set slots = 0",
    "attempt_outcome_is_known": "update private.attempts set outcome = 'lost'",
    "model_stats_samples_are_positive": (
        "insert into private.model_stats values ('a/b', 1, 0, 0, null, now())"
    ),
    "plans_name_is_known": "update private.plans set name = 'gold' where name = 'free'",
    "plans_limits_are_positive": "update private.plans set max_active = 0",
    "plans_weight_is_a_step_of_the_queue": "update private.plans set weight = 1001",
    "settings_credit_is_not_negative": "update private.settings set credit_usd = -1",
    "settings_is_one_row": "insert into private.settings (id) values (false)",
    "settings_welcome_credits_are_not_negative": "update private.settings set welcome_credits = -1",
    "settings_welcome_credits_are_at_most_a_million": (
        "update private.settings set welcome_credits = 1000001"
    ),
    "settings_lease_outlives_three_heartbeats": "update private.settings set lease = '44 seconds'",
    "settings_max_attempts_is_positive": "update private.settings set max_attempts = 0",
    "settings_running_cancel_refund_is_a_percentage": (
        "update private.settings set running_cancel_refund_percent = 101"
    ),
    "settings_keep_generations_outlives_a_day": (
        "update private.settings set keep_generations = '23 hours'"
    ),
    "settings_keep_deleted_is_not_negative": "update private.settings set keep_deleted = '-1 day'",
    "settings_keep_inputs_outlives_a_day": "update private.settings set keep_inputs = '0'",
    "settings_max_input_files_is_not_negative": "update private.settings set max_input_files = -1",
    "settings_times_are_in_reach": "update private.settings set keep_deleted = '1001 years'",
    "settings_keep_attempts_outlives_a_day": "update private.settings set keep_attempts = '0'",
    "settings_keep_ledger_of_deleted_users_is_not_negative": (
        "update private.settings set keep_ledger_of_deleted_users = '-1 day'"
    ),
    "expired_files_bucket_is_ours": (
        "insert into private.expired_files (bucket, path, user_id)"
        " select 'avatars', user_id || '/a.png', user_id from public.entitlements limit 1"
    ),
    "expired_files_path_is_the_users": (
        "insert into private.expired_files (bucket, path, user_id)"
        " select 'inputs', user_id || '0/a.png', user_id from public.entitlements limit 1"
    ),
    "alert_rules_threshold_is_not_negative": "update private.alert_rules set threshold = -1",
    "alert_rules_severity_is_known": "update private.alert_rules set severity = 'dire'",
    "model_aliases_id_is_owner_slash_name": (
        "insert into public.model_aliases select 'fast', id from public.models limit 1"
    ),
    "model_aliases_weight_is_not_negative": (
        "insert into public.model_aliases select 'auto/fast', id, -1 from public.models limit 1"
    ),
    "generation_tags_tag_is_short": (
        "insert into public.generation_tags select user_id, '', id from public.generations limit 1"
    ),
    "prompt_templates_title_is_short": (
        "insert into public.prompt_templates (title, prompt) values ('', 'a cat')"
    ),
    "prompt_templates_model_is_short": (
        "insert into public.prompt_templates (title, prompt, model_id) values ('Cat', 'a cat', '')"
    ),
    "prompt_templates_params_are_an_object": (
        "insert into public.prompt_templates (title, prompt, params) values ('Cat', 'a cat', '[]')"
    ),
    "queue_state_is_one_row": "insert into private.queue_state (id) values (false)",
    "plans_busy_after_is_positive": "update private.plans set busy_after = '0'",
    "settings_breaker_limits_are_positive": "update private.settings set breaker_users = 0",
    "batches_job_count_is_positive": (
        "insert into public.batches (user_id, request_hash, job_count)"
        " select user_id, '', 0 from public.entitlements limit 1"
    ),
    "webhook_endpoints_events_are_known": (
        "insert into private.webhook_endpoints (url, events) values ('', '{generation.lost}')"
    ),
    "push_tokens_token_is_expos": "update private.push_tokens set token = 'apns:1'",
    "deliveries_state_is_known": "update private.deliveries set state = 'lost'",
    "deliveries_finished_at_matches_state": "update private.deliveries set finished_at = now()",
    "deliveries_push_token_matches_lane": "update private.deliveries set lane = 'somebody'",
    "deliveries_attempts_are_not_negative": "update private.deliveries set attempts = -1",
    "settings_delivery_times_are_in_reach": (
        "update private.settings set delivery_retries = '{1 minute,-1 minute}'"
    ),
}


def test_each_rule_of_the_tables_holds(db, alice, worker):
    alice.register_push_token("ExponentPushToken[alice]")
    alice.enqueue()
    alice.enqueue()
    worker.complete_job(worker.claimed())
    worker.claimed()
    db.execute("alter table public.credit_ledger disable trigger all")
    db.execute(
        "create view private.a_ledger_entry as"
        " select * from public.credit_ledger where kind = 'charge'"
    )

    broken = {}
    for rule, statement in BROKEN_RULES.items():
        with pytest.raises(psycopg.errors.CheckViolation) as refusal:
            db.execute(statement)
        broken[rule] = refusal.value.diag.constraint_name

    assert broken == {rule: rule for rule in BROKEN_RULES}


@pytest.mark.parametrize(
    ("kind", "amounts", "is_of_a_generation"),
    [
        ("charge", {-1, 0}, True),
        ("refund", {0, 1}, True),
        ("grant", {0, 1}, False),
        ("carry", {0, 1}, False),
        ("adjust", {-1, 1}, False),
    ],
)
def test_an_entry_has_the_sign_and_the_generation_of_its_kind(
    db, kind, amounts, is_of_a_generation
):
    query = "select private.fits_kind(%s, %s, case when %s then gen_random_uuid() end)"

    for amount, has_generation in itertools.product((-1, 0, 1), (True, False)):
        fits = db.value(query, kind, amount, has_generation)
        assert fits == (amount in amounts and has_generation == is_of_a_generation)


def test_every_check_is_tried_above(db):
    checks = db.execute(
        "select conname from pg_constraint"
        " where contype = 'c' and connamespace in ('public'::regnamespace, 'private'::regnamespace)"
    )

    assert {check["conname"] for check in checks} == set(BROKEN_RULES)


def test_a_generation_is_refunded_at_most_once(db, alice):
    job_id = alice.enqueued()
    refund = (
        "insert into public.credit_ledger (user_id, generation_id, kind, amount, balance_after)"
        " values (%s, %s, 'refund', 1, 1)"
    )
    db.execute(refund, alice.id, job_id)

    with pytest.raises(psycopg.errors.UniqueViolation):
        db.execute(refund, alice.id, job_id)


def test_there_is_one_row_of_settings(db):
    with pytest.raises(psycopg.errors.UniqueViolation):
        db.execute("insert into private.settings default values")
