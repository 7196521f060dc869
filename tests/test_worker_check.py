"""`worker.py check`: one line says what is wrong. Each fault is planted for real."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from typing import Any
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


class Checker:
    """What `worker.py check` finds of a worker of the stack's own database, and that it tells no
    secret.
    """

    def __init__(self, stack: Stack, fake: FakeReplicate, capsys: pytest.CaptureFixture) -> None:
        self.capsys, self.url = capsys, stack.worker_database_url
        self.values = {
            "of anon": stack.anon_key,
            "of the superuser": stack.database_url,
            "with another password": self.url.replace("@", "x@"),
        }
        self.environment = {
            "DATABASE_URL": self.url,
            "SUPABASE_URL": stack.api_url,
            "SUPABASE_SERVICE_KEY": stack.service_role_key,
            "REPLICATE_API_TOKEN": fake.token,
        }
        self.fake = fake

    def use_replicate(self, db: Database, is_active: bool = True) -> None:
        """Have models of Replicate, which is the fake."""
        db.runs_at("replicate", self.fake.url)
        query = "update public.models set is_active = %s where provider = 'replicate'"
        db.execute(query, is_active)

    def of(self, db: Database) -> str:
        """A worker's address of another database, where models of Replicate are active."""
        self.use_replicate(db)
        return urlsplit(self.url)._replace(path=f"/{db.name}").geturl()

    def __call__(self, **changes: str) -> tuple[int, dict[str, str]]:
        """Return the exit code, and what is wrong, by part."""
        settings = worker.Settings(self.environment | changes)
        code, said = asyncio.run(worker.check(settings)), self.capsys.readouterr().out
        assert [each for each in settings.secrets if each in said] == []
        found = [line.split(maxsplit=2) for line in said.splitlines()]
        self.notes = [part for verdict, part, _ in found if verdict == "note"]
        return code, {part: detail for verdict, part, detail in found if verdict == "wrong"}


@pytest.fixture
def stack_db(stack: Stack) -> Iterator[Database]:
    """The stack's own database, where pg_cron runs."""
    database = Database(stack.database_url, "postgres")
    yield database
    database.close()


@pytest.fixture
def check(
    stack: Stack, stack_db: Database, fake: FakeReplicate, capsys: pytest.CaptureFixture
) -> Iterator[Checker]:
    checker = Checker(stack, fake, capsys)
    checker.use_replicate(stack_db)
    yield checker
    checker.use_replicate(stack_db, is_active=False)


def test_where_all_is_well_each_part_says_so_and_configuration_may_be_files(
    check, stack_db, tmp_path
):
    for name, value in check.environment.items():
        (tmp_path / f"darkroom_{name}").write_text(value)
    count = "select (select count(*) from storage.objects), (select count(*) from private.workers)"
    before = stack_db.row(count)

    command = [sys.executable, PROJECT / "worker.py", "check"]
    environment = {"CREDENTIALS_DIRECTORY": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)

    assert [line.split()[:2] for line in done.stdout.splitlines()] == [
        ["ok", part] for part in PARTS
    ]
    assert (stack_db.row(count), done.stderr) == (before, "")


MODEL = """
insert into public.models (
  id, provider, provider_ref, title, price_credits, paid_price_credits, is_active, client_inputs,
  image_inputs, input_schema
) select 'acme/' || %s, %s, 'acme/model', 'Acme', 1, 1, %s, '{}', '{}', '{"properties": {}}'
"""


def test_each_provider_of_an_active_model_has_a_line_and_what_is_no_fault_is_a_note(check, db):
    for provider, is_active in (("fal", True), ("bfl", True), ("openai", False), ("comfyui", True)):
        db.execute(MODEL, provider, provider, is_active)
    db.execute("update private.providers set recipe = recipe - 'account' where name = 'bfl'")
    url = check.of(db)

    assert check(DATABASE_URL=url, BFL_API_KEY="key of BFL") == (0, {})
    assert check.notes == ["cron", "bfl", "comfyui", "fal"]
    assert check(DATABASE_URL=url, REPLICATE_API_TOKEN="") == (0, {})
    assert check.notes == ["cron", "bfl", "comfyui", "fal", "replicate"]


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (401, ".*TOKEN: the key is refused: HTTP 401"),
        (403, ".*TOKEN: the key is refused: HTTP 403"),
        (500, "http://.*: no answer to trust: HTTP 500"),
        (302, "http://.*: no answer to trust: HTTP 302"),
        (None, "http://.*: no answer to trust: RemoteProtocolError"),
    ],
)
def test_a_provider_that_does_not_open_the_account_is_wrong(check, db, fake, status, said):
    fake.account_status = status

    code, wrong = check(DATABASE_URL=check.of(db))

    assert (code, [*wrong]) == (1, ["replicate"])
    assert re.match(said, wrong["replicate"])


@pytest.mark.parametrize(
    ("change", "part", "said"),
    [
        ("REPLICATE_API_TOKEN=r8_wrong", "replicate", ".*: the key is refused: HTTP 401"),
        ("SUPABASE_URL=http://127.0.0.1:9", "storage", ".*upload: ConnectError"),
        ("SUPABASE_SERVICE_KEY=of anon", "storage", ".*HTTP 4"),
        ("DATABASE_URL=with another password", "database", '.*failed for user "darkroom_worker"'),
        ("DATABASE_URL=of the superuser", "database", ".*role postgres may do everything"),
    ],
)
def test_a_variable_that_is_wrong(monkeypatch, check, change, part, said):
    monkeypatch.setattr(worker, "HTTP_TRIES", 1)

    name, _, value = change.partition("=")

    code, wrong = check(**{name: check.values.get(value, value)})

    assert (code, [*wrong]) == (1, [part])
    assert re.match(said, wrong[part])


READ = '"Users read their own generated images"'


@pytest.mark.parametrize(
    ("fault", "part", "said"),
    [
        (f"drop policy {READ} on storage.objects", "policies", f"policy {READ} is missing"),
        (
            f"alter policy {READ} on storage.objects using"
            " (bucket_id = 'generations' and split_part(name, '/', 1) = auth.uid()::text)",
            "policies",
            f"policy {READ} is missing on storage.objects, or another release's: see sql/20",
        ),
        ("alter table storage.objects disable row level security", "policies", "row level"),
        (
            "update storage.buckets set public = true where id = 'generations'",
            "policies",
            "bucket generations is public",
        ),
        (
            "revoke all on function private.claim_jobs from darkroom_worker",
            "database",
            "role darkroom_worker may not call private.claim_jobs: apply supabase/migrations",
        ),
        (
            "drop schema private cascade",
            "database",
            "no Darkroom of this version here: apply supabase/migrations",
        ),
    ],
)
def test_a_database_that_is_not_as_installed(check, db, fault, part, said):
    url = check.of(db)
    db.execute(fault)

    code, wrong = check(DATABASE_URL=url)

    assert (code, [*wrong]) == (1, [part])
    assert wrong[part].startswith(said)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("recover_stale_jobs", ("active", False), "is switched off"),
        ("apply_retention", ("schedule", "0 0 1 1 *"), "is silent: it last ran at 20"),
        ("check_books", ("jobname", "none"), "is missing"),
    ],
)
def test_a_cron_job_that_does_not_run(check, stack_db, name, change, said):
    column, value = change
    job = stack_db.row("select * from cron.job where jobname = %s", f"darkroom_{name}")
    update = f"update cron.job set {column} = %s where jobid = %s"
    stack_db.execute(update, value, job["jobid"])
    stack_db.execute(
        "update private.routines set last_run_at = now() - interval '5 minutes' where name = %s",
        name,
    )
    try:
        code, wrong = check()
    finally:
        stack_db.execute(update, job[column], job["jobid"])
        stack_db.execute("update private.routines set last_run_at = now() where name = %s", name)

    assert (code, [*wrong]) == (1, ["cron"])
    assert wrong["cron"].startswith(f"job darkroom_{name} {said}")


def test_a_role_of_the_api_whose_requests_nothing_ends(check, stack_db):
    """A timeout of the whole database will do."""
    of_all = "alter database postgres {} statement_timeout"
    stack_db.execute("alter role authenticated reset statement_timeout")
    try:
        code, wrong = check()
        stack_db.execute(of_all.format("set") + " = '8s'")
        assert check() == (0, {})
    finally:
        stack_db.execute("alter role authenticated set statement_timeout = '8s'")
        stack_db.execute(of_all.format("reset"))

    assert (code, [*wrong]) == (1, ["timeouts"])
    assert wrong["timeouts"].endswith("alter role authenticated set statement_timeout = '8s'")


@pytest.mark.parametrize(("mode", "parts"), [("transaction", ["listen"]), ("session", [])])
def test_a_transaction_pooler_is_told_of_and_one_in_session_mode_is_fine(check, mode, parts):
    with pgbouncer(check.url, mode) as url:
        _, wrong = check(DATABASE_URL=url)

    assert [*wrong] == parts


def test_the_check_knows_every_function_that_the_worker_calls():
    source = "".join((PROJECT / name).read_text() for name in ("worker.py", "outbox.py"))
    called = re.findall(
        r"(?:\.call\(|\.value\(|\.insist\(|Batch\(self\.insist, )\s*\"(\w+)\"", source
    )

    assert sorted({*called}) == sorted(worker.Database.FUNCTIONS)


# --- how LISTEN is proven ---


def hear(*payloads: str) -> tuple[worker.Database, list[str]]:
    """Have a database listen for itself; return it, and what was handed on."""
    waiting = [*payloads]

    async def notifies(timeout: float, stop_after: int) -> AsyncIterator[Any]:
        if waiting:
            yield mock.Mock(payload=waiting.pop(0))
        else:
            await asyncio.sleep(timeout)

    db, heard = worker.Database("postgresql://"), list[str]()
    db.pool = mock.MagicMock()
    db.pool.connection.return_value.__aenter__.return_value.execute = mock.AsyncMock()
    connection = mock.Mock(execute=mock.AsyncMock(), notifies=notifies)
    asyncio.run(db.hear(connection, "channel", heard.append))
    return db, heard


def test_listening_is_proven_by_a_probe_and_what_comes_before_it_is_handed_on(monkeypatch):
    monkeypatch.setattr(worker, "LISTEN_ANSWER_SECONDS", 0.05)

    db, heard = hear("", worker.CANCEL, worker.PROBE)

    assert heard == [worker.CANCEL, "", worker.CANCEL]  # the first: what came before is unknown
    assert db.is_listening
    with pytest.raises(worker.Deaf, match="a NOTIFY did not arrive"):
        hear("", worker.CANCEL)


def test_help_says_how_to_call_it_and_names_every_variable():
    command = [sys.executable, str(PROJECT / "worker.py"), "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, env={}).stdout

    assert shown.startswith("usage: worker.py [-h] [{check}]\n")
    example = re.findall(r"(?m)^(?:# )?([A-Z_]+)=", (PROJECT / ".env.example").read_text())
    of_providers = {"BFL_API_KEY", "OPENAI_API_KEY"}  # a name is a row's: two stand for all
    assert [each for each in example if each not in shown and each not in of_providers] == []
