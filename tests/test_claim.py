"""sql/72_claim.sql: jobs of a paused model or provider wait and lose neither place nor attempt."""

import pytest
from actors import PREVIEW, Worker
from database import assert_books_balance

DEV = "black-forest-labs/flux-dev"


@pytest.fixture
def rich(db, alice):
    """Alice with credits, and every model active."""
    db.execute("update public.models set is_active = true")
    db.lift_limits()
    return alice.has(credits=1000)


def in_(db, interval: str) -> str:
    """Return the time after an interval."""
    return str(db.value("select now() + %s::interval", interval))


def multiply_ready_job(db, copies: int) -> None:
    """Give the one ready job copies of later keys, each with a generation of its own."""
    db.execute("alter table public.generations disable trigger all")
    db.execute(
        "with copied as ("
        " insert into public.generations (user_id, model_id, prompt, input, provider_input,"
        "  price_credits, image_count)"
        " select user_id, model_id, prompt, input, provider_input, price_credits, image_count"
        " from public.generations cross join generate_series(1, %s) returning id, user_id, model_id"
        ") insert into private.ready_jobs (job_id, user_id, model_id, fair_key)"
        " select id, user_id, model_id, 1000000 from copied",
        copies,
    )


def test_jobs_of_a_paused_provider_wait_while_others_are_claimed(db, rich, worker):
    waiting = [rich.enqueued(model=DEV) for _ in range(3)]
    preview = rich.enqueued(model=PREVIEW)
    worker.pause_provider("replicate", 60)

    assert [job.id for job in worker.claim_jobs(2)] == [preview]
    assert worker.claim_jobs(4) == []

    states = {rich.get_job_status(job_id)["status"] for job_id in waiting}
    assert states == {"queued"}
    assert_books_balance(db)


def test_after_the_pause_they_come_back_in_their_old_order(db, rich, worker, service):
    waiting = [rich.enqueued(model=DEV) for _ in range(3)]
    service.pause_model("replicate", until=in_(db, "60 seconds"))
    worker.claim_jobs(4)
    later = [rich.enqueued(model=PREVIEW) for _ in range(2)]

    db.pass_time("61 seconds")
    jobs = worker.claim_jobs(5)

    assert [job.id for job in jobs] == waiting + later
    assert {job.attempt for job in jobs} == {1}
    assert_books_balance(db)


def test_what_two_claims_let_come_back_is_still_in_order(db, rich, worker, service):
    models = [DEV, "black-forest-labs/flux-schnell"]
    waiting = [rich.enqueued(model=models[n % 2]) for n in range(12)]
    service.pause_model("replicate")
    assert worker.claim_jobs(4) == []

    service.resume_model("replicate")
    first, second = worker, Worker(db)
    ids = [job.id for _ in range(3) for w in (first, second) for job in w.claim_jobs(2)]

    assert ids == waiting


def test_what_waited_far_below_the_clock_comes_back_at_once(db, rich, worker, service):
    first = rich.enqueued(model=DEV)
    service.pause_model(DEV)
    worker.claim_jobs(1)
    db.execute("select setval('private.virtual_clock', 1000000000)")
    later = rich.enqueued(model=PREVIEW)

    service.resume_model(DEV)

    assert [worker.claimed().id, worker.claimed().id] == [first, later]


def test_a_canceled_job_does_not_come_back(db, rich, worker, service):
    job_id = rich.enqueued(model=DEV)
    service.pause_model(DEV)
    worker.claim_jobs(1)

    rich.call("public.cancel_generation", job_id=job_id)
    service.resume_model(DEV)

    assert worker.claim_jobs(1) == []
    assert_books_balance(db)


def test_a_retry_of_a_paused_provider_keeps_count_and_checkpoint(db, rich, worker):
    rich.enqueue(model=DEV)
    job = worker.claimed()
    worker.checkpoint(job, "prediction-1")
    worker.fail_job(job, "internal", retry_after=0)
    worker.pause_provider("replicate", 60)
    assert worker.claim_jobs(1) == []

    db.pass_time("61 seconds")
    again = worker.claimed()

    assert (again.attempt, again.provider_job_id) == (2, "prediction-1")


def test_a_claim_names_the_inputs_to_sign(rich, worker):
    rich.enqueue(model=DEV)

    assert worker.claimed().image_inputs == ["image"]
