"""The tables' rules that live in constraints: of money, of whose something is, and of settings."""

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


MARK_FILE = "insert into private.expired_files (bucket, path, user_id) select {}, user_id from"
BROKEN_RULES = {
    "entitlements_credits_are_not_negative": "update public.entitlements set credits = -1",
    "credit_ledger_amount_and_generation_match_kind": (
        "update private.a_ledger_entry set amount = 1"
    ),
    "credit_ledger_balance_is_not_negative": "update private.a_ledger_entry set balance_after = -1",
    "models_prices_are_at_most_a_million": "update public.models set price_credits = 1000001",
    "models_prompt_input_is_no_client_input": (
        "update public.models set client_inputs = client_inputs || prompt_input"
    ),
    "models_image_inputs_are_client_inputs": "update public.models set image_inputs = '{photo}'",
    "job_status_is_known": (
        "update public.generations set status = 'lost' where finished_at is null"
    ),
    "generations_finished_at_matches_status": "update public.generations set finished_at = null",
    "generations_deleted_ones_are_finished": (
        "update public.generations set deleted_at = now() where finished_at is null"
    ),
    "images_path_is_the_owners": "update public.images set storage_path = 'someone/else/0.png'",
    "images_preview_path_is_the_owners": (
        "update public.images set preview_path = 'someone/else/0.webp'"
    ),
    "images_content_type_is_an_image": "update public.images set content_type = 'text/html'",
    "settings_lease_outlives_three_heartbeats": "update private.settings set lease = '44 seconds'",
    "settings_running_cancel_refund_is_a_percentage": (
        "update private.settings set running_cancel_refund_percent = 101"
    ),
    "settings_keep_generations_outlives_a_day": (
        "update private.settings set keep_generations = '23 hours'"
    ),
    "settings_keep_ledger_outlives_ninety_days": (
        "update private.settings set keep_ledger = '89 days'"
    ),
    # A time that no date can be moved by would end each routine that tries.
    "settings_times_are_in_reach": "update private.settings set keep_inputs = '300000 years'",
    "settings_delivery_times_are_in_reach": (
        "update private.settings set delivery_retries = '{1 minute,-1 minute}'"
    ),
    "expired_files_bucket_is_ours": (
        MARK_FILE.format("'avatars', user_id || '/a.png'") + " public.entitlements"
    ),
    "expired_files_path_is_the_users": (
        MARK_FILE.format("'inputs', user_id || '0/a.png'") + " public.entitlements"
    ),
}


def test_each_rule_of_the_tables_holds(db, alice, worker):
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


def test_a_generation_is_refunded_at_most_once(db, alice):
    job_id = alice.enqueued()
    refund = (
        "insert into public.credit_ledger (user_id, generation_id, kind, amount, balance_after)"
        " values (%s, %s, 'refund', 1, 1)"
    )
    db.execute(refund, alice.id, job_id)

    with pytest.raises(psycopg.errors.UniqueViolation):
        db.execute(refund, alice.id, job_id)
