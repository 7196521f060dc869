"""Real worker processes against fakes of fal, BFL, OpenAI and ComfyUI: the same cases for each.

What a test counts is purchases: `fake.creates` are requests to buy, `fake.bought` what was bought.
Replicate, the fifth: test_worker_replicate.py.
"""

from __future__ import annotations

import io
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from actors import User
from database import Database
from fake_providers import FAKES, Behaviour, FakeProvider
from PIL import Image
from psycopg.types.json import Jsonb
from worker_process import Workers, eventually

from stack import Stack

FOREVER = 10**9
SCHEMA = {
    "properties": {
        "prompt": {"type": "string"},
        "seed": {"type": "integer"},
        "n": {"type": "integer", "minimum": 1, "maximum": 4, "default": 1},
        "image": {"type": "string"},
    }
}
GRAPH = {  # of a model at ComfyUI
    "1": {"class_type": "LoadImage", "inputs": {"image": "{{input.image}}"}},
    "3": {"class_type": "KSampler", "inputs": {"text": "{{input.prompt}}", "seed": 7}},
    "9": {"class_type": "SaveImage", "inputs": {"images": ["3", 0]}},
}
ASKED = {"model": "gpt-image-1.5", "prompt": "{{input.prompt}}", "n": "{{input.n}}"}
TEMPLATES = {
    ("comfyui", "draw"): Jsonb({key: GRAPH[key] for key in ("3", "9")}),
    ("comfyui", "edit"): Jsonb(GRAPH),
    ("openai", "draw"): Jsonb(ASKED),
}
REFS = {"fal": "fal-ai/flux/dev", "bfl": "flux-2-pro", "openai": "gpt-image-1.5", "comfyui": "own"}


class Bench(Workers):
    """Workers that know the fakes, and a user who asks for their pictures."""

    user: User

    def __init__(
        self, db: Database, stack: Stack, folder: Path, fakes: dict[str, FakeProvider], tls: Path
    ) -> None:
        super().__init__(db, stack, folder)
        self.fakes = fakes
        self.environment |= {"WORKER_POLL_SECONDS": "0.1", "SSL_CERT_FILE": str(tls)}
        db.lift_limits()
        db.execute("update private.settings set retry_base = '0'")
        for name, fake in fakes.items():
            if fake.key:
                self.environment[db.value(
                    "select secret from private.providers where name = %s", name
                )] = fake.key  # fmt: skip
                self.extra_secrets |= {fake.key, fake.cdn.origin}
            fake.points(db, settle="1 second")
            add_models(db, name)

    def renew(self, fake: FakeProvider) -> None:
        """Have a user and a provider without a past."""
        self.fake, self.user = fake, User(self.db).has(credits=20)
        for past in (fake.creates, fake.bought, fake.tasks, fake.requests, fake.uploads):
            past.clear()
        fake.default, fake.account_status = Behaviour(polls=1, queued=0), 200
        fake.faults.clear()
        fake.cdn.requests.clear()
        self.db.execute("delete from private.breakers")
        self.db.execute("update public.models set is_active = true")

    def ask(self, **params: Any) -> str:
        model = f"{self.fake.name}/{'edit' if 'image' in params else 'draw'}"
        return self.user.enqueued("a lighthouse at dusk", model, params=params)

    def started(self) -> str:
        """Ask for a picture and wait until the provider has it; return the job."""
        job, fake = self.ask(), self.fake
        fake.until(lambda: fake.bought)
        if fake.name != "openai":
            eventually(lambda: self.checkpointed(job))
        return job

    def error(self, job: str) -> str | None:
        query = "select error_code from public.generations where id = %s"
        return self.db.value(query, job)

    def pictures(self, job: str) -> list[Image.Image]:
        query = "select * from public.images where generation_id = %s order by position"
        paths = [row["storage_path"] for row in self.db.execute(query, job)]
        return [Image.open(io.BytesIO(self.stored_file(path))) for path in paths]


def add_models(db: Database, provider: str) -> None:
    """One that draws, and one that edits a picture."""
    for kind, inputs in (("draw", ["n"]), ("edit", ["n", "image"])):
        db.execute(
            "insert into public.models (id, provider, provider_ref, title, price_credits,"
            " paid_price_credits, client_inputs, image_inputs, image_count_input, max_images,"
            " input_schema, input_template) values (%s, %s, %s, 'M', 1, 0, %s, %s, 'n', 4, %s, %s)",
            f"{provider}/{kind}",
            provider,
            REFS[provider],
            inputs,
            inputs[1:],
            Jsonb(SCHEMA),
            TEMPLATES.get((provider, kind)),
        )


@pytest.fixture(scope="module")
def shared(server, template, stack, tmp_path_factory) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("workers")
    tls = certificate(folder)
    fakes = {name: fake(tls) for name, fake in FAKES.items()}
    db = server.create(template)
    for fake in fakes.values():
        fake.__enter__()
    with Bench(db, stack, folder, fakes, tls) as shared:
        shared.start()
        yield shared
    for fake in fakes.values():
        fake.__exit__()
    server.drop(db)


def certificate(folder: Path) -> Path:
    """One of localhost, which the workers trust."""
    file = folder / "certificate.pem"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=x -addext"
    subprocess.run(
        [*command.split(), "subjectAltName=DNS:localhost", "-keyout", file, "-out", f"{file}.crt"],
        check=True,
        capture_output=True,
    )
    file.write_text(file.read_text() + Path(f"{file}.crt").read_text())
    return file


@pytest.fixture
def bench(shared: Bench, request: pytest.FixtureRequest) -> Iterator[Bench]:
    """One worker for all tests, each with a user of its own and one provider."""
    fake = shared.fakes[request.param]
    shared.renew(fake)
    yield shared
    assert fake.faults == []


@pytest.fixture
def fake(bench: Bench) -> FakeProvider:
    return bench.fake


def of(*names: str) -> Any:
    return pytest.mark.parametrize("bench", names or list(FAKES), indirect=True)


# --- what comes out ---


@pytest.mark.parametrize(
    ("bench", "form"),
    [(name, form) for name, fake in FAKES.items() for form in fake.forms],
    indirect=["bench"],
)
def test_a_picture_is_bought_once_and_stored_in_whatever_form_it_comes(bench, fake, form):
    images = 1 if fake.name == "bfl" or form == "image" else 2
    fake.next(form=form, images=images, size=(96, 64), polls=3, queued=1)

    job = bench.ask(n=images)
    bench.until(job, "completed")

    assert [picture.size for picture in bench.pictures(job)] == [(96, 64)] * images
    (create,) = fake.creates
    assert "a lighthouse at dusk" in create.raw.decode()
    assert bench.outcomes(job) == ["completed"]


# What becomes of a job, by what its create meets: status, code of the error, creates, bought.
DONE, FAILED = "completed", "failed"
CASES: dict[str, dict[str, Any]] = {
    "moderated": {
        "is": {"ends": "moderated"},
        "fal": (FAILED, "moderated", 1, 1),
        "bfl": (FAILED, "moderated", 1, 1),
        "openai": (FAILED, "moderated", 1, 0),
    },
    "invalid": {
        "is": {"ends": "invalid"},
        "fal": (FAILED, "invalid_input", 1, 1),
        "bfl": (FAILED, "invalid_input", 1, 0),
        "openai": (FAILED, "invalid_input", 1, 0),
        "comfyui": (FAILED, "invalid_input", 1, 0),
    },
    "failed": {
        "is": {"ends": "failed"},
        "fal": (DONE, None, 2, 2),
        "bfl": (DONE, None, 2, 2),
        "openai": (FAILED, "outcome_unknown", 1, 0),
        "comfyui": (DONE, None, 2, 2),
    },
    "gone": {
        "is": {"ends": "gone"},
        "fal": (DONE, None, 2, 2),
        "bfl": (DONE, None, 2, 2),
        "comfyui": (DONE, None, 2, 2),
    },
    "polls are refused for a while": {
        "is": {"failing_gets": 2, "get_status": 500},
        "fal": (DONE, None, 1, 1),
        "bfl": (DONE, None, 1, 1),
        "comfyui": (DONE, None, 1, 1),
    },
    "polls are limited": {
        "is": {"failing_gets": 1, "get_status": 429, "retry_after": 1},
        "fal": (DONE, None, 1, 1),
        "bfl": (DONE, None, 1, 1),
    },
    "its picture is gone": {
        "is": {"file": "gone"},
        "fal": (DONE, None, 2, 2),
        "bfl": (DONE, None, 2, 2),
        "comfyui": (DONE, None, 2, 2),
    },
    "lost": {
        "is": {"answer": None, "stored": True, "hidden": 1},
        "fal": (DONE, None, 1, 1),
        "bfl": (FAILED, "outcome_unknown", 1, 1),
        "openai": (FAILED, "outcome_unknown", 1, 1),
        "comfyui": (DONE, None, 1, 1),
    },
    "lost, the answer an error": {
        "is": {"answer": 500, "stored": True, "hidden": 1},
        "fal": (DONE, None, 1, 1),
        "bfl": (FAILED, "outcome_unknown", 1, 1),
        "openai": (FAILED, "outcome_unknown", 1, 1),
        "comfyui": (DONE, None, 1, 1),
    },
    "lost on the way there": {
        "is": {"answer": None, "stored": False},
        "fal": (FAILED, "outcome_unknown", 1, 0),  # its list may not show what waits
        "bfl": (FAILED, "outcome_unknown", 1, 0),
        "openai": (FAILED, "outcome_unknown", 1, 0),
        "comfyui": (DONE, None, 2, 1),
    },
}


@pytest.mark.parametrize("case", CASES)
def test_what_becomes_of_a_job_is_what_its_provider_means(shared, case):
    asked = {}
    for name in CASES[case].keys() - {"is"}:
        shared.renew(shared.fakes[name])
        shared.fake.next(**CASES[case]["is"])
        asked[name] = (shared.ask(), shared.user)

    for name, (job, user) in asked.items():
        fake, (status, *rest) = shared.fakes[name], CASES[case][name]
        shared.until(job, DONE, FAILED, within=20)
        became = (shared.status(job), shared.error(job), len(fake.creates), len(fake.bought))
        assert (name, *became) == (name, status, *rest)
        assert user.credits() == (19 if status == DONE else 20)
        assert fake.faults == []


@of("fal")
@pytest.mark.parametrize("ends", ["moderated", "invalid"])
def test_what_a_result_says_counts_though_the_status_does_not_tell(bench, fake, ends):
    fake.status_tells = False
    fake.next(ends=ends)
    job = bench.until(bench.ask(), FAILED)
    assert bench.error(job) == {"moderated": "moderated", "invalid": "invalid_input"}[ends]
    fake.status_tells = True


@of("bfl")
def test_what_was_made_and_is_moderated_is_refused_as_well(bench, fake):
    fake.next(ends="moderated", form="content")
    assert bench.error(bench.until(bench.ask(), FAILED)) == "moderated"


@of("fal", "comfyui")
def test_what_an_attempt_before_had_bought_is_not_taken_for_what_was_lost(bench, fake):
    fake.next(ends="gone")
    fake.next(answer=None, stored=True)

    bench.until(bench.ask(), DONE, within=20)

    assert len(fake.bought) == 2


@of("fal")
def test_what_is_written_like_a_picture_is_found_like_any_other(bench, fake):
    fake.next(answer=None, stored=True)

    job = bench.user.enqueued("all work and no play " * 60, "fal/draw")
    bench.until(job, DONE, FAILED)

    assert (bench.status(job), len(fake.bought)) == (DONE, 1)


@of("fal", "bfl", "comfyui")
def test_an_answer_that_names_anothers_job_is_a_lost_one(bench, fake):
    first = bench.until(bench.ask(), DONE)
    fake.next(is_mixed_up=True)

    job = bench.until(bench.ask(), DONE, FAILED)

    query = "select provider_job_id from private.purchases where generation_id = %s"
    had, has = (
        {row["provider_job_id"] for row in bench.db.execute(query, j)} for j in (first, job)
    )
    assert had == {fake.bought[0]}
    assert has == ({fake.bought[1]} if bench.status(job) == DONE else set())
    assert bench.error(job) == ("outcome_unknown" if fake.name == "bfl" else None)
    assert len(fake.bought) == 2


@of("comfyui")
def test_no_name_but_ours_is_taken_for_our_jobs(bench, fake):
    fake.buy("", {"prompt": {}, "prompt_id": "anothers"}, Behaviour(polls=1))
    fake.next(is_mixed_up=True)

    job = bench.until(bench.ask(), DONE)

    query = "select provider_job_id from private.purchases where generation_id = %s"
    assert bench.db.value(query, job) == fake.bought[1] != "anothers"


@of("bfl")
def test_no_key_goes_where_an_answer_leads_but_to_the_providers_own_hosts(bench, fake):
    fake.region = fake.cdn.origin  # pictures may come from there; the key may not go

    bench.until(bench.ask(), FAILED)

    assert fake.cdn.requests == []
    fake.region = fake.origin


@of("bfl")
def test_what_a_create_says_it_costs_is_what_the_attempt_cost(bench, fake):
    job = bench.until(bench.ask(), DONE)
    query = "select cost_usd from private.attempts where generation_id = %s"
    assert float(bench.db.value(query, job)) == 0.045


@of("fal", "bfl")
def test_progress_is_told_on_the_way(bench, fake):
    fake.next(polls=FOREVER, queued=0)
    job = bench.started()
    eventually(lambda: bench.user.get_job_status(job)["progress"] == 50)
    next(iter(fake.tasks.values())).end("succeeded")
    bench.until(job, DONE)


@of("bfl", "openai")
def test_who_accepts_to_pay_twice_gets_the_picture(bench, fake):
    query = "update private.providers set buys_again = %s where name = %s"
    bench.db.execute(query, True, fake.name)
    fake.next(answer=None, stored=True)

    bench.until(bench.ask(), DONE)

    assert len(fake.bought) == 2
    bench.db.execute(query, False, fake.name)


# --- when nothing is bought for now ---


def goes_on(bench: Bench) -> None:
    """Let all pauses be over."""
    bench.db.execute("update private.breakers set paused_until = now()")
    bench.db.execute("update private.ready_jobs set run_at = now()")


@of("fal", "bfl", "openai")
@pytest.mark.parametrize("retry_after", [None, 7])
def test_a_job_waits_for_a_busy_provider_without_using_an_attempt(bench, fake, retry_after):
    fake.next(answer=429, retry_after=retry_after)

    job = bench.ask()
    eventually(lambda: bench.outcomes(job))
    if retry_after:
        query = "select run_at - now() as wait from private.ready_jobs where job_id = %s"
        assert 5 < bench.db.value(query, job).total_seconds() < 30
        goes_on(bench)
    bench.until(job, DONE)

    query = "select error_code, attempt from private.attempts where generation_id = %s order by 1"
    first, second = bench.db.execute(query, job)
    assert (first["error_code"], first["attempt"]) == ("provider_busy", second["attempt"])
    assert len(fake.creates) == 2
    assert bench.user.credits() == 19


@of("fal", "bfl", "openai")
@pytest.mark.parametrize("status", [401, 402, 403])
def test_a_refused_account_pauses_the_provider_and_costs_nobody_a_job(bench, fake, status):
    fake.default = Behaviour(answer=status)
    fake.account_status = 401

    job = bench.ask()

    paused = "select paused_until > now() from private.breakers where name = %s"
    eventually(lambda: bench.db.execute(paused, fake.name) == [{"?column?": True}])
    bench.until(job, "queued")
    fake.default, fake.account_status = Behaviour(polls=1), 200
    goes_on(bench)
    bench.until(job, DONE)


@of("fal", "bfl", "openai")
def test_a_model_that_is_no_more_is_paused_and_its_jobs_wait(bench, fake):
    fake.next(answer=404)

    job = bench.ask()

    query = "select pause_reason from private.breakers where name = %s and paused_until > now()"
    eventually(lambda: bench.db.execute(query, f"{fake.name}/draw"))
    bench.until(job, "queued")
    assert (len(fake.creates), fake.bought) == (1, [])
    goes_on(bench)
    bench.until(job, DONE)


# --- stopped and killed ---


@of("fal", "bfl", "comfyui")
def test_what_its_user_cancels_is_stopped_where_the_provider_can(bench, fake):
    fake.next(polls=FOREVER, queued=FOREVER)
    job = bench.started()

    bench.user.cancel_generation(job)
    bench.until(job, "canceled")

    (task,) = fake.tasks.values()
    if fake.name == "bfl":  # has no way to
        assert task.state == "queued"
    else:
        eventually(lambda: task.is_over)
    assert bench.user.credits() == 20


@of("openai")
def test_a_job_canceled_while_its_create_is_under_way_is_canceled(bench, fake):
    fake.next(slow={"create": 2})
    job = bench.started()

    bench.user.cancel_generation(job)
    bench.until(job, "canceled")

    assert len(fake.bought) == 1
    assert bench.user.credits() == 20


@of("comfyui")
def test_what_waits_behind_others_is_taken_out_and_the_others_go_on(bench, fake):
    others = fake.buy("", {"prompt": {}}, Behaviour(polls=FOREVER))
    job = bench.started()

    bench.user.cancel_generation(job)
    bench.until(job, "canceled")

    eventually(lambda: list(fake.tasks.values())[1].is_over)
    assert not others.is_over


@of("fal", "bfl", "comfyui")
def test_a_job_goes_on_where_a_killed_worker_left_it(bench, fake):
    fake.next(polls=FOREVER)
    job = bench.started()

    bench.processes[-1].kill()
    (task,) = fake.tasks.values()
    task.end("succeeded")
    bench.until_disconnected()
    bench.backdate_leases()
    bench.start()
    bench.until(job, DONE)

    assert len(fake.creates) == len(fake.bought) == 1


@of()
def test_a_create_whose_worker_was_killed_is_as_a_lost_one(bench, fake):
    fake.next(slow={"create": 30})
    job = bench.ask()
    fake.until(lambda: fake.bought)

    bench.processes[-1].kill()
    bench.until_disconnected()
    bench.backdate_leases()
    bench.start()
    bench.until(job, DONE, FAILED)

    is_known = fake.name in ("fal", "comfyui")
    assert bench.error(job) == (None if is_known else "outcome_unknown")
    assert len(fake.creates) == len(fake.bought) == 1
    assert bench.user.credits() == (19 if is_known else 20)


@of("comfyui")
def test_what_a_provider_forgot_when_it_restarted_is_made_again(bench, fake):
    fake.next(polls=FOREVER)
    job = bench.started()

    fake.restart()
    bench.until(job, DONE)

    assert len(set(fake.bought)) == len(fake.bought) == 2  # by another name


# --- sources ---


@of("fal", "comfyui")
def test_a_source_is_handed_over_and_a_picture_made_from_it(bench, fake):
    out = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(out, "PNG")
    path = f"{bench.user.id}/a cat.png"
    login = {"Authorization": f"Bearer {bench.stack.service_role_key}"}
    url = f"{bench.stack.api_url}/storage/v1/object/inputs/{path}"
    kind = {"content-type": "image/png"}
    httpx.post(url, content=out.getvalue(), headers=login | kind).raise_for_status()
    bench.db.execute("insert into storage.objects (bucket_id, name) values ('inputs', %s)", path)

    job = bench.ask(image=path)
    bench.until(job, DONE)

    (task,) = fake.tasks.values()
    assert Image.open(io.BytesIO(task.source)).size == (64, 64)
