"""Real worker processes whose jobs are canceled: told within a second, stopped at the provider."""

import time

import fake_replicate
import pytest
from actors import User
from worker_process import Workers, eventually

SCHNELL = "black-forest-labs/flux-schnell"
SLOW = {"PREVIEW_SECONDS": 60, "WORKER_POLL_SECONDS": 60}

fake = fake_replicate.fake_replicate


@pytest.fixture
def workers(db, stack, tmp_path, fake):
    """Starts workers that know the fake provider."""
    db.execute("update public.models set is_active = true")
    with Workers(db, stack, tmp_path) as workers:
        workers.environment |= {"REPLICATE_API_URL": fake.url, "REPLICATE_API_TOKEN": fake.token}
        yield workers


def test_a_running_job_is_canceled_within_a_second(db, alice, workers):
    process = workers.start(**SLOW)
    workers.until_asleep(process)
    job_id = alice.enqueued()
    eventually(lambda: workers.checkpointed(job_id))

    alice.cancel_generation(job_id)
    asked = time.monotonic()
    workers.until(job_id, "canceled")

    assert time.monotonic() - asked < 1
    assert workers.outcomes(job_id) == ["canceled"]
    assert alice.credits() == 10
    process.logged(f"job.canceled job={job_id}")


def test_the_provider_is_told_to_stop_and_the_slot_is_free(db, alice, workers, fake):
    fake.next(seconds=60)
    process = workers.start(WORKER_SLOTS=1)
    job_id = alice.enqueued(model=SCHNELL)
    eventually(lambda: workers.checkpointed(job_id))

    alice.cancel_generation(job_id)
    workers.until(job_id, "canceled")

    (prediction,) = fake.predictions.values()
    assert prediction["status"] == "canceled"
    seconds = db.value("select provider_seconds from private.attempts")
    assert seconds == pytest.approx(prediction["metrics"]["predict_time"])  # it bills them
    workers.until(alice.enqueued(), "completed")
    assert process.is_running()


def test_a_cancel_during_the_create_stops_what_it_buys(db, alice, workers, fake):
    fake.next(slow={"create": 1}, seconds=60)
    workers.start()
    job_id = alice.enqueued(model=SCHNELL)
    fake.until(lambda: fake.creates)

    alice.cancel_generation(job_id)
    workers.until(job_id, "canceled")

    assert [each["status"] for each in fake.predictions.values()] == ["canceled"]


def test_a_purchase_whose_answer_was_lost_is_stopped_too(db, alice, workers, fake):
    fake.next(answer=None, stored=True, seconds=60)
    workers.start()
    job_id = alice.enqueued(model=SCHNELL)
    eventually(lambda: workers.checkpointed(job_id))

    alice.cancel_generation(job_id)
    workers.until(job_id, "canceled")

    assert [each["status"] for each in fake.predictions.values()] == ["canceled"]


def test_without_listen_the_next_heartbeat_tells(db, alice, workers):
    db.execute("update private.settings set heartbeat = '1 second'")
    process = workers.start(**SLOW)
    job_id = alice.enqueued()
    eventually(lambda: workers.checkpointed(job_id))

    db.execute("update private.running_jobs set cancel_requested = true")  # no NOTIFY

    workers.until(job_id, "canceled", within=5)
    assert process.is_running()


def test_a_worker_killed_before_it_could_cancel_leaves_it_to_recovery(db, alice, workers):
    process = workers.start(**SLOW)
    job_id = alice.enqueued()
    eventually(lambda: workers.checkpointed(job_id))
    process.kill()

    alice.cancel_generation(job_id)
    workers.backdate_leases()
    workers.start()

    workers.until(job_id, "canceled")
    assert alice.credits() == 10


def test_a_whole_batch_is_canceled_and_others_go_on(db, workers):
    db.lift_limits()
    alice, bob = User(db).has(credits=20), User(db)
    workers.start(WORKER_SLOTS=4, **SLOW)
    batch = alice.enqueue_batch([f"picture {n}" for n in range(3)])
    other = bob.enqueued()
    for job_id in [*batch["job_ids"], other]:
        eventually(lambda j=job_id: workers.checkpointed(j))

    alice.cancel_batch(batch["batch_id"])

    for job_id in batch["job_ids"]:
        workers.until(job_id, "canceled")
    assert workers.status(other) == "processing"
    bob.cancel_generation(other)
    workers.until(other, "canceled")


def test_progress_is_seen_while_the_job_runs_and_costs_few_beats(db, alice, workers):
    process = workers.start(PREVIEW_SECONDS=4)
    job_id = alice.enqueued()

    seen = set()

    def finished():
        state = alice.get_job_status(job_id)
        seen.add(state["progress"])
        return state["status"] == "completed"

    eventually(finished)
    assert len(seen - {None, 0}) >= 2
    assert process.is_running()


def test_who_cancels_before_this_attempt_has_bought_anything_pays_nothing(db, alice, workers, fake):
    db.execute("update private.settings set running_cancel_refund_percent = 0")
    job_id = alice.enqueued(model=SCHNELL)
    db.execute("update private.ready_jobs set create_started_at = now() - interval '1 minute'")
    workers.start(REPLICATE_SETTLE_SECONDS=60)
    fake.until(
        lambda: "GET" in {each.method for each in fake.requests}
    )  # it looks for what an earlier attempt may have bought

    alice.cancel_generation(job_id)
    workers.until(job_id, "canceled")

    assert (alice.credits(), fake.creates) == (10, [])


def test_who_cancels_what_was_bought_pays_the_operators_share(db, alice, workers, fake):
    db.execute("update private.settings set running_cancel_refund_percent = 0")
    fake.next(seconds=60)
    workers.start()
    job_id = alice.enqueued(model=SCHNELL)
    eventually(lambda: workers.checkpointed(job_id))

    alice.cancel_generation(job_id)
    workers.until(job_id, "canceled")

    query = "select credits, day_burned from public.entitlements where user_id = %s"
    assert db.row(query, alice.id) == {"credits": 9, "day_burned": 1}
