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


MARK = "insert into private.expired_files (bucket, path, user_id) select {}, user_id from"


@pytest.mark.parametrize(
    "change",
    [
        "update public.entitlements set credits = -1",
        "update public.credit_ledger set amount = 1 where kind = 'charge'",
        "update public.credit_ledger set amount = 0, generation_id = gen_random_uuid()"
        " where kind = 'grant'",
        "update public.models set paid_price_credits = -1",
        "update public.models set price_credits = 1000001",
        "update public.models set client_inputs = client_inputs || prompt_input",
        "update public.models set image_inputs = '{photo}'",
        "update public.generations set status = 'lost' where finished_at is null",
        "update public.generations set finished_at = null where finished_at is not null",
        "update public.generations set finished_at = now() where finished_at is null",
        "update public.images set storage_path = 'someone/else/0.png'",
        "update public.images set preview_path = 'someone/else/0.webp'",
        "update public.images set content_type = 'text/html'",
        "insert into private.settings (id) values (false)",
        "update private.settings set welcome_credits = 1000001",
        "update private.settings set lease = '44 seconds'",
        "update private.settings set running_cancel_refund_percent = 101",
        "update private.settings set keep_generations = '23 hours'",
        # A time that no date can be moved by would end each routine that tries.
        "update private.settings set keep_inputs = '300000 years'",
        "update private.settings set delivery_retries = '{1 minute,-1 minute}'",
        MARK.format("'avatars', user_id || '/a.png'") + " public.entitlements",
        MARK.format("'inputs', user_id || '0/a.png'") + " public.entitlements",
    ],
)
def test_what_breaks_a_rule_is_refused_by_the_table(db, alice, worker, change):
    alice.enqueue()
    alice.enqueue()
    worker.complete_job(worker.claimed())
    db.execute("alter table public.credit_ledger disable trigger all")

    with pytest.raises(psycopg.errors.CheckViolation):
        db.execute(change)


def test_a_generation_is_refunded_at_most_once(db, alice):
    job_id = alice.enqueued()
    refund = (
        "insert into public.credit_ledger (user_id, generation_id, kind, amount, balance_after)"
        " values (%s, %s, 'refund', 1, 1)"
    )
    db.execute(refund, alice.id, job_id)

    with pytest.raises(psycopg.errors.UniqueViolation):
        db.execute(refund, alice.id, job_id)
