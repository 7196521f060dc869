"""Whose rows and files are read, that nobody writes a table, and what its constraints refuse."""

import contextlib

import psycopg
import pytest
from actors import refused
from database import unchanged

OWN_TABLES = (
    "public.entitlements",
    "public.credit_ledger",
    "public.generations",
    "public.images",
    "public.generation_tags",
    "public.image_likes",
    "public.prompt_templates",
)
OTHER_TABLES = {
    "public.models": "price_credits",
    "private.ready_jobs": "fair_key",
    "private.workers": "slots",
    "private.settings": "welcome_credits",
}
COPY_ROWS = "insert into {0} select * from {0} union all select (null::{0}).*"
GRANT_ALL = "grant all on all tables in schema public, private to anon, authenticated"


@pytest.fixture
def history(alice, bob, worker):
    """Each user has a completed generation with all that belongs to it, and one that failed."""
    for user in (alice, bob):
        job_id = user.enqueued()
        worker.complete_job(worker.claimed())
        user.set_tags(job_id, "sea")
        user.share_image(job_id)
        user.like_image(job_id)
        user.save_prompt_template("Sea", "the sea")
        user.enqueue()
        worker.fail_job(worker.claimed(), "moderated")


def test_users_read_their_own_rows_only(history, alice, bob):
    for user in (alice, bob):
        for table in OWN_TABLES:
            owners = {str(row["user_id"]) for row in user.query(f"select user_id from {table}")}
            assert owners == {user.id}, table


def test_nobody_writes_a_table_even_where_a_gateway_grants_everything(db, history, alice, anon):
    db.execute(GRANT_ALL)

    with unchanged(db):
        for table, column in (dict.fromkeys(OWN_TABLES, "user_id") | OTHER_TABLES).items():
            if table in OTHER_TABLES:
                assert alice.query(f"select * from {table}") == []
            assert anon.query(f"select * from {table}") == []
            for change in ("update {0} set {1} = {1}", "delete from {0}", COPY_ROWS):
                for caller in (alice, anon):
                    with contextlib.suppress(psycopg.errors.Error):
                        caller.query(change.format(table, column))


@pytest.fixture
def files(db, alice, bob):
    """Both users have a file in each bucket; the API roles have the grants Supabase gives them."""
    db.execute("grant usage on schema storage to anon, authenticated")
    db.execute("grant all on storage.objects to anon, authenticated")
    for user in (alice, bob):
        for bucket in ("generations", "inputs"):
            db.execute(
                "insert into storage.objects (bucket_id, name) values (%s, %s)",
                bucket,
                f"{user.id}/a/0.png",
            )


INSERT = "insert into storage.objects (bucket_id, name) values (%s, %s) returning name"


def test_files_are_read_by_their_owner_and_inputs_changed_by_nobody_else(files, alice, bob, anon):
    for user in (alice, bob):
        names = {row["name"] for row in user.query("select name from storage.objects")}
        assert names == {f"{user.id}/a/0.png"}
    assert anon.query("select name from storage.objects") == []

    for bucket, owner in (("inputs", bob), ("generations", alice)):
        with refused("42501"):
            alice.query(INSERT, bucket, f"{owner.id}/new.png")
    own = [{"bucket_id": "inputs", "name": f"{alice.id}/a/0.png"}]
    assert alice.query("update storage.objects set version = '2' returning bucket_id, name") == own
    assert alice.query("delete from storage.objects returning bucket_id, name") == own


def test_an_input_has_a_name_of_its_own_below_the_folder(files, alice):
    bad = ["", "/", "//a", "/a/", "/a//b", "/../b", "/a/..", "/./b", "/" + "x" * 480]
    for name in (f"{alice.id}{each}" for each in [*bad, "/" + "\u20ac" * 170]):
        with refused("42501"):
            alice.query(INSERT, "inputs", name)
        with refused("42501"):
            alice.query("update storage.objects set name = %s", name)

    for name in ("a", "a/b/c.png", "..a", "a b.jpg", "\u20ac\u202e.png", "x" * 475):
        assert alice.query(INSERT, "inputs", f"{alice.id}/{name}")


def test_a_user_keeps_no_more_inputs_than_the_setting_says(db, files, alice, bob):
    db.execute("update private.settings set max_input_files = 3")
    for name in ("b", "c"):
        alice.query(INSERT, "inputs", f"{alice.id}/{name}")

    with refused("42501"):
        alice.query(INSERT, "inputs", f"{alice.id}/d")
    assert len(alice.query("update storage.objects set version = '2' returning 1")) == 3
    bob.query(INSERT, "inputs", f"{bob.id}/b")
    alice.query("delete from storage.objects where name like '%%/b'")
    alice.query(INSERT, "inputs", f"{alice.id}/d")


def test_an_input_cannot_be_moved_into_another_folder_or_bucket(files, alice, bob):
    for change in (f"name = '{bob.id}/b.png'", "bucket_id = 'generations', name = name || 'x'"):
        with refused("42501"):
            alice.query(f"update storage.objects set {change}")


# Constraints.


def test_ids_are_uuids_of_version_7_in_order_of_time(db):
    ids = [str(db.value("select private.uuid_v7()")) for _ in range(50)]

    assert ids == sorted(ids)
    assert {(each[14], each[19] in "89ab") for each in ids} == {("7", True)}


def test_the_ledger_is_append_only_even_for_its_owner(db, alice):
    for change in ("update {} set amount = 1000", "delete from {}", "truncate {}"):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            db.execute(change.format("public.credit_ledger"))

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
