"""The tables that grow with history can be partitioned by a restore: docs/scale.md."""

from __future__ import annotations

from datetime import UTC, datetime

import partitioned
import pytest
from actors import User, Worker, refused
from database import assert_books_balance
from runbook import SCALE, Section

NOW = datetime.now(UTC)
OLD = "01850000-0000-7000-8000-000000000000"  # of 2022


@pytest.fixture
def target(db, worker, server, supabase_template, tmp_path):
    """A database in partitions, restored from a backup with a job of now and a very old one."""
    alice = User(db)
    alice.enqueue()
    worker.complete_job(worker.claimed())
    db.execute("set session_replication_role = replica")
    db.execute("update public.generations set id = %s", OLD)
    for table in ("private.attempts", "public.credit_ledger"):
        db.execute(f"update {table} set generation_id = %s where generation_id is not null", OLD)
    path = f"{alice.id}/{OLD}/0.png"
    db.execute("update public.images set generation_id = %s, storage_path = %s", OLD, path)
    alice.enqueue()
    Section("Partitions", SCALE).sh(tmp_path)
    migration = tmp_path / "partitioned.sql"
    assert "create table public.generations_2027_12 partition of" in migration.read_text()
    migration.write_text(partitioned.edited(*partitioned.around(NOW)))
    Section("Backup").sh(tmp_path, ADMIN_URL=db.url)
    target = server.create(supabase_template)
    restore = Section("Restore")
    (script,) = restore.of("sh")
    made = "supabase/migrations/*.sql"
    assert made in script
    restore.blocks = [("sh", script.replace(made, str(migration)))]
    restore.sh(tmp_path, ADMIN_URL=target.url)
    yield target
    server.drop(target)


def test_what_is_restored_into_partitions_goes_on_and_a_key_is_still_used_once(target):
    months = ("generations_rest", "images_rest", f"generations_{NOW:%Y_%m}")
    assert [target.value(f"select count(*) from public.{each}") for each in months] == [1, 1, 1]
    target.lift_limits()
    alice, worker = User(target, target.value("select id::text from auth.users")), Worker(target)
    job = alice.enqueued(idempotency_key="tap")
    assert alice.enqueued(idempotency_key="tap") == job
    with refused("PT409", "idempotency_conflict"):
        alice.enqueue("another prompt", idempotency_key="tap")
    worker.complete_jobs(*[(each, 1) for each in worker.claim_jobs(2)])
    lost = alice.enqueued()
    worker.claimed()
    target.pass_time("2 minutes")
    assert Worker(target).recover_stale_jobs() == 1
    alice.cancel_generation(lost)
    alice.share_image(job)
    assert len(alice.list_public_images()["images"]) == 1
    assert [each["job_id"] for each in alice.list_generations()["generations"]][-1] == OLD
    assert_books_balance(target)

    target.execute("delete from auth.users where id = %s", alice.id)
    assert target.value("select count(*) from public.generations") == 0
