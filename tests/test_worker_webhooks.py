"""The outbox: what a worker sends, to which addresses, and what it makes of the answers.

`workers` has one worker for all cases. The rest is done by outbox.py here, with a real server.
"""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import httpcore
import httpx
import pytest
from actors import Service
from database import Database
from receiver import Answer, Receiver, Request
from test_worker_units import ENVIRONMENT
from worker_process import Workers, eventually

import outbox
from outbox import Delivery, Outbox, PublicNetwork, Verdict
from worker import Settings

SMALL = {"width": 64, "height": 64}
TOKEN = "ExponentPushToken[xxxxxxxxxxxxxxxxxxxxxx]"


class Outboxes(Workers):
    """A worker that may call two endpoints and Expo's push service here."""

    one: Receiver
    other: Receiver
    expo: Receiver

    def registered(self, receiver: Receiver) -> str:
        """Have an endpoint told everything; return its secret, which no log may hold."""
        path = f"/hooks?key=query-{len(self.extra_secrets)}"
        secret = Service(self.db).register_webhook(receiver.url(path))["secret"]
        self.extra_secrets |= {secret, secret.removeprefix("whsec_"), path.split("?")[1]}
        return str(secret)

    def states(self, job: str) -> list[str]:
        query = "select state from private.deliveries where generation_id = %s order by 1"
        return [row["state"] for row in self.db.execute(query, job)]

    def until_delivered(self, job: str) -> None:
        eventually(lambda: set(self.states(job)) == {"delivered"})


@pytest.fixture(scope="module")
def world(server, template, stack, tmp_path_factory) -> Iterator[Outboxes]:
    db = server.create(template)
    db.lift_limits()
    db.execute(
        "update private.settings set webhook_allows_private = true, delivery_retries = '{0,0,0}'"
    )
    with (
        Receiver() as one,
        Receiver() as other,
        Receiver() as expo,
        Outboxes(db, stack, tmp_path_factory.mktemp("outbox")) as workers,
    ):
        workers.one, workers.other, workers.expo = one, other, expo
        workers.extra_secrets = {TOKEN, "xxxxxxxxxxxxxxxxxxxxxx", "expo-secret"}
        workers.environment |= {
            "PREVIEW_SECONDS": "0",
            "WORKER_POLL_SECONDS": "0.2",
            "WORKER_GRACE_SECONDS": "1",
            "WEBHOOK_ALLOWED_HOSTS": f"{one.host}, {other.host}",
            "EXPO_PUSH_URL": expo.url("/--/api/v2/push/send"),
            "EXPO_ACCESS_TOKEN": "expo-secret",
        }
        yield workers
    server.drop(db)


@pytest.fixture(scope="module")
def db(world: Outboxes) -> Database:
    return world.db


@pytest.fixture
def workers(world: Outboxes) -> Iterator[Outboxes]:
    """One worker runs, and nobody is to be told anything yet."""
    if not any(process.is_running() for process in world.processes):
        world.process = world.start()
    yield world
    world.db.execute("delete from private.deliveries")
    world.db.execute("delete from private.webhook_endpoints")
    for each in (world.one, world.other, world.expo):
        each.requests.clear()
        each.answer, each.on_request = Answer(), lambda _: None


# --- what is told ---


def test_a_finished_job_is_told_at_once_and_signed_as_the_standard_says(
    alice, db, service, workers
):
    endpoint, old = workers.one, workers.registered(workers.one)

    job = alice.enqueued(params=SMALL)
    (request,) = endpoint.until(1)
    message = request.verified(old)
    workers.until_delivered(job)

    assert (message["type"], message["data"]["user_id"]) == ("generation.completed", alice.id)
    assert message["data"]["images"][0]["path"] == f"{alice.id}/{job}/0.png"
    assert request.headers["content-type"] == "application/json"
    row = db.row("select * from private.deliveries where generation_id = %s", job)
    assert request.id == f"evt_{row['id'].hex}"
    assert request.at - row["created_at"].timestamp() < 2
    with pytest.raises(Exception, match="No matching signature"):
        request.verified("whsec_" + "A" * 43 + "=")

    webhook_id = service.list_webhooks()[0]["webhook_id"]
    new = service.rotate_webhook_secret(webhook_id)["secret"]
    workers.extra_secrets.add(new)
    alice.enqueue("[fail:moderated]", params=SMALL)
    _, request = endpoint.until(2)
    assert request.verified(old) == request.verified(new)
    assert request.message["type"] == "generation.failed"


def test_an_endpoint_that_hangs_holds_up_no_other(alice, workers):
    workers.registered(workers.one)
    workers.registered(workers.other)
    workers.one.answer = Answer(hangs=True)

    for _ in range(10):
        alice.enqueue(params=SMALL)
    began = time.monotonic()
    workers.other.until(10)

    assert time.monotonic() - began < 5
    assert 0 < len(workers.one.requests) <= 4


def test_a_device_is_told_through_expo_and_shown_once_though_an_answer_is_lost(alice, workers):
    alice.register_push_token(TOKEN)
    workers.expo.answers.append(Answer(504))
    workers.expo.answer = Expo()

    job = alice.enqueued("a secret wish", params=SMALL)
    first, second = workers.expo.until(2)

    workers.until_delivered(job)
    assert {first.path, second.path} == {"/--/api/v2/push/send"}
    assert first.headers["authorization"] == "Bearer expo-secret"
    (message,) = first.message
    assert second.message == [message]
    assert (message["to"], message["title"]) == (TOKEN, "Your picture is ready")
    assert message["collapseId"] == message["tag"] == message["data"]["job_id"] == job


# --- killed at any moment: at least once, under the same id ---


LOCK = "select from private.deliveries for update"


@pytest.mark.parametrize("when", ["while it sends", "between the answer and saying so"])
def test_a_worker_that_is_killed_is_followed_by_another_with_the_same_id(alice, db, workers, when):
    secret, endpoint = workers.registered(workers.one), workers.one
    killed, holder = workers.process, db.connect()
    if when == "while it sends":
        endpoint.answers.append(Answer(hangs=True))
        endpoint.on_request = lambda _: killed.is_running() and killed.kill()
        job = alice.enqueued(params=SMALL)
        eventually(lambda: not killed.is_running())
    else:
        endpoint.on_request = lambda _: holder.execute(LOCK)
        with holder.transaction():
            job = alice.enqueued(params=SMALL)
            waits = "select 1 from pg_stat_activity where wait_event_type = 'Lock'"
            waits += " and query like '%finish_delivery%' and datname = current_database()"
            eventually(lambda: db.execute(waits))
            killed.kill()
            endpoint.on_request = lambda _: None
            workers.terminate_backends("true")
    db.execute("update private.deliveries set run_at = least(run_at, now())")  # its lease is over
    workers.process = workers.start()

    workers.until_delivered(job)
    first, second = endpoint.requests
    assert first.verified(secret) == second.verified(secret)
    assert first.id == second.id


def test_lost_connections_make_nothing_be_sent_twice(alice, db, workers):
    workers.registered(workers.one)
    holder = db.connect()
    workers.one.on_request = lambda _: holder.execute(LOCK)

    with holder.transaction():
        job = alice.enqueued(params=SMALL)
        workers.one.until(1)
        eventually(lambda: workers.terminate_backends("query like '%finish_delivery%'"))

    workers.until_delivered(job)
    assert len(workers.one.requests) == 1


def test_a_worker_that_stops_says_what_became_of_what_it_sends_and_waits_for_no_endpoint(
    alice, workers
):
    process = workers.process
    workers.registered(workers.one)
    workers.registered(workers.other)
    workers.other.answer = Answer(hangs=True)
    workers.one.on_request = lambda _: workers.other.until(1) and process.signal(signal.SIGTERM)

    job = alice.enqueued(params=SMALL)

    assert process.wait(within=8) == 0
    assert workers.states(job) == ["delivered", "pending"]


# --- endpoints ---


def send(
    *deliveries: Delivery, network: PublicNetwork | None = None, **environment: str
) -> list[Verdict]:
    """Try deliveries that go in one request."""

    async def act() -> list[Verdict]:
        async with httpx.AsyncClient() as http:
            one = Outbox(Settings(ENVIRONMENT | environment), mock.Mock(), http)
            if network:
                one.webhooks._network_backend = network
            verdicts = await one._send([*deliveries])
            return [verdicts[each] for each in deliveries]

    return asyncio.run(act())


def called(url: str, network: PublicNetwork | None = None, allowed: str = "") -> Verdict:
    delivery = Delivery(outbox.UUID(int=1), 1, url, ["whsec_AAAA"], "{}")
    (verdict,) = send(delivery, network=network, WEBHOOK_ALLOWED_HOSTS=allowed)
    return verdict


@pytest.fixture(scope="module")
def endpoint() -> Iterator[Receiver]:
    with Receiver() as receiver:
        yield receiver


INSIDE_AWS = {"location": "http://169.254.169.254/latest/meta-data/"}


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        (Answer(), Verdict("delivered", 200)),
        (Answer(302, INSIDE_AWS), Verdict("failed", 302)),
        (Answer(307, {"location": "/elsewhere"}), Verdict("failed", 307)),
        (Answer(410), Verdict("gone", 410)),
        (Answer(503, {"Retry-After": "7 \xe9"}), Verdict("failed", 503, retry_after="7 \xe9")),
        (Answer(hangs=True), Verdict("failed", error="TimeoutError")),
        (Answer(floods=True), Verdict("delivered", 200)),
    ],
)
def test_an_endpoint_is_asked_once_and_its_status_says_what_became_of_it(
    monkeypatch, endpoint, answer, verdict
):
    monkeypatch.setattr(outbox, "DELIVERY_SECONDS", 1)
    endpoint.answer = answer
    endpoint.requests.clear()

    assert called(endpoint.url("/hooks"), allowed=endpoint.host) == verdict

    assert [request.path for request in endpoint.requests] == ["/hooks"]
    assert endpoint.flooded < 32 << 20  # what the kernels' buffers hold


@pytest.mark.parametrize(
    ("name", "error"), [("localhost", None), ("hooks.example.com", "ConnectError")]
)
def test_tls_verifies_the_name_of_the_address(monkeypatch, tmp_path, name, error):
    file = tmp_path / "certificate.pem"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=x -addext"
    subprocess.run(
        [*command.split(), f"subjectAltName=DNS:{name}", "-keyout", file, "-out", f"{file}.crt"],
        check=True,
        capture_output=True,
    )
    file.write_text(file.read_text() + Path(f"{file}.crt").read_text())
    monkeypatch.setenv("SSL_CERT_FILE", str(file))

    with Receiver(file) as receiver:
        verdict = called(receiver.url(host="localhost"), allowed=f"localhost:{receiver.port}")

        assert (verdict.error, len(receiver.requests)) == (error, 0 if error else 1)


# --- addresses inside ---


class Resolver(PublicNetwork):
    """Knows what names lead to, and where it was let to connect."""

    def __init__(self, *answers: list[str]) -> None:
        super().__init__(frozenset())
        self.answers = list(answers)
        self.connected: list[str] = []
        self.backend = mock.Mock(connect_tcp=self._connect)

    async def resolve(self, host: str, port: int) -> list[str]:
        return self.answers.pop(0)

    async def _connect(self, host: str, port: int, *_: Any, **__: Any) -> httpcore.AsyncMockStream:
        self.connected.append(host)
        if host.endswith(".0"):
            raise httpcore.ConnectError
        return httpcore.AsyncMockStream([b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"])


NAME = "https://hooks.example.com/"
NOT_PUBLIC = Verdict("failed", error="the address is not public")


def test_a_name_that_leads_elsewhere_the_second_time_is_looked_up_once_and_by_no_proxy(monkeypatch):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    network = Resolver(["8.8.8.8"], ["127.0.0.1"], ["8.8.8.0", "8.8.4.0", "8.8.4.4"])

    assert called(NAME, network).outcome == "delivered"
    assert called(NAME, network) == NOT_PUBLIC
    assert network.connected == ["8.8.8.8"]
    assert called(NAME, network).outcome == "delivered"
    assert network.connected[1:] == ["8.8.8.0", "8.8.4.0", "8.8.4.4"]  # until one answers


@pytest.mark.parametrize("addresses", [["8.8.8.8", "10.0.0.1"], ["::1", "8.8.8.8"]])
def test_a_name_with_one_private_address_is_not_called_at_all(addresses):
    network = Resolver(addresses)

    assert called(NAME, network) == NOT_PUBLIC

    assert network.connected == []


@pytest.mark.parametrize("host", ["127.1", "0x7f000001", "2130706433", "localhost", "[::1]"])
def test_no_spelling_of_this_machine_is_called(host):
    assert called(f"http://{host}:1/", allowed="127.0.0.1:2, localhost:2") == NOT_PUBLIC


PUBLIC = ["8.8.8.8", "1.1.1.1", "172.32.0.1", "2606:4700:4700::1111", "64:ff9b::808:808"]
INSIDE = """
0.0.0.0 10.1.2.3 100.64.0.1 100.100.100.200 127.0.0.1 127.255.255.255 168.63.129.16 169.254.169.254
172.16.0.1 172.31.255.255 192.0.0.192 192.0.2.1 192.88.99.1 192.168.1.1 198.18.0.1 198.51.100.1
203.0.113.1 224.0.0.1 239.255.255.255 240.0.0.1 255.255.255.255 :: ::1 ::127.0.0.1 ::ffff:127.0.0.1
::ffff:8.8.8.8 64:ff9b::7f00:1 64:ff9b::a9fe:a9fe 64:ff9b:1::808:808 100::1 2001::1 2001:db8::1
2002:7f00:1:: 2002:808:808:: 3fff::1 fc00::1 fd00:ec2::254 fe80::1 fe80::1%eth0 fec0::1 ff02::1
"""


def test_which_addresses_are_public():
    assert [each for each in PUBLIC if not outbox.is_public(each)] == []
    assert [each for each in INSIDE.split() if outbox.is_public(each)] == []


# --- push notifications ---


def refusal(error: str) -> dict[str, Any]:
    return {"status": "error", "message": f'"{TOKEN}" is bad', "details": {"error": error}}


def told(status: int = 200, **body: Any) -> Answer:
    return Answer(status, body=json.dumps(body).encode())


class Expo:
    """Expo's push service, as its documentation says, with something wrong with some tokens."""

    def __init__(self, tells_projects: bool = True) -> None:
        self.tells_projects = tells_projects
        self.unknown: set[str] = set()  # devices it does not know
        self.foreign: set[str] = set()  # of another project
        self.bad: set[str] = set()  # what it refuses a whole request for

    def __call__(self, request: Request) -> Answer:
        tokens = [message["to"] for message in request.message]
        theirs = [each for each in tokens if each in self.foreign]
        ours = [each for each in tokens if each not in self.foreign]
        if ours and theirs:
            error = {"code": "PUSH_TOO_MANY_EXPERIENCE_IDS"}
            details = {"details": {"@us/app": ours, "@them/app": theirs}}
            return told(400, errors=[error | (details if self.tells_projects else {})])
        if len(tokens) > 100 or self.bad.intersection(tokens):
            return told(400, errors=[{"code": "PUSH_TOO_MANY_NOTIFICATIONS"}])
        unknown, taken = refusal("DeviceNotRegistered"), {"status": "ok"}
        return told(
            data=[
                unknown if each in self.unknown else taken | {"id": f"ticket-{each}"}
                for each in tokens
            ]
        )


def pushed(endpoint: Receiver, answer: Any, count: int = 12) -> list[Verdict]:
    """Send pushes to devices 0, 1, 2 … by way of an Expo that answers so."""
    endpoint.answer = answer
    endpoint.requests.clear()
    deliveries = [
        Delivery(outbox.UUID(int=n), 1, None, None, json.dumps([{"to": str(n)}]))
        for n in range(count)
    ]
    return send(*deliveries, EXPO_PUSH_URL=endpoint.url("/send"))


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        (told(data=[refusal("DeviceNotRegistered")]), ("gone", "DeviceNotRegistered")),
        (told(data=[refusal("MessageRateExceeded")]), ("failed", "MessageRateExceeded")),
        (told(data=[]), ("failed", "NoTicket")),
        (Answer(body=b"<html>"), ("failed", "JSONDecodeError")),
        (Answer(410), ("failed", None)),
        (Answer(302, {"location": "/elsewhere"}), ("failed", None)),
    ],
)
def test_what_expo_does_not_take_is_sent_again_unless_the_device_is_gone(endpoint, answer, verdict):
    (said,) = pushed(endpoint, answer, 1)

    assert (said.outcome, said.error) == verdict
    assert [request.path for request in endpoint.requests] == ["/send"]


@pytest.mark.parametrize("tells_projects", [True, False])
def test_many_pushes_go_in_one_request_and_one_that_is_refused_blocks_no_other(
    endpoint, tells_projects
):
    expo = Expo(tells_projects=tells_projects)
    expo.unknown = {"3"}

    verdicts = pushed(endpoint, expo)
    assert len(endpoint.requests) == 1
    assert [each.outcome for each in verdicts] == [*["delivered"] * 3, "gone", *["delivered"] * 8]
    assert verdicts[0].ticket == "ticket-0"

    expo.foreign = {"7"}
    assert [each.outcome for each in pushed(endpoint, expo)].count("delivered") == 11
    assert len(endpoint.requests) <= (3 if tells_projects else 9)

    expo.bad = {"5"}
    assert [each.outcome for each in pushed(endpoint, expo)].count("delivered") == 10


def test_receipts_are_read_and_what_they_say_is_heeded(monkeypatch, endpoint, caplog):
    monkeypatch.setattr(outbox, "DELIVERY_SECONDS", 0.5)
    endpoint.answers.extend([Answer(503), Answer(floods=True)])
    endpoint.answer = told(data={"a": {"status": "ok"}, "b": refusal("InvalidCredentials")})
    claimed = [{"ticket": name, "delivery_id": name} for name in "ab"]
    call = mock.AsyncMock(side_effect=[claimed, claimed, claimed, None, []])

    async def read() -> None:
        async with httpx.AsyncClient() as http:
            settings = Settings(ENVIRONMENT | {"EXPO_PUSH_URL": endpoint.url("/send")})
            one = Outbox(settings, mock.Mock(call=call), http)
            for _ in range(3):
                await one.read_receipts()

    asyncio.run(read())

    asked = endpoint.requests[-1]
    assert (asked.path, asked.message) == ("/getReceipts", {"ids": ["a", "b"]})
    assert call.await_args_list[3].args[1:] == (["a", "b"], [None, "InvalidCredentials"])
    assert "receipts.failed error=HTTPStatusError" in caplog.text
    assert "receipts.failed error=TimeoutError" in caplog.text
    assert "receipt.error delivery=b error=InvalidCredentials" in caplog.text
