"""One random run of misbehaviour: all around the worker goes wrong, and its own process dies.

Meanwhile the user cancels jobs, and the worker hears of it at once, late or never. Among strangers,
who ask for the same with sources of their own, what goes wrong is mostly the answers of creates.

The worker's classes are the real ones, on a real database, with a real HTTP server as provider.
Between them and the world stands Fate: at each call it may refuse it, lose its answer, kill the
worker, stop it, or let it freeze for a while. All that is drawn from the run's seed.

Time is made, not waited for: a pause of the worker puts the event loop's clock forward, and what
has to pass between two looks at the queue (leases, delays, pauses) is backdated in the database.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import ssl
from collections import Counter
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any, TypeVar
from unittest import mock
from urllib.parse import unquote

import httpx
import psycopg
from actors import User, outcome
from database import Database, assert_books_balance
from fake_replicate import MODERATED, TERMINAL, Behaviour, FakeReplicate
from fake_replicate import image as picture

import worker

T = TypeVar("T")

MODELS = {
    "black-forest-labs/flux-schnell": {"num_outputs": 3},
    "black-forest-labs/flux-1.1-pro": {},
    "acme/seedless": {},
    "acme/edit": {},
}
MORE_MODELS = """
insert into public.models (
  id, provider, provider_ref, title, price_credits, paid_price_credits, client_inputs,
  image_inputs, input_schema, cost_usd, cost_unit
) values
('acme/seedless', 'replicate', 'acme/seedless', 'No seed', 3, 1, '{style}', '{}',
 '{"properties": {"prompt": {"type": "string"}, "style": {"type": "string"}}}', 0.04, 'image'),
('acme/edit', 'replicate', 'acme/edit:' || repeat('e', 64), 'Image to image', 2, 1, '{image,seed}',
 '{image}', '{"properties": {"prompt": {"type": "string"}, "image": {"type": "string"},
 "seed": {"type": "integer"}}}', 0.001, 'second')
"""
CRITICAL = {"begin_creates", "POST /v1/predictions", "checkpoint_jobs", "adopt_provider_job"}
LARGE = 200_000
CLIENT_TLS = ssl.create_default_context()  # costs more than a whole run
# What a create may meet; the second group is about the prediction it buys.
CREATES: list[dict[str, Any]] = [
    *({"answer": None, "stored": stored} for stored in (True, True, False)),
    *({"answer": answer, "stored": True} for answer in (200, 408, 500, 504)),
    *({"answer": answer, "stored": False} for answer in (200, 302, 500, 503)),
    *({"answer": 429, "retry_hints": hint, "retry_after": 40} for hint in ("header", "body", "")),
    *({"answer": answer} for answer in (401, 402, 402, 403, 422)),
]
PREDICTIONS: list[dict[str, Any]] = [
    {"ends": "failed", "error": MODERATED},
    {"ends": "failed", "error": "CUDA out of memory (E1001)"},
    {"ends": "canceled"},
    {"ends": "aborted"},
    {"polls": float("inf")},
    {"running": "pondering", "polls": 5},
    {"removed": True},
    {"images": 0},
    *({"images": count} for count in (1, 1, 2)),
    {"images": 9},
    {"output": {"picture": "http://169.254.169.254/latest/meta-data"}},
    {"output": "https://replicate.delivery.example.com/out.png"},
    *({"failing_gets": 3, "get_status": status} for status in (None, 404, 429, 500)),
    {"failing_gets": 1, "get_status": 402},
    *(
        {"file": file}
        for file in ("gone", "junk", "bomb", "large", "unsized", "broken", "redirect")
    ),
]


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


class Fate:
    """Decides at each call what becomes of it."""

    def __init__(self, chance: random.Random, loop: Loop) -> None:
        self.chance, self.loop = chance, loop
        self.faults_left = chance.choice([0, 0, 1, 3, 6])
        self.cancels_left = chance.choice([0, 0, 0, 1, 2])
        self.is_dead = False
        self.on_stop: Callable[[], None] = lambda: None
        self.on_cancel: Callable[[], None] = lambda: None
        self.beat: Callable[[], Awaitable[None]]
        self.ends: list[str] = []  # of this run's workers so far
        self.calls = 0
        self.end_at, self.end = 0, ""
        self.history: list[str] = []

    def begin(self, end: str) -> None:
        """Begin a worker's life, and settle when and how it ends."""
        self.is_dead, self.calls = False, 0
        self.end, self.end_at = end, self.chance.randint(1, 11) if end else 0

    async def meet(self, name: str, call: Callable[[], Awaitable[T]], *errors: Exception) -> T:
        """Make a call, or not. Of the errors the first is of a call that was never sent."""
        if self.is_dead:
            raise Killed
        self.calls += 1
        fault = self._fault(name)
        self.history.append(f"{name} {fault}".rstrip())
        if fault == "killed before":
            self._die()
        if fault == "refused":
            raise errors[0]
        told = self._cancel(name)
        if told == "before":
            await self.beat()
        answer = await call()
        if told == "after":
            await self.beat()
        if fault == "killed after":
            self._die()
        if fault == "stopped":
            self.ends.append("stopped")
            self.on_stop()
        if fault == "lost":
            raise self.chance.choice(errors[1:])
        if fault == "frozen":
            self.loop.ahead += self.chance.choice([1, 4, 6, 30])
        return answer

    def _cancel(self, name: str) -> str:
        """Have the user cancel, perhaps; answer when the worker is told."""
        risk = 0.2 if name in CRITICAL else 0.06
        if name == "heartbeat" or not self.cancels_left or self.chance.random() > risk:
            return ""
        told = self.chance.choice(["before", "after", "never"])
        self.history.append(f"canceled, told {told}")
        self.cancels_left -= 1
        self.on_cancel()
        return told

    def _die(self) -> None:
        self.is_dead = True
        self.ends.append("killed")
        raise Killed

    def _fault(self, name: str) -> str:
        if self.calls == self.end_at:
            if self.end == "killed":
                return self.chance.choice(["killed before", "killed after"])
            return self.end
        risk = 0.4 if name in CRITICAL else 0.15
        if self.faults_left and self.chance.random() < risk:
            self.faults_left -= 1
            return self.chance.choice(["refused", "lost", "lost", "frozen"])
        return ""


class FatefulDatabase(worker.Database):
    """The worker's own, with Fate at each call."""

    def __init__(self, url: str, fate: Fate, canceled: set[str]) -> None:
        super().__init__(url)
        self.fate, self.canceled = fate, canceled

    async def call(self, function: str, *args: Any) -> list[Any]:
        if function == "cancel_job":
            self.canceled.add(str(args[0]))
        call = super().call
        errors = [psycopg.OperationalError("not sent"), psycopg.OperationalError("answer lost")]
        return await self.fate.meet(function, lambda: call(function, *args), *errors)


class Watched(worker.Replicate):
    """The worker's own; notes for which job each prediction was bought."""

    def __init__(
        self, http: httpx.AsyncClient, fake: FakeReplicate, made_for: dict[str, str]
    ) -> None:
        super().__init__(http, fake.url, fake.token)
        self.fake, self.made_for = fake, made_for

    async def create(self, job: worker.Job, provider_input: dict[str, Any]) -> str:
        before = len(self.fake.creates)
        try:
            return await super().create(job, provider_input)
        finally:
            for create in self.fake.creates[before:]:
                if create.prediction_id:
                    self.made_for[create.prediction_id] = str(job.job_id)


class Bucket:
    """Storage as the worker sees it, in memory."""

    def __init__(self, chance: random.Random, loop: Loop) -> None:
        self.chance, self.loop = chance, loop
        self.files: dict[str, bytes] = {}
        self.inputs: dict[str, bytes] = {}
        self.failures_left = chance.choice([0, 0, 1, 3, 6])

    async def answer(self, request: httpx.Request) -> httpx.Response:
        """Answer one request; it may be carried out and answered with an error all the same."""
        body, path = await request.aread(), unquote(request.url.path)
        kind, _, name = path.removeprefix("/storage/v1/object/").partition("/")
        fails = self.failures_left > 0 and self.chance.random() < 0.4
        if fails:
            self.failures_left -= 1
        if fails and self.chance.random() < 0.5:
            return httpx.Response(self.chance.choice([429, 500, 503]))
        if kind == "generations" and request.method == "POST":
            self.files[name] = body
        if fails:
            return httpx.Response(504)
        if kind == "sign":
            spelling = self.chance.choice(["signedURL", "signedUrl"])
            # As good as a real token: it differs by when it was made, and when it ends.
            token = f"{self.loop.time():.0f}-{json.loads(body)['expiresIn']}"
            return httpx.Response(200, json={spelling: f"/object/sign/{name}?token={token}"})
        return httpx.Response(200, content=self.inputs[name] if kind == "inputs" else b"{}")

    def fetch(self, address: str) -> bytes:
        """What the provider finds at a signed address."""
        return self.inputs[address.partition("/sign/inputs/")[2].partition("?")[0]]


class Wire(httpx.AsyncBaseTransport):
    """All HTTP of a worker: to the provider over real sockets, to Storage in memory."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.inner = httpx.AsyncHTTPTransport(verify=CLIENT_TLS)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        url = request.url
        origin = f"{url.scheme}://{url.netloc.decode()}"
        self.run.origins.add(origin)
        is_storage = origin == self.run.storage_url
        send = self.run.bucket.answer if is_storage else self.inner.handle_async_request
        return await self.run.fate.meet(
            f"{request.method} {url.path}",
            lambda: send(request),
            self.run.chance.choice([httpx.ConnectError("refused"), httpx.ConnectTimeout("late")]),
            httpx.ReadTimeout("late"),
            httpx.RemoteProtocolError("hung up"),
            httpx.ReadError("reset"),
        )

    async def aclose(self) -> None:
        await self.inner.aclose()


class Run:
    """A few jobs of one user among misbehaviour, from enqueue to the end of all."""

    def __init__(self, seed: int, db: Database, database_url: str, fake: FakeReplicate) -> None:
        self.chance = random.Random(seed)
        self.jitter = random.Random(seed)  # the worker's own
        self.db, self.database_url, self.fake = db, database_url, fake
        self.loop = Loop()
        self.fate = Fate(self.chance, self.loop)
        self.bucket = Bucket(self.chance, self.loop)
        fake.fetch = self.bucket.fetch
        self.origins: set[str] = set()
        host = self.chance.choice(["storage.internal", "storage.example.com"])
        self.storage_url = f"http://{host}"
        self.ends_left = ["killed"] * self.chance.choice([0, 0, 1, 1, 1, 2])
        if self.chance.random() < 0.2:
            self.ends_left.append("stopped")
        self.chance.shuffle(self.ends_left)
        self.jobs: dict[str, User] = {}
        self.canceled: set[str] = set()  # jobs that a worker ended so
        self.made_for: dict[str, str] = {}  # job by prediction, whoever came to know of it
        self.fate.on_cancel = self._cancel

    def prepare(self) -> None:
        """Enqueue the jobs, and decide how the provider behaves."""
        self._allow()
        self._ask()
        self._misbehave()

    def _allow(self) -> None:
        self.db.lift_limits()
        self.db.execute(MORE_MODELS)
        self.db.execute("update public.models set is_active = true, deadline = '2 minutes'")
        # No delay may end by itself: see _pass_time.
        self.db.execute("update private.settings set retry_base = '1 day', retry_cap = '1 day'")
        percent = self.chance.choice([100, 50])
        self.db.execute("update private.settings set running_cancel_refund_percent = %s", percent)

    def _ask(self) -> None:
        user = User(self.db).has(credits=100)
        for number in range(self.chance.choice([1, 1, 1, 2, 3])):
            model = self.chance.choice([*MODELS, "black-forest-labs/flux-schnell"])
            params: dict[str, Any] = dict(MODELS[model])
            if model == "acme/edit":
                params["image"] = self._source(user)
            self.jobs[user.enqueued(f"picture {number}", model, params=params)] = user

    def _misbehave(self) -> None:
        self.fake.large_bytes = LARGE
        for _ in range(self.chance.choice([0, 1, 2, 3, 4, 6])):
            self.fake.next(**self._behaviour())
        failure = self.chance.choice([402, 404, 429, 500, 502, None])
        self.fake.list_answers += [failure] * self.chance.choice([0, 0, 1, 3, 25])
        failure = self.chance.choice([402, 413, 429, 500])
        self.fake.file_answers += [failure] * self.chance.choice([0, 0, 1])

    def _cancel(self) -> None:
        job_id = self.chance.choice(list(self.jobs))
        outcome(lambda: self.jobs[job_id].cancel_generation(job_id))  # refused if it has ended

    def _source(self, user: User) -> str:
        path = f"{user.id}/cat.png"
        self.bucket.inputs[path] = f"a cat of {user.id}".encode()
        query = "insert into storage.objects (bucket_id, name) values ('inputs', %s)"
        self.db.execute(f"{query} on conflict do nothing", path)
        return path

    def _behaviour(self) -> dict[str, Any]:
        """Draw what one create meets."""
        changes: dict[str, Any] = {}
        if self.chance.random() < 0.6:
            changes |= self.chance.choice(CREATES)
        if self.chance.random() < 0.5:
            changes |= self.chance.choice(PREDICTIONS)
        if self.chance.random() < 0.3:
            changes["hidden"] = 2
        return changes

    def play(self) -> None:
        """Work until no job is left."""
        shim = SimpleNamespace(**vars(asyncio) | {"sleep": self.loop.sleep})
        clock = SimpleNamespace(monotonic=self.loop.time)
        with (
            mock.patch.object(worker, "asyncio", shim),
            mock.patch.object(worker, "time", clock),
            mock.patch.object(worker, "random", self.jitter),
            asyncio.Runner(loop_factory=lambda: self.loop) as runner,
        ):
            runner.run(self._work_until_done())

    async def _work_until_done(self) -> None:
        live = "select count(*) from private.live_jobs"
        for _ in range(60):
            self.fate.begin(self.ends_left.pop() if self.ends_left else "")
            await self._live()
            self._pass_time()
            if not self.db.value(live):
                return
        raise AssertionError("it never ends")

    async def _live(self) -> None:
        """One worker's life: claim and work until nothing is ready, or it ends before."""
        settings = worker.Settings(
            {
                "DATABASE_URL": self.database_url,
                "SUPABASE_URL": self.storage_url,
                "SUPABASE_SERVICE_KEY": "key",
                "WORKER_SLOTS": "1",  # two jobs at once would not do the same again
                "MAX_IMAGE_BYTES": str(LARGE // 2),
                "IMAGE_PREVIEW_PIXELS": "32",
            }
        )
        db = FatefulDatabase(self.database_url, self.fate, self.canceled)
        async with httpx.AsyncClient(transport=Wire(self), timeout=worker.HTTP_TIMEOUT) as http:
            provider = Watched(http, self.fake, self.made_for)
            storage = worker.Storage(settings, http, worker.Pictures())
            await db.pool.open()
            try:
                await self._work(
                    worker.Worker(
                        settings,
                        db,
                        {"replicate": provider},
                        storage,
                        worker.Outbox(settings, db, http),
                    )
                )
            except (Killed, psycopg.OperationalError):
                pass  # the next worker goes on
            finally:
                await db.pool.close()

    async def _work(self, one: worker.Worker) -> None:
        tasks: list[asyncio.Task[None]] = []

        def stop() -> None:
            one.stopping.set()
            for running in list(one.running.values()):
                running.task.cancel()

        async def beat() -> None:
            with contextlib.suppress(psycopg.OperationalError):
                await one.beat()

        self.fate.on_stop, self.fate.beat = stop, beat
        try:
            registered = await one.db.register_worker(one.settings.slots)
            one.worker_id, one.is_full = registered["worker_id"], False
            await one.recover()
            while not one.stopping.is_set() and await one._claim():
                tasks = [running.task for running in one.running.values()]
                while one.running and not self.fate.is_dead:
                    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED, timeout=0.5)
                    tasks = [task for task in tasks if not self._ended(task)]
                if self.fate.is_dead:
                    return
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    @staticmethod
    def _ended(task: asyncio.Task[None]) -> bool:
        """Whether a job's task is over; an error in it is one of the worker."""
        if not task.done() or task.cancelled():
            return task.done()
        if (error := task.exception()) and not isinstance(error, Killed):
            raise AssertionError("the worker let an error through") from error
        return True

    def _pass_time(self) -> None:
        """Until leases, delays and pauses are over; sometimes for more than an hour."""
        past = "now() - interval '1 second'"
        self.db.execute(f"update private.running_jobs set lease_until = {past}")
        if self.chance.random() < 0.05:
            for key in self.fake.predictions:
                self.fake.expire(key)
        self.db.execute("select private.recover_stale_jobs()")
        self.db.execute(f"update private.ready_jobs set run_at = {past} where run_at < 'infinity'")
        self.db.execute(
            f"update private.breakers set paused_until = {past} where paused_until > now()"
        )
        if self.fate.cancels_left and self.chance.random() < 0.15:
            self.fate.cancels_left -= 1
            self.fate.history.append("canceled between two workers")
            self._cancel()

    # What must hold in the end.

    def judge(self) -> Counter[str]:
        """Assert all that must hold whatever happened; answer what jobs and attempts ended in."""
        assert_books_balance(self.db)
        assert self.origins <= {self.fake.origin, self.storage_url}
        assert not [r for r in self.fake.requests if r.path.startswith("/elsewhere")]
        prompts = self._prompts_bought()
        shared = (
            "select provider_job_id from private.attempts where provider_job_id is not null"
            " group by 1 having count(distinct generation_id) > 1"
        )
        assert self.db.execute(shared) == []
        blamed = "select * from private.attempts where error_detail ~ 'HTTP 40[12]'"
        assert self.db.execute(blamed) == [], "a refused account is no job's fault"
        jobs = self.db.execute("select * from public.generations")
        for job in jobs:
            assert job["status"] in ("completed", "failed", "canceled")
            used = self._judge_purchases(job, prompts)
            self._judge_images(job)
            if job["status"] == "canceled" and str(job["id"]) in self.canceled:
                assert all(self._is_told_to_stop(key) for key in used), "left running"
        attempts = self.db.execute("select error_code from private.attempts")
        met = [job["status"] for job in jobs] + [each["error_code"] for each in attempts]
        return Counter(filter(None, met)) + Counter(self.fate.ends)

    def _prompts_bought(self) -> dict[str, str]:
        """Prompt by prediction; the provider forgets inputs after an hour."""
        return {
            create.prediction_id: create.body["input"]["prompt"]
            for create in self.fake.creates
            if create.prediction_id
        }

    def _judge_purchases(self, job: dict[str, Any], prompts: dict[str, str]) -> set[str]:
        """One create per claim; bought again only if what was bought before is of no use.

        Answers the predictions that the job is known to have bought.
        """
        attempts = self.db.execute(
            "select * from private.attempts where generation_id = %s order by token", job["id"]
        )
        creates = [c for c in self.fake.creates if c.body["input"]["prompt"] == job["prompt"]]
        assert len(creates) <= len(attempts)
        bought = [key for key, prompt in prompts.items() if prompt == job["prompt"]]
        assert all(self.fake.is_spent(key) for key in bought[:-1]), "bought twice"
        used = {attempt["provider_job_id"] for attempt in attempts} - {None}
        assert used <= set(bought)
        if job["status"] == "completed":
            assert attempts[-1]["provider_job_id"] == bought[-1]
        return used

    def _is_told_to_stop(self, key: str) -> bool:
        """Whether a prediction has ended, or was at least tried to be canceled."""
        prediction, call = self.fake.predictions[key], f"POST /v1/predictions/{key}/cancel"
        is_over = prediction["status"] in TERMINAL or prediction["data_removed"]
        return is_over or any(line.startswith(call) for line in self.fate.history)

    def _judge_images(self, job: dict[str, Any]) -> None:
        """Every image on record is stored, and is what its bytes say."""
        query = "select * from public.images where generation_id = %s order by position"
        images = self.db.execute(query, job["id"])
        assert [image["position"] for image in images] == list(range(len(images)))
        folder = f"{job['user_id']}/{job['id']}/"
        for image in images:
            assert image["storage_path"].startswith(folder)
            body = self.bucket.files[image["storage_path"]]
            assert len(body) == image["bytes"]
            assert body.startswith((b"\x89PNG", b"RIFF", b"\xff\xd8"))

    def story(self) -> str:
        """What happened, for the message of a failure."""
        creates = [(c.status, c.prediction_id) for c in self.fake.creates]
        attempts = self.db.execute(
            "select attempt, outcome, error_code, error_detail, provider_job_id"
            " from private.attempts order by token"
        )
        told = [json.dumps(attempt, default=str) for attempt in attempts]
        behaviours = [str(changed(self.fake.behaviour(key))) for key in self.fake.predictions]
        return "\n".join([*self.fate.history, str(creates), *behaviours, *told])


class Strangers(Run):
    """Several users ask for the same, each with a source of her own, and answers are lost."""

    def _ask(self) -> None:
        users = [User(self.db).has(credits=100) for _ in range(self.chance.choice([2, 2, 3]))]
        for user in [*users, *users[: self.chance.choice([0, 0, 1])]]:
            params = {"image": self._source(user), "seed": 7}
            self.jobs[user.enqueued("as a painting", "acme/edit", params=params)] = user

    def _misbehave(self) -> None:
        for _ in range(self.chance.choice([2, 3, 4, 6])):
            lost = {"answer": self.chance.choice([None, 500])}
            self.fake.next(
                **self.chance.choice(
                    [
                        lost | {"stored": True},
                        lost | {"stored": True, "hidden": self.chance.choice([4, 8, 12, 99])},
                        lost | {"stored": False},
                        {"is_mixed_up": True},
                        {},
                    ]
                )
            )

    def _pass_time(self) -> None:
        """Meanwhile a user may put another file in the place of her source."""
        super()._pass_time()
        if self.chance.random() < 0.3:
            self.bucket.inputs[self.chance.choice(list(self.bucket.inputs))] += b", changed"

    def judge(self) -> Counter[str]:
        """Assert that nobody got, and no job was said to have bought, what was made for another."""
        assert_books_balance(self.db)
        jobs = self.db.execute("select id::text, status, error_code from public.generations")
        assert {job["status"] for job in jobs} <= {"completed", "failed", "canceled"}
        for image in self.db.execute("select * from public.images"):
            job = str(image["generation_id"])
            own = [self.fake.source(key) for key, owner in self.made_for.items() if owner == job]
            body = self.bucket.files[image["storage_path"]]
            assert body in [picture("webp", (64, 48), 0, each) for each in own], "another's picture"
        attempts = self.db.execute(
            "select generation_id::text as job, provider_job_id as bought from private.attempts"
            " where provider_job_id is not null"
        )
        for each in attempts:  # one of which the provider has forgotten all gives nothing away
            is_gone = self.fake.predictions[each["bought"]]["data_removed"]
            assert is_gone or self.made_for[each["bought"]] == each["job"], "not its own"
        return Counter(job["status"] for job in jobs)


def changed(behaviour: Behaviour) -> dict[str, Any]:
    """What is not as usual in a behaviour."""
    usual = vars(Behaviour())
    return {name: value for name, value in vars(behaviour).items() if value != usual[name]}
