"""What users read of their jobs and when those likely end, of what they may, and of models."""

from __future__ import annotations

import json

import pytest
from actors import PREVIEW, User, Worker, refused
from database import Database

SLOW = "test/slow"


def test_a_job_tells_its_place_and_then_stage_progress_and_attempt(db, alice, bob, worker):
    bob.enqueue()
    bob.enqueue()
    job_id = alice.enqueued("a lighthouse", params={"seed": 7}, idempotency_key="the device's")

    job = alice.get_job_status(job_id)
    assert (job["status"], job["attempt"]) == ("queued", 0)
    assert job["queue_position"] == 1  # behind bob's first: the users take turns
    assert (job["prompt"], job["params"]) == ("a lighthouse", {"seed": 7})
    assert (job["model"], job["price_credits"], job["alias"]) == (PREVIEW, 1, None)
    assert (job["images"], job["error"], job["started_at"]) == ([], None, None)
    assert job["idempotency_key"] == "the device's"

    running = next(each for each in worker.claim_jobs(3) if each.id == job_id)
    worker.report_progress(running, "storing", 80)
    job = alice.get_job_status(job_id)
    assert (job["status"], job["stage"], job["progress"]) == ("processing", "storing", 80)
    assert (job["queue_position"], job["attempt"]) == (None, 1)
    assert job["started_at"] is not None
    assert job["cancel_requested"] is False
    alice.cancel_generation(job_id)
    assert alice.get_job_status(job_id)["cancel_requested"] is True


def test_a_completed_job_shows_its_images_in_order(alice, worker):
    job_id = alice.enqueued(params={"num_outputs": 2})
    job = worker.claimed()
    preview = f"{alice.id}/{job_id}/0.preview.webp"
    first = job.image(0, preview_path=preview, blurhash="L6Pj0^", width=65)
    worker.complete_job(job, [job.image(1), first])

    status = alice.get_job_status(job_id)

    assert (status["status"], status["stage"], status["poll_after_ms"]) == ("completed", None, None)
    assert [image["position"] for image in status["images"]] == [0, 1]
    stored = {key: first[key] for key in first.keys() - {"storage_path"}}
    assert status["images"][0] == stored | {
        "path": f"{alice.id}/{job_id}/0.png",
        "is_public": False,
    }
    assert status["finished_at"] is not None


def test_a_failed_job_shows_what_was_asked_what_went_wrong_and_the_refund(alice, worker):
    job_id = alice.enqueued("a lighthouse", params={"seed": 7})
    worker.fail_job(worker.claimed(), "moderated", "NSFW: score 0.99")

    job = alice.get_job_status(job_id)

    assert (job["status"], job["prompt"], job["params"]) == ("failed", "a lighthouse", {"seed": 7})
    assert job["error"] == {
        "code": "moderated",
        "message": "The safety filter refused this picture. Try another prompt.",
    }
    assert (job["price_credits"], job["refunded_credits"]) == (1, 1)
    assert "NSFW" not in json.dumps(job)
    again = alice.retry_generation(job_id)["job_id"]
    assert alice.get_job_status(again)["retry_of"] == job_id


@pytest.mark.parametrize(
    ("age", "due", "milliseconds"),
    [
        ("0", 600, 10000),
        ("0", 20, 8000),
        ("90 seconds", 2, 3000),  # the end is near, though it took long
        ("1 hour", -2, 10000),  # overdue, who knows for how long
        ("1 second", None, 1000),
        ("10 seconds", None, 5000),
    ],
)
def test_a_job_is_polled_more_often_as_its_end_comes_near(db, age, due, milliseconds):
    query = "select private.poll_after_ms(now() - %s::interval, %s)"

    assert db.value(query, age, due) == pytest.approx(milliseconds, abs=300)


def test_the_list_is_of_active_jobs_newest_first_and_of_those_asked_for(alice, bob, worker):
    assert alice.list_active_jobs() == []
    ended = alice.enqueued()
    worker.complete_job(worker.claimed())
    deleted, running = alice.enqueued(), alice.enqueued()
    alice.cancel_generation(deleted)
    alice.delete_generation(deleted)
    worker.claimed()
    queued, others = alice.enqueued(), bob.enqueued()

    jobs = alice.list_active_jobs()
    asked = alice.list_active_jobs(ended, deleted, queued, others)
    with refused("PT400", "invalid_input"):
        alice.list_active_jobs(*[queued] * 101)

    assert [(job["job_id"], job["status"]) for job in jobs] == [
        (queued, "queued"),
        (running, "processing"),
    ]
    assert jobs[0] == alice.get_job_status(queued)
    assert asked == [*jobs, alice.get_job_status(ended)]


def test_the_entitlement_shows_plan_balance_limits_and_use(db, alice):
    alice.enqueue()
    used = {"user_id": alice.id, "credits": 9, "active_jobs": 1, "minute_jobs": 1, "is_busy": False}
    used |= {"debt": 0, "credits_ending": []}
    free = {"plan": "free", "paid_until": None, "max_active": 3, "max_per_minute": 10}
    assert alice.get_entitlement() == used | free | {"max_batch": 3}

    db.pass_time("61 seconds")
    paid = {"plan": "paid", "paid_until": "infinity", "max_active": 20, "max_per_minute": 60}
    told = alice.has_paid().get_entitlement()
    assert told.items() >= (used | paid | {"minute_jobs": 0}).items()


def test_the_catalogue_lists_active_models_with_the_inputs_of_clients(anon):
    (model,) = anon.list_models()

    inputs = model.pop("inputs")
    prices = {"price_credits": 1, "paid_price_credits": 0, "requires_paid": False}
    assert model == prices | {
        "id": "darkroom/preview",
        "title": "Preview (placeholder pictures)",
        "paused_until": None,
        "max_images": 4,
        "image_inputs": ["image"],
    }
    assert set(inputs) == {"image", "width", "height", "seed", "num_outputs"}
    assert inputs["width"] == {"type": "integer", "minimum": 64, "maximum": 2048, "default": 1024}


@pytest.mark.parametrize("question", ["list_active_jobs()", "list_generations(page_size => 100)"])
def test_a_list_looks_at_the_queue_once_and_tells_of_each_job_as_alone(db, alice, bob, question):
    db.lift_limits()
    worker = Worker(db, slots=2)
    db.execute("insert into private.model_stats values (%s, 8, 10, 0, null, now())", PREVIEW)
    for user in (alice, bob):
        user.has(credits=100)
        for _ in range(40):
            user.enqueue()
    worker.fail_job(worker.claimed(), "provider_busy", retry_after=100)
    worker.claim_jobs(2)
    read = "select idx_tup_fetch + seq_tup_read from pg_stat_xact_user_tables where relname = %s"

    with alice.on_another_device().acting() as connection:
        jobs = connection.execute(f"select public.{question}").fetchone()[0]
        (rows,) = connection.execute(read, ["ready_jobs"]).fetchone()

    jobs = jobs if isinstance(jobs, list) else jobs["generations"]
    alone = [alice.get_job_status(job["job_id"]) for job in jobs]
    assert [job["queue_position"] for job in jobs] == [job["queue_position"] for job in alone]
    assert [job["eta_seconds"] for job in jobs] == pytest.approx(
        [job["eta_seconds"] for job in alone], abs=1
    )
    assert len({job["queue_position"] for job in jobs}) > 30
    assert rows < 5 * 80, "for each of forty jobs it would be thousands"


# When a job is likely to end.


def measured(db: Database, seconds: float, model: str = PREVIEW, rate: float = 0) -> None:
    """Have attempts of this model on record, as the statistics hold them; it may be a new one."""
    db.execute(
        "insert into public.models select (jsonb_populate_record(m, jsonb_build_object("
        " 'id', %s::text))).* from public.models as m where id = %s on conflict do nothing",
        model,
        PREVIEW,
    )
    db.execute(
        "insert into private.model_stats (model_id, mean_seconds, sample_count,"
        " requests_per_second, queue_distance, refreshed_at) values (%s, %s, 10, %s, 1000, now())",
        model,
        seconds,
        rate,
    )


def etas(user: User) -> list[float | None]:
    """Return the ETA of each of the user's active jobs, oldest first."""
    return [job["eta_seconds"] for job in reversed(user.list_active_jobs())]


def test_it_is_not_known_without_measurements_or_a_live_worker(db, alice):
    worker = Worker(db, slots=1)
    alice.enqueue()
    assert etas(alice) == [None]
    measured(db, 8)
    assert etas(alice) == [8]

    db.pass_time("61 seconds")
    assert etas(alice) == [None]
    worker.heartbeat()
    assert etas(alice) == [8]


def test_jobs_share_the_slots_in_the_order_they_will_be_claimed(db, alice, bob):
    db.lift_limits()
    measured(db, 8)
    Worker(db, slots=2)
    for _ in range(5):
        alice.enqueue()
    bob.enqueue()

    assert etas(alice) == [8, 16, 16, 24, 24]
    assert etas(bob) == [8]  # behind alice's first alone: the users take turns


def test_each_model_counts_with_its_own_length_and_progress_and_in_its_order(db, alice):
    db.lift_limits()
    measured(db, 2)
    measured(db, 30, SLOW)
    worker = Worker(db, slots=2)
    for model in (SLOW, PREVIEW, PREVIEW, PREVIEW):
        alice.enqueue(model=model)
    assert etas(alice) == [30, 2, 4, 6]  # the slow one keeps one slot, the quick the other

    job = worker.claimed()
    db.pass_time("10 seconds")
    worker.heartbeat()

    assert etas(alice) == pytest.approx([20, 2, 4, 6], abs=1)
    worker.report_progress(job, "generating", 20)
    assert etas(alice)[0] == pytest.approx(30, abs=1)  # between the clock's 20 and its 40
    worker.report_progress(job, "generating", 90)
    db.pass_time("50 seconds")
    assert etas(alice)[0] == pytest.approx(7.5)  # late: a quarter to go


def test_a_delay_or_a_pause_is_waited_for_unless_it_has_no_end(db, alice, bob, worker, service):
    measured(db, 8)
    alice.enqueue()
    worker.fail_job(worker.claimed(), "provider_busy", retry_after=100)
    assert etas(alice) == pytest.approx([108], abs=1)
    bob.enqueue()
    worker.pause_provider("preview", 60)
    assert etas(bob) == pytest.approx([68], abs=1)

    service.pause_model(PREVIEW)
    assert etas(bob) == [None]


def test_what_is_likely_to_be_put_before_a_job_is_counted(db, alice):
    db.lift_limits()
    worker = Worker(db, slots=1)
    measured(db, 10, rate=0.05)
    alice.enqueue()
    worker.claimed()
    for _ in range(3):
        alice.enqueue()

    *_, last = etas(alice)

    # Three slots' work of 10 s; of those 10 s in 20 of others, who will be put before two thirds.
    assert last == pytest.approx(10 + 30 / (1 - 0.5 * 2 / 3), abs=1)


def test_the_mean_takes_in_each_completed_attempt_once(db, alice, worker):
    for seconds in (10, 20):
        alice.enqueue()
        job = worker.claimed()
        db.pass_time(f"{seconds} seconds")
        worker.complete_job(job)
    alice.enqueue()
    worker.fail_job(worker.claimed(), "moderated")

    for _ in range(3):
        worker.recover_stale_jobs()
        db.pass_time("16 seconds")

    stats = db.row("select * from private.model_stats")
    assert (stats["model_id"], stats["sample_count"]) == (PREVIEW, 2)
    assert stats["mean_seconds"] == pytest.approx(15, abs=1)
    assert stats["requests_per_second"] == pytest.approx(3 / 300)
