"""sql/50_enqueue.sql: the one way in. Accepted as a whole or not at all, and once per key."""

import pytest
from actors import Refusal, outcome, refused, together
from database import assert_books_balance, unchanged


def test_an_accepted_request_is_charged_recorded_and_ready(db, alice):
    answer = alice.enqueue("a lighthouse", params={"seed": 7}, idempotency_key="k")

    assert answer | {"job_id": None} == {
        "job_id": None,
        "status": "queued",
        "reused": False,
        "credits_left": 9,
        "queue_position": None,
        "eta_seconds": None,
        "poll_after_ms": 1000,
        "size": None,
    }
    generation = db.row("select * from public.generations where id = %s", answer["job_id"])
    assert str(generation["user_id"]) == alice.id
    assert (generation["prompt"], generation["input"]) == ("a lighthouse", {"seed": 7})
    assert (generation["status"], generation["price_credits"]) == ("queued", 1)
    assert_books_balance(db)


@pytest.mark.parametrize(
    ("token", "accepted"), [("insufficient_credits", 25), ("too_many_active", 3)]
)
def test_no_more_are_accepted_at_the_same_moment_than_credits_and_limits_allow(
    db, alice, token, accepted
):
    alice.has(credits=25)
    if token == "insufficient_credits":
        db.lift_limits()
    devices = [alice.on_another_device() for _ in range(20)]

    outcomes = together([lambda d=d: [outcome(d.enqueue) for _ in range(2)] for d in devices])

    refusals = [each.token for two in outcomes for each in two if isinstance(each, Refusal)]
    assert refusals == [token] * (40 - accepted)
    assert alice.credits() == 25 - accepted
    assert_books_balance(db)


def test_the_same_key_and_payload_answer_the_same_and_charge_nothing(db, alice, bob):
    request = {"prompt": "a lighthouse", "params": {"seed": 7}, "idempotency_key": "k"}
    devices = [alice.on_another_device() for _ in range(30)]

    first, *others = together([lambda d=d: d.enqueue(**request) for d in devices])

    assert others == [first] * 29
    assert alice.ledger() == [("grant", 10), ("charge", -1)]
    for change in (
        {"prompt": "another"},
        {"params": {"seed": 8}},
        {"params": {}},
        {"model": "black-forest-labs/flux-dev"},
    ):
        with unchanged(db), refused("PT409", "idempotency_conflict"):
            alice.enqueue(**request | change)
    assert bob.enqueued(**request) != first["job_id"]


def test_a_repeat_is_answered_whatever_the_limits_say_by_now(db, alice, worker):
    alice.has(credits=1)
    first = alice.enqueue(idempotency_key="k", max_price_credits=1)
    db.execute("update private.plans set max_per_minute = 1, max_active = 1")
    db.execute("update public.models set is_active = false, price_credits = 2")

    assert alice.enqueue(idempotency_key="k", max_price_credits=1) == first

    worker.complete_job(worker.claimed())
    again = alice.enqueue(idempotency_key="k")
    assert (again["job_id"], again["status"]) == (first["job_id"], "completed")
    assert (again["queue_position"], again["poll_after_ms"]) == (None, None)


TWO = {"params": {"num_outputs": 2}}
WAYS_IN = {
    "enqueue": lambda user, seen: user.enqueue(max_price_credits=seen, **TWO),
    "batch": lambda user, seen: user.enqueue_batch(["a", "b"], max_price_credits=seen, **TWO),
    "retry": lambda user, seen: user.retry_generation(failed(user), max_price_credits=seen),
}


def failed(user):
    """What the user asked for when it cost nothing, and failed."""
    (job_id,) = user.db.execute("select id from public.generations where status = 'failed'")
    return job_id["id"]


@pytest.mark.parametrize("way", WAYS_IN)
def test_no_generation_costs_more_than_the_price_that_was_seen(db, alice, worker, way):
    db.execute("update public.models set price_credits = 0")
    alice.enqueue(**TWO)
    worker.fail_job(worker.claimed(), "moderated")
    db.execute("update public.models set price_credits = 2, paid_price_credits = 1")
    for credits in (10, 3):  # the second time there are too few of them as well
        alice.has(credits=credits)
        for seen in (3, 0, -1):
            with unchanged(db), refused("PT409", "price_changed") as refusal:
                WAYS_IN[way](alice, seen)
            assert refusal.detail == f"the price is 4, seen was {seen}"
            assert "list_models()" in refusal.refusal.hint
    alice.has(credits=10)
    with unchanged(db), refused("PT400", "invalid_input"):
        alice.enqueue(params={"num_outputs": 99}, max_price_credits=0)

    taken = WAYS_IN[way](alice, 4)["credits_left"]
    assert taken == (2 if way == "batch" else 6)
    alice.has_paid()  # the price of whose plan has changed pays that
    assert alice.enqueue(max_price_credits=2, **TWO)["credits_left"] == taken - 2
    assert_books_balance(db)


def test_the_key_of_a_deleted_job_is_not_found_until_it_is_restored_or_erased(db, alice, worker):
    job_id = alice.enqueued(idempotency_key="k")
    worker.complete_job(worker.claimed())
    alice.delete_generation(job_id)

    with unchanged(db), refused("PT404", "not_found") as refusal:
        alice.enqueue(idempotency_key="k")
    assert refusal.detail == "idempotency_key: its job was deleted"

    alice.restore_generation(job_id)
    assert alice.enqueued(idempotency_key="k") == job_id

    db.execute("delete from public.generations where id = %s", job_id)
    assert alice.enqueued(idempotency_key="k") != job_id
