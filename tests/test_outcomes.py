"""sql/75_outcomes.sql: complete, fail, release, and what each does to money and attempts."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from decimal import Decimal

import psycopg
import pytest
from actors import Worker, outcome, refused, together
from database import assert_books_balance, unchanged

RETRYABLE = [
    *("provider_busy", "provider_timeout", "provider_error", "result_lost", "worker_full"),
    *("storage_unavailable", "internal"),
]
FINAL = ["moderated", "invalid_input", "timeout"]


@pytest.fixture
def job(alice, worker):
    """A running job of alice's: two images, two credits."""
    alice.enqueue("a lighthouse", params={"num_outputs": 2})
    return worker.claimed()


def attempts(db) -> list[tuple[int, str, str | None]]:
    """Return number, outcome and error code of each ended attempt."""
    rows = db.execute("select attempt, outcome, error_code from private.attempts order by token")
    return [(row["attempt"], row["outcome"], row["error_code"]) for row in rows]


def claim_again(db, worker):
    """Claim the job after any backoff."""
    db.pass_time("61 seconds")
    return worker.claimed()


def test_a_completed_job_keeps_its_price(db, alice, worker, job):
    worker.complete_job(job, 2, {"provider_seconds": 3.5})

    assert alice.get_job_status(job.id)["status"] == "completed"
    assert alice.ledger() == [("grant", 10), ("charge", -2)]
    assert attempts(db) == [(1, "completed", None)]
    assert db.value("select provider_seconds from private.attempts") == 3.5
    assert_books_balance(db)


@pytest.mark.parametrize(
    ("price", "metrics", "cost"),
    [
        ("0.003 image", {"images": 2, "provider_seconds": 3.5}, "0.006"),
        ("0.000975 second", {"images": 2, "provider_seconds": 4}, "0.0039"),
        ("0.003 image", {"provider_seconds": 3.5}, None),
        ("0.000975 second", {"images": 2}, None),
        (None, {"images": 2, "provider_seconds": 3.5}, None),
        ("0.003 image", None, None),
        ("999999 image", {"images": 40_000}, "39999960000"),
    ],
)
def test_an_attempt_costs_the_models_price_times_what_it_took(db, job, price, metrics, cost):
    cost_usd, cost_unit = price.split() if price else (None, None)
    db.execute("update public.models set cost_usd = %s, cost_unit = %s", cost_usd, cost_unit)

    Worker(db).complete_job(job, 2, metrics)

    assert db.value("select cost_usd from private.attempts") == (cost and Decimal(cost))


@pytest.mark.parametrize(
    ("metrics", "kept"),
    [
        ({"images": 1e10, "provider_seconds": 1e300}, (1_000_000, 1_000_000)),
        ({"images": -1, "provider_seconds": -1e300}, (0, 0)),
        ({"images": 1e-300, "provider_seconds": 0.5}, (0, 0.5)),
        ({"images": "NaN", "provider_seconds": "Infinity"}, (None, None)),
        ({"images": [2], "provider_seconds": {}}, (None, None)),
        ({"images": None, "provider_seconds": True}, (None, None)),
    ],
    ids=str,
)
@pytest.mark.parametrize("end", ["complete_job", "fail_job"])
def test_no_number_of_a_providers_keeps_a_job_from_ending(db, job, end, metrics, kept):
    db.execute("update public.models set cost_usd = 1, cost_unit = 'image'")
    if end == "complete_job":
        Worker(db).complete_job(job, 2, metrics)
    else:
        Worker(db).fail_job(job, "moderated", metrics=metrics)

    row = db.row("select provider_images, provider_seconds, outcome from private.attempts")
    assert (row["provider_images"], row["provider_seconds"]) == kept
    assert row["outcome"] in ("completed", "failed")


def test_images_that_were_charged_but_not_made_are_given_back(db, alice, worker, job):
    worker.complete_job(job, images=1)

    status = alice.get_job_status(job.id)
    assert (status["status"], status["refunded_credits"], len(status["images"])) == (
        "completed",
        1,
        1,
    )
    assert alice.credits() == 9
    assert_books_balance(db)


@pytest.mark.parametrize("images", [0, 3])
def test_no_images_or_too_many_do_not_complete_a_job(db, worker, job, images):
    with unchanged(db), pytest.raises(psycopg.errors.InvalidParameterValue):
        worker.complete_job(job, images=images)


def test_images_that_are_not_said_do_not_complete_a_job(db, worker, job):
    with unchanged(db), pytest.raises(psycopg.errors.InvalidParameterValue):
        worker.of_many("complete_jobs", [(job, None, None)])


@pytest.mark.parametrize(
    "change",
    [
        {"storage_path": "somebody/else/0.png"},
        {"preview_path": "somebody/else/0.webp"},
        {"content_type": "text/html"},
        {"bytes": 0},
        {"position": None},
    ],
)
def test_an_image_that_breaks_a_rule_does_not_complete_a_job(db, worker, job, change):
    with unchanged(db), pytest.raises(psycopg.errors.IntegrityError):
        worker.complete_job(job, [job.image() | change])


def test_completing_again_changes_nothing(db, worker, job):
    worker.complete_job(job, images=1)

    with unchanged(db):
        worker.complete_job(job, images=1)
        worker.complete_job(job, images=2)


@pytest.mark.parametrize("code", FINAL)
def test_what_no_retry_can_help_fails_at_once_and_is_refunded(db, alice, worker, job, code):
    assert worker.fail_job(job, code, "what the provider said") == "failed"

    status = alice.get_job_status(job.id)
    assert (status["status"], status["error"]["code"]) == ("failed", code)
    assert (status["prompt"], status["params"]) == ("a lighthouse", {"num_outputs": 2})
    assert alice.ledger() == [("grant", 10), ("charge", -2), ("refund", 2)]
    assert db.value("select error_detail from private.attempts") == "what the provider said"
    assert_books_balance(db)


@pytest.mark.parametrize("code", RETRYABLE)
def test_what_a_retry_may_help_is_queued_again(db, alice, worker, job, code):
    assert worker.fail_job(job, code) == "retried"

    status = alice.get_job_status(job.id)
    assert (status["status"], status["error"]) == ("queued", None)
    assert alice.ledger() == [("grant", 10), ("charge", -2)]
    assert attempts(db) == [(1, "retried", code)]
    assert_books_balance(db)


def test_a_job_fails_for_good_when_its_attempts_are_used_up(db, alice, worker, job):
    answers = [worker.fail_job(job, "provider_error")]
    for _ in range(2):
        answers.append(worker.fail_job(claim_again(db, worker), "provider_error"))

    assert answers == ["retried", "retried", "failed"]
    assert attempts(db) == [
        (1, "retried", "provider_error"),
        (2, "retried", "provider_error"),
        (3, "failed", "provider_error"),
    ]
    assert alice.credits() == 10
    assert_books_balance(db)


@pytest.mark.parametrize("code", ["provider_error", "internal"])
def test_failing_again_changes_nothing(db, worker, job, code):
    worker.fail_job(job, code)

    with unchanged(db):
        assert worker.fail_job(job, code) == "repeated"


@pytest.mark.parametrize("code", ["provider_busy", "worker_full", "storage_unavailable"])
def test_an_outage_costs_no_attempt(db, worker, job, code):
    for _ in range(5):
        assert worker.fail_job(job, code) == "retried"
        job = claim_again(db, worker)

    assert job.attempt == 1


def test_a_job_too_old_is_not_retried(db, alice, worker, job):
    db.pass_time("61 minutes")
    worker.heartbeat(job)

    assert worker.fail_job(job, "provider_busy") == "failed"

    assert alice.credits() == 10
    assert_books_balance(db)


@pytest.mark.parametrize(
    ("code", "resumes"),
    [
        ("provider_timeout", True),
        ("internal", True),
        ("worker_full", True),
        ("storage_unavailable", True),
        ("provider_busy", False),
        ("provider_error", False),
        ("result_lost", False),
    ],
)
def test_the_next_attempt_resumes_only_what_may_be_alive(db, worker, job, code, resumes):
    worker.checkpoint(job, "prediction-1")
    worker.fail_job(job, code)

    assert claim_again(db, worker).provider_job_id == ("prediction-1" if resumes else None)
    assert db.value("select provider_job_id from private.attempts") == "prediction-1"


@pytest.mark.parametrize("code", ["E1234", None])
def test_a_code_that_is_not_ours_is_internal_and_kept_in_the_detail(db, worker, job, code):
    worker.fail_job(job, code, "CUDA out of memory")

    row = db.row("select error_code, error_detail from private.attempts")

    assert row["error_code"] == "internal"
    assert row["error_detail"] == (f"{code}: " if code else "") + "CUDA out of memory"


@pytest.mark.parametrize(
    ("wish", "seconds"), [(7, 7), (0, 0), (-5, 0), (3600, 3600), (1e9, 3600), ("nan", 3600)]
)
def test_the_providers_wish_is_followed_up_to_an_hour(db, worker, job, wish, seconds):
    worker.fail_job(job, "provider_busy", retry_after=float(wish))

    delay = db.value(
        "select extract(epoch from coalesce(r.run_at, a.ended_at) - a.ended_at)::float"
        " from private.ready_jobs as r, private.attempts as a"
    )
    assert delay == seconds


@pytest.mark.parametrize("wish", [0, -5, -1e308, float("-inf")])
def test_a_provider_that_asks_for_no_pause_has_its_way_once(db, wish):
    query = "select extract(epoch from private.retry_delay(%s, %s))::float"

    assert db.value(query, 0, wish) == 0
    assert max(db.value(query, 5, wish) for _ in range(20)) > 3


@pytest.mark.parametrize(
    ("failures_before", "most"), [(0, 2), (1, 4), (2, 8), (4, 32), (5, 60), (60, 60)]
)
def test_backoff_doubles_up_to_its_cap_with_full_jitter(db, failures_before, most):
    delays = db.execute(
        "select extract(epoch from private.retry_delay(%s, null))::float as seconds"
        " from generate_series(1, 400)",
        failures_before,
    )

    seconds = [row["seconds"] for row in delays]
    assert 0 <= min(seconds) < most * 0.1
    assert most * 0.9 < max(seconds) <= most


def test_a_provider_that_stays_busy_is_asked_less_and_less_often(db, worker, job):
    db.execute("update private.settings set retry_base = '1 minute', retry_cap = '30 minutes'")

    delays = []
    for _ in range(12):
        worker.fail_job(job, "provider_busy")
        delays.append(db.value("select extract(epoch from run_at - now()) from private.ready_jobs"))
        db.execute("update private.ready_jobs set run_at = null")
        job = worker.claimed()

    assert delays[0] <= 60 < max(delays[4:])


def test_a_retry_is_next_in_line(db, alice, bob, worker):
    job_id = alice.enqueued()
    job = worker.claimed()
    for _ in range(3):
        bob.enqueue()
    worker.fail_job(job, "provider_error", retry_after=0)

    assert worker.claimed().id == job_id


def test_a_released_job_costs_no_attempt_and_keeps_its_checkpoint(db, alice, worker, job):
    worker.checkpoint(job, "prediction-1")

    worker.release_job(job)

    assert alice.get_job_status(job.id)["status"] == "queued"
    assert_books_balance(db)
    again = worker.claimed()
    assert (again.id, again.attempt, again.provider_job_id) == (job.id, 1, "prediction-1")
    assert attempts(db) == [(1, "released", None)]


def test_a_released_job_wakes_another_worker(db, worker, job):
    other = Worker(db).listening()
    other.sleep()

    worker.release_job(job)

    assert other.wake_ups() == [""]


def test_releasing_again_changes_nothing(db, worker, job):
    worker.release_job(job)

    with unchanged(db):
        worker.release_job(job)


LATE_CALLS = {
    "complete": lambda worker, job: worker.complete_job(job, images=2),
    "fail": lambda worker, job: worker.fail_job(job, "moderated"),
    "release": lambda worker, job: worker.release_job(job),
    "checkpoint": lambda worker, job: worker.checkpoint(job, "prediction-2"),
    "report": lambda worker, job: worker.report_progress(job, "storing", 1),
}


@pytest.mark.parametrize("late_call", LATE_CALLS)
def test_a_worker_that_lost_its_lease_changes_nothing(db, worker, job, late_call):
    db.pass_time("61 seconds")
    other = Worker(db)
    other.recover_stale_jobs()
    successor = claim_again(db, other)
    assert successor.id == job.id

    with unchanged(db):
        if late_call == "fail":
            assert worker.fail_job(job, "moderated") == "repeated"  # the lease's end was recorded
        else:
            with refused("DR001", "lease_lost"):
                LATE_CALLS[late_call](worker, job)

    other.complete_job(successor, images=2)
    assert_books_balance(db)


@pytest.mark.parametrize("late_call", LATE_CALLS)
def test_an_invented_token_changes_nothing(db, worker, job, late_call):
    for token in (job.token + 1, job.token - 1, 0):
        with unchanged(db), refused("DR001", "lease_lost"):
            LATE_CALLS[late_call](worker, replace(job, token=token))


@pytest.mark.parametrize("late_call", LATE_CALLS)
def test_a_job_whose_user_is_gone_is_a_lost_lease(db, alice, worker, job, late_call):
    db.execute("delete from auth.users where id = %s", alice.id)

    with unchanged(db), refused("DR001", "lease_lost"):
        LATE_CALLS[late_call](worker, job)

    assert alice.ledger() == []  # erased with the user


def test_of_two_ways_to_end_a_job_at_the_same_moment_one_happens(db, alice):
    db.lift_limits()
    alice.has(credits=20)
    first, second = Worker(db), Worker(db)
    for _ in range(10):
        alice.enqueue()
        job = first.claimed()

        together(
            [
                lambda j=job: outcome(lambda: first.complete_job(j)),
                lambda j=job: outcome(lambda: second.fail_job(j, "moderated")),
            ]
        )

    assert db.value("select count(*) from private.attempts") == 10
    assert_books_balance(db)


# --- many at once ---


@pytest.fixture
def jobs(db, alice, bob, worker):
    """Six running jobs, of alice and bob in turn, two images each."""
    db.lift_limits()
    for user in (alice, bob):
        user.has(credits=10)
    for n in range(6):
        (alice, bob)[n % 2].enqueue(params={"num_outputs": 2})
    return worker.claim_jobs(6)


def test_many_jobs_end_well_in_one_call(db, alice, bob, worker, jobs):
    verdicts = worker.complete_jobs(*[(job, 2) for job in reversed(jobs)])

    assert verdicts == {job.id: "completed" for job in jobs}
    assert [user.get_entitlement()["active_jobs"] for user in (alice, bob)] == [0, 0]
    paths = db.execute("select storage_path as path from public.images")
    assert {row["path"] for row in paths} == {
        job.image(position)["storage_path"] for job in jobs for position in (0, 1)
    }
    assert_books_balance(db)


def test_nothing_of_a_user_is_written_where_all_images_are_there(db, worker, jobs):
    query = "select sum(n) from (select n_tup_upd as n from pg_stat_xact_user_tables"
    query += " where relname = 'entitlements') as t"

    with worker.connection.transaction():
        worker.complete_jobs(*[(job, 2) for job in jobs])
        assert worker.connection.execute(query).fetchone() == (0,)


def test_of_many_jobs_each_is_settled_on_its_own_images(db, alice, bob, worker, jobs):
    worker.complete_jobs(*[(job, 1 + n % 3 // 2) for n, job in enumerate(jobs)])

    assert (alice.credits(), bob.credits()) == (4 + 2, 4 + 2)
    assert_books_balance(db)


def test_users_who_get_credits_back_are_locked_in_order_of_id(db, alice, bob, worker, jobs):
    first, second = sorted([alice.id, bob.id])
    pair = jobs[:2] if str(jobs[0].user_id) == second else jobs[1:3]  # the second user's job first
    lock = "select user_id from public.entitlements where user_id = %s for update"
    other = db.connect()

    with ThreadPoolExecutor(1) as pool:
        with other.transaction():
            other.execute(lock, [first])
            done = pool.submit(worker.complete_jobs, *[(job, 1) for job in pair])
            db.wait_for_lock(worker.connection)
            assert db.execute(lock + " nowait", second)
        assert done.result() == {job.id: "completed" for job in pair}


def test_a_lost_lease_among_many_is_no_others_concern(db, worker, jobs):
    stale = replace(jobs[2], token=jobs[2].token - 1_000)

    verdicts = worker.complete_jobs((jobs[0], 2), (stale, 2), (jobs[1], 2))

    assert verdicts == {jobs[0].id: "completed", jobs[1].id: "completed"}
    assert db.value("select count(*) from private.running_jobs") == 4
    assert_books_balance(db)


def test_what_was_completed_before_is_repeated_among_others(db, worker, jobs):
    worker.complete_jobs(*[(job, 2) for job in jobs[:2]])

    verdicts = worker.complete_jobs(*[(job, 2) for job in jobs[:3]])

    expected = dict.fromkeys([job.id for job in jobs[:2]], "repeated")
    assert verdicts == expected | {jobs[2].id: "completed"}
    assert_books_balance(db)


def test_bad_images_of_one_change_nothing_for_all(db, worker, jobs):
    with unchanged(db), pytest.raises(psycopg.errors.InvalidParameterValue):
        worker.complete_jobs((jobs[0], 2), (jobs[1], 3))


def test_many_jobs_fail_in_one_call_each_by_its_code(db, alice, bob, worker, jobs):
    codes = ["moderated", "provider_error", "timeout"]
    calls = [(job, codes[n % 3], None, None, None) for n, job in enumerate(jobs)]

    said = worker.of_many("fail_jobs", calls)

    assert [verdict for _, verdict in said] == ["failed", "retried", "failed"] * 2
    assert (alice.credits(), bob.credits()) == (8, 8)
    assert {verdict for _, verdict in worker.of_many("fail_jobs", calls)} == {"repeated"}
    assert_books_balance(db)


def test_calls_for_many_of_the_same_users_at_the_same_moment_do_not_wait_for_one_another_for_ever(
    db, alice, bob
):
    db.lift_limits()
    workers = [Worker(db) for _ in range(4)]
    for user in (alice, bob):
        user.has(credits=200)
        for _ in range(40):
            user.enqueue(params={"num_outputs": 2})
    claimed = [worker.claim_jobs(20) for worker in workers]

    together(
        [
            lambda w=worker, jobs=jobs: [
                w.complete_jobs(*[(job, 1) for job in jobs[:10]]),
                w.of_many("fail_jobs", [(job, "moderated", None, None, None) for job in jobs[10:]]),
            ]
            for worker, jobs in zip(workers, claimed, strict=True)
        ]
    )

    assert db.value("select count(*) from private.running_jobs") == 0
    assert_books_balance(db)
