"""The optional parts, sql/95_gallery.sql and those after it: left out, and added later."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from actors import Service, User, Worker, refused
from database import SEED, SQL_FILES, Database, Server, assert_books_balance

import worker as worker_py

PARTS = {file.stem[3:]: file for file in SQL_FILES if file.name >= "95"}
CORE = [file for file in SQL_FILES if file not in PARTS.values()]


@pytest.fixture(scope="module")
def core_template(server: Server, supabase_template: str) -> str:
    """Name of a database with the core alone."""
    database = server.create(supabase_template)
    done = database.psql(*CORE, SEED)
    assert done.returncode == 0, done.stderr
    database.close()
    return database.name


@pytest.fixture
def db(server: Server, core_template: str) -> Iterator[Database]:
    """A database of the test's own with the core alone, for the actors, too."""
    database = server.create(core_template)
    yield database
    server.drop(database)


def completed(user: User, worker: Worker) -> str:
    job_id = user.enqueued()
    worker.complete_job(worker.claimed())
    return job_id


def test_a_job_lives_and_goes_without_the_parts(db, alice, service, worker):
    done = completed(alice, worker)
    failed = alice.enqueued()
    worker.fail_job(worker.claimed(), "moderated")
    canceled = alice.enqueued()
    alice.cancel_generation(canceled)

    status = alice.get_job_status(done)
    assert (status["status"], status["is_favorite"], status["tags"]) == ("completed", False, [])
    assert [image["is_public"] for image in status["images"]] == [False]
    history = alice.list_generations()["generations"]
    assert [job["job_id"] for job in history] == [canceled, failed, done]
    assert alice.list_generations(tag="sea")["generations"] == []
    assert alice.list_generations(only_favorites=True)["generations"] == []
    alice.delete_generation(done)
    alice.restore_generation(done)
    alice.delete_generation(done)
    assert_books_balance(db)

    db.pass_time("31 days")
    worker.recover_stale_jobs()
    assert worker.apply_retention() == 1
    (file,) = worker.list_expired_files()
    assert worker.forget_files(file) == 0
    assert db.value("select count(*) from public.generations where id = %s", done) == 0
    db.execute("select private.trim_history(), private.check_books()")
    health = service.queue_health()
    assert (health["status"], health["alerts"], health["outbox"]) == ("ok", [], {})
    db.execute("delete from auth.users where id = %s", alice.id)
    assert [name for name, rows in db.snapshot().items() if alice.id in str(rows)] == []


def test_nothing_complains_that_the_parts_are_not_there(db, alice, service, worker):
    assert db.execute("select * from private.skipped_rows") == []
    assert worker.due_lanes() == worker._rows("select * from private.claim_receipts(10)") == []
    worker.connection.execute("set session authorization darkroom_worker")
    checks = "select part, verdict from private.check_setup(%s)"
    answered = worker.connection.execute(checks, [list(worker_py.Database.FUNCTIONS)]).fetchall()
    verdicts = dict(answered)
    assert "wrong" not in (verdicts["database"], verdicts["policies"]), verdicts
    for view in db.execute(
        "select format('%I.%I', schemaname, viewname) as name from pg_views"
        " where schemaname in ('public', 'private')"
    ):
        db.execute(f"select * from {view['name']}")
    for caller, function in ((alice, "list_prompt_templates"), (service, "queue_report")):
        with refused("42883"):
            caller.call(f"public.{function}")
    assert db.value("select count(*) from pg_policies where 'anon' = any(roles)") == 0


def test_the_parts_are_added_later_and_serve_what_was_there(db, server, template, alice, worker):
    done, service = completed(alice, worker), Service(db)

    installed = db.psql(*PARTS.values())

    assert installed.returncode == 0, installed.stderr
    assert alice.set_tags(done, "sea") == ["sea"]
    alice.set_favorite(done)
    alice.share_image(done)
    assert [job["tags"] for job in alice.list_generations(tag="sea")["generations"]] == [["sea"]]
    hook = service.register_webhook()["webhook_id"]
    later = completed(alice, worker)
    assert worker.claim_deliveries(hook)[0].message["data"]["job_id"] == later
    assert service.call("public.queue_report")["health"]["status"] == "ok"
    whole = server.create(template)
    assert db.dump() == whole.dump()
    server.drop(whole)


@pytest.mark.parametrize("part", PARTS)
def test_each_part_needs_no_other(db, alice, service, worker, part):
    installed = db.psql(PARTS[part])

    assert installed.returncode == 0, installed.stderr
    completed(alice, worker)
    assert service.queue_health()["status"] == "ok"
    db.execute("delete from auth.users where id = %s", alice.id)
    assert worker.apply_retention() == 0
