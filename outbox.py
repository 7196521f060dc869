"""The outbox: tells of ended jobs, by webhooks and by push messages through Expo.

The database says what is due, in lanes: one for each target. What is told and how often it is tried
again is said there, too; here is how it is sent, and that no webhook leads inside a network.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import hmac
import ipaddress
import json
import logging
import random
import re
import socket
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin
from uuid import UUID

import httpcore
import httpx
import psycopg

if TYPE_CHECKING:
    from worker import Database, Settings

EXPO_LANE = "expo"
LANE_SLOTS = 4  # requests at once to one target
DELIVERY_SECONDS = 20.0  # for one try, from looking the name up to the status; far below the lease
NOT_PUBLIC = [  # beside what ipaddress knows: protocol assignments, 6to4, Azure's agent
    ipaddress.ip_network(each)
    for each in ("192.0.0.0/24", "192.88.99.0/24", "168.63.129.16", "2002::/16", "3fff::/20")
]

log = logging.getLogger("darkroom")


@dataclass(frozen=True, eq=False)
class Delivery:
    """Something to send, as private.claim_deliveries answers it; without an url, to Expo."""

    delivery_id: UUID
    token: int
    url: str | None
    secrets: list[str] | None
    body: str | None  # None: a push that nobody should get any more


@dataclass(frozen=True)
class Verdict:
    """What became of a try: delivered, failed, or gone for good. The error names no address."""

    outcome: str
    status: int | None = None
    error: str | None = None
    retry_after: str | None = None  # in their words
    ticket: str | None = None  # of a push, to ask for its receipt by


class NotPublic(Exception):
    """A webhook's name leads to an address inside somebody's network."""


class PublicNetwork(httpcore.AsyncNetworkBackend):
    """Connects to public addresses only.

    A name is looked up once, here, and what was checked is connected to: it cannot become another
    address in between. TLS verifies the name as ever.
    """

    def __init__(self, allowed_hosts: frozenset[str]) -> None:
        self.allowed_hosts = allowed_hosts
        self.backend = httpcore.AnyIOBackend()
        self.resolver = ThreadPoolExecutor(16, "resolver")  # a lookup that hangs holds up no other

    async def connect_tcp(self, host: str, port: int, *rest: Any, **more: Any) -> Any:
        addresses = await self.resolve(host, port)
        if f"{host}:{port}" not in self.allowed_hosts and not all(map(is_public, addresses)):
            raise NotPublic
        for address in addresses[:-1]:
            with contextlib.suppress(httpcore.ConnectError, httpcore.ConnectTimeout):
                return await self.backend.connect_tcp(address, port, *rest, **more)
        return await self.backend.connect_tcp(addresses[-1], port, *rest, **more)

    async def resolve(self, host: str, port: int) -> list[str]:
        """Every address of a name. Raises OSError."""
        look_up = functools.partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
        found = await asyncio.get_running_loop().run_in_executor(self.resolver, look_up)
        return [str(address[0]) for *_, address in found]


def is_public(address: str) -> bool:
    """Whether an IP address can be reached by anybody, and is not another one in disguise."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        if ip in ipaddress.ip_network("64:ff9b::/96"):  # IPv4, as networks without it see it
            return is_public(str(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)))
        if ip not in ipaddress.ip_network("2000::/3"):
            return False
    known = any(ip in network for network in NOT_PUBLIC if network.version == ip.version)
    return ip.is_global and not ip.is_multicast and not known


def signatures(secrets: list[str], message_id: str, timestamp: str, body: bytes) -> str:
    """The header webhook-signature: one signature for each secret (Standard Webhooks 1.0.0)."""
    signed = f"{message_id}.{timestamp}.".encode() + body
    keys = [base64.b64decode(secret.removeprefix("whsec_")) for secret in secrets]
    digests = [hmac.digest(key, signed, "sha256") for key in keys]
    return " ".join(f"v1,{base64.b64encode(digest).decode()}" for digest in digests)


def judge(status: int, retry_after: str | None) -> Verdict:
    """What an endpoint's status means. Redirects are failures: they are not followed."""
    if 200 <= status < 300:
        return Verdict("delivered", status)
    if status == 410:
        return Verdict("gone", status)
    return Verdict("failed", status, retry_after=retry_after)


class Outbox:
    """Sends what the database says is due, each lane for itself."""

    def __init__(self, settings: Settings, db: Database, http: httpx.AsyncClient) -> None:
        self.settings, self.db, self.http = settings, db, http
        # Not httpx: this follows no redirect, heeds no proxy, and unpacks nothing.
        self.webhooks = httpcore.AsyncConnectionPool(
            ssl_context=httpx.create_ssl_context(),
            max_connections=None,
            max_keepalive_connections=0,
            network_backend=PublicNetwork(settings.webhook_allowed_hosts),
        )
        self.expo = asyncio.Semaphore(6)  # it wants no more connections
        self.due = asyncio.Event()
        self.lanes: dict[asyncio.Task[None], str] = {}  # who sends, and where to

    async def run(self, stopping: asyncio.Event) -> None:
        """Look when something may be due: a job has ended, or the time is up. One more task for
        each lane where something is, up to a few: one that hangs holds up no other.
        """
        while not stopping.is_set():
            self.due.clear()
            pause = self.settings.poll_seconds * random.uniform(0.8, 1.0)
            try:
                for lane in [row["due_lanes"] for row in await self.db.call("due_lanes")]:
                    if list(self.lanes.values()).count(lane) < LANE_SLOTS:
                        self.lanes[asyncio.create_task(self._empty(lane, stopping))] = lane
                        self.due.set()  # for another one, if this is not enough
            except psycopg.Error:
                pause = min(pause, 2)
            await asyncio.sleep(0.05)  # at least, between two looks
            for ended in [task for task in self.lanes if task.done()]:
                del self.lanes[ended]
            waits = [asyncio.create_task(event.wait()) for event in (self.due, stopping)]
            await asyncio.wait(waits, timeout=pause, return_when=asyncio.FIRST_COMPLETED)
            for wait in waits:
                wait.cancel()

    async def _empty(self, lane: str, stopping: asyncio.Event) -> None:
        """Send what is due in a lane, one request after the other, until nothing is left. A request
        to Expo takes many pushes.
        """
        is_idle, at_most = True, 100 if lane == EXPO_LANE else 1
        with contextlib.suppress(psycopg.Error):
            while not stopping.is_set():
                rows = await self.db.call("claim_deliveries", lane, at_most)
                if not rows:
                    break
                is_idle, claimed = False, [Delivery(**row) for row in rows]
                if deliveries := [each for each in claimed if each.body is not None]:
                    verdicts = await self._send(deliveries)
                    await asyncio.gather(*(self._finish(lane, *e) for e in verdicts.items()))
        if is_idle:  # who has a delivery of this lane under way?
            await asyncio.sleep(1)
        self.due.set()

    async def _finish(self, lane: str, delivery: Delivery, verdict: Verdict) -> None:
        error = verdict.error and self.db.quoted(verdict.error)
        said = (verdict.outcome, verdict.status, error, verdict.retry_after, verdict.ticket)
        try:
            (row,) = await self.db.insist(
                "finish_delivery", delivery.delivery_id, delivery.token, *said
            )
            state = row["finish_delivery"]
        except psycopg.Error as failure:  # once its lease has run out, it is sent again
            state, verdict = "unknown", Verdict("failed", error=type(failure).__name__)
        log.log(
            logging.INFO if state == "delivered" else logging.WARNING,
            "delivery.%s delivery=%s lane=%s status=%s error=%r",
            *(state, delivery.delivery_id, lane, verdict.status, verdict.error),
        )

    async def _send(self, deliveries: list[Delivery]) -> dict[Delivery, Verdict]:
        """Try once. A library's message may hold the address: only its type is kept."""
        verdicts: dict[Delivery, Verdict] = {}
        try:
            async with asyncio.timeout(DELIVERY_SECONDS):
                if deliveries[0].url is None:
                    await self._push(deliveries, verdicts)
                else:
                    verdicts[deliveries[0]] = await self._post(deliveries[0])
            error = "NoTicket"
        except NotPublic:
            error = "the address is not public"
        except Exception as failure:
            error = type(failure).__name__
        return {each: verdicts.get(each) or Verdict("failed", error=error) for each in deliveries}

    async def _post(self, delivery: Delivery) -> Verdict:
        message_id, timestamp = f"evt_{delivery.delivery_id.hex}", str(int(time.time()))
        body = (delivery.body or "").encode()
        headers: dict[bytes | str, bytes | str] = {
            "content-type": "application/json",
            "user-agent": "Darkroom",
            "webhook-id": message_id,
            "webhook-timestamp": timestamp,
            "webhook-signature": signatures(delivery.secrets or [], message_id, timestamp, body),
        }
        async with self.webhooks.stream(
            "POST", delivery.url or "", headers=headers, content=body
        ) as response:
            fields = {name.lower(): value for name, value in response.headers}
            wish = fields.get(b"retry-after", b"").decode("latin-1")
            return judge(response.status, wish or None)

    async def _push(self, pushes: list[Delivery], verdicts: dict[Delivery, Verdict]) -> None:
        """Hand messages to Expo. Its tickets say that Expo took them, not that they arrived.

        What it refuses as a whole goes again in two halves, so that one message blocks no other;
        messages for several projects, which is refused, by project.
        """
        messages = [message for each in pushes for message in json.loads(each.body or "[]")]
        response = await self._ask_expo(self.settings.expo_push_url, messages)
        if response.status_code in (400, 413, 422) and len(pushes) > 1:
            parts = by_project(response, pushes)
            await asyncio.gather(*(self._push(part, verdicts) for part in parts))
        elif response.status_code != 200:
            verdict = judge(response.status_code, response.headers.get("retry-after"))
            verdicts |= dict.fromkeys(pushes, replace(verdict, outcome="failed"))
        elif len(tickets := response.json()["data"]) == len(pushes):
            for push, ticket in zip(pushes, tickets, strict=True):
                with contextlib.suppress(KeyError, TypeError, AttributeError):
                    verdicts[push] = judge_ticket(ticket)

    async def _ask_expo(self, url: str, body: Any) -> httpx.Response:
        headers = {"accept": "application/json"}
        if token := self.settings.expo_access_token:
            headers["authorization"] = f"Bearer {token}"
        async with self.expo:
            return await self.http.post(url, json=body, headers=headers)

    async def read_receipts(self) -> None:
        """Ask Expo what became of what it took; a token that is dead by then is forgotten."""
        url = urljoin(self.settings.expo_push_url, "getReceipts")
        while rows := await self.db.call("claim_receipts", 1000):  # in one request, at most
            tickets = {row["ticket"]: row["delivery_id"] for row in rows}
            errors: dict[UUID, str | None] = {}
            try:
                async with asyncio.timeout(DELIVERY_SECONDS):
                    response = await self._ask_expo(url, {"ids": list(tickets)})
                for ticket, receipt in response.raise_for_status().json()["data"].items():
                    if delivery_id := tickets.get(ticket):
                        errors[delivery_id] = judge_ticket(receipt).error
            except Exception as error:  # asked for again a quarter of an hour later
                log.warning("receipts.failed error=%s", type(error).__name__)
                return
            await self.db.call("finish_receipts", list(errors), list(errors.values()))
            for delivery_id, said in errors.items():
                if said:
                    log.warning("receipt.error delivery=%s error=%s", delivery_id, said)


def judge_ticket(ticket: Mapping[str, Any]) -> Verdict:
    """What a ticket of Expo's, or a receipt, says of one push."""
    if ticket["status"] == "ok":
        number = ticket.get("id")
        is_usable = isinstance(number, str) and 0 < len(number) <= 100
        return Verdict("delivered", 200, ticket=number if is_usable else None)
    reason = re.sub(r"[^A-Za-z]", "", str((ticket.get("details") or {}).get("error")))[:50]
    return Verdict("gone" if reason == "DeviceNotRegistered" else "failed", 200, reason)


def by_project(response: httpx.Response, pushes: list[Delivery]) -> list[list[Delivery]]:
    """Parts of what Expo refused together: by project, where it tells them apart, else halves."""
    parts: dict[Any, list[Delivery]] = {}
    with contextlib.suppress(ValueError, TypeError, KeyError, IndexError, AttributeError):
        projects = response.json()["errors"][0]["details"].items()
        owners = {token: name for name, tokens in projects for token in tokens}
        for each in pushes:
            parts.setdefault(owners.get(json.loads(each.body or "")[0]["to"]), []).append(each)
    if len(parts) < 2:
        middle = len(pushes) // 2
        return [pushes[:middle], pushes[middle:]]
    return list(parts.values())
