"""sql/52_batch.sql: many prompts in one call, all or nothing."""

import pytest
from actors import refused, together
from database import assert_books_balance, unchanged

PROMPTS = ["one", "two", "three"]


def test_a_batch_is_one_generation_and_one_charge_for_each_prompt(db, alice, worker):
    batch = alice.enqueue_batch(PROMPTS, params={"width": 512})

    jobs = [alice.get_job_status(job_id) for job_id in batch["job_ids"]]
    assert [job["prompt"] for job in jobs] == PROMPTS
    assert [job["params"] for job in jobs] == [{"width": 512}] * 3
    assert [job["queue_position"] for job in jobs] == [0, 1, 2]
    assert alice.ledger() == [("grant", 10), ("charge", -1), ("charge", -1), ("charge", -1)]
    assert (batch["queued"], batch["credits_left"], batch["status"]) == (3, 7, "active")

    first, second = worker.claim_jobs(2)
    worker.complete_job(first)
    worker.heartbeat(second, progress=[50])
    batch = alice.get_batch_status(batch["batch_id"])
    assert (batch["completed"], batch["processing"], batch["queued"]) == (1, 1, 1)
    assert (batch["progress"], batch["status"]) == (50, "active")
    assert batch["poll_after_ms"] is not None

    worker.fail_job(second, "moderated")
    worker.complete_job(worker.claimed())
    batch = alice.get_batch_status(batch["batch_id"])
    assert (batch["completed"], batch["failed"], batch["progress"]) == (2, 1, 100)
    assert (batch["status"], batch["poll_after_ms"]) == ("finished", None)
    assert_books_balance(db)


def test_the_same_key_and_request_answer_with_the_same_batch(db, alice):
    devices = [alice.on_another_device() for _ in range(10)]

    answers = together(
        [lambda d=each: d.enqueue_batch(PROMPTS, idempotency_key="k") for each in devices]
    )

    assert len({answer["batch_id"] for answer in answers}) == 1
    assert alice.credits() == 7
    for change in ({"prompts": ["one"]}, {"model": "acme/other"}, {"params": {"seed": 1}}):
        with unchanged(db), refused("PT409", "idempotency_conflict"):
            alice.enqueue_batch(**{"prompts": PROMPTS, "idempotency_key": "k"} | change)


@pytest.mark.parametrize(
    ("prompts", "rest", "detail"),
    [
        (None, {}, "prompts: not 1 to 100 texts"),
        ([], {}, "prompts: not 1 to 100 texts"),
        ([["one", "two"]], {}, "prompts: not 1 to 100 texts"),
        (["one"] * 101, {}, "prompts: not 1 to 100 texts"),
        (["one"] * 4, {}, "prompts: not 1 to 3 texts"),
        (["one", " ", ""], {}, "prompts[1]: missing or blank"),
        (["\u3164", "two"], {}, "prompts[0]: missing or blank"),
        (["one", "two", None], {}, "prompts[2]: missing or blank"),
        (["one", "x" * 4001], {}, "prompts[1]: longer than 4000 characters"),
        (PROMPTS, {"params": {"nonsense": 1}}, "params.nonsense: not an input of darkroom/preview"),
        (PROMPTS, {"params": {"reuse": True, "seed": 1}}, "params.reuse: not in a batch"),
        (PROMPTS, {"idempotency_key": ""}, "idempotency_key: not 1 to 200 bytes"),
    ],
)
def test_one_bad_part_refuses_the_whole_batch_and_is_named(db, alice, prompts, rest, detail):
    with unchanged(db), refused("PT400", "invalid_input") as refusal:
        alice.enqueue_batch(prompts, **rest)

    assert refusal.detail == detail


def test_a_batch_is_let_in_whole_while_there_is_room_for_one_and_counts_in_full(db, alice):
    alice.enqueue()
    alice.enqueue()
    with unchanged(db), refused("PT402", "insufficient_credits") as refusal:
        alice.enqueue_batch(PROMPTS, params={"num_outputs": 3})
    assert refusal.detail == "need 9, have 8"

    alice.enqueue_batch(PROMPTS)  # max_active is 3

    entitlement = alice.get_entitlement()
    assert (entitlement["active_jobs"], entitlement["minute_jobs"]) == (5, 5)
    with unchanged(db), refused("PT429", "too_many_active"):
        alice.enqueue_batch(["one more"])
