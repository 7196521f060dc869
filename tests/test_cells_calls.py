"""Calls that concern users of two cells, or of all: payments, merges, likes, sums, and attacks."""

# ruff: noqa: F401, F811

from __future__ import annotations

import itertools
import json
import threading
import uuid
from datetime import datetime, timedelta
from typing import Any

import httpx
import psycopg
import pytest
from actors import Worker
from billing import Stripe
from database import Database, assert_books_balance
from http_client import PREVIEW, Client, Refusal, SignedUp, answer, refusal
from test_cells import (
    UNAVAILABLE,
    anybody,
    cells,
    databases,
    endpoints,
    kill,
    moved,
    operator,
    shared,
    sign_up,
    until,
    users,
    where,
)

from cells import CELLS
from stack import sign_jwt

OTHER = {"home": "two", "two": "home"}


@pytest.fixture
def pack(databases) -> None:
    """What is sold in all cells: 100 credits."""
    databases["home"].execute(
        "insert into public.credit_products (provider, product_id, credits)"
        " values ('stripe', 'pack', 100), ('revenuecat', 'monthly', 30) on conflict do nothing"
    )
    databases["home"].execute(
        "update public.credit_products set makes_paid = true where product_id = 'monthly'"
    )
    sold = "select count(*) from public.credit_products where provider = 'stripe' or makes_paid"
    until(lambda: databases["two"].value(sold) == 2)


def purchase(user_id: str | None, customer: str | None = None) -> list[dict[str, Any]]:
    """Return Stripe's events of a pack: paid for, told again, and half given back.

    The refund names nobody.
    """
    payment = f"pi_{uuid.uuid4()}"
    of = {"id": f"cs_{payment}", "payment_intent": payment, "metadata": {"product": "pack"}}
    of |= {"client_reference_id": user_id, "mode": "payment", "payment_status": "paid"}
    of |= {"customer": customer}
    refund = {"id": f"ch_{payment}", "payment_intent": payment, "amount": 8, "amount_refunded": 4}
    return [
        {"id": f"{payment} {type}", "type": type, "created": 1796052000, "data": {"object": of}}
        for type, of in [
            ("checkout.session.completed", of),
            ("checkout.session.async_payment_succeeded", of),
            ("charge.refunded", refund),
        ]
    ]


def sent(operator: Client, event: dict[str, Any], provider: str = "stripe") -> str:
    """Hand in an event and return its outcome."""
    response = operator.rpc("apply_billing_event", provider=provider, event=event)
    return str(answer(response)["outcome"])


def holders(databases: dict[str, Database], event_id: str) -> list[str]:
    """Return the cells that keep an event."""
    query = "select count(*) from private.billing_events where event_id = %s"
    return [cell for cell in CELLS if databases[cell].value(query, event_id)]


# Payments.


@pytest.mark.usefixtures("pack")
def test_a_payment_is_its_users_wherever_they_live_in_whatever_order_it_is_told(
    users, databases, operator
):
    for cell, user in users.items():
        for order in itertools.permutations(range(3)):
            had, events = user.credits(), purchase(user.id)

            told = [sent(operator, events[i]) for i in order]

            assert user.credits() - had == 50, (cell, order)
            assert set(told) <= {"applied", "repeated", "waiting"}
            assert [sent(operator, event) for event in events] == ["repeated"] * 3
            assert [holders(databases, event["id"]) for event in events] == [[cell]] * 3
        assert_books_balance(databases[cell])


@pytest.mark.usefixtures("pack")
def test_a_customer_once_told_of_is_found_in_the_users_cell_and_after_a_move(
    users, databases, operator
):
    for cell, user in users.items():
        customer = f"cus_{cell}_{user.id}"
        nameless = purchase(None, customer)[0]
        assert sent(operator, nameless) == "waiting"
        assert holders(databases, nameless["id"]) == ["home"]

        assert sent(operator, purchase(user.id, customer)[0]) == "applied"

        assert user.credits() == 210, "what waited for the customer counts, too"
        assert holders(databases, nameless["id"]) == [cell]
        assert sent(operator, purchase(None, customer)[0]) == "applied"
        moved(databases, user, OTHER[cell])
        assert sent(operator, purchase(None, customer)[0]) == "applied"
        assert sent(operator, nameless) == "repeated"
        assert user.credits() == 410


@pytest.mark.usefixtures("pack")
def test_who_is_told_of_before_signing_up_is_given_it_then(databases, operator):
    for cell in CELLS:
        user_id = str(uuid.uuid4())
        [event, *_] = purchase(user_id)
        assert sent(operator, event) == "waiting"
        home = databases["home"]
        home.execute("update cells.cells set weight = (name = %s)::integer", cell)
        home.execute("insert into auth.users (id) values (%s)", user_id)
        home.execute("update cells.cells set weight = 1")

        home.execute("select private.apply_retention()")

        credits = "select credits from public.entitlements where user_id = %s"
        assert databases[cell].value(credits, user_id) == 110
        assert holders(databases, event["id"]) == [cell]


@pytest.mark.usefixtures("pack")
def test_nothing_is_left_waiting_when_what_belongs_together_comes_at_once(
    sign_up, databases, operator
):
    user = sign_up("two")
    for _ in range(12):
        events = purchase(user.id)
        threads = [
            threading.Thread(target=sent, args=(operator, events[i])) for i in (2, 0, 2, 1, 0)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert user.credits() == 10 + 12 * 50
    waiting = "select count(*) from private.billing_events where outcome = 'waiting' and %s in (%s)"
    assert databases["home"].value(waiting, 1, 1) == 0


@pytest.mark.usefixtures("pack")
def test_payments_of_a_user_who_is_moved_to_and_fro_count_once_each(sign_up, databases, operator):
    user, ending, done = sign_up("home"), threading.Event(), []

    def buy() -> None:
        while not ending.is_set():
            events = purchase(user.id)
            for event in (events[2], events[0], events[0], events[2]):
                until(
                    lambda event=event: (
                        operator.rpc(
                            "apply_billing_event", provider="stripe", event=event
                        ).status_code
                        == 200
                    )
                )
            done.append(events)

    threads = [threading.Thread(target=buy) for _ in range(2)]
    for thread in threads:
        thread.start()
    for cell in ["two", "home"] * 4:
        moved(databases, user, cell)
    ending.set()
    for thread in threads:
        thread.join()

    assert len(done) > 4
    assert user.credits() == 10 + 50 * len(done)
    for events in done:
        assert [holders(databases, event["id"]) for event in events[::2]] == [["home"]] * 2
    for cell in CELLS:
        assert_books_balance(databases[cell])


@pytest.mark.usefixtures("pack")
def test_a_payment_for_a_cell_that_is_away_is_not_taken_and_others_are(
    cells, users, databases, operator
):
    refund = purchase(users["home"].id)
    away = purchase(users["two"].id)
    nobodys = purchase(None, f"cus_{uuid.uuid4()}")[0]
    kill(cells, "two")
    try:
        assert sent(operator, refund[0]) == "applied"
        for event in (away[0], away[2], nobodys):
            refused = operator.rpc("apply_billing_event", provider="stripe", event=event)
            assert refusal(refused) == UNAVAILABLE
        assert holders({"home": databases["home"], "two": databases["home"]}, away[0]["id"]) == []
    finally:
        databases["two"].close()
        databases["two"]._own = None
        cells.clusters["two"].start()
    assert [sent(operator, event) for event in (away[2], away[0])] == ["waiting", "applied"]
    assert users["two"].credits() == 60


@pytest.mark.usefixtures("pack")
def test_what_is_transferred_to_a_user_of_another_cell_is_that_users(users, databases, operator):
    for cell in CELLS:
        giver, taker = users[cell], users[OTHER[cell]]
        moved(databases, taker, OTHER[cell])
        times = {"event_timestamp_ms": 1796052000000, "purchased_at_ms": 1796052000000}
        bought = times | {"id": f"a{giver.id}", "type": "INITIAL_PURCHASE", "product_id": "monthly"}
        bought |= {"app_user_id": giver.id, "transaction_id": f"t{giver.id}"}
        assert sent(operator, bought, "revenuecat") == "applied"
        transfer = {"id": f"b{giver.id}", "type": "TRANSFER", "event_timestamp_ms": 1796052001000}
        transfer |= {"transferred_from": [giver.id], "transferred_to": [taker.id]}

        assert sent(operator, transfer, "revenuecat") == "applied"

        owner = "select user_id::text from private.billing_subscriptions where subscription = %s"
        assert databases[OTHER[cell]].value(owner, f"t{giver.id}") == taker.id
        assert where(databases, giver) == [OTHER[cell]]
        renewal = bought | {"id": f"c{giver.id}", "type": "RENEWAL", "app_user_id": taker.id}
        renewal |= {"purchased_at_ms": 1798644000000, "original_transaction_id": f"t{giver.id}"}
        assert sent(operator, renewal | {"event_timestamp_ms": 1798644000000}, "revenuecat")
        moved(databases, giver, cell)


@pytest.mark.parametrize(
    ("provider", "event", "details"),
    [
        ("nobody", {"id": "x"}, "provider: not known"),
        ("stripe", {"id": "x"}, "event: null value in column"),
        ("stripe", {"id": "x" * 201, "type": "x", "created": 1}, "event: value for domain"),
        ("stripe", {"id": "x", "type": "x" * 300_000, "created": 1}, "event: over 256 KiB"),
    ],
)
def test_an_event_that_says_nothing_is_refused_as_ever(operator, provider, event, details):
    told = refusal(operator.rpc("apply_billing_event", provider=provider, event=event))
    assert (told.status, told.message) == (400, "invalid_input")
    assert (told.details or "").startswith(details)
    by_get = operator.rpc("apply_billing_event", "GET", provider="stripe", event='{"id":"x"}')
    assert refusal(by_get).message == "method_not_allowed"
