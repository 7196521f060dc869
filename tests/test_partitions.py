"""The tables that grow with history are ready to be partitioned, and what that costs."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import partitioned
import pytest
from actors import Service, User, Worker
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


@pytest.fixture
def parts(target: Database) -> Database:
    """A database whose history is in monthly partitions."""
    done = target.psql(script=partitioned.edited(*MONTHS) + SEED.read_text())
    assert done.returncode == 0, done.stderr
    target.lift_limits()
    return target


def relations(plans: list) -> set[str]:
    """Return which partitions were really touched."""
    met = [node for plan in plans for node in nodes(plan) if node.get("Actual Loops")]
    return {n["Relation Name"] for n in met if n.get("Relation Name", "").startswith("generations")}


def test_a_job_goes_all_its_way_and_a_key_is_still_used_once(parts):
    alice, worker, service = User(parts).has(credits=50), Worker(parts), Service(parts)
    job = alice.enqueued(idempotency_key="tap")
    assert alice.enqueued(idempotency_key="tap") == job
    with pytest.raises(Exception, match="idempotency_conflict"):
        alice.enqueue("another prompt", idempotency_key="tap")
    worker.complete_job(worker.claimed())
    failed = alice.enqueued()
    worker.fail_job(worker.claimed(), "moderated")
    canceled = alice.enqueued()
    alice.cancel_generation(canceled)
    alice.enqueue_batch(["one", "two"])
    lost = worker.claimed()
    parts.pass_time("2 minutes")
    assert Worker(parts).recover_stale_jobs() == 1
    assert alice.get_job_status(lost.id)["status"] == "queued"
    alice.share_image(job)
    alice.set_favorite(job)
    alice.retry_generation(failed)
    assert len(alice.list_public_images()["images"]) == 1
    assert len(alice.list_generations()["generations"]) == 6
    assert service.queue_health()["books"]["recent_problems"] == 0
    assert_books_balance(parts)
    alice.delete_generation(canceled)
    parts.execute("update private.settings set keep_deleted = '0'")
    worker.apply_retention()
    parts.execute("delete from auth.users where id = %s", alice.id)
    assert parts.value("select count(*) from public.generations") == 0
    this_month = f"public.generations_{NOW:%Y_%m}"
    assert parts.value("select to_regclass(%s)::text", this_month)


def test_the_runbooks_command_makes_the_file(tmp_path):
    Section("Partitions").sh(tmp_path)

    made = (tmp_path / "partitioned.sql").read_text()
    assert "create table public.generations_2027_12 partition of" in made


def test_what_has_an_id_looks_into_one_partition(parts):
    alice = User(parts)
    job = alice.enqueued()
    alice.get_job_status(job)

    with explained(alice.connection) as plans:
        alice.get_job_status(job)

    assert relations(plans) == {f"generations_{NOW:%Y_%m}"}


def test_no_other_unique_rule_of_these_tables_stands_in_the_way(db):
    """Each must hold the id that partitions go by; the key of idempotency is the known one."""
    rules = db.execute(
        "select i.relname::text as name from pg_index as x"
        " inner join pg_class as i on i.oid = x.indexrelid"
        " inner join pg_attribute as a on a.attrelid = x.indrelid"
        "   and a.attname = case when x.indrelid = 'public.generations'::regclass"
        "     then 'id' else 'generation_id' end"
        " where x.indisunique and x.indrelid = any (array['public.generations',"
        "   'public.images', 'private.attempts']::regclass[])"
        "   and not a.attnum = any (x.indkey::smallint[])"
    )

    assert [row["name"] for row in rules] == ["generations_idempotency_key_idx"]


def test_a_backup_is_restored_into_partitions(db, alice, worker, target, tmp_path: Path):
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
    migration = tmp_path / "partitioned.sql"
    migration.write_text(partitioned.edited(*MONTHS))

    restore = Section("Restore")
    (script,) = restore.of("sh")
    made = "supabase/migrations/*.sql"
    assert made in script
    restore.blocks = [("sh", script.replace(made, str(migration)))]
    restore.sh(tmp_path, ADMIN_URL=target.url)

    count = "select count(*) from public.generations_{}"
    assert target.value(count.format(f"{NOW:%Y_%m}")) == 1
    assert target.value(count.format("rest")) == 1
    assert target.value("select count(*) from public.images_rest") == 1
    page = User(target, alice.id).list_generations()["generations"]
    assert [each["job_id"] for each in page][-1] == old
