"""sql/70_worker.sql and sql/72_claim.sql: register, claim, heartbeat, progress."""

import functools
from dataclasses import replace

import pytest
from actors import PREVIEW, Job, User, Worker, together
from database import assert_books_balance, unchanged
from explain import explained, nodes, rows_met

DEV = "black-forest-labs/flux-dev"
SCHNELL = "black-forest-labs/flux-schnell"
RECOVERED = "select private.recover_stale_jobs()"


@pytest.fixture
def rich(db, alice):
    """Alice with credits, and every model active."""
    db.execute("update public.models set is_active = true")
    db.lift_limits()
    return alice.has(credits=1000)


def test_a_claim_hands_out_all_a_worker_needs(rich, worker):
    job_id = rich.enqueued("a lighthouse", params={"num_outputs": 2, "seed": 7, "width": 64})

    job = worker.claimed()

    assert (job.id, str(job.user_id)) == (job_id, rich.id)
    assert (job.provider, job.provider_ref) == ("preview", "darkroom/preview")
    assert (job.attempt, job.image_count, job.deadline_seconds) == (1, 2, 300)
    assert (job.provider_input["prompt"], job.provider_input["seed"]) == ("a lighthouse", 7)
    assert (job.provider_job_id, job.image_inputs) == (None, ["image"])


def test_a_claim_takes_at_most_as_many_as_there_are_slots_in_order(db, alice, bob, worker):
    for user in (alice, bob):
        for _ in range(3):
            user.enqueue()
    with unchanged(db):
        assert worker.claim_jobs(0) == []

    claims = [worker.claim_jobs(4) for _ in range(3)]

    assert [len(jobs) for jobs in claims] == [4, 2, 0]
    tokens = [job.token for jobs in claims for job in jobs]
    assert tokens == sorted(tokens)
    assert_books_balance(db)


def test_a_claim_does_not_wait_for_another_one(alice, worker):
    first, second = alice.enqueued(), alice.enqueued()
    other = Worker(worker.db)

    with worker.connection.transaction():
        assert [worker.claimed().id, other.claimed().id] == [first, second]

    assert other.claim_jobs() == []


def test_delayed_jobs_are_claimed_when_they_are_due(db, alice, worker):
    job_id = alice.enqueued()
    worker.fail_job(worker.claimed(), "provider_error", retry_after=30)
    db.pass_time("29 seconds")
    assert worker.claim_jobs() == []

    db.pass_time("1 second")

    assert worker.claimed().id == job_id


def test_a_heartbeat_extends_leases_takes_in_progress_and_gives_each_its_verdict(db, alice, worker):
    for _ in range(3):
        alice.enqueue()
    healthy, stolen, stopped = worker.claim_jobs(3)
    alice.cancel_generation(stopped.id)
    db.pass_time("50 seconds")

    stolen = replace(stolen, token=stolen.token - 1000)
    verdicts = worker.heartbeat(stolen, stopped, healthy, progress=[99, 101, 30])
    worker.heartbeat(healthy)

    assert verdicts == ["lost", "canceled", "ok"]
    db.pass_time("50 seconds")
    assert worker.recover_stale_jobs() == 1  # the stolen one
    progress = db.execute("select progress from private.running_jobs order by token")
    assert [row["progress"] for row in progress] == [30, 100]


# What is paused waits.


def test_jobs_of_a_paused_provider_keep_place_attempt_and_checkpoint(db, rich, worker, service):
    waiting = [rich.enqueued(model=[DEV, SCHNELL][n % 2]) for n in range(4)]
    worker.checkpoint(first := worker.claimed(), "prediction-1")
    worker.fail_job(first, "internal")
    db.pass_time("2 seconds")
    preview, canceled = rich.enqueued(), rich.enqueued(model=DEV)
    service.pause_model("replicate")
    assert [job.id for job in worker.claim_jobs(4)] == [preview]
    assert {rich.get_job_status(job_id)["status"] for job_id in waiting} == {"queued"}
    rich.cancel_generation(canceled)
    later = rich.enqueued()

    service.resume_model("replicate")
    jobs = worker.claim_jobs(8)

    assert [job.id for job in jobs] == [*waiting, later]
    assert [job.attempt for job in jobs] == [2, 1, 1, 1, 1]
    assert jobs[0].provider_job_id == "prediction-1"


# A worker takes only what it can make.

FAL = "FAL_KEY"


def claims(worker: Worker, slots: int = 4) -> list[Job]:
    """Claim as if no look before had taken long, as a session's first does."""
    worker.let_the_next_claim_scan_all()
    return worker.claim_jobs(slots)


@pytest.fixture
def fal(db, rich):
    """A model of a provider with another key, and no limit yet."""
    db.execute("update private.providers set max_running = null")
    db.execute("update public.models set provider = 'fal' where id = %s", SCHNELL)
    return rich


@pytest.mark.parametrize(
    ("change", "keys", "is_taken"),
    [
        ("", [FAL], True),
        ("", [], False),
        ("", ["REPLICATE_API_TOKEN"], False),
        ("is_active = false", [FAL], False),
        ("secret = null", [], True),
        ("secret = 'OTHER_TOKEN'", [FAL], False),  # from now on, with nothing started anew
        ("secret = 'OTHER_TOKEN'", [FAL, "OTHER_TOKEN"], True),
    ],
)
def test_a_job_is_for_workers_that_have_the_key_of_its_provider(db, fal, change, keys, is_taken):
    job_id, own = fal.enqueued(model=SCHNELL), fal.enqueued()
    worker = Worker(db, keys=keys)
    if change:
        db.execute(f"update private.providers set {change} where name = 'fal'")

    claimed = [claims(worker) for _ in range(2)]

    assert {job.id for job in claimed[0]} == {*[job_id] * is_taken, own}
    assert claimed[1] == []


def test_jobs_for_others_keep_their_place_and_attempt_and_those_between_go_in_order(db, fal):
    jobs = [fal.enqueued(model=[SCHNELL, DEV, PREVIEW][n % 3]) for n in range(9)]
    worker, other = Worker(db), Worker(db, keys=[FAL])

    claimed = [job.id for slots in (2, 1, 4) for job in claims(worker, slots)]

    assert claimed == [job_id for n, job_id in enumerate(jobs) if n % 3]
    assert [(job.id, job.attempt) for job in claims(other)] == [(id, 1) for id in jobs[::3]]


def test_a_claim_answers_what_the_worker_needs_of_the_provider(db, fal):
    db.execute("update private.providers set max_running = 7 where name = 'fal'")
    for model in (SCHNELL, PREVIEW):
        fal.enqueue(model=model)

    preview, job = sorted(claims(Worker(db, keys=[FAL])), key=lambda job: bool(job.secret))

    assert (job.provider, job.base_url, job.secret) == ("fal", "https://queue.fal.run", FAL)
    assert (job.max_running, "fal.media" in job.hosts) == (7, True)
    assert "api.fal.ai" in job.key_hosts
    assert (preview.base_url, preview.secret, preview.max_running) == (None, None, None)


def test_a_pile_that_nobody_here_can_make_is_not_walked(db, fal):
    db.execute("update private.plans set max_batch = 100")
    for _ in range(3):
        fal.enqueue_batch(["a lighthouse"] * 100, model=SCHNELL)
    own = [fal.enqueued() for _ in range(2)]
    worker = Worker(db)
    assert [job.id for job in claims(worker, 1)] == own[:1]

    with explained(worker.connection) as plans:
        assert [job.id for job in claims(worker, 1)] == own[1:]

    ready = [node for each in plans for node in nodes(each)]
    assert sum(rows_met(n) for n in ready if n.get("Relation Name") == "ready_jobs") < 30


# Nor more than its provider takes at once.


@pytest.fixture
def limited(db, fal):
    """Two models of that provider, which takes two jobs at once over all workers."""
    db.execute("update private.providers set max_running = 2 where name = 'fal'")
    db.execute("update public.models set provider = 'fal' where id = %s", DEV)
    return fal


def test_no_more_of_a_provider_run_than_it_takes_and_the_next_goes_when_one_ends(db, limited):
    jobs = [limited.enqueued(model=[SCHNELL, DEV][n % 2]) for n in range(5)]
    first, second = Worker(db, keys=[FAL]), Worker(db, keys=[FAL])
    own = limited.enqueued()

    running = [*claims(first, 1), *claims(second)]

    assert [job.id for job in running] == [*jobs[:2], own]
    assert claims(first) == []
    first.complete_job(running[0])
    running += claims(second)
    second.fail_job(running[1], "moderated")
    running += claims(second)
    assert claims(second) == []
    assert [job.id for job in running[3:]] == jobs[2:4]
    db.execute("update private.providers set max_running = 1 where name = 'fal'")
    second.complete_job(running[3])
    assert claims(first) == []  # one more still runs
    assert_books_balance(db)


@pytest.mark.parametrize(("part", "running"), [(None, 2), (0, 0), (1, 1), (9, 2)])
def test_of_what_a_provider_takes_this_database_runs_its_part(db, limited, part, running):
    for _ in range(4):
        limited.enqueue(model=SCHNELL)
    db.execute("update private.providers set part = %s", part)
    own = limited.enqueued()

    taken = [job.id for job in claims(Worker(db, keys=[FAL]))]

    assert own in taken, "the preview's provider has no limit, so there is nothing to divide"
    assert len(taken) == 1 + running


def test_two_that_claim_at_once_never_take_more_than_a_provider_takes(db, limited):
    for _ in range(4):
        limited.enqueue(model=SCHNELL)
    first, second = Worker(db, keys=[FAL]), Worker(db, keys=[FAL])
    own = limited.enqueued()

    with first.connection.transaction():
        assert len(claims(first, 1)) == 1
        assert [job.id for job in claims(second)] == [own]  # the rest waits for no lock

    assert [len(claims(each)) for each in (second, first)] == [1, 0]


def test_many_that_claim_at_once_fill_a_provider_and_never_overfill_it(db, limited):
    db.execute("update private.providers set max_running = 5 where name = 'fal'")
    users = [User(db).has(1000) for _ in range(3)]
    workers = [Worker(db, keys=[FAL]) for _ in range(4)]
    jobs = {user.enqueued(model=[SCHNELL, DEV][n % 2]) for n in range(12) for user in users}
    running = "select count(*) from private.running_jobs"
    done: set[str] = set()
    counted: list[int] = []

    def work(worker: Worker) -> None:
        for job in worker.claim_jobs(2):
            counted.append(worker.db.connect().execute(running).fetchone()[0])
            worker.complete_job(job)
            done.add(job.id)

    while done != jobs:
        before = len(done)
        workers[0].let_the_next_claim_scan_all()
        together([functools.partial(work, each) for each in workers])
        assert len(done) > before

    assert max(counted) <= 5
    assert_books_balance(db)


def test_who_leaves_room_at_a_provider_wakes_one_who_sleeps(db, limited):
    running = [Worker(db, keys=[FAL]) for _ in range(2)]
    for _ in range(4):
        limited.enqueue(model=SCHNELL)
    first, second = (claims(each, 1)[0] for each in running)
    sleepers = [Worker(db, keys=keys).listening() for keys in ([], [FAL])]
    for each in sleepers:
        assert claims(each) == []
        each.sleep()

    running[0].complete_job(first)
    running[1].complete_job(second)
    assert len(claims(running[0], 1)) == 1

    assert [each.wake_ups() for each in sleepers] == [[], [""]]
    assert len(claims(sleepers[1])) == 1


# While a look at the whole queue is dear, one session looks for all.


def due_in(db, name: str, seconds: float) -> None:
    query = "select setval(%s::regclass, (1000 * (extract(epoch from now()) + %s))::bigint)"
    db.execute(query, f"private.{name}", seconds)


@pytest.fixture
def below(db, alice, worker) -> str:
    """A job that lies below the clock."""
    job_id = alice.enqueued()
    worker.release_job(worker.claimed())
    db.execute("select setval('private.virtual_clock', 1000000000)")
    return job_id


def test_what_lies_below_the_clock_is_found_first_when_somebody_may_look(db, bob, below):
    due_in(db, "scan_due", 30)
    assert [Worker(db).claim_jobs() for _ in range(2)] == [[], []]
    bob.enqueue()

    due_in(db, "scan_due", -1)

    assert Worker(db).claimed().id == below


def test_recovery_waits_until_somebody_may_look(db, alice, worker):
    alice.enqueue()
    worker.claimed()
    db.pass_time("61 seconds")
    due_in(db, "recovery_due", 10)
    assert db.value(RECOVERED) == 0

    due_in(db, "recovery_due", -1)
    assert db.value(RECOVERED) == 1
