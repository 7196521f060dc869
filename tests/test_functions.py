"""The edge functions under the real Deno: what an app sees that calls `functions.invoke`.

Each runs with no right but to read its two variables and to reach its gateway, and writes nothing
to its log: neither what callers send nor what goes wrong.
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import time
import tomllib
import uuid
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from actors import together
from database import unchanged
from http_client import PREVIEW, Client, Refusal, answer, refusal
from supabase_functions import SyncFunctionsClient
from supabase_functions.errors import FunctionsHttpError

from processes import free_port, spawn
from stack import SUPABASE, deno

pytest_plugins = ["http_fixtures"]

NAMES = ["enqueue_generation", "get_job_status", "ping"]
SOURCES = {name: SUPABASE / "functions" / name / "index.ts" for name in NAMES}
PICTURE = {"model": PREVIEW, "prompt": "a lighthouse at dusk"}
OFFLINE = ["--no-config", "--no-lock", "--no-remote", "--no-npm"]
QUIET = {"DENO_NO_PACKAGE_JSON": "1", "DENO_NO_UPDATE_CHECK": "1", "NO_COLOR": "1"}
ANON_KEY = "the-anon-key"

each_function = pytest.mark.parametrize("name", NAMES)


@contextlib.contextmanager
def served(folder: Path, name: str, gateway: str, anon_key: str, also: str = "") -> Iterator[str]:
    """Serve a function in front of a gateway; give its address. It may reach `also` as well."""
    port, log = free_port(), folder / "logs" / f"{name}-{uuid.uuid4()}.log"
    listens = f"127.0.0.1:{port}"
    hosts = [listens, *(urlsplit(url).netloc for url in (gateway, also) if url)]
    rights = [f"--allow-net={','.join(hosts)}", "--allow-env=SUPABASE_URL,SUPABASE_ANON_KEY"]
    variables = {"SUPABASE_URL": gateway, "SUPABASE_ANON_KEY": anon_key}
    variables |= {"DENO_DIR": str(folder), "DENO_SERVE_ADDRESS": f"tcp:{listens}"}
    command = [deno(), "run", *OFFLINE, "--cached-only", "--no-prompt", *rights, SOURCES[name]]
    process = spawn(command, log=log, cwd=Path("/"), env=QUIET | variables)

    def is_ready() -> bool:
        try:
            return httpx.options(f"http://{listens}").is_success
        except httpx.TransportError:
            return False

    try:
        process.wait_until(is_ready, 30, log)
        yield f"http://{listens}"
    finally:
        process.stop(signal.SIGTERM, 10)
    assert log.read_text() == f"Listening on http://{listens}/\n"


class Edge:
    """The functions by name, each at its own address, and the gateway they call."""

    def __init__(self, addresses: dict[str, str], gateway: Any) -> None:
        self.addresses, self.gateway = addresses, gateway

    def invoke(
        self, name: str, caller: Client | None = None, method: str = "POST", **request: Any
    ) -> httpx.Response:
        """Call a function, with the caller's token if there is one."""
        headers = {"Authorization": f"Bearer {caller.token}"} if caller and caller.token else {}
        headers |= request.pop("headers", {})
        url = f"{self.addresses[name]}/{name}"
        return httpx.request(method, url, headers=headers, timeout=30, **request)

    def rpc(self, name: str, caller: Client, **arguments: Any) -> httpx.Response:
        """Call the same behind the function, without it."""
        endpoints = replace(caller.endpoints, rest=f"{self.gateway}/rest/v1")
        return Client(endpoints, caller.token).rpc(name, **arguments)


@pytest.fixture(scope="module")
def edge(tmp_path_factory, stack):
    """The functions in front of the stack's gateway."""
    folder = tmp_path_factory.mktemp("deno")
    with contextlib.ExitStack() as running:
        addresses = {
            name: running.enter_context(served(folder, name, stack.api_url, stack.anon_key))
            for name in NAMES
        }
        yield Edge(addresses, stack.api_url)


class Gateway(ThreadingHTTPServer):
    """A gateway that keeps each request, and answers with more than a caller should see."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answering)
        self.url = f"http://127.0.0.1:{self.server_port}"
        Thread(target=self.serve_forever, args=[0.01], daemon=True).start()

    def says(self, status: int, content: bytes = b"true", moved_to: str = "") -> None:
        """Answer so from now on; with 0 never, with 1 by closing the connection."""
        self.answer, self.requests = (status, content, moved_to), []


class Answering(BaseHTTPRequestHandler):
    server: Any

    def do_POST(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        body = self.rfile.read(int(headers.get("content-length", 0)))
        self.server.requests.append((self.command, self.path, headers, body))
        status, content, moved_to = self.server.answer
        if status == 0:
            time.sleep(12)
        if status <= 1:
            return
        self.send_response(status)
        self.send_header("Location", moved_to)
        self.send_header("Set-Cookie", "session=1")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def feigned(tmp_path_factory):
    """The functions in front of such a gateway, with another one in reach."""
    folder = tmp_path_factory.mktemp("deno")
    with Gateway() as gateway, Gateway() as elsewhere, contextlib.ExitStack() as running:
        gateway.elsewhere = elsewhere
        addresses = {
            name: running.enter_context(
                served(folder, name, gateway.url, ANON_KEY, also=elsewhere.url)
            )
            for name in NAMES
        }
        yield Edge(addresses, gateway)
        gateway.shutdown()
        elsewhere.shutdown()


def seen(response: httpx.Response) -> tuple[Any, ...]:
    """Return all of an answer that a caller may rely on."""
    headers = ["Content-Type", "Cache-Control", "Retry-After"]
    return response.status_code, response.json(), *map(response.headers.get, headers)


def opened_to(response: httpx.Response) -> tuple[str | None, str | None]:
    """Return which pages a browser lets read an answer, and which header more than usual."""
    names = ["access-control-allow-origin", "access-control-expose-headers"]
    return response.headers.get(names[0]), response.headers.get(names[1])


# What is handed back is what the RPC answers.


def test_the_function_and_the_rpc_queue_the_same_job_and_read_it_alike(edge, user, stranger):
    wish = PICTURE | {"idempotency_key": "same"}
    queued = edge.invoke("enqueue_generation", user, json=wish)
    again = edge.rpc("enqueue_generation", user, **wish)

    job_id = answer(queued)["job_id"]
    assert seen(queued) == seen(again)
    assert user.ledger() == [("grant", 10), ("charge", -1)]
    posted = edge.invoke("get_job_status", user, json={"job_id": job_id})
    got = edge.invoke("get_job_status", user, "GET", params={"job_id": job_id})
    assert answer(posted)["job_id"] == job_id
    assert seen(posted) == seen(got) == seen(edge.rpc("get_job_status", user, job_id=job_id))
    theirs = edge.invoke("get_job_status", stranger, json={"job_id": job_id})
    assert (refusal(theirs).status, refusal(theirs).message) == (404, "not_found")


def test_a_refusal_keeps_its_token_and_retry_after(edge, user, nobody, stack_db):
    wrong = [{"prompt": " "}, {"model": "no/such"}, {"params": {"nope": 1}}]
    for wish in (PICTURE | each for each in wrong):
        with unchanged(stack_db):
            refused = edge.invoke("enqueue_generation", user, json=wish)
        assert refusal(refused).status in {400, 404}
        assert seen(refused) == seen(edge.rpc("enqueue_generation", user, **wish))
        assert opened_to(refused) == ("*", "retry-after")
    for name, wish in (("enqueue_generation", PICTURE), ("get_job_status", {"job_id": user.id})):
        refused = edge.invoke(name, nobody, json=wish)
        assert refused.status_code == 401
        assert seen(refused) == seen(edge.rpc(name, nobody, **wish))
    for _ in range(3):
        user.enqueued()

    refused = edge.invoke("enqueue_generation", user, json=PICTURE)

    assert refusal(refused).message == "too_many_active"
    assert refused.headers["Retry-After"] == "5"
    assert seen(refused) == seen(edge.rpc("enqueue_generation", user, **PICTURE))


def test_the_supabase_client_invokes_them_and_finds_the_token_of_a_refusal(edge, user, stack):
    headers = {"Authorization": f"Bearer {user.token}", "apikey": stack.anon_key}
    clients = {name: SyncFunctionsClient(url, headers) for name, url in edge.addresses.items()}

    def invoke(name, **body):
        return clients[name].invoke(name, {"body": body, "responseType": "json"})

    job_id = invoke("enqueue_generation", **PICTURE)["job_id"]
    assert invoke("get_job_status", job_id=job_id)["job_id"] == job_id
    with pytest.raises(FunctionsHttpError) as raised:
        invoke("get_job_status", job_id=str(uuid.uuid4()))
    assert refusal(raised.value.__cause__.response).message == "not_found"


def test_anybody_can_ping_whatever_their_token(edge):
    for headers in ({}, {"Authorization": "Bearer expired"}):
        for method in ("GET", "POST", "HEAD"):
            pong = edge.invoke("ping", method=method, headers=headers)
            assert pong.headers["Cache-Control"] == "no-store"
            assert pong.status_code == 200
            assert (pong.content == b"") == (method == "HEAD")


@each_function
def test_a_browser_may_send_what_supabase_js_sends_from_any_page(edge, name):
    preflight = edge.invoke(name, method="OPTIONS", headers={"Origin": "https://app.example"})

    assert (preflight.status_code, preflight.content) == (204, b"")
    assert opened_to(preflight) == ("*", "retry-after")
    allowed = preflight.headers["access-control-allow-headers"].split(", ")
    assert {"authorization", "apikey", "content-type", "x-client-info", "*"} <= set(allowed)
    assert "POST" in preflight.headers["access-control-allow-methods"].split(", ")


@pytest.mark.parametrize(
    ("name", "method", "allowed"),
    [
        ("enqueue_generation", "GET", "POST, OPTIONS"),
        ("get_job_status", "PUT", "GET, POST, OPTIONS"),
        ("ping", "PATCH", "GET, HEAD, POST, OPTIONS"),
    ],
)
def test_another_method_is_405_and_told_which_are_right(edge, user, name, method, allowed):
    refused = edge.invoke(name, user, method)

    told = refusal(refused)
    assert (told.status, told.code, told.message) == (405, "PT405", "method_not_allowed")
    assert refused.headers["Allow"] == allowed
    assert opened_to(refused) == ("*", "retry-after")


# What cannot be passed on.


def test_a_job_asked_for_in_no_json_or_over_64_kib_is_refused(edge, user, stack_db):
    with unchanged(stack_db):
        for body in (b"no json", b'{"model":', b"[", b""):
            refused = edge.invoke("enqueue_generation", user, content=body)
            assert 400 <= refusal(refused).status < 500
        for body in (b"x" * 65_537, [b"x" * 50_000] * 40):
            told = refusal(edge.invoke("enqueue_generation", user, content=body))
            assert (told.status, told.details) == (400, "body: over 64 KiB")

    longest = json.dumps(PICTURE | {"prompt": "\U0001f3a8" * 4000, "params": " " * 8000 + "{}"})
    assert answer(edge.invoke("enqueue_generation", user, content=longest))["status"] == "queued"


def test_a_job_id_that_is_missing_or_none_is_refused(edge, user):
    for body in (
        *(b"no json", b"null", b"7", b"[]", b"{}", b'{"job_id":null}', b'{"job_id":7}'),
        *(b"\xff", b"", b" " * 70_000 + b'{"job_id":"x"}'),
    ):
        refused = refusal(edge.invoke("get_job_status", user, content=body))
        told = (400, "PT400", "invalid_input", "job_id: missing", "Send one.")
        assert refused == Refusal(*told), body[:20]
    for job_id in ("x", "", "\ud800", "x&select=1", "é" * 400):
        body = json.dumps({"job_id": job_id})
        assert refusal(edge.invoke("get_job_status", user, content=body)).code == "22P02"


# Only the caller's own credentials go in, and only the answer comes out.


@each_function
def test_nothing_but_credentials_and_arguments_reaches_the_gateway(feigned, name):
    headers = {"authorization": "Bearer mine", "apikey": "theirs", "cookie": "a=1", "prefer": "x=1"}
    feigned.gateway.says(200)
    body = b'{"job_id":"7&a=b"}'
    url = f"{feigned.addresses[name]}/{name}?select=x&job_id=8"

    response = httpx.post(url, headers=headers, content=body)

    [(method, path, sent, content)] = feigned.gateway.requests
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
    feigned.invoke(name, json={"job_id": "7"})
    sent = feigned.gateway.requests[-1][2]
    assert (sent["apikey"], sent.get("authorization")) == (ANON_KEY, None)


def assert_unavailable(name: str, response: httpx.Response) -> None:
    """Check that the caller is told to come back, in the words of all other refusals."""
    details = "no answer in time"
    if name == "enqueue_generation":
        details += ": it may have been queued, so repeat it with its idempotency_key"
    again = "Try again in 5 seconds."
    assert refusal(response) == Refusal(503, "PT503", "unavailable", details, again)
    assert response.headers["Retry-After"] == "5"
    assert opened_to(response) == ("*", "retry-after")


@each_function
def test_credentials_do_not_follow_a_redirect(feigned, name):
    elsewhere = feigned.gateway.elsewhere
    elsewhere.says(200)
    feigned.gateway.says(307, moved_to=elsewhere.url)

    assert_unavailable(name, feigned.invoke(name, json={"job_id": "7"}))
    assert elsewhere.requests == []


@each_function
def test_a_gateway_or_database_that_is_away_or_cannot_be_written_is_unavailable(feigned, name):
    for status, content in [
        (1, b""),
        (400, b'{"code":"0A000","message":"cannot set transaction read-write mode"}'),
        (405, b'{"code":"25006","message":"cannot execute UPDATE in a read-only transaction"}'),
        (503, b'{"code":"PGRST001","message":"Database client error. Retrying the connection."}'),
        (500, b'{"code":"57P03","message":"the database system is starting up"}'),
        (502, b"<html>Bad Gateway</html>"),
    ]:
        feigned.gateway.says(status, content)
        assert_unavailable(name, feigned.invoke(name, json={"job_id": "7"}))


@pytest.mark.long
def test_a_gateway_that_never_answers_is_given_up_after_ten_seconds(feigned):
    feigned.gateway.says(0)
    started = time.monotonic()

    calls = [partial(feigned.invoke, name, json={"job_id": "7"}) for name in NAMES]
    responses = together(calls)

    assert 9.5 < time.monotonic() - started < 15
    for name, response in zip(NAMES, responses, strict=True):
        assert_unavailable(name, response)


# The code.


@each_function
def test_a_function_imports_nothing_and_does_not_start_without_its_variables(name, tmp_path):
    assert not re.search(r"\b(import|require|from\s+[\"'])", SOURCES[name].read_text())
    for missing in ("SUPABASE_URL", "SUPABASE_ANON_KEY"):
        variables = {"SUPABASE_URL": "http://127.0.0.1:1", "SUPABASE_ANON_KEY": ANON_KEY}
        variables |= {"DENO_DIR": str(tmp_path)}
        del variables[missing]
        command = [deno(), "run", *OFFLINE, "--allow-env", "--no-prompt", SOURCES[name]]
        done = subprocess.run(
            command, env=QUIET | variables, cwd="/", capture_output=True, text=True, check=False
        )
        assert done.returncode != 0
        assert f"{missing} is not set" in done.stderr


def test_every_function_is_configured_not_to_have_its_token_checked_twice():
    configured = tomllib.loads((SUPABASE / "config.toml").read_text())["functions"]

    assert {source.parent.name for source in SUPABASE.glob("functions/*/index.ts")} == set(NAMES)
    assert configured == {name: {"verify_jwt": False} for name in NAMES}
