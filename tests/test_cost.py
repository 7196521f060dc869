"""What is charged where nobody knows how many images come; what attempts cost."""

import uuid
from decimal import Decimal

import pytest
from actors import PREVIEW, Worker
from database import assert_books_balance
from psycopg.types.json import Jsonb

BILLED = {"provider_seconds": 2.5, "images": 2}


@pytest.fixture
def costs(db):
    """Return outcome, provider seconds and cost of each attempt, at 0.01 dollars a second."""
    db.execute("update public.models set cost_usd = 0.01, cost_unit = 'second'")
    query = "select outcome, provider_seconds, cost_usd from private.attempts order by token"
    return lambda: [tuple(row.values()) for row in db.execute(query)]


@pytest.mark.parametrize(
    "rule",
    [None, {"type": "string", "enum": ["auto", "1"], "default": "auto"}, {"type": "integer"}],
    ids=["no input says it", "auto", "no default"],
)
def test_where_nobody_knows_how_many_images_come_the_most_is_charged(db, alice, worker, rule):
    db.execute(
        "update public.models set"
        " image_inputs = '{}', image_count_input = %s, client_inputs = %s, input_schema = %s",
        "n" if rule else None,
        ["n"] if rule else [],
        Jsonb({"properties": {"prompt": {"type": "string"}} | ({"n": rule} if rule else {})}),
    )

    job_id = alice.enqueued()

    assert alice.credits() == 6
    worker.complete_job(worker.claimed(), images=3)
    assert alice.get_job_status(job_id)["refunded_credits"] == 1
    assert alice.credits() == 7
    assert_books_balance(db)


@pytest.mark.parametrize(
    ("code", "metrics", "booked"),
    [
        ("internal", BILLED, (None, None)),  # the next attempt resumes what was bought
        ("provider_error", BILLED, (2.5, Decimal("0.025"))),  # the next one buys anew
        ("provider_error", BILLED | {"is_billed": False}, (2.5, Decimal(0))),
        ("provider_error", {}, (None, None)),
    ],
)
def test_what_each_attempt_bought_is_booked_once(alice, costs, code, metrics, booked):
    alice.enqueue()
    worker = Worker(alice.db)
    worker.fail_job(worker.claimed(), code, metrics=metrics)
    alice.db.pass_time("61 seconds")
    worker.heartbeat()
    job = worker.claimed()
    alice.cancel_generation(job.id)

    worker.cancel_job(job, BILLED)

    assert costs() == [("retried", *booked), ("canceled", 2.5, Decimal("0.025"))]


def test_of_each_day_model_and_user_it_is_told_what_they_cost_and_earned(db, alice, bob, costs):
    db.execute("update private.settings set credit_usd = 0.05")
    alice.enqueue(params={"num_outputs": 3})
    worker = Worker(db)
    worker.complete_job(worker.claimed(), 2, {"provider_seconds": 4, "images": 2})
    db.pass_time("1 day")
    bob.enqueue()
    worker = Worker(db)
    job = worker.claimed()
    db.buys_previews()
    worker.checkpoint(job, "asked-and-not-told-what-it-costs")
    worker.fail_job(job, "moderated")

    today, yesterday = db.execute("select * from private.costs order by day desc")

    assert (today.pop("day") - yesterday.pop("day")).days == 1
    assert yesterday == {
        **{"user_id": uuid.UUID(alice.id), "model_id": PREVIEW, "attempts": 1, "completed": 1},
        **{"images": 2, "provider_seconds": 4, "cost_usd": Decimal("0.04"), "unknown_costs": 0},
        **{"credits_charged": 3, "credits_refunded": 1, "margin_usd": Decimal("0.06")},
    }
    assert today == {
        **{"user_id": uuid.UUID(bob.id), "model_id": PREVIEW, "attempts": 1, "completed": 0},
        **{"images": 0, "provider_seconds": 0, "cost_usd": 0, "unknown_costs": 1},
        **{"credits_charged": 1, "credits_refunded": 1, "margin_usd": 0},
    }
    db.execute("update private.settings set credit_usd = null")
    assert {row["margin_usd"] for row in db.execute("select * from private.costs")} == {None}
