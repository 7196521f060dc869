"""Real worker processes against the fake of Replicate's API: what is bought, resumed and refused.

What a test counts is purchases: `fake.creates` are requests to buy, `fake.predictions` what was
bought. One worker does all jobs. What one that dies leaves behind: test_misbehaviour.py.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from actors import User
from database import Database
from fake_replicate import MODERATED, Behaviour, FakeReplicate
from hostile import encoded
from PIL import Image, ImageChops, ImageOps, ImageStat
from psycopg.types.json import Jsonb
from worker_process import Workers, eventually

from stack import Stack

SCHNELL = "black-forest-labs/flux-schnell"
ONE_OUTPUT = "black-forest-labs/flux-1.1-pro"
VECTOR = "recraft-ai/recraft-v3-svg"
EDIT = "acme/edit"
EDIT_SCHEMA = {
    "properties": {
        "prompt": {"type": "string"},
        "image": {"type": "string"},
        "seed": {"type": "integer"},
        "images": {"type": "array", "items": {"type": "string"}},
    }
}
CAT, OTHER_CAT = (encoded(Image.new("RGB", (60, 40), each), "PNG") for each in ("red", "blue"))


class Bench(Workers):
    """Workers that know the fake, and a user who asks for its pictures."""

    user: User

    def __init__(self, db: Database, stack: Stack, folder: Path, fake: FakeReplicate) -> None:
        super().__init__(db, stack, folder)
        self.fake = fake
        self.environment |= {
            "REPLICATE_API_TOKEN": fake.token,
            "WORKER_POLL_SECONDS": "0.1",
            "MAX_IMAGE_BYTES": "100000",
        }
        self.extra_secrets = {fake.token, f"{fake.origin}/files"}
        db.lift_limits()
        db.runs_at("replicate", fake.url, settle="1 second")
        db.execute("update public.models set is_active = true")
        db.execute("update private.settings set retry_base = '0'")
        db.execute(
            "insert into public.models (id, provider, provider_ref, title, price_credits,"
            " paid_price_credits, client_inputs, image_inputs, input_schema) values"
            " (%s, 'replicate', %s, 'Edit', 1, 0, '{image,images,seed}', '{image,images}', %s)",
            EDIT,
            EDIT,
            Jsonb(EDIT_SCHEMA),
        )
        self.renew()

    def renew(self) -> None:
        """Have a user and a provider without a past."""
        self.user = User(self.db).has(credits=20)
        fake = self.fake
        for past in (fake.creates, fake.predictions, fake.requests, fake.uploads, fake.refused):
            past.clear()
        fake.default, fake.large_bytes = Behaviour(polls=1), 2**20
        fake.account_status = 200
        self.db.execute("delete from private.breakers")

    def ask(self, model: str = SCHNELL, user: User | None = None, **params: Any) -> str:
        return (user or self.user).enqueued("a lighthouse at dusk", model, params=params)

    def bought(self, job: str) -> str:
        """Wait until the job's prediction is checkpointed; return its id."""
        return str(eventually(lambda: self.checkpointed(job))["provider_job_id"])

    def attempts(self, job: str, columns: str) -> list[dict[str, Any]]:
        query = f"select {columns} from private.attempts where generation_id = %s order by token"
        return self.db.execute(query, job)

    def images(self, job: str) -> list[dict[str, Any]]:
        query = "select * from public.images where generation_id = %s order by position"
        return self.db.execute(query, job)

    def released(self, job: str) -> dict[str, Any]:
        """Wait until a worker has put the job back; return its row."""
        eventually(lambda: set(self.outcomes(job)) == {"released"})
        query = "select *, run_at - now() as wait from private.ready_jobs where job_id = %s"
        return self.db.row(query, job)

    def end_pause(self) -> None:
        """Let the provider's pause be over."""
        self.db.execute("update private.breakers set paused_until = now()")
        self.db.execute("update private.ready_jobs set run_at = now()")

    def source(self, user: User, body: bytes = CAT, name: str = "a cat.png") -> str:
        """Upload a source image as its user does, into Storage and this database's list of it."""
        path = f"{user.id}/{name}"
        headers = {"Authorization": f"Bearer {self.stack.service_role_key}"}
        httpx.post(
            f"{self.stack.api_url}/storage/v1/object/inputs/{path}",
            content=body,
            headers=headers | {"content-type": "image/png", "x-upsert": "true"},
        ).raise_for_status()
        query = "insert into storage.objects (bucket_id, name) values ('inputs', %s)"
        self.db.execute(query, path)
        return path


@pytest.fixture(scope="module")
def shared(server, template, stack, tmp_path_factory) -> Iterator[Bench]:
    db = server.create(template)
    folder = tmp_path_factory.mktemp("workers")
    with FakeReplicate() as fake, Bench(db, stack, folder, fake) as shared:
        shared.start()
        yield shared
    server.drop(db)


@pytest.fixture
def bench(shared: Bench) -> Bench:
    """One worker for all tests that have it, each with a user of its own."""
    shared.renew()
    return shared


@pytest.fixture
def fake(bench: Bench) -> FakeReplicate:
    return bench.fake


# --- what is bought, stored and paid for ---


def test_a_prediction_is_created_once_and_its_files_are_stored_as_what_they_are(bench, fake):
    fake.next(format="png", size=(96, 64), metrics={"predict_time": 1.25})  # served as image/webp

    job = bench.ask(num_outputs=2, seed=7)
    bench.until(job, "completed")

    (create,) = fake.creates
    asked = bench.db.row(
        "select g.provider_input, m.deadline from public.generations as g"
        " inner join public.models as m on m.id = g.model_id where g.id = %s",
        job,
    )
    assert create.body == {"version": SCHNELL, "input": asked["provider_input"]}
    assert create.headers["cancel-after"] == f"{asked['deadline'].seconds}s"
    assert "prefer" not in create.headers  # waiting would delay the checkpoint
    images = bench.images(job)
    files = [bench.stored_file(image["storage_path"]) for image in images]
    assert [Image.open(io.BytesIO(file)).size for file in files] == [(96, 64)] * 2
    assert [image["bytes"] for image in images] == [len(file) for file in files]
    assert {image["content_type"] for image in images} == {"image/png"}
    assert [image["storage_path"][-5:] for image in images] == ["0.png", "1.png"]
    attempt = {"provider_seconds": 1.25, "provider_job_id": next(iter(fake.predictions))}
    assert bench.attempts(job, "provider_seconds, provider_job_id") == [attempt]
    with_token = {r.path.split("/")[1] for r in fake.requests if "authorization" in r.headers}
    without = {r.path.split("/")[1] for r in fake.requests if "authorization" not in r.headers}
    assert (with_token, without) == ({"v1"}, {"files"})


@pytest.mark.parametrize(
    ("model", "behaviour", "kinds"),
    [
        (SCHNELL, {"images": 4}, ["image/webp"] * 2),
        (SCHNELL, {"images": 1}, ["image/webp"]),
        (SCHNELL, {"format": "avif", "size": (600, 400)}, ["image/avif"] * 2),
        (SCHNELL, {"failing_gets": 2}, ["image/webp"] * 2),
        (ONE_OUTPUT, {"running": "pondering", "polls": 3}, ["image/webp"]),
        (VECTOR, {}, ["image/svg+xml"]),
    ],
    ids=str,
)
def test_what_is_missing_is_given_back_and_what_is_more_is_not_stored(
    bench, fake, model, behaviour, kinds
):
    fake.next(**behaviour)

    job = bench.ask(model, **({"num_outputs": 2} if model == SCHNELL else {}))
    bench.until(job, "completed")

    assert [image["content_type"] for image in bench.images(job)] == kinds
    assert bench.outcomes(job) == ["completed"]
    assert len(fake.creates) == 1
    ledger = bench.user.ledger()
    price = -next(amount for kind, amount in ledger if kind == "charge")
    back = sum(amount for kind, amount in ledger if kind == "refund")
    assert back == (price // 2 if behaviour == {"images": 1} else 0)
    for image in bench.images(job):
        served = httpx.get(
            f"{bench.stack.api_url}/storage/v1/object/generations/{image['storage_path']}",
            headers={"Authorization": f"Bearer {bench.stack.service_role_key}"},
        ).headers["content-type"]
        assert served == image["content_type"].replace("image/svg+xml", "application/octet-stream")
        assert bool(image["preview_path"]) == ("size" in behaviour)


@pytest.mark.parametrize(
    ("files", "kept"),
    [({0: "junk"}, 3), ({1: "gone", 2: "large"}, 2), ({0: "redirect", 1: "broken", 3: "bomb"}, 1)],
    ids=str,
)
def test_the_outputs_that_are_good_are_kept_and_the_others_given_back(bench, fake, files, kept):
    fake.next(files=files)

    job = bench.ask(num_outputs=4)
    bench.until(job, "completed")

    assert [image["position"] for image in bench.images(job)] == [*range(kept)]
    assert bench.user.ledger()[-1] == ("refund", 4 - kept)
    assert (bench.outcomes(job), len(fake.predictions)) == (["completed"], 1)


def test_an_output_that_hangs_past_the_deadline_does_not_cost_those_before_it(bench, fake):
    bench.db.execute("update public.models set deadline = '4 seconds' where id = %s", SCHNELL)
    fake.next(files={2: "hangs"})

    job = bench.ask(num_outputs=4)
    bench.until(job, "completed")

    assert [image["position"] for image in bench.images(job)] == [0, 1]
    bench.db.execute("update public.models set deadline = '5 minutes' where id = %s", SCHNELL)


def test_an_id_is_checkpointed_and_progress_told_long_before_the_prediction_ends(bench, fake):
    fake.next(seconds=4)
    job = bench.ask()

    key = bench.bought(job)

    assert fake.predictions[key]["status"] in ("starting", "processing")
    eventually(lambda: bench.user.get_job_status(job)["progress"] in (25, 50, 75))
    bench.user.cancel_generation(job)
    eventually(lambda: fake.predictions[key]["status"] == "canceled")


# --- what fails ---


@pytest.mark.parametrize(
    ("behaviour", "code", "detail", "bought"),
    [
        ({"ends": "failed", "error": MODERATED}, "moderated", MODERATED, 1),
        ({"ends": "failed", "error": "NSFW \0 \ud800 it"}, "moderated", "NSFW � ? it", 1),
        ({"ends": "failed", "error": "out of memory"}, "provider_error", "out of memory", 3),
        ({"answer": 422, "error": "- input.seed: bad"}, "invalid_input", "input.seed", 0),
        ({"removed": True}, "result_lost", "removed", 3),
        ({"file": "gone"}, "result_lost", "HTTP 404", 3),
        ({"file": "junk"}, "provider_error", "no image", 3),
        # Of what is refused by rules of ours, another would be the same.
        ({"file": "bomb"}, "output_refused", "too many pixels", 1),
        ({"file": "large"}, "output_refused", "more than 100000 bytes", 1),
        ({"file": "unsized"}, "output_refused", "more than 100000 bytes", 1),
        ({"file": "redirect"}, "output_refused", "host localhost is not allowed", 1),
        ({"output": "http://127.0.0.1:1/x.png"}, "output_refused", "not allowed", 1),
        ({"output": {"a": 1}}, "provider_error", "no output", 3),
        ({"file": "broken"}, "internal", "RemoteProtocolError", 1),  # not bought again
    ],
    ids=str,
)
def test_a_failure_has_its_code_is_given_back_and_bought_again_where_that_may_help(
    bench, behaviour, code, detail, bought
):
    fake = bench.fake
    fake.default = Behaviour(polls=1, **behaviour)

    job = bench.ask()
    bench.until(job, "failed")

    attempts = bench.attempts(job, "error_code, error_detail")
    assert {attempt["error_code"] for attempt in attempts} == {code}
    assert detail in attempts[-1]["error_detail"]
    error = bench.user.get_job_status(job)["error"]
    assert error["code"] == code and detail not in error["message"]
    assert (len(fake.predictions), len(fake.creates)) == (bought, max(bought, 1))
    assert bench.user.ledger()[-2:] == [("charge", -1), ("refund", 1)]
    assert not [request for request in fake.requests if request.path.startswith("/elsewhere")]


def test_a_throttled_create_waits_as_asked_and_uses_no_attempt(bench, fake):
    fake.next(answer=429, retry_after=1800)
    job = bench.ask()

    query = "select *, run_at - now() as wait from private.ready_jobs where run_at > now()"
    (ready,) = eventually(lambda: bench.db.execute(query))

    assert (ready["attempt"], ready["create_started_at"]) == (0, None)
    assert 1700 < ready["wait"].total_seconds() <= 1800
    bench.end_pause()
    bench.until(job, "completed")
    assert [attempt["attempt"] for attempt in bench.attempts(job, "attempt")] == [1, 1]
    assert (len(fake.creates), len(fake.predictions)) == (2, 1)


@pytest.fixture
def as_installed(bench: Bench) -> Iterator[None]:
    bench.db.execute("update private.settings set retry_base = default")
    yield
    bench.db.execute("update private.settings set retry_base = '0'")


@pytest.mark.usefixtures("as_installed")
@pytest.mark.parametrize("wish", [0, -5, "nan", "Thu, 01 Jan 1970 00:00:00 GMT", "9" * 50])
def test_a_provider_that_is_always_busy_is_asked_few_times_a_minute_whatever_it_says(
    bench, fake, wish
):
    fake.default = Behaviour(answer=429, retry_after=wish)
    query = "select max(run_at) - now() as wait from private.ready_jobs where run_at > now()"
    job, passed = bench.ask(), timedelta()

    while (passed := passed + eventually(lambda: bench.db.value(query))) < timedelta(minutes=1):
        bench.db.execute("update private.ready_jobs set run_at = now()")

    assert 1 <= len(fake.creates) <= 6
    bench.user.cancel_generation(job)


@pytest.mark.parametrize("behaviour", [{"polls": float("inf")}, {"answer": None, "stored": True}])
def test_past_the_models_deadline_a_prediction_is_canceled_and_a_lost_one_not_bought_again(
    bench, fake, behaviour
):
    deadline = "update public.models set deadline = %s where id = %s"
    bench.db.execute(deadline, "2 seconds", ONE_OUTPUT)
    fake.next(**behaviour)
    fake.list_answers.extend([500] * 100)

    job = bench.ask(ONE_OUTPUT)
    bench.until(job, "failed")

    assert bench.attempts(job, "error_code") == [{"error_code": "timeout"}]
    assert fake.creates[0].headers["cancel-after"] == "5s"  # the least they take
    (prediction,) = fake.predictions.values()
    assert len(fake.creates) == 1
    assert prediction["status"] == ("starting" if "answer" in behaviour else "canceled")
    assert bench.user.credits() == 20
    fake.list_answers.clear()
    bench.db.execute(deadline, "5 minutes", ONE_OUTPUT)


# --- creates whose answer is lost ---


@pytest.mark.parametrize("answer", [None, 408, 500, 200])
def test_what_a_create_without_an_answer_bought_is_found_and_taken_over(bench, fake, answer):
    fake.next(answer=answer, stored=True, hidden=2)

    job = bench.ask()
    bench.until(job, "completed")

    assert (len(fake.creates), len(fake.predictions)) == (1, 1)
    assert bench.attempts(job, "outcome, provider_job_id") == [
        {"outcome": "completed", "provider_job_id": next(iter(fake.predictions))}
    ]
    assert bench.processes[0].logged(rf"job\.found job={job}")
    assert bench.user.credits() == 19


def test_of_several_alike_the_oldest_that_is_nobodys_is_taken(bench, fake):
    bench.until(bench.ask(seed=7), "completed")
    (anothers,) = fake.predictions
    older, _ = [fake.bought(SCHNELL, fake.creates[0].body["input"]) for _ in range(2)]
    fake.next(answer=None, stored=False)

    job = bench.ask(seed=7)
    bench.until(job, "completed")

    assert older != anothers
    assert bench.attempts(job, "provider_job_id") == [{"provider_job_id": older}]
    assert len(fake.creates) == 2


def test_a_create_is_repeated_by_the_next_attempt_once_it_has_proven_to_be_lost(bench, fake):
    fake.next(answer=None, stored=False)

    job = bench.ask()
    bench.until(job, "completed")

    assert bench.outcomes(job) == ["retried", "completed"]
    assert (len(fake.creates), len(fake.predictions)) == (2, 1)
    listed = [r.path for r in fake.requests if (r.method, r.path) == ("GET", "/v1/predictions")]
    assert len(listed) >= 3  # by the first attempt twice, and again by the second


# --- an account that is refused ---


@pytest.mark.parametrize(
    ("behaviour", "account"),
    [
        ({"answer": 401}, 200),
        ({"answer": 402}, 200),
        ({"answer": 403}, 403),
        ({"failing_gets": 1, "get_status": 402}, 200),
        ({"file_answer": 402}, 200),
    ],
    ids=str,
)
def test_a_refused_account_pauses_the_provider_and_no_job_is_to_blame(
    bench, fake, behaviour, account
):
    if upload := behaviour.get("file_answer"):
        fake.file_answers.append(upload)
        job = bench.ask(EDIT, images=[bench.source(bench.user)])
    else:
        fake.next(**behaviour)
        fake.account_status = account
        job = bench.ask()
    charged = bench.user.ledger()

    ready = bench.released(job)
    until = "select paused_until - now() from private.breakers where name = 'replicate'"
    assert 50 < bench.db.value(until).total_seconds() <= 60
    assert ready["attempt"] == 0
    bought = next(iter(fake.predictions), None)
    assert ready["provider_job_id"] == bought  # what was bought is kept
    assert (ready["create_started_at"] is None) == ("answer" in behaviour)
    assert bench.user.ledger() == charged
    preview = bench.user.enqueued(params={"width": 64, "height": 64})
    bench.until(preview, "completed")  # others' jobs run meanwhile
    assert bench.status(job) == "queued"

    fake.account_status = 200
    bench.end_pause()
    bench.until(job, "completed")
    assert len(fake.predictions) == 1


@pytest.mark.parametrize("status", [402, 403])
def test_a_job_that_is_always_refused_stops_no_other(bench, fake, status):
    fake.refused["forbidden"] = status
    refused = User(bench.db).has(20).enqueued("forbidden", SCHNELL)
    honest = [bench.ask() for _ in range(6)]

    for job in honest:
        bench.until(job, "completed")

    eventually(lambda: bench.outcomes(refused))
    bench.end_pause()
    bench.until(refused, "failed")
    given_back = ["released"] if status < 403 else []
    assert bench.outcomes(refused) == [*given_back, "retried", "retried", "failed"]


# --- image to image ---


def test_two_users_whose_creates_are_lost_do_not_get_each_others_pictures(bench, fake):
    users = [bench.user, User(bench.db).has(credits=20)]
    files = [CAT, OTHER_CAT]
    paths = [bench.source(user, file) for user, file in zip(users, files, strict=True)]
    for _ in users:
        fake.next(answer=None, stored=True, hidden=2)

    # The same words, the same seed, and both answers lost at the same time.
    jobs = [bench.ask(EDIT, u, image=path, seed=7) for u, path in zip(users, paths, strict=True)]
    for job in jobs:
        bench.until(job, "completed")

    bought = [bench.attempts(job, "provider_job_id")[-1]["provider_job_id"] for job in jobs]
    assert [fake.source(key) for key in bought] == files
    # Storage cannot be reached from outside: each was uploaded, by no name that tells of its user.
    assert sorted(file for _, file in fake.uploads.values()) == sorted(files)
    assert all(re.fullmatch(r"[0-9a-f]{32}\.png", name) for name, _ in fake.uploads.values())
    sent = {create.body["input"]["image"] for create in fake.creates}
    assert sent == {f"{fake.url}/files/{key}" for key in fake.uploads} and len(sent) == 2


PHOTO = Image.linear_gradient("L").resize((90, 60)).convert("RGB")
PHOTO.paste("red", (0, 0, 20, 20))
BANNER = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200)


def lying(kind: str, orientation: int = 6, **options: Any) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(PHOTO, kind, exif=exif, **options)


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b" ", b"a cat", b"<html><body>a cat</body></html>", BANNER, HEIC),
        *(encoded(PHOTO, kind)[:-200] for kind in ("JPEG", "PNG", "WEBP")),
        b"\x89PNG\r\n\x1a\n" + bytes(500),
        encoded(PHOTO, "TIFF"),
        encoded(Image.new("L", (8000, 8000)), "PNG"),
        CAT + bytes(100_000),
    ],
    ids=lambda body: str(body[:20]),
)
def test_what_is_no_picture_is_refused_at_once_and_nothing_is_bought(bench, fake, body):
    job = bench.ask(
        EDIT, images=[bench.source(bench.user, name="good"), bench.source(bench.user, body)]
    )
    bench.until(job, "failed")

    (attempt,) = bench.attempts(job, "error_code, error_detail")
    assert attempt["error_code"] == "invalid_input"
    assert attempt["error_detail"].startswith("source: ")
    assert (fake.creates, bench.user.credits()) == ([], 20)


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        *((encoded(PHOTO, kind), None) for kind in ("PNG", "JPEG", "WEBP")),
        *((lying("JPEG", turn), "JPEG") for turn in range(2, 9)),
        (lying("JPEG", progressive=True), "JPEG"),
        (encoded(PHOTO.convert("CMYK"), "JPEG"), None),
        *((lying("JPEG", turn), None) for turn in (1, 9)),
        *((lying(kind), "PNG") for kind in ("PNG", "WEBP", "AVIF")),
        *((encoded(PHOTO, kind), "PNG") for kind in ("AVIF", "GIF")),
        (CAT + b"<script>", None),
        (encoded(PHOTO, "MPO", save_all=True, append_images=[PHOTO]), None),  # as of telephones
    ],
)
def test_a_picture_is_handed_over_as_it_is_seen_whatever_it_is_called(bench, fake, body, kind):
    job = bench.ask(EDIT, image=bench.source(bench.user, body, "mein Bild (1).gif"))
    bench.until(job, "completed")

    ((name, given),) = fake.uploads.values()
    if kind is None:
        assert given == body
    sent, seen = (
        Image.open(io.BytesIO(given)),
        ImageOps.exif_transpose(Image.open(io.BytesIO(body))),
    )
    assert (sent.format, 0x0112 in sent.getexif()) == (
        kind or sent.format,
        kind is None and b"Exif" in body,
    )
    assert name.rpartition(".")[2] == {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}[sent.format]
    difference = ImageChops.difference(sent.convert("RGB"), seen.convert("RGB"))
    assert max(ImageStat.Stat(difference).mean) < 6


def test_ones_own_picture_is_a_source_as_it_was_stored(bench, fake):
    made = bench.ask()
    bench.until(made, "completed")
    (picture,) = bench.images(made)

    job = bench.ask(EDIT, image=f"generations/{picture['storage_path']}")
    bench.until(job, "completed")

    ((_, given),) = fake.uploads.values()
    assert given == bench.stored_file(picture["storage_path"])


def test_a_source_that_is_deleted_meanwhile_fails_its_job_at_once(bench, fake):
    path = bench.source(bench.user)
    httpx.request(
        "DELETE",
        f"{bench.stack.api_url}/storage/v1/object/inputs",
        json={"prefixes": [path]},
        headers={"Authorization": f"Bearer {bench.stack.service_role_key}"},
    ).raise_for_status()

    job = bench.ask(EDIT, image=path)
    bench.until(job, "failed")

    assert bench.attempts(job, "error_code, error_detail") == [
        {"error_code": "invalid_input", "error_detail": "source: no such file any more"}
    ]
    assert (fake.creates, bench.user.credits()) == ([], 20)


def test_an_answer_that_names_another_jobs_prediction_is_none(bench, fake):
    bench.until(bench.ask(), "completed")
    (anothers,) = fake.predictions
    fake.next(is_mixed_up=True)

    job = bench.ask()
    bench.until(job, "completed")

    ((bought, outcome),) = [row.values() for row in bench.attempts(job, "provider_job_id, outcome")]
    assert bought not in (anothers, None) and outcome == "completed"
    assert fake.predictions[anothers]["status"] == "succeeded"
    assert (len(fake.creates), bench.user.credits()) == (2, 18)


@pytest.mark.parametrize("step", ["run", "create"])
def test_a_purchase_is_stopped_where_its_user_is_deleted(bench, fake, step):
    fake.next(seconds=60, slow={"create": 1 if step == "create" else 0})
    job = bench.ask()
    if step == "create":
        fake.until(lambda: fake.creates)
    else:
        bench.bought(job)

    bench.db.execute("delete from auth.users where id = %s", bench.user.id)

    (key,) = fake.predictions
    eventually(lambda: fake.predictions[key]["status"] == "canceled", within=5)
    assert bench.processes[0].is_running()
