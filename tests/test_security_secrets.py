"""What only the worker and its operator may know is in no log, table, answer or process list."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import fake_replicate
import pytest
from actors import Service, User
from database import Database
from fake_replicate import FakeReplicate
from receiver import Answer, Receiver
from worker_process import Workers, eventually

import stack as local_stack
import worker
from stack import Stack

MODEL = "black-forest-labs/flux-schnell"
EXPO_TOKEN = "expo-access-token-4711"
URL_KEY = "key-in-the-address-4711"
ENVIRONMENT = {
    "DATABASE_URL": "postgresql://darkroom_worker:pass%21word@127.0.0.1/db",
    "SUPABASE_URL": "http://127.0.0.1",
    "SUPABASE_SERVICE_KEY": "four-words-of-mine!",
}

fake = fake_replicate.fake_replicate


@pytest.fixture
def busy(db: Database, stack: Stack, fake: FakeReplicate, tmp_path: Path) -> Iterator[Workers]:
    """A worker for all of these: provider, Storage, webhooks and Expo each succeed and fail."""
    db.lift_limits()
    db.execute("update public.models set is_active = true")
    db.runs_at("replicate", fake.url, settle="0.2 seconds")
    db.execute("update private.settings set webhook_allows_private = true, retry_base = '0'")
    with Receiver() as receiver, Workers(db, stack, tmp_path) as workers:
        receiver.answers += [Answer(500), Answer(403), Answer(410)]
        hook = Service(db).register_webhook(receiver.url(f"/hook/{URL_KEY}?key={URL_KEY}"))
        workers.extra_secrets = {fake.token, EXPO_TOKEN, URL_KEY, hook["secret"]}
        workers.environment |= {
            "REPLICATE_API_TOKEN": fake.token,
            "EXPO_ACCESS_TOKEN": EXPO_TOKEN,
            "EXPO_PUSH_URL": receiver.url("/expo"),
            "WEBHOOK_ALLOWED_HOSTS": receiver.host,
            "WORKER_POLL_SECONDS": "0.1",
        }
        yield workers


def everything_happens(busy: Workers, fake: FakeReplicate, user: User) -> list[str]:
    """Let jobs succeed and fail in many ways, the provider repeating its request; return them."""
    user.has(50).register_push_token("ExponentPushToken[device]")
    busy.start()
    jobs = [user.enqueued(), user.enqueued("[fail:moderated]")]
    sent = f"You sent Authorization: Bearer {fake.token}, key {fake.token} and {'x' * 450}"
    signed = {"error": f"{sent} {fake.token} https://a.example/b.png?token={URL_KEY}"}
    for behaviour in [
        {"answer": 422} | signed,
        {"ends": "failed"} | signed,
        {"answer": 500, "stored": False},
        {"answer": None, "stored": True},
        {"output": "https://169.254.169.254/latest/meta-data"},
        {"output": "https://[broken"},
        {"removed": True},
        {"images": 0},
    ]:
        fake.next(**behaviour)
        jobs.append(user.enqueued(model=MODEL))
        busy.until(jobs[-1], "completed", "failed")
    fake.next(answer=402, **signed)
    jobs.append(user.enqueued(model=MODEL))
    eventually(lambda: busy.db.execute("select 1 from private.breakers where paused_until > now()"))
    return jobs


def command_lines() -> Iterator[str]:
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended
            yield file.read_text(errors="replace")


def found(secrets: set[str], texts: Iterable[str]) -> list[str]:
    return [text for text in texts if any(secret in text for secret in secrets)]


def test_secrets_of_the_worker_are_nowhere_whatever_happens(db, busy, fake, alice, service):
    jobs = everything_happens(busy, fake, alice)
    prompts = {row["prompt"] for row in db.execute("select prompt from public.generations")}
    secrets = busy.secrets() - prompts  # which belong into the tables

    rows = db.snapshot()
    del rows["private.webhook_endpoints"]  # where the address belongs
    answers = [alice.get_job_status(job) for job in jobs]
    answers += [alice.list_generations(), service.queue_health(), service.list_deliveries()]
    quoted = db.execute(
        "select error_detail as words from private.attempts where error_detail ~ 'You sent'"
        " union all select pause_reason from private.breakers where pause_reason ~ 'You sent'"
    )

    assert len(secrets) == 7
    assert found(secrets, command_lines()) == []
    assert found(secrets, [row for table in rows.values() for row in table]) == []
    assert found(secrets, [json.dumps(answer) for answer in answers]) == []
    assert busy.leaks() == []
    assert len(quoted) >= 3
    for words in (row["words"] for row in quoted):
        assert "You sent Authorization: Bearer [redacted], key [redacted] and xxx" in words
        assert len(words) == worker.DETAIL_CHARS


def test_a_storage_that_repeats_its_request_is_quoted_without_the_key(db, busy, alice):
    with Receiver() as storage:
        key = busy.environment["SUPABASE_SERVICE_KEY"]
        storage.answer = Answer(400, body=json.dumps({"apikey": key, "was": key[:60]}).encode())
        busy.start(SUPABASE_URL=storage.url(""))
        busy.until(alice.enqueued(), "failed")

    details = [row["error_detail"] for row in db.execute("select * from private.attempts")]
    assert '{"apikey": "[redacted]", "was": "[redacted]"}' in details[-1]
    assert found({key[:60]}, details) == []


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("key four-words-of-mine!", "key [redacted]"),
        ("{'authorization': 'Bearer abc'}", "{'authorization': 'Bearer [redacted]'}"),
        ("Basic dXNlcjpwYXNzd29yZA==", "Basic [redacted]"),
        ("apikey: eyJhbGciOiJIUzI1NiJ9.eyJyb2xl", "apikey: [redacted]"),
        ('"token": "4711", "a": 1', '"token": "[redacted]", "a": 1'),
        ("r8_0123456789 was revoked", "r8_[redacted] was revoked"),
        ("https://a.example/b.png?X-Sig=12&y=3: 403", "https://a.example/b.png?[redacted] 403"),
        ("/object/sign/inputs/a.png?token=4711", "/object/sign/inputs/a.png?token=[redacted]"),
        ("postgresql://me:word@db:5432/x", "postgresql://[redacted]@db:5432/x"),
        ("not a valid authentication token", "not a valid authentication token"),
        ("input.aspect_ratio: one of 1:1, 16:9", "input.aspect_ratio: one of 1:1, 16:9"),
    ],
)
def test_no_secret_is_left_in_a_text(said, kept):
    settings = worker.Settings(ENVIRONMENT)

    assert worker.redact(said, settings.secrets) == kept
    assert worker.redact("pass!word, pass%21word", settings.secrets) == "[redacted], [redacted]"


def test_what_is_named_like_a_key_is_one_of_a_provider_and_a_secret():
    own = {"EXPO_ACCESS_TOKEN": EXPO_TOKEN}
    keys = {"ACME_KEY": "acme-4711", "MY_2ND_API_TOKEN": "second-4711"}
    others = {"acme_key": "lower", "ACME_KEYS": "several", "KEY": "short", "EMPTY_KEY": ""}

    settings = worker.Settings(ENVIRONMENT | own | keys | others)

    assert settings.keys == keys
    assert {*keys.values(), *own.values()} <= set(settings.secrets)


def test_a_crash_is_logged_without_secrets_and_ends_with_code_1(monkeypatch, capsys):
    key = "key-of-the-service-4711"
    values = {"DATABASE_URL": "postgresql://a@127.0.0.1/b", "SUPABASE_URL": "http://127.0.0.1"}
    monkeypatch.setattr(worker.os, "environ", values | {"SUPABASE_SERVICE_KEY": key})
    monkeypatch.setattr(logging.root, "handlers", [])

    async def serve(_: worker.Settings) -> int:
        raise RuntimeError(f"it was {key} and r8_0123456789")

    monkeypatch.setattr(worker, "serve", serve)
    assert worker.main() == worker.EXIT_ERROR

    said = capsys.readouterr().err
    assert "CRITICAL worker.crashed\nTraceback" in said
    assert "RuntimeError: it was [redacted] and r8_[redacted]" in said


def test_the_command_line_of_the_supabase_cli_shows_no_password(monkeypatch):
    runs = []
    monkeypatch.setattr(local_stack, "run", lambda *args, **rest: runs.append((args, rest)) or "")

    local_stack.supabase_cli("postgresql://me:pass-4711@127.0.0.1:1/db", "migration", "list")

    ((command,), rest) = runs[0]
    assert "--remote=postgresql://me@127.0.0.1:1/db" in command
    assert rest["env"] == os.environ | {"DO_NOT_TRACK": "1", "PGPASSWORD": "pass-4711"}
