"""The API over HTTP, as an app sees it: answers, refusals, repeats, parallel requests."""

from __future__ import annotations

import re
import time
import uuid
from collections import Counter

import pytest
from actors import together
from database import unchanged
from http_client import PREVIEW, Refusal, answer, refusal
from http_fixtures import through_both_gateways

from supabase import ClientOptions, PostgrestAPIError, create_client

pytest_plugins = ["http_fixtures"]
pytestmark = through_both_gateways

by_supabase_client = pytest.mark.filterwarnings("ignore:The '(timeout|verify)' parameter")
UNKNOWN_JOB = Refusal(
    404,
    "PT404",
    "not_found",
    "job_id: no such job of yours",
    "Use the job_id that enqueue_generation answered.",
)


@pytest.fixture
def paid_model(stack_db):
    """Name of a model for paid users only."""
    stack_db.execute(
        "insert into public.models select (jsonb_populate_record(m, jsonb_build_object("
        "'id', 'test/paid-only', 'requires_paid', true))).* from public.models as m where id = %s",
        PREVIEW,
    )
    yield "test/paid-only"
    stack_db.execute("delete from public.models where id = 'test/paid-only'")


@pytest.fixture
def supabase_client(stack, rpc_url, user):
    """The official Python client, with the user's token."""
    options = ClientOptions(headers={"Authorization": f"Bearer {user.token}"})
    client = create_client(stack.api_url, stack.anon_key, options=options)
    client.rest_url = type(client.rest_url)(rpc_url)
    return client


# What anybody may call.


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_anybody_can_ping_and_the_answer_is_never_cached(visitor, method):
    response = visitor.rpc("ping", method)

    assert answer(response).keys() == {"ok", "server_time"}
    assert response.json()["ok"] is True
    assert response.headers["Cache-Control"] == "no-store"


def test_ping_works_by_head(visitor):
    response = visitor.rpc("ping", "HEAD")

    assert (response.status_code, response.content) == (200, b"")


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_anybody_can_list_the_models_on_offer(visitor, method):
    models = {model["id"]: model for model in answer(visitor.rpc("list_models", method))}

    preview = models[PREVIEW]
    assert (preview["price_credits"], preview["requires_paid"]) == (1, False)
    assert preview["inputs"].keys() == {"image", "width", "height", "seed", "num_outputs"}
    assert preview["inputs"]["width"]["maximum"] == 2048
    assert "black-forest-labs/flux-dev" not in models, "it is not active"


# A user asks for a picture.


def test_a_new_user_has_the_welcome_credits_and_they_are_in_the_ledger(user):
    entitlement = answer(user.rpc("get_entitlement", "GET"))

    assert entitlement == {
        "user_id": user.id,
        "plan": "free",
        "paid_until": None,
        "credits": 10,
        "active_jobs": 0,
        "max_active": 3,
        "minute_jobs": 0,
        "max_per_minute": 10,
        "max_batch": 3,
        "is_busy": False,
    }
    assert user.ledger() == [("grant", 10)]


def test_enqueue_answers_with_the_job_the_balance_and_when_to_ask(user):
    response = answer(user.enqueue())

    job_id = response.pop("job_id")
    assert str(uuid.UUID(job_id)) == job_id
    assert (response["queue_position"], response["eta_seconds"]) == (None, None)
    expected = {"status": "queued", "reused": False, "credits_left": 9, "poll_after_ms": 1000}
    assert response | expected == response


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_job_can_be_read_by_get_and_by_post(user, method):
    job_id = user.enqueued("a harbour", params={"seed": 7})

    job = answer(user.get_job_status(job_id, method))

    assert re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]+\+00:00", job.pop("created_at"))
    assert type(job.pop("queue_position")) is int
    expected = {
        "job_id": job_id,
        "status": "queued",
        "poll_after_ms": 1000,
        "model": PREVIEW,
        "prompt": "a harbour",
        "params": {"seed": 7},
        "price_credits": 1,
        "refunded_credits": 0,
        "images": [],
    } | dict.fromkeys(["stage", "progress", "error", "started_at", "finished_at"])
    assert job | expected == job


@pytest.mark.parametrize("params", [{"width": 256, "seed": 7}, '{"width": 256, "seed": 7}'])
def test_params_may_be_an_object_or_its_text(user, params):
    job_id = user.enqueued(params=params)

    assert answer(user.get_job_status(job_id))["params"] == {"width": 256, "seed": 7}


def test_the_app_finds_its_active_jobs_newest_first(user):
    jobs = [user.enqueued("one"), user.enqueued("two")]

    found = answer(user.rpc("list_active_jobs", "GET"))

    assert [job["job_id"] for job in found] == jobs[::-1]
    assert found[0] == answer(user.get_job_status(jobs[1]))


def test_the_charge_is_in_the_ledger_of_its_user(user, stranger):
    user.enqueue()

    assert user.ledger() == [("grant", 10), ("charge", -1)]
    assert stranger.ledger() == [("grant", 10)]


# Refusals: status, code, token, details, hint.


def test_another_users_job_looks_like_one_that_never_was(user, stranger):
    job_id = user.enqueued()

    for method in ("GET", "POST"):
        theirs = stranger.get_job_status(job_id, method)
        unknown = stranger.get_job_status(str(uuid.uuid4()), method)
        assert refusal(theirs) == refusal(unknown) == UNKNOWN_JOB


def test_a_blank_prompt_is_400(user):
    assert refusal(user.enqueue(" \n\t ")) == Refusal(
        400,
        "PT400",
        "invalid_input",
        "prompt: missing or blank",
        "Correct the argument and call again.",
    )


def test_a_deleted_users_token_is_401(user, stack_db):
    stack_db.execute("delete from auth.users where id = %s", user.id)

    assert refusal(user.enqueue()) == Refusal(
        401, "PT401", "not_authenticated", "There is no such user any more.", "Sign in again."
    )


def test_too_few_credits_is_402(user, operator):
    spend = {"user_id": user.id, "amount": -10, "kind": "adjust", "external_id": f"test:{user.id}"}
    answer(operator.rpc("grant_credits", **spend))

    assert refusal(user.enqueue()) == Refusal(
        402,
        "PT402",
        "insufficient_credits",
        "need 1, have 0",
        "Buy credits or choose a cheaper model.",
    )


def test_a_paid_model_on_the_free_plan_is_403(user, operator, paid_model):
    assert refusal(user.enqueue(model=paid_model)) == Refusal(
        403,
        "PT403",
        "requires_paid_plan",
        "test/paid-only is for paid users",
        "Choose another model or a paid plan.",
    )

    answer(operator.rpc("set_paid", user_id=user.id, paid_until="infinity"))
    assert answer(user.enqueue(model=paid_model))["credits_left"] == 10


def test_an_unknown_model_is_404(user):
    assert refusal(user.enqueue(model="no/such")) == Refusal(
        404, "PT404", "not_found", "model: no such model", "list_models() names them."
    )


def test_a_key_used_for_something_else_is_409(user):
    user.enqueue("one", idempotency_key="same")

    assert refusal(user.enqueue("another", idempotency_key="same")) == Refusal(
        409,
        "PT409",
        "idempotency_conflict",
        "idempotency_key was used with another payload",
        "Use a new key for a new request.",
    )
    assert user.credits() == 9


def test_more_jobs_than_the_plan_allows_is_429_with_retry_after(user):
    for _ in range(3):
        user.enqueued()

    response = user.enqueue()

    assert response.headers["Retry-After"] == "5"
    assert refusal(response) == Refusal(
        429,
        "PT429",
        "too_many_active",
        "3 jobs are queued or running, the plan's limit",
        "Try again in 5 seconds.",
    )


def test_what_changes_something_is_called_by_post(user, stack_db):
    with unchanged(stack_db):
        response = user.rpc("enqueue_generation", "GET", model=PREVIEW, prompt="a harbour")

    assert refusal(response) == Refusal(
        405,
        "PT405",
        "method_not_allowed",
        "This function changes something.",
        "Call it by POST.",
    )


def test_more_jobs_a_minute_than_the_plan_allows_is_429_with_retry_after(user, stack_db):
    stack_db.execute(
        "update public.entitlements set minute_jobs = 10, minute_started_at = now()"
        " - interval '20 seconds' where user_id = %s",
        user.id,
    )
    response = user.enqueue()

    seconds = int(response.headers["Retry-After"])
    assert 30 <= seconds <= 40
    assert refusal(response) == Refusal(
        429,
        "PT429",
        "rate_limited",
        "10 jobs in this minute, the plan's limit",
        f"Try again in {seconds} seconds.",
    )


# Repeats and parallel requests.


def test_a_repeated_request_answers_with_the_same_job(user):
    first = user.enqueue(idempotency_key="same", params={"seed": 7, "width": 64})
    second = user.enqueue(idempotency_key="same", params={"width": 64, "seed": 7})

    assert answer(second)["job_id"] == answer(first)["job_id"]
    assert user.credits() == 9


def test_one_key_from_twenty_requests_at_once_makes_one_job(user):
    responses = together([lambda: user.enqueue(idempotency_key="same")] * 20)

    assert len({answer(response)["job_id"] for response in responses}) == 1
    assert {answer(response)["credits_left"] for response in responses} == {9}
    assert user.ledger() == [("grant", 10), ("charge", -1)]


def test_requests_at_once_cannot_pass_the_plans_limit(user):
    responses = together([user.enqueue] * 20)

    assert Counter(response.status_code for response in responses) == {200: 3, 429: 17}
    assert answer(user.rpc("get_entitlement"))["active_jobs"] == 3
    assert user.credits() == 7


# The official Python client.


@by_supabase_client
def test_the_supabase_client_enqueues_and_reads_its_job(supabase_client):
    arguments = {"model": PREVIEW, "prompt": "a harbour", "params": {"seed": 7}}
    queued = supabase_client.rpc("enqueue_generation", arguments).execute().data

    job_id = {"job_id": queued["job_id"]}
    by_post = supabase_client.rpc("get_job_status", job_id).execute().data
    by_get = supabase_client.rpc("get_job_status", job_id, get=True).execute().data
    rows = supabase_client.table("generations").select("id, input").execute().data

    assert by_post == by_get
    assert by_get["params"] == {"seed": 7}
    assert rows == [{"id": queued["job_id"], "input": {"seed": 7}}]


@by_supabase_client
def test_the_supabase_client_raises_our_codes(supabase_client):
    with pytest.raises(PostgrestAPIError) as raised:
        supabase_client.rpc("enqueue_generation", {"model": "no/such", "prompt": "x"}).execute()

    error = raised.value
    assert (error.code, error.message, error.details, error.hint) == (
        "PT404",
        "not_found",
        "model: no such model",
        "list_models() names them.",
    )


# Not a test of speed: the times are printed at the end of the run.


def test_enqueue_time_is_reported(user, operator, report_time):
    operator.rpc("set_paid", user_id=user.id, paid_until="infinity")  # up to 20 jobs at once
    for number in range(20):
        started = time.perf_counter()
        answer(user.enqueue())
        if number >= 3:
            report_time("enqueue_generation over HTTP, warm", (time.perf_counter() - started) * 1e3)
