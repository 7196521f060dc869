"""More than one way to a model: the next route is taken where one does not serve."""

import pytest
from actors import PREVIEW, Job, User, Worker, refused
from database import assert_books_balance
from explain import explained, nodes, rows_met
from fake_replicate import FakeReplicate
from psycopg.types.json import Jsonb
from worker_process import Workers

DEV = "black-forest-labs/flux-dev"
SCHNELL = "black-forest-labs/flux-schnell"
KEYS = ("REPLICATE_API_TOKEN", "FAL_KEY", "BFL_API_KEY")


def add_route(db, place: int, provider: str, model: str = DEV, **columns) -> None:
    row = {"model_id": model, "place": place, "provider": provider, "provider_ref": f"ref-{place}"}
    row |= columns
    names, marks = ", ".join(row), ", ".join(["%s"] * len(row))
    query = f"insert into private.model_routes ({names}) values ({marks})"
    db.execute(query, *row.values())


@pytest.fixture
def worker(db) -> Worker:
    """One that serves all three providers."""
    return Worker(db, keys=KEYS)


@pytest.fixture
def rich(db, alice, worker):
    """Alice with credits, and a model of Replicate's that fal and BFL have, too."""
    db.lift_limits()
    db.execute("update public.models set is_active = true, cost_usd = 1, cost_unit = 'image'")
    db.execute("update private.settings set retry_base = '0'")
    db.execute("update private.providers set max_running = null")
    add_route(db, 1, "fal", cost_usd=2, cost_unit="image")
    add_route(db, 2, "bfl")
    return alice.has(credits=1000)


def claims(worker: Worker, slots: int = 4) -> list[Job]:
    worker.let_the_next_claim_scan_all()
    return worker.claim_jobs(slots)


def taken(worker: Worker, slots: int = 4) -> list[tuple[str, str]]:
    """Claim; return who is to make which job."""
    return [(job.id, job.provider) for job in claims(worker, slots)]


def fail(user: User, worker: Worker, times: int, model: str = DEV) -> None:
    """Have jobs of a user fail so often, each in words of its own, to come back much later."""
    for n in range(times):
        user.enqueue(model=model)
        worker.fail_job(worker.claimed(), "provider_error", f"words {n} {user.id}", 3600)


# Where a route is shut.

SHUT = {
    "its provider is paused by an operator": lambda db, worker, service: service.pause_model(
        "replicate"
    ),
    "its provider is paused by a worker": lambda db, worker, service: worker.pause_provider(
        "replicate", 60
    ),
    "it is paused itself": lambda db, worker, service: db.execute(
        "insert into private.breakers (name, times_opened, paused_until)"
        " values (%s, 1, now() + interval '1 minute')",
        DEV,
    ),
    "its provider is switched off": lambda db, worker, service: db.execute(
        "update private.providers set is_active = false where name = 'replicate'"
    ),
    "no living worker has the key": lambda db, worker, service: db.execute(
        "update private.providers set secret = 'OTHER_KEY' where name = 'replicate'"
    ),
}


@pytest.mark.parametrize("reason", SHUT)
def test_where_a_route_is_shut_the_next_is_taken_in_fair_order_until_it_opens(
    db, rich, worker, service, reason
):
    bob = User(db).has(100)
    jobs = [(rich, bob)[n % 2].enqueued(model=(DEV, PREVIEW)[n // 2 % 2]) for n in range(8)]
    by = ["fal", "fal", "preview", "preview"] * 2

    SHUT[reason](db, worker, service)

    assert set(taken(worker)) == set(zip(jobs[:4], by[:4], strict=True))
    assert taken(worker, 1) == [(jobs[4], "fal")]
    db.execute("update private.providers set is_active = true, secret = %s"
               " where name = 'replicate'", KEYS[0])  # fmt: skip
    service.resume_model("replicate")
    service.resume_model(DEV)
    assert taken(worker) == list(zip(jobs[5:], ["replicate", *by[6:]], strict=True))
    assert_books_balance(db)


def test_one_that_is_shut_as_well_is_passed_over_and_the_last_leads_to_the_first(
    db, rich, worker, service
):
    jobs = [rich.enqueued(model=DEV) for _ in range(3)]
    for name in ("replicate", f"{DEV}#1"):
        service.pause_model(name)
    (job,) = claims(worker, 1)
    assert (job.id, job.provider, job.provider_ref) == (jobs[0], "bfl", "ref-2")
    worker.fail_job(job, "provider_error")

    service.resume_model("replicate")
    service.pause_model("bfl")

    assert taken(worker) == [(job_id, "replicate") for job_id in jobs]


def test_a_limit_that_is_reached_is_no_reason_and_that_of_the_next_counts(
    db, rich, worker, service
):
    db.execute("update private.providers set max_running = 1 where name in ('replicate', 'fal')")
    jobs = [rich.enqueued(model=DEV) for _ in range(3)]
    assert taken(worker) == [(jobs[0], "replicate")]
    assert taken(worker) == []

    service.pause_model("replicate")

    assert taken(worker) == [(jobs[1], "fal")]
    assert taken(worker) == []


def test_who_cannot_serve_an_open_route_leaves_the_job_to_those_who_can(db, rich, worker):
    job = rich.enqueued(model=DEV)
    other = Worker(db, keys=["FAL_KEY"])
    assert taken(other) == []

    worker.unregister_worker()

    assert taken(other) == [(job, "fal")]


def test_what_may_have_bought_something_stays_where_it_did(db, rich, worker, service):
    jobs = [rich.enqueued(model=DEV) for _ in range(3)]
    bought, unsure, asked_for_nothing = claims(worker)
    worker.checkpoint(bought, "prediction-1")
    for job in (bought, unsure):
        worker.fail_job(job, "internal")
    worker.release_job(asked_for_nothing, resumes=False)
    service.pause_model("replicate")

    assert taken(worker) == [(jobs[2], "fal")]

    service.resume_model("replicate")
    resumed = {job.id: job for job in claims(worker)}
    assert {job.provider for job in resumed.values()} == {"replicate"}
    assert (resumed[jobs[0]].provider_job_id, resumed[jobs[0]].attempt) == ("prediction-1", 2)
    assert resumed[jobs[1]].begun_before


def test_those_who_failed_go_the_next_way_and_others_try_the_first(db, rich, bob, worker):
    db.execute("update private.settings set max_attempts = 100")
    suspects = [rich, *[User(db).has(100) for _ in range(2)]]
    fail(suspects[1], worker, 2)
    fail(suspects[2], worker, 2)
    fail(rich, worker, 1)
    names = db.execute("select name from private.breakers where paused_until > now()")
    assert names == [{"name": DEV}]

    theirs = [user.enqueued(model=DEV) for user in suspects]  # accepted: there is another way
    tried, behind = (bob.has(10).enqueued(model=DEV) for _ in range(2))

    by = dict(taken(worker, 9))
    assert by == dict.fromkeys(theirs, "fal") | {tried: "replicate", behind: "fal"}


def test_when_its_pause_is_over_a_route_is_tried_with_one_job_and_all_come_back(db, rich, worker):
    worker.pause_provider("replicate", 60)
    db.pass_time("61 seconds")
    jobs = [rich.enqueued(model=DEV) for _ in range(5)]

    first, *others = claims(worker, 3)
    assert (first.id, first.provider) == (jobs[0], "replicate")
    assert [(job.id, job.provider) for job in others] == [(each, "fal") for each in jobs[1:3]]

    worker.complete_job(first)
    assert taken(worker) == [(each, "replicate") for each in jobs[3:]]


def test_a_pile_that_goes_the_next_way_is_not_walked(db, rich, worker, service):
    db.execute("update private.plans set max_batch = 100")
    rich.has(1500)
    for _ in range(3):
        rich.enqueue_batch(["a lighthouse"] * 100, model=DEV)
    service.pause_model("replicate")
    assert len(claims(worker, 1)) == 1

    with explained(worker.connection) as plans:
        assert [job.provider for job in claims(worker, 1)] == ["fal"]

    ready = [node for each in plans for node in nodes(each)]
    assert sum(rows_met(n) for n in ready if n.get("Relation Name") == "ready_jobs") < 30


# Out of attempts.


def test_out_of_attempts_the_next_route_is_taken_with_as_many_again(db, rich, worker):
    job_id = rich.enqueued(model=DEV)
    left, tried = rich.credits(), []
    for _ in range(9):
        (job,) = claims(worker)
        assert (job.provider_job_id, job.begun_before) == (None, None)
        tried.append((job.provider, job.attempt))
        worker.fail_job(job, "provider_error")
        db.execute("delete from private.breakers")

    assert tried == [(name, n) for name in ("replicate", "fal", "bfl") for n in (1, 2, 3)]
    assert rich.get_job_status(job_id)["status"] == "failed"
    assert rich.credits() > left
    assert_books_balance(db)


def test_what_the_next_route_does_anew_is_paid_at_both(db, rich, worker):
    db.execute("update private.settings set max_attempts = 1")
    job_id = rich.enqueued(model=DEV)
    price = rich.get_job_status(job_id)["price_credits"]
    (job,) = claims(worker)
    worker.checkpoint(job, "prediction-1")
    assert worker.fail_job(job, "provider_timeout", metrics={"images": 1}) == "retried"

    (job,) = claims(worker)
    assert (job.provider, job.provider_job_id, job.attempt) == ("fal", None, 1)
    worker.complete_job(job, metrics={"images": 1})

    status = rich.get_job_status(job_id)
    assert (status["status"], status["price_credits"]) == ("completed", price)
    query = "select provider, outcome, cost_usd from private.attempts order by ended_at"
    assert [tuple(row.values()) for row in db.execute(query)] == [
        ("replicate", "retried", 1),
        ("fal", "completed", 2),
    ]
    assert db.row("select providers, cost_usd from private.costs where attempts > 0") == {
        "providers": ["fal", "replicate"],
        "cost_usd": 3,
    }


@pytest.mark.parametrize(
    ("code", "ends"),
    [
        *[(code, True) for code in ("moderated", "invalid_input", "output_refused")],
        *[(code, True) for code in ("outcome_unknown", "timeout")],
        ("internal", False),
    ],
)
def test_what_no_other_attempt_would_mend_ends_the_job(db, rich, worker, code, ends):
    db.execute("update private.settings set max_attempts = 1")
    job_id = rich.enqueued(model=DEV)

    worker.fail_job(worker.claimed(), code)

    assert rich.get_job_status(job_id)["status"] == ("failed" if ends else "queued")


def test_a_job_goes_from_route_to_route_only_while_it_may_be_claimed(db, rich, worker):
    db.execute("update private.settings set max_attempts = 1, max_claims = 2")
    job_id = rich.enqueued(model=DEV)

    assert [worker.fail_job(claims(worker)[0], "provider_error") for _ in range(2)] == [
        "retried",
        "failed",
    ]
    assert rich.get_job_status(job_id)["status"] == "failed"


def test_whose_route_is_deleted_takes_the_models_own(db, rich, worker, service):
    db.execute("update private.settings set max_attempts = 1")
    job_id = rich.enqueued(model=DEV)
    for scans in (worker.claim_jobs, claims):
        worker.fail_job(worker.claimed(), "provider_error")
        db.execute("delete from private.breakers")
        db.execute("delete from private.model_routes where place = 1")
        if scans is claims:
            service.pause_model(SCHNELL)
        (job,) = worker.claim_jobs()
        assert (job.id, job.provider, worker.next_step(job)["step"]) == (
            job_id,
            "replicate",
            "create",
        )
        add_route(db, 1, "fal")
        worker.release_job(job, resumes=False)


# Breakers.


def test_failures_count_against_the_route_taken_and_its_provider(db, rich, worker, service):
    db.execute("update private.settings set breaker_users = 1, max_attempts = 100")
    service.pause_model("replicate")
    fail(rich, worker, 5)

    names = "select name from private.breakers where failures > 0 or times_opened > 0 order by 1"
    assert [row["name"] for row in db.execute(names)] == [f"{DEV}#1", "fal"]

    job = rich.enqueued(model=DEV)
    assert taken(worker) == [(job, "bfl")]
    db.execute("update private.breakers set paused_until = now() where name = %s", f"{DEV}#1")
    rich.enqueue(model=DEV)
    (probe,) = claims(worker)
    assert probe.provider == "fal"
    worker.complete_job(probe)
    assert db.execute(names) == []


def test_only_the_route_that_is_withdrawn_is_paused_and_its_job_goes_on(db, rich, worker, service):
    jobs = [rich.enqueued(model=DEV) for _ in range(2)]
    for name in ("replicate", "fal"):
        (job,) = claims(worker, 1)
        assert (job.id, job.provider, job.attempt) == (jobs[0], name, 1)
        worker.fail_job(job, "model_withdrawn", "404")

    assert taken(worker) == [(each, "bfl") for each in jobs]
    assert service.alerts()["paused"] == (
        f"model {DEV} until infinity: model_withdrawn: 404; "
        f"model {DEV}#1 until infinity: model_withdrawn: 404"
    )
    service.resume_model(f"{DEV}#1")
    rich.enqueue(model=DEV)
    assert [job.provider for job in claims(worker)] == ["fal"]


# What users see.


def test_a_request_is_refused_only_where_all_routes_are_paused_for_the_user(
    db, rich, bob, worker, service
):
    def paused() -> bool:
        (until,) = (m["paused_until"] for m in rich.list_models() if m["id"] == DEV)
        return until is not None

    for name in ("replicate", "fal"):
        service.pause_model(name)
    assert rich.enqueue(model=DEV)["status"] == "queued"
    assert not paused()

    service.pause_model(f"{DEV}#2", until="2100-01-01")
    assert paused()
    with refused("PT503", "model_paused"):
        rich.enqueue(model=DEV)
    assert claims(worker) == []

    service.resume_model(f"{DEV}#2")
    db.execute(
        "insert into private.breakers (name, times_opened, paused_until, failed_users)"
        " values ('bfl', 1, now() + interval '1 minute', array[%s::uuid])",
        rich.id,
    )
    with refused("PT503", "model_paused") as refusal:
        rich.enqueue(model=DEV)
    assert refusal.refusal.retry_after <= 60
    job = bob.has(10).enqueued(model=DEV)
    assert taken(worker) == [(job, "bfl")]


def test_a_route_that_nobody_serves_is_no_way_round_a_pause(db, rich, worker, service):
    db.execute("update private.providers set is_active = false where name = 'bfl'")
    db.execute("update private.providers set secret = 'OTHER_KEY' where name = 'fal'")
    service.pause_model("replicate")

    with refused("PT503", "model_paused"):
        rich.enqueue(model=DEV)


def test_an_operator_who_pauses_a_model_pauses_all_its_routes(db, rich, worker, service):
    rich.enqueue(model=DEV)
    service.pause_model(DEV)

    with refused("PT503", "model_paused"):
        rich.enqueue(model=DEV)
    assert claims(worker) == []
    (depth,) = db.execute("select ready, paused from private.queue_by_model")
    assert (depth["ready"], depth["paused"]) == (0, 1)


def test_a_model_with_a_way_left_counts_as_ready_and_raises_no_alert_for_want_of_workers(
    db, rich, worker, service
):
    db.execute("update private.providers set secret = 'OTHER_KEY' where name = 'replicate'")
    service.pause_model("fal")
    rich.enqueue(model=DEV)

    health = service.queue_health()

    assert (health["depth"]["ready"], health["unserved"]) == (1, {})
    db.execute("update private.providers set is_active = false where name <> 'preview'")
    assert service.queue_health()["unserved"] == {"replicate": 1}


def test_a_request_wakes_who_serves_its_first_route_or_else_another(db, rich, worker):
    worker.unregister_worker()
    sleepers = {key: Worker(db, keys=[key]).listening() for key in ("OTHER_KEY", *KEYS[:2])}
    for each in sleepers.values():
        each.sleep()

    rich.enqueue(model=DEV)
    assert [each.wake_ups() for each in sleepers.values()] == [[], [""], []]
    rich.enqueue(model=DEV)
    assert [each.wake_ups() for each in sleepers.values()] == [[], [], [""]]


# By a real worker.


@pytest.mark.parametrize("trouble", ["it fails", "its account is refused"])
def test_a_real_worker_makes_it_by_the_next_route_in_its_own_words(db, stack, tmp_path, trouble):
    db.execute(
        "insert into private.providers (name, secret, lost_create, recipe)"
        " select 'second', 'SECOND_KEY', lost_create, recipe"
        " from private.providers where name = 'replicate'"
    )
    template = {"text": "{{input.prompt}}", "shape": "{{input.aspect_ratio}}"}
    add_route(
        db, 1, "second", SCHNELL, provider_ref="other/own", input_template=Jsonb(template),
        cost_usd=0.5, cost_unit="image",
    )  # fmt: skip
    db.execute("update public.models set is_active = true, deadline = '1 minute'")
    db.execute("update private.settings set max_attempts = 1")
    alice = User(db).has(credits=10)
    with (
        FakeReplicate() as first,
        FakeReplicate() as second,
        Workers(db, stack, tmp_path) as workers,
    ):
        for name, fake in (("replicate", first), ("second", second)):
            db.runs_at(name, fake.url)
        keys = {"REPLICATE_API_TOKEN": first.token, "SECOND_KEY": second.token}
        workers.extra_secrets = set(keys.values())
        if trouble == "it fails":
            first.next(ends="failed")
        else:
            first.next(answer=402)
            first.account_status = 402
        workers.start(**keys, WORKER_POLL_SECONDS=0.1)

        job = alice.enqueued("a lighthouse", SCHNELL, params={"aspect_ratio": "16:9"})
        workers.until(job, "completed")

        assert len(first.creates) == 1
        (create,) = second.creates
        assert create.body == {
            "version": "other/own",
            "input": {"text": "a lighthouse", "shape": "16:9"},
        }
        status = alice.get_job_status(job)
        query = "select provider, outcome, cost_usd from private.attempts order by token"
        tried, made = db.execute(query)
        assert (tried["provider"], made["provider"]) == ("replicate", "second")
        assert (made["outcome"], float(made["cost_usd"])) == ("completed", 0.5)
        assert status["price_credits"] == 10 - alice.credits()
