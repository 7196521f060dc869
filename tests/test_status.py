"""What users read of their jobs, of what they may, and of the catalogue."""

from __future__ import annotations

import json
import uuid

import pytest
from actors import PREVIEW, Worker, refused


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

    assert [(job["job_id"], job["status"]) for job in jobs] == [
        (queued, "queued"),
        (running, "processing"),
    ]
    assert jobs[0] == alice.get_job_status(queued)
    assert asked == [*jobs, alice.get_job_status(ended)]


def test_the_list_takes_a_hundred_ids_and_no_more(alice):
    assert alice.list_active_jobs(*[str(uuid.uuid4())] * 100) == []

    with refused("PT400", "invalid_input"):
        alice.list_active_jobs(*[str(uuid.uuid4())] * 101)
    with refused("PT400", "invalid_input"):
        alice.call("public.list_active_jobs", job_ids=[[uuid.uuid4()], [uuid.uuid4()]])


def test_the_entitlement_shows_plan_balance_limits_and_use(db, alice):
    alice.enqueue()
    used = {"user_id": alice.id, "credits": 9, "active_jobs": 1, "minute_jobs": 1, "is_busy": False}
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
