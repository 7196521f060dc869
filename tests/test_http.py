"""The API over HTTP, as an app sees it: answers, refusals, repeats, parallel requests."""

from __future__ import annotations

import uuid
from collections import Counter

import pytest
from actors import together
from database import unchanged
from http_client import PREVIEW, Refusal, answer, refusal

from supabase import ClientOptions, PostgrestAPIError, create_client

pytest_plugins = ["http_fixtures"]

PROMPTS = ['one "quoted"', "two, with a comma", "{three}"]


def test_anybody_can_ping_and_list_the_models_on_offer(visitor):
    for method in ("GET", "POST"):
        response = visitor.rpc("ping", method)
        models = {model["id"]: model for model in answer(visitor.rpc("list_models", method))}

        assert answer(response).keys() == {"ok", "server_time"}
        assert response.headers["Cache-Control"] == "no-store"
        assert models[PREVIEW]["price_credits"] == 1
        assert models[PREVIEW]["inputs"]["width"]["maximum"] == 2048
        assert "black-forest-labs/flux-dev" not in models, "it is not active"
    head = visitor.rpc("ping", "HEAD")
    assert (head.status_code, head.content) == (200, b"")


def test_a_user_asks_for_a_picture_and_reads_of_it(user, stranger):
    first = user.enqueued(params={"seed": 7})
    queued = answer(user.enqueue("a harbour", params='{"width": 256}'))
    job = answer(user.get_job_status(queued["job_id"]))

    expected = {"status": "queued", "reused": False, "credits_left": 8, "poll_after_ms": 1000}
    assert queued | expected == queued
    expected = {"job_id": queued["job_id"], "prompt": "a harbour", "params": {"width": 256}}
    assert job | expected == job
    assert answer(user.get_job_status(job["job_id"], "GET")) == job
    assert answer(user.rpc("list_active_jobs", "GET")) == [job, answer(user.get_job_status(first))]
    assert answer(user.rpc("get_entitlement", "GET"))["credits"] == 8
    page = answer(user.rpc("list_generations", "GET", before=job["job_id"], page_size=2))
    assert [each["job_id"] for each in page["generations"]] == [first]
    assert user.ledger() == [("grant", 10), ("charge", -1), ("charge", -1)]
    assert stranger.ledger() == [("grant", 10)]


def test_a_batch_goes_in_as_a_json_array_and_is_read_back_by_its_user(user, stranger):
    batch = answer(user.rpc("enqueue_batch", model=PREVIEW, prompts=PROMPTS))
    named = {"batch_id": batch["batch_id"]}

    for method in ("GET", "POST"):
        status = answer(user.rpc("get_batch_status", method, **named))
        assert (status["queued"], status["status"], status["progress"]) == (3, "active", 0)
        assert status["job_ids"] == batch["job_ids"]
    jobs = [answer(user.get_job_status(job_id)) for job_id in batch["job_ids"]]
    assert [job["prompt"] for job in jobs] == PROMPTS
    for function in ("get_batch_status", "cancel_batch"):
        assert refusal(stranger.rpc(function, **named)).message == "not_found"
    assert user.credits() == 7


# Refusals: status, code, token, details, hint.


def test_what_is_wrong_with_a_request_is_said_and_nothing_written(user, stranger, stack_db):
    job_id = user.enqueued(idempotency_key="same")
    with unchanged(stack_db):
        responses = [
            user.enqueue(" \n\t "),
            stranger.get_job_status(job_id),
            stranger.get_job_status(str(uuid.uuid4()), "GET"),
            user.rpc("enqueue_generation", "GET", model=PREVIEW, prompt="a harbour"),
            user.enqueue("another", idempotency_key="same"),
        ]
    user.enqueued()
    user.enqueued()
    responses.append(user.enqueue())
    stack_db.execute("delete from auth.users where id = %s", user.id)
    responses.append(user.enqueue())

    correct = "Correct the argument and call again."
    unknown = "job_id: no such job of yours"
    known = "Use the job_id that enqueue_generation answered."
    another = "idempotency_key was used with another payload"
    limit = "3 jobs are queued or running, the plan's limit"
    said = [
        (400, "invalid_input", "prompt: missing or blank", correct),
        (404, "not_found", unknown, known),
        (404, "not_found", unknown, known),
        (405, "method_not_allowed", "This function changes something.", "Call it by POST."),
        (409, "idempotency_conflict", another, "Use a new key for a new request."),
        (429, "too_many_active", limit, "Try again in 5 seconds."),
        (401, "not_authenticated", "There is no such user any more.", "Sign in again."),
    ]
    expected = [Refusal(status, f"PT{status}", *rest) for status, *rest in said]
    assert [refusal(response) for response in responses] == expected
    assert responses[5].headers["Retry-After"] == "5"


def test_requests_at_once_pass_no_limit_and_with_one_key_make_one_job(user):
    same = together([lambda: user.enqueue(idempotency_key="same")] * 20)
    others = together([user.enqueue] * 20)

    assert len({answer(response)["job_id"] for response in same}) == 1
    assert Counter(response.status_code for response in others) == {200: 2, 429: 18}
    assert user.credits() == 7


@pytest.mark.filterwarnings("ignore:The '(timeout|verify)' parameter")
def test_the_supabase_client_enqueues_reads_its_job_and_raises_our_codes(stack, user):
    options = ClientOptions(headers={"Authorization": f"Bearer {user.token}"})
    client = create_client(stack.api_url, stack.anon_key, options=options)
    arguments = {"model": PREVIEW, "prompt": "a harbour", "params": {"seed": 7}}

    queued = client.rpc("enqueue_generation", arguments).execute().data
    job_id = {"job_id": queued["job_id"]}
    by_post = client.rpc("get_job_status", job_id).execute().data
    by_get = client.rpc("get_job_status", job_id, get=True).execute().data
    rows = client.table("generations").select("id, input").execute().data
    with pytest.raises(PostgrestAPIError) as raised:
        client.rpc("enqueue_generation", arguments | {"model": "no/such"}).execute()

    assert by_post == by_get
    assert rows == [{"id": queued["job_id"], "input": {"seed": 7}}]
    said = raised.value.code, raised.value.message, raised.value.details, raised.value.hint
    assert said == ("PT404", "not_found", "model: no such model", "list_models() names them.")
