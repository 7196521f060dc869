"""The life of a job over HTTP: batches, cancel, retry, reuse, redrive, as an app calls them."""

from __future__ import annotations

import pytest
from actors import Worker
from http_client import answer, refusal
from http_fixtures import through_both_gateways

pytest_plugins = ["http_fixtures"]
pytestmark = through_both_gateways

PROMPTS = ['one "quoted"', "two, with a comma", "{three}"]


@pytest.fixture
def batch(user):
    """A batch of three of the user."""
    return answer(user.rpc("enqueue_batch", model="darkroom/preview", prompts=PROMPTS))


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_batch_goes_in_as_a_json_array_and_is_read_back(user, batch, method):
    status = answer(user.rpc("get_batch_status", method, batch_id=batch["batch_id"]))

    assert (status["queued"], status["status"], status["progress"]) == (3, "active", 0)
    jobs = [answer(user.get_job_status(job_id)) for job_id in status["job_ids"]]
    assert [job["prompt"] for job in jobs] == PROMPTS
    assert user.credits() == 7


def test_a_batch_that_is_too_large_names_the_limit(user):
    response = user.rpc("enqueue_batch", model="darkroom/preview", prompts=["one"] * 4)

    assert (refusal(response).message, refusal(response).details) == (
        "invalid_input",
        "prompts: not 1 to 3 texts",
    )


def test_a_batch_is_nobody_elses(user, stranger, batch):
    for function in ("get_batch_status", "cancel_batch"):
        refused = refusal(stranger.rpc(function, batch_id=batch["batch_id"]))
        assert (refused.status, refused.message) == (404, "not_found")

    assert user.credits() == 7


def test_cancel_retry_and_cancel_again(user):
    job_id = user.enqueued()

    canceled = answer(user.rpc("cancel_generation", job_id=job_id))
    assert (canceled["status"], canceled["refunded_credits"]) == ("canceled", 1)
    again = answer(user.rpc("retry_generation", job_id=job_id))
    assert (again["status"], again["credits_left"]) == ("queued", 9)
    assert answer(user.rpc("retry_generation", job_id=job_id))["job_id"] == again["job_id"]
    answer(user.rpc("cancel_generation", job_id=again["job_id"]))

    assert user.credits() == 10


def test_a_job_that_is_not_finished_is_not_retried(user):
    refused = refusal(user.rpc("retry_generation", job_id=user.enqueued()))

    assert (refused.status, refused.code, refused.message) == (409, "PT409", "not_finished")


def test_a_completed_job_is_reused_and_not_canceled(stack_db, user):
    job_id = user.enqueued(params={"seed": 7})
    worker = Worker(stack_db)
    (job,) = [each for each in worker.claim_jobs(100) if each.id == job_id]
    worker.complete_job(job)
    worker.unregister_worker()

    reused = answer(user.enqueue(params={"seed": 7, "reuse": True}))
    assert (reused["job_id"], reused["reused"]) == (job_id, True)
    refused = refusal(user.rpc("cancel_generation", job_id=job_id))
    assert (refused.status, refused.message) == (409, "already_finished")


def test_nobody_without_a_token_cancels_retries_or_asks_for_a_batch(nobody, batch):
    calls = [
        ("cancel_generation", {"job_id": batch["job_ids"][0]}),
        ("retry_generation", {"job_id": batch["job_ids"][0]}),
        ("cancel_batch", {"batch_id": batch["batch_id"]}),
        ("enqueue_batch", {"model": "darkroom/preview", "prompts": ["one"]}),
    ]

    assert {nobody.rpc(name, **arguments).status_code for name, arguments in calls} <= {401, 403}


def test_only_the_operator_redrives(user, operator):
    request = {"code": "provider_error", "since": "2026-01-01T00:00:00Z"}

    assert user.rpc("redrive_failed", **request).status_code in (401, 403, 404)
    assert answer(operator.rpc("redrive_failed", **request)) == {"redriven": 0}
