"""sql/30_gating.sql: may this user ask for this? Nothing is written where the answer is no."""

import contextlib
import json
import re
import unicodedata

import pytest
from actors import PREVIEW, Caller, Refusal, Service, User, Worker, refused
from database import unchanged
from hostile import Victim, functions
from http_fixtures import SUPABASE_UID
from psycopg.types.json import Jsonb

INVISIBLE = {
    "spaces": "\u00a0\u1680\u2000\u200a\u202f\u205f\u3000\x1f\x85",
    "separators": "\u2028\u2029",
    "format characters": "\u00ad\u061c\u180e\u200b\u200d\u200e\u202e\u2060\u2066\ufeff\ufffb",
    "Hangul fillers": "\u115f\u1160\u3164\uffa0",
    "a braille blank": "\u2800",
    "Khmer vowels": "\u17b4\u17b5",
    "variation selectors": "\ufe00\ufe0f\U000e0100\U000e01ef",
    "tags": "\U000e0001\U000e0020\U000e007f",
    "a grapheme joiner": "\u034f",
    "marks without a letter": "\u0301\u20dd\ufe20",
    "musical formats": "\U0001d159\U0001d173",
}.values()
NESTED = "[" * 4000 + "]" * 4000


@pytest.mark.parametrize(
    ("prompt", "detail"),
    [
        (None, "prompt: missing or blank"),
        ("", "prompt: missing or blank"),
        (" \t\r\n\f ", "prompt: missing or blank"),
        *((text, "prompt: missing or blank") for text in INVISIBLE),
        ("x" * 4001, "prompt: longer than 4000 characters"),
        ("🖼" * 4001, "prompt: longer than 4000 characters"),
        ("x" * 5_000_000, "prompt: longer than 4000 characters"),
    ],
)
def test_a_prompt_is_there_and_not_too_long(db, alice, prompt, detail):
    with unchanged(db), refused("PT400", "invalid_input") as refusal:
        alice.enqueue(prompt)

    assert refusal.detail == detail


def test_a_prompt_of_the_full_length_in_any_script_is_accepted(alice):
    job_id = alice.enqueued("🖼" * 4000)

    assert alice.get_job_status(job_id)["prompt"] == "🖼" * 4000


@pytest.mark.parametrize(
    "prompt",
    ["🖼", "1\ufe0f\u20e3", "海", "é", "\u1112\u1161", "?", "☺\ufe0f", "\u2801", "🏴\U000e0067"],
)
def test_one_thing_to_see_is_a_prompt(alice, prompt):
    assert alice.get_job_status(alice.enqueued(prompt))["prompt"] == prompt


def test_nothing_that_unicode_calls_a_control_a_space_or_a_format_is_seen(db):
    categories = ("Cc", "Cf", "Zs", "Zl", "Zp")
    unseen = [chr(n) for n in range(1, 0x110000) if unicodedata.category(chr(n)) in categories]

    query = "select c from unnest(%s::text[]) as c where not private.is_blank(c)"
    assert db.execute(query, unseen) == []
    assert db.value("select private.is_blank(%s)", "".join(unseen))


def test_a_prompt_with_a_nul_byte_never_arrives(db, alice):
    query = b"select public.enqueue_generation('darkroom/preview', E'a\\000b')"

    with unchanged(db), refused("22021"), alice.acting() as connection:
        connection.execute(query)


@pytest.mark.parametrize(
    ("params", "detail"),
    [
        ([], "params: not a JSON object"),
        ([{"seed": 1}], "params: not a JSON object"),
        (7, "params: not a JSON object"),
        (True, "params: not a JSON object"),
        (None, "params: not a JSON object"),
        ("", "params: not a JSON object"),
        ("a text", "params: not a JSON object"),
        ("[]", "params: not a JSON object"),
        ('{"seed": 1', "params: not a JSON object"),
        (json.dumps(json.dumps({"seed": 1})), "params: not a JSON object"),
        ('{"seed": "\\u0000"}', "params: not a JSON object"),
        ('{"seed": 1e999999}', "params: not a JSON object"),
        (NESTED, "params: not a JSON object"),
        ({"seed": "x" * 9000}, "params: longer than 8192 bytes"),
        ("x" * 9000, "params: not a JSON object"),
        ("x" * 20000, "params: longer than 8192 bytes"),
        ('{"seed": 1e9000}', "params: longer than 8192 bytes"),
        ({"nonsense": 1}, "params.nonsense: not an input of darkroom/preview"),
        ({"prompt": "another"}, "params.prompt: not an input of darkroom/preview"),
        ({"seed": "7"}, "params.seed: not of type integer"),
        ({"seed": 7.5}, "params.seed: not of type integer"),
        ({"seed": True}, "params.seed: not of type integer"),
        ({"seed": None}, "params.seed: not of type integer"),
        ({"seed": [7]}, "params.seed: not of type integer"),
        ({"seed": {}}, "params.seed: not of type integer"),
        ({"seed": -1}, "params.seed: not between 0 and 2147483647"),
        ({"seed": 2**31}, "params.seed: not between 0 and 2147483647"),
        ({"width": 63}, "params.width: not between 64 and 2048"),
        ({"width": 10**30}, "params.width: not between 64 and 2048"),
        ({"num_outputs": 0}, "params.num_outputs: not between 1 and 4"),
        ({"num_outputs": 5}, "params.num_outputs: not between 1 and 4"),
    ],
)
def test_params_that_do_not_fit_are_refused(db, alice, params, detail):
    with unchanged(db), refused("PT400", "invalid_input") as refusal:
        alice.enqueue(params=params)

    assert refusal.detail == detail


@pytest.mark.parametrize(
    ("params", "fits"),
    [
        ({"aspect_ratio": "16:9"}, True),
        ({"aspect_ratio": "2:1"}, False),
        ({"aspect_ratio": ["16:9"]}, False),
        ({"guidance": 3.5}, True),
        ({"guidance": 10.5}, False),
        ({"output_format": 7}, False),
    ],
)
def test_params_fit_type_range_and_enum_of_the_models_schema(db, alice, params, fits):
    db.execute("update public.models set is_active = true")

    if fits:
        assert alice.enqueue(model="black-forest-labs/flux-dev", params=params)
    else:
        with unchanged(db), refused("PT400", "invalid_input"):
            alice.enqueue(model="black-forest-labs/flux-dev", params=params)


@pytest.mark.parametrize(
    "params", [{"width": 128, "seed": 7}, json.dumps({"width": 128, "seed": 7})]
)
def test_params_may_arrive_as_an_object_or_as_its_text(alice, params):
    job_id = alice.enqueued(params=params)

    assert alice.get_job_status(job_id)["params"] == {"width": 128, "seed": 7}


def test_no_params_mean_none(alice):
    job_id = alice.call(
        "public.enqueue_generation", model=PREVIEW, prompt="a lighthouse", params=None
    )["job_id"]

    assert alice.get_job_status(job_id)["params"] == {}


def test_the_provider_gets_defaults_params_prompt_and_a_seed(alice, worker):
    alice.enqueue("a lighthouse", params={"width": 128})

    sent = worker.claimed().provider_input

    assert sent.pop("seed") in range(2**31)
    assert sent == {"prompt": "a lighthouse", "width": 128, "height": 1024, "num_outputs": 1}


@pytest.mark.parametrize("model", [None, "", "no/such-model", "black-forest-labs/flux-dev"])
def test_a_model_that_is_unknown_or_not_active_is_not_found(db, alice, model):
    with unchanged(db), refused("PT404", "not_found") as refusal:
        alice.enqueue(model=model)

    assert refusal.detail == "model: no such model"


def test_a_model_for_paid_users_is_refused_to_free_ones(db, alice, bob):
    db.execute("update public.models set requires_paid = true")
    bob.has_paid()

    with unchanged(db), refused("PT403", "requires_paid_plan") as refusal:
        alice.enqueue()

    assert refusal.detail == "darkroom/preview is for paid users"
    assert bob.enqueue()["status"] == "queued"


@pytest.mark.parametrize("key", ["", "k" * 201])
def test_an_idempotency_key_has_a_sane_length(db, alice, key):
    with unchanged(db), refused("PT400", "invalid_input") as refusal:
        alice.enqueue(idempotency_key=key)

    assert refusal.detail == "idempotency_key: not 1 to 200 bytes"


def test_one_job_more_than_the_plan_allows_at_once_waits(db, alice):
    for _ in range(3):
        alice.enqueue()

    with unchanged(db), refused("PT429", "too_many_active") as refusal:
        alice.enqueue()

    assert refusal.detail == "3 jobs are queued or running, the plan's limit"
    assert refusal.refusal.retry_after == 5


def test_a_job_that_ends_while_the_reason_is_looked_for_changes_no_reason(db, alice):
    """The gate's limit, which the plan no more has, stands for a job that was counted and ended."""
    too_late = """do $$
      declare gate private.gate := private.gate('{}', '{}');
      begin
        gate.max_active := 0;
        perform private.accept(gate, '{}', '{{}}', array['x'], array['{{}}'::jsonb]);
      end $$"""

    with unchanged(db), refused("PT429", "too_many_active") as refusal:
        db.execute(too_late.format(alice.id, PREVIEW, PREVIEW))

    assert refusal.detail == "0 jobs were queued or running, the plan's limit"


def test_a_finished_job_makes_room_for_another(alice, worker):
    for _ in range(3):
        alice.enqueue()

    worker.complete_job(worker.claimed())

    assert alice.enqueue()["status"] == "queued"


def test_one_job_more_than_the_plan_allows_in_a_minute_waits(db, alice):
    db.execute("update private.plans set max_active = 100, max_per_minute = 2")
    alice.enqueue()
    alice.enqueue()
    db.pass_time("20 seconds")

    with unchanged(db), refused("PT429", "rate_limited") as refusal:
        alice.enqueue()

    assert refusal.detail == "2 jobs in this minute, the plan's limit"
    assert 35 <= refusal.refusal.retry_after <= 40


def test_the_next_minute_counts_anew(db, alice):
    db.execute("update private.plans set max_per_minute = 1")
    alice.enqueue()
    db.pass_time("61 seconds")

    alice.enqueue()

    with refused("PT429", "rate_limited"):
        alice.enqueue()


def test_a_refused_request_does_not_count_against_the_limits(db, alice):
    alice.has(credits=0)
    for _ in range(3):
        with refused("PT402"):
            alice.enqueue()

    assert alice.get_entitlement()["minute_jobs"] == 0
    assert alice.get_entitlement()["active_jobs"] == 0


def test_what_is_canceled_counts_in_the_minute_and_in_the_day(db, alice):
    for minute in range(30):
        for _ in range(10):
            alice.cancel_generation(alice.enqueued())
        if minute == 0:
            with unchanged(db), refused("PT429", "rate_limited"):
                alice.enqueue()
        db.execute("update public.entitlements set minute_started_at = now() - interval '1 minute'")

    for call in (alice.enqueue, lambda: alice.enqueue_batch(["a"])):
        with unchanged(db), refused("PT429", "rate_limited") as refusal:
            call()
    assert refusal.detail.startswith("300 jobs in this day")
    db.pass_time("1 day")
    assert alice.enqueue()["status"] == "queued"


def test_a_token_without_a_user_is_not_authenticated(db):
    stranger = User(db)
    stranger.claims = lambda: {"role": "authenticated", "sub": ""}

    for call in (stranger.enqueue, stranger.list_active_jobs, stranger.get_entitlement):
        with unchanged(db), refused("PT401", "not_authenticated"):
            call()


def test_a_token_that_outlived_its_user_is_not_authenticated(db, alice):
    db.execute("delete from auth.users where id = %s", alice.id)

    for call in (alice.enqueue, alice.get_entitlement):
        with unchanged(db), refused("PT401", "not_authenticated") as refusal:
            call()

        assert refusal.detail == "There is no such user any more."


def test_a_schema_property_without_a_type_is_refused_not_passed_through(db, alice):
    db.execute(
        "update public.models set input_schema = jsonb_set(input_schema, '{properties,seed}', %s)",
        Jsonb({"title": "Seed"}),
    )

    with refused("PT400", "invalid_input"):
        alice.enqueue(params={"seed": 7})


# Back-pressure.


@pytest.fixture
def crowd(db):
    """Three users who have each waited long with a job, and a worker that runs two at once."""
    worker = Worker(db, slots=2)
    users = [User(db) for _ in range(3)]
    for user in users:
        user.enqueue()
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
    wait(db, crowd, "2 minutes")

    with unchanged(db), refused("PT503", "busy") as refusal:
        alice.enqueue()

    assert refusal.detail == "Jobs wait too long to take in more."
    assert refusal.refusal.retry_after == 60
    assert bob.enqueue()["status"] == "queued"
    wait(db, crowd, "30 minutes")
    with unchanged(db), refused("PT503", "busy"):
        bob.enqueue()


def test_a_plan_without_a_limit_is_never_busy(db, alice, crowd):
    db.execute("update private.plans set busy_after = null")
    wait(db, crowd, "10 days")

    assert alice.enqueue()["status"] == "queued"


def test_as_soon_as_the_queue_is_drained_nobody_is_refused(db, alice, crowd):
    wait(db, crowd, "11 minutes")
    with refused("PT503", "busy"):
        alice.enqueue()

    crowd.claim_jobs(3)

    assert alice.enqueue()["status"] == "queued"  # plans still tell of the old job


def test_it_is_busy_also_where_nobody_renews_the_state(db, alice, crowd):
    crowd.unregister_worker()
    db.pass_time("11 minutes")

    with refused("PT503", "busy"):
        alice.enqueue()


def test_a_few_users_with_long_queues_do_not_hide_who_waits(db, alice, bob, worker):
    db.lift_limits()
    for _ in range(10):
        bob.enqueue()
    alice.enqueue()
    db.pass_time("11 minutes")
    worker.claimed()

    with refused("PT503", "busy"):
        User(db).enqueue()


def test_an_empty_queue_is_not_busy_whoever_looked_last_and_when(db, alice):
    db.pass_time("10 days")

    assert alice.enqueue()["status"] == "queued"


def test_one_users_long_queue_makes_nobody_else_wait_or_be_refused(db, alice, bob):
    db.lift_limits()
    worker = Worker(db, slots=2)
    for _ in range(10):
        bob.enqueue()
    wait(db, worker, "20 minutes")
    worker.claim_jobs(2)

    job_id = alice.enqueued()

    assert alice.get_job_status(job_id)["queue_position"] <= 1


def test_jobs_of_a_paused_model_make_the_queue_neither_old_nor_busy(db, alice, crowd, service):
    db.execute("update public.models set is_active = true")
    service.pause_model(PREVIEW)
    crowd.claim_jobs(2)
    wait(db, crowd, "1 hour")

    assert db.value("select max(oldest_ready_at) from private.plans") is None
    assert alice.has(credits=100).enqueue(model="black-forest-labs/flux-dev")["status"] == "queued"


def test_jobs_that_come_back_after_a_pause_wait_from_then_on(db, alice, crowd, service):
    service.pause_model(PREVIEW)
    crowd.claim_jobs(2)
    wait(db, crowd, "1 hour")
    service.resume_model(PREVIEW)

    wait(db, crowd, "11 seconds")
    assert alice.enqueue()["status"] == "queued"
    wait(db, crowd, "11 minutes")
    with refused("PT503", "busy"):
        alice.enqueue()


def test_the_state_is_renewed_at_most_every_ten_seconds(db, alice, worker):
    db.pass_time("11 seconds")
    worker.recover_stale_jobs()
    alice.enqueue()

    with unchanged(db):
        worker.recover_stale_jobs()

    db.pass_time("11 seconds")
    worker.recover_stale_jobs()
    assert db.value(
        "select bool_and(oldest_ready_at = (select queued_at from private.ready_jobs))"
        " from private.plans"
    )


def test_what_a_user_may_and_has_used_is_shown(db, alice, crowd):
    alice.enqueue()
    shown = alice.get_entitlement()

    assert (shown["active_jobs"], shown["max_active"]) == (1, 3)
    assert (shown["minute_jobs"], shown["max_per_minute"]) == (1, 10)
    assert (shown["max_batch"], shown["is_busy"]) == (3, False)

    wait(db, crowd, "11 minutes")
    assert alice.get_entitlement()["is_busy"] is True


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


def test_whoever_may_come_back_is_told_the_seconds_as_data(alice):
    for _ in range(3):
        alice.enqueue()

    with refused("PT429", "too_many_active") as expected:
        alice.enqueue()

    hint = re.fullmatch(r"Try again in (\d+) seconds\.", expected.refusal.hint)
    assert int(hint[1]) == expected.refusal.retry_after == 5


# Whose request it is.


@pytest.mark.parametrize(
    "claims",
    [
        *('{"sub": "nope"}', '{"sub": ""}', '{"sub": 7}', '{"sub": {"a": 1}}', '{"sub": []}'),
        *('{"sub": "a\\u0000b"}', "[]", "7", '"text"', "null", "{", "{}", '{"sub": null}', ""),
    ],
)
def test_a_token_that_names_no_user_is_not_authenticated(db, alice, claims):
    db.execute(SUPABASE_UID)
    nobody = Claiming(db, claims)
    calls = functions(db, "authenticated", "public")
    victim = Victim(db)

    for function in calls:
        plausible = victim.plausible()
        told = function.called_by(nobody, {n: plausible[n][0] for n in function.arguments})
        if function.name not in ("ping", "list_models", "list_public_images"):
            assert (told.code, told.token) == ("PT401", "not_authenticated"), function.name


@pytest.mark.parametrize("sub", ["nope", ""])
@pytest.mark.parametrize("table", ["generations", "images", "entitlements", "batches"])
def test_nor_is_it_by_a_table(db, alice, sub, table):
    db.execute(SUPABASE_UID)
    alice.enqueue()

    with refused("PT401", "not_authenticated"):
        Claiming(db, json.dumps({"sub": sub})).query(f"select * from public.{table}")


def test_a_deleted_users_token_is_not_authenticated_whatever_it_asks(db):
    victim = Victim(db)
    gone = User(db, victim.id)
    db.execute("delete from auth.users where id = %s", victim.id)

    for function in functions(db, "authenticated", "public"):
        plausible = victim.plausible()
        told = function.called_by(gone, {n: plausible[n][0] for n in function.arguments})
        if function.name not in ("ping", "list_models", "list_public_images"):
            assert (told.code, told.token) == ("PT401", "not_authenticated"), function.name


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
