"""sql/41_billing.sql, 43: what products give, and events in any order, any number of times."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import random
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
from actors import Service, User, refused, together
from billing import BASIL, CLASSIC, MONTH, NOW, PRODUCTS, START, RevenueCat, Stripe, apply
from database import Database, assert_books_balance, unchanged
from psycopg.types.json import Jsonb

FOR_EVER = datetime(9999, 1, 1, tzinfo=UTC)
HOUR = timedelta(hours=1)
DAY = timedelta(days=1)


@pytest.fixture(autouse=True)
def products(db):
    db.execute("update private.settings set welcome_credits = 0")
    db.execute(PRODUCTS)
    yield
    assert_books_balance(db)


def has(db: Database, user: User | str) -> tuple[int, int, datetime | None]:
    """What a user has: credits, debt, and paid until when (datetime.max: for ever)."""
    query = (
        "select credits, debt, case paid_until when 'infinity' then %s else paid_until end"
        " from public.entitlements where user_id = %s"
    )
    return tuple(db.row(query, FOR_EVER, getattr(user, "id", user)).values())


def signed_up(db: Database) -> str:
    user_id = str(uuid.uuid4())
    db.execute("insert into auth.users (id) values (%s)", user_id)
    return user_id


@pytest.mark.parametrize("version", [BASIL, CLASSIC])
def test_a_paid_invoice_gives_the_credits_and_the_plan_of_its_period(service, alice, version):
    stripe = Stripe(alice, version)

    answer = service.apply_billing_event("stripe", stripe.paid())

    assert (answer["outcome"], answer["credits"], answer["user_id"]) == ("applied", 100, alice.id)
    assert alice.get_entitlement()["plan"] == "paid"
    (ending,) = alice.get_entitlement()["credits_ending"]
    assert ending["credits"] == 100
    ends_at = START + MONTH + DAY  # with the product's grace
    assert datetime.fromisoformat(ending["expires_at"]) == ends_at
    assert has(service.db, alice) == (100, 0, ends_at)


# What happens, in order; and what the user has in the end: credits, debt, and paid until when.


def renewal_told_thrice(user):
    stripe = Stripe(user, CLASSIC)
    paid = stripe.paid()
    again = stripe.event("invoice.payment_succeeded", paid["data"]["object"], START)
    session = {"mode": "subscription", "subscription": stripe.subscription}
    checkout = stripe.checkout(START, customer=stripe.customer, payment_intent=None, **session)
    return stripe, [checkout, paid, again], (100, 0, START + MONTH + DAY)


def pack_paid_later(user):
    stripe = Stripe(user)
    unpaid = stripe.checkout(payment_status="unpaid")
    session = unpaid["data"]["object"] | {"payment_status": "paid"}
    paid = stripe.event("checkout.session.async_payment_succeeded", session, NOW)
    return stripe, [unpaid, paid, paid | {"id": "evt_again" + session["id"]}], (50, 0, None)


def refund(amount: int, left: int) -> Callable[[User], Any]:
    """A charge is refunded in two steps; basil's invoice does not say by what it was paid."""

    def story(user):
        stripe = Stripe(user)
        paid = stripe.paid()
        steps = [stripe.refunded(stripe.intent(paid), n, 1000, NOW) for n in (100, amount)]
        until = None if amount == 1000 else START + MONTH + DAY
        return stripe, [paid, stripe.invoice_payment(paid), *steps], (left, 0, until)

    return story


def dispute(status: str, left: int) -> Callable[[User], Any]:
    def story(user):
        stripe = Stripe(user, CLASSIC)
        paid = stripe.paid()
        pi = stripe.intent(paid)
        first = stripe.disputed(pi, 1000, "needs_response", NOW - DAY)
        gone = stripe.disputed(pi, 1000, "needs_response", NOW - DAY, "funds_withdrawn")
        last = stripe.disputed(pi, 1000, status, NOW, "closed")
        until = START + MONTH + DAY if left else None
        return stripe, [paid, first, gone, last], (left, 0, until)

    return story


def bank_only_asks(user):
    stripe = Stripe(user, CLASSIC)
    paid = stripe.paid()
    asked = stripe.disputed(stripe.intent(paid), 1000, "warning_needs_response")
    return stripe, [paid, asked], (100, 0, START + MONTH + DAY)


def plan_ended(user):
    """What says until when it is paid comes with what pays, and after both the end."""
    stripe = Stripe(user)
    told = stripe.subscribed(START + MONTH, START)
    ended = stripe.subscribed(START + MONTH, NOW, "canceled")
    return stripe, [stripe.paid(), told, ended], (100, 0, NOW)


def plan_ended_within_the_second(user):
    stripe = Stripe(user)
    told = stripe.subscribed(START + MONTH, NOW)
    ended = stripe.subscribed(START + MONTH, NOW, "canceled")
    return stripe, [stripe.paid(), told, ended], (100, 0, NOW)


def payment_failed_and_came(user):
    stripe = Stripe(user)
    late = stripe.subscribed(START + MONTH, START + HOUR, "past_due")
    back = stripe.subscribed(START + MONTH, START + DAY)
    before = stripe.paid(START - MONTH)
    paid = stripe.paid(START, START + DAY)
    return stripe, [before, late, paid, back], (100, 0, START + MONTH + DAY)


def one_of_two_subscriptions_ended(user):
    stripe, other = Stripe(user), Stripe(user)
    other.customer = stripe.customer
    ended = stripe.subscribed(START + MONTH, NOW, "canceled")
    events = [stripe.paid(), other.paid(START + DAY), ended]
    return stripe, events, (200, 0, START + DAY + MONTH + DAY)


def plan_changed(user):
    """A proration is no period; what it pays for begins when the change was made."""
    stripe = Stripe(user)
    lines = [
        stripe.line(NOW - DAY, -300, is_proration=True),
        stripe.line(NOW - DAY, 700, is_proration=True, price="price_rolling"),
    ]
    invoice = stripe.invoice(*lines, reason="subscription_update")
    changed = stripe.event("invoice.paid", invoice, NOW - DAY)
    return stripe, [stripe.paid(), changed], (100, 0, NOW + MONTH)


def rolled_over(user):
    """Of 100 left each month 60 go on: those of the first are over, for they were on top."""
    stripe = Stripe(user, price="price_rolling")
    months = [stripe.paid(START - n * MONTH) for n in (2, 1, 0)]
    return stripe, months, (160, 0, START + MONTH + DAY)


def rolled_over_and_refunded(user):
    stripe = Stripe(user, CLASSIC, price="price_rolling")
    first, last = (stripe.paid(start) for start in (START - MONTH + DAY, START))
    gone = stripe.refunded(stripe.intent(last), 1000, 1000)
    return stripe, [first, last, gone], (60, 0, START + 2 * DAY)


def two_products_rolled_over(user):
    """Each goes on into the next period of its own product, up to the cap of that."""
    stripe = Stripe(user)
    months = [START - MONTH, START]
    lines = [[stripe.line(m, price=f"price_{p}") for p in ("monthly", "rolling")] for m in months]
    paid = [
        stripe.event("invoice.paid", stripe.invoice(*of), month)
        for of, month in zip(lines, months, strict=True)
    ]
    return stripe, paid, (260, 0, START + MONTH + DAY)


def pack_beside_a_subscription(user):
    """A pack never ends, and what a subscription's refund takes is not the pack's."""
    stripe = Stripe(user, CLASSIC, price="price_rolling")
    months = [stripe.paid(START - MONTH), stripe.paid()]
    gone = stripe.refunded(stripe.intent(months[1]), 1000, 1000)
    return stripe, [stripe.checkout(START), *months, gone], (110, 0, START + DAY)


def store_extended(user):
    """The plan lasts longer; the credits of the period end as they would have."""
    store = RevenueCat(user)
    end = {"expiration_at_ms": int((START + 2 * MONTH).timestamp() * 1000)}
    extended = store.about("SUBSCRIPTION_EXTENDED", START, START + DAY, **end)
    return store, [store.renewed(), extended], (100, 0, START + 2 * MONTH + DAY)


def store_resumed(user):
    """What was left before a pause longer than the grace does not go on."""
    store = RevenueCat(user)
    of = {"product_id": "rolling"}
    months = [store.renewed(START - MONTH - 5 * DAY, **of), store.renewed(**of)]
    return store, months, (100, 0, START + MONTH + DAY)


def store_bought_and_renewed(user):
    store = RevenueCat(user)
    events = [store.about("INITIAL_PURCHASE", START - MONTH), store.renewed()]
    canceled = store.about("CANCELLATION", START, NOW, cancel_reason="UNSUBSCRIBE")
    return store, [*events, store.bought(), canceled], (150, 0, START + MONTH + DAY)


def store_expired(user):
    store = RevenueCat(user)
    start = NOW - MONTH - HOUR
    ended = store.about("EXPIRATION", start, NOW, expiration_reason="UNSUBSCRIBE")
    return store, [store.renewed(start), ended], (100, 0, start + MONTH)


def store_refunded(user):
    store = RevenueCat(user)
    renewed, pack = store.renewed(), store.bought()
    refunds = [store.refunded(renewed, expiration_at_ms=int(NOW.timestamp() * 1000))]
    refunds += [store.refunded(pack)]
    return store, [renewed, pack, *refunds], (0, 0, NOW)


def store_refund_reversed(user):
    store = RevenueCat(user)
    pack = store.bought(START)
    back = store.refunded(pack, NOW, type="REFUND_REVERSED", cancel_reason=None)
    return store, [pack, store.refunded(pack, NOW - DAY), back], (50, 0, None)


def store_trial(user):
    store = RevenueCat(user)
    return (
        store,
        [store.about("INITIAL_PURCHASE", period_type="TRIAL")],
        (5, 0, START + MONTH + DAY),
    )


def lifetime(user):
    store = RevenueCat(user)
    return store, [store.bought(product_id="lifetime")], (0, 0, FOR_EVER)


STORIES = {
    "one renewal under three ids": renewal_told_thrice,
    "a pack that is paid for later": pack_paid_later,
    "a refund in part": refund(400, 60),
    "a refund of all": refund(1000, 0),
    "a dispute that is lost": dispute("lost", 0),
    "a dispute that is won": dispute("won", 100),
    "a bank that only asks": bank_only_asks,
    "the end of a plan": plan_ended,
    "the end of a plan in the same second": plan_ended_within_the_second,
    "a payment that failed at first": payment_failed_and_came,
    "two subscriptions, one of which ends": one_of_two_subscriptions_ended,
    "a change of plans": plan_changed,
    "months that roll over": rolled_over,
    "a month that rolled over and the next is refunded": rolled_over_and_refunded,
    "two products of a subscription": two_products_rolled_over,
    "a pack beside a subscription": pack_beside_a_subscription,
    "a store's subscription that is extended": store_extended,
    "a store's subscription that was paused": store_resumed,
    "a store's subscription and pack": store_bought_and_renewed,
    "a store's subscription that expires": store_expired,
    "refunds by a store": store_refunded,
    "a refund that is reversed": store_refund_reversed,
    "a trial": store_trial,
    "a purchase for ever": lifetime,
}


@pytest.mark.parametrize("story", STORIES)
def test_whatever_order_events_come_in_and_how_often_they_end_the_same(db, service, story):
    _, events, _ = STORIES[story](None)
    orders = list(itertools.permutations(range(len(events))))
    for order in random.Random(story).sample(orders, min(len(orders), 24)):
        user_id = signed_up(db)
        seller, events, expected = STORIES[story](user_id)
        again = random.Random(str(order)).choices(order, k=len(order))
        apply(service, seller, *(events[place] for place in (*order, *again)))
        assert has(db, user_id) == expected, order
    assert db.value("select count(*) from private.billing_events where outcome = 'waiting'") == 0


def test_what_of_a_subscriptions_credits_was_spent_is_owed_when_its_payment_is_charged_back(
    db, service, alice
):
    """What was bought to stay pays for it, and comes back to stay where the dispute is won."""
    stripe = Stripe(alice, CLASSIC)
    paid, pack = stripe.paid(), stripe.checkout()
    pi = stripe.intent(paid)
    apply(service, stripe, paid, pack)
    db.execute("update public.models set price_credits = 80, paid_price_credits = 80")
    job_id = alice.enqueued()

    apply(service, stripe, stripe.disputed(pi, 1000, "needs_response", NOW - DAY))
    assert has(db, alice) == (0, 30, None)
    alice.cancel_generation(job_id)
    assert has(db, alice) == (50, 0, None)
    apply(service, stripe, stripe.disputed(pi, 1000, "won", NOW, "closed"))

    assert has(db, alice) == (150, 0, START + MONTH + DAY)
    assert sum(end["credits"] for end in alice.get_entitlement()["credits_ending"]) <= 100


@pytest.mark.parametrize("days", [1, 20])
@pytest.mark.parametrize(("price", "goes_on"), [("price_monthly", 0), ("price_rolling", 60)])
def test_a_renewal_that_is_paid_early_takes_nothing_away(service, alice, price, goes_on, days):
    """All is there until the running period has ended; then its cap goes on, and nobody acts."""
    stripe = Stripe(alice, price=price)
    start = NOW - MONTH + days * DAY
    told = [
        stripe.paid(start),
        stripe.paid(start + MONTH, NOW),
        stripe.paid(start + 2 * MONTH, NOW),
    ]
    apply(service, stripe, *told, *told)
    assert alice.get_entitlement()["credits"] == 300
    service.db.execute("update public.models set price_credits = 30, paid_price_credits = 30")
    alice.enqueued()

    for passed, bought in ((days + 1, 200), (30, 100)):  # with the grace of a day
        service.db.pass_time(f"{passed} days")
        assert alice.get_entitlement()["credits"] == bought + goes_on


def test_a_renewal_that_comes_when_its_credits_have_ended_still_rolls_them_over(db, service, alice):
    stripe = Stripe(alice, price="price_rolling")
    apply(service, stripe, stripe.paid(NOW - MONTH))
    db.execute("update public.models set price_credits = 1, paid_price_credits = 70")
    alice.enqueued()
    db.pass_time("2 days")
    db.value("select private.expire_credits()")
    assert has(db, alice)[0] == 0

    apply(service, stripe, stripe.paid(NOW - 2 * DAY, NOW))

    assert has(db, alice)[0] == 130


def test_what_is_sold_to_a_customer_is_the_users_whom_any_event_names_with_it(db, service, alice):
    """Events may come before what tells who it is: they wait, and are answered as done."""
    stripe = Stripe(None)
    paid = stripe.paid()
    answer = service.apply_billing_event("stripe", paid)
    assert (answer["outcome"], answer["user_id"]) == ("waiting", None)
    assert answer["detail"] == f"for user stripe:{stripe.customer}"
    assert apply(service, stripe, stripe.refunded(stripe.intent(paid), 200, 1000)) == ["waiting"]

    link = {"mode": "subscription", "customer": stripe.customer, "client_reference_id": alice.id}
    apply(service, stripe, stripe.checkout(**link), stripe.invoice_payment(paid))

    assert has(db, alice)[0] == 80
    assert apply(service, stripe, paid, stripe.paid(START + DAY)) == ["repeated", "applied"]


@pytest.mark.parametrize("what", ["product", "user"])
def test_what_is_sold_before_its_row_is_there_is_granted_within_the_minute(
    db, service, worker, what
):
    user_id = str(uuid.uuid4()) if what == "user" else signed_up(db)
    store = RevenueCat(user_id.upper(), aliases=[])  # as iOS writes it
    sold = store.bought(product_id="new" if what == "product" else "pack")
    assert apply(service, store, sold, store.refunded(sold)) == ["waiting", "waiting"]
    assert worker.apply_retention() == 0  # workers call it until that is so
    assert db.value("select count(*) from private.skipped_rows") == 0

    if what == "product":
        service.query(
            "insert into public.credit_products (provider, product_id, credits)"
            " values ('revenuecat', 'new', 50)"
        )
    else:
        db.execute("insert into auth.users (id) values (%s)", user_id)
    worker.apply_retention()

    assert has(db, user_id)[:2] == (0, 0)
    assert [e["amount"] for e in db.execute("select amount from public.credit_ledger")] == [50, -50]


def test_what_waits_to_be_sold_for_an_hour_is_alerted(db, service):
    apply(service, Stripe(None), Stripe(None).paid())
    assert "skipped_rows" not in service.alerts()

    db.pass_time("61 minutes")

    assert "billing 1" in service.alerts()["skipped_rows"]


def test_a_transfer_moves_the_subscription_and_what_was_nobodys(db, service):
    """In any order; credits stay with whom they were granted to."""
    for order in itertools.permutations(range(4)):
        one, other = signed_up(db), signed_up(db)
        store, nobody = RevenueCat(one), RevenueCat(f"$RCAnonymousID:{one}", aliases=[])
        names = {
            "transferred_from": [one.upper(), nobody.user_id],
            "transferred_to": [other, f"$RCAnonymousID:{other}"],
        }
        told = [
            nobody.bought(START),
            store.renewed(START, NOW - 3 * DAY),
            store.event("TRANSFER", NOW - 2 * DAY, **names),
            store.about("UNCANCELLATION", START, NOW - DAY, app_user_id=other, aliases=[]),
        ]

        apply(service, store, *(told[place] for place in order))

        assert has(db, one) == (100, 0, None), order
        assert has(db, other) == (50, 0, START + MONTH + DAY), order
        apply(service, store, store.about("EXPIRATION", START, NOW, app_user_id=other, aliases=[]))
        assert has(db, other) == (50, 0, START + MONTH)


def test_a_sandbox_gives_nothing_unless_the_operator_says_so(db, service, alice):
    stripe, store = Stripe(alice), RevenueCat(alice)
    tests = [
        (stripe, stripe.paid() | {"livemode": False}),
        (store, store.bought(environment="SANDBOX")),
    ]
    for seller, event in tests:
        answer = service.apply_billing_event(seller.provider, event)
        assert (answer["outcome"], answer["detail"]) == ("ignored", "a test")
    assert has(db, alice) == (0, 0, None)

    db.execute("update private.billing_providers set takes_test_events = true")
    for seller, event in tests:
        assert apply(service, seller, event) == ["repeated"]
    assert apply(service, store, store.bought(environment="SANDBOX")) == ["applied"]


def test_another_provider_says_it_in_our_terms(db, service, alice):
    db.execute("insert into private.billing_providers (name) values ('shop')")
    db.execute(
        "insert into public.credit_products (provider, product_id, credits, priority, makes_paid,"
        " period) values ('shop', 'pass', 7, -1, true, '7 days')"
    )
    sale = {"purchase": "order-1", "products": ["pass"], "quantity": 3, "starts_at": str(NOW)}
    sold = {"id": "1", "type": "order", "happened_at": str(NOW), "users": [alice.id]}
    sold |= {"payments": ["order-1"], "amount": 300, "sales": [sale]}
    taken = {"id": "2", "type": "refund", "happened_at": str(NOW), "payments": ["order-1"]}
    taken |= {"taken": {"cause": "refund", "amount": 100}}

    answers = [service.apply_billing_event("shop", event) for event in (sold, taken)]

    assert [answer["credits"] for answer in answers] == [21, -7]
    assert has(db, alice) == (14, 0, NOW + 8 * DAY)
    plan = {"subscription": "order-1", "products": ["pass"], "paid_until": str(NOW + 9 * DAY)}
    service.apply_billing_event("shop", sold | {"id": "3", "sales": None, "plans": [plan]})
    assert has(db, alice)[2] == NOW + 10 * DAY


@pytest.mark.parametrize(
    ("provider", "change"),
    [
        ("stripe", {"id": None}),
        ("stripe", {"type": None}),
        ("stripe", {"created": None}),
        ("stripe", {"created": "yesterday"}),
        ("stripe", {"created": 1e300}),
        ("stripe", {"id": "x" * 201}),
        ("stripe", {"livemode": "maybe", "data": {"object": {"lines": {"data": "x"}}}}),
        ("stripe", {"data": "x" * 270_000}),
        ("Stripe", {}),
    ],
)
def test_what_is_no_event_is_refused_and_nothing_of_it_kept(db, service, alice, provider, change):
    with unchanged(db), refused("PT400", "invalid_input"):
        service.apply_billing_event(provider, Stripe(alice).paid() | change)


def test_an_event_that_a_gateway_hands_on_as_a_json_string_is_read(service, alice):
    event = Jsonb(json.dumps(Stripe(alice).paid()))

    assert service.apply_billing_event("stripe", event)["outcome"] == "applied"


def test_what_means_nothing_here_is_kept_and_ignored(db, service, alice):
    stripe, store = Stripe(alice), RevenueCat(alice)
    told = [
        (stripe, stripe.event("payment_intent.created", {"customer": "cus_1"})),
        (stripe, stripe.checkout(metadata={})),
        (stripe, stripe.checkout(client_reference_id=None)),
        (store, store.event("TEST")),
        (store, store.about("PRODUCT_CHANGE", new_product_id="rolling")),
    ]

    assert [apply(service, *each) for each in told] == [["ignored"]] * len(told)
    assert has(db, alice) == (0, 0, None)
    details = db.execute("select detail from private.billing_events where detail is not null")
    assert {each["detail"] for each in details} == {"it names no product", "it names no user"}


def test_what_makes_no_sense_is_refused_or_if_it_waited_passed_over(db, service, worker, alice):
    db.execute("insert into private.billing_providers (name) values ('shop')")
    sale = {"purchase": "o1", "products": ["pass"], "ends_at": "2020-01-01"}
    sold = {"id": "1", "type": "order", "happened_at": str(NOW), "users": [alice.id]}
    events = [sold | {"sales": [sale]}, sold | {"id": "2", "sales": [sale | {"purchase": "o2"}]}]
    del events[1]["sales"][0]["ends_at"]
    for event in events:
        assert service.apply_billing_event("shop", event)["outcome"] == "waiting"
    query = "insert into public.credit_products (provider, product_id, credits) values (%s, %s, 7)"
    db.execute(query, "shop", "pass")

    worker.apply_retention()

    assert has(db, alice)[0] == 7
    assert db.value("select count(*) from private.skipped_rows") == 1
    for change in ({"purchase": "a b"}, {"quantity": -1}, {"purchase": None}, {"quantity": "x"}):
        event = sold | {
            "id": str(change),
            "sales": [{"purchase": "o3", "products": ["pass"]} | change],
        }
        with unchanged(db), refused("PT400", "invalid_input"):
            service.apply_billing_event("shop", event)


def test_a_subscription_that_makes_nobody_paid_ends_nothing_that_was_said_by_hand(
    db, service, alice
):
    service.call("public.set_paid", alice.id, str(FOR_EVER), at(-3))
    db.execute("update public.credit_products set makes_paid = false")
    stripe = Stripe(alice)

    apply(service, stripe, stripe.paid(NOW), stripe.subscribed(NOW + MONTH, NOW))

    assert has(db, alice) == (100, 0, FOR_EVER)


def test_an_event_that_arrives_many_times_at_once_does_it_once(db, alice):
    stripe = Stripe(alice)
    paid = stripe.paid()
    again = [stripe.event("invoice.payment_succeeded", paid["data"]["object"]) for _ in range(4)]
    calls = [functools.partial(apply, Service(db), stripe, e) for e in [paid] * 4 + again]

    outcomes = together(calls)

    assert sorted(outcomes) == [["applied"]] + [["repeated"]] * 7
    assert has(db, alice)[0] == 100


def test_what_an_erased_user_bought_is_not_granted_again_to_whoever_has_the_same_id(
    db, service, worker, alice
):
    stripe = Stripe(alice, CLASSIC)
    paid = stripe.paid()
    again = stripe.event("invoice.payment_succeeded", paid["data"]["object"])
    apply(service, stripe, paid)

    db.execute("delete from auth.users where id = %s", alice.id)
    for table in ("events", "customers", "purchases", "subscriptions"):
        rows = db.execute(f"select * from private.billing_{table}")
        assert alice.id not in str(rows)
        assert stripe.customer not in str(rows)
    db.execute("insert into auth.users (id) values (%s)", alice.id)

    assert apply(service, stripe, paid, again) == ["repeated", "repeated"]
    gone = stripe.refunded(stripe.intent(paid), 1000, 1000)
    assert has(db, alice) == (0, 0, None)
    apply(service, stripe, gone)
    assert has(db, alice) == (0, 0, None)
    db.pass_time("13 months")
    worker.apply_retention()
    assert db.value("select count(*) from private.billing_events") == 0


def test_a_product_is_a_row_of_the_operators(db, service, alice):
    service.query("update public.credit_products set credits = 7, credits_end = false")
    stripe = Stripe(alice)

    apply(service, stripe, stripe.paid(NOW - 3 * MONTH))

    assert has(db, alice)[0] == 7
    for statement in (
        "update public.credit_products set credits = 9",
        "select * from public.credit_products",
    ):
        with refused("42501"):
            alice.query(statement)


@pytest.mark.parametrize("grants", [True, False])
def test_a_change_of_plans_grants_where_the_product_says_so(db, service, alice, grants):
    db.execute("update public.credit_products set grants_changes = %s", grants)
    stripe = Stripe(alice)
    line = stripe.line(NOW, 700, is_proration=True)
    invoice = stripe.invoice(line, reason="subscription_update")

    apply(service, stripe, stripe.paid(), stripe.event("invoice.paid", invoice))

    assert has(db, alice)[0] == (200 if grants else 100)


# Until when somebody is paid, said by hand.


def at(days: int) -> str:
    return str(NOW + days * DAY)


def test_of_what_is_said_of_different_times_the_latest_holds_in_whatever_order(db, service):
    said = [(at(9), at(-3), "a"), (None, at(-2), "b"), (at(5), at(-1), "c"), (at(4), at(-1), "d")]
    for order in itertools.permutations(said):
        user_id = signed_up(db)
        for until, happened_at, event_id in order:
            key = event_id + user_id
            answer = service.call("public.set_paid", user_id, until, happened_at, key)
            service.call("public.set_paid", user_id, at(99), at(0), key)  # whatever it says
        assert has(db, user_id)[2] == NOW + 5 * DAY
        assert datetime.fromisoformat(answer["paid_until"]) == NOW + 5 * DAY


def test_what_is_said_without_a_time_holds_from_now_on(db, service, alice):
    service.call("public.set_paid", alice.id, at(9), at(99))  # a clock that is ahead

    service.set_paid(alice, None)

    assert has(db, alice)[2] is None
    service.call("public.set_paid", alice.id, at(9), at(-1))
    assert has(db, alice)[2] is None


def test_the_last_word_is_said_by_hand_or_by_a_subscription(db, service):
    for order in itertools.permutations(range(3)):
        user_id = signed_up(db)
        stripe = Stripe(user_id)
        calls = [
            lambda s=stripe: apply(service, s, s.paid(START)),
            lambda u=user_id: service.call("public.set_paid", u, None, at(-3)),
            lambda s=stripe: apply(service, s, s.subscribed(START + MONTH, NOW - DAY)),
        ]
        for place in order:
            calls[place]()
        assert has(db, user_id)[2] == START + MONTH + DAY
        service.set_paid(user_id, None)
        assert has(db, user_id)[2] is None


@pytest.mark.parametrize("seed", range(8))
def test_whatever_is_spent_between_events_what_they_moved_is_what_was_bought_and_not_taken_back(
    db, service, alice, seed
):
    """Of two periods that last, and what goes on from one into the other."""
    rng = random.Random(seed)
    db.lift_limits()
    db.execute("update private.settings set debtors_may_enqueue = true")
    db.execute("update public.models set paid_price_credits = 7, price_credits = 7")
    stripe = Stripe(alice, CLASSIC, price="price_rolling")
    told = [stripe.paid(NOW - MONTH - HOUR), stripe.paid(NOW - HOUR), stripe.checkout()]
    for paid in list(told):
        pi, of = stripe.intent(paid), paid["data"]["object"]
        amount = of.get("amount_paid") or of["amount_total"]
        told.append(stripe.refunded(pi, rng.randint(1, amount), amount, NOW - 2 * HOUR))
        told.append(stripe.disputed(pi, amount, "needs_response", NOW - 2 * HOUR))
        told.append(stripe.disputed(pi, amount, rng.choice(["won", "lost"]), NOW, "closed"))
    rng.shuffle(told)
    jobs: list[str] = []
    for event in told:
        apply(service, stripe, event)
        for _ in range(rng.randint(0, 9)):
            with contextlib.suppress(psycopg.Error):
                jobs.append(alice.enqueued())
        for job_id in rng.sample(jobs, rng.randint(0, len(jobs))):
            with contextlib.suppress(psycopg.Error):
                alice.cancel_generation(job_id)

    query = "select sum(credits - floor(credits * taken + 1e-6)) from private.billing_purchases"
    bought = db.value(query)
    moved = db.value(
        "select sum(amount - debt) from public.credit_ledger where kind in ('grant', 'adjust')"
    )
    assert moved == bought


# Thousands of events, as a webhook sees them.

DELIVER = """
create procedure private.deliver(p_provider text, p_events jsonb[], p_crashes boolean[])
language plpgsql as $$
begin
  for v_place in 1 .. cardinality(p_events) loop
    perform public.apply_billing_event(p_provider, p_events[v_place]);
    if p_crashes[v_place] then
      rollback;
    else
      commit;
    end if;
  end loop;
end;
$$
"""


def life(user_id: str, seed: int) -> list[tuple[str, dict[str, Any]]]:
    """What one user's providers have to tell in half a year, in order: the same for a seed."""
    rng = random.Random(seed)
    told = []
    for _ in range(rng.randint(1, 2)):
        seller = Stripe(user_id, rng.choice([BASIL, CLASSIC])) if seed % 2 else RevenueCat(user_id)
        rolls = rng.random() < 0.5
        start = START + rng.randint(0, 3) * DAY
        months = [start - n * MONTH for n in range(rng.randint(0, 5), -1, -1)]
        if isinstance(seller, Stripe):
            seller.price = "price_rolling" if rolls else "price_monthly"
            for month in months:
                told += stripe_month(rng, seller, month)
            if rng.random() < 0.3:
                told.append(seller.subscribed(months[-1] + MONTH, NOW - HOUR, "canceled"))
        else:
            of = {"product_id": "rolling" if rolls else "monthly"}
            for month in months:
                told += store_month(rng, seller, month, of)
            if rng.random() < 0.3:
                told.append(seller.about("EXPIRATION", months[-1], NOW - HOUR, **of))
    return [(seller.provider, event) for event in told]


def stripe_month(rng: random.Random, stripe: Stripe, month: datetime) -> list[dict[str, Any]]:
    paid = stripe.paid(month)
    told = [stripe.subscribed(month + MONTH, month), paid]
    told += [stripe.event("invoice.payment_succeeded", paid["data"]["object"], month)]
    told += [stripe.invoice_payment(paid), stripe.event("charge.succeeded", {}, month)]
    pi, later = stripe.intent(paid), month + 5 * DAY
    for what in rng.sample(["refund", "dispute", "pack", "change", "nothing"], 2):
        if what == "refund":
            for amount in sorted(rng.sample([200, 333, 500, 1000], 2)):
                told.append(stripe.refunded(pi, amount, 1000, later + amount * HOUR / 100))
        elif what == "dispute":
            told.append(stripe.disputed(pi, 1000, "needs_response", later))
            end = rng.choice(["won", "lost"])
            told.append(stripe.disputed(pi, 1000, end, later + DAY, "closed"))
        elif what == "pack":
            told.append(pack := stripe.checkout(later))
            if rng.random() < 0.5:
                told.append(stripe.refunded(stripe.intent(pack), 250, 500, later + HOUR))
        elif what == "change":
            line = stripe.line(later, 700, is_proration=True)
            invoice = stripe.invoice(line, reason="subscription_update")
            told.append(stripe.event("invoice.paid", invoice, later))
    return told


def store_month(
    rng: random.Random, store: RevenueCat, month: datetime, of: dict[str, Any]
) -> list[dict[str, Any]]:
    told = [renewed := store.renewed(month, **of)]
    told += [renewed | {"event": renewed["event"] | {"id": str(uuid.uuid4())}}]
    told += [store.about("CANCELLATION", month, month + DAY, cancel_reason="UNSUBSCRIBE", **of)]
    told += [store.about("UNCANCELLATION", month, month + 2 * DAY, **of)]
    told += [store.event("TEST", month)]
    if rng.random() < 0.3:
        told.append(store.refunded(renewed, month + 3 * DAY))
        if rng.random() < 0.5:
            told.append(store.refunded(renewed, month + 4 * DAY, type="REFUND_REVERSED"))
    if rng.random() < 0.3:
        told.append(pack := store.bought(month + DAY))
        told += [store.refunded(pack, month + 5 * DAY)] * rng.randint(0, 1)
    return told


def deliver(db: Database, deliveries: list[tuple[str, dict[str, Any], bool]]) -> None:
    """Deliver events one after the other over a connection of its own; some crash at the end."""
    connection = db.connect()
    for provider, of_provider in itertools.groupby(deliveries, key=lambda each: each[0]):
        _, events, crashes = zip(*of_provider, strict=True)
        query = "call private.deliver(%s, %s, %s)"
        connection.execute(query, [provider, [Jsonb(each) for each in events], list(crashes)])


def test_10000_events_delivered_up_to_three_times_in_any_order_do_what_once_in_order_does(db):
    """Some deliveries crash before they commit; each event has one that does not. Of four users
    with the same life one has it in order.
    """
    db.execute(DELIVER)
    rng, in_order, in_chaos, users = random.Random(1), [], [], []
    while len(in_chaos) < 10_000:
        ids = [str(uuid.uuid4()) for _ in range(4)]
        seed = len(users)
        users += [(ids[0], other) for other in ids[1:]]
        in_order += life(ids[0], seed)
        in_chaos += itertools.chain(*(life(other, seed) for other in ids[1:]))
    ids = list({*itertools.chain(*users)})
    db.execute("insert into auth.users (id) select unnest(%s::uuid[])", ids)
    once = [(provider, event, False) for provider, event in in_order]
    thrice = [(*each, False) for each in in_chaos]
    again = [each for each in in_chaos for _ in range(rng.randint(0, 2))]
    thrice += [(*each, rng.random() < 0.2) for each in again]
    rng.shuffle(thrice)
    lists = [
        [each for each in deliveries if each[0] == provider]
        for provider, deliveries in itertools.product(["stripe", "revenuecat"], [once, thrice])
    ]

    together([functools.partial(deliver, db, each) for each in lists])

    query = """
        select e.user_id, credits, debt, paid_until, (
          select jsonb_object_agg(expires_at, credits) from (
            select b.expires_at, sum(b.credits) as credits from private.credit_buckets as b
            where b.user_id = e.user_id and b.credits > 0 group by b.expires_at
          ) as ending
        )
        from public.entitlements as e
    """
    has = {str(row["user_id"]): tuple(row.values())[1:] for row in db.execute(query)}
    assert [(has[a], has[b]) for a, b in users if has[a] != has[b]] == []
    assert db.value("select count(*) from private.billing_events where outcome = 'waiting'") == 0
    assert len(in_chaos) > 10_000 and len({has[a][0] for a, _ in users}) > 20
