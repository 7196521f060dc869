"""sql/29_budgets.sql: what may be spent at providers, in all and by whom, is never passed."""

import pytest
from actors import PREVIEW, User, Worker, refused, together
from database import assert_books_balance
from test_failover import KEYS, add_route

DEV = "black-forest-labs/flux-dev"
SCHNELL = "black-forest-labs/flux-schnell"


@pytest.fixture
def worker(db) -> Worker:
    return Worker(db, slots=64, keys=KEYS)


@pytest.fixture
def rich(db, alice, worker):
    """Alice with credits, and two models at 1 USD an image beside the preview, which is free."""
    db.lift_limits()
    db.execute(
        "update public.models set is_active = true, cost_usd = 1, cost_unit = 'image'"
        " where provider = 'replicate'"
    )
    db.execute("update private.settings set retry_base = '0'")
    db.execute("update private.providers set max_running = null")
    return alice.has(credits=100_000)


def budget(db, limit: float, **columns) -> int:
    row = {"limit_usd": limit, "period": "day"} | columns
    names, marks = ", ".join(row), ", ".join(["%s"] * len(row))
    query = f"insert into private.budgets ({names}) values ({marks}) returning id"
    return db.value(query, *row.values())


def state(db) -> dict[str, float]:
    """Return what the one budget has spent and reserved."""
    row = db.row("select spent_usd, reserved_usd from private.budget_states")
    return {key: float(value) for key, value in row.items()}


def claims(worker: Worker, slots: int = 64) -> list[str]:
    worker.let_the_next_claim_scan_all()
    return [job.id for job in worker.claim_jobs(slots)]


# What a budget holds.


def test_concurrent_claims_never_buy_more_than_a_budget_holds(db, rich, worker):
    budget(db, 10)
    jobs = [rich.enqueued(model=DEV) for _ in range(80)]
    workers = [Worker(db, keys=KEYS) for _ in range(64)]

    together([lambda w=w: w.claim_jobs(1) for w in workers])
    assert db.value("select count(*) from private.running_jobs") <= 10
    claims(workers[0])  # what others held and gave back is behind the clock until a scan

    assert db.value("select count(*) from private.running_jobs") == 10
    assert state(db) == {"spent_usd": 0, "reserved_usd": 10}
    running = {str(row["job_id"]) for row in db.execute("select job_id from private.running_jobs")}
    assert running <= set(jobs[:64])  # who loses the last place gives the job back
    with refused("PT503", "budget_spent"):
        rich.enqueue(model=DEV)


SCOPES = {
    "app": ({}, set()),
    "provider": ({"provider": "replicate"}, {"preview", "paid user's preview"}),
    "model": ({"model_id": DEV}, {"other model", "preview", "paid user's preview"}),
    "plan": ({"plan": "free"}, {"paid user", "paid user's preview"}),
    "user": ({"user_id": "alice"}, {"paid user", "paid user's preview"}),
    "user of a model": ({"user_id": "alice", "model_id": DEV},
                        {"other model", "preview", "paid user", "paid user's preview"}),
    "user and a plan that is not theirs": (
        {"user_id": "alice", "plan": "paid"},
        {"own", "other model", "preview", "paid user", "paid user's preview"},
    ),
}  # fmt: skip
ASKED = {
    "own": ("rich", DEV),
    "other model": ("rich", SCHNELL),
    "preview": ("rich", PREVIEW),
    "paid user": ("paid", DEV),
    "paid user's preview": ("paid", PREVIEW),
}


@pytest.fixture
def users(db, rich) -> dict[str, User]:
    return {"rich": rich, "paid": User(db).has(1000).has_paid()}


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("on_breach", ["refuse", "pause", "alert"])
def test_a_budget_of_0_stops_what_it_is_for_and_nothing_else(db, users, worker, scope, on_breach):
    columns, others = SCOPES[scope]
    if columns.get("user_id"):
        columns = columns | {"user_id": users["rich"].id}
    jobs = {name: users[user].enqueued(model=model) for name, (user, model) in ASKED.items()}

    budget(db, 0, on_breach=on_breach, **columns)

    go_on = set(jobs) if on_breach == "alert" else others
    assert set(claims(worker)) == {jobs[name] for name in go_on}
    for name, (user, model) in ASKED.items():
        if on_breach == "refuse" and name not in others:
            with refused("PT503", "budget_spent") as expected:
                users[user].enqueue(model=model)
            assert 1 <= expected.refusal.retry_after <= 3600
        else:
            users[user].enqueue(model=model)
    db.execute("delete from private.budgets")
    assert set(jobs.values()) - set(claims(worker)) == {jobs[name] for name in go_on}
    assert_books_balance(db)


@pytest.mark.parametrize("scope", SCOPES)
def test_a_budget_that_holds_two_lets_two_go_and_what_costs_nothing(db, users, worker, scope):
    columns, others = SCOPES[scope]
    if columns.get("user_id"):
        columns = columns | {"user_id": users["rich"].id}
    jobs = {name: [] for name in ASKED}
    for _ in range(4):
        for name, (user, model) in ASKED.items():
            jobs[name].append(users[user].enqueued(model=model))
    budget(db, 2, **columns)

    claimed = set(claims(worker)) | set(claims(worker)) | set(claims(worker, 3))

    free = {*others, "preview", "paid user's preview"}
    assert claimed >= {job for name in free for job in jobs[name]}
    limited = {job for name in jobs.keys() - free for job in jobs[name]}
    assert len(claimed & limited) == min(2, len(limited))


def test_by_the_next_route_it_goes_where_the_providers_budget_is_spent(db, rich, worker):
    add_route(db, 1, "fal", cost_usd=3, cost_unit="image")
    add_route(db, 2, "bfl")  # nobody knows what it takes
    budget(db, 2, provider="replicate")
    budget(db, 7, provider="fal")
    jobs = [rich.enqueued(model=DEV) for _ in range(8)]

    for _ in range(3):
        claims(worker)

    rows = db.execute("select job_id, route from private.running_jobs")
    by = {str(row["job_id"]): row["route"] for row in rows}
    assert [by.get(job) for job in jobs] == [0, 0, 1, 1, 2, 2, 2, 2]


@pytest.mark.parametrize(("unit", "reserved"), [("image", 3), ("second", 120)])
def test_what_a_job_may_cost_at_most_is_reserved(db, rich, worker, unit, reserved):
    db.execute("update public.models set cost_unit = %s where id = %s", unit, SCHNELL)
    budget(db, 120)
    rich.enqueue(model=SCHNELL, params={"num_outputs": 3})

    worker.claimed()

    assert state(db) == {"spent_usd": 0, "reserved_usd": reserved}


# What is booked.

TWO = {"num_outputs": 2}
ENDS = {  # of a job of two images at 1 USD each: what it cost, and what stays reserved
    "completed": (lambda w, j: w.complete_job(j, 2, metrics={"images": 2}), 2, 0),
    "of one image": (lambda w, j: w.complete_job(j, 1, metrics={"images": 1}), 1, 0),
    "for more": (lambda w, j: w.complete_job(j, 2, metrics={"images": 2, "cost_usd": 2.5}), 2.5, 0),
    "for an unknown price": (lambda w, j: w.complete_job(j, 2), 2, 0),
    "failed": (lambda w, j: w.fail_job(j, "moderated"), 2, 0),
    "failed, not billed": (
        lambda w, j: w.fail_job(j, "moderated", metrics={"is_billed": False}), 0, 0),
    "never asked for": (
        lambda w, j: w.fail_job(j, "provider_timeout", metrics={"is_asked": False}), 0, 0),
    "failed, to begin anew": (lambda w, j: w.fail_job(j, "provider_error"), 2, 0),
    "to be resumed": (lambda w, j: w.fail_job(j, "provider_timeout"), 0, 2),
    "released, to be resumed": (lambda w, j: w.release_job(j), 0, 2),
    "released, nothing bought": (lambda w, j: w.release_job(j, resumes=False), 0, 0),
    "dead worker": (lambda w, j: (w.db.pass_time("61 seconds"), w.recover_stale_jobs()), 0, 2),
    "past its deadline": (
        lambda w, j: (
            w.db.execute("update private.running_jobs set deadline_at = now() - interval '1 s'"),
            w.recover_stale_jobs(),
        ), 2, 0),
    "canceled": (lambda w, j: (User(w.db, str(j.user_id)).cancel_generation(j.id),
                               w.cancel_job(j)), 2, 0),
    "released, then canceled": (
        lambda w, j: (w.release_job(j), User(w.db, str(j.user_id)).cancel_generation(j.id)), 2, 0),
    "its user is gone": (
        lambda w, j: w.db.execute("delete from auth.users where id = %s", j.user_id), 2, 0),
    "released, then its user is gone": (
        lambda w, j: (w.release_job(j),
                      w.db.execute("delete from auth.users where id = %s", j.user_id)), 2, 0),
}  # fmt: skip


@pytest.mark.parametrize("end", ENDS)
def test_what_it_cost_is_booked_or_all_that_was_reserved_and_the_rest_given_back(
    db, rich, worker, end
):
    act, spent, reserved = ENDS[end]
    budget(db, 100)
    rich.enqueue(model=SCHNELL, params=TWO)
    job = worker.claimed()

    act(worker, job)

    assert state(db) == {"spent_usd": spent, "reserved_usd": reserved}


def test_what_is_resumed_goes_on_though_the_budget_is_spent_and_is_paid_once(db, rich, worker):
    budget(db, 2)
    first, second = [rich.enqueued(model=DEV) for _ in range(2)]
    waiting = [rich.enqueued(model=DEV) for _ in range(8)]
    for job in worker.claim_jobs(2):
        worker.release_job(job)
    other = Worker(db, keys=KEYS)

    (one,) = other.claim_jobs(1)
    other.fail_job(one, "provider_timeout")
    jobs = other.claim_jobs(8)

    assert {job.id for job in jobs} == {first, second}
    for job in jobs:
        other.complete_job(job, metrics={"images": 1})
    assert state(db) == {"spent_usd": 2, "reserved_usd": 0}
    assert claims(other) == []
    db.execute("update private.budgets set limit_usd = 3")
    assert claims(other) == waiting[:1]


def test_what_begins_anew_by_another_route_is_booked_by_what_each_costs(db, rich, worker):
    add_route(db, 1, "fal", cost_usd=3, cost_unit="image")
    db.execute("update private.settings set max_attempts = 1")
    app, replicate, fal = (budget(db, 100, **c) for c in (
        {}, {"provider": "replicate"}, {"provider": "fal"}))  # fmt: skip
    rich.enqueue(model=DEV)
    worker.fail_job(worker.claimed(), "internal")  # nobody knows what it bought

    worker.complete_job(worker.claimed(), metrics={"images": 1})

    spent = db.execute("select id, spent_usd from private.budget_states")
    assert {row["id"]: row["spent_usd"] for row in spent} == {app: 4, replicate: 1, fal: 3}


def test_a_call_that_is_repeated_books_nothing(db, rich, worker):
    budget(db, 100)
    for _ in range(2):
        rich.enqueue(model=DEV)
    first, second = worker.claim_jobs(2)

    for _ in range(2):
        worker.complete_job(first, metrics={"images": 1})
        worker.fail_job(second, "moderated")

    assert state(db) == {"spent_usd": 2, "reserved_usd": 0}


# Spent, and what ends it.


@pytest.fixture
def spent(db, rich, worker) -> list[str]:
    """A budget of two is spent, and jobs wait for it."""
    budget(db, 2)
    jobs = [rich.enqueued(model=DEV) for _ in range(6)]
    for job in worker.claim_jobs(4):
        worker.complete_job(job, metrics={"images": 1})
    assert claims(worker) == []
    return jobs[2:]


@pytest.mark.parametrize("period", ["hour", "day", "month"])
def test_when_its_period_is_over_it_begins_anew(db, rich, worker, spent, period):
    db.execute("update private.budgets set period = %s", period)
    with refused("PT503", "budget_spent") as expected:
        rich.enqueue(model=DEV)
    assert 1 <= expected.refusal.retry_after <= 3600

    db.pass_time(f"1 {period}")

    assert claims(worker) == spent[:2]
    assert state(db) == {"spent_usd": 0, "reserved_usd": 2}


def test_periods_are_those_of_utc_whatever_the_session_says(db):
    budget(db, 1, period="month")
    utc = db.value(
        "select (date_trunc('month', now() at time zone 'UTC') + interval '1 month')"
        " at time zone 'UTC'"
    )
    for zone in ("Pacific/Kiritimati", "America/Anchorage", "UTC"):
        db.execute(f"set timezone = '{zone}'")
        assert db.value("select ends_at from private.budget_states") == utc
    db.execute("reset timezone")


CHANGES = {
    "its limit is raised": "update private.budgets set limit_usd = 4",
    "it is deleted": "delete from private.budgets",
    "it only alerts": "update private.budgets set on_breach = 'alert'",
    "it is another's": "update private.budgets set model_id = 'black-forest-labs/flux-schnell'",
}


@pytest.mark.parametrize("change", CHANGES)
def test_whoever_changes_it_wakes_workers_and_lets_jobs_go_on(db, rich, worker, spent, change):
    worker.listening().sleep()

    db.execute(CHANGES[change])

    assert worker.wake_ups() == [""]
    assert [job.id for job in worker.claim_jobs(2)] == spent[:2]
    rich.enqueue(model=DEV) if change != "its limit is raised" else None


def test_what_a_job_did_not_take_of_what_was_reserved_lets_others_go_on(db, rich, worker):
    db.execute("update public.models set cost_unit = 'second', cost_usd = 0.01 where id = %s", DEV)
    seconds = db.value("select extract(epoch from deadline) from public.models where id = %s", DEV)
    budget(db, float(seconds) / 100 * 1.5)
    jobs = [rich.enqueued(model=DEV) for _ in range(3)]
    (job,) = worker.claim_jobs(3)
    with refused("PT503", "budget_spent"):
        rich.enqueue(model=DEV)

    worker.complete_job(job, metrics={"provider_seconds": 10})

    assert claims(worker) == jobs[1:2]


def test_what_has_no_known_cost_is_neither_let_in_nor_claimed_where_a_budget_would_stop_it(
    db, rich, worker
):
    unknown = "update public.models set cost_usd = null, cost_unit = null where id = %s"
    waiting = rich.enqueued(model=DEV)
    db.execute(unknown, DEV)
    for on_breach in ("refuse", "pause"):
        made = budget(db, 100, on_breach=on_breach)
        with refused("PT503", "budget_spent") as expected:
            rich.enqueue(model=DEV)
        assert DEV in expected.detail
        assert rich.enqueued(model=SCHNELL) in claims(worker)
        db.execute("delete from private.budgets where id = %s", made)

    budget(db, 100, on_breach="alert")

    rich.enqueue(model=DEV)
    assert waiting in claims(worker)


def test_what_costs_more_than_the_whole_limit_is_in_nobodys_way(db, rich, worker):
    big = [rich.enqueued(model=SCHNELL, params={"num_outputs": 3}) for _ in range(12)]
    small = rich.enqueued(model=SCHNELL)
    budget(db, 2)

    assert claims(worker, 2) == [small]
    rich.enqueue(model=SCHNELL)
    db.execute("update private.budgets set limit_usd = 5")
    assert claims(worker, 1) == big[:1]


def test_whose_jobs_wait_for_a_plans_budget_are_in_nobodys_way_however_many(
    db, users, worker, spent
):
    db.execute("update private.budgets set plan = 'free', on_breach = 'pause'")
    for _ in range(30):
        users["rich"].enqueue(model=DEV)
    job = users["paid"].enqueued(model=DEV)

    assert claims(worker, 2) == [job]


def test_every_way_in_is_refused_and_what_was_asked_before_is_answered(db, rich, worker, spent):
    with refused("PT503", "budget_spent"):
        rich.enqueue_batch(["a", "b"], DEV)
    rich.cancel_generation(spent[-1])
    with refused("PT503", "budget_spent"):
        rich.retry_generation(spent[-1])
    db.execute("update private.budgets set limit_usd = 100")
    known = rich.enqueued(model=DEV, idempotency_key="k")
    db.execute("update private.budgets set limit_usd = 0")
    assert rich.enqueued(model=DEV, idempotency_key="k") == known


def test_an_arm_whose_budget_is_spent_is_passed_over(db, rich, worker, spent):
    db.execute("update private.budgets set model_id = %s, limit_usd = 0", DEV)
    for arm in (DEV, SCHNELL):
        db.execute("insert into public.model_aliases values ('auto/any', %s, 1)", arm)

    jobs = [User(db).has(100).enqueued(model="auto/any") for _ in range(8)]

    query = "select distinct model_id from public.generations where id = any (%s::uuid[])"
    assert [row["model_id"] for row in db.execute(query, jobs)] == [SCHNELL]


@pytest.mark.parametrize("scope", ["app", "model", "plan", "user"])
def test_what_waits_for_a_budget_does_not_make_the_queue_busy_then_or_after(
    db, users, worker, scope
):
    columns, _ = SCOPES[scope]
    if scope == "user":
        columns = {"user_id": users["rich"].id}
    db.execute("update private.plans set busy_after = '10 minutes'")
    budget(db, 0, on_breach="pause", **columns)
    users["rich"].enqueue(model=DEV)
    db.pass_time("11 minutes")
    worker.heartbeat()
    worker.recover_stale_jobs()
    assert db.value("select count(*) from private.plans where oldest_ready_at is not null") == 0

    users["paid"].enqueue(model=DEV)
    db.execute("update private.budgets set limit_usd = 100")
    db.pass_time("11 seconds")
    worker.recover_stale_jobs()
    users["paid"].enqueue(model=DEV)
    worker.complete_job(worker.claimed())
    db.execute("delete from private.budgets")
    db.pass_time("11 minutes")
    worker.heartbeat()
    worker.recover_stale_jobs()
    with refused("PT503", "busy"):
        users["paid"].enqueue(model=DEV)


# Of what several databases may spend, this one spends its part.


def test_a_part_holds_as_a_limit_does_and_who_raises_it_lets_jobs_go_on(db, rich, worker):
    budget(db, 10, part_usd=2)
    jobs = [rich.enqueued(model=DEV) for _ in range(6)]
    assert claims(worker) == jobs[:2]
    with refused("PT503", "budget_spent"):
        rich.enqueue(model=DEV)
    worker.listening().sleep()

    db.execute("update private.budgets set part_usd = 4")

    assert worker.wake_ups() == [""]
    assert claims(worker) == jobs[2:4]
    db.execute("update private.budgets set part_usd = 1")
    assert claims(worker) == []
    db.execute("update private.budgets set limit_usd = 5, part_usd = 9")
    assert claims(worker) == jobs[4:5]


def test_without_a_part_goes_what_costs_nothing_and_what_users_budgets_hold(db, rich, worker):
    part = budget(db, 10, part_usd=0)
    free, dear = rich.enqueued(model=PREVIEW), User(db).has(9)
    with refused("PT503", "budget_spent"):
        dear.enqueue(model=DEV)
    assert claims(worker) == [free]
    assert db.value("select used from private.budget_states") == 0, "no alert for nothing"

    db.execute("update private.budgets set user_id = %s where id = %s", dear.id, part)

    job_id = dear.enqueued(model=DEV)
    assert claims(worker) == [job_id]


# What operators see.


def test_from_four_fifths_of_a_limit_on_health_warns_and_names_no_user_to_a_monitor(
    db, rich, worker, service, monitor
):
    budget(db, 5, user_id=rich.id)
    for _ in range(5):
        rich.enqueue(model=DEV)
    worker.claim_jobs(4)
    assert "budget" not in service.alerts()

    worker.claimed()

    assert service.alerts()["budget"] == "a user: 5.00 of 5.00 USD of this day"
    (shown,) = monitor.queue_health()["budgets"]
    assert (shown["scope"], shown["reserved_usd"], shown["used"]) == ("a user", 5, 1)
    assert rich.id not in str(monitor.queue_report())


def test_what_waits_for_a_budget_counts_as_paused_and_models_say_until_when(
    db, users, worker, spent, service
):
    depth = service.queue_health()["depth"]
    assert (depth["ready"], depth["paused"], depth["oldest_ready_seconds"]) == (0, 4, None)
    query = "select distinct state from private.waiting_now"
    assert db.value(query) == "paused"

    def paused() -> set[str]:
        return {m["id"] for m in users["rich"].list_models() if m["paused_until"]}

    assert paused() >= {DEV, SCHNELL} and PREVIEW not in paused()
    db.execute("delete from private.budgets")
    assert paused() == set()
