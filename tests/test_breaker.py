"""sql/71_breaker.sql: what keeps failing is left alone for a while, and tried with one job."""

import contextlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime

import pytest
from actors import PREVIEW, Job, User, Worker, outcome, refused, together
from database import Database, assert_books_balance, unchanged
from psycopg.types.json import Jsonb

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


def fail(user: User, worker: Worker, times: int, model: str = DEV, code="provider_error") -> None:
    """Have a job of the model fail so often in a row."""
    for _ in range(times):
        user.enqueue(model=model)
        worker.fail_job(worker.claimed(), code, retry_after=3600)


def seconds_paused(db, name: str = DEV) -> int:
    """Return how long the breaker stays open."""
    query = "select extract(epoch from paused_until - now()) from private.breakers where name = %s"
    return round(db.value(query, name))


@pytest.fixture
def opened(db, rich, worker):
    """The breaker of DEV has opened for 30 seconds, with two jobs queued before."""
    jobs = [rich.enqueued(model=DEV) for _ in range(7)]
    for _ in range(5):
        worker.fail_job(worker.claimed(), "provider_error", retry_after=3600)
    return jobs[5:]


def test_failures_in_a_row_pause_the_model_and_spare_the_jobs_that_wait(db, rich, worker, opened):
    assert breaker(db)["state"] == "open"
    assert seconds_paused(db) == 30
    assert breaker(db)["reason"] == "5 failures in a row, the last: provider_error"
    assert worker.claim_jobs(4) == []
    attempts = "select attempt from private.ready_jobs where job_id = any (%s::uuid[])"
    assert db.execute(attempts, opened) == [{"attempt": 0}] * 2
    assert_books_balance(db)


def test_one_failure_less_pauses_nothing(db, rich, worker):
    fail(rich, worker, 4)

    assert (breaker(db)["state"], breaker(db)["failures"]) == ("closed", 4)


def test_a_success_between_starts_the_count_anew(db, rich, worker):
    fail(rich, worker, 4)
    rich.enqueue(model=DEV)
    worker.complete_job(worker.claimed())
    fail(rich, worker, 4)

    assert (breaker(db)["state"], breaker(db)["failures"]) == ("closed", 4)


def test_failures_of_longer_ago_than_the_window_do_not_count(db, rich, worker):
    fail(rich, worker, 4)
    db.pass_time("5 minutes")
    fail(rich, worker, 4)

    assert (breaker(db)["state"], breaker(db)["failures"]) == ("closed", 4)


@pytest.mark.parametrize("code", ["moderated", "invalid_input", "provider_busy", "internal", "E1"])
def test_what_is_not_the_providers_fault_pauses_nothing(db, rich, worker, code):
    fail(rich, worker, 20, code=code)

    assert db.execute("select * from private.breakers") == []


@pytest.mark.parametrize(
    "code", ["provider_error", "provider_refused", "provider_timeout", "result_lost", "timeout"]
)
def test_what_is_the_providers_fault_counts(db, rich, worker, code):
    fail(rich, worker, 5, code=code)

    assert breaker(db)["state"] == "open"


def test_jobs_stuck_until_their_deadline_count(db, rich, worker):
    for _ in range(5):
        rich.enqueue(model=DEV)
    jobs = worker.claim_jobs(5)
    db.execute("update private.settings set lease = '1 hour'")
    db.pass_time("10 minutes")
    worker.heartbeat(*jobs)

    worker.recover_stale_jobs()

    assert breaker(db)["state"] == "open"


def test_two_users_cannot_pause_a_model_for_all(db, rich, bob, worker):
    db.execute("update private.settings set breaker_users = default")
    fail(rich, worker, 20)
    fail(bob.has(1000), worker, 20)
    assert breaker(db)["state"] == "closed"

    fail(User(db), worker, 1)

    assert breaker(db)["state"] == "open"


def test_completing_a_job_writes_nothing_where_there_is_nothing_to_reset(db, rich, worker):
    fail(rich, worker, 1)
    rich.enqueue(model=SCHNELL)
    rich.enqueue(model=SCHNELL)
    worker.complete_job(worker.claimed())
    rows = "select xmin::text, * from private.breakers order by name"
    before = db.execute(rows)

    worker.complete_job(worker.claimed())

    assert db.execute(rows) == before


def test_one_model_alone_does_not_pause_its_provider(db, rich, worker):
    for _ in range(30):
        rich.enqueue(model=DEV)
    jobs = worker.claim_jobs(30)

    for job in jobs:
        worker.fail_job(job, "provider_error", retry_after=3600)

    assert breaker(db)["state"] == "open"
    assert (breaker(db, "replicate")["state"], breaker(db, "replicate")["failures"]) == (
        "closed",
        5,
    )


def test_several_models_that_fail_pause_their_provider_and_no_other(db, rich, worker):
    models = db.execute("select id from public.models where provider = 'replicate' limit 4")
    for model in models[:3]:
        fail(rich, worker, 5, model=model["id"])

    assert breaker(db, "replicate")["state"] == "open"
    rich.enqueued(model=PREVIEW)
    with refused("PT503", "model_paused"):
        rich.enqueue(model=models[3]["id"])
    assert worker.claimed().provider == "preview"


def test_a_success_of_one_model_speaks_for_the_provider(db, rich, worker):
    fail(rich, worker, 4)
    rich.enqueue(model=SCHNELL)
    worker.complete_job(worker.claimed())

    assert breaker(db)["failures"] == 4
    assert breaker(db, "replicate")["failures"] == 0


# Half-open.


def test_when_the_pause_is_over_one_job_is_let_through(db, rich, worker, opened):
    db.pass_time("31 seconds")
    assert breaker(db)["state"] == "half-open"

    jobs = worker.claim_jobs(4)

    assert [job.id for job in jobs] == opened[:1]
    assert breaker(db)["state"] == "probing"
    assert worker.claim_jobs(4) == Worker(db).claim_jobs(4) == []


def test_of_many_claims_at_once_one_gets_the_probe(db, rich, opened):
    db.pass_time("31 seconds")
    workers = [Worker(db) for _ in range(6)]

    claims = together([lambda w=w: w.claim_jobs(2) for w in workers])

    assert sum(len(jobs) for jobs in claims) <= 1
    assert breaker(db)["state"] in ("probing", "half-open")


def test_a_claim_that_looked_before_another_began_the_probe_gets_none(db, rich, opened):
    db.pass_time("31 seconds")
    first, second = Worker(db), Worker(db)

    with first.connection.transaction():
        assert len(first.claim_jobs(1)) == 1
        assert second.claim_jobs(4) == []

    assert second.claim_jobs(4) == []


def test_the_probes_success_closes_and_all_come_back(db, rich, worker, opened):
    db.pass_time("31 seconds")
    worker.complete_job(worker.claimed())

    assert breaker(db)["state"] == "closed"
    assert [job.id for job in worker.claim_jobs(4)] == opened[1:]
    fail(rich, worker, 4)
    assert breaker(db)["state"] == "closed"


def test_the_probes_success_wakes_a_worker(db, rich, worker, opened):
    db.pass_time("31 seconds")
    job = worker.claimed()
    other = Worker(db).listening()
    other.sleep()

    worker.complete_job(job)

    assert other.wake_ups() == [""]


def test_each_failed_probe_doubles_the_pause_up_to_the_cap(db, rich, worker, opened):
    pauses = []
    for _ in range(7):
        db.execute("update private.breakers set paused_until = now()")
        worker.fail_job(worker.claimed(), "provider_error", retry_after=0)
        pauses.append(seconds_paused(db))

    assert pauses == [60, 120, 240, 480, 900, 900, 900]
    assert breaker(db)["reason"] == "the probe failed: provider_error"


def test_after_a_success_the_next_pause_is_short_again(db, rich, worker, opened):
    db.pass_time("31 seconds")
    worker.fail_job(worker.claimed(), "provider_error", retry_after=3600)
    db.pass_time("61 seconds")
    worker.complete_job(worker.claimed())

    fail(rich, worker, 5)

    assert seconds_paused(db) == 30


ENDS = {
    "dies": lambda db, worker, job: (db.pass_time("61 seconds"), worker.recover_stale_jobs()),
    "is released": lambda db, worker, job: worker.release_job(job),
    "is moderated": lambda db, worker, job: worker.fail_job(job, "moderated"),
    "is throttled": lambda db, worker, job: worker.fail_job(job, "provider_busy"),
    "loses its user": lambda db, worker, job: db.execute(
        "delete from auth.users where id = %s", job.user_id
    ),
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.usefixtures("opened")
def test_a_probe_that_ends_without_an_answer_leaves_its_place_to_the_next(db, bob, worker, end):
    db.pass_time("31 seconds")
    bob.has(credits=100).enqueued(model=DEV)
    probe = worker.claimed()

    ENDS[end](db, worker, probe)

    assert breaker(db)["state"] == "half-open"
    assert len(worker.claim_jobs(4)) == 1


def test_a_canceled_probe_leaves_its_place_to_the_next(db, rich, worker, opened):
    db.pass_time("31 seconds")
    probe = worker.claimed()
    rich.call("public.cancel_generation", job_id=probe.id)
    worker.connection.execute("select private.cancel_job(%s, %s)", [probe.job_id, probe.token])

    assert [job.id for job in worker.claim_jobs(4)] == opened[1:]


def test_a_job_that_began_before_the_pause_neither_closes_nor_prolongs_it(db, rich, worker):
    rich.enqueue(model=DEV)
    rich.enqueue(model=DEV)
    well, badly = worker.claim_jobs(2)
    fail(rich, worker, 5)
    before = breaker(db)

    worker.complete_job(well)
    worker.fail_job(badly, "provider_error")

    assert breaker(db) == before


def test_a_new_job_may_be_the_probe(db, rich, worker):
    fail(rich, worker, 5)
    db.pass_time("31 seconds")
    job_id = rich.enqueued(model=DEV)

    assert worker.claimed().id == job_id
    assert breaker(db)["state"] == "probing"


def test_one_job_is_the_probe_of_model_and_provider(db, rich, worker, opened):
    worker.pause_provider("replicate", 20)
    db.pass_time("31 seconds")
    rich.enqueue(model=SCHNELL)

    (job,) = worker.claim_jobs(4)
    worker.complete_job(job)

    assert job.id == opened[0]
    assert breaker(db)["state"] == breaker(db, "replicate")["state"] == "closed"
    assert len(worker.claim_jobs(4)) == 2


def test_the_probe_of_a_provider_is_a_job_of_a_model_that_is_not_paused(db, rich, worker, opened):
    worker.pause_provider("replicate", 20)
    db.pass_time("25 seconds")
    rich.enqueued(model=PREVIEW)
    schnell = rich.enqueued(model=SCHNELL)

    jobs = worker.claim_jobs(4)

    assert {job.provider for job in jobs} == {"preview", "replicate"}
    assert schnell in {job.id for job in jobs}
    worker.fail_job(
        next(job for job in jobs if job.id == schnell), "provider_error", retry_after=3600
    )
    assert seconds_paused(db, "replicate") == 60
    assert breaker(db, SCHNELL)["failures"] == 1


# Who is to blame: the model, or the input of those who failed.


@dataclass
class Attack:
    """Users on the free plan whose input fails, beside one whose input is good."""

    db: Database
    count: int
    slow: int = 0  # seconds until they fail

    def __post_init__(self) -> None:
        self.villains = [User(self.db).has(10) for _ in range(self.count)]
        self.honest = User(self.db).has(1000).has_paid()
        self.worker = Worker(self.db, slots=200)
        self.running: list[tuple[int, Job]] = []
        self.kept_waiting = self.failures = 0

    def last(self, seconds: int, step: int = 5) -> None:
        """Let time pass; the honest user asks in each step, the others whenever they may."""
        for now in range(0, seconds, step):
            for villain in self.villains:
                while isinstance(outcome(lambda v=villain: v.enqueue(model=DEV)), dict):
                    pass
            wish = outcome(lambda: self.honest.enqueue(model=DEV))
            self.running += [(now, job) for job in self.worker.claim_jobs(200)]
            done = [job for _, job in self.running if str(job.user_id) == self.honest.id]
            self.kept_waiting += not (isinstance(wish, dict) and done)
            over = [job for began, job in self.running if now - began >= self.slow]
            for job in [*done, *(job for job in over if job not in done)]:
                if job in done:
                    self.worker.complete_job(job)
                else:
                    self.worker.fail_job(job, "timeout" if self.slow else "provider_error")
                    self.failures += 1
            self.running = [each for each in self.running if each[1] not in [*over, *done]]
            self.db.pass_time(f"{step} seconds")
            self.worker.heartbeat(*(job for _, job in self.running))


@pytest.mark.parametrize(("count", "slow"), [(2, 0), (5, 0), (20, 0), (5, 60)])
def test_users_whose_input_fails_throttle_themselves_and_keep_nobody_waiting(db, count, slow):
    db.execute("update public.models set is_active = true")
    attack = Attack(db, count, slow)

    attack.last(300)

    assert attack.kept_waiting == 0
    # Each may fail five jobs or so, of three attempts, not fifty as the plan lets them.
    assert attack.failures <= count * 20
    assert_books_balance(db)


@pytest.fixture
def suspects(db, worker) -> list[User]:
    """Three users who have opened the breaker of DEV, with a job each that waits."""
    db.execute("update public.models set is_active = true")
    db.execute("update private.settings set retry_base = '0'")
    db.lift_limits()
    suspects = [User(db).has(100) for _ in range(3)]
    for user in suspects:
        fail(user, worker, 1)
    for user in [*suspects, *suspects[:2]]:
        user.enqueued(model=DEV)
    for _ in range(2):
        worker.fail_job(worker.claimed(), "provider_error", retry_after=3600)
    assert breaker(db)["state"] == "open"
    return suspects


def test_a_pause_is_for_those_who_failed(suspects, bob, worker):
    for user in suspects:
        with refused("PT503", "model_paused"):
            user.enqueue(model=DEV)
        assert {m["paused_until"] is None for m in user.list_models() if m["id"] == DEV} == {False}
    assert {m["paused_until"] for m in bob.list_models()} == {None}
    assert worker.claim_jobs(4) == []

    jobs = [bob.has(10).enqueued(model=DEV) for _ in range(2)]

    assert [job.id for job in worker.claim_jobs(4)] == jobs[:1]


def test_the_probe_is_a_job_of_a_user_who_has_not_failed_if_there_is_one(db, suspects, bob, worker):
    db.pass_time("31 seconds")
    job = bob.has(10).enqueued(model=DEV)  # of all the last

    assert [job.id for job in worker.claim_jobs(1)] == [job]


def test_the_probe_of_a_provider_is_of_a_user_who_has_not_failed_whatever_the_model(
    db, rich, bob, worker
):
    rich.enqueue(model=DEV)
    worker.pause_provider("replicate", 10, "402", rich.id)
    db.pass_time("11 seconds")
    job = bob.has(10).enqueued(model=SCHNELL)

    assert [job.id for job in worker.claim_jobs(1)] == [job]


def test_where_only_theirs_wait_one_is_tried_after_the_pause(db, suspects, worker):
    db.pass_time("31 seconds")
    worker.fail_job(worker.claimed(), "provider_error", retry_after=3600)

    assert seconds_paused(db) == 60
    assert worker.claim_jobs(4) == []


def test_a_failed_trial_during_a_pause_prolongs_it_for_nobody_and_makes_one_more_suspect(
    db, suspects, bob, worker
):
    fail(bob.has(10), worker, 1)

    assert 28 <= seconds_paused(db) <= 30
    with refused("PT503", "model_paused"):
        bob.enqueue(model=DEV)


def test_a_trial_that_takes_longer_than_the_pause_leaves_its_place(db, suspects, bob, worker):
    bob.has(10).enqueue(model=DEV)
    slow = worker.claimed()
    job = User(db).enqueued(model=DEV)
    assert worker.claim_jobs(4) == []

    db.pass_time("31 seconds")
    assert [job.id for job in worker.claim_jobs(4)] == [job]

    worker.complete_job(slow)
    assert breaker(db)["state"] == "closed"


def test_from_a_hundred_users_on_nobody_is_tried_during_the_pause(db, suspects, bob, worker):
    db.execute(
        "update private.breakers set failed_users = failed_users"
        " || array(select gen_random_uuid() from generate_series(4, 100)) where name = %s",
        DEV,
    )
    bob.has(10).enqueue(model=DEV)

    assert worker.claim_jobs(4) == []
    db.pass_time("31 seconds")
    assert len(worker.claim_jobs(4)) == 1


def test_who_failed_where_another_succeeded_pauses_nobody_for_a_while(db, suspects, bob, worker):
    bob.has(10).enqueue(model=DEV)
    worker.complete_job(worker.claimed())
    assert breaker(db)["state"] == "closed"

    for job in worker.claim_jobs(9):
        worker.fail_job(job, "provider_error", retry_after=3600)
    for user in suspects:
        fail(user, worker, 2)
    assert (breaker(db)["state"], breaker(db)["failures"]) == ("closed", 0)

    db.pass_time("16 minutes")
    db.execute("update private.ready_jobs set run_at = null, fair_key = 0")
    for job in worker.claim_jobs(9):
        worker.fail_job(job, "provider_error", retry_after=3600)
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


def test_a_refusal_that_may_be_one_users_lets_the_jobs_of_others_be_tried(db, rich, bob, worker):
    waiting = rich.enqueued(model=DEV)
    worker.pause_provider("replicate", 60, "402: no credit", rich.id)
    jobs = [bob.has(10).enqueued(model=SCHNELL) for _ in range(3)]

    worker.complete_job(worker.claimed())
    assert breaker(db, "replicate")["state"] == "closed"
    assert {job.id for job in worker.claim_jobs(4)} == {waiting, *jobs[1:]}

    assert not worker.pause_provider("replicate", 60, "402: no credit", rich.id)
    assert breaker(db, "replicate")["state"] == "closed"


def test_what_is_surely_refused_is_for_everybody_whoever_is_refused_next(db, rich, bob, worker):
    worker.pause_provider("replicate", 60, "401: no such key")
    worker.pause_provider("replicate", 60, "402: no credit", rich.id)

    with refused("PT503", "model_paused"):
        bob.enqueue(model=DEV)


def test_a_refused_account_leaves_an_operators_pause_as_it_is(db, service, worker):
    service.pause_model("replicate", reason="maintenance")

    with unchanged(db):
        worker.pause_provider("replicate", 60, "401: no such key")


def test_a_job_that_is_given_back_again_and_again_gives_up(db, alice, worker):
    job_id = alice.enqueued()
    for _ in range(5):
        worker.release_job(worker.claimed())
    db.pass_time("61 minutes")

    worker.release_job(worker.claimed())

    assert alice.get_job_status(job_id)["error"]["code"] == "internal"
    assert alice.credits() == 10
    assert_books_balance(db)


# Operators.


def test_a_paused_model_refuses_new_jobs_and_says_until_when(db, rich, service):
    answer = service.pause_model(DEV, reason="maintenance")

    assert answer == {
        "name": DEV,
        "state": "open",
        "paused_until": "infinity",
        "reason": "maintenance",
        "failures": 0,
        "times_opened": 0,
    }
    with unchanged(db), refused("PT503", "model_paused") as refusal:
        rich.enqueue(model=DEV)
    assert refusal.detail == f"{DEV} is paused"
    assert refusal.refusal.retry_after == 3600
    assert rich.enqueue(model=PREVIEW)["status"] == "queued"


@pytest.mark.parametrize(("interval", "most"), [("90 seconds", 90), ("2 hours", 3600)])
def test_a_paused_model_says_when_to_come_again(db, rich, service, interval, most):
    service.pause_model(DEV, until=str(db.value("select now() + %s::interval", interval)))

    with refused("PT503", "model_paused") as refusal:
        rich.enqueue(model=DEV)

    assert most - 5 <= refusal.refusal.retry_after <= most


def test_every_way_in_is_closed_for_a_paused_provider(db, rich, worker, service):
    rich.enqueue(model=DEV)
    failed = worker.claimed()
    worker.fail_job(failed, "moderated")
    service.pause_model("replicate")

    ways = [
        lambda: rich.enqueue(model=DEV),
        lambda: rich.call(
            "public.enqueue_batch", model=DEV, prompts=["one", "two"], params=Jsonb({})
        ),
        lambda: rich.call("public.retry_generation", job_id=failed.id),
    ]

    for way in ways:
        with unchanged(db), refused("PT503", "model_paused"):
            way()


def test_a_repeat_of_a_request_is_answered_though_the_model_is_paused(rich, service):
    first = rich.enqueue(model=DEV, idempotency_key="k")
    service.pause_model(DEV)

    assert rich.enqueue(model=DEV, idempotency_key="k")["job_id"] == first["job_id"]


def test_the_catalogue_shows_pauses(db, rich, service):
    service.pause_model("replicate")
    until = datetime.fromisoformat(
        service.pause_model(PREVIEW, until=str(db.value("select now() + interval '1 hour'")))[
            "paused_until"
        ]
    )

    paused = {model["id"]: model["paused_until"] for model in rich.list_models()}

    assert paused[DEV] == "infinity"
    assert datetime.fromisoformat(paused[PREVIEW]) == until
    service.resume_model("replicate")
    assert {model["paused_until"] for model in rich.list_models() if model["id"] != PREVIEW} == {
        None
    }


@pytest.mark.parametrize("call", ["pause_model", "resume_model"])
@pytest.mark.parametrize("name", [None, "", "no/such-model", "somebody"])
def test_an_unknown_model_is_neither_paused_nor_resumed(db, service, call, name):
    with unchanged(db), refused("PT404", "not_found"):
        getattr(service, call)(name)


@pytest.mark.parametrize(
    ("arguments", "detail"),
    [
        ({"until": None}, "until: not in the future"),
        ({"until": "2020-01-01"}, "until: not in the future"),
        ({"until": "-infinity"}, "until: not in the future"),
        ({"reason": "x" * 501}, "reason: longer than 500 characters"),
    ],
)
def test_a_pause_that_makes_no_sense_is_refused(db, service, arguments, detail):
    with unchanged(db), refused("PT400", "invalid_input") as refusal:
        service.pause_model(PREVIEW, **arguments)

    assert refusal.detail == detail


def test_an_operators_pause_outlasts_the_probe_and_ends_without_one(
    db, rich, worker, service, opened
):
    db.pass_time("31 seconds")
    probe = worker.claimed()
    service.pause_model(DEV, until=str(db.value("select now() + interval '1 hour'")))

    worker.complete_job(probe)

    assert breaker(db)["state"] == "open"
    assert worker.claim_jobs(4) == []
    rich.enqueued(model=PREVIEW)
    db.pass_time("1 hour")
    db.execute("update private.ready_jobs set run_at = null where run_at < now()")
    assert len(worker.claim_jobs(20)) == 7
    assert breaker(db)["paused_until"] is None


def test_resuming_ends_what_the_breaker_or_a_worker_began(db, rich, worker, service, opened):
    worker.pause_provider("replicate", 600)

    service.resume_model("replicate")
    assert worker.claim_jobs(4) == []
    answer = service.resume_model(DEV)

    assert (answer["state"], answer["times_opened"]) == ("closed", 0)
    assert [job.id for job in worker.claim_jobs(4)] == opened


def test_resuming_again_changes_nothing(db, service):
    service.pause_model(PREVIEW)
    service.resume_model(PREVIEW)

    with unchanged(db):
        service.resume_model(PREVIEW)


def test_resuming_wakes_a_worker(db, service):
    sleeper = Worker(db).listening()
    sleeper.sleep()

    service.resume_model(PREVIEW)

    assert sleeper.wake_ups() == [""]


# What workers pause.


def test_a_pause_keeps_its_reason_and_never_gets_shorter(db, worker):
    worker.pause_provider("replicate", 600, "402: insufficient credit")
    until = db.value("select paused_until from private.breakers where name = 'replicate'")

    worker.pause_provider("replicate", 5, "402: again")

    row = db.row("select * from private.breakers where name = 'replicate'")
    assert (row["paused_until"], row["pause_reason"]) == (until, "402: again")


def test_a_pause_is_an_hour_at_most_and_its_reason_is_cut(db, worker):
    worker.pause_provider("replicate", 10**9, "x" * 5000)

    seconds, reason = db.row(
        "select extract(epoch from paused_until - now())::integer as seconds,"
        " length(pause_reason) as reason from private.breakers where name = 'replicate'"
    ).values()
    assert (3590 < seconds <= 3600, reason) == (True, 500)


def test_a_provider_nobody_knows_is_not_paused(db, worker):
    with unchanged(db):
        worker.pause_provider("somebody", 60)


def test_a_refused_account_is_tried_with_one_job_first(db, rich, worker):
    for _ in range(3):
        rich.enqueue(model=DEV)
    worker.pause_provider("replicate", 60)
    db.pass_time("61 seconds")

    (probe,) = worker.claim_jobs(4)
    worker.pause_provider("replicate", 60)
    worker.release_job(probe)

    assert worker.claim_jobs(4) == []
    assert seconds_paused(db, "replicate") == 60


@pytest.mark.parametrize("end", ["complete_job", "fail_job"])
def test_the_providers_breaker_is_locked_before_the_models(db, rich, worker, end):
    lock = "select from private.breakers where name = %s for update nowait"
    fail(rich, worker, 1)
    rich.enqueue(model=DEV)
    job = worker.claimed()
    calls = {"complete_job": [job], "fail_job": [job, "provider_error"]}

    with ThreadPoolExecutor(1) as pool, contextlib.closing(db.connect()) as other:
        with other.transaction():
            other.execute(lock, ["replicate"])
            ending = pool.submit(getattr(worker, end), *calls[end])
            db.wait_for_lock(worker.connection)
            other.execute(lock, [DEV])
        ending.result()


def test_failures_of_many_models_at_once_do_not_deadlock(db, rich):
    models = [row["id"] for row in db.execute("select id from public.models order by id")]
    for n in range(120):
        rich.enqueue(model=models[n % len(models)])
    workers = [Worker(db) for _ in range(4)]
    jobs = [worker.claim_jobs(30) for worker in workers]

    def end(worker: Worker, own: list) -> list:
        return [
            outcome(
                (lambda j=job: worker.complete_job(j))
                if n % 3 == 0
                else (lambda j=job: worker.fail_job(j, "provider_error"))
            )
            for n, job in enumerate(own)
        ]

    answers = together([lambda w=w, j=j: end(w, j) for w, j in zip(workers, jobs, strict=True)])

    assert {answer for each in answers for answer in each} == {None, "retried"}
    assert_books_balance(db)
