"""A worker may fail, freeze or die at any of its calls: each job is made once, and from its own.

The worker's classes are the real ones, on a real database, with a real HTTP server as provider and
Storage in memory. Between them and the world stands Fate, who strikes at one call; each call there
is gets its turn. Two strangers ask for the same meanwhile, each with a source of her own.

Time is made, not waited for: a pause of the worker puts the event loop's clock forward, and what
has to pass between two lives (leases, delays, pauses) is backdated in the database.

Beside it, Fate by a seed: she strikes several times, anywhere, at jobs of two providers, which have
faults of their own and differ in what can be known of a lost create. MISBEHAVIOUR=0:500 has the
seeds from 0 to 499.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import ssl
from collections.abc import Awaitable, Callable, Iterator
from datetime import datetime, timedelta
from types import SimpleNamespace
from typing import Any, TypeVar
from unittest import mock
from urllib.parse import unquote, urlsplit

import httpx
import psycopg
import pytest
from actors import User
from database import Database, assert_books_balance
from fake_providers import FakeComfyUI
from fake_replicate import MODERATED, TERMINAL, FakeReplicate, image

import worker

T = TypeVar("T")

EDIT = """
insert into public.models (
  id, provider, provider_ref, title, price_credits, paid_price_credits, client_inputs,
  image_inputs, input_schema
) values (
  'acme/edit', 'replicate', 'acme/edit:' || repeat('e', 64), 'Image to image', 2, 1,
  '{image,seed}', '{image}', '{"properties": {"prompt": {"type": "string"},
  "image": {"type": "string"}, "seed": {"type": "integer"}}}'
)
"""
TWIN = """
with twin as (
  insert into private.providers (name, base_url, secret, lost_create, recipe)
  select 'twin', base_url, 'TWIN_API_KEY', 'unknown', recipe - 'find'
  from private.providers where name = 'replicate'
  returning name
)
insert into public.models (
  id, provider, provider_ref, title, price_credits, paid_price_credits, client_inputs,
  image_inputs, input_schema
)
select
  'acme/twin', t.name, m.provider_ref, m.title, m.price_credits, m.paid_price_credits,
  m.client_inputs, m.image_inputs, m.input_schema
from public.models as m cross join twin as t where m.id = 'acme/edit'
"""
GRAPH = """
insert into public.models (
  id, provider, provider_ref, title, price_credits, paid_price_credits, client_inputs,
  image_inputs, input_schema, input_template
)
select
  'acme/graph', 'comfyui', 'acme/graph', m.title, m.price_credits, m.paid_price_credits,
  m.client_inputs, m.image_inputs, m.input_schema, '{
    "1": {"class_type": "LoadImage", "inputs": {"image": "{{input.image}}"}},
    "9": {"class_type": "SaveImage", "inputs": {"text": "{{input.prompt}}"}}
  }'
from public.models as m where m.id = 'acme/edit'
"""
WAYS = ["refused", "lost", "killed before", "killed after", "stopped", "frozen", "canceled"]
# What the two creates meet, and where Storage is: its addresses differ by when they were made.
WORLDS: dict[str, tuple[dict[str, Any], str]] = {
    "all is well": ({}, "http://storage.internal"),
    "answers are lost": (
        {"answer": None, "stored": True, "hidden": 2},
        "http://storage.example.com",
    ),
    "answers are late": ({"answer": 500, "stored": True, "hidden": 4}, "http://storage.internal"),
    "nothing is bought": ({"answer": 500, "stored": False}, "http://storage.internal"),
    "answers are mixed up": ({"is_mixed_up": True}, "http://storage.example.com"),
}
CLIENT_TLS = ssl.create_default_context()  # costs more than a whole run
PICTURES = worker.Pictures()


class Killed(BaseException):
    """The worker's process ended here: nothing of it runs after this."""


class Loop(asyncio.SelectorEventLoop):
    """An event loop whose clock can be put forward."""

    ahead = 0.0

    def time(self) -> float:
        return super().time() + self.ahead

    async def sleep(self, seconds: float) -> None:
        """Let the time pass at once."""
        self.ahead += seconds
        await asyncio.sleep(0)


class Wire(httpx.AsyncHTTPTransport):
    """All HTTP of a worker: to the provider over real sockets, to Storage in memory."""

    def __init__(self, run: Run) -> None:
        super().__init__(verify=CLIENT_TLS)
        self.run = run

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        url = request.url
        origin = f"{url.scheme}://{url.netloc.decode()}"
        assert origin in (self.run.storage_url, *self.run.origins)
        is_storage = origin == self.run.storage_url
        send = self.run.store if is_storage else super().handle_async_request
        errors = [httpx.ConnectError("refused"), httpx.ReadTimeout("late")]
        return await self.run.meet(f"{request.method} {url.path}", lambda: send(request), *errors)


class Run:
    """Two jobs, from the first call to the end of both."""

    def __init__(self, db: Database, url: str, fake: FakeReplicate, way: str, at: int) -> None:
        self.db, self.url, self.fake, self.way, self.at = db, url, fake, way, at
        self.loop, self.calls, self.is_dead = Loop(), 0, False
        self.asked_ahead = 0.0
        self.history: list[str] = []
        self.origins, self.keys = {fake.origin}, {"REPLICATE_API_TOKEN": fake.token}
        self.storage_url, self.files, self.inputs = "", dict[str, bytes](), dict[str, bytes]()
        self.one: worker.Worker
        self.jobs: dict[str, User] = {}
        fake.fetch = self.fetch
        db.runs_at("replicate", fake.url)
        self.ask("acme/edit")
        self.ask("acme/edit")

    def fetch(self, url: str) -> bytes:
        return self.inputs[url.partition("/sign/inputs/")[2].partition("?")[0]]

    def ask(self, model: str) -> str:
        """Have another stranger ask for the same, with a source of her own."""
        user = User(self.db).has(credits=10)
        path = f"{user.id}/cat.png"
        self.inputs[path] = image("png", (8, 8 + len(self.jobs)), 0)
        query = "insert into storage.objects (bucket_id, name) values ('inputs', %s)"
        self.db.execute(query, path)
        job = user.enqueued("as a painting", model, params={"image": path, "seed": 7})
        self.jobs[job] = user
        return job

    def strike(self) -> str:
        """What happens at this call."""
        return self.way if self.calls == self.at else ""

    async def meet(self, name: str, call: Callable[[], Awaitable[T]], *errors: Exception) -> T:
        """Make a call, or not. Of the errors the first is of a call that was never sent."""
        if self.is_dead:
            raise Killed
        self.calls += 1
        way = self.strike()
        self.history.append(f"{name} {way}")
        if way == "refused":
            raise errors[0]
        self.is_dead = way == "killed before"
        if self.is_dead:
            raise Killed
        answer = await call()
        self.is_dead = way == "killed after"
        if self.is_dead:
            raise Killed
        if way == "lost":
            raise errors[1]
        if way == "frozen":  # until its lease has run out, and another has done its job
            self.loop.ahead += 30
            self.pass_time()
            frozen = self.one
            await self.live()
            self.one, self.is_dead = frozen, False
        if way == "stopped":
            self.one.stopping.set()
            for running in list(self.one.running.values()):
                running.task.cancel()
        if way == "canceled":
            for job, user in self.jobs.items():
                with contextlib.suppress(psycopg.Error):  # it has ended
                    user.cancel_generation(job)
            await self.one.beat()
        return answer

    async def store(self, request: httpx.Request) -> httpx.Response:
        body, path = await request.aread(), unquote(request.url.path)
        kind, _, name = path.removeprefix("/storage/v1/object/").partition("/")
        if kind == "generations":
            self.files[name] = body
        if kind == "sign":  # as good as a real token: it differs by when it was made, and ends
            token = f"{self.loop.time():.0f}-{json.loads(body)['expiresIn']}"
            return httpx.Response(200, json={"signedURL": f"/object/sign/{name}?token={token}"})
        return httpx.Response(200, content=self.inputs[name] if kind == "inputs" else b"{}")

    def play(self, behaviours: list[dict[str, Any]], storage_url: str) -> None:
        """Have one worker after the other work, until no job is left."""
        self.storage_url = storage_url
        for behaviour in behaviours:
            self.fake.next(**behaviour)
        shim = SimpleNamespace(**vars(asyncio) | {"sleep": self.loop.sleep})
        clock = SimpleNamespace(monotonic=self.loop.time)
        with (
            mock.patch.object(worker, "asyncio", shim),
            mock.patch.object(worker, "time", clock),
            asyncio.Runner(loop_factory=lambda: self.loop) as runner,
        ):
            for _ in range(30):
                runner.run(self.live())
                self.pass_time()
                if not self.db.value("select count(*) from private.live_jobs"):
                    return
        raise AssertionError("it never ends")

    async def live(self) -> None:
        """One worker's life: claim and work until nothing is ready, or it ends before."""
        self.is_dead = False
        variables = {
            "DATABASE_URL": self.url,
            "SUPABASE_URL": self.storage_url,
            "SUPABASE_SERVICE_KEY": "key",
            "WORKER_SLOTS": "1",  # two jobs at once would not do the same again
            **self.keys,
        }
        settings, db = worker.Settings(variables), worker.Database(self.url)
        make = db.call
        lost = [psycopg.OperationalError("not sent"), psycopg.OperationalError("answer lost")]
        db.call = lambda name, *args: self.meet(name, lambda: make(name, *self.aged(args)), *lost)
        async with httpx.AsyncClient(transport=Wire(self), timeout=worker.HTTP_TIMEOUT) as http:
            storage = worker.Storage(settings, http, PICTURES)
            self.one = worker.Worker(settings, db, mock.Mock(), storage, mock.Mock())
            await db.pool.open()
            with contextlib.suppress(Killed, psycopg.OperationalError):  # the next one goes on
                await self.work()
            await db.pool.close()

    def aged(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """What is said to the database, with times in it moved as the worker's clock was."""
        slept, self.asked_ahead = self.loop.ahead - self.asked_ahead, self.loop.ahead
        for said in args[2] if len(args) == 3 and isinstance(args[2], list) else []:
            memo = (getattr(said, "obj", None) or {}).get("memo", {})
            if until := memo.get("until"):
                memo["until"] = f"{datetime.fromisoformat(until) - timedelta(seconds=slept)}"
        return args

    async def work(self) -> None:
        one, tasks = self.one, []
        try:
            registered = await one.db.register_worker(one.settings.slots, one.settings.keys)
            one.worker_id, one.is_full = registered["worker_id"], False
            await one.recover()
            while not one.stopping.is_set() and await one._claim():
                tasks = [running.task for running in one.running.values()]
                while tasks and not self.is_dead:
                    done, _ = await asyncio.wait(tasks, return_when="FIRST_COMPLETED", timeout=0.1)
                    tasks = [task for task in tasks if task not in done]
                    for task in done:
                        assert task.cancelled() or isinstance(task.exception(), Killed | None)
                if self.is_dead:
                    return
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def pass_time(self) -> None:
        """Until leases, delays and pauses are over."""
        past = "now() - interval '1 second'"
        self.db.execute(f"update private.running_jobs set lease_until = {past}")
        self.db.execute("select setval('private.recovery_due', 0)")
        self.db.execute("select private.recover_stale_jobs()")
        self.db.execute(f"update private.ready_jobs set run_at = {past} where run_at < 'infinity'")
        query = f"update private.breakers set paused_until = {past} where paused_until > now()"
        self.db.execute(query)

    def judge(self) -> None:
        """Each job has ended well and its picture was made from its own source, bought once."""
        predictions = self.fake.predictions
        for job, user in self.jobs.items():
            query = "select status from public.generations where id = %s"
            status = self.db.value(query, job)
            assert status == "completed" or (status, self.way) == ("canceled", "canceled")
            query = "select provider_job_id from private.attempts where generation_id = %s"
            bought = {row["provider_job_id"] for row in self.db.execute(query, job)} - {None}
            assert len(bought) == 1 or status == "canceled"
            source = self.inputs[f"{user.id}/cat.png"]
            assert all(self.fake.source(key) == source for key in bought), "another's"
            ends = {predictions[key]["status"] for key in bought}
            assert ends <= TERMINAL, "left running"
            query = "select storage_path, bytes from public.images where generation_id = %s"
            images = self.db.execute(query, job)
            assert len(images) == (status == "completed")
            for row in images:
                assert self.files[row["storage_path"]] == image("webp", (64, 48), 0, source)
                assert row["bytes"] == len(self.files[row["storage_path"]])
        assert len(predictions) <= len(self.jobs), "bought twice"
        assert len(predictions) == len(self.jobs) or self.way == "canceled"


@pytest.fixture
def shop(db: Database) -> Iterator[Database]:
    db.lift_limits()
    db.execute(EDIT)
    for statement in TWIN, GRAPH:
        db.execute(statement)
    # No delay may end by itself: see pass_time.
    db.execute("update private.settings set retry_base = '1 day', retry_cap = '1 day'")
    yield db
    assert_books_balance(db)
    PICTURES.close()


CASES = [
    pytest.param(way, world, marks=[pytest.mark.long] * (place != number % 2))
    for number, way in enumerate(WAYS)
    for place, world in enumerate(WORLDS)
]


@pytest.mark.parametrize(("way", "world"), CASES)
def test_whichever_call_fails_each_job_is_made_once_and_from_its_own(shop, stack, way, world):
    path = urlsplit(shop.url).path
    url = urlsplit(stack.worker_database_url)._replace(path=path).geturl()
    at, last = 0, 0
    while at <= last:
        with FakeReplicate() as fake:
            run = Run(shop, url, fake, way, at)
            try:
                run.play([WORLDS[world][0]] * 2, WORLDS[world][1])
                run.judge()
            except BaseException:
                print(f"call {at}", *run.history, sep="\n")
                raise
        if at == 0:  # nothing was wrong; the second job's calls are those of the first
            last = run.calls // 2 + 2
        at += 1
    assert at > 14


# --- fate by a seed ---

LOST = [{"answer": None}, {"answer": 500, "stored": True}, {"answer": 500, "stored": False}]
FAULTS: dict[str, list[dict[str, Any]]] = {  # of the providers of each model
    "acme/edit": [
        *({**each, "hidden": hidden} for each in LOST for hidden in (0, 3)),
        {"is_mixed_up": True},
        {"answer": 429},
        {"answer": 404},
        {"failing_gets": 2},
        {"failing_gets": 2, "get_status": 404},
        {"ends": "failed", "error": MODERATED},
        {"ends": "failed"},
        {"ends": "canceled"},
        {"removed": True},
        {"images": 0},
        {"file": "gone"},
        {"file": "junk"},
    ],
    "acme/graph": [
        *LOST,
        {"answer": 429},
        {"failing_gets": 2},
        {"ends": "failed"},
        {"ends": "gone"},
        {"file": "gone"},
        {"file": "junk"},
    ],
}
FAULTS["acme/twin"] = FAULTS["acme/edit"]
STORAGES = ["http://storage.internal", "http://storage.example.com"]
SEEDS = range(*map(int, (os.environ.get("MISBEHAVIOUR") or "0:8").split(":")))


class Adventure(Run):
    """Jobs at two providers of different classes, and all that a seed brings upon them."""

    def __init__(self, db: Database, url: str, seed: int, fakes: dict[str, Any]) -> None:
        super().__init__(db, url, fakes["acme/edit"], "", 0)
        self.fakes, self.dice = fakes, random.Random(seed)
        self.asked = dict.fromkeys(self.jobs, "acme/edit")
        second = self.dice.choice(["acme/twin", "acme/graph"])
        self.asked |= {self.ask(second): second for _ in range(2)}
        self.buys_again = self.dice.random() < 0.3
        query = "update private.providers set buys_again = %s where name = 'twin'"
        db.execute(query, self.buys_again)
        twin, graph = fakes["acme/twin"], fakes["acme/graph"]
        db.runs_at("twin", twin.url)
        db.runs_at("comfyui", graph.base_url)
        self.origins |= {twin.origin, graph.origin}
        self.keys["TWIN_API_KEY"] = twin.token
        self.strikes = self.dice.randrange(4)
        for model, fake in fakes.items():
            fake.fetch = self.fetch
            for _ in range(4):
                likely = self.dice.random() < 0.5
                fake.next(**(self.dice.choice(FAULTS[model]) if likely else {}))

    def strike(self) -> str:
        if self.strikes and self.dice.random() < 0.02:
            self.strikes -= 1
            return self.dice.choice(WAYS)
        return ""

    def made(self, model: str) -> dict[str, tuple[bytes, bool]]:
        """What was bought: from what, and whether something can come of it still."""
        fake = self.fakes[model]
        if isinstance(fake, FakeReplicate):
            return {id: (fake.source(id), not fake.is_spent(id)) for id in fake.predictions}
        return {
            task.id: (
                task.source,
                task.state in ("queued", "running", "succeeded") and task.behaviour.file == "image",
            )
            for task in fake.tasks.values()
        }

    def judge(self) -> None:
        """Each job has ended, paid for what it got, and nothing was bought twice or another's."""
        # Attempts end with the workers that made them, too.
        is_worn_out = any(call.endswith(("before", "after", "frozen")) for call in self.history)
        for job, user in self.jobs.items():
            model, source = self.asked[job], self.inputs[f"{user.id}/cat.png"]
            made = self.made(model)
            query = "select status, error_code from public.generations where id = %s"
            status, code = self.db.row(query, job).values()
            assert code != "internal" or is_worn_out, "our fault"
            query = "select provider_job_id from private.attempts where generation_id = %s"
            bought = {row["provider_job_id"] for row in self.db.execute(query, job)} - {None}
            assert all(made[each][0] == source for each in bought), "another's"
            alive = [id for id, (of, is_alive) in made.items() if of == source and is_alive]
            assert len(alive) <= 1 or (model == "acme/twin" and self.buys_again), "bought twice"
            credits = {"completed": [8], "failed": [10], "canceled": [8, 9, 10]}[status]
            assert user.credits() in credits, f"{status}: {user.credits()} credits left"
            query = "select storage_path from public.images where generation_id = %s"
            images = self.db.execute(query, job)
            assert len(images) == (status == "completed")
            kind = "png" if model == "acme/graph" else "webp"
            for row in images:
                assert self.files[row["storage_path"]] == image(kind, (64, 48), 0, source)


def test_whatever_a_seed_brings_nothing_is_bought_twice_lost_or_anothers(shop, stack):
    url = urlsplit(stack.worker_database_url)._replace(path=urlsplit(shop.url).path).geturl()
    for seed in SEEDS:
        with (
            contextlib.closing(Database(shop.url, shop.name)) as db,
            FakeReplicate() as replicate,
            FakeReplicate() as twin,
            FakeComfyUI() as comfyui,
        ):
            fakes = {"acme/edit": replicate, "acme/twin": twin, "acme/graph": comfyui}
            run = Adventure(db, url, seed, fakes)
            try:
                run.play([], run.dice.choice(STORAGES))
                run.judge()
            except BaseException:
                print(f"seed {seed}", *run.history, sep="\n")
                raise
