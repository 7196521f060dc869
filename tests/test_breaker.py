"""sql/28_breaker.sql: what keeps failing is left alone for a while, and tried with one job."""

import pytest
from actors import PREVIEW, Job, User, Worker, refused
from database import unchanged

DEV = "black-forest-labs/flux-dev"
SCHNELL = "black-forest-labs/flux-schnell"


@pytest.fixture
def rich(db, alice):
    """Alice with credits, every model active, and breakers that heed one user's failures."""
    db.execute("update public.models set is_active = true")
    db.execute("update private.settings set breaker_users = 1, max_attempts = 30, retry_base = '0'")
    db.lift_limits()
    return alice.has(credits=1000)


def breaker(db, name: str = DEV) -> dict:
    """Return a breaker as operators see it."""
    return db.value(
        "select private.breaker_json(b) from private.breakers as b where name = %s", name
    )


def counted(db, name: str = DEV) -> tuple[str, int]:
    return breaker(db, name)["state"], breaker(db, name)["failures"]


def refuse(worker: Worker, job: Job | None = None, code: str = "provider_error") -> None:
    """Have a job fail in words of its own, to come back much later."""
    job = job or worker.claimed()
    worker.fail_job(job, code, f"words {job.token}", retry_after=3600)


def fail(user: User, worker: Worker, times: int, model: str = DEV, code="provider_error") -> None:
    """Have a job of the model fail so often in a row."""
    for _ in range(times):
        user.enqueue(model=model)
        refuse(worker, code=code)


def seconds_paused(db, name: str = DEV) -> int:
    query = "select extract(epoch from paused_until - now()) from private.breakers where name = %s"
    return round(db.value(query, name))


@pytest.fixture
def opened(db, rich, worker):
    """The breaker of DEV has opened for 30 seconds, with two jobs queued before."""
    jobs = [rich.enqueued(model=DEV) for _ in range(7)]
    for _ in range(5):
        refuse(worker)
    return jobs[5:]


@pytest.fixture
def half_open(db, opened):
    """And its pause is over."""
    db.pass_time("31 seconds")
    assert breaker(db)["state"] == "half-open"
    return opened


def test_failures_in_a_row_pause_the_model_and_spare_the_jobs_that_wait(db, rich, worker):
    fail(rich, worker, 4)
    rich.enqueue(model=DEV)
    worker.complete_job(worker.claimed())  # a success, and time, start the count anew
    fail(rich, worker, 4)
    db.pass_time("5 minutes")
    fail(rich, worker, 4)
    waiting = [rich.enqueued(model=DEV) for _ in range(2)]
    assert counted(db) == ("closed", 4)

    refuse(worker)

    assert (breaker(db)["state"], seconds_paused(db)) == ("open", 30)
    assert breaker(db)["reason"] == "5 failures in a row, the last: provider_error"
    assert worker.claim_jobs(4) == []
    db.pass_time("31 seconds")
    assert worker.claimed().id == waiting[1]


@pytest.mark.parametrize(
    ("code", "counts"),
    [
        *[(code, False) for code in ("moderated", "invalid_input", "provider_busy", "internal")],
        ("output_refused", False),
        *[(code, True) for code in ("provider_error", "provider_refused", "provider_timeout")],
        *[(code, True) for code in ("result_lost", "timeout", "outcome_unknown")],
        ("output_refused", False),
    ],
)
def test_what_is_the_providers_fault_counts_and_nothing_else(db, rich, worker, code, counts):
    fail(rich, worker, 5, code=code)

    assert {row["name"] for row in db.execute("select name from private.breakers")} == (
        {DEV, "replicate"} if counts else set()
    )
    assert not counts or breaker(db)["state"] == "open"


@pytest.mark.parametrize(
    ("differs", "failures"),
    [("nothing", 1), ("try", 1), *[(each, 4) for each in ("detail", "prompt", "params", "user")]],
)
def test_equal_words_from_one_input_of_one_user_count_once(db, rich, worker, differs, failures):
    for n in range(4):
        if n == 0 or differs != "try":
            user = User(db).has(10) if differs == "user" else rich
            params = {"seed": n} if differs == "params" else {}
            user.enqueue(f"picture {n if differs == 'prompt' else ''}", DEV, params=params)
        delay = 0 if differs == "try" else 3600
        detail = f"no {n if differs == 'detail' else ''}"
        worker.fail_job(worker.claimed(), "provider_error", detail, delay)

    assert counted(db) == counted(db, "replicate") == ("closed", failures)


def test_after_a_success_or_a_while_words_said_before_count_again(db, rich, worker):
    for begins_anew in (
        lambda: worker.complete_job(worker.claimed()),
        lambda: db.pass_time("5 minutes"),
        lambda: None,
    ):
        for _ in range(2):
            rich.enqueue(model=DEV)
        worker.fail_job(worker.claimed(), "provider_error", "no", 3600)
        assert counted(db) == counted(db, "replicate") == ("closed", 1)
        begins_anew()


def test_only_several_models_that_fail_pause_their_provider(db, rich, worker):
    models = db.execute("select id from public.models where provider = 'replicate' limit 4")
    first, second, third, other = (model["id"] for model in models)
    for _ in range(15):
        rich.enqueue(model=first)
    for job in worker.claim_jobs(15):
        refuse(worker, job)
    assert (breaker(db, first)["state"], counted(db, "replicate")) == ("open", ("closed", 5))

    rich.enqueue(model=other)
    worker.complete_job(worker.claimed())  # a success of one model speaks for the provider
    assert (breaker(db, first)["state"], counted(db, "replicate")) == ("open", ("closed", 0))

    for model in (second, third, other):
        fail(rich, worker, 5, model=model)
    assert breaker(db, "replicate")["state"] == "open"
    rich.enqueue(model=PREVIEW)
    assert worker.claimed().provider == "preview"


# Half-open.


def test_a_claim_that_looked_before_another_began_the_probe_gets_none(db, half_open):
    first, second = Worker(db), Worker(db)

    with first.connection.transaction():
        assert [job.id for job in first.claim_jobs(4)] == half_open[:1]
        assert second.claim_jobs(4) == []

    assert second.claim_jobs(4) == []
    assert breaker(db)["state"] == "probing"


def test_the_probes_success_closes_wakes_a_worker_and_all_come_back(db, rich, worker, half_open):
    job = worker.claimed()
    other = Worker(db).listening()
    other.sleep()

    worker.complete_job(job)

    assert breaker(db)["state"] == "closed"
    assert other.wake_ups() == [""]
    assert [job.id for job in worker.claim_jobs(4)] == half_open[1:]
    fail(rich, worker, 4)
    assert breaker(db)["state"] == "closed"


def test_each_failed_probe_doubles_the_pause_up_to_the_cap_until_a_success(
    db, rich, worker, opened
):
    pauses = []
    for _ in range(6):
        db.execute("update private.breakers set paused_until = now()")
        worker.fail_job(worker.claimed(), "provider_error", retry_after=0)
        pauses.append(seconds_paused(db))

    assert pauses == [60, 120, 240, 480, 900, 900]
    assert breaker(db)["reason"] == "the probe failed: provider_error"

    db.execute("update private.breakers set paused_until = now()")
    worker.complete_job(worker.claimed())
    fail(rich, worker, 5)
    assert seconds_paused(db) == 30


def canceled(worker: Worker, job: Job) -> None:
    User(worker.db, str(job.user_id)).cancel_generation(job.id)
    worker.cancel_job(job)


ENDS = {
    "dies": lambda worker, job: (worker.db.pass_time("61 seconds"), worker.recover_stale_jobs()),
    "is released": lambda worker, job: worker.release_job(job),
    "is canceled": canceled,
    "is moderated": lambda worker, job: worker.fail_job(job, "moderated"),
    "is throttled": lambda worker, job: worker.fail_job(job, "provider_busy"),
    "loses its user": lambda worker, job: worker.db.execute(
        "delete from auth.users where id = %s", job.user_id
    ),
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.usefixtures("half_open")
def test_a_probe_that_ends_without_an_answer_leaves_its_place_to_the_next(db, bob, worker, end):
    bob.has(credits=100).enqueued(model=DEV)
    probe = worker.claimed()

    ENDS[end](worker, probe)

    assert breaker(db)["state"] == "half-open"
    assert len(worker.claim_jobs(4)) == 1


# Who is to blame: the model, or the input of those who failed.


@pytest.fixture
def suspects(db, worker) -> list[User]:
    """Three users who have opened the breaker of DEV, with a job each that waits."""
    db.execute("update public.models set is_active = true")
    db.execute("update private.settings set retry_base = '0'")
    db.lift_limits()
    suspects = [User(db).has(100) for _ in range(3)]
    for user in suspects[:2] * 4:
        fail(user, worker, 1)
    assert breaker(db)["state"] == "closed"  # two users cannot pause a model for all
    for user in [suspects[2], *suspects]:
        user.enqueue(model=DEV)
    refuse(worker)
    assert breaker(db)["state"] == "open"
    return suspects


def test_a_pause_is_for_those_who_failed_and_a_trial_that_fails_makes_one_more(
    db, suspects, bob, worker
):
    for user in suspects:
        with refused("PT503", "model_paused"):
            user.enqueue(model=DEV)
        assert [m["paused_until"] is None for m in user.list_models() if m["id"] == DEV] == [False]
    assert {m["paused_until"] for m in bob.list_models()} == {None}
    assert worker.claim_jobs(4) == []

    job, _ = [bob.has(10).enqueued(model=DEV) for _ in range(2)]
    (tried,) = worker.claim_jobs(4)
    refuse(worker, tried)

    assert tried.id == job
    assert 28 <= seconds_paused(db) <= 30
    with refused("PT503", "model_paused"):
        bob.enqueue(model=DEV)
    assert worker.claim_jobs(4) == []
    db.pass_time("31 seconds")
    assert len(worker.claim_jobs(4)) == 1  # where only theirs wait, one of them


def test_the_probe_is_a_job_of_a_user_who_has_not_failed_if_there_is_one(db, suspects, bob, worker):
    db.pass_time("31 seconds")
    job = bob.has(10).enqueued(model=DEV)  # of all the last

    assert [job.id for job in worker.claim_jobs(1)] == [job]


def test_who_failed_where_another_succeeded_pauses_nobody_for_a_while(db, suspects, bob, worker):
    bob.has(10).enqueue(model=DEV)
    worker.complete_job(worker.claimed())
    assert breaker(db)["state"] == "closed"

    for job in worker.claim_jobs(9):
        refuse(worker, job)
    for user in suspects:
        fail(user, worker, 2)
    assert counted(db) == ("closed", 0)

    db.pass_time("16 minutes")
    db.execute("update private.ready_jobs set run_at = null, fair_key = 0")
    for job in worker.claim_jobs(9):
        refuse(worker, job)
    assert breaker(db)["state"] == "open"


def test_who_keeps_failing_where_others_succeed_is_paused_alone(db, rich, bob, worker):
    db.execute("update private.settings set breaker_users = default, max_attempts = 1")
    fail(rich, worker, 1)
    bob.has(10).enqueue(model=DEV)
    worker.complete_job(worker.claimed())
    fail(rich, worker, 4)

    with refused("PT503", "model_paused") as refusal:
        rich.enqueue(model=DEV)
    assert 290 <= refusal.refusal.retry_after <= 300
    assert bob.enqueue(model=DEV)["status"] == rich.enqueue(model=SCHNELL)["status"] == "queued"

    db.pass_time("301 seconds")
    assert rich.enqueue(model=DEV)["status"] == "queued"


def test_a_job_that_is_given_back_again_and_again_gives_up(db, alice, worker):
    job_id = alice.enqueued()
    for _ in range(5):
        worker.release_job(worker.claimed())
    db.pass_time("61 minutes")

    worker.release_job(worker.claimed())

    assert alice.get_job_status(job_id)["error"]["code"] == "internal"
    assert alice.credits() == 10


# What workers pause.


def test_a_refusal_that_may_be_one_users_lets_the_jobs_of_others_be_tried(db, rich, bob, worker):
    waiting = rich.enqueued(model=DEV)
    worker.pause_provider("replicate", 60, "402: no credit", rich.id)
    jobs = [bob.has(10).enqueued(model=SCHNELL) for _ in range(3)]

    worker.complete_job(worker.claimed())
    assert breaker(db, "replicate")["state"] == "closed"
    assert {job.id for job in worker.claim_jobs(4)} == {waiting, *jobs[1:]}

    assert not worker.pause_provider("replicate", 60, "402: no credit", rich.id)
    assert breaker(db, "replicate")["state"] == "closed"


def test_a_pause_never_gets_shorter_is_an_hour_at_most_and_its_reason_is_cut(db, service, worker):
    worker.pause_provider("replicate", 600, "402: insufficient credit")
    worker.pause_provider("replicate", 5, "402: again")
    assert seconds_paused(db, "replicate") == 600
    assert breaker(db, "replicate")["reason"] == "402: again"

    worker.pause_provider("replicate", 10**9, "x" * 5000)
    assert 3590 < seconds_paused(db, "replicate") <= 3600
    assert breaker(db, "replicate")["reason"] == "x" * 500

    service.pause_model("replicate", reason="maintenance")
    with unchanged(db):
        worker.pause_provider("replicate", 60, "401: no such key")  # an operator's is theirs
        worker.pause_provider("somebody", 60)


# What only an operator can mend.


def test_a_withdrawn_model_waits_with_all_its_jobs_until_it_is_mended(db, rich, worker, service):
    jobs = [rich.enqueued(model=DEV) for _ in range(3)]
    other, left = rich.enqueued(model=SCHNELL), rich.credits()
    db.pass_time("2 hours")  # older than jobs that are tried again
    first, second = worker.claim_jobs(2)

    assert worker.fail_job(first, "moderated") == "failed"
    assert worker.fail_job(second, "model_withdrawn", "404: no such version") == "retried"

    paused = {"state": "open", "paused_until": "infinity", "times_opened": 0}
    assert paused.items() <= breaker(db).items()
    assert service.alerts()["paused"] == (
        f"model {DEV} until infinity: model_withdrawn: 404: no such version"
    )
    assert [job.id for job in worker.claim_jobs(4)] == [other]
    assert rich.get_job_status(jobs[1])["status"] == "queued"
    with refused("PT503", "model_paused"):
        rich.enqueue(model=DEV)

    service.resume_model(DEV)
    again = worker.claim_jobs(4)
    assert [(job.id, job.attempt) for job in again] == [(jobs[1], 1), (jobs[2], 1)]
    assert {each.begun_before for each in again} == {None}
    assert rich.credits() > left  # of the moderated one


def test_a_batch_of_failures_pauses_each_withdrawn_model_once(db, rich, worker):
    for model in (DEV, SCHNELL, DEV, PREVIEW):
        rich.enqueue(model=model)
    jobs = worker.claim_jobs(4)
    db.execute("delete from public.models where id = %s", SCHNELL)
    code = {"preview": "moderated"}

    worker.of_many(
        "fail_jobs",
        [(job, code.get(job.provider, "model_withdrawn"), None, None, None) for job in jobs],
    )

    names = db.execute("select name from private.breakers where paused_until = 'infinity'")
    assert names == [{"name": DEV}]


# Operators.


def test_every_way_in_is_closed_for_what_is_paused_and_says_so(db, rich, worker, service):
    first = rich.enqueued(model=DEV, idempotency_key="k")
    worker.fail_job(worker.claimed(), "moderated")
    assert service.pause_model("replicate", reason="maintenance") == {
        "name": "replicate",
        "state": "open",
        "paused_until": "infinity",
        "reason": "maintenance",
        "failures": 0,
        "times_opened": 0,
    }

    for way in (
        lambda: rich.enqueue(model=DEV),
        lambda: rich.enqueue_batch(["one", "two"], model=DEV),
        lambda: rich.retry_generation(first),
    ):
        with unchanged(db), refused("PT503", "model_paused") as refusal:
            way()
        assert refusal.detail == f"{DEV} is paused"
        assert refusal.refusal.retry_after == 3600
    paused = {model["id"]: model["paused_until"] for model in rich.list_models()}
    assert (paused[DEV], paused[PREVIEW]) == ("infinity", None)
    assert rich.enqueue(model=PREVIEW)["status"] == "queued"
    assert rich.enqueued(model=DEV, idempotency_key="k") == first

    service.resume_model("replicate")
    assert {model["paused_until"] for model in rich.list_models()} == {None}
    with unchanged(db):
        service.resume_model("replicate")


def test_a_pause_that_makes_no_sense_is_refused(db, service):
    for model in (None, "", "somebody"):
        for call in (service.pause_model, service.resume_model):
            with unchanged(db), refused("PT404", "not_found"):
                call(model)
    for arguments in (
        {"until": None},
        {"until": "2020-01-01"},
        {"until": "-infinity"},
        {"reason": "x" * 501},
    ):
        with unchanged(db), refused("PT400", "invalid_input"):
            service.pause_model(PREVIEW, **arguments)
