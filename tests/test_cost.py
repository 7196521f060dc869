"""What is charged where nobody knows how many images come; what attempts cost, and costs."""

from decimal import Decimal

import pytest
from actors import PREVIEW, Worker
from database import assert_books_balance, unchanged
from models import URI, import_model, replicate_model
from psycopg.types.json import Jsonb

PROMPT = {"prompt": {"type": "string"}}
BILLED = {"provider_seconds": 2.5, "images": 2}
FREE = {"provider_seconds": 2.5, "is_billed": False}


@pytest.fixture
def priced(db):
    """The preview model costs 0.01 dollars a second, and a credit earns 0.05."""
    db.execute("update public.models set cost_usd = 0.01, cost_unit = 'second'")
    db.execute("update private.settings set credit_usd = 0.05")


def costs(db) -> list[tuple[str, float | None, Decimal | None]]:
    """Return outcome, provider seconds and cost of each attempt."""
    rows = db.execute(
        "select outcome, provider_seconds, cost_usd from private.attempts order by token"
    )
    return [(row["outcome"], row["provider_seconds"], row["cost_usd"]) for row in rows]


# --- what is charged ---


@pytest.mark.parametrize(
    "rule",
    [None, {"type": "string", "enum": ["auto", "1"], "default": "auto"}, {"type": "integer"}],
    ids=["no input says it", "auto", "no default"],
)
def test_where_nobody_knows_how_many_images_come_the_most_is_charged(db, alice, worker, rule):
    db.execute(
        "update public.models set"
        " image_inputs = '{}', image_count_input = %s, client_inputs = %s, input_schema = %s"
        " where id = %s",
        "n" if rule else None,
        ["n"] if rule else [],
        Jsonb({"properties": PROMPT | ({"n": rule} if rule else {})}),
        PREVIEW,
    )

    job_id = alice.enqueued()

    assert alice.credits() == 6
    worker.complete_job(worker.claimed(), images=3)
    assert alice.get_job_status(job_id)["refunded_credits"] == 1
    assert alice.credits() == 7
    assert_books_balance(db)


def test_what_the_client_says_is_charged_where_it_counts(alice):
    alice.enqueue(params={"num_outputs": 3})

    assert alice.credits() == 7


def test_a_model_that_takes_its_count_from_the_operator_is_charged_for_one_image(db):
    count = {"num_outputs": {"type": "integer", "maximum": 4}}
    import_model(db, replicate_model(PROMPT | count), operator_input={"num_outputs": 2})

    model = db.row("select * from public.models where id = 'somebody/a-model'")
    assert (model["image_count_input"], model["max_images"]) == (None, 1)


def test_importing_again_keeps_the_number_of_images_an_operator_reserves(db):
    model = replicate_model(PROMPT, output={"type": "array", "items": URI})
    import_model(db, model, max_images=6)

    assert import_model(db, model) == {}


# --- what attempts cost ---


@pytest.mark.parametrize(
    ("metrics", "booked"),
    [
        (BILLED, (2.5, Decimal("0.025"))),
        (FREE, (2.5, Decimal(0))),
        ({}, (None, None)),
        (None, (None, None)),
    ],
    ids=["billed", "free", "unknown", "not said"],
)
@pytest.mark.usefixtures("priced")
def test_a_failed_attempt_costs_what_the_provider_bills_for_it(db, alice, worker, metrics, booked):
    alice.enqueue()

    worker.fail_job(worker.claimed(), "moderated", metrics=metrics)

    assert costs(db) == [("failed", *booked)]
    assert alice.credits() == 10


def test_what_a_retry_resumes_is_booked_once(db, alice, worker, priced):
    alice.enqueue()
    worker.fail_job(worker.claimed(), "internal", metrics=BILLED)
    db.pass_time("61 seconds")
    worker.heartbeat()

    worker.complete_job(worker.claimed(), 1, BILLED)

    assert costs(db) == [("retried", None, None), ("completed", 2.5, Decimal("0.025"))]


def test_what_a_retry_buys_anew_is_booked_twice(db, alice, worker, priced):
    alice.enqueue()
    worker.fail_job(worker.claimed(), "provider_error", metrics=BILLED)
    db.pass_time("61 seconds")
    worker.heartbeat()

    worker.complete_job(worker.claimed(), 1, BILLED)

    assert [cost for *_, cost in costs(db)] == [Decimal("0.025")] * 2


@pytest.mark.parametrize("end", ["cancel", "fail"])
def test_a_canceled_attempt_costs_the_seconds_it_ran(db, alice, worker, priced, end):
    job_id = alice.enqueued()
    job = worker.claimed()
    alice.cancel_generation(job_id)

    if end == "cancel":
        worker.cancel_job(job, BILLED)
        with unchanged(db):
            worker.cancel_job(job, BILLED)
    else:
        worker.fail_job(job, "timeout", metrics=BILLED)

    assert costs(db) == [("canceled", 2.5, Decimal("0.025"))]


# --- the view ---


@pytest.fixture
def history(db, alice, bob, worker, priced):
    """Two days: alice has two images, of one charged a third was not made; bob's job failed."""
    db.lift_limits()
    worker = Worker(db)
    alice.enqueue(params={"num_outputs": 3})
    job = worker.claimed()
    worker.checkpoint(job, "prediction-1")
    worker.complete_job(job, 2, {"provider_seconds": 4, "images": 2})
    db.pass_time("1 day")
    bob.enqueue()
    worker = Worker(db)
    job = worker.claimed()
    worker.checkpoint(job, "prediction-2")
    worker.fail_job(job, "moderated")


def test_each_day_and_model_shows_what_it_cost_and_earned(db, history):
    today, yesterday = db.execute("select * from private.costs order by day desc")

    assert (today["day"] - yesterday["day"]).days == 1
    del today["day"], yesterday["day"], today["user_id"], yesterday["user_id"]
    assert yesterday == {
        "model_id": PREVIEW,
        "attempts": 1,
        "completed": 1,
        "images": 2,
        "provider_seconds": 4,
        "cost_usd": Decimal("0.04"),
        "unknown_costs": 0,
        "credits_charged": 3,
        "credits_refunded": 1,
        "margin_usd": Decimal("0.06"),
    }
    assert today == {
        "model_id": PREVIEW,
        "attempts": 1,
        "completed": 0,
        "images": 0,
        "provider_seconds": 0,
        "cost_usd": 0,
        "unknown_costs": 1,  # it asked the provider, and nobody said what that cost
        "credits_charged": 1,
        "credits_refunded": 1,
        "margin_usd": 0,
    }


def test_each_user_shows_what_they_cost_and_paid(db, alice, bob, history):
    rows = db.execute(
        "select user_id::text, sum(images) as images, sum(cost_usd) as cost_usd,"
        " sum(margin_usd) as margin_usd from private.costs group by user_id order by cost_usd desc"
    )

    assert [tuple(row.values()) for row in rows] == [
        (alice.id, 2, Decimal("0.04"), Decimal("0.06")),
        (bob.id, 0, 0, 0),
    ]


def test_without_the_worth_of_a_credit_there_is_no_margin(db, history):
    db.execute("update private.settings set credit_usd = null")

    margins = db.execute("select margin_usd from private.costs")

    assert {row["margin_usd"] for row in margins} == {None}
