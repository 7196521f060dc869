"""The outbox of worker.py: real worker processes, killed and hindered, that tell a real server."""

from __future__ import annotations

import asyncio
import functools
import json
import random
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
from actors import Service, User
from database import Database
from receiver import Answer, Receiver, Request
from standardwebhooks import Webhook
from test_worker_units import ENVIRONMENT
from worker_process import Workers, eventually

import outbox
from outbox import Delivery, Outbox, PublicNetwork, Verdict
from stack import Stack
from worker import Settings

SMALL = {"width": 64, "height": 64}
TOKEN = "ExponentPushToken[xxxxxxxxxxxxxxxxxxxxxx]"


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    """An endpoint that answers 200 at once."""
    with Receiver() as receiver:
        yield receiver


@pytest.fixture
def another() -> Iterator[Receiver]:
    """Another one."""
    with Receiver() as receiver:
        yield receiver


class Outboxes(Workers):
    """Workers on a database where webhooks may be private; they may call these receivers."""

    def __init__(self, db: Database, stack: Stack, folder: Path, *receivers: Receiver) -> None:
        super().__init__(db, stack, folder)
        db.lift_limits()
        db.execute(
            "update private.settings set webhook_allows_private = true,"
            " delivery_retries = '{0,0,0,1 hour}', retry_base = '0'"
        )
        hosts = [each.host for each in receivers]
        hosts += [f"localhost:{each.port}" for each in receivers]
        self.environment |= {
            "PREVIEW_SECONDS": "0",
            "WORKER_POLL_SECONDS": "0.2",
            "WEBHOOK_ALLOWED_HOSTS": ", ".join(hosts),
        }
        self.service = Service(db)

    def registered(self, receiver: Receiver, host: str = "127.0.0.1") -> str:
        """Have an endpoint told everything; return its secret, which no log may hold."""
        path = f"/hooks?key=query-{len(self.extra_secrets)}"
        secret = self.service.register_webhook(receiver.url(path, host))["secret"]
        self.extra_secrets |= {secret, secret.removeprefix("whsec_"), path.split("?")[1]}
        return secret

    def deliveries(self) -> list[dict[str, Any]]:
        """Return all of the outbox, oldest first."""
        return self.db.execute("select * from private.deliveries order by id")

    def until_state(self, state: str, count: int = 1, within: float = 15) -> list[dict[str, Any]]:
        """Wait until this many deliveries have a state."""

        def found() -> list[dict[str, Any]] | None:
            rows = [row for row in self.deliveries() if row["state"] == state]
            return rows if len(rows) >= count else None

        return eventually(found, within) or []

    def tried(self) -> dict[str, Any]:
        """Wait until the one delivery was tried, and return it."""
        return eventually(lambda: next((row for row in self.deliveries() if row["attempts"]), None))

    def backdate_deliveries(self) -> None:
        """Let the leases of what a dead worker was sending have run out."""
        self.db.execute(
            "update private.deliveries set run_at = least(run_at, now()) where state = 'pending'"
        )


@pytest.fixture
def workers(
    db: Database, stack: Stack, tmp_path: Path, receiver: Receiver, another: Receiver
) -> Iterator[Outboxes]:
    """Starts workers on the test's database."""
    with Outboxes(db, stack, tmp_path, receiver, another) as workers:
        yield workers


# --- what is told ---


def test_a_finished_job_is_told_at_once_and_signed_as_the_standard_says(alice, workers, receiver):
    secret = workers.registered(receiver)
    workers.start(WORKER_POLL_SECONDS=60)

    job = alice.enqueued(params=SMALL)
    (request,) = receiver.until(1)

    message = request.verified(secret)
    (delivered,) = workers.until_state("delivered")
    assert message["type"] == "generation.completed"
    assert message["data"]["job_id"] == job
    assert message["data"]["user_id"] == alice.id
    assert message["data"]["images"][0]["path"] == f"{alice.id}/{job}/0.png"
    assert request.headers["content-type"] == "application/json"
    assert request.id == f"evt_{delivered['id'].hex}"
    assert request.at - delivered["created_at"].timestamp() < 2
    with pytest.raises(Exception, match="No matching signature"):
        request.verified("whsec_" + "A" * 43 + "=")


def test_failed_and_canceled_jobs_are_told_too(alice, workers, receiver):
    secret = workers.registered(receiver)
    waiting = alice.enqueued(params=SMALL)
    alice.call("public.cancel_generation", job_id=waiting)

    workers.start()
    failed = alice.enqueued("[fail:moderated]", params=SMALL)
    requests = receiver.until(2)

    told = {request.job_id: request.verified(secret)["type"] for request in requests}
    assert told == {waiting: "generation.canceled", failed: "generation.failed"}


def test_after_a_rotation_the_old_secret_verifies_too(alice, db, workers, receiver):
    old = workers.registered(receiver)
    webhook_id = workers.service.list_webhooks()[0]["webhook_id"]
    new = workers.service.rotate_webhook_secret(webhook_id)["secret"]
    workers.extra_secrets.add(new)
    workers.start()

    alice.enqueue(params=SMALL)
    (request,) = receiver.until(1)

    assert request.verified(old) == request.verified(new)


def test_signatures_are_those_of_the_reference_library():
    secret, timestamp, body = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "1614265330", b'{"test": 1}'
    other = "whsec_" + "A" * 44

    made = outbox.signatures([secret, other], "msg_p5jXN8AQM9LWM0D4loKWxJek", timestamp, body)

    at = outbox.datetime.fromtimestamp(int(timestamp), outbox.UTC)
    assert made.split(" ") == [
        Webhook(each).sign("msg_p5jXN8AQM9LWM0D4loKWxJek", at, body.decode())
        for each in (secret, other)
    ]


# --- killed at any moment: at least once, under the same id ---


def test_a_worker_killed_while_it_sends_is_followed_by_another_with_the_same_id(
    alice, workers, receiver
):
    secret = workers.registered(receiver)
    killed = workers.start()
    receiver.answers.append(Answer(hangs=True))
    receiver.on_request = lambda _: killed.is_running() and killed.kill()

    job = alice.enqueued(params=SMALL)
    receiver.until(1)
    eventually(lambda: not killed.is_running())
    workers.backdate_deliveries()
    workers.start()

    workers.until_state("delivered")
    assert len(receiver.requests) == 2
    assert len(receiver.ids(job)) == 1
    assert all(request.verified(secret) for request in receiver.requests)
    assert receiver.requests[0].body == receiver.requests[1].body


def test_a_worker_killed_between_the_answer_and_saying_so_sends_twice_with_the_same_id(
    alice, db, workers, receiver
):
    workers.registered(receiver)
    killed = workers.start()
    holder = db.connect()
    lock = "select from private.deliveries for update"
    receiver.on_request = lambda _: holder.execute(lock)

    with holder.transaction():
        job = alice.enqueued(params=SMALL)
        receiver.until(1)
        waits = "select 1 from pg_stat_activity where wait_event_type = 'Lock'"
        waits += " and query like '%finish_delivery%' and datname = current_database()"
        eventually(functools.partial(db.execute, waits))
        killed.kill()
        receiver.on_request = lambda _: None
        workers.terminate_backends("true")
    workers.backdate_deliveries()
    workers.start()

    workers.until_state("delivered")
    assert len(receiver.requests) == 2
    assert len(receiver.ids(job)) == 1


def test_a_database_that_drops_its_connections_makes_nothing_be_sent_twice(
    alice, db, workers, receiver
):
    workers.registered(receiver)
    workers.start()
    holder = db.connect()
    receiver.on_request = lambda _: holder.execute("select from private.deliveries for update")

    with holder.transaction():
        alice.enqueue(params=SMALL)
        receiver.until(1)
        eventually(lambda: workers.terminate_backends("query like '%finish_delivery%'"))

    workers.until_state("delivered")
    assert len(receiver.requests) == 1


def test_killed_at_random_moments_every_job_is_told_at_least_once_under_one_id(
    alice, db, workers, receiver, another
):
    chance = random.Random(4)
    db.execute("update private.settings set max_attempts = 100")
    alice.has(credits=1000)
    workers.registered(receiver)
    workers.registered(another)
    jobs = [alice.enqueued(params=SMALL) for _ in range(40)]

    for receiving in (receiver, another):
        receiving.on_request = lambda _: time.sleep(chance.uniform(0, 0.05))
    for round_ in range(12):
        process = workers.start(WORKER_SLOTS=2)
        if round_ % 3:  # from the receiver's side: on the way in, or just after the answer
            count = len(receiver.requests) + chance.randrange(1, 5)
            eventually(lambda n=count: len(receiver.requests) >= n or not left(workers))
        else:
            time.sleep(chance.uniform(0, 0.4))
        process.kill()
        workers.backdate_leases()
        workers.backdate_deliveries()
    workers.start()
    for job in jobs:
        workers.until(job, "completed", within=60)
    workers.until_state("delivered", 80, within=60)

    for each in (receiver, another):
        assert all(len(each.ids(job)) == 1 for job in jobs)
    twice = len(receiver.requests) + len(another.requests) - 80
    print(f"80 deliveries, {twice} sent again after a kill")
    assert {row["attempts"] for row in workers.deliveries()} == {1}


def left(workers: Outboxes) -> bool:
    """Whether anything is left to tell."""
    unfinished = "select 1 from public.generations where finished_at is null"
    waiting = "select 1 from private.deliveries where state = 'pending'"
    return bool(workers.db.execute(f"{unfinished} union all {waiting}"))


def test_a_worker_that_stops_says_first_what_became_of_what_it_was_sending(
    alice, workers, receiver
):
    workers.registered(receiver)
    process = workers.start()
    receiver.on_request = lambda _: process.signal(signal.SIGTERM)

    alice.enqueue(params=SMALL)
    receiver.until(1)

    assert process.wait() == 0
    assert [row["state"] for row in workers.deliveries()] == ["delivered"]


def test_a_worker_does_not_wait_beyond_its_grace_time_for_an_endpoint(alice, workers, receiver):
    workers.registered(receiver)
    receiver.answer = Answer(hangs=True)
    process = workers.start(WORKER_GRACE_SECONDS=0.2)
    alice.enqueue(params=SMALL)
    receiver.until(1)

    assert process.stop(within=8) == 0

    assert [row["state"] for row in workers.deliveries()] == ["pending"]


# --- endpoints that misbehave ---


def test_what_fails_is_sent_again_under_the_same_id_until_it_is_dead(alice, workers, receiver):
    workers.registered(receiver)
    receiver.answer = Answer(500)
    workers.start()

    job = alice.enqueued(params=SMALL)
    receiver.until(4)

    assert len(receiver.ids(job)) == 1
    eventually(lambda: workers.deliveries()[0]["attempts"] == 4)
    workers.db.execute("update private.settings set delivery_retries = '{}'")
    workers.backdate_deliveries()
    (dead,) = workers.until_state("dead")
    assert (dead["attempts"], dead["last_status"]) == (5, 500)
    receiver.answer = Answer()
    workers.service.redeliver(str(dead["id"]))
    workers.until_state("delivered")
    assert len(receiver.ids(job)) == 1


def test_an_endpoint_that_hangs_holds_up_no_other(alice, workers, receiver, another):
    workers.registered(receiver)
    workers.registered(another)
    receiver.answer = Answer(hangs=True)
    workers.start()

    alice.has(credits=100)
    for _ in range(20):
        alice.enqueue(params=SMALL)
    another.until(20)

    waits = [
        request.at - row["created_at"].timestamp()
        for request in another.requests
        for row in workers.deliveries()
        if f"evt_{row['id'].hex}" == request.id
    ]
    print(f"longest wait beside an endpoint that hangs: {max(waits):.2f} s")
    assert max(waits) < 5
    assert 0 < len(receiver.requests) <= outbox.LANE_SLOTS


@pytest.mark.parametrize(
    "location", ["http://169.254.169.254/latest/meta-data/", "/elsewhere", "//127.0.0.1:1/"]
)
@pytest.mark.parametrize("status", [302, 307])
def test_redirects_are_not_followed(alice, workers, receiver, location, status):
    workers.db.execute("update private.settings set delivery_retries = '{1 hour}'")
    workers.registered(receiver)
    receiver.answer = Answer(status, {"location": location})
    workers.start()

    alice.enqueue(params=SMALL)

    assert workers.tried()["last_status"] == status
    assert [request.path.partition("?")[0] for request in receiver.requests] == ["/hooks"]


def test_an_answer_without_end_is_cut_off(alice, workers, receiver):
    workers.registered(receiver)
    receiver.answer = Answer(floods=True)
    workers.start()

    alice.enqueue(params=SMALL)

    (row,) = workers.until_state("delivered")
    assert (row["finished_at"] - row["created_at"]).total_seconds() < 5
    assert receiver.flooded < 32 << 20  # what the kernels' buffers hold


def test_an_endpoint_that_is_gone_is_not_asked_again(alice, workers, receiver):
    workers.registered(receiver)
    receiver.answer = Answer(410)
    workers.start()
    alice.enqueue(params=SMALL)
    workers.until_state("dead")

    job = alice.enqueued(params=SMALL)
    workers.until(job, "completed")

    assert len(receiver.requests) == len(workers.deliveries()) == 1
    assert workers.service.list_webhooks()[0]["disabled_at"]


def test_retry_after_is_heeded(alice, workers, receiver):
    workers.registered(receiver)
    receiver.answer = Answer(503, {"Retry-After": "7200"})
    workers.start()

    alice.enqueue(params=SMALL)
    workers.tried()

    assert workers.db.value("select run_at - now() > '1 hour 50 minutes' from private.deliveries")


def test_an_endpoint_that_asks_for_nonsense_is_given_up_like_any_other(alice, workers, receiver):
    workers.db.execute("update private.settings set delivery_retries = '{0,0}'")
    workers.registered(receiver)
    receiver.answer = Answer(503, {"Retry-After": "-1e308"})
    workers.start()

    alice.enqueue(params=SMALL)

    (dead,) = workers.until_state("dead")
    assert (dead["attempts"], len(receiver.requests)) == (3, 3)


# --- addresses inside ---


def test_a_private_address_is_not_called_even_if_it_was_registered(alice, workers, receiver):
    workers.registered(receiver)
    workers.start(WEBHOOK_ALLOWED_HOSTS=f"127.0.0.1:{receiver.port + 1},localhost:{receiver.port}")

    alice.enqueue(params=SMALL)

    assert workers.tried()["last_error"] == "the address is not public"
    assert receiver.requests == []


def certificate_for(name: str, folder: Path) -> Path:
    """Make a certificate for a name, with its key, that signs itself."""
    file = folder / f"{name}.pem"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=x -addext"
    subprocess.run(
        [*command.split(), f"subjectAltName=DNS:{name}", "-keyout", file, "-out", f"{file}.crt"],
        check=True,
        capture_output=True,
    )
    file.write_text(file.read_text() + Path(f"{file}.crt").read_text())
    return file


@pytest.mark.parametrize(
    ("name", "error"), [("localhost", None), ("hooks.example.com", "ConnectError")]
)
def test_tls_verifies_the_name_of_the_address(alice, workers, tmp_path, name, error):
    certificate = certificate_for(name, tmp_path)
    with Receiver(certificate) as receiver:
        workers.registered(receiver, host="localhost")
        workers.start(WEBHOOK_ALLOWED_HOSTS=f"localhost:{receiver.port}", SSL_CERT_FILE=certificate)

        alice.enqueue(params=SMALL)

        assert workers.tried()["last_error"] == error
        assert len(receiver.requests) == (0 if error else 1)


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


def sent(network: PublicNetwork, url: str = "https://hooks.example.com/") -> Verdict:
    """Try one delivery over a network."""

    async def send() -> Verdict:
        async with httpx.AsyncClient() as http:
            one = Outbox(Settings(ENVIRONMENT), mock.Mock(), http)
            one.webhooks._network_backend = network
            delivery = Delivery(outbox.UUID(int=1), 1, url, ["whsec_AAAA"], "{}")
            return (await one._send([delivery]))[delivery]

    return asyncio.run(send())


def test_a_name_that_leads_elsewhere_the_second_time_is_looked_up_once():
    network = Resolver(["8.8.8.8"], ["127.0.0.1"])

    assert sent(network).outcome == "delivered"

    assert network.connected == ["8.8.8.8"]
    assert sent(network).error == "the address is not public"
    assert network.connected == ["8.8.8.8"]


@pytest.mark.parametrize("addresses", [["8.8.8.8", "10.0.0.1"], ["::1", "8.8.8.8"]])
def test_a_name_with_one_private_address_is_not_called_at_all(addresses):
    network = Resolver(addresses)

    assert sent(network).error == "the address is not public"

    assert network.connected == []


def test_the_next_address_is_tried_if_one_does_not_answer():
    network = Resolver(["8.8.8.0", "8.8.4.0", "8.8.8.8"])

    assert sent(network).outcome == "delivered"

    assert network.connected == ["8.8.8.0", "8.8.4.0", "8.8.8.8"]


@pytest.mark.parametrize("host", ["127.1", "0x7f000001", "2130706433", "localhost", "[::1]"])
def test_no_spelling_of_this_machine_is_called(host):
    verdict = sent(PublicNetwork(frozenset()), f"http://{host}:1/")

    assert verdict == Verdict("failed", error="the address is not public")


def test_a_name_that_leads_nowhere_is_a_failure_like_any_other():
    verdict = sent(PublicNetwork(frozenset()), "https://nowhere.invalid/")

    assert (verdict.outcome, verdict.error) == ("failed", "gaierror")


def test_no_proxy_stands_between(monkeypatch):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    network = Resolver(["8.8.8.8"])

    assert sent(network).outcome == "delivered"

    assert network.connected == ["8.8.8.8"]


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
    return {
        "status": "error",
        "message": f'"{TOKEN}" is not a registered push notification recipient',
        "details": {"error": error},
    }


def told(status: int = 200, **body: Any) -> Answer:
    return Answer(status, body=json.dumps(body).encode())


def refused_ticket(error: str) -> Answer:
    return told(data=[refusal(error)])


class Expo:
    """Expo's push service, as its documentation says, with something wrong with some tokens."""

    def __init__(self) -> None:
        self.unknown: set[str] = set()  # devices it does not know
        self.foreign: set[str] = set()  # of another project
        self.bad: set[str] = set()  # what it refuses a whole request for
        self.slow: dict[str, float] = {}  # seconds that a request with this token takes
        self.tells_projects = True
        self.receipts: dict[str, Any] = {}

    def __call__(self, request: Request) -> Answer:
        if request.path.endswith("/getReceipts"):
            wanted = request.message["ids"]
            return told(data={id_: self.receipts[id_] for id_ in wanted if id_ in self.receipts})
        tokens = [message["to"] for message in request.message]
        time.sleep(max([self.slow.get(each, 0) for each in tokens], default=0))
        projects = {
            "@us/app": [each for each in tokens if each not in self.foreign],
            "@them/app": [each for each in tokens if each in self.foreign],
        }
        if all(projects.values()):
            error = {"code": "PUSH_TOO_MANY_EXPERIENCE_IDS"}
            return told(
                400, errors=[error | {"details": projects} if self.tells_projects else error]
            )
        if len(tokens) > 100 or self.bad.intersection(tokens):
            return told(400, errors=[{"code": "PUSH_TOO_MANY_NOTIFICATIONS"}])
        return told(data=[self._ticket(each) for each in tokens])

    def _ticket(self, token: str) -> dict[str, Any]:
        if token in self.unknown:
            return refusal("DeviceNotRegistered")
        return {"status": "ok", "id": f"ticket-{token}"}


@pytest.fixture
def expo(workers: Outboxes, receiver: Receiver) -> Receiver:
    """Expo's push service, which takes everything; alice's device is registered."""
    receiver.answer = Expo()
    workers.environment |= {
        "EXPO_PUSH_URL": receiver.url("/--/api/v2/push/send"),
        "EXPO_ACCESS_TOKEN": "expo-secret",
    }
    workers.extra_secrets |= {TOKEN, "xxxxxxxxxxxxxxxxxxxxxx", "expo-secret"}
    return receiver


@pytest.fixture
def phone(alice: User, expo: Receiver) -> User:
    """A user with a device."""
    alice.register_push_token(TOKEN)
    return alice


def test_a_device_is_told_through_expo(phone, workers, expo):
    workers.start()

    job = phone.enqueued("a secret wish", params=SMALL)
    (request,) = expo.until(1)

    workers.until_state("delivered")
    assert request.path == "/--/api/v2/push/send"
    assert request.headers["authorization"] == "Bearer expo-secret"
    assert request.message == [
        {
            "to": TOKEN,
            "title": "Your picture is ready",
            "body": "Tap to see it.",
            "collapseId": job,
            "tag": job,
            "data": {"job_id": job, "status": "completed", "batch_id": None},
        }
    ]


def test_a_device_that_expo_does_not_know_any_more_is_forgotten(phone, db, workers, expo):
    expo.answer = refused_ticket("DeviceNotRegistered")
    workers.start()

    phone.enqueue(params=SMALL)

    (dead,) = workers.until_state("dead")
    assert dead["last_error"] == "DeviceNotRegistered"
    assert db.value("select count(*) from private.push_tokens") == 0


@pytest.mark.parametrize(
    "answer",
    [
        Answer(429),
        Answer(503),
        Answer(200, body=b"<html>"),
        Answer(200, body=b'{"data": []}'),
        refused_ticket("MessageRateExceeded"),
        Answer(410),
        Answer(302, {"location": "/elsewhere"}),
    ],
)
def test_what_expo_does_not_take_is_sent_again(phone, db, workers, expo, answer):
    expo.answers.append(answer)
    workers.start()

    phone.enqueue(params=SMALL)
    expo.until(2)

    workers.until_state("delivered")
    assert db.value("select count(*) from private.push_tokens") == 1
    assert {request.path for request in expo.requests} == {"/--/api/v2/push/send"}


def test_a_push_whose_answer_was_lost_is_shown_once(phone, workers, expo):
    expo.answers.append(Answer(504))
    workers.start()

    phone.enqueue(params=SMALL)
    first, second = expo.until(2)

    workers.until_state("delivered")
    (message,) = first.message
    assert second.message == first.message
    assert message["collapseId"] == message["tag"] == message["data"]["job_id"]


# --- many pushes ---


@pytest.fixture
def crowd(db: Database, workers: Outboxes, expo: Receiver) -> list[User]:
    """Users with a device each, whose jobs have all just ended; nobody is told yet."""
    db.execute("update private.settings set retry_base = '0'")
    db.execute("insert into private.push_texts values ('generation.canceled', 'Canceled', '')")
    users = [User(db) for _ in range(12)]
    for n, user in enumerate(users):
        user.register_push_token(f"ExponentPushToken[{n}]")
        user.call("public.cancel_generation", job_id=user.enqueued(params=SMALL))
    return users


def test_many_pushes_go_in_one_request(crowd, workers, expo):
    workers.start()

    workers.until_state("delivered", 12)

    assert [len(request.message) for request in expo.requests] == [12]


@pytest.mark.parametrize("tells_projects", [True, False])
def test_one_token_of_another_project_blocks_no_other(crowd, workers, expo, tells_projects):
    expo.answer.foreign = {"ExponentPushToken[7]"}
    expo.answer.tells_projects = tells_projects
    workers.start()

    workers.until_state("delivered", 12)

    assert len(expo.requests) <= (3 if tells_projects else 9)
    assert {row["attempts"] for row in workers.deliveries()} == {1}


def test_each_push_is_judged_for_itself(crowd, db, workers, expo):
    expo.answer.unknown = {"ExponentPushToken[3]"}
    expo.answer.bad = {"ExponentPushToken[5]"}
    workers.start()

    workers.until_state("delivered", 10)

    (dead,) = workers.until_state("dead")
    assert dead["push_token"] == "ExponentPushToken[3]"
    left = eventually(lambda: [each for each in workers.deliveries() if each["state"] == "pending"])
    assert [each["push_token"] for each in left] == ["ExponentPushToken[5]"]
    assert db.value("select count(*) from private.push_tokens") == 11


def test_nobodys_tokens_hold_up_anothers_push(phone, bob, workers, expo):
    """Invented tokens that take their time, and another device a moment later."""
    expo.answer.slow = {f"ExponentPushToken[{n}]": 10.0 for n in range(5)}
    for token in expo.answer.slow:
        bob.register_push_token(token)
    workers.start()

    for _ in range(4):
        workers.until(bob.enqueued(params=SMALL), "completed")
    expo.until(1)
    began = time.monotonic()
    phone.enqueue(params=SMALL)

    eventually(lambda: any(TOKEN in request.body.decode() for request in expo.requests), 5)
    print(f"another's push after {time.monotonic() - began:.2f} s")


def test_receipts_are_read_and_what_they_say_is_heeded(crowd, db, workers, expo, monkeypatch):
    workers.start()
    workers.until_state("delivered", 12)
    expo.answer.receipts = {
        "ticket-ExponentPushToken[1]": {"status": "ok"},
        "ticket-ExponentPushToken[2]": refusal("DeviceNotRegistered"),
        "ticket-ExponentPushToken[4]": refusal("InvalidCredentials"),
    }
    expo.answers.append(Answer(503))

    db.pass_time("16 minutes")
    process = workers.start()  # looks for receipts at its start
    process.logged("receipts.failed error=HTTPStatusError")
    db.pass_time("16 minutes")
    process = workers.start()

    process.logged("receipt.error delivery=.* error=InvalidCredentials")
    assert expo.requests[-1].path == "/--/api/v2/push/getReceipts"
    assert len(expo.requests[-1].message["ids"]) == 12
    tokens = [row["token"] for row in db.execute("select token from private.push_tokens")]
    assert len(tokens) == 11 and "ExponentPushToken[2]" not in tokens
    assert db.value("select count(*) from private.deliveries where ticket is not null") == 9
