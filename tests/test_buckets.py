"""sql/40_credits.sql: credits with an end, in what order they are spent, and debts."""

import contextlib
import functools
import random
import uuid
from datetime import UTC, datetime, timedelta

import pytest
from actors import Service, User, Worker, outcome, refused, together
from database import Database, assert_books_balance, unchanged

DAY = "now() + interval '1 day'"
LATER = "now() + interval '9 days'"


@pytest.fixture(autouse=True)
def rules(db: Database) -> None:
    """A picture costs 10 of the 10 credits a user begins with."""
    db.execute("update public.models set price_credits = 10, paid_price_credits = 10")
    db.execute("update private.plans set max_per_minute = 1000, max_active = 100")


@pytest.fixture(autouse=True)
def books(db: Database, rules: None):
    yield
    assert_books_balance(db)


@pytest.fixture
def give(db: Database, service: Service, alice: User):
    """Grant alice credits that end at an SQL expression's time, named by its words."""

    def give(amount: int, ends: str = "null", priority: int = 0, name: str = "") -> None:
        ends_at = db.value(f"select ({ends})::timestamptz")
        name = name or f"{amount} {ends} {priority}"
        service.grant_credits(alice, amount, name, expires_at=ends_at, priority=priority)

    return give


def end(db: Database, name: str = "%") -> None:
    """Let time pass until the credits of this grant end, to the instant."""
    db.execute(
        "update private.credit_buckets set expires_at = now() where external_id like %s", name
    )
    db.execute(
        "update public.entitlements as e set credits_end_at = (select min(b.expires_at)"
        " from private.credit_buckets as b where b.user_id = e.user_id and b.credits > 0)"
    )


def left(db: Database, user: User) -> dict[str | None, int]:
    """What is left by the external id of its grant; None: in no bucket."""
    rows = db.execute(
        "select external_id, credits from private.credit_buckets where user_id = %s order by id",
        user.id,
    )
    buckets = {row["external_id"]: row["credits"] for row in rows}
    return buckets | {None: user.credits() - sum(buckets.values())}


@pytest.mark.parametrize(
    ("grants", "spent"),
    [
        # What ends first is spent first, whatever came first; what never ends last.
        ([(7, LATER, 0, "later"), (7, DAY, 0, "sooner")], {"later": 4, "sooner": 0, None: 10}),
        # Of what ends together the older.
        ([(7, DAY, 0, "old"), (7, DAY, 0, "new")], {"old": 0, "new": 4, None: 10}),
        # Priority is before all.
        ([(7, DAY, 0, "sooner"), (7, LATER, -1, "first")], {"sooner": 4, "first": 0, None: 10}),
        ([(7, DAY, 1, "last")], {"last": 7, None: 0}),
        ([(7, "null", -1, "endless, but first")], {"endless, but first": 0, None: 7}),
        ([(7, "null", 0, "as all")], {None: 7}),
    ],
)
def test_credits_are_spent_by_priority_then_end_then_age(db, alice, give, grants, spent):
    for grant in grants:
        give(*grant)

    alice.enqueue()

    assert left(db, alice) == spent


def test_a_batch_is_paid_job_by_job_from_what_there_is(db, alice, give):
    give(15, DAY, name="sooner")
    give(8, LATER, name="later")

    job_ids = alice.enqueue_batch(["a", "b", "c"])["job_ids"]

    assert left(db, alice) == {"sooner": 0, "later": 0, None: 3}
    paid = {
        row["generation_id"]: row["amounts"]
        for row in db.execute(
            "select generation_id, array_agg(amount order by id) as amounts"
            " from public.credit_ledger where kind = 'charge' group by 1"
        )
    }
    assert [paid[uuid.UUID(job_id)] for job_id in job_ids] == [[-10], [-5, -5], [-3, -7]]


@pytest.mark.parametrize("is_booked", [True, False])
def test_credits_cannot_be_spent_from_their_end_on(db, alice, give, is_booked):
    give(20, DAY)
    end(db)
    assert alice.get_entitlement()["credits"] == 10, "whether or not it is booked"
    if is_booked:
        assert db.value("select private.expire_credits()") == 1
        assert alice.ledger()[-1] == ("expire", -20)

    alice.enqueue()

    assert alice.credits() == 0
    with refused("PT402", "insufficient_credits") as refusal:
        alice.enqueue()
    assert refusal.detail == "need 10, have 0"


def test_credits_cannot_be_spent_in_the_instant_of_their_end(db, alice, give):
    give(20, DAY)

    with alice.connection.transaction():
        alice.connection.execute("update private.credit_buckets set expires_at = now()")
        alice.connection.execute("update public.entitlements set credits_end_at = now()")
        assert alice.enqueue()["credits_left"] == 0


def test_what_ends_is_shown_with_its_end(db, alice, give):
    give(7, LATER)
    give(5, DAY)
    give(3, "null", -1)

    shown = alice.get_entitlement()

    assert (shown["credits"], shown["debt"]) == (25, 0)
    assert [part["credits"] for part in shown["credits_ending"]] == [5, 7]
    assert shown["credits_ending"][0]["expires_at"] < shown["credits_ending"][1]["expires_at"]


@pytest.mark.parametrize(
    ("images", "back"),
    [
        # What was spent last comes back first: 2 and 2 of what never ends, then of the bucket.
        (0, {"sooner": 6, "last": 4, None: 2}),
        (1, {"sooner": 1, "last": 4, None: 2}),
    ],
)
def test_what_is_given_back_goes_where_it_came_from(db, alice, give, images, back):
    db.execute("update public.models set price_credits = 5")
    alice.has(credits=2)
    give(6, DAY, name="sooner")
    give(4, "null", 1, name="last")
    alice.enqueue(params={"num_outputs": 2})  # 6 sooner, 2 of none, 2 last
    worker = Worker(db)
    job = worker.claimed()

    if images:
        worker.complete_job(job, images=images)
    else:
        worker.fail_job(job, "moderated")

    assert left(db, alice) == back


@pytest.mark.parametrize("is_booked", [True, False])
def test_what_has_ended_meanwhile_is_given_back_for_a_grace_and_alone(db, alice, give, is_booked):
    give(13, DAY)
    alice.enqueue()
    worker = Worker(db)
    job = worker.claimed()
    end(db)
    if is_booked:
        db.execute("select private.expire_credits()")

    worker.fail_job(job, "moderated")

    shown = alice.get_entitlement()
    assert shown["credits"] == 20
    assert [part["credits"] for part in shown["credits_ending"]] == [10], "the other 3 have ended"
    days = "select expires_at - now() between '23 hours' and '1 day' from private.credit_buckets"
    assert db.value(days)


def test_the_grace_is_given_once(db, alice, worker, give):
    give(20, DAY)
    for _ in range(2):
        alice.enqueue()
    first, second = worker.claimed(), worker.claimed()
    end(db)
    worker.fail_job(first, "moderated")
    end(db)

    worker.fail_job(second, "moderated")

    assert alice.get_entitlement()["credits"] == 10
    db.execute("select private.expire_credits()")
    assert alice.credits() == 10


def test_expiry_skips_who_cannot_be_served_and_goes_on(db, alice, bob, service):
    for user in (alice, bob):
        service.grant_credits(user, 5, user.id, expires_at="2999-01-01")
    end(db)
    with db.connect() as other, other.transaction():
        other.execute("select from public.entitlements where user_id = %s for update", [bob.id])
        db.execute("select private.expire_credits()")

    assert (alice.credits(), bob.credits()) == (10, 15)
    db.execute("select private.expire_credits()")
    assert bob.credits() == 10


def test_what_is_taken_and_not_there_becomes_a_debt_that_what_comes_in_pays_first(
    db, service, alice
):
    alice.has(credits=22)

    assert service.grant_credits(alice, -100, "dp_1", "adjust") == {
        "credits": 0,
        "debt": 78,
        "applied": True,
    }
    with unchanged(db):
        assert service.grant_credits(alice, -100, "dp_1", "adjust")["applied"] is False
        with refused("PT409", "idempotency_conflict"):
            service.grant_credits(alice, -99, "dp_1", "adjust")
    assert service.grant_credits(alice, 50, "p_1") == {"credits": 0, "debt": 28, "applied": True}
    assert service.grant_credits(alice, 50, "p_2") == {"credits": 22, "debt": 0, "applied": True}
    with unchanged(db):
        assert service.grant_credits(alice, 50, "p_1")["applied"] is False


def test_what_a_canceled_job_gives_back_pays_the_debt_first(db, service, alice):
    alice.has(credits=30)
    job_ids = [alice.enqueued(), alice.enqueued()]
    service.grant_credits(alice, -25, "dp_1", "adjust")

    for job_id in job_ids:
        alice.cancel_generation(job_id)

    assert (alice.credits(), alice.get_entitlement()["debt"]) == (5, 0)
    assert alice.get_job_status(job_ids[0])["refunded_credits"] == 10


def test_what_is_granted_with_an_end_pays_the_debt_first(db, service, alice, give):
    service.grant_credits(alice, -15, "dp_1", "adjust")

    give(7, DAY)

    assert left(db, alice) == {f"7 {DAY} 0": 2, None: 0}


@pytest.mark.parametrize(("may", "token"), [(False, "in_debt"), (True, "insufficient_credits")])
def test_who_is_in_debt_asks_for_nothing_unless_the_operator_allows_it(db, alice, may, token):
    db.execute("update private.settings set debtors_may_enqueue = %s", may)
    Service(db).grant_credits(alice, -11, "dp_1", "adjust")

    with unchanged(db), refused("PT402", token):
        alice.enqueue()
    db.execute("update public.models set price_credits = 0")
    if may:
        alice.enqueue()
    else:
        with unchanged(db), refused("PT402", token):
            alice.enqueue()


@pytest.mark.parametrize(
    "taken",
    [
        # What would be spent last goes first.
        (-12, None, {"sooner": 5, "later": 3, None: 0}),
        # What was given by the grant that is taken back goes before.
        (-7, "sooner", {"sooner": 0, "later": 5, None: 8}),
        (-30, "later", {"sooner": 0, "later": 0, None: 0}),
    ],
)
def test_what_is_taken_comes_from_its_grant_then_from_what_lasts_longest(db, alice, give, taken):
    amount, of, rest = taken
    give(5, DAY, name="sooner")
    give(5, LATER, name="later")

    db.execute(
        "select private.move_credits(%s, 'adjust', %s, 'dp_1', p_of => %s)", alice.id, amount, of
    )

    assert left(db, alice) == rest
    assert alice.get_entitlement()["debt"] == max(0, -amount - 20)
    with unchanged(db):
        db.execute("select private.move_credits(%s, 'adjust', %s, 'dp_1')", alice.id, amount)


def test_an_external_id_is_one_users_even_where_two_are_granted_at_once(db, alice, bob):
    services = [Service(db) for _ in range(8)]

    answers = together(
        [
            lambda s=s, u=u: outcome(
                lambda: s.grant_credits(u, 5, "payment", expires_at="2999-01-01")
            )
            for s, u in zip(services, [alice, bob] * 4, strict=True)
        ]
    )

    applied = [a for a in answers if isinstance(a, dict) and a["applied"]]
    assert len(applied) == 1
    assert sorted([alice.credits(), bob.credits()]) == [10, 15]


class Hand:
    """Somebody who does things to one user's credits, all in an own session."""

    def __init__(self, db: Database, user: User, number: int) -> None:
        self.db, self.user, self.number = db, user.on_another_device(), number
        self.service, self.worker = Service(db), Worker(db)
        self.routines, self.rng = db.connect(), random.Random(number)

    def act(self) -> None:
        for step in range(30):
            name, amount = f"{self.number}/{step}", self.rng.randint(1, 9)
            ends_at = datetime.now(UTC) + timedelta(seconds=self.rng.random() / 50)
            grant = functools.partial(self.service.grant_credits, self.user)
            acts = [
                self.user.enqueue,
                self.user.enqueue,
                lambda: grant(amount, name, expires_at=ends_at),  # noqa: B023
                lambda: grant(amount, name, priority=1),  # noqa: B023
                lambda: grant(-amount, name, "adjust"),  # noqa: B023
                lambda: self.worker.fail_job(self.worker.claimed(), "moderated"),
                lambda: self.routines.execute("select private.expire_credits()"),
            ]
            with contextlib.suppress(ValueError):  # nothing to claim
                outcome(self.rng.choice(acts))


def test_whatever_happens_at_once_every_credit_is_somewhere(db, alice):
    db.execute("update public.models set price_credits = 3")
    hands = [Hand(db, alice, number) for number in range(4)]

    together([hand.act for hand in hands])

    assert {kind for kind, _ in alice.ledger()} >= {"charge", "refund", "adjust", "expire"}
