"""sql/20_access.sql: who may read what; nobody writes a table."""

import contextlib

import psycopg
import pytest
from actors import refused
from database import unchanged

OWN_TABLES = {
    "public.entitlements": "user_id",
    "public.credit_ledger": "user_id",
    "public.generations": "user_id",
    "public.images": "user_id",
    "public.generation_tags": "user_id",
    "public.image_likes": "user_id",
    "public.prompt_templates": "user_id",
}
PRIVATE_TABLES = (
    "private.ready_jobs",
    "private.running_jobs",
    "private.workers",
    "private.attempts",
    "private.error_codes",
    "private.breakers",
    "private.retries",
    "private.plans",
    "private.settings",
)
COPY_ROWS = "insert into {0} select * from {0} union all select (null::{0}).*"
GRANT_ALL = "grant all on all tables in schema public, private to anon, authenticated, service_role"


@pytest.fixture
def history(alice, bob, worker):
    """Each user has a completed generation with all that belongs to it, and one queued again."""
    for user in (alice, bob):
        job_id = user.enqueued()
        worker.complete_job(worker.claimed())
        user.set_tags(job_id, "sea")
        user.share_image(job_id)
        user.like_image(job_id)
        user.save_prompt_template("Sea", "the sea")
    for user in (alice, bob):
        user.enqueue()
    for job in worker.claim_jobs(2):
        worker.fail_job(job, "internal")


@pytest.mark.parametrize("table", OWN_TABLES)
def test_users_read_their_own_rows_only(history, alice, bob, table):
    for user in (alice, bob):
        owners = {str(row["user_id"]) for row in user.query(f"select user_id from {table}")}

        assert owners == {user.id}


@pytest.mark.parametrize("table", [*OWN_TABLES, "public.models"])
@pytest.mark.parametrize(
    "change", ["insert into {} default values", "update {} set {} = {}", "delete from {}"]
)
def test_users_write_no_table(history, alice, anon, table, change):
    column = OWN_TABLES.get(table, "id")

    for caller in (alice, anon):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            caller.query(change.format(table, column, column))


@pytest.mark.parametrize("table", [*PRIVATE_TABLES, "public.models"])
def test_users_do_not_read_what_is_not_theirs(alice, anon, table):
    for caller in (alice, anon):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            caller.query(f"select * from {table}")


@pytest.mark.parametrize("table", OWN_TABLES)
def test_anon_reads_no_table(history, anon, table):
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        anon.query(f"select * from {table}")


@pytest.mark.parametrize("table", [*OWN_TABLES, *PRIVATE_TABLES, "public.models"])
def test_the_worker_touches_no_table(worker, table):
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        worker.connection.execute(f"select * from {table}")


@pytest.mark.parametrize("table", OWN_TABLES)
def test_policies_hold_where_a_gateway_grants_everything(db, history, alice, anon, table):
    db.execute(GRANT_ALL)

    assert {str(row["user_id"]) for row in alice.query(f"select * from {table}")} == {alice.id}
    assert anon.query(f"select * from {table}") == []
    for change in ("update {0} set user_id = user_id", "delete from {0}", COPY_ROWS):
        for caller in (alice, anon):
            with unchanged(db), contextlib.suppress(psycopg.errors.Error):
                caller.query(change.format(table))


@pytest.mark.parametrize("table", [*PRIVATE_TABLES, "public.models"])
def test_private_tables_are_empty_to_users_where_a_gateway_grants_everything(
    db, history, alice, anon, table
):
    db.execute(GRANT_ALL)

    for caller in (alice, anon):
        assert caller.query(f"select * from {table}") == []
        assert caller.query(f"delete from {table} returning 1") == []


@pytest.mark.parametrize(
    "query",
    [
        "select private.claim_jobs(1, 1)",
        "select private.recover_stale_jobs()",
        "select private.complete_jobs('{}', '{}', '{}', '{}')",
        "select private.refund_generation(gen_random_uuid(), gen_random_uuid(), 1)",
        "select private.create_entitlement(gen_random_uuid())",
        "select public.grant_credits(gen_random_uuid(), 1, 'grant', 'x')",
        "select public.set_paid(gen_random_uuid(), 'infinity')",
    ],
)
def test_users_cannot_call_what_is_for_workers_and_the_service(alice, anon, query):
    for caller in (alice, anon):
        with refused("42501"):
            caller.query(query)


def test_anon_calls_ping_and_what_lists_models_and_shared_images_only(anon):
    assert anon.ping()["ok"]
    assert [model["id"] for model in anon.list_models()] == ["darkroom/preview"]
    assert anon.list_public_images()["images"] == []

    for call in ("enqueue_generation('m', 'p')", "list_active_jobs()", "get_entitlement()"):
        with refused("PT401", "not_authenticated"):
            anon.query(f"select public.{call}")


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


def test_files_are_read_by_their_owner_only(files, alice, bob, anon):
    for user in (alice, bob):
        names = {row["name"] for row in user.query("select name from storage.objects")}
        assert names == {f"{user.id}/a/0.png"}

    assert anon.query("select name from storage.objects") == []


def test_users_add_files_to_their_own_input_folder_only(files, alice, bob):
    insert = "insert into storage.objects (bucket_id, name) values (%s, %s) returning name"

    assert alice.query(insert, "inputs", f"{alice.id}/new.png")
    for bucket, owner in (("inputs", bob), ("generations", alice)):
        with refused("42501"):
            alice.query(insert, bucket, f"{owner.id}/new.png")


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/",
        "//a",
        "/a/",
        "/a//b",
        "/../b",
        "/a/..",
        "/./b",
        "/" + "x" * 480,
        "/" + "\u20ac" * 170,
    ],
)
def test_an_input_has_a_name_of_its_own_below_the_folder(files, alice, name):
    name = f"{alice.id}{name}"
    with refused("42501"):
        alice.query("insert into storage.objects (bucket_id, name) values ('inputs', %s)", name)
    with refused("42501"):
        alice.query("update storage.objects set name = %s", name)


@pytest.mark.parametrize(
    "name", ["a", "a/b/c.png", "..a", "a b.jpg", "\u20ac\u202e.png", "x" * 475]
)
def test_whatever_else_it_is_called_is_the_users_own_business(files, alice, name):
    insert = "insert into storage.objects (bucket_id, name) values ('inputs', %s) returning 1"

    assert alice.query(insert, f"{alice.id}/{name}")


def test_a_user_keeps_no_more_inputs_than_the_setting_says(db, files, alice, bob):
    db.execute("update private.settings set max_input_files = 3")
    insert = "insert into storage.objects (bucket_id, name) values ('inputs', %s)"
    for name in ("b", "c"):
        alice.query(insert, f"{alice.id}/{name}")

    with refused("42501"):
        alice.query(insert, f"{alice.id}/d")
    assert len(alice.query("update storage.objects set version = '2' returning 1")) == 3
    bob.query(insert, f"{bob.id}/b")
    alice.query("delete from storage.objects where name like '%%/b'")
    alice.query(insert, f"{alice.id}/d")


def test_users_replace_and_delete_only_their_own_inputs(files, alice):
    changed = alice.query("update storage.objects set version = '2' returning bucket_id, name")
    deleted = alice.query("delete from storage.objects returning bucket_id, name")

    assert changed == deleted == [{"bucket_id": "inputs", "name": f"{alice.id}/a/0.png"}]


def test_an_input_cannot_be_moved_into_another_folder_or_bucket(files, alice, bob):
    for change in (f"name = '{bob.id}/b.png'", "bucket_id = 'generations', name = name || 'x'"):
        with refused("42501"):
            alice.query(f"update storage.objects set {change}")
