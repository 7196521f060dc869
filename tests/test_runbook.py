"""docs/RUNBOOK.md: a section for each alert, every command run, and the alert gone after it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

import pytest
from actors import Service, User, Worker
from database import PROJECT, Database
from runbook import Section, titles

from worker import POOL_SIZE, RECOVERY_SECONDS

# Which test runs the commands of which other section.
RUN_BY = {
    "Backup": "test_backup.py",
    "Restore": "test_backup.py",
    "Moving to another project": "test_operations.py",
    "Key rotation": "test_operations.py",
    "Upgrading": "test_upgrade.py",
    "Scaling out": "test_runbook.py",
    "Partitions": "test_partitions.py",
    "Read replicas": "test_replica.py",
}
ALERTS = [title.strip("`") for title in titles() if title.startswith("`")]


class Scene:
    """A database in which an alert is raised, and what ends the alert beside the commands."""

    def __init__(self, db: Database) -> None:
        db.lift_limits()
        self.db, self.alice, self.service = db, User(db), Service(db)

    def rule(self, alert: str, **columns: Any) -> None:
        for column, value in columns.items():
            query = f"update private.alert_rules set {column} = %s where alert = %s"
            self.db.execute(query, value, alert)

    def wait(self, interval: str) -> Callable[[], None]:
        return lambda: self.db.pass_time(interval)


Raised = tuple[dict[str, object], Callable[[], object] | None]


def depth(scene: Scene) -> Raised:
    scene.rule("depth", threshold=0)
    scene.alice.enqueue()
    return {}, lambda: Worker(scene.db).claimed()


def oldest_age(scene: Scene) -> Raised:
    scene.alice.enqueue()
    scene.db.pass_time("301 seconds")
    return {}, lambda: Worker(scene.db).claimed()


def error_rate(scene: Scene) -> Raised:
    scene.rule("error_rate", min_cases=1)
    scene.db.execute("update private.settings set max_attempts = 1")
    scene.alice.enqueue()
    worker = Worker(scene.db)
    worker.fail_job(worker.claimed(), "provider_error")
    return {"model": "darkroom/preview"}, scene.wait("15 minutes")


def burned(scene: Scene) -> Raised:
    scene.rule("burned", threshold=0)
    job_id = scene.alice.enqueued()
    worker = Worker(scene.db)
    job = worker.claimed()
    scene.alice.cancel_generation(job_id)
    worker.cancel_job(job)
    return {}, scene.wait("15 minutes")


def stuck(scene: Scene) -> Raised:
    scene.alice.enqueue()
    Worker(scene.db).claimed()
    scene.db.pass_time("181 seconds")
    return {}, None


def no_worker(scene: Scene) -> Raised:
    scene.alice.enqueue()
    return {}, lambda: Worker(scene.db)


def not_listening(scene: Scene) -> Raised:
    worker = Worker(scene.db)
    worker.heartbeat(is_listening=False)
    return {}, worker.heartbeat


def paused(scene: Scene) -> Raised:
    scene.alice.enqueue()
    Worker(scene.db).pause_provider("preview", 3600, "402: no credit")
    return {"name": "preview"}, None


def vacuum_held_back(scene: Scene) -> Raised:
    scene.rule("vacuum_held_back", threshold=1)
    holder = scene.db.connect()
    holder.execute("begin isolation level repeatable read")
    holder.execute("select 1")
    for _ in range(3):
        scene.db.execute("select pg_current_xact_id()")
    slot = f"gone_{scene.db.name}"
    scene.db.execute("select pg_create_physical_replication_slot(%s)", slot)
    return {"pid": holder.info.backend_pid, "slot": slot}, lambda: time.sleep(0.2)


def dead_deliveries(scene: Scene) -> Raised:
    scene.db.execute("update private.settings set delivery_retries = '{}'")
    hook = scene.service.register_webhook()["webhook_id"]
    scene.alice.enqueue()
    worker = Worker(scene.db)
    worker.complete_job(worker.claimed())
    (delivery,) = worker.claim_deliveries(hook)
    worker.finish_delivery(delivery, "gone", 410)
    return {"webhook_id": hook}, None


def skipped_rows(scene: Scene) -> Raised:
    what = {"step": "mark_files", "key": f"inputs/{scene.alice.id}/cat.jpg"}
    query = "select private.note_skipped(%s, %s, '23514', 'violates')"
    scene.db.execute(query, *what.values())
    return {**what}, None


def books(scene: Scene) -> Raised:
    job_id = scene.alice.enqueued()
    worker = Worker(scene.db)
    worker.fail_job(worker.claimed(), "moderated")
    scene.db.execute("alter table public.credit_ledger disable trigger all")
    scene.db.execute("delete from public.credit_ledger where kind = 'refund'")
    scene.db.execute("alter table public.credit_ledger enable trigger all")
    scene.db.execute("select private.check_books()")
    return {"user_id": scene.alice.id, "job_id": job_id, "credits": 1}, None


RAISE: dict[str, Callable[[Scene], Raised]] = {
    function.__name__: function
    for function in (
        depth,
        oldest_age,
        error_rate,
        burned,
        stuck,
        no_worker,
        not_listening,
        paused,
        vacuum_held_back,
        dead_deliveries,
        skipped_rows,
        books,
    )
}


def test_each_alert_has_a_section_and_each_section_an_alert(db):
    rules = [row["alert"] for row in db.execute("select alert from private.alert_rules")]

    assert sorted(ALERTS) == sorted(rules)
    assert sorted([*RAISE, "cron_silent"]) == sorted(rules)


@pytest.mark.parametrize("alert", ALERTS)
def test_a_section_says_how_bad_its_alert_is_and_where_it_starts(db, alert):
    rule = db.row("select * from private.alert_rules where alert = %s", alert)

    said = f"{rule['severity']}, above {rule['threshold']} {rule['unit']}"
    assert Section(f"`{alert}`").text.strip().startswith(said)


@pytest.mark.parametrize("alert", RAISE)
def test_the_commands_of_an_alert_work_while_it_is_raised_and_end_it(db, alert):
    scene = Scene(db)
    variables, end = RAISE[alert](scene)
    assert alert in scene.service.alerts()

    Section(f"`{alert}`").sql(db.url, **variables)
    if end:
        end()

    assert alert not in scene.service.alerts()


def test_the_commands_of_cron_silent_work_where_pg_cron_is(stack, tmp_path):
    db = Database(stack.database_url, "postgres")
    query = "update private.routines set last_run_at = last_run_at - interval '5 days'"
    db.execute(f"{query} where name = 'check_books'")
    assert "check_books last ran at " in Service(db).alerts()["cron_silent"]
    section = Section("`cron_silent`")

    assert "darkroom_check_books" in section.sql(db.url)
    section.sh(tmp_path, ADMIN_URL=db.url)

    assert "check_books" not in Service(db).alerts().get("cron_silent", "")
    db.close()


def test_the_numbers_of_scaling_out_are_those_of_the_code(db, service):
    section = Section("Scaling out")
    Worker(db)

    assert f"at most {POOL_SIZE + 1} connections: {POOL_SIZE} for its calls" in section.text
    assert f"which\nevery worker does within {RECOVERY_SECONDS:.0f} s" in section.text
    lease = db.value("select extract(epoch from lease)::int from private.settings")
    assert f"their lease ({lease} s)" in section.text
    assert "slots" in section.sql(db.url)


def test_what_the_hints_of_alerts_name_is_there(db):
    hints = "".join(row["hint"] for row in db.execute("select hint from private.alert_rules"))

    named = set(re.findall(r"private\.(\w+)", hints))
    assert named <= {
        row["name"]
        for row in db.execute(
            "select relname::text as name from pg_class"
            " where relnamespace = 'private'::regnamespace"
            " union all select proname from pg_proc where pronamespace = 'private'::regnamespace"
        )
    }


def test_every_section_with_commands_is_run_by_some_test():
    for title in titles():
        if Section(title).blocks and title.strip("`") not in ALERTS:
            assert title in RUN_BY, title
            assert f'Section("{title}")' in (PROJECT / "tests" / RUN_BY[title]).read_text()
