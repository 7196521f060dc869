"""`worker.py check`: one line says what is wrong. Each fault is planted for real."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock
from urllib.parse import urlsplit

import fake_replicate
import pytest
from database import PROJECT, Database
from fake_replicate import FakeReplicate
from pooler import pgbouncer

import worker
from stack import Stack

fake = fake_replicate.fake_replicate

PARTS = ["database", "cron", "policies", "listen", "storage", "replicate"]


@dataclass
class Checked:
    """What a check said."""

    code: int
    lines: dict[str, tuple[str, str]]  # part -> verdict, detail
    errors: str

    def wrong(self) -> dict[str, str]:
        """What is wrong, by part."""
        return {part: text for part, (verdict, text) in self.lines.items() if verdict == "wrong"}


class Checker:
    """Runs `worker.py check` as an operator does, and sees that it tells no secret."""

    def __init__(self, url: str, stack: Stack, fake: FakeReplicate) -> None:
        self.environment = {
            "PATH": os.environ["PATH"],
            "DATABASE_URL": url,
            "SUPABASE_URL": stack.api_url,
            "SUPABASE_SERVICE_KEY": stack.service_role_key,
            "REPLICATE_API_TOKEN": fake.token,
            "REPLICATE_API_URL": fake.url,
        }

    def __call__(self, **changes: str) -> Checked:
        environment = self.environment | changes
        command = [sys.executable, PROJECT / "worker.py", "check"]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=60
        )
        secrets = {environment[name] for name in ("SUPABASE_SERVICE_KEY", "REPLICATE_API_TOKEN")}
        secrets |= {urlsplit(environment["DATABASE_URL"]).password or ""}
        assert not [each for each in secrets - {""} if each in done.stdout + done.stderr]
        found = [line.split(maxsplit=2) for line in done.stdout.splitlines()]
        lines = {part: (verdict, detail) for verdict, part, detail in found}
        assert len(lines) == len(found), done.stdout
        return Checked(done.returncode, lines, done.stderr)


def worker_url(stack: Stack, db: Database) -> str:
    return urlsplit(stack.worker_database_url)._replace(path=f"/{db.name}").geturl()


@pytest.fixture
def check(db: Database, stack: Stack, fake: FakeReplicate) -> Checker:
    """Checks a worker of the test's own database, where there is no pg_cron."""
    return Checker(worker_url(stack, db), stack, fake)


@pytest.fixture
def stack_db(stack: Stack) -> Iterator[Database]:
    """The stack's own database, where pg_cron runs."""
    database = Database(stack.database_url, "postgres")
    yield database
    database.close()


@pytest.fixture
def check_stack(stack: Stack, fake: FakeReplicate) -> Checker:
    """Checks a worker of the stack's own database."""
    return Checker(stack.worker_database_url, stack, fake)


@pytest.fixture
def plant(stack_db: Database) -> Iterator[Callable[..., None]]:
    """Change something of the stack's own database, for as long as the test lasts."""
    undo: list[str] = []

    def planted(fault: str, remedy: str) -> None:
        undo.append(remedy)
        stack_db.execute(fault)

    yield planted
    for remedy in reversed(undo):
        stack_db.execute(remedy)


def test_where_all_is_well_each_part_says_so(stack_db, check_stack):
    count = "select (select count(*) from storage.objects), (select count(*) from private.workers)"
    before = stack_db.row(count)

    said = check_stack()

    assert said.code == 0, said
    assert [(part, verdict) for part, (verdict, _) in said.lines.items()] == [
        (part, "ok") for part in PARTS
    ]
    assert stack_db.row(count) == before
    assert said.errors == ""


def test_what_is_no_fault_is_a_note(check):
    said = check(REPLICATE_API_TOKEN="")

    assert said.code == 0
    assert said.lines["cron"][0] == said.lines["replicate"][0] == "note"


# --- the faults ---


def test_a_wrong_provider_key(check):
    said = check(REPLICATE_API_TOKEN="r8_wrong")

    assert said.code == 1
    assert said.wrong() == {"replicate": "REPLICATE_API_TOKEN: the key is refused: HTTP 401"}


def test_a_provider_that_cannot_be_reached(check):
    said = check(REPLICATE_API_URL="http://127.0.0.1:9")

    assert said.wrong() == {"replicate": "REPLICATE_API_URL: ConnectError"}


def job(name: str, change: str) -> str:
    where = f"jobname = 'darkroom_{name}' and database = current_database()"
    return f"select cron.alter_job(jobid, {change}) from cron.job where {where}"


def test_a_cron_job_that_is_switched_off(check_stack, plant):
    plant(job("recover_stale_jobs", "active := false"), job("recover_stale_jobs", "active := true"))

    said = check_stack()

    assert (said.code, [*said.wrong()]) == (1, ["cron"])
    assert said.wrong()["cron"].startswith("job darkroom_recover_stale_jobs is switched off")


def test_a_cron_that_stands_still(check_stack, plant):
    plant(
        job("apply_retention", "schedule := '0 0 1 1 *'"),
        job("apply_retention", "schedule := '* * * * *'"),
    )
    plant(
        "update private.routines set last_run_at = now() - interval '5 minutes'"
        " where name = 'apply_retention'",
        "update private.routines set last_run_at = now()",
    )

    said = check_stack()

    assert (said.code, [*said.wrong()]) == (1, ["cron"])
    assert re.match(
        r"job darkroom_apply_retention is silent: it last ran at 20", said.wrong()["cron"]
    )


def test_a_cron_job_that_is_gone(check_stack, plant):
    plant(
        "select cron.unschedule('darkroom_check_books')",
        "select cron.schedule('darkroom_check_books', '47 3 * * *',"
        " $$select private.check_books(), private.note_run('check_books')$$)",
    )

    assert check_stack().wrong()["cron"].startswith("job darkroom_check_books is missing")


@pytest.mark.parametrize("fault", ["drop policy {} on storage.objects", "rls", "bucket"])
def test_storage_that_is_not_as_installed(db, check, fault):
    name = "Users read their own generated images"
    expected = f'policy "{name}" is missing'
    if fault == "rls":
        fault, expected = "alter table storage.objects disable row level security", "row level"
    if fault == "bucket":
        fault = "update storage.buckets set public = true where id = 'generations'"
        expected = "bucket generations is public"
    db.execute(fault.format(f'"{name}"'))

    said = check()

    assert (said.code, [*said.wrong()]) == (1, ["policies"])
    assert said.wrong()["policies"].startswith(expected)


@pytest.mark.parametrize("role", ["anon", "authenticated"])
def test_a_role_of_the_api_whose_requests_nothing_ends(check_stack, plant, role):
    plant(
        f"alter role {role} reset statement_timeout",
        f"alter role {role} set statement_timeout = '8s'",
    )

    said = check_stack()

    assert (said.code, [*said.wrong()]) == (1, ["timeouts"])
    assert said.wrong()["timeouts"].endswith(f"alter role {role} set statement_timeout = '8s'")


@pytest.mark.parametrize("whose", ["role authenticator", "database postgres"])
def test_a_timeout_of_the_login_or_the_database_will_do(check_stack, plant, whose):
    if whose == "role authenticator":
        plant("create role authenticator", "drop role authenticator")
    plant(f"alter {whose} set statement_timeout = '8s'", f"alter {whose} reset statement_timeout")
    plant("alter role anon reset statement_timeout", "alter role anon set statement_timeout = '3s'")

    assert check_stack().code == 0


def test_a_key_that_may_not_write_to_storage(stack, check):
    said = check(SUPABASE_SERVICE_KEY=stack.anon_key)

    assert (said.code, [*said.wrong()]) == (1, ["storage"])
    assert "HTTP 4" in said.wrong()["storage"]


def test_storage_that_cannot_be_reached(check):
    said = check(SUPABASE_URL="http://127.0.0.1:9")

    assert (said.code, [*said.wrong()]) == (1, ["storage"])


def test_a_transaction_pooler(check):
    with pgbouncer(check.environment["DATABASE_URL"], "transaction") as url:
        said = check(DATABASE_URL=url)

    assert (said.code, [*said.wrong()]) == (1, ["listen"])
    assert said.wrong()["listen"].startswith(
        "DATABASE_URL: a NOTIFY did not arrive, as through a tr"
    )


def test_a_pooler_in_session_mode_is_fine(check):
    with pgbouncer(check.environment["DATABASE_URL"], "session") as url:
        said = check(DATABASE_URL=url)

    assert (said.code, said.wrong()) == (0, {})


# --- the database ---


def test_a_wrong_password(check):
    url = urlsplit(check.environment["DATABASE_URL"])
    said = check(DATABASE_URL=url._replace(netloc=url.netloc.replace(":", ":x", 1)).geturl())

    assert (said.code, [*said.wrong()]) == (1, ["database"])
    assert 'password authentication failed for user "darkroom_worker"' in said.wrong()["database"]


def test_a_role_with_every_right(db, check):
    said = check(DATABASE_URL=db.url)

    assert said.code == 1
    assert said.wrong() == {
        "database": "DATABASE_URL: role postgres may do everything; use darkroom_worker"
    }


def test_a_right_that_is_missing(db, check):
    db.execute("revoke all on function private.claim_jobs(bigint, integer) from darkroom_worker")

    said = check()

    assert said.wrong() == {
        "database": "role darkroom_worker may not call private.claim_jobs: "
        "apply supabase/migrations"
    }


def test_a_database_without_darkroom(supabase_db, stack, fake):
    said = Checker(worker_url(stack, supabase_db), stack, fake)()

    assert said.wrong() == {
        "database": "no Darkroom of this version here: apply supabase/migrations"
    }


def test_a_variable_that_is_missing(check):
    said = check(SUPABASE_URL="")

    assert (said.code, said.lines) == (2, {})
    assert "worker.misconfigured SUPABASE_URL: missing" in said.errors


def test_the_check_knows_every_function_that_the_worker_calls():
    source = "".join((PROJECT / name).read_text() for name in ("worker.py", "outbox.py"))
    called = re.findall(
        r"(?:\.call\(|\.value\(|\.insist\(|Batch\(self\.insist, )\s*\"(\w+)\"", source
    )

    assert sorted({*called}) == sorted(worker.Database.FUNCTIONS)


# --- while it works ---


class Connection:
    """Listens, and hands out one NOTIFY after the other."""

    def __init__(self, *payloads: str) -> None:
        self.payloads = [*payloads]
        self.execute = mock.AsyncMock()

    async def notifies(self, timeout: float, stop_after: int) -> AsyncIterator[mock.Mock]:
        if self.payloads:
            yield mock.Mock(payload=self.payloads.pop(0))
        else:
            await asyncio.sleep(timeout)


def hear(*payloads: str) -> tuple[worker.Database, list[str]]:
    """Have a database listen for itself; return it, and what was handed on."""
    db, heard = worker.Database("postgresql://"), list[str]()
    db.pool = mock.MagicMock()
    other = db.pool.connection.return_value.__aenter__.return_value
    other.execute = mock.AsyncMock()
    asyncio.run(db.hear(Connection(*payloads), "channel", heard.append))
    return db, heard


def test_what_comes_before_the_probe_is_handed_on_and_the_probe_is_not():
    db, heard = hear("", worker.CANCEL, worker.PROBE)

    assert heard == [worker.CANCEL, "", worker.CANCEL]  # the first: what came before is unknown
    assert db.is_listening


def test_a_notify_of_others_does_not_stand_for_the_probe(monkeypatch):
    monkeypatch.setattr(worker, "LISTEN_ANSWER_SECONDS", 0.05)

    with pytest.raises(worker.Deaf, match="a NOTIFY did not arrive"):
        hear("", worker.CANCEL)


# --- where the configuration comes from ---


def test_credentials_go_before_variables(tmp_path: Path):
    (tmp_path / "darkroom_REPLICATE_API_TOKEN").write_text("r8_from_systemd\n")
    (tmp_path / "SUPABASE_URL").write_text("https://example.com")
    (tmp_path / "darkroom_EXPO_ACCESS_TOKEN").write_text("\n")
    env = {"CREDENTIALS_DIRECTORY": str(tmp_path), "REPLICATE_API_TOKEN": "r8_other"}

    values = worker.with_credentials(env | {"EXPO_ACCESS_TOKEN": "kept"})

    assert values["REPLICATE_API_TOKEN"] == "r8_from_systemd"
    assert values["SUPABASE_URL"] == "https://example.com"
    assert values["EXPO_ACCESS_TOKEN"] == "kept"


def test_credentials_that_cannot_be_read_stop_the_worker(tmp_path: Path):
    with pytest.raises(worker.ConfigError, match=r"^CREDENTIALS_DIRECTORY: FileNotFoundError"):
        worker.with_credentials({"CREDENTIALS_DIRECTORY": str(tmp_path / "none")})


def test_all_configuration_may_come_as_credentials(check, tmp_path: Path):
    names = [name for name in check.environment if name != "PATH"]
    for name in names:
        (tmp_path / f"darkroom_{name}").write_text(check.environment[name])
    environment = {"PATH": check.environment["PATH"], "CREDENTIALS_DIRECTORY": str(tmp_path)}

    command = [sys.executable, PROJECT / "worker.py", "check"]
    assert subprocess.run(command, env=environment, check=False, timeout=60).returncode == 0
