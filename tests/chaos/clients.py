"""Apps under chaos: users who sign up and enqueue over HTTP, and repeat what is not answered.

Each request has an idempotency key and is sent until it is answered, so it is known which job ids
the backend has given out: none of these may be lost, and no request may have made two.
"""

from __future__ import annotations

import contextlib
import io
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
from billing import RevenueCat, millis
from chaos.world import MARK, MODELS, World
from http_client import Client, SignedUp, answer
from PIL import Image

THREADS = 6
USERS = 20
REPEATS, CANCELS = 0.05, 0.03  # share of requests that are sent twice, of jobs that are canceled
PAYMENTS, REFUNDS = (
    0.2,
    0.3,
)  # share of jobs before which their user buys, of purchases that go back
GIVE_UP_SECONDS = 180.0
# What is refused for the moment: by a gateway that is still starting, by a database that takes no
# writes, or by PostgREST's 400 where the database hung up.
PASSING = ("PGRST202", "25006", "read-only transaction", '"code":""')


@dataclass
class Accepted:
    """What the backend has promised."""

    jobs: dict[str, str] = field(default_factory=dict)  # job id by idempotency key
    doubled: list[str] = field(default_factory=list)  # keys answered with two different jobs
    canceled: set[str] = field(default_factory=set)  # jobs whose user asked for that
    refused: list[str] = field(default_factory=list)  # answers that should not have come
    paid: list[str] = field(default_factory=list)  # purchases that a store has told of
    # Users whom the backend failed for the moment: in what call, from when to when.
    failed: list[tuple[str, dict[str, Any], float, float]] = field(default_factory=list)


def sign_up(world: World, number: int) -> SignedUp:
    """Have a user with credits and a source image; every other one is paid."""
    user = SignedUp(world.endpoints)
    operator = Client(world.endpoints, world.stack.service_role_key)
    grant = {"user_id": user.id, "amount": 1_000_000, "kind": "grant", "external_id": user.id}
    answer(operator.rpc("grant_credits", **grant))
    if number % 2:
        answer(operator.rpc("set_paid", user_id=user.id, paid_until="2100-01-01"))
    source = io.BytesIO()
    Image.new("RGB", (32, 32), "green").save(source, "PNG")
    user.upload(f"inputs/{user.id}/source.png", source.getvalue()).raise_for_status()
    return user


class Clients:
    """Enqueue a number of jobs from several threads."""

    def __init__(self, world: World, seed: int, count: int) -> None:
        self.world, self.seed, self.count = world, seed, count
        self.accepted = Accepted()
        self.operator = Client(world.endpoints, world.stack.service_role_key)
        while len(world.users) < USERS:
            world.users.append(sign_up(world, len(world.users)))
        self.may_send: Callable[[int], bool] = lambda number: True
        self.sent = 0  # requests that are under way or answered
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(THREADS)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Have no more sent, and return when all that was sent is answered."""
        self._stop.set()
        for thread in self._threads:
            thread.join(GIVE_UP_SECONDS)

    def is_done(self) -> bool:
        return not any(thread.is_alive() for thread in self._threads)

    def _run(self) -> None:
        while not self._stop.is_set():
            with self._lock:
                number = self.sent
                if number >= self.count:
                    return
                if is_due := self.may_send(number):
                    self.sent += 1
            if is_due:
                self._send(number)
            else:
                self._stop.wait(0.05)

    def _send(self, number: int) -> None:
        """Enqueue one job, whatever it takes."""
        chance = random.Random(f"{self.seed} {number}")
        user = chance.choice(self.world.users)
        model = chance.choice([*MODELS, "black-forest-labs/flux-schnell"])
        params: dict[str, Any] = dict(MODELS[model])
        if model == "acme/edit":
            params["image"] = f"{user.id}/source.png"
        key = f"chaos-{self.seed}-{number}"
        if chance.random() < PAYMENTS:
            self._pay(user, f"{key}-paid", chance)
        request = {"model": model, "prompt": f"{MARK} {key}", "params": params}
        call, keys = "enqueue_generation", [key]
        if number % 10 == 9:
            call, keys = "enqueue_batch", [f"{key}/{place}" for place in range(3)]
            request["prompts"] = [f"{MARK} {each}" for each in keys]
            del request["prompt"]
        for _ in range(2 if chance.random() < REPEATS else 1):
            told = self._insist(user, call, **request, idempotency_key=key)
            job_ids = told.get("job_ids") or [told["job_id"]] if told else []
            for each, job_id in zip(keys, job_ids, strict=bool(told)):
                if self.accepted.jobs.setdefault(each, job_id) != job_id:
                    self.accepted.doubled.append(each)
        if told and chance.random() < CANCELS:
            time.sleep(chance.random())
            self.accepted.canceled.update(job_ids)
            named = {name: told[name] for name in ("batch_id", "job_id") if name in told}
            self._insist(user, "cancel_batch" if len(keys) > 1 else "cancel_generation", **named)

    def _pay(self, user: SignedUp, name: str, chance: random.Random) -> None:
        """Have a store tell of a period that is over soon, and perhaps that it was refunded."""
        store, now = RevenueCat(user.id, original=name), datetime.now(UTC)
        end = millis(now + timedelta(seconds=chance.randint(1, 30)))
        sale = store.renewed(now, now, expiration_at_ms=end)
        events = [sale] * chance.randint(1, 3)
        events += [store.refunded(sale, now)] * (chance.random() < REFUNDS)
        chance.shuffle(events)
        for event in events:
            self._insist(self.operator, "apply_billing_event", provider="revenuecat", event=event)
        self.accepted.paid.append(name)

    def _insist(self, user: Client, function: str, **arguments: Any) -> dict[str, Any] | None:
        """Call until there is an answer that says what became of it; return it."""
        deadline = time.monotonic() + GIVE_UP_SECONDS
        while (began := time.monotonic()) < deadline:
            said = "no answer"
            with contextlib.suppress(httpx.TransportError):
                response = user.rpc(function, **arguments)
                if response.status_code == 200:
                    return dict(response.json())
                if response.status_code == 409 and "already_finished" in response.text:
                    return None  # too late to cancel
                said = f"{response.status_code} {response.text[:300]}"
                is_passing = any(each in response.text for each in PASSING)
                if response.status_code < 500 and response.status_code != 429 and not is_passing:
                    self.accepted.refused.append(f"{function}: {response.text[:300]}")
                    return None
            if isinstance(user, SignedUp):
                told = arguments | {"function": function, "said": said}
                self.accepted.failed.append((user.id, told, began, time.monotonic()))
            time.sleep(0.2)
        self.accepted.refused.append(f"{function}: no answer for {GIVE_UP_SECONDS:g} s")
        return None
