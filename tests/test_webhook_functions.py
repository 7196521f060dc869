"""The edge functions that Stripe and RevenueCat call: who is believed, and what they are told."""

from __future__ import annotations

import contextlib
import hmac
import itertools
import json
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from edge import Edge, served
from http_client import Refusal, answer, refusal

from processes import StackError

pytest_plugins = ["http_fixtures"]

OLD, NEW, WRONG = "whsec_of_last_year", "whsec_of_this_year", "whsec_of_somebody_else"
AUTHORIZATION = "Bearer of what the dashboard says"
APPLIED = b'{"outcome":"applied","credits":100}'
WEBHOOKS = {
    "stripe_webhook": {"STRIPE_WEBHOOK_SECRET": f"{OLD}, {NEW}\n"},
    "revenuecat_webhook": {"REVENUECAT_WEBHOOK_AUTHORIZATION": AUTHORIZATION},
}
EVENT: dict[str, Any] = {"id": "evt_1", "type": "invoice.paid", "created": 1796052000, "data": {}}

each_webhook = pytest.mark.parametrize("name", WEBHOOKS)


def mac(secret: str, at: object, body: bytes) -> str:
    """Return a signature by the documented scheme."""
    return hmac.new(secret.encode(), f"{at}.".encode() + body, "sha256").hexdigest()


def signed(body: bytes) -> dict[str, str]:
    """Return the header with which Stripe sends a body."""
    now = int(time.time())
    return {"Stripe-Signature": f"t={now},v1={mac(NEW, now, body)}"}


def sent(edge: Edge, name: str, event: object = EVENT, **request: Any) -> httpx.Response:
    """Send an event as its provider does; `body` is sent as it is."""
    wrapped = {"api_version": "1.0", "event": event}
    event = event if name == "stripe_webhook" else wrapped
    body = request.pop("body", json.dumps(event).encode())
    own = signed(body) if name == "stripe_webhook" else {"Authorization": AUTHORIZATION}
    headers = {"Content-Type": "application/json"} | own | request.pop("headers", {})
    return edge.invoke(name, content=body, headers=headers, **request)


@contextlib.contextmanager
def serving(folder: Any, behind: str, **variables: str | None) -> Iterator[Edge]:
    with Edge(behind) as edge, contextlib.ExitStack() as running:
        for name, own in WEBHOOKS.items():
            function = served(folder, name, edge.url, **variables, **own)
            edge.addresses[name] = running.enter_context(function)
        yield edge
        edge.shutdown()


@pytest.fixture(scope="module")
def started(tmp_path_factory, stack):
    keys = {"SUPABASE_SERVICE_ROLE_KEY": stack.service_role_key, "SUPABASE_SECRET_KEYS": None}
    with serving(tmp_path_factory.mktemp("deno"), f"{stack.api_url}/rest/v1", **keys) as edge:
        yield edge


@pytest.fixture
def edge(started):
    started.says(200, APPLIED)
    return started


# Who is believed.


SIGNATURES: dict[str, tuple[Callable[[int, bytes], str], bool]] = {
    "with the newest secret": (lambda t, b: f"t={t},v1={mac(NEW, t, b)}", True),
    "with the one before": (lambda t, b: f"t={t},v1={mac(OLD, t, b)}", True),
    "with several, one of them ours": (
        lambda t, b: f"t={t},v1={mac(WRONG, t, b)},v1={mac(NEW, t, b)},v0={mac(WRONG, t, b)}",
        True,
    ),
    "290 s ago": (lambda t, b: f"t={t - 290},v1={mac(NEW, t - 290, b)}", True),
    "301 s ago": (lambda t, b: f"t={t - 301},v1={mac(NEW, t - 301, b)}", False),
    "in 330 s": (lambda t, b: f"t={t + 330},v1={mac(NEW, t + 330, b)}", False),
    "long ago, with a new time before it": (lambda t, b: f"t={t},v1={mac(NEW, t - 301, b)}", False),
    "with somebody else's secret": (lambda t, b: f"t={t},v1={mac(WRONG, t, b)}", False),
    "with no secret": (lambda t, b: f"t={t},v1={mac('', t, b)}", False),
    "with all secrets as one": (lambda t, b: f"t={t},v1={mac(f'{OLD}, {NEW}', t, b)}", False),
    "of another body": (lambda t, b: f"t={t},v1={mac(NEW, t, b + b' ')}", False),
    "by an older scheme": (lambda t, b: f"t={t},v0={mac(NEW, t, b)}", False),
    "cut short": (lambda t, b: f"t={t},v1={mac(NEW, t, b)[:32]}", False),
    "empty": (lambda t, _: f"t={t},v1=", False),
    "without a time": (lambda _, b: f"v1={mac(NEW, '', b)}", False),
    "at no time": (lambda _, b: f"t=,v1={mac(NEW, '', b)}", False),
    "not at all": (lambda _, __: "", False),
    "a hundred times, once right": (
        lambda t, b: f"t={t}" + f",v1={mac(WRONG, t, b)}" * 99 + f",v1={mac(NEW, t, b)}",
        False,
    ),
}


@pytest.mark.parametrize("how", SIGNATURES)
def test_stripe_is_known_by_a_fresh_signature_with_a_secret_of_ours(edge, how):
    header, is_believed = SIGNATURES[how]
    body = json.dumps(EVENT).encode()
    signature = {"Stripe-Signature": header(int(time.time()), body)}

    response = sent(edge, "stripe_webhook", body=body, headers=signature)

    if is_believed:
        assert answer(response) == {"outcome": "applied"}
    else:
        told = refusal(response)
        assert (told.status, told.code, told.message) == (400, "PT400", "invalid_input")
        assert (told.details or "").startswith("Stripe-Signature: ")
    assert len(edge.requests) == is_believed


@pytest.mark.parametrize(
    ("header", "is_believed"),
    [
        (AUTHORIZATION, True),
        (AUTHORIZATION[:-1], False),
        (f"{AUTHORIZATION}s", False),
        (AUTHORIZATION.lower(), False),
        (AUTHORIZATION.removeprefix("Bearer "), False),
        ("", False),
    ],
)
def test_revenuecat_is_known_by_the_header_that_its_dashboard_holds(edge, header, is_believed):
    response = sent(edge, "revenuecat_webhook", headers={"Authorization": header})

    if is_believed:
        assert answer(response) == {"outcome": "applied"}
    else:
        told = "Authorization: missing or wrong", "Check REVENUECAT_WEBHOOK_AUTHORIZATION."
        assert refusal(response) == Refusal(400, "PT400", "invalid_input", *told)
    assert len(edge.requests) == is_believed


def test_an_event_that_was_changed_on_its_way_is_refused(edge):
    body = json.dumps(EVENT).encode()

    for other in (body.replace(b"evt_1", b"evt_2"), body + b" ", body[:-1], b""):
        told = refusal(sent(edge, "stripe_webhook", body=other, headers=signed(body)))
        assert told.details == "Stripe-Signature: wrong"
    assert edge.requests == []


@each_webhook
def test_what_is_no_post_too_long_or_no_event_goes_no_further(edge, name):
    for method in ("GET", "OPTIONS", "PUT"):
        told = sent(edge, name, method=method)
        assert (refusal(told).status, refusal(told).message) == (405, "method_not_allowed")
        assert told.headers["Allow"] == "POST"
        assert "access-control-allow-origin" not in told.headers, "no page calls this"
    for body in (b"no json", b"{", b"[]", b"null", b'"id"', b"{}", b'{"event":{}}', b"\xff", b""):
        assert refusal(sent(edge, name, body=body)).details == "body: no event", body
    fits = EVENT | {"data": "x" * (262_144 - 200)}
    for body in (b" " * 262_145, json.dumps(fits).encode() + b" " * 262_144):
        assert refusal(sent(edge, name, body=body)).details == "body: over 256 KiB"
    assert edge.requests == []
    assert answer(sent(edge, name, fits)) == {"outcome": "applied"}


# What is passed on.


@each_webhook
def test_nothing_but_the_event_and_our_own_key_reaches_the_gateway(edge, stack, name):
    theirs = {"cookie": "a=1", "prefer": "x=1", "apikey": "theirs"}

    sent(edge, name, headers=theirs, params={"select": "x"})

    [(method, path, headers, content)] = edge.requests
    assert (method, path) == ("POST", "/rest/v1/rpc/apply_billing_event")
    provider = name.removesuffix("_webhook")
    assert json.loads(content) == {"provider": provider, "event": EVENT}
    own = {"accept", "accept-encoding", "accept-language", "host", "user-agent", "content-length"}
    assert {key: value for key, value in headers.items() if key not in own} == {
        "apikey": stack.service_role_key,
        "authorization": f"Bearer {stack.service_role_key}",
        "content-type": "application/json",
    }


def test_a_key_of_the_new_kind_is_preferred_and_is_no_bearer_token(tmp_path):
    keys = {"SUPABASE_SERVICE_ROLE_KEY": "old", "SUPABASE_SECRET_KEYS": '{"default":"sb_secret_1"}'}
    with serving(tmp_path, "", **keys) as edge:
        edge.says(200, APPLIED)
        for name in WEBHOOKS:
            answer(sent(edge, name))
            headers = edge.requests[-1][2]
            assert (headers["apikey"], headers.get("authorization")) == ("sb_secret_1", None)


@each_webhook
def test_text_that_jsonb_cannot_hold_does_not_keep_an_event_out(edge, name):
    typed = {"name\0": "a\0b \ud83d c \ude00 \U0001f600 \\u0000 \\\\u0000 \t \x1f é"}

    answer(sent(edge, name, EVENT | {"data": typed}))

    passed = json.loads(edge.requests[-1][3])["event"]["data"]
    kept = "a\ufffdb \ufffd c \ufffd \U0001f600 \\u0000 \\\\u0000 \t \x1f é"
    assert passed == {"name\ufffd": kept}


# What the provider is answered: it sends again what is not answered with 200.


@each_webhook
@pytest.mark.parametrize("outcome", ["applied", "repeated", "older", "waiting", "ignored"])
def test_what_the_database_has_taken_is_not_sent_again(edge, name, outcome):
    edge.says(200, json.dumps({"outcome": outcome, "credits": 7}).encode())

    response = sent(edge, name)

    assert answer(response) == {"outcome": outcome}
    assert response.headers.keys().isdisjoint({"set-cookie", "location"})


@each_webhook
def test_what_the_database_refuses_is_told_in_its_words(edge, name):
    told = {"code": "PT400", "message": "invalid_input", "details": "event: x", "hint": "Look."}
    edge.says(400, json.dumps(told).encode())

    assert refusal(sent(edge, name)) == Refusal(400, *told.values())


@each_webhook
@pytest.mark.parametrize(
    ("status", "content"),
    [
        (0, b""),
        (200, b"true"),
        (200, b"<html>Welcome to the hotel's WLAN</html>"),
        (307, b""),
        (400, b'{"code":"0A000","message":"cannot set transaction read-write mode"}'),
        (400, b'{"code":"","details":null,"hint":null,"message":""}'),
        (401, b'{"message":"Invalid API key"}'),
        (401, b'{"code":"42501","message":"permission denied for function"}'),
        (404, b'{"code":"PGRST202","message":"Could not find the function"}'),
        (500, b'{"code":"57P03","message":"the database system is starting up"}'),
        (503, b'{"code":"PT503","message":"unavailable"}'),
        (502, b"<html>Bad Gateway</html>"),
    ],
)
def test_what_the_database_could_not_take_is_sent_again(edge, name, status, content):
    edge.says(status, content)

    told = refusal(sent(edge, name))

    assert told == Refusal(503, "PT503", "unavailable", "no answer in time", "Send it again.")
    assert len(edge.requests) == 1, "the key does not follow a redirect"


def test_a_database_that_takes_too_long_is_not_waited_for(edge):
    edge.may_answer.clear()
    began = time.monotonic()

    with ThreadPoolExecutor() as threads:
        answers = list(threads.map(lambda name: sent(edge, name), WEBHOOKS))

    edge.says(0)
    assert [refusal(each).message for each in answers] == ["unavailable"] * 2
    assert time.monotonic() - began < 20, "Stripe waits no longer"


# From a signature to a balance.


@pytest.fixture
def pack(stack_db):
    """A product of both stores: 100 credits."""
    stack_db.execute(
        "insert into public.credit_products (provider, product_id, credits)"
        " values ('stripe', 'pack', 100), ('revenuecat', 'pack', 100)"
    )
    yield
    stack_db.execute("delete from public.credit_products where product_id = 'pack'")


def stripe_says(user_id: str, payment: str) -> list[dict[str, Any]]:
    """Return the events of a payment that is paid for, told under two ids, and half given back."""
    of = {"id": f"cs_{payment}", "payment_intent": payment, "metadata": {"product": "pack"}}
    of |= {"client_reference_id": user_id, "mode": "payment", "payment_status": "paid"}
    refund = {"id": f"ch_{payment}", "payment_intent": payment, "amount": 8, "amount_refunded": 4}
    return [
        EVENT | {"id": f"{payment} {type}", "type": type, "data": {"object": of}}
        for type, of in [
            ("checkout.session.completed", of),
            ("checkout.session.async_payment_succeeded", of),
            ("charge.refunded", refund),
        ]
    ]


def revenuecat_says(user_id: str, payment: str) -> list[dict[str, Any]]:
    """Return the events of a purchase, told under two ids, and given back."""
    of = {"app_user_id": user_id, "product_id": "pack", "transaction_id": payment}
    of |= {"event_timestamp_ms": 1796052000000, "purchased_at_ms": 1796052000000}
    return [
        of | {"id": f"{payment} 1", "type": "NON_RENEWING_PURCHASE"},
        of | {"id": f"{payment} 2", "type": "NON_RENEWING_PURCHASE"},
        of | {"id": f"{payment} 3", "type": "CANCELLATION", "cancel_reason": "CUSTOMER_SUPPORT"},
    ]


@pytest.mark.usefixtures("pack")
@pytest.mark.parametrize(("says", "gained"), [(stripe_says, 50), (revenuecat_says, 0)])
def test_a_payment_counts_once_whatever_is_sent_again_and_in_whatever_order(
    edge, user, says, gained
):
    name = says.__name__.replace("says", "webhook")
    edge.says(None)
    for order in itertools.permutations(range(3)):
        had = user.credits()
        events = says(user.id, f"pi_{uuid.uuid4()}")

        told = [answer(sent(edge, name, events[i]))["outcome"] for i in (*order, *order)]

        assert user.credits() - had == gained, order
        assert set(told[:3]) <= {"applied", "repeated", "waiting"}
        assert set(told[3:]) == {"repeated"}


# What it needs.


@pytest.mark.parametrize("missing", ["SUPABASE_URL", "SUPABASE_SERVICE_ROLE_KEY", "its own"])
@each_webhook
def test_a_function_without_what_it_needs_names_that_and_does_not_start(tmp_path, name, missing):
    [(own, value)] = WEBHOOKS[name].items()
    keys = {"SUPABASE_URL": "http://127.0.0.1:9", "SUPABASE_SERVICE_ROLE_KEY": "key"}
    variables = keys | {"SUPABASE_SECRET_KEYS": "no json", own: value}
    without = own if missing == "its own" else missing

    for nothing in (None, ""):
        with (
            pytest.raises(StackError, match=f"{without} is not set") as told,
            served(tmp_path, name, keys["SUPABASE_URL"], **variables | {without: nothing}),
        ):
            pass
        assert value.strip() not in str(told.value)
        assert "no json" not in str(told.value)
