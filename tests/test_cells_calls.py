"""Calls that concern users of two cells, or of all: payments, merges, likes, sums, and attacks."""

# ruff: noqa: F401, F811

from __future__ import annotations

import dataclasses
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
from psycopg import sql
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
    user, ending, done, refused = sign_up("home"), threading.Event(), [], []

    def buy() -> None:
        while not ending.is_set():
            events = purchase(user.id)
            for event in (events[2], events[0], events[0], events[2]):
                said: list[httpx.Response] = []

                def is_taken(event=event, said=said) -> bool:
                    arguments = {"provider": "stripe", "event": event}
                    said.append(operator.rpc("apply_billing_event", **arguments))
                    return said[-1].status_code == 200

                try:
                    until(is_taken)
                except BaseException:
                    refused.append((event["id"], said[-1].text))
                    raise
            done.append(events)

    threads = [threading.Thread(target=buy) for _ in range(2)]
    for thread in threads:
        thread.start()
    moves = 0
    while moves < 4 or len(done) < 5:
        for cell in ("two", "home"):
            moved(databases, user, cell)
        moves += 1
    ending.set()
    for thread in threads:
        thread.join()

    assert refused == []
    databases["home"].execute("select private.apply_retention()")  # as each minute
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


# Merging.


def guest(user: SignedUp, databases: dict[str, Database]) -> SignedUp:
    """Make a user a guest, as who signed in anonymously is one."""
    databases["home"].execute(
        "update auth.users set is_anonymous = true, email = null where id = %s", user.id
    )
    return user


@pytest.mark.parametrize("cell", CELLS)
def test_a_guest_becomes_part_of_a_user_of_another_cell(sign_up, databases, operator, cell):
    user, other = sign_up(OTHER[cell]), guest(sign_up(cell), databases)
    picture = shared(other, databases[cell])
    job_id = other.enqueued()
    both = {"from_user_id": other.id, "to_user_id": user.id}
    had = user.credits() + other.credits()

    early = refusal(operator.rpc("merge_user", **both))
    assert (early.status, early.message) == (409, "not_finished")
    answer(other.rpc("cancel_generation", job_id=job_id))
    merged = [answer(operator.rpc("merge_user", **both)) for _ in range(2)]

    assert merged[0] == {
        "user_id": user.id, "generations": 2, "applied": True, "credits": had + 1
    }  # fmt: skip
    assert merged[1] == merged[0] | {"generations": 0, "applied": False}
    assert user.credits() == had + 1
    history = answer(user.rpc("list_generations"))["generations"]
    assert [each["status"] for each in history] == ["canceled", "completed"]
    assert where(databases, other) == where(databases, user) == [OTHER[cell]]
    feed = answer(user.rpc("list_public_images"))["images"]
    assert [each["is_own"] for each in feed if each["share_id"] in picture] == [True]
    assert refusal(other.enqueue()).message == "account_blocked"
    for name in CELLS:
        assert_books_balance(databases[name])


def test_a_guest_whose_job_runs_is_merged_later(sign_up, databases, operator):
    user, other = sign_up("home"), guest(sign_up("two"), databases)
    job_id, worker = other.enqueued(), Worker(databases["two"])
    (job,) = [each for each in worker.claim_jobs(100) if each.id == job_id]
    both = {"from_user_id": other.id, "to_user_id": user.id}

    told = operator.rpc("merge_user", **both)
    assert refusal(told) == UNAVAILABLE
    assert told.headers["Retry-After"].split(", ")[-1] == "10"
    worker.complete_job(job)
    worker.unregister_worker()
    assert answer(operator.rpc("merge_user", **both))["generations"] == 1


def test_who_may_not_be_merged_is_told_as_ever_wherever_they_live(sign_up, operator):
    home, two, nobody = sign_up("home"), sign_up("two"), str(uuid.uuid4())
    cases = [
        (home.id, two.id, "from_user_id: no guest"),
        (nobody, two.id, "from_user_id, to_user_id: no such user"),
        (two.id, nobody, "from_user_id, to_user_id: no such user"),
        (two.id, two.id, "from_user_id, to_user_id: not two users"),
        (two.id, None, "from_user_id, to_user_id: not two users"),
    ]
    for one, other, details in cases:
        told = refusal(operator.rpc("merge_user", from_user_id=one, to_user_id=other))
        assert told.details == details, (one, other)


# Likes.


def like(user: SignedUp, job_id: str, is_liked: bool = True) -> int:
    """Like a picture, or no longer, and return how many do."""
    liked = answer(user.rpc("like_image", job_id=job_id, is_liked=is_liked))
    assert liked["is_liked"] == is_liked
    return int(liked["like_count"])


def test_pictures_are_liked_by_users_of_all_cells(users, databases, sign_up, anybody):
    for cell, owner in users.items():
        [share_id] = shared(owner, databases[cell])
        near, far = sign_up(cell), sign_up(OTHER[cell])

        def seen(user: Client, share_id: str = share_id) -> tuple[bool, int]:
            feed = answer(user.rpc("list_public_images"))["images"]
            [image] = [each for each in feed if each["share_id"] == share_id]
            return image["is_liked"], image["like_count"]

        job_id = answer(owner.rpc("list_generations"))["generations"][0]["job_id"]
        assert [like(user, job_id) for user in (far, near, owner, far)] == [1, 2, 3, 3]
        assert like(owner, job_id, is_liked=False) == 2
        assert [seen(user) for user in (far, owner, anybody)] == [(True, 2), (False, 2), (False, 2)]
        moved(databases, far, cell)
        moved(databases, owner, OTHER[cell])
        assert [seen(user) for user in (far, near)] == [(True, 2), (True, 2)]
        assert like(far, job_id) == 2
        databases["home"].execute("delete from auth.users where id = %s", far.id)
        assert refusal(far.rpc("like_image", job_id=job_id)).status == 401
        assert seen(near) == (True, 1)
        databases["home"].execute("delete from auth.users where id = %s", near.id)
        assert seen(owner) == (False, 0)


def test_what_nobody_shows_is_not_found_and_what_is_away_is_unavailable(
    cells, users, databases, anybody
):
    for user in users.values():
        stranger = next(other for other in users.values() if other is not user)
        told = [user.rpc("like_image", job_id=job) for job in (uuid.uuid4().hex, user.enqueued())]
        told.append(stranger.rpc("like_image", job_id=user.enqueued()))
        known = "Use job_id and position as the list of images shows them."
        assert [refusal(each) for each in told] == [
            Refusal(404, "PT404", "not_found", "image_position: no such image of this job", known)
        ] * 3
        assert refusal(user.rpc("like_image", job_id=user.id, is_liked=None)).status == 400
        assert refusal(anybody.rpc("like_image", job_id=user.id)).status == 401
        assert refusal(user.rpc("like_image", "GET", job_id=user.id)).status == 405


# What is one in all cells.


def test_an_address_is_welcomed_once_in_all_cells(databases):
    home = databases["home"]

    def credits_of_new(cell: str, **columns: object) -> int:
        home.execute("update cells.cells set weight = (name = %s)::integer", cell)
        names = ", ".join(columns)
        user_id = home.value(
            f"insert into auth.users (id, {names}) values (gen_random_uuid(), "
            f"{', '.join(['%s'] * len(columns))}) returning id",
            *columns.values(),
        )
        home.execute("update cells.cells set weight = 1")
        query = "select credits from public.entitlements where user_id = %s"
        return int(databases[cell].value(query, user_id))

    assert credits_of_new("two", email="ann@example.com") == 10
    assert credits_of_new("home", email="ann+1@example.com") == 0
    assert credits_of_new("two", email="Ann+2@example.com") == 0
    assert credits_of_new("home", email="bob@example.com") == 10
    assert credits_of_new("two", email="bob@example.com ") == 0
    assert credits_of_new("two", phone="+49 1") == 10
    assert credits_of_new("two", phone="49-1") == 0
    kept = "select count(*) from private.welcomed_identities where identity <> ''"
    assert databases["two"].value(kept) == 0, "addresses stay in home"
    home.execute("update private.settings set welcome_once_per_identity = false")
    assert credits_of_new("two", phone="491") == 10
    home.execute("update private.settings set welcome_once_per_identity = true")


def test_a_guest_of_any_cell_is_welcomed_when_permanent_unless_the_address_was(databases, sign_up):
    home = databases["home"]
    home.execute("update private.plans set welcome_credits = 3 where name = 'guest'")
    until(
        lambda: (
            databases["two"].value("select welcome_credits from private.plans where name = 'guest'")
            == 3
        )
    )
    for address, credits in (("cy@example.com", 10), ("cy+1@example.com", 3)):
        home.execute("update cells.cells set weight = (name = 'two')::integer")
        user_id = home.value(
            "insert into auth.users (id, is_anonymous) values (gen_random_uuid(), true)"
            " returning id"
        )
        home.execute("update cells.cells set weight = 1")
        query = "select credits from public.entitlements where user_id = %s"
        assert databases["two"].value(query, user_id) == 3
        permanent = "update auth.users set is_anonymous = false where id = {0}"
        permanent += "; update auth.users set email = {1} where id = {0}"
        home.execute(sql.SQL(permanent).format(user_id, address))
        assert databases["two"].value(query, user_id) == credits, address
    home.execute("update private.plans set welcome_credits = null where name = 'guest'")


def test_the_apps_templates_are_everybodys_and_a_users_own_stay_so(users, databases):
    home = databases["home"]
    for user in users.values():
        answer(user.rpc("save_prompt_template", title="mine", prompt="p"))

    def titles(user: SignedUp) -> list[str]:
        return [each["title"] for each in answer(user.rpc("list_prompt_templates"))]

    template = home.value(
        "insert into public.prompt_templates (title, prompt) values ('ours', 'x') returning id"
    )
    until(lambda: [titles(user) for user in users.values()] == [["mine", "ours"]] * 2)
    home.execute("update public.prompt_templates set title = 'new' where id = %s", template)
    until(lambda: [titles(user) for user in users.values()] == [["mine", "new"]] * 2)
    home.execute("delete from public.prompt_templates where id = %s", template)
    until(lambda: [titles(user) for user in users.values()] == [["mine"]] * 2)


# One answer of many.

NOT_ADDED = {"p50_seconds": 2.5, "threshold": 5, "value": 7, "took_ms": 3, "used": 0.5}
A, B = "2026-01-01T10:00:00+00:00", "2026-01-01T10:15:00+00:00"

SUMS: dict[str, tuple[Any, Any, Any]] = {
    "counts": ({"ready": 2}, {"ready": 3}, {"ready": 5}),
    "what one has": ({"a": 1, "b": None}, {"b": 2, "c": None}, {"a": 1, "b": 2, "c": None}),
    "measures": (NOT_ADDED, dict.fromkeys(NOT_ADDED, 1), NOT_ADDED | {"used": 1}),
    "names that look like measures": (
        {"unserved": {"generated": 1, "used_words": 2}},
        {"unserved": {"generated": 1, "used_words": 2}},
        {"unserved": {"generated": 2, "used_words": 4}},
    ),
    "the longest wait": ({"oldest_ready_seconds": 9}, {"oldest_ready_seconds": None},
                         {"oldest_ready_seconds": 9}),
    "seconds of many": ({"completed_seconds": 9.5}, {"completed_seconds": 2},
                        {"completed_seconds": 11.5}),
    "the error rate of all attempts": (
        {"error_rate": 0.5, "attempts_of_15_minutes": 2},
        {"error_rate": 0.1, "attempts_of_15_minutes": 30},
        {"error_rate": 0.125, "attempts_of_15_minutes": 32},
    ),
    "no attempts in one": (
        {"error_rate": None, "attempts_of_15_minutes": 0},
        {"error_rate": 0.5, "attempts_of_15_minutes": 4},
        {"error_rate": 0.5, "attempts_of_15_minutes": 4},
    ),
    "no attempts at all": (
        {"error_rate": None, "attempts_of_15_minutes": 0},
        {"error_rate": None, "attempts_of_15_minutes": 0},
        {"error_rate": None, "attempts_of_15_minutes": 0},
    ),
    "the worst status": ({"status": "ok"}, {"status": "warning"}, {"status": "warning"}),
    "the worst of all": ({"status": "warning"}, {"status": "critical"}, {"status": "critical"}),
    "a routine": (
        {"last_run_at": A, "every_seconds": 60, "runs_missed": 15},
        {"last_run_at": B, "every_seconds": 60, "runs_missed": 0},
        {"last_run_at": A, "every_seconds": 60, "runs_missed": 15},
    ),
    "who sees all": ({"sees_all_sessions": True}, {"sees_all_sessions": False},
                     {"sees_all_sessions": False}),
    "an alert of both": (
        {"alerts": [{"alert": "stuck", "severity": "warning", "detail": "2 jobs"}]},
        {"alerts": [{"alert": "depth", "severity": "critical", "detail": "9"},
                    {"alert": "stuck", "severity": "warning", "detail": "1 job"}]},
        {"alerts": [{"alert": "depth", "severity": "critical", "detail": "9"},
                    {"alert": "stuck", "severity": "warning", "detail": "2 jobs; 1 job"}]},
    ),
    "buckets of time": (
        {"queue": [{"at": A, "went": 1, "waited_seconds": 4}, {"at": B, "went": 2}]},
        {"queue": [{"at": B, "went": 3}, {"at": "2026-01-01T10:30:00+00:00", "went": 4}]},
        {"queue": [{"at": A, "went": 1, "waited_seconds": 4}, {"at": B, "went": 5},
                   {"at": "2026-01-01T10:30:00+00:00", "went": 4}]},
    ),
    "errors": (
        {"errors": [{"model_id": "m", "error_code": "c", "providers": ["p"], "last_at": A,
                     "errors": 1}]},
        {"errors": [{"model_id": "m", "error_code": "c", "providers": ["p"], "last_at": B,
                     "errors": 2}]},
        {"errors": [{"model_id": "m", "error_code": "c", "providers": ["p"], "last_at": B,
                     "errors": 3}]},
    ),
    "what is paused": (
        {"paused": [{"kind": "model", "name": "m", "paused_until": A, "times_opened": 0}]},
        {"paused": [{"kind": "model", "name": "m", "paused_until": B, "times_opened": 0}]},
        {"paused": [{"kind": "model", "name": "m", "paused_until": B, "times_opened": 0}]},
    ),
    "lists of things": ({"workers": [{"host": "a"}]}, {"workers": [{"host": "b"}]},
                        {"workers": [{"host": "a"}, {"host": "b"}]}),
    "webhooks": (
        [{"webhook_id": "1", "events": ["x", "y"], "disabled_at": None}],
        [{"webhook_id": "1", "events": ["x", "y"], "disabled_at": A}],
        [{"webhook_id": "1", "events": ["x", "y"], "disabled_at": A}],
    ),
    "lists of nothing": ([], [], []),
}  # fmt: skip


@pytest.mark.parametrize("what", SUMS)
def test_answers_of_cells_are_made_one(databases, what):
    one, other, both = SUMS[what]
    merged = "select cells.merge_sums(%s::json[], null, %s)"
    answers = [json.dumps(one), json.dumps(other)]

    assert databases["entry"].value(merged, answers, []) == both
    assert databases["entry"].value(merged, answers[:1], []) == one
    away = databases["entry"].value(merged, [json.dumps({"health": {"status": "ok"}})], ["two"])
    assert away == {"health": {"status": "critical", "cells_away": ["two"]}}


def test_every_number_that_health_and_reports_tell_is_of_all_cells(users, databases, operator):
    """What each cell says, added by hand where it is plain, and never lost or made up."""
    for cell, user in users.items():
        shared(user, databases[cell], 2)
        user.enqueued()
        worker = Worker(databases[cell])
        for job in worker.claim_jobs(100):
            worker.fail_job(job, "output_refused")
        worker.unregister_worker()

    cells = {
        (name, cell): databases[cell].value(f"select public.{name}()")
        for name in ("queue_health", "queue_report", "queue_history")
        for cell in CELLS
    }
    health, report, history = (answer(operator.rpc(name)) for name in (
        "queue_health", "queue_report", "queue_history"
    ))  # fmt: skip
    for part, key in (("rates", "attempts_of_15_minutes"), ("rates", "last_jobs"),
                      ("depth", "ready"), ("running", "jobs")):  # fmt: skip
        of_each = [cells["queue_health", cell][part][key] for cell in CELLS]
        assert health[part][key] == report["health"][part][key] == sum(of_each), key
    attempts = health["rates"]["attempts_of_15_minutes"]
    failed = sum(
        cells["queue_health", cell]["rates"]["error_rate"]
        * cells["queue_health", cell]["rates"]["attempts_of_15_minutes"]
        for cell in CELLS
    )
    assert abs(health["rates"]["error_rate"] - failed / attempts) < 0.001
    for key in ("completed", "failed"):
        of_each = [
            sum(model[key] for model in cells["queue_report", cell]["models"]) for cell in CELLS
        ]
        assert sum(model[key] for model in report["models"]) == sum(of_each) > 0
        of_each = [
            sum(bucket[key] for bucket in cells["queue_history", cell]["models"]) for cell in CELLS
        ]
        assert sum(bucket[key] for bucket in history["models"]) == sum(of_each) > 0
    assert [each["at"] for each in history["queue"]] == sorted(
        {each["at"] for cell in CELLS for each in cells["queue_history", cell]["queue"]}
    )


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_pages_of_the_feed_lose_and_repeat_nothing(users, databases, anybody, size):
    for count in (3, 2):
        for cell, user in users.items():
            shared(user, databases[cell], count if cell == "two" else 1)
    query = "select share_id::text from public.images where share_id is not null"
    everything = sorted(
        (row["share_id"] for cell in CELLS for row in databases[cell].execute(query)), reverse=True
    )

    found, before = [], None
    while True:
        page = answer(anybody.rpc("list_public_images", page_size=size, before=before))
        found += [image["share_id"] for image in page["images"]]
        before = page["next_before"]
        if before is None:
            break

    assert found == everything


def test_the_outbox_of_all_cells_is_one_by_time(users, databases, operator):
    made: list[str] = []
    for cell in ("home", "two", "two", "home", "two"):
        made += [
            str(row["id"])
            for row in databases[cell].execute(
                "insert into private.deliveries (id, generation_id, lane, event_type, state,"
                " finished_at) values (private.uuid_v7(), %s, gen_random_uuid()::text,"
                " 'generation.completed', 'dead', now()) returning id",
                users[cell].enqueued(),
            )
        ]
        answer(users[cell].rpc("cancel_generation", job_id=answer(
            users[cell].rpc("list_active_jobs"))[0]["job_id"]))  # fmt: skip
    made.sort(reverse=True)

    def ids(**arguments: Any) -> list[str]:
        told = answer(operator.rpc("list_deliveries", **arguments))
        return [each["delivery_id"] for each in told]

    assert ids(state="dead") == made
    for at_most in (1, 3, 5):
        assert ids(state="dead", at_most=at_most) == made[:at_most]
    for delivery_id in made:
        assert answer(operator.rpc("redeliver", delivery_id=delivery_id))["state"] == "pending"
    assert refusal(operator.rpc("redeliver", delivery_id=users["two"].id)).status == 404
    for cell in CELLS:
        databases[cell].execute("delete from private.deliveries")


def test_redriving_counts_what_it_may_over_all_cells(users, databases, operator):
    for cell, user in users.items():
        worker = Worker(databases[cell])
        for _ in range(3):
            job_id = user.enqueued()
            [job] = [each for each in worker.claim_jobs(100) if each.id == job_id]
            worker.fail_job(job, "output_refused")
        worker.unregister_worker()
        # Tests before this one have left some that nobody may have again.
        databases[cell].execute(
            "delete from public.generations where user_id <> %s and status = 'failed'", user.id
        )
    of = {"code": "output_refused", "since": "-infinity"}

    told = [answer(operator.rpc("redrive_failed", **of, at_most=most)) for most in (4, 1, 9)]

    assert [each["redriven"] for each in told] == [4, 1, 1]
    assert answer(operator.rpc("redrive_failed", **of)) == {"redriven": 0}
    assert refusal(operator.rpc("redrive_failed", **of, at_most=0)).status == 400


def test_a_webhook_that_a_cell_gave_up_is_shown_so(databases, operator):
    databases["home"].execute("update private.settings set webhook_allows_private = true")
    hook = answer(operator.rpc("register_webhook", url="http://127.0.0.1:9/gone"))["webhook_id"]
    there = "select count(*) from private.webhook_endpoints where id = %s and disabled_at is null"
    until(lambda: databases["two"].value(there, hook) == 1)

    def disabled_at() -> str | None:
        [shown] = [
            each for each in answer(operator.rpc("list_webhooks")) if each["webhook_id"] == hook
        ]
        assert len(shown["events"]) == 3
        return shown["disabled_at"]

    assert disabled_at() is None
    databases["two"].execute(
        "update private.webhook_endpoints set disabled_at = now() where id = %s", hook
    )
    assert disabled_at() is not None
    answer(operator.rpc("enable_webhook", webhook_id=hook))
    until(lambda: disabled_at() is None)
    answer(operator.rpc("delete_webhook", webhook_id=hook))


# Users whom an operator names.


def test_an_operators_call_for_nobody_or_for_who_is_moving_or_away_is_told_so(
    cells, users, databases, operator
):
    nobody = str(uuid.uuid4())
    away = users["two"]
    calls: dict[str, dict[str, Any]] = {
        "grant_credits": {"amount": 5, "kind": "grant", "external_id": nobody},
        "set_paid": {"paid_until": "infinity"},
        "export_user": {},
    }
    for name, arguments in calls.items():
        assert refusal(operator.rpc(name, user_id=nobody, **arguments)).message == "not_found", name
        assert refusal(operator.rpc(name, user_id="x", **arguments)).code == "22P02", name
        assert operator.rpc(name, user_id=None, **arguments).status_code in (400, 404), name
        assert operator.rpc(name, user_id=away.id, **arguments).status_code == 200
    moving = users["home"]
    databases["home"].execute("select cells.start_move(%s, 'two')", moving.id)
    databases["home"].execute(
        "update cells.users set cell = 'moving' where user_id = %s", moving.id
    )
    for name, arguments in calls.items():
        told = operator.rpc(name, user_id=moving.id, **arguments)
        assert refusal(told) == UNAVAILABLE, name
    moved(databases, moving, "two")
    kill(cells, "two")
    try:
        for name, arguments in calls.items():
            for user in (away, moving):
                told = operator.rpc(name, user_id=user.id, **arguments)
                assert refusal(told) == UNAVAILABLE, name
    finally:
        databases["two"].close()
        databases["two"]._own = None
        cells.clusters["two"].start()


# Attacks.


def test_nobody_reaches_another_users_cell_by_what_a_token_says(
    cells, users, databases, endpoints, anybody
):
    victim = users["two"]
    job_id = victim.enqueued()

    def by(**claims: Any) -> Client:
        token = sign_jwt(cells.jwt_secret, {"role": "authenticated", "exp": 4102444800} | claims)
        return Client(endpoints, token)

    for sub in (None, "", "x", "null", 7, [], {}, [victim.id], {"sub": victim.id}, victim.id + "x",
                f"{victim.id}' or 'a'='a", "x" * 20_000, "\ud83d"):  # fmt: skip
        for name in ("get_entitlement", "list_generations", "like_image", "enqueue_generation"):
            arguments = {"like_image": {"job_id": job_id}}.get(name, {})
            if name == "enqueue_generation":
                arguments = {"model": PREVIEW, "prompt": "x"}
            assert by(sub=sub).rpc(name, **arguments).status_code >= 400, (sub, name)
        rows = by(sub=sub).rest("GET", "generations?select=id")
        assert rows.status_code >= 400 or rows.json() == [], sub
    for role in ("darkroom_entry", "postgres", "authenticator", "darkroom_worker"):
        assert by(role=role, sub=victim.id).rpc("ping").status_code in (400, 401, 403), role
    for schema in ("cells", "private", "two"):
        for client in (victim, anybody):
            hidden = client.rest("GET", "cells", headers={"Accept-Profile": schema})
            assert hidden.status_code == 406, schema


def test_numbers_that_are_longer_when_written_are_not_sent_on(users):
    row = ",".join(["1e131071"] * 5000)
    for cell, user in users.items():
        for body in (
            f'{{"model":"{PREVIEW}","prompt":"x","params":{{"seed":[{row}]}}}}',
            f'{{"model":"{PREVIEW}","prompts":["x"],"params":{{"a":{{"b":[{row}]}}}}}}',
        ):
            name = "enqueue_batch" if "prompts" in body else "enqueue_generation"
            told = user.rest(
                "POST", f"rpc/{name}", content=body, headers={"Content-Type": "application/json"}
            )
            assert refusal(told) == Refusal(
                400, "PT400", "invalid_input", "params: a number of more than 400 digits",
                "Correct the argument and call again.",
            ), cell  # fmt: skip
            assert told.elapsed < timedelta(seconds=1)


def test_what_the_entry_logs_in_as_can_read_and_change_no_table_by_itself(cells, databases):
    for cell in CELLS:
        database = databases[cell]
        allowed = database.execute(
            "select c.oid::regclass::text as name, p.privilege from pg_class as c"
            " cross join unnest('{select,insert,update,delete,truncate}'::text[]) as p (privilege)"
            " where c.relnamespace in ('public'::regnamespace, 'private'::regnamespace,"
            " 'auth'::regnamespace) and c.relkind in ('r', 'p', 'v')"
            " and has_table_privilege('darkroom_entry', c.oid, p.privilege)"
        )
        assert allowed == []
        called = database.execute(
            "select p.proname from pg_proc as p where p.pronamespace = 'private'::regnamespace"
            " and has_function_privilege('darkroom_entry', p.oid, 'execute')"
        )
        assert sorted(row["proname"] for row in called) == ["has_folder", "like_shared_image"]
        api = "unnest('{anon,authenticated,service_role,darkroom_monitor}'::text[]) as r (role)"
        users = (
            f"select distinct p.oid::regprocedure::text as name from pg_proc as p cross join {api}"
            " where p.pronamespace = 'cells'::regnamespace"
            " and has_function_privilege(role, p.oid, 'execute')"
            " and has_schema_privilege(role, 'cells', 'usage')"
            f" union select c.relname::text from pg_class as c cross join {api}"
            " where c.relnamespace = 'cells'::regnamespace and c.relkind in ('r', 'v', 'f')"
            " and has_table_privilege(role, c.oid, 'select, insert, update, delete, truncate')"
        )
        read = [row["name"] for row in database.execute(users)]
        assert read == (["shared_paths"] if cell == "home" else [])


# Functions of the app's own.


def test_a_function_of_the_apps_own_that_all_cells_have_is_routed_by_a_row(
    cells, users, databases, endpoints
):
    own = (
        "create function public.count_mine() returns json language sql security definer"
        " set search_path = pg_catalog, pg_temp as $$ select to_json(count(*)) from"
        " public.generations where user_id = private.caller_id() $$;"
        "grant execute on function public.count_mine to authenticated"
    )
    for cell in CELLS:
        databases[cell].execute(own)
    entry = databases["entry"]
    entry.execute("insert into cells.routes (function, goes_to) values ('count_mine', 'user')")
    entry.execute("select cells.make_doors('two')")
    try:
        users["two"].enqueued()
        # The stack's gateway asked once what the entry has.
        at_entry = dataclasses.replace(endpoints, rest=cells.entry.address())
        callers = [Client(at_entry, user.token) for user in users.values()]
        until(lambda: callers[1].rpc("count_mine").status_code == 200)

        assert [answer(caller.rpc("count_mine")) for caller in callers] == [0, 1]
    finally:
        entry.execute("delete from cells.routes where function = 'count_mine'")
        entry.execute("drop function public.count_mine()")
        for cell in CELLS:
            databases[cell].execute("drop function public.count_mine()")
