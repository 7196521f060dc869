"""The publication of sql/65_realtime.sql: what leaves by logical decoding, and who may have it.

In a cluster of its own, because only one with wal_level=logical decodes. Realtime decodes with
wal2json, which gives what `pgoutput` gives of a table published with all its columns.
"""

import psycopg
import pytest
from actors import refused
from database import Server
from decoding import Slot
from realtime_stand_in import add_realtime, install

from stack import Cluster, Settings

COLUMNS = {
    *("id", "user_id", "model_id", "alias_id", "batch_id", "retry_of", "prompt", "input"),
    *("provider_input", "status", "error_code", "error_message", "price_credits", "image_count"),
    *("queue_distance", "idempotency_key", "is_favorite", "created_at", "started_at"),
    *("finished_at", "updated_at", "deleted_at"),
}


@pytest.fixture(scope="module")
def logical_server(stopped_stack):
    """A cluster that decodes, as every one of Supabase's does."""
    folder = stopped_stack.folder / "logical"
    folder.mkdir(mode=0o711)
    cluster = Cluster(folder, Settings(folder / "env"), fsync=False)
    try:
        cluster.start()
        with psycopg.connect(cluster.url(), autocommit=True) as connection:
            connection.execute("alter system set wal_level = 'logical'")
        cluster.stop()
        cluster.start()
        server = Server(cluster)
        yield server
        server.close()
    finally:
        cluster.stop()
        cluster.delete()


@pytest.fixture(scope="module")
def logical_template(server, supabase_template, logical_server):
    """Name of a database with Realtime and Darkroom in that cluster."""
    supabase = server.create(supabase_template)
    schemas = supabase.dump("--schema=auth", "--schema=storage")
    server.drop(supabase)
    database = logical_server.create()
    assert database.psql(script=schemas).returncode == 0
    add_realtime(database)
    assert "no right" not in install(database)
    database.close()
    return database.name


@pytest.fixture
def db(logical_server, logical_template):
    """A database of the test's own, for the actors, too."""
    database = logical_server.create(logical_template)
    yield database
    logical_server.drop(database)


@pytest.fixture
def slot(db):
    """A subscription to what Realtime publishes, from here on."""
    slot = Slot(db, "supabase_realtime")
    yield slot
    slot.drop()


def visible(change, caller) -> bool:
    """Ask as Realtime does for each change and subscriber: does the row's key show it the row?

    Of a deleted row it cannot ask: that change goes to all, with no more than the key.
    """
    query = "select exists (select from public.generations where id = %s) as found"
    return caller.query(query, change.new["id"])[0]["found"]


def test_each_new_state_of_a_generation_leaves_with_the_whole_row_and_nothing_else_does(
    slot, alice, worker, service
):
    job_id = alice.enqueued()
    job = worker.claimed()
    worker.heartbeat(job, progress=[50])
    worker.report_progress(job, "storing", 90)
    worker.begin_create(job)
    worker.checkpoint(job, "provider-1")
    worker.complete_job(job)
    service.grant_credits(alice, 5, "g")
    alice.share_image(job_id)
    alice.set_tags(job_id, "sea")
    alice.save_prompt_template("a", "a lighthouse")
    alice.register_push_token("ExponentPushToken[a]")

    changes = slot.changes()

    assert [(change.kind, change.new["status"]) for change in changes] == [
        ("I", "queued"),
        ("U", "processing"),
        ("U", "completed"),
    ]
    assert {change.table for change in changes} == {"public.generations"}
    assert all(change.new.keys() == COLUMNS for change in changes)
    assert {change.new["id"] for change in changes} == {job_id}
    assert not any(change.old for change in changes)


def test_of_an_erased_generation_its_id_leaves_and_nothing_else(db, slot, alice):
    job_id = alice.enqueued()
    slot.changes()

    db.execute("delete from public.entitlements where user_id = %s", alice.id)

    (change,) = slot.changes()
    assert (change.kind, change.new) == ("D", None)
    assert {name: value for name, value in change.old.items() if value} == {"id": job_id}


def test_a_change_is_visible_to_its_user_alone_and_once_deleted_to_nobody(
    slot, alice, bob, anon, worker
):
    alice.enqueue("a secret garden")
    bob.enqueue("a harbour")
    for job in worker.claim_jobs(2):
        worker.complete_job(job)

    changes = slot.changes()

    assert len(changes) == 6
    for user, other in ((alice, bob), (bob, alice)):
        own = [change for change in changes if change.new["user_id"] == user.id]
        assert [change for change in changes if visible(change, user)] == own
        assert not any(visible(change, other) for change in own)
    with refused("42501"):
        visible(changes[0], anon)
    (own,) = {change.new["id"] for change in changes if change.new["user_id"] == alice.id}
    alice.delete_generation(own)
    (deleted,) = slot.changes()
    assert (deleted.kind, deleted.new["id"]) == ("U", own)
    assert not visible(deleted, alice) and not visible(deleted, bob)


def test_a_subscriber_who_wants_old_rows_breaks_no_job(db, slot, alice, worker):
    db.execute("alter table public.generations replica identity full")

    job_id = alice.enqueued("a secret garden")
    worker.complete_job(worker.claimed())

    assert alice.get_job_status(job_id)["status"] == "completed"
    old = [change.old and change.old["status"] for change in slot.changes()]
    assert old == [None, "queued", "processing"]
