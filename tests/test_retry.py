"""sql/54_retry.sql: a failed or canceled generation again, by its user or by the operator."""

import pytest
from actors import outcome, refused, together
from database import assert_books_balance, unchanged


@pytest.fixture
def failed(alice, worker):
    """Make jobs of alice that failed; return the id."""

    def fail(code="moderated", **rest):
        job_id = alice.enqueued(**rest)
        worker.fail_job(worker.claimed(), code)
        return job_id

    return fail


def test_a_retry_is_a_new_job_charged_anew(db, alice, failed, worker):
    old = failed(prompt="a lighthouse", params={"width": 512, "num_outputs": 2})

    answer = alice.retry_generation(old)

    assert (answer["status"], answer["credits_left"]) == ("queued", 8)
    new = alice.get_job_status(answer["job_id"])
    assert (new["prompt"], new["params"]) == ("a lighthouse", {"width": 512, "num_outputs": 2})
    assert alice.get_job_status(old)["status"] == "failed"
    assert db.value("select retry_of from public.generations where id = %s", new["job_id"])
    worker.complete_job(worker.claimed(), images=2)
    assert_books_balance(db)


def test_a_new_seed_is_drawn_and_a_given_one_kept(alice, failed, worker):
    for params, same in (({}, False), ({"seed": 7}, True)):
        failed_id = failed(params=params)
        alice.retry_generation(failed_id)
        job = worker.claimed()
        seeds = {
            alice.db.value(
                "select provider_input ->> 'seed' from public.generations where id = %s", each
            )
            for each in (failed_id, job.id)
        }
        assert (len(seeds) == 1) == same
        worker.complete_job(job)


def test_a_canceled_one_may_be_retried(alice):
    job_id = alice.enqueued()
    alice.cancel_generation(job_id)

    assert alice.retry_generation(job_id)["status"] == "queued"


def test_a_double_tap_buys_once(db, alice, failed, worker):
    old = failed()
    devices = [alice.on_another_device() for _ in range(8)]

    answers = together([lambda d=each: d.retry_generation(old) for each in devices])

    assert len({answer["job_id"] for answer in answers}) == 1
    assert alice.credits() == 9
    worker.complete_job(worker.claimed())
    with unchanged(db):
        assert alice.retry_generation(old)["status"] == "completed"


def test_when_the_retry_failed_too_the_old_one_may_be_retried_again(alice, failed, worker):
    old = failed()
    first = alice.retry_generation(old)["job_id"]
    worker.fail_job(worker.claimed(), "moderated")

    assert alice.retry_generation(old)["job_id"] != first


def test_what_has_not_failed_is_not_retried(db, alice, worker):
    job_id = alice.enqueued()
    with unchanged(db), refused("PT409", "not_finished"):
        alice.retry_generation(job_id)

    worker.complete_job(worker.claimed())
    with unchanged(db), refused("PT409", "already_finished"):
        alice.retry_generation(job_id)


def test_a_retry_passes_the_same_gates(db, alice, failed):
    old = failed()
    alice.has(credits=0)
    with unchanged(db), refused("PT402"):
        alice.retry_generation(old)

    alice.has(credits=10)
    for _ in range(3):
        alice.enqueue()
    with unchanged(db), refused("PT429", "too_many_active"):
        alice.retry_generation(old)

    db.execute("update public.models set is_active = false")
    with unchanged(db), refused("PT404"):
        alice.retry_generation(old)


def test_another_users_job_is_not_found(db, bob, failed):
    old = failed()

    with unchanged(db), refused("PT404", "not_found"):
        bob.retry_generation(old)


# The operator's.


def test_redrive_queues_what_failed_with_a_code_since_a_time_free_and_once(
    db, alice, service, failed, worker
):
    wanted = failed("result_lost", params={"num_outputs": 2})
    for _ in range(2):  # three attempts in all
        db.pass_time("61 seconds")
        worker.fail_job(worker.claimed(), "result_lost")
    failed("moderated")
    assert alice.credits() == 10

    assert service.redrive_failed("result_lost", "-infinity") == 1
    assert service.redrive_failed("result_lost", "-infinity") == 0

    job = worker.claimed()
    assert str(db.value("select retry_of from public.generations where id = %s", job.id)) == wanted
    sent = "select provider_input from public.generations where id = %s"
    assert db.value(sent, job.id) == db.value(sent, wanted)
    worker.complete_job(job, images=2)
    assert alice.credits() == 10
    assert alice.get_job_status(job.id)["price_credits"] == 0
    assert_books_balance(db)


def test_redrive_leaves_alone_what_failed_earlier(db, service, failed):
    failed()
    db.pass_time("1 hour")

    assert service.redrive_failed("moderated", "now") == 0
    assert service.redrive_failed("moderated", "yesterday") == 1


def test_redrive_takes_no_more_than_it_is_told(db, alice, service, failed):
    for _ in range(3):
        failed()

    assert service.redrive_failed("moderated", "-infinity", at_most=2) == 2
    assert service.redrive_failed("moderated", "-infinity") == 1
    assert alice.get_entitlement()["active_jobs"] == 3
    assert_books_balance(db)


def test_redrive_and_retry_at_once_make_one_job(db, alice, service, failed):
    old = failed()

    together(
        [
            lambda: outcome(lambda: service.redrive_failed("moderated", "-infinity")),
            lambda: outcome(lambda: alice.retry_generation(old)),
        ]
    )

    assert alice.get_entitlement()["active_jobs"] == 1
    assert_books_balance(db)


@pytest.mark.parametrize(
    "arguments", [("no_such_code", "now"), ("moderated", None), ("moderated", "now", 0)]
)
def test_redrive_refuses_what_it_does_not_know(db, service, arguments):
    code, since, *rest = arguments
    with unchanged(db), refused("PT400", "invalid_input"):
        service.redrive_failed(code, since, **({"at_most": rest[0]} if rest else {}))


def test_a_retry_that_its_user_deleted_is_made_again(alice, failed, worker):
    old = failed()
    first = alice.retry_generation(old)["job_id"]
    worker.complete_job(worker.claimed())
    alice.delete_generation(first)

    again = alice.retry_generation(old)

    assert (again["job_id"] != first, again["status"]) == (True, "queued")
