"""The tables that grow with history are ready to be partitioned."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import partitioned
import pytest
from actors import User, Worker, refused
from database import SEED, Database, Server, assert_books_balance
from explain import explained, nodes
from runbook import Section

NOW = datetime.now(UTC)
MONTHS = partitioned.around(NOW)


@pytest.fixture
def target(server: Server, supabase_template: str) -> Iterator[Database]:
    database = server.create(supabase_template)
    yield database
    server.drop(database)


def test_a_job_goes_all_its_way_within_its_month_and_a_key_is_still_used_once(target):
    done = target.psql(script=partitioned.edited(*MONTHS) + SEED.read_text())
    assert done.returncode == 0, done.stderr
    target.lift_limits()
    alice, worker = User(target).has(credits=50), Worker(target)
    job = alice.enqueued(idempotency_key="tap")
    assert alice.enqueued(idempotency_key="tap") == job
    with refused("PT409", "idempotency_conflict"):
        alice.enqueue("another prompt", idempotency_key="tap")
    worker.complete_job(worker.claimed())
    failed = alice.enqueued()
    worker.fail_job(worker.claimed(), "moderated")
    canceled = alice.enqueued()
    alice.cancel_generation(canceled)
    alice.enqueue_batch(["one", "two"])
    lost = worker.claimed()
    target.pass_time("2 minutes")
    assert Worker(target).recover_stale_jobs() == 1
    assert alice.get_job_status(lost.id)["status"] == "queued"
    alice.share_image(job)
    alice.retry_generation(failed)
    assert len(alice.list_public_images()["images"]) == 1
    assert len(alice.list_generations()["generations"]) == 6
    assert_books_balance(target)

    with explained(alice.connection) as plans:
        alice.get_job_status(job)
    met = [node for plan in plans for node in nodes(plan) if node.get("Actual Loops")]
    parts = {
        n["Relation Name"] for n in met if n.get("Relation Name", "").startswith("generations")
    }
    assert parts == {f"generations_{NOW:%Y_%m}"}

    alice.delete_generation(canceled)
    target.execute("update private.settings set keep_deleted = '0'")
    worker.apply_retention()
    target.execute("delete from auth.users where id = %s", alice.id)
    assert target.value("select count(*) from public.generations") == 0


def test_a_backup_is_restored_into_partitions(db, alice, worker, target, tmp_path: Path):
    Section("Partitions").sh(tmp_path)
    migration = tmp_path / "partitioned.sql"
    assert "create table public.generations_2027_12 partition of" in migration.read_text()
    alice.enqueue()
    worker.complete_job(worker.claimed())
    old = "01850000-0000-7000-8000-000000000000"  # of 2022
    db.execute("set session_replication_role = replica")
    db.execute("update public.generations set id = %s", old)
    db.execute(
        "update public.images set generation_id = %s, storage_path = replace(storage_path,"
        " generation_id::text, %s)",
        old,
        old,
    )
    db.execute("update private.attempts set generation_id = %s", old)
    alice.enqueue()
    Section("Backup").sh(tmp_path, ADMIN_URL=db.url)
    migration.write_text(partitioned.edited(*MONTHS))

    restore = Section("Restore")
    (script,) = restore.of("sh")
    made = "supabase/migrations/*.sql"
    assert made in script
    restore.blocks = [("sh", script.replace(made, str(migration)))]
    restore.sh(tmp_path, ADMIN_URL=target.url)

    count = "select count(*) from public.{}"
    assert target.value(count.format(f"generations_{NOW:%Y_%m}")) == 1
    assert target.value(count.format("generations_rest")) == 1
    assert target.value(count.format("images_rest")) == 1
    page = User(target, alice.id).list_generations()["generations"]
    assert [each["job_id"] for each in page][-1] == old
