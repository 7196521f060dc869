"""The edge functions under the real Deno: what an app sees that calls `functions.invoke`.

Each runs with no right but to read its two variables and to reach its gateway, and writes nothing
to its log: neither what callers send nor what goes wrong.
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
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
from typing import Any, ClassVar
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
ARGUMENTS = {"enqueue_generation": PICTURE, "get_job_status": {"job_id": str(uuid.uuid4())}}
OFFLINE = ["--no-config", "--no-lock", "--no-remote", "--no-npm"]
ANON_KEY = "the-anon-key"
START_SECONDS = 30

each_function = pytest.mark.parametrize("name", NAMES)
each_for_users = pytest.mark.parametrize("name", NAMES[:2])


def environment(folder: Path, **variables: str) -> dict[str, str]:
    """Return all that Deno gets to see: nothing of ours, and no package.json."""
    return {
        "DENO_DIR": str(folder),
        "DENO_NO_PACKAGE_JSON": "1",
        "DENO_NO_UPDATE_CHECK": "1",
        "NO_COLOR": "1",
    } | variables


def run_deno(folder: Path, *arguments: Any, **variables: str) -> tuple[int, str]:
    """Run a command of Deno's; return its exit code and what it said."""
    done = subprocess.run(
        [deno(), *arguments],
        cwd="/",
        env=environment(folder, **variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout


@contextlib.contextmanager
def served(
    folder: Path, name: str, gateway: str, anon_key: str = ANON_KEY, also: str = ""
) -> Iterator[str]:
    """Serve a function in front of a gateway; give its address. It may reach `also` as well."""
    port, log = free_port(), folder / "logs" / f"{name}-{uuid.uuid4()}.log"
    listens = f"127.0.0.1:{port}"
    hosts = [listens, *(urlsplit(url).netloc for url in (gateway, also) if url)]
    rights = [
        f"--allow-net={','.join(hosts)}",
        "--allow-env=SUPABASE_URL,SUPABASE_ANON_KEY",
        "--no-prompt",
    ]
    variables = {"SUPABASE_URL": gateway, "SUPABASE_ANON_KEY": anon_key}
    process = spawn(
        [deno(), "run", *OFFLINE, "--cached-only", *rights, SOURCES[name]],
        log=log,
        cwd=Path("/"),
        env=environment(folder, DENO_SERVE_ADDRESS=f"tcp:{listens}", **variables),
    )

    def is_ready() -> bool:
        try:
            return httpx.options(f"http://{listens}").is_success
        except httpx.TransportError:
            return False

    try:
        process.wait_until(is_ready, START_SECONDS, log)
        yield f"http://{listens}"
    finally:
        process.stop(signal.SIGTERM, 10)
    assert log.read_text() == f"Listening on http://{listens}/\n"


class Edge:
    """The functions by name, each at its own address, and the gateway they call."""

    def __init__(self, addresses: dict[str, str], gateway: str) -> None:
        self.addresses = addresses
        self.gateway = gateway

    def invoke(
        self, name: str, caller: Client | None = None, method: str = "POST", **request: Any
    ) -> httpx.Response:
        """Call a function, with the caller's token if there is one."""
        headers = {"Authorization": f"Bearer {caller.token}"} if caller and caller.token else {}
        headers |= request.pop("headers", {})
        url = f"{self.addresses[name]}/{name}"
        return httpx.request(method, url, headers=headers, timeout=30, **request)

    def enqueue(self, caller: Client, **arguments: Any) -> httpx.Response:
        """Call enqueue_generation."""
        return self.invoke("enqueue_generation", caller, json=PICTURE | arguments)

    def rpc(
        self, name: str, caller: Client, method: str = "POST", **arguments: Any
    ) -> httpx.Response:
        """Call the same behind the function, without it."""
        endpoints = replace(caller.endpoints, rest=f"{self.gateway}/rest/v1")
        return Client(endpoints, caller.token).rpc(name, method, **arguments)


@contextlib.contextmanager
def all_served(folder: Path, gateway: str, *key: str) -> Iterator[Edge]:
    """Serve every function in front of a gateway."""
    with contextlib.ExitStack() as running:
        yield Edge(
            {name: running.enter_context(served(folder, name, gateway, *key)) for name in NAMES},
            gateway,
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where Deno keeps what it compiles."""
    return tmp_path_factory.mktemp("deno")


@pytest.fixture(scope="module")
def edge(folder, stack):
    """The functions in front of the stack's gateway."""
    with all_served(folder, stack.api_url, stack.anon_key) as edge:
        yield edge


@pytest.fixture
def paused_model(stack_db, operator):
    """Name of a model that takes nothing at the moment."""
    stack_db.execute(
        "insert into public.models select (jsonb_populate_record(m, jsonb_build_object("
        "'id', 'test/paused'))).* from public.models as m where id = %s",
        PREVIEW,
    )
    answer(operator.rpc("pause_model", model="test/paused"))
    yield "test/paused"
    answer(operator.rpc("resume_model", model="test/paused"))
    stack_db.execute("delete from public.models where id = 'test/paused'")


class Gateway(BaseHTTPRequestHandler):
    """A gateway that keeps each request, and answers with more than a caller should see."""

    requests: ClassVar[list[tuple[str, str, dict[str, str], bytes]]]
    moved_to: ClassVar[str] = ""
    says: ClassVar[tuple[int, bytes]] = (200, b"true")

    def do_POST(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        body = self.rfile.read(int(headers.get("content-length", 0)))
        self.requests.append((self.command, self.path, headers, body))
        status, content = self.says
        self.send_response(307 if self.moved_to else status)
        self.send_header("Location", self.moved_to)
        self.send_header("Set-Cookie", "session=1")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextlib.contextmanager
def listening() -> Iterator[tuple[type[Gateway], str]]:
    """Run such a gateway; give what it keeps and its address."""
    kept = type("Kept", (Gateway,), {"requests": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), kept) as server:
        Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        yield kept, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def seen(response: httpx.Response) -> tuple[Any, ...]:
    """Return all of an answer that a caller may rely on."""
    headers = ["Content-Type", "Cache-Control", "Retry-After"]
    return response.status_code, response.json(), *map(response.headers.get, headers)


def opened_to(response: httpx.Response) -> tuple[str | None, str | None]:
    """Return which pages a browser lets read an answer, and which header more than usual."""
    names = ["access-control-allow-origin", "access-control-expose-headers"]
    return response.headers.get(names[0]), response.headers.get(names[1])


# What is handed back is what the RPC answers.


def test_the_function_and_the_rpc_queue_the_same_job_and_charge_once(edge, user):
    queued = edge.enqueue(user, idempotency_key="same")
    again = edge.rpc("enqueue_generation", user, **PICTURE, idempotency_key="same")

    assert answer(queued)["status"] == "queued"
    assert seen(queued) == seen(again)
    assert user.ledger() == [("grant", 10), ("charge", -1)]


def test_a_job_is_read_by_post_by_get_and_by_the_rpc_alike(edge, user):
    job_id = user.enqueued()

    posted = edge.invoke("get_job_status", user, json={"job_id": job_id})
    got = edge.invoke("get_job_status", user, "GET", params={"job_id": job_id})

    assert answer(posted)["job_id"] == job_id
    assert seen(posted) == seen(got) == seen(edge.rpc("get_job_status", user, job_id=job_id))


def test_a_refusal_for_now_keeps_its_token_and_retry_after(edge, user):
    for _ in range(3):
        user.enqueued()

    refused = edge.enqueue(user)

    assert refusal(refused).message == "too_many_active"
    assert refused.headers["Retry-After"] == "5"
    assert seen(refused) == seen(edge.rpc("enqueue_generation", user, **PICTURE))
    assert opened_to(refused) == ("*", "retry-after")


def test_a_paused_model_is_503_with_its_own_retry_after(edge, user, paused_model):
    refused = edge.enqueue(user, model=paused_model)

    assert refusal(refused).message == "model_paused"
    assert int(refused.headers["Retry-After"]) > 5
    assert seen(refused)[0] == 503


@pytest.mark.parametrize("wrong", [{"prompt": " "}, {"model": "no/such"}, {"params": {"nope": 1}}])
def test_other_refusals_are_passed_on_too(edge, user, stack_db, wrong):
    with unchanged(stack_db):
        refused = edge.enqueue(user, **wrong)

    assert refusal(refused).status in {400, 404}
    assert seen(refused) == seen(edge.rpc("enqueue_generation", user, **PICTURE | wrong))
    assert opened_to(refused) == ("*", "retry-after")


@each_for_users
def test_without_a_token_it_is_the_rpcs_401(edge, nobody, name):
    refused = edge.invoke(name, nobody, json=ARGUMENTS[name])

    assert refused.status_code == 401
    assert seen(refused) == seen(edge.rpc(name, nobody, **ARGUMENTS[name]))


def test_somebody_elses_job_is_not_found(edge, user, stranger):
    job_id = user.enqueued()

    theirs = edge.invoke("get_job_status", stranger, json={"job_id": job_id})

    assert (refusal(theirs).status, refusal(theirs).message) == (404, "not_found")


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


# Ping.


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer expired"}], ids=repr)
def test_anybody_can_ping_whatever_their_token(edge, method, headers):
    pong = edge.invoke("ping", method=method, headers=headers)

    assert answer(pong)["ok"] is True
    assert pong.headers["Cache-Control"] == "no-store"


def test_ping_by_head_has_no_body(edge):
    pong = edge.invoke("ping", method="HEAD")

    assert (pong.status_code, pong.content) == (200, b"")
    assert pong.headers["Cache-Control"] == "no-store"


# Browsers.


@each_function
def test_a_browser_may_send_what_supabase_js_sends_from_any_page(edge, name):
    preflight = edge.invoke(name, method="OPTIONS", headers={"Origin": "https://app.example"})

    assert (preflight.status_code, preflight.content) == (204, b"")
    assert opened_to(preflight) == ("*", "retry-after")
    allowed = preflight.headers["access-control-allow-headers"].split(", ")
    assert {"authorization", "apikey", "content-type", "x-client-info", "*"} <= set(allowed)
    assert "POST" in preflight.headers["access-control-allow-methods"].split(", ")
    assert int(preflight.headers["access-control-max-age"]) > 0


@pytest.mark.parametrize(
    ("name", "method", "allowed"),
    [
        ("enqueue_generation", "GET", "POST, OPTIONS"),
        ("enqueue_generation", "DELETE", "POST, OPTIONS"),
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


@pytest.mark.parametrize("body", [b"no json", b'{"model":', b"[", b""])
def test_a_job_asked_for_in_no_json_is_refused_as_the_gateway_does(edge, user, stack_db, body):
    with unchanged(stack_db):
        refused = edge.invoke("enqueue_generation", user, content=body)

    assert 400 <= refusal(refused).status < 500


@pytest.mark.parametrize(
    "body",
    [
        *(b"no json", b"null", b"7", b"[]", b"{}", b'{"job_id":null}', b'{"job_id":7}'),
        *(b"\xff", b""),
        pytest.param(b" " * 70_000 + b'{"job_id":"x"}', id="too long a body"),
    ],
)
def test_a_job_id_that_is_missing_is_invalid_input(edge, user, body):
    refused = edge.invoke("get_job_status", user, content=body)

    assert refusal(refused) == Refusal(
        400, "PT400", "invalid_input", "job_id: missing", "Send one."
    )
    assert opened_to(refused) == ("*", "retry-after")


@pytest.mark.parametrize("job_id", ["x", "", "\ud800", "x&select=1", "é" * 400], ids=ascii)
def test_a_job_id_that_is_none_is_refused_by_the_database(edge, user, job_id):
    body = json.dumps({"job_id": job_id})

    assert refusal(edge.invoke("get_job_status", user, content=body)).code == "22P02"


@pytest.mark.parametrize("body", [b"x" * 65_537, [b"x" * 50_000] * 40], ids=["in one", "chunked"])
def test_a_body_over_64_kib_is_invalid_input(edge, user, stack_db, body):
    with unchanged(stack_db):
        refused = edge.invoke("enqueue_generation", user, content=body)

    told = refusal(refused)
    assert (told.status, told.message, told.details) == (400, "invalid_input", "body: over 64 KiB")


def test_the_longest_prompt_fits(edge, user):
    longest = json.dumps(PICTURE | {"prompt": "\U0001f3a8" * 4000, "params": " " * 8000 + "{}"})

    assert answer(edge.invoke("enqueue_generation", user, content=longest))["status"] == "queued"


# Only the caller's own credentials go in, and only the answer comes out.


@each_function
def test_nothing_but_credentials_and_arguments_reaches_the_gateway(folder, name):
    headers = {"authorization": "Bearer mine", "apikey": "theirs", "cookie": "a=1", "prefer": "x=1"}
    with listening() as (gateway, url), served(folder, name, url) as address:
        body = b'{"job_id":"7&a=b"}'
        httpx.post(f"{address}/{name}?select=x&job_id=8", headers=headers, content=body)

    [(method, path, sent, content)] = gateway.requests
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


@each_function
def test_without_a_key_of_the_callers_it_is_the_anon_key_and_never_more(folder, name):
    with listening() as (gateway, url), served(folder, name, url) as address:
        httpx.post(address, json={"job_id": "7"})

    [(_, _, sent, _)] = gateway.requests
    assert (sent["apikey"], sent.get("authorization")) == (ANON_KEY, None)


@each_function
def test_of_the_gateways_headers_only_the_answers_own_come_back(folder, name):
    with listening() as (_, url), served(folder, name, url) as address:
        response = httpx.post(address, json={"job_id": "7"})

    assert answer(response) is True
    assert response.headers.keys().isdisjoint({"set-cookie", "server", "location"})


@each_function
def test_credentials_do_not_follow_a_redirect(folder, name):
    with (
        listening() as (elsewhere, other),
        listening() as (gateway, url),
        served(folder, name, url, also=other) as address,
    ):
        gateway.moved_to = other
        response = httpx.post(address, json={"job_id": "7"})

    assert refusal(response).message == "unavailable"
    assert elsewhere.requests == []


# The gateway is away.


def assert_unavailable(name: str, response: httpx.Response) -> None:
    """Check that the caller is told to come back, in the words of all other refusals."""
    details = "no answer in time"
    if name == "enqueue_generation":
        details += ": it may have been queued, so repeat it with its idempotency_key"
    again = "Try again in 5 seconds."
    assert refusal(response) == Refusal(503, "PT503", "unavailable", details, again)
    assert response.headers["Retry-After"] == "5"
    assert opened_to(response) == ("*", "retry-after")


def test_a_gateway_that_is_down_is_503_and_to_be_tried_again(folder):
    with all_served(folder, f"http://127.0.0.1:{free_port()}") as edge:
        for name in NAMES:
            assert_unavailable(name, edge.invoke(name, json=ARGUMENTS.get(name)))


@each_function
@pytest.mark.parametrize(
    "says",
    [
        (400, b'{"code":"0A000","message":"cannot set transaction read-write mode"}'),
        (405, b'{"code":"25006","message":"cannot execute UPDATE in a read-only transaction"}'),
        (503, b'{"code":"PGRST001","message":"Database client error. Retrying the connection."}'),
        (500, b'{"code":"57P03","message":"the database system is starting up"}'),
        (502, b"<html>Bad Gateway</html>"),
    ],
    ids=lambda says: says[1][:18].decode(),
)
def test_a_database_that_is_away_or_cannot_be_written_is_unavailable(folder, name, says):
    with listening() as (gateway, url), served(folder, name, url) as address:
        gateway.says = says
        assert_unavailable(name, httpx.post(address, json={"job_id": "7"}))


def test_a_gateway_that_never_answers_is_given_up_after_ten_seconds(folder):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        with all_served(folder, f"http://127.0.0.1:{silent.getsockname()[1]}") as edge:
            started = time.monotonic()
            calls = [partial(edge.invoke, name, json=ARGUMENTS.get(name)) for name in NAMES]
            responses = together(calls)

        assert 9.5 < time.monotonic() - started < 15
    for name, response in zip(NAMES, responses, strict=True):
        assert_unavailable(name, response)


@each_function
@pytest.mark.parametrize("missing", ["SUPABASE_URL", "SUPABASE_ANON_KEY"])
def test_without_its_variables_a_function_does_not_start(folder, name, missing):
    variables = {"SUPABASE_URL": "http://127.0.0.1:1", "SUPABASE_ANON_KEY": ANON_KEY}
    del variables[missing]

    exit_code, said = run_deno(
        folder, "run", *OFFLINE, "--allow-env", "--no-prompt", SOURCES[name], **variables
    )

    assert exit_code != 0
    assert f"{missing} is not set" in said


# The code.


@each_function
def test_a_function_imports_nothing_and_is_read_in_one_look(name):
    lines = SOURCES[name].read_text().splitlines()

    assert len(lines) < 45
    assert max(map(len, lines)) <= 100
    assert not re.search(r"\b(import|require|from\s+[\"'])", "\n".join(lines))
    assert "service" not in "\n".join(lines).lower()


@pytest.mark.parametrize(
    "check",
    [["check", *OFFLINE], ["lint", "--no-config"], ["fmt", "--no-config", "--line-width=100"]],
    ids=lambda check: check[0],
)
def test_deno_finds_nothing_to_correct(folder, check):
    command, *options = check
    options += ["--check"] if command == "fmt" else []

    exit_code, said = run_deno(folder, command, *options, *SOURCES.values())

    assert exit_code == 0, said


def test_every_function_is_configured_not_to_have_its_token_checked_twice():
    configured = tomllib.loads((SUPABASE / "config.toml").read_text())["functions"]

    folders = {source.parent.name for source in SUPABASE.glob("functions/*/index.ts")}
    assert folders == set(NAMES)
    assert configured == {name: {"verify_jwt": False} for name in folders}
