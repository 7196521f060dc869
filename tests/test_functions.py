"""The edge functions of apps: what an app sees that calls `functions.invoke`."""

from __future__ import annotations

import contextlib
import json
import re
import tomllib
from typing import Any

import httpx
import pytest
from database import unchanged
from edge import SOURCES, Edge, seen, served
from http_client import PREVIEW, Refusal, answer, refusal

from stack import SUPABASE

pytest_plugins = ["http_fixtures"]

NAMES = ["enqueue_generation", "get_job_status", "ping"]
PICTURE = {"model": PREVIEW, "prompt": "a lighthouse at dusk"}

each_function = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module")
def started(tmp_path_factory, stack):
    folder = tmp_path_factory.mktemp("deno")
    with Edge(f"{stack.api_url}/rest/v1") as edge, contextlib.ExitStack() as running:
        for name in NAMES:
            function = served(folder, name, edge.url, SUPABASE_ANON_KEY=stack.anon_key)
            edge.addresses[name] = running.enter_context(function)
        yield edge
        edge.shutdown()


@pytest.fixture
def edge(started):
    started.says(None)
    return started


def opened_to(response: httpx.Response) -> tuple[str | None, str | None]:
    """Return which pages a browser lets read an answer, and which header more than usual."""
    names = ["access-control-allow-origin", "access-control-expose-headers"]
    return response.headers.get(names[0]), response.headers.get(names[1])


# What is handed back is what the RPC answers.


def test_a_job_is_queued_once_and_read_by_its_owner(edge, user, stranger):
    wish = PICTURE | {"idempotency_key": "same"}
    job_id = answer(edge.invoke("enqueue_generation", user, json=wish))["job_id"]
    again = edge.invoke("enqueue_generation", user, json=wish)

    assert seen(again) == edge.replied
    assert answer(again)["job_id"] == job_id
    assert user.ledger() == [("grant", 10), ("charge", -1)]
    posted = edge.invoke("get_job_status", user, json={"job_id": job_id})
    got = edge.invoke("get_job_status", user, "GET", params={"job_id": job_id})
    assert answer(posted)["job_id"] == job_id
    assert seen(posted) == seen(got) == edge.replied
    theirs = edge.invoke("get_job_status", stranger, json={"job_id": job_id})
    assert (refusal(theirs).status, refusal(theirs).message) == (404, "not_found")


def test_a_refusal_keeps_its_token_and_retry_after(edge, user, nobody, stack_db):
    told = []
    with unchanged(stack_db):
        for caller, wrong in [
            (user, {"prompt": " "}),
            (user, {"model": "no/such"}),
            (user, {"params": {"nope": 1}}),
            (nobody, {}),
        ]:
            refused = edge.invoke("enqueue_generation", caller, json=PICTURE | wrong)
            assert seen(refused) == edge.replied
            assert opened_to(refused) == ("*", "retry-after")
            told.append(refusal(refused).message)
    assert told[:3] == ["invalid_input", "not_found", "invalid_input"]
    for _ in range(3):
        user.enqueued()

    refused = edge.invoke("enqueue_generation", user, json=PICTURE)

    assert refusal(refused).message == "too_many_active"
    assert refused.headers["Retry-After"] == "5"


def test_a_browser_may_send_what_supabase_js_sends_and_no_other_method(edge):
    for name, methods, another in [
        ("enqueue_generation", "POST", "GET"),
        ("get_job_status", "GET, POST", "PUT"),
        ("ping", "GET, HEAD, POST", "PATCH"),
    ]:
        preflight = edge.invoke(name, method="OPTIONS", headers={"Origin": "https://app.example"})
        assert (preflight.status_code, preflight.content) == (204, b"")
        headers = preflight.headers["access-control-allow-headers"].split(", ")
        assert {"authorization", "apikey", "content-type", "x-client-info", "*"} <= set(headers)
        assert preflight.headers["access-control-allow-methods"] == methods
        refused = edge.invoke(name, method=another)
        assert (refusal(refused).status, refusal(refused).message) == (405, "method_not_allowed")
        assert refused.headers["Allow"] == f"{methods}, OPTIONS"
        assert opened_to(preflight) == opened_to(refused) == ("*", "retry-after")
    for method in ("GET", "POST", "HEAD"):
        pong = edge.invoke("ping", method=method, headers={"Authorization": "Bearer expired"})
        assert (pong.status_code, pong.content == b"") == (200, method == "HEAD")
        assert pong.headers["Cache-Control"] == "no-store"


# What cannot be passed on.


def test_what_is_no_json_too_long_or_without_a_job_id_is_refused(edge, user, stack_db):
    def refused(name: str, body: Any) -> Refusal:
        return refusal(edge.invoke(name, user, content=body))

    with unchanged(stack_db):
        for body in (b"no json", b'{"model":', b""):
            assert 400 <= refused("enqueue_generation", body).status < 500
        for body in (b"x" * 65_537, [b"x" * 50_000] * 40):
            assert refused("enqueue_generation", body).details == "body: over 64 KiB"
    for body in (b"no json", b"null", b"[]", b'{"job_id":7}', b"\xff", b"", b" " * 70_000):
        told = (400, "PT400", "invalid_input", "job_id: missing", "Send one.")
        assert refused("get_job_status", body) == Refusal(*told), body[:20]
    for job_id in ("x", "", "\ud800", "x&select=1", "é" * 400):
        assert refused("get_job_status", json.dumps({"job_id": job_id})).code == "22P02"
    longest = json.dumps(PICTURE | {"prompt": "\U0001f3a8" * 4000, "params": " " * 8000 + "{}"})
    assert answer(edge.invoke("enqueue_generation", user, content=longest))["status"] == "queued"


# Only the caller's own credentials go in, and only the answer comes out.


@each_function
def test_nothing_but_credentials_and_arguments_reaches_the_gateway(edge, stack, name):
    headers = {"authorization": "Bearer mine", "apikey": "theirs", "cookie": "a=1", "prefer": "x=1"}
    body = b'{"job_id":"7&a=b"}'
    edge.says(200)

    response = edge.invoke(name, headers=headers, content=body, params={"select": "x"})

    [(method, path, sent, content)] = edge.requests
    assert (method, path) == {
        "enqueue_generation": ("POST", "/rest/v1/rpc/enqueue_generation"),
        "get_job_status": ("GET", "/rest/v1/rpc/get_job_status?job_id=7%26a%3Db"),
        "ping": ("GET", "/rest/v1/rpc/ping"),
    }[name]
    assert content == (body if method == "POST" else b"")
    own = {"accept", "accept-encoding", "accept-language", "host", "user-agent"}
    arguments = {"content-length": str(len(body)), "content-type": "application/json"}
    token = {} if name == "ping" else {"authorization": "Bearer mine"}
    assert {key: value for key, value in sent.items() if key not in own} == (
        {"apikey": "theirs"} | token | (arguments if method == "POST" else {})
    )
    assert answer(response) is True
    assert response.headers.keys().isdisjoint({"set-cookie", "server", "location"})
    edge.invoke(name, json={"job_id": "7"})
    sent = edge.requests[-1][2]
    assert (sent["apikey"], sent.get("authorization")) == (stack.anon_key, None)


@each_function
def test_a_gateway_that_is_away_moved_or_cannot_write_is_unavailable(edge, name):
    for status, content in [
        (0, b""),
        (307, b""),
        (400, b'{"code":"0A000","message":"cannot set transaction read-write mode"}'),
        (400, b'{"code":"","details":null,"hint":null,"message":""}'),
        (405, b'{"code":"25006","message":"cannot execute UPDATE in a read-only transaction"}'),
        (503, b'{"code":"PGRST001","message":"Database client error. Retrying the connection."}'),
        (500, b'{"code":"57P03","message":"the database system is starting up"}'),
        (502, b"<html>Bad Gateway</html>"),
    ]:
        edge.says(status, content)
        told = edge.invoke(name, json={"job_id": "7"})
        details = "no answer in time"
        if name == "enqueue_generation":
            details += ": it may have been queued, so repeat it with its idempotency_key"
        again = "Try again in 5 seconds."
        assert refusal(told) == Refusal(503, "PT503", "unavailable", details, again)
        assert (told.headers["Retry-After"], *opened_to(told)) == ("5", "*", "retry-after")
        assert len(edge.requests) == 1, "credentials do not follow a redirect"


# The code.


def test_every_function_imports_nothing_and_has_no_token_checked_by_the_gateway_before_it():
    configured = tomllib.loads((SUPABASE / "config.toml").read_text())["functions"]

    assert configured == {name: {"verify_jwt": False} for name in SOURCES}
    for source in SOURCES.values():
        assert not re.search(r"\b(import\b|require\b|from\s+[\"'])", source.read_text())
