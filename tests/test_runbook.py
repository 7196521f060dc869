"""docs/RUNBOOK.md: a section for each alert, every command run, and the alert gone after it."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable

import pytest
from actors import Job, Service, User, Worker
from database import PROJECT, Database
from documents import read, shows
from runbook import RUNBOOK, Section, titles

# Which test runs the commands of which other section.
RUN_BY = {
    "A cell is away": "test_scale_doc.py",
    "A cell was restored": "test_scale_doc.py",
    "A payment gave no credits": "test_credits_doc.py",
    "Backup": "test_backup.py",
    "Restore": "test_backup.py",
    "Moving to another project": "test_operations.py",
    "Key rotation": "test_operations.py",
    "Upgrading": "test_upgrade.py",
    "Watching": "test_runbook.py",
}
ALERTS = [title.strip("`") for title in titles() if title.startswith("`")]


class Scene:
    """A database in which an alert is raised by the method of its name.

    Each returns the variables of the runbook's commands, and what ends the alert beside these.
    """

    Raised = tuple[dict[str, object], Callable[[], object] | None]

    def __init__(self, db: Database) -> None:
        db.lift_limits()
        self.db, self.alice, self.service = db, User(db), Service(db)

    def rule(self, alert: str, column: str, value: int) -> None:
        query = f"update private.alert_rules set {column} = %s where alert = %s"
        self.db.execute(query, value, alert)

    def claimed(self) -> tuple[Worker, Job]:
        self.alice.enqueue()
        worker = Worker(self.db)
        return worker, worker.claimed()

    def depth(self) -> Raised:
        self.rule("depth", "threshold", 0)
        self.alice.enqueue()
        return {}, lambda: Worker(self.db).claimed()

    def oldest_age(self) -> Raised:
        self.alice.enqueue()
        self.db.pass_time("301 seconds")
        return {}, lambda: Worker(self.db).claimed()

    def error_rate(self) -> Raised:
        self.rule("error_rate", "min_cases", 1)
        self.db.execute("update private.settings set max_attempts = 1")
        worker, job = self.claimed()
        worker.fail_job(job, "provider_error")
        return {"model": "darkroom/preview"}, lambda: self.db.pass_time("15 minutes")

    def recent_failures(self) -> Raised:
        self.db.execute("update private.settings set max_attempts = 1")
        for end in ("completed", "completed", "failed", "failed"):
            worker, job = self.claimed()
            worker.complete_job(job) if end == "completed" else worker.fail_job(job, "internal")

        def later() -> None:
            for _ in range(2):
                self.alice.enqueue()
            for job in worker.claim_jobs(4):  # two of them failed before
                worker.complete_job(job)

        return {"code": "internal"}, later

    def burned(self) -> Raised:
        self.rule("burned", "threshold", 0)
        worker, job = self.claimed()
        self.alice.cancel_generation(job.id)
        worker.cancel_job(job)
        return {}, lambda: self.db.pass_time("15 minutes")

    def stuck(self) -> Raised:
        self.claimed()
        self.db.pass_time("179 seconds")
        assert "stuck" not in self.service.alerts()  # recovery may be on its way
        self.db.pass_time("2 seconds")
        return {}, None

    def no_worker(self) -> Raised:
        self.alice.enqueue()
        return {}, lambda: Worker(self.db)

    def unserved(self) -> Raised:
        self.db.execute("update private.providers set secret = 'FAL_KEY' where name = 'preview'")
        self.alice.enqueue()
        Worker(self.db)
        return {"model": "darkroom/preview"}, None

    def not_listening(self) -> Raised:
        Worker(self.db)
        worker = Worker(self.db)
        worker.heartbeat(is_listening=False)
        return {}, worker.heartbeat

    def paused(self) -> Raised:
        self.alice.enqueue()
        Worker(self.db).pause_provider("preview", 3600, "402: no credit")
        return {"name": "preview"}, None

    def budget(self) -> Raised:
        self.db.execute("update public.models set cost_usd = 0.9 where id = 'darkroom/preview'")
        made = "insert into private.budgets (period, limit_usd) values ('day', 1) returning id"
        budget_id = self.db.value(made)
        self.claimed()
        return {"budget_id": budget_id, "usd": 10}, None

    def vacuum_held_back(self) -> Raised:
        self.rule("vacuum_held_back", "threshold", 1)
        holder = self.db.connect()
        holder.execute("begin isolation level repeatable read")
        holder.execute("select 1")
        for _ in range(3):
            self.db.execute("select pg_current_xact_id()")
        slot = f"gone_{self.db.name}"
        self.db.execute("select pg_create_physical_replication_slot(%s)", slot)
        return {"pid": holder.info.backend_pid, "slot": slot}, lambda: time.sleep(0.2)

    def dead_deliveries(self) -> Raised:
        self.db.execute("update private.settings set delivery_retries = '{}'")
        hook = self.service.register_webhook()["webhook_id"]
        worker, job = self.claimed()
        worker.complete_job(job)
        (delivery,) = worker.claim_deliveries(hook)
        worker.finish_delivery(delivery, "gone", 410)
        return {"webhook_id": hook}, None

    def skipped_rows(self) -> Raised:
        what = {"step": "mark_files", "key": f"inputs/{self.alice.id}/cat.jpg"}
        query = "select private.note_skipped(%s, %s, '23514', 'violates')"
        self.db.execute(query, *what.values())
        return {**what}, None

    def books(self) -> Raised:
        worker, job = self.claimed()
        worker.fail_job(job, "moderated")
        self.db.execute("alter table public.credit_ledger disable trigger all")
        self.db.execute("delete from public.credit_ledger where kind = 'refund'")
        self.db.execute("alter table public.credit_ledger enable trigger all")
        self.db.execute("select private.check_books()")
        return {"user_id": self.alice.id, "job_id": job.id, "credits": 1}, None


SAID = {
    "depth": "1 jobs are ready",
    "oldest_age": "a job has waited for 301 s",
    "error_rate": "of 1 attempts in 15 minutes, 100 % ended in an error",
    "recent_failures": "2 of the last 4 jobs failed, most of them with internal",
    "burned": "1 running jobs canceled in 15 minutes, by 1 users: the provider may bill them",
    "stuck": "1 running jobs are past lease or deadline, one for 121 s",
    "no_worker": "1 jobs are ready and no worker is alive",
    "unserved": "1 jobs wait for preview, which no living worker serves",
    "not_listening": "1 of 2 workers",
    "paused": "provider preview until .*: 402: no credit",
    "budget": "app: 0.90 of 1.00 USD of this day",
    "vacuum_held_back": "session .* idle in transaction since .*",
    "dead_deliveries": "1 deliveries to webhooks were given up",
    "skipped_rows": "1 rows since .*: mark_files 1",
    "books": "2 problems among what moved last, 2 at the check of .*",
}


@pytest.mark.parametrize("alert", SAID)
def test_the_commands_of_an_alert_work_while_it_is_raised_and_end_it(db, alert):
    scene = Scene(db)
    assert scene.service.alerts() == {}
    variables, end = getattr(scene, alert)()
    assert re.fullmatch(SAID[alert], scene.service.alerts()[alert])

    Section(f"`{alert}`").sql(db.url, **variables)
    if end:
        end()

    assert alert not in scene.service.alerts()


def test_the_commands_of_cron_silent_work_where_pg_cron_is(stack, tmp_path):
    db, section = Database(stack.database_url, "postgres"), Section("`cron_silent`")
    query = "update private.routines set last_run_at = now() - %s::interval where name = %s"
    db.execute(query, "95 hours", "check_books")
    assert "check_books" not in Service(db).alerts().get("cron_silent", "")  # not yet
    db.execute(query, "97 hours", "check_books")
    assert "check_books last ran at " in Service(db).alerts()["cron_silent"]

    assert "darkroom_check_books" in section.sql(db.url)
    section.sh(tmp_path, ADMIN_URL=db.url)

    assert "check_books" not in Service(db).alerts().get("cron_silent", "")
    db.close()


def test_the_ways_to_watch_work_and_views_answer_the_questions(stack, tmp_path):
    db, section = Database(stack.database_url, "postgres"), Section("Watching")
    job_id = User(db).enqueued()
    names = ("API_URL", "SERVICE_ROLE_KEY", "JWT_SECRET", "DATABASE_URL")
    environment = {name: stack.environment()[name] for name in names}

    health, *rest = section.sh(tmp_path, **environment).partition("}eyJ")
    told = section.sql(stack.database_url, job_id=job_id)

    (shown,) = (block.shown for block in read(RUNBOOK) if "rpc/queue_health" in block.text)
    assert shows(f"{health}}}", shown.replace('"ok"', "…").replace("[]", "…"))  # what it is now
    key, report = "".join(rest)[1:].splitlines()
    assert (
        key.count(".") == 2
        and json.loads(report)["health"].keys() == json.loads(f"{health}}}").keys()
    )
    assert '"status": "queued"' in told
    views = re.findall(
        r"`([a-z]+_[a-z_]+|costs|deliveries)`", section.text.partition("question")[2]
    )
    assert len(views) > 9
    for view in set(views) - {"margin_usd"}:
        db.execute(f"select * from private.{view} limit 1")
    db.close()


def test_each_alert_has_a_section_that_says_how_bad_it_is_and_where_it_starts(db):
    rules = {row["alert"]: row for row in db.execute("select * from private.alert_rules")}

    assert set(ALERTS) == {*SAID, "cron_silent"} == rules.keys()
    for alert, rule in rules.items():
        said = f"{rule['severity']}, above {rule['threshold']} {rule['unit']}"
        assert Section(f"`{alert}`").text.strip().startswith(said)
    named = set(re.findall(r"private\.(\w+)", "".join(rule["hint"] for rule in rules.values())))
    there = db.execute(
        "select relname::text as name from pg_class where relnamespace = 'private'::regnamespace"
        " union all select proname from pg_proc where pronamespace = 'private'::regnamespace"
    )
    assert named <= {row["name"] for row in there}


def test_every_section_with_commands_is_run_by_some_test():
    for title in titles():
        if Section(title).blocks and title.strip("`") not in ALERTS:
            assert f'Section("{title}")' in (PROJECT / "tests" / RUN_BY[title]).read_text()
