"""sql/75_outcomes.sql: complete, fail and release, beside what model and protocol say of them."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest
from actors import Worker, refused
from database import assert_books_balance, unchanged

DELAY = "select extract(epoch from private.retry_delay(%s, %s))::float as seconds"


@pytest.fixture
def job(alice, worker):
    """A running job of alice's: two images, two credits."""
    alice.enqueue("a lighthouse", params={"num_outputs": 2})
    return worker.claimed()


@pytest.mark.parametrize(
    ("code", "kept", "detail"),
    [
        ("moderated", "moderated", "CUDA out of memory"),
        ("E1234", "internal", "E1234: CUDA out of memory"),
        (None, "internal", "CUDA out of memory"),
    ],
)
def test_a_job_that_failed_shows_what_was_asked_for_and_why_it_failed(
    alice, worker, code, kept, detail
):
    worker.db.execute("update private.settings set max_attempts = 1")
    alice.enqueue("a lighthouse", params={"num_outputs": 2})
    job = worker.claimed()

    assert worker.fail_job(job, code, "CUDA out of memory") == "failed"

    status = alice.get_job_status(job.id)
    assert (status["status"], status["error"]["code"]) == ("failed", kept)
    assert (status["prompt"], status["params"]) == ("a lighthouse", {"num_outputs": 2})
    assert alice.credits() == 10
    assert alice.db.value("select error_detail from private.attempts") == detail


@pytest.mark.parametrize(
    ("price", "percent", "given_back"),
    [(1, 100, 2), (1, 50, 1), (1, 40, 1), (1, 1, 1), (1, 0, 0), (5, 33, 4), (0, 50, 0), (0, 0, 0)],
)
def test_what_fails_gives_back_the_share_of_its_code_rounded_up(
    alice, worker, price, percent, given_back
):
    db, left = alice.has(credits=20).db, 20 - 2 * price
    db.execute("update public.models set price_credits = %s", price)
    change = "update private.error_codes set refund_percent = %s where code = 'provider_error'"
    db.execute(change, percent)
    job_id = alice.enqueued(params={"num_outputs": 2})
    while worker.fail_job(worker.claimed(), "provider_error") == "retried":
        assert alice.credits() == left  # an attempt that is not the last gives nothing
        db.execute("update private.ready_jobs set run_at = null")
    db.execute(change, 100 - percent)

    assert alice.get_job_status(job_id)["refunded_credits"] == given_back
    assert alice.credits() == left + given_back
    again = alice.retry_generation(job_id)["job_id"]
    worker.complete_job(worker.claimed(), images=1)  # as ever, whatever is set
    assert alice.get_job_status(again)["refunded_credits"] == price
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
        ("0.003 image", {"images": 2, "cost_usd": 0.04}, "0.04"),  # the provider says it itself
        (None, {"cost_usd": 0.04}, "0.04"),
        ("0.003 image", {"images": 2, "cost_usd": 0.04, "is_billed": False}, "0"),
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
        ({"images": 1, "provider_seconds": 1e-300, "cost_usd": 1e-300}, (1, 0)),
        ({"images": 1, "provider_seconds": 1, "cost_usd": 1e300}, (1, 1)),
        ({"images": 1, "provider_seconds": 1, "cost_usd": -1e300}, (1, 1)),
        ({"images": 1, "provider_seconds": 1, "cost_usd": {"a": "NaN"}}, (1, 1)),
        ({"images": "NaN", "provider_seconds": "Infinity"}, (None, None)),
        ({"images": [2], "provider_seconds": {}}, (None, None)),
        ({"images": None, "provider_seconds": True}, (None, None)),
    ],
    ids=str,
)
def test_no_number_of_a_providers_keeps_a_job_from_ending(db, alice, worker, metrics, kept):
    db.execute("update public.models set cost_usd = 1, cost_unit = 'image'")
    for _ in range(2):
        alice.enqueue()
    worker.complete_job(worker.claimed(), 1, metrics)
    worker.fail_job(worker.claimed(), "moderated", metrics=metrics)

    rows = db.execute("select provider_images, provider_seconds from private.attempts")
    assert [tuple(row.values()) for row in rows] == [kept, kept]


@pytest.mark.parametrize(
    ("images", "code"),
    [
        (0, "22023"),
        (3, "22023"),
        (None, "22023"),
        ({"storage_path": "somebody/else/0.png"}, "23514"),
        ({"preview_path": "somebody/else/0.webp"}, "23514"),
        ({"content_type": "text/html"}, "23514"),
        ({"bytes": 0}, "23514"),
        ({"position": None}, "23502"),
    ],
)
def test_images_that_are_not_right_complete_no_job_of_a_call(db, alice, worker, images, code):
    for _ in range(2):
        alice.enqueue(params={"num_outputs": 2})
    job, other = worker.claim_jobs(2)
    images = [job.image() | images] if isinstance(images, dict) else images
    bad = (None, None) if images is None else worker.done(job, images, None)

    with unchanged(db), refused(code):
        worker.of_many("complete_jobs", [(other, *worker.done(other, 1, None)), (job, *bad)])


def test_a_job_too_old_is_not_retried(db, worker, job):
    db.pass_time("61 minutes")
    worker.heartbeat(job)

    assert worker.fail_job(job, "provider_busy") == "failed"


@pytest.mark.parametrize(
    ("wish", "asked"),
    [
        *[(wish, 0) for wish in (None, 0, -5, -1e308, "-inf")],
        *[(7, 7), (3600, 3600), (1e9, 3600), ("inf", 3600), ("nan", 3600)],
    ],
)
def test_backoff_doubles_up_to_its_cap_and_a_wish_makes_it_longer_only_up_to_an_hour(
    db, wish, asked
):
    for failures_before, most in [(0, 2), (1, 4), (2, 8), (4, 32), (5, 60), (60, 60)]:
        query = f"{DELAY} from generate_series(1, 400)"
        delays = db.execute(query, failures_before, wish and float(wish))

        seconds = [row["seconds"] for row in delays]
        assert max(asked, most * 0.5) <= min(seconds) <= max(asked, most * 0.55)
        assert max(asked, most * 0.95) <= max(seconds) <= max(asked, most)


def test_a_retry_after_is_a_number_of_seconds_or_a_date_to_come(db):
    now, ahead = datetime.now(UTC), timedelta(hours=5000)
    last = datetime(9999, 12, 31, tzinfo=UTC)
    forms = ["%a, %d %b %Y %H:%M:%S GMT", "%a %b %e %H:%M:%S %Y"]
    said = {
        **{"0": 0, "120": 120, " 7 ": 7, "1.5": 1.5, "120, 5": 120, "9" * 15: 1e15},
        **{(now + ahead).strftime(form): ahead.total_seconds() for form in forms},
        **dict.fromkeys((now - ahead).strftime(form) for form in forms),
        "Fri, 31 Dec 9999 00:00:00 GMT": (last - now).total_seconds(),
        **dict.fromkeys(["", "soon", "-5", "nan", "inf", "-Infinity", "1e999", "0x10", "5;"]),
        **dict.fromkeys(["9" * 16, "9" * 10_000, "1" + " " * 10_000 + "s", "\u0663\u0660"]),
        **dict.fromkeys(["Fri, 99 Dec 9999 23:59:59 GMT", "Fri, infinity", "Friday", "2100-01-01"]),
        None: None,
    }
    db.execute("set timezone = 'Pacific/Kiritimati'")

    found = {words: db.value("select private.asked_seconds(%s)", words) for words in said}

    assert found == {
        words: None if seconds is None else pytest.approx(seconds, rel=1e-6)
        for words, seconds in said.items()
    }


def test_a_job_that_is_throttled_without_end_asks_few_times_a_minute_and_an_hour_long(
    db, alice, worker
):
    job_id, moments = alice.enqueued(), [0.0]
    due = (
        "select extract(epoch from run_at - created_at)::float as moment,"
        " extract(epoch from run_at - now())::float as wait"
        " from private.ready_jobs inner join public.generations on id = job_id"
    )
    while worker.fail_job(worker.claimed(), "provider_busy", retry_after=0) == "retried":
        [row] = db.execute(due)
        moments.append(row["moment"])
        db.pass_time(f"{row['wait'] + 0.001} seconds")
    lived = "select extract(epoch from finished_at - created_at)::float from public.generations"

    assert sum(moment < 60 for moment in moments) <= 6
    assert all(moments[n + 2] - moments[n] >= 60 for n in range(5, len(moments) - 2))
    assert 3600 < db.value(lived) < 3660 or len(moments) == 100
    assert alice.get_job_status(job_id)["error"]["code"] == "provider_busy"
    assert alice.credits() == 10


@pytest.mark.parametrize(
    "code", ["provider_busy", "worker_full", "storage_unavailable", "released"]
)
def test_what_uses_no_attempt_is_bounded_in_number_however_short_the_waits_are(
    db, alice, worker, code
):
    db.execute("update private.settings set retry_base = '0', max_claims = 7")
    job_id = alice.enqueued()

    for n in range(7):
        assert alice.get_job_status(job_id)["status"] == "queued", n
        if code == "released":
            worker.release_job(worker.claimed())
        else:
            worker.fail_job(worker.claimed(), code, retry_after=0)

    assert alice.get_job_status(job_id)["status"] == "failed"
    assert alice.credits() == 10


# Many at once.


@pytest.fixture
def jobs(db, alice, bob, worker):
    """Six running jobs, of alice and bob in turn, two images each."""
    db.lift_limits()
    for n in range(6):
        (alice, bob)[n % 2].enqueue(params={"num_outputs": 2})
    return worker.claim_jobs(6)


def test_each_of_many_is_settled_on_its_own_images_and_lease(db, alice, bob, worker, jobs):
    stale = replace(jobs[5], token=jobs[5].token - 1_000)

    said = worker.complete_jobs((jobs[2], 1), (jobs[0], 2), (stale, 2), (jobs[1], 1))
    again = worker.complete_jobs((jobs[0], 1), (jobs[3], 2), (jobs[1], 2))

    assert said == {jobs[n].id: "completed" for n in (0, 1, 2)}
    assert again == {jobs[0].id: "repeated", jobs[1].id: "repeated", jobs[3].id: "completed"}
    assert alice.get_job_status(jobs[2].id)["refunded_credits"] == 1
    assert (alice.credits(), bob.credits()) == (4 + 1, 4 + 1)
    assert [user.get_entitlement()["active_jobs"] for user in (alice, bob)] == [1, 1]
    assert_books_balance(db)


def test_many_jobs_fail_in_one_call_each_by_its_code(db, alice, bob, worker, jobs):
    codes = ["output_refused", "provider_error", "timeout"]
    calls = [(job, codes[n % 3], None, None, None) for n, job in enumerate(jobs)]

    said = worker.of_many("fail_jobs", calls)

    assert [verdict for _, verdict in said] == ["failed", "retried", "failed"] * 2
    assert (alice.credits(), bob.credits()) == (8, 8)
    assert {verdict for _, verdict in worker.of_many("fail_jobs", calls)} == {"repeated"}
    assert_books_balance(db)
