"""May this user ask for this? Nothing is written where the answer is no."""

from __future__ import annotations

import contextlib
import json

import pytest
from actors import PREVIEW, Caller, Refusal, Service, User, Worker, refused
from database import unchanged
from hostile import Victim, functions

INVISIBLE = {
    "spaces": "\u00a0\u1680\u2000\u200a\u202f\u205f\u3000\x1f\x85",
    "format characters": "\u00ad\u061c\u180e\u200b\u200d\u200e\u202e\u2028\u2060\ufeff\ufffb",
    "Hangul fillers": "\u115f\u1160\u3164\uffa0",
    "a braille blank and Khmer vowels": "\u2800\u17b4\u17b5",
    "variation selectors": "\ufe00\ufe0f\U000e0100\U000e01ef",
    "tags and joiners": "\U000e0001\U000e0020\U000e007f\u034f",
    "marks without a letter": "\u0301\u20dd\ufe20",
}
NESTED = "[" * 4000 + "]" * 4000
FOR_ANYBODY = ("ping", "list_models", "list_public_images")


@pytest.mark.parametrize(
    ("prompt", "detail"),
    [
        *((text, "missing or blank") for text in (None, "", " \t\r\n\f ", *INVISIBLE.values())),
        *((text, "longer than 4000 characters") for text in ("🖼" * 4001, "x" * 5_000_000)),
    ],
)
def test_a_prompt_is_there_and_not_too_long(db, alice, prompt, detail):
    with unchanged(db), refused("PT400", "invalid_input") as refusal:
        alice.enqueue(prompt)

    assert refusal.detail == f"prompt: {detail}"


def test_one_thing_to_see_or_the_full_length_in_any_script_is_a_prompt(db, alice):
    db.lift_limits()
    alice.has(credits=100)
    seen = ["🖼", "1\ufe0f\u20e3", "海", "é", "\u1112\u1161", "?", "☺\ufe0f", "\u2801", "🖼" * 4000]
    for prompt in seen:
        assert alice.get_job_status(alice.enqueued(prompt))["prompt"] == prompt


@pytest.mark.parametrize(
    ("params", "detail"),
    [
        *((each, ": not a JSON object") for each in ([], [{"seed": 1}], 7, None, "", "[]", NESTED)),
        *((each, ": not a JSON object") for each in ('{"seed": 1', '"{}"', '{"seed": 1e999999}')),
        ('{"seed": "\\u0000"}', ": not a JSON object"),
        ({"seed": "x" * 9000}, ": longer than 8192 bytes"),
        ("x" * 20000, ": longer than 8192 bytes"),
        ('{"seed": 1e9000}', ": longer than 8192 bytes"),
        ({"nonsense": 1}, ".nonsense: not an input of darkroom/preview"),
        ({"prompt": "another"}, ".prompt: not an input of darkroom/preview"),
        ({"seed": "7"}, ".seed: not of type integer"),
        ({"width": 10**30}, ".width: not between 64 and 2048"),
        ({"num_outputs": 5}, ".num_outputs: not between 1 and 4"),
    ],
)
def test_params_that_do_not_fit_are_refused(db, alice, params, detail):
    with unchanged(db), refused("PT400", "invalid_input") as refusal:
        alice.enqueue(params=params)

    assert refusal.detail == f"params{detail}"


def test_params_may_arrive_as_an_object_as_its_text_or_as_null(alice):
    params = {"width": 128, "seed": 7}
    for sent in (params, json.dumps(params)):
        assert alice.get_job_status(alice.enqueued(params=sent))["params"] == params

    job = alice.call("public.enqueue_generation", model=PREVIEW, prompt="a cat", params=None)
    assert alice.get_job_status(job["job_id"])["params"] == {}


def test_a_model_is_on_offer_and_a_key_of_a_sane_length(db, alice, bob):
    for model in (None, "", "no/such-model", "black-forest-labs/flux-dev"):
        with unchanged(db), refused("PT404", "not_found") as refusal:
            alice.enqueue(model=model)
        assert refusal.detail == "model: no such model"
    for key in ("", "k" * 201):
        with unchanged(db), refused("PT400", "invalid_input") as refusal:
            alice.enqueue(idempotency_key=key)
        assert refusal.detail == "idempotency_key: not 1 to 200 bytes"

    db.execute("update public.models set requires_paid = true")
    with unchanged(db), refused("PT403", "requires_paid_plan") as refusal:
        alice.enqueue()
    assert refusal.detail == "darkroom/preview is for paid users"
    assert bob.has_paid().enqueue()["status"] == "queued"


# Limits.


def test_one_job_more_than_the_plan_allows_at_once_waits(db, alice, worker):
    for _ in range(3):
        alice.enqueue()

    with unchanged(db), refused("PT429", "too_many_active") as refusal:
        alice.enqueue()

    assert refusal.detail == "3 jobs are queued or running, the plan's limit"
    assert refusal.refusal.retry_after == 5
    assert refusal.refusal.hint == "Try again in 5 seconds."
    worker.complete_job(worker.claimed())
    assert alice.enqueue()["status"] == "queued"


def test_one_job_more_than_the_plan_allows_in_a_minute_waits_for_the_next(db, alice):
    db.execute("update private.plans set max_active = 100, max_per_minute = 2")
    alice.enqueue()
    alice.enqueue()
    db.pass_time("20 seconds")

    with unchanged(db), refused("PT429", "rate_limited") as refusal:
        alice.enqueue()

    assert refusal.detail == "2 jobs in this minute, the plan's limit"
    assert 35 <= refusal.refusal.retry_after <= 40
    db.pass_time("41 seconds")
    alice.enqueue()
    alice.enqueue()
    with refused("PT429", "rate_limited"):
        alice.enqueue()


def test_what_is_canceled_counts_in_the_minute_and_in_the_day(db, alice):
    for minute in range(30):
        for _ in range(10):
            alice.cancel_generation(alice.enqueued())
        if minute == 0:
            with unchanged(db), refused("PT429", "rate_limited"):
                alice.enqueue()
        over = "minute_started_at = now() - interval '1 minute', minute_jobs = 0"
        db.execute(f"update public.entitlements set {over}")

    for call in (alice.enqueue, lambda: alice.enqueue_batch(["a"])):
        with unchanged(db), refused("PT429", "rate_limited") as refusal:
            call()
    assert refusal.detail.startswith("300 jobs in this day")
    db.pass_time("1 day")
    assert alice.enqueue()["status"] == "queued"


# Back-pressure.


@pytest.fixture
def crowd(db):
    """Three users who each wait with a job, and a worker that runs two at once."""
    worker = Worker(db, slots=2)
    for _ in range(3):
        User(db).enqueue()
    return worker


def wait(db, worker: Worker, interval: str) -> None:
    """Let jobs wait while the worker lives but gets nothing done."""
    db.pass_time(interval)
    worker.heartbeat()
    worker.recover_stale_jobs()


def test_while_jobs_wait_too_long_free_users_are_refused_and_paid_ones_later(db, alice, bob, crowd):
    bob.has_paid()
    wait(db, crowd, "9 minutes")
    alice.enqueue()
    assert alice.get_entitlement()["is_busy"] is False
    wait(db, crowd, "2 minutes")

    with unchanged(db), refused("PT503", "busy") as refusal:
        alice.enqueue()

    assert refusal.detail == "Jobs wait too long to take in more."
    assert refusal.refusal.retry_after == 60
    assert alice.get_entitlement()["is_busy"] is True
    assert bob.enqueue()["status"] == "queued"
    wait(db, crowd, "30 minutes")
    with unchanged(db), refused("PT503", "busy"):
        bob.enqueue()
    db.execute("update private.plans set busy_after = null where name = 'paid'")
    assert bob.enqueue()["status"] == "queued"
    crowd.claim_jobs(9)
    assert alice.enqueue()["status"] == "queued", "though the state still tells of the old ones"


def test_one_users_long_queue_makes_nobody_wait_and_hides_nobody_who_does(db, alice, bob):
    db.lift_limits()
    db.pass_time("10 days")  # no state of the queue is known, and nothing waits
    worker = Worker(db, slots=2)
    for _ in range(10):
        bob.enqueue()
    wait(db, worker, "20 minutes")
    worker.claim_jobs(2)
    job_id = alice.enqueued()
    assert alice.get_job_status(job_id)["queue_position"] <= 1

    db.pass_time("11 minutes")  # nobody renews the state

    with refused("PT503", "busy"):
        User(db).enqueue()


def test_jobs_of_a_paused_model_are_waited_for_only_once_they_have_come_back(
    db, alice, crowd, service
):
    service.pause_model(PREVIEW)
    db.pass_time("1 hour")
    assert alice.get_entitlement()["is_busy"] is False

    service.resume_model(PREVIEW)

    assert alice.get_entitlement()["is_busy"] is False
    wait(db, crowd, "11 minutes")
    assert alice.get_entitlement()["is_busy"] is True


def test_jobs_that_wait_for_a_provider_are_in_the_way_of_none_but_its_own(db, alice, crowd):
    db.lift_limits()
    db.execute("update public.models set is_active = true")
    alice.has(credits=100)
    other = "black-forest-labs/flux-schnell"
    db.execute("update private.providers set secret = 'FAL_KEY' where name = 'preview'")
    wait(db, crowd, "11 minutes")
    assert db.value("select max(oldest_ready_at) from private.plans") is None
    for model in (PREVIEW, other):  # nobody here can make the first, so nobody waits for it
        assert alice.enqueue(model=model)["status"] == "queued"

    db.execute("update private.providers set secret = null, max_running = 1 where name = 'preview'")
    wait(db, crowd, "1 minute")

    assert alice.enqueue(model=other)["status"] == "queued"
    with refused("PT503", "busy"):
        alice.enqueue()


# A database that cannot be written.

CHANGES = (
    "select proname from pg_proc where provolatile = 'v' and pronamespace = 'public'::regnamespace"
)


@pytest.mark.parametrize(
    ("setting", "method", "refusal"),
    [
        ("transaction_read_only", None, ("PT503", "unavailable", 30)),
        ("transaction_read_only", "POST", ("PT503", "unavailable", 30)),
        ("transaction_read_only", "GET", ("PT405", "method_not_allowed", None)),
        # PostgREST opens a transaction that may write all the same.
        ("default_transaction_read_only", "POST", ("PT503", "unavailable", 30)),
    ],
)
def test_what_changes_something_says_that_it_cannot(db, monkeypatch, setting, method, refusal):
    victim = Victim(db)
    changes = {row["proname"] for row in db.execute(CHANGES)}
    plain = Caller.acting

    @contextlib.contextmanager
    def read_only(self):
        with plain(self) as connection:
            connection.execute("select set_config(%s, 'on', true)", [setting])
            if method:
                connection.execute("select set_config('request.method', %s, true)", [method])
            yield connection

    monkeypatch.setattr(Caller, "acting", read_only)
    for role, caller in {"authenticated": User(db, victim.id), "service_role": Service(db)}.items():
        for function in functions(db, role, "public"):
            plausible = victim.plausible()
            told = function.called_by(caller, {n: plausible[n][0] for n in function.arguments})
            if function.name in changes:
                changes.remove(function.name)
                assert (told.code, told.token, told.retry_after) == refusal, function.name
            else:
                assert not isinstance(told, Refusal), told

    assert not changes, "of nobody"


# Whose request it is.


class Claiming(Caller):
    """Somebody whose token says this."""

    role = "authenticated"

    def __init__(self, db, claims):
        super().__init__(db)
        self.text = claims

    @contextlib.contextmanager
    def acting(self):
        with self.connection.transaction():
            for name, value in {"role": self.role, "request.jwt.claims": self.text}.items():
                self.connection.execute("select set_config(%s, %s, true)", [name, value])
            yield self.connection


def assert_all_refuse(db, caller, victim) -> None:
    """Check that every function for users refuses somebody who is none."""
    for function in functions(db, "authenticated", "public"):
        plausible = victim.plausible()
        told = function.called_by(caller, {n: plausible[n][0] for n in function.arguments})
        if function.name not in FOR_ANYBODY:
            assert (told.code, told.token) == ("PT401", "not_authenticated"), function.name


def test_a_token_that_names_no_user_who_is_here_is_not_authenticated(db):
    victim = Victim(db)
    for claims in [
        *('{"sub": "nope"}', '{"sub": ""}', '{"sub": 7}', '{"sub": {"a": 1}}', '{"sub": []}'),
        *('{"sub": "a\\u0000b"}', "[]", "7", '"text"', "null", "{", "{}", '{"sub": null}', ""),
    ]:
        assert_all_refuse(db, Claiming(db, claims), victim)
    for sub in ("nope", ""):
        for table in ("generations", "images", "entitlements", "batches"):
            with refused("PT401", "not_authenticated"):
                Claiming(db, json.dumps({"sub": sub})).query(f"select * from public.{table}")

    gone = User(db, victim.id)
    db.execute("delete from auth.users where id = %s", victim.id)
    assert_all_refuse(db, gone, victim)
