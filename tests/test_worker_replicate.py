"""Real worker processes against the fake of Replicate's API: what is bought, resumed and refused.

What a test counts is purchases: `fake.creates` are requests to buy, `fake.predictions` what was
bought.
"""

from __future__ import annotations

import io
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_replicate
import httpx
import pytest
from actors import User
from database import Database
from fake_replicate import MODERATED, FakeReplicate
from PIL import Image
from psycopg.types.json import Jsonb
from worker_process import WorkerProcess, Workers, eventually

import worker
from stack import Stack

SCHNELL = "black-forest-labs/flux-schnell"
ONE_OUTPUT = "black-forest-labs/flux-1.1-pro"
EDIT = "acme/edit"
EDIT_SCHEMA = {
    "properties": {
        "prompt": {"type": "string"},
        "image": {"type": "string"},
        "seed": {"type": "integer"},
        "images": {"type": "array", "items": {"type": "string"}},
    }
}

fake = fake_replicate.fake_replicate


class Bench(Workers):
    """Workers that know the fake, and a user who asks for its pictures."""

    def __init__(self, db: Database, stack: Stack, folder: Path, fake: FakeReplicate) -> None:
        super().__init__(db, stack, folder)
        self.fake = fake
        self.user = User(db).has(credits=20)
        self.environment |= {
            "REPLICATE_API_URL": fake.url,
            "REPLICATE_API_TOKEN": fake.token,
            "REPLICATE_SETTLE_SECONDS": "0.2",
            "WORKER_POLL_SECONDS": "0.1",
        }
        self.extra_secrets = {fake.token, f"{fake.origin}/files"}

    def ask(self, model: str = SCHNELL, **params: Any) -> str:
        return self.user.enqueued("a lighthouse at dusk", model, params=params)

    def bought(self, job: str) -> str:
        """Wait until the job's prediction is checkpointed; return its id."""
        return str(eventually(lambda: self.checkpointed(job))["provider_job_id"])

    def error(self, job: str) -> tuple[str, str]:
        """Wait until the job has failed; return its code and the last attempt's detail."""
        self.until(job, "failed")
        query = "select error_code, error_detail from private.attempts order by token desc limit 1"
        attempt = self.db.row(query)
        code = self.db.value("select error_code from public.generations where id = %s", job)
        assert code == attempt["error_code"]
        return code, attempt["error_detail"]

    def waiting(self) -> dict[str, Any]:
        """Wait until a job is queued for later; return its row."""
        query = "select *, run_at - now() as wait from private.ready_jobs where run_at > now()"
        (row,) = eventually(lambda: self.db.execute(query))
        return row

    def released(self, job: str) -> dict[str, Any]:
        """Wait until a worker has put the job back; return its row."""
        eventually(lambda: self.outcomes(job) == ["released"])
        query = "select attempt, provider_job_id, create_started_at from private.ready_jobs"
        return self.db.row(f"{query} where job_id = %s", job)

    def end_pause(self) -> None:
        """Let the provider's pause be over."""
        self.db.execute("update private.breakers set paused_until = now()")
        self.db.execute("update private.ready_jobs set run_at = now()")

    def put_source(self, path: str, body: bytes) -> None:
        """Have a file in bucket inputs, in Storage and in this database's list of files."""
        headers = {"Authorization": f"Bearer {self.stack.service_role_key}"}
        httpx.post(
            f"{self.stack.api_url}/storage/v1/object/inputs/{path}",
            content=body,
            headers=headers | {"content-type": "image/png"},
        ).raise_for_status()
        query = "insert into storage.objects (bucket_id, name) values ('inputs', %s)"
        self.db.execute(query, path)

    def attempts_allowed(self, count: int) -> None:
        self.db.execute("update private.settings set max_attempts = %s", count)


@pytest.fixture
def bench(db: Database, stack: Stack, fake: FakeReplicate, tmp_path: Path) -> Iterator[Bench]:
    db.lift_limits()
    db.execute("update public.models set is_active = true")
    db.execute("update private.settings set retry_base = '0'")
    fake.default = fake_replicate.Behaviour(polls=1)
    with Bench(db, stack, tmp_path, fake) as bench:
        yield bench


# --- the plain path ---


def test_a_picture_that_costs_a_core_is_stored_bought_once_and_delays_no_other(bench, fake, db):
    process = bench.start()
    fake.next(file="dear")
    dear = bench.ask(num_outputs=1)
    bench.bought(dear)

    others = [bench.ask(num_outputs=1) for _ in range(6)]
    for job in [*others, dear]:
        bench.until(job, "completed", within=40)

    process.logged(f"picture.bare job={dear} lacks=time")
    assert len(fake.creates) == 7
    ended = "select id from public.generations order by finished_at desc limit 1"
    assert str(db.value(ended)) == dear
    image = db.row("select * from public.images where generation_id = %s", dear)
    assert (image["width"], image["height"], image["bytes"] > 900_000) == (3000, 3000, True)
    assert (image["preview_path"], image["blurhash"]) == (None, None)
    assert bench.outcomes(dear) == ["completed"]


def test_a_prediction_is_created_once_with_version_input_and_an_end(bench, fake, db):
    bench.start()

    job = bench.ask(num_outputs=2, seed=7)
    bench.until(job, "completed")

    (create,) = fake.creates
    assert create.body == {
        "version": SCHNELL,
        "input": db.value("select provider_input from public.generations"),
    }
    deadline = db.value("select deadline from public.models where id = %s", SCHNELL)
    assert create.headers["cancel-after"] == f"{deadline.seconds}s"
    assert "prefer" not in create.headers  # waiting would delay the checkpoint


def test_the_files_of_a_prediction_are_stored_with_the_type_their_bytes_have(bench, fake, db):
    fake.next(format="png", size=(96, 64))  # served as image/webp
    bench.start()

    job = bench.ask(num_outputs=2)
    bench.until(job, "completed")

    images = db.execute("select * from public.images order by position")
    files = [bench.stored_file(image["storage_path"]) for image in images]
    assert [Image.open(io.BytesIO(file)).size for file in files] == [(96, 64)] * 2
    assert [image["bytes"] for image in images] == [len(file) for file in files]
    assert {image["content_type"] for image in images} == {"image/png"}
    assert [image["storage_path"][-5:] for image in images] == ["0.png", "1.png"]


def test_a_model_with_one_output_is_stored_like_a_list_of_one(bench, db):
    bench.start()

    bench.until(bench.ask(ONE_OUTPUT), "completed")

    assert db.value("select content_type from public.images") == "image/webp"


def test_the_id_is_checkpointed_long_before_the_prediction_ends(bench, fake):
    fake.next(seconds=2)
    bench.start()
    job = bench.ask()

    key = bench.bought(job)

    assert fake.predictions[key]["status"] in ("starting", "processing")
    bench.until(job, "completed")


def test_compute_seconds_and_the_providers_id_are_kept_with_the_attempt(bench, fake, db):
    fake.next(metrics={"predict_time": 1.25})
    bench.start()

    bench.until(bench.ask(), "completed")

    attempt = db.row("select provider_seconds, provider_job_id from private.attempts")
    assert attempt == {"provider_seconds": 1.25, "provider_job_id": next(iter(fake.predictions))}


def test_what_a_failed_prediction_took_is_on_record_and_free(bench, fake, db):
    fake.next(ends="failed", error=MODERATED, metrics={"predict_time": 1.25})
    bench.start()

    bench.until(bench.ask(), "failed")

    attempt = db.row("select provider_seconds, cost_usd from private.attempts")
    assert attempt == {"provider_seconds": 1.25, "cost_usd": 0}


def test_progress_is_read_from_the_logs(bench, fake, db):
    db.execute("update private.settings set heartbeat = '0.2 seconds'")
    fake.next(seconds=4)
    bench.start()
    job = bench.ask()

    eventually(lambda: bench.user.get_job_status(job)["progress"] in (25, 50, 75))


def test_polling_goes_on_when_the_api_fails_in_between(bench, fake):
    fake.next(failing_gets=2)
    bench.start()

    job = bench.ask()
    bench.until(job, "completed")

    assert bench.outcomes(job) == ["completed"]
    assert len(fake.creates) == 1


# --- how many images ---


def test_more_outputs_than_asked_for_are_not_stored(bench, fake, db):
    fake.next(images=4)
    bench.start()

    bench.until(bench.ask(num_outputs=2), "completed")

    assert db.value("select count(*) from public.images") == 2
    assert bench.user.credits() == 18


def test_outputs_that_are_missing_are_given_back(bench, fake, db):
    fake.next(images=1)
    bench.start()

    bench.until(bench.ask(num_outputs=4), "completed")

    assert db.value("select count(*) from public.images") == 1
    assert bench.user.ledger()[-2:] == [("charge", -4), ("refund", 3)]


# --- what fails ---


def test_a_moderated_prediction_fails_at_once_and_is_given_back(bench, fake):
    fake.next(ends="failed", error=MODERATED)
    bench.start()

    job = bench.ask()

    assert bench.error(job) == ("moderated", MODERATED)
    assert bench.user.get_job_status(job)["error"]["message"] != MODERATED
    assert bench.user.ledger()[-2:] == [("charge", -1), ("refund", 1)]
    assert len(fake.creates) == 1


def test_a_failed_prediction_is_bought_again_until_attempts_run_out(bench, fake):
    fake.default = fake_replicate.Behaviour(polls=1, ends="failed", error="CUDA out of memory")
    bench.start()

    job = bench.ask()

    assert bench.error(job) == ("provider_error", "CUDA out of memory")
    assert bench.outcomes(job) == ["retried", "retried", "failed"]
    assert len(fake.predictions) == 3
    assert bench.user.credits() == 20


def test_a_text_that_postgres_cannot_store_does_not_keep_the_job_from_failing(bench, fake):
    fake.next(ends="failed", error="NSFW \0 \ud800 content")
    bench.start()

    job = bench.ask()

    assert bench.error(job)[0] == "moderated"


def test_a_refused_input_is_not_tried_again(bench, fake):
    fake.next(answer=422, error="- input.seed: must be an integer")
    bench.start()

    job = bench.ask()

    code, detail = bench.error(job)
    assert (code, "input.seed" in detail) == ("invalid_input", True)
    assert (len(fake.creates), len(fake.predictions)) == (1, 0)
    assert bench.user.credits() == 20


def test_a_throttled_create_waits_as_asked_and_uses_no_attempt(bench, fake, db):
    fake.next(answer=429, retry_after=1800)
    bench.start()
    job = bench.ask()

    ready = bench.waiting()

    assert (ready["attempt"], ready["create_started_at"]) == (0, None)
    assert 1700 < ready["wait"].total_seconds() <= 1800
    db.execute("update private.ready_jobs set run_at = now()")
    bench.until(job, "completed")
    assert db.value("select max(attempt) from private.attempts") == 1
    assert (len(fake.creates), len(fake.predictions)) == (2, 1)


def test_a_result_that_is_gone_is_bought_anew_while_attempts_remain(bench, fake):
    fake.next(removed=True)
    bench.start()

    job = bench.ask()
    bench.until(job, "completed")

    assert bench.outcomes(job) == ["retried", "completed"]
    assert len(fake.predictions) == 2


@pytest.mark.parametrize("behaviour", [{"removed": True}, {"file": "gone"}], ids=str)
def test_a_result_that_is_gone_on_the_last_attempt_is_lost_and_given_back(bench, fake, behaviour):
    bench.attempts_allowed(1)
    fake.next(**behaviour)
    bench.start()

    assert bench.error(bench.ask())[0] == "result_lost"
    assert len(fake.creates) == 1
    assert bench.user.credits() == 20


def test_a_prediction_past_the_models_deadline_is_canceled(bench, fake, db):
    db.execute("update public.models set deadline = '1 second'")
    fake.next(polls=float("inf"))
    bench.start()
    job = bench.ask()
    key = bench.bought(job)

    assert bench.error(job)[0] == "timeout"

    assert fake.predictions[key]["status"] == "canceled"
    assert fake.creates[0].headers["cancel-after"] == "5s"  # the least they take


def test_without_a_token_jobs_for_replicate_fail_and_others_do_not(bench, fake):
    bench.attempts_allowed(1)
    bench.start(REPLICATE_API_TOKEN="")

    job, other = bench.ask(), bench.user.enqueued(params={"width": 64, "height": 64})

    assert bench.error(job)[0] == "internal"
    bench.until(other, "completed")
    assert fake.requests == []


# --- creates whose answer is lost ---


@pytest.mark.parametrize("answer", [None, 408, 500, 200])
def test_what_a_create_without_an_answer_bought_is_found_and_taken_over(bench, fake, db, answer):
    fake.next(answer=answer, stored=True, polls=3)
    process = bench.start()

    job = bench.ask()
    bench.until(job, "completed")

    assert (len(fake.creates), len(fake.predictions)) == (1, 1)
    assert bench.outcomes(job) == ["completed"]
    assert db.value("select provider_job_id from private.attempts") in fake.predictions
    assert process.logged(r"job\.found .* candidates=1")
    assert bench.user.credits() == 19


def test_it_is_looked_for_until_it_shows(bench, fake):
    fake.next(answer=None, stored=True, hidden=2)
    bench.start(REPLICATE_SETTLE_SECONDS=20)

    bench.until(bench.ask(), "completed")

    assert (len(fake.creates), len(fake.predictions)) == (1, 1)


def test_of_two_candidates_the_older_is_taken(bench, fake, db):
    job = bench.ask()
    sent = db.value("select provider_input from public.generations")
    older, _ = fake.bought(SCHNELL, sent), fake.bought(SCHNELL, sent)
    fake.next(answer=None, stored=False)

    bench.start()
    bench.until(job, "completed")

    assert len(fake.creates) == 1
    assert db.value("select provider_job_id from private.attempts") == older


def test_two_jobs_alike_do_not_share_what_one_of_them_has_bought(bench, fake, db):
    bench.start()
    bench.until(bench.ask(seed=7), "completed")
    fake.next(answer=None, stored=True)

    bench.until(bench.ask(seed=7), "completed")

    assert (len(fake.creates), len(fake.predictions)) == (2, 2)
    bought = db.execute("select provider_job_id from private.attempts order by token")
    assert [row["provider_job_id"] for row in bought] == list(fake.predictions)


def test_a_create_is_repeated_by_the_next_attempt_once_it_has_proven_to_be_lost(bench, fake):
    fake.next(answer=None, stored=False)
    bench.start()

    job = bench.ask()
    bench.until(job, "completed")

    assert bench.outcomes(job) == ["retried", "completed"]
    assert (len(fake.creates), len(fake.predictions)) == (2, 1)
    listed = [r.path for r in fake.requests if r.path == "/v1/predictions" and r.method == "GET"]
    assert len(listed) >= 3  # by the first attempt twice, and again by the second


def test_while_the_list_cannot_be_read_nothing_is_created_again(bench, fake, db):
    db.execute("update public.models set deadline = '2 seconds'")
    fake.next(answer=None, stored=True)
    fake.list_answers.extend([500] * 100)
    bench.start()

    assert bench.error(bench.ask())[0] == "timeout"

    assert (len(fake.creates), len(fake.predictions)) == (1, 1)
    assert bench.user.credits() == 20


# --- an account that is refused ---


@pytest.mark.parametrize(("answer", "account"), [(401, 200), (402, 200), (403, 403)])
def test_a_refused_account_pauses_the_provider_and_no_job_is_to_blame(
    bench, fake, db, answer, account
):
    fake.next(answer=answer)
    fake.account_status = account
    process = bench.start(WORKER_SLOTS=1)  # with more, a claim under way may not see the pause yet
    job = bench.ask()
    charged = bench.user.ledger()

    ready = bench.released(job)
    until = "select paused_until - now() from private.breakers where name = 'replicate'"
    assert 50 < db.value(until).total_seconds() <= 60
    assert (ready["attempt"], ready["create_started_at"]) == (0, None)
    assert bench.user.ledger() == charged
    assert process.logged(r"provider\.refused provider=replicate")
    bench.end_pause()
    bench.until(job, "completed")
    assert (len(fake.creates), len(fake.predictions)) == (2, 1)


@pytest.mark.parametrize("status", [401, 402, 403])
def test_a_job_that_is_always_refused_stops_no_other(bench, fake, status):
    fake.refused["forbidden"] = status
    bench.attempts_allowed(3)
    refused = User(bench.db).has(20).enqueued("forbidden", SCHNELL)
    honest = [bench.ask() for _ in range(6)]
    bench.start()

    for job in honest:
        bench.until(job, "completed")

    eventually(lambda: bench.outcomes(refused))
    bench.end_pause()
    bench.until(refused, "failed")
    given_back = ["released"] if status < 403 else []
    assert bench.outcomes(refused) == [*given_back, "retried", "retried", "failed"]


def test_a_model_that_refuses_everybody_is_paused_alone(bench, fake, db):
    fake.refused[ONE_OUTPUT] = 403
    bench.attempts_allowed(3)
    for _ in range(3):
        User(db).has(20).enqueue("a lighthouse", ONE_OUTPUT)
    bench.start()

    paused = eventually(lambda: db.execute("select name from private.paused_now"))
    bench.until(bench.ask(), "completed")

    assert paused == [{"name": ONE_OUTPUT}]


def test_while_one_provider_is_paused_the_others_jobs_run(bench, fake):
    fake.default = fake_replicate.Behaviour(answer=402)
    bench.start()
    waiting = [bench.ask() for _ in range(5)]
    eventually(lambda: fake.creates)

    preview = bench.user.enqueued(params={"width": 64, "height": 64})
    bench.until(preview, "completed")

    assert {bench.status(job) for job in waiting} <= {"queued", "processing"}
    fake.default = fake_replicate.Behaviour(polls=1)
    eventually(lambda: [bench.status(job) for job in waiting] == ["queued"] * 5)
    bench.end_pause()
    for job in waiting:
        bench.until(job, "completed")
    assert len(fake.predictions) == 5


def test_an_account_refused_while_polling_keeps_what_was_bought(bench, fake):
    fake.next(failing_gets=1, get_status=402)
    bench.start()
    job = bench.ask()

    assert bench.released(job)["provider_job_id"] in fake.predictions

    bench.end_pause()
    bench.until(job, "completed")
    assert (len(fake.creates), len(fake.predictions)) == (1, 1)


# --- odd predictions ---


def test_a_status_nobody_knows_is_waited_for(bench, fake):
    fake.next(running="pondering", polls=3)
    bench.start()

    bench.until(bench.ask(), "completed")


def test_an_object_with_addresses_is_an_output_like_a_list(bench, fake, db):
    fake.next(polls=float("inf"))
    bench.start()
    job = bench.ask(num_outputs=2)
    key = bench.bought(job)

    files = [f"{fake.origin}/files/{key}/out-{position}.webp" for position in range(2)]
    output = {"revised_prompt": "a lighthouse", "images": files}
    fake.predictions[key] |= {"output": output, "status": "succeeded"}

    bench.until(job, "completed")
    assert db.value("select count(*) from public.images") == 2


def test_what_an_attempt_costs_is_counted_as_the_provider_does(bench, fake, db):
    db.execute("update public.models set cost_usd = 0.003, cost_unit = 'image'")
    fake.next(metrics={"image_count": 4})
    bench.start()

    bench.until(bench.ask(num_outputs=2), "completed")

    assert float(db.value("select cost_usd from private.attempts")) == pytest.approx(0.012)


# --- image to image ---


def with_a_source(bench: Bench) -> str:
    """Upload a source image as its user does, and add a model that takes one."""
    bench.db.execute(
        "insert into public.models (id, provider, provider_ref, title, price_credits,"
        " paid_price_credits, client_inputs, image_inputs, input_schema) values"
        " (%s, 'replicate', %s, 'Edit', 1, 0, '{image,images,seed}', '{image,images}', %s)",
        EDIT,
        EDIT,
        Jsonb(EDIT_SCHEMA),
    )
    path = f"{bench.user.id}/a cat.png"
    bench.put_source(path, b"a cat")
    return path


def test_a_source_image_is_uploaded_where_storage_cannot_be_reached_from_outside(bench, fake, db):
    path = with_a_source(bench)
    bench.start()

    bench.until(bench.ask(EDIT, image=path), "completed")

    (key,) = fake.uploads
    assert fake.uploads[key] == ("a cat.png", b"a cat")
    assert fake.creates[0].body["input"]["image"] == f"{fake.url}/files/{key}"
    assert db.value("select provider_input ->> 'image' from public.generations") == path


def test_a_lost_create_is_found_by_the_address_its_source_had(bench, fake):
    path = with_a_source(bench)
    fake.next(slow={"create": 30})
    process = bench.start()
    job = bench.ask(EDIT, image=path)
    fake.until(lambda: fake.creates)

    process.kill()
    finished_by_another(bench, job)

    assert (len(fake.uploads), len(fake.creates)) == (1, 1)


def test_two_users_whose_creates_are_lost_do_not_get_each_others_pictures(bench, fake, db):
    """The same words, the same seed, and both answers lost at the same time."""
    path, other = with_a_source(bench), User(db).has(credits=20)
    bench.put_source(f"{other.id}/a cat.png", b"another cat")
    for _ in range(2):
        fake.next(answer=None, stored=True, hidden=2)
    jobs = [bench.ask(EDIT, image=path, seed=7)]
    params = {"image": f"{other.id}/a cat.png", "seed": 7}
    jobs.append(other.enqueued("a lighthouse at dusk", EDIT, params=params))

    bench.start(REPLICATE_SETTLE_SECONDS=20)
    for job in jobs:
        bench.until(job, "completed")

    query = "select provider_job_id from private.attempts where generation_id = %s"
    sources = [fake.source(db.value(query, job)) for job in jobs]
    assert sources == [b"a cat", b"another cat"]
    assert len(fake.creates) == 2


def test_an_answer_that_names_another_jobs_prediction_is_none(bench, fake, db):
    bench.start()
    bench.until(bench.ask(), "completed")
    (anothers,) = fake.predictions
    fake.next(is_mixed_up=True)

    job = bench.ask()
    bench.until(job, "completed")

    query = "select provider_job_id from private.attempts where generation_id = %s"
    assert db.value(query, job) not in (anothers, None)
    assert fake.predictions[anothers]["status"] == "succeeded"
    assert bench.outcomes(job) == ["completed"]
    assert (len(fake.creates), bench.user.credits()) == (2, 18)


def test_a_purchase_is_stopped_where_its_user_is_deleted(bench, fake, db):
    fake.next(seconds=60)
    process = bench.start()
    job = bench.ask()
    key = bench.bought(job)

    db.execute("delete from auth.users where id = %s", bench.user.id)

    eventually(lambda: fake.predictions[key]["status"] == "canceled", within=5)
    assert process.logged(f"job.canceled job={job}")
    assert process.is_running()


def test_a_purchase_is_stopped_where_its_user_is_deleted_during_the_create(bench, fake, db):
    db.execute("update private.settings set heartbeat = '10 minutes', lease = '1 hour'")
    fake.next(slow={"create": 1}, seconds=60)
    bench.start()
    bench.ask()
    fake.until(lambda: fake.creates)

    db.execute("delete from auth.users where id = %s", bench.user.id)

    (key,) = fake.predictions
    eventually(lambda: fake.predictions[key]["status"] == "canceled", within=5)


def test_an_account_that_may_not_upload_is_paused_too(bench, fake):
    path = with_a_source(bench)
    fake.file_answers.append(402)
    bench.start()
    job = bench.ask(EDIT, images=[path])

    assert bench.released(job)["attempt"] == 0

    assert fake.creates == []
    bench.end_pause()
    bench.until(job, "completed")


# --- what is downloaded ---


@pytest.mark.parametrize(
    ("file", "detail"),
    [
        ("junk", "no image"),
        ("bomb", "no image: DecompressionBomb"),
        ("large", "more than 100000 bytes"),
        ("unsized", "more than 100000 bytes"),
        ("redirect", "host localhost is not allowed"),
    ],
)
def test_a_bad_file_is_the_providers_error(bench, fake, file, detail):
    bench.attempts_allowed(1)
    fake.large_bytes = 2**20
    fake.next(file=file)
    bench.start(MAX_IMAGE_BYTES=100_000)

    job = bench.ask()

    code, found = bench.error(job)
    assert (code, detail in found) == ("provider_error", True), found
    assert not [request for request in fake.requests if request.path.startswith("/elsewhere")]


@pytest.mark.parametrize(
    "output", ["http://127.0.0.1:1/x.png", "https://replicate.delivery.evil.com/x.png", {"a": 1}]
)
def test_an_output_elsewhere_or_of_another_shape_is_refused(bench, fake, output):
    bench.attempts_allowed(1)
    fake.next(output=output)
    bench.start()

    assert bench.error(bench.ask())[0] == "provider_error"


def test_a_broken_download_is_repeated_but_not_bought_again(bench, fake):
    fake.next(file="broken")
    bench.start()

    job = bench.ask()

    assert bench.error(job)[0] == "internal"
    assert len([request for request in fake.requests if request.path.startswith("/files")]) == 3
    assert len(fake.creates) == 1


def test_the_token_goes_to_the_api_and_never_to_a_file(bench, fake):
    bench.start()

    bench.until(bench.ask(num_outputs=2), "completed")

    with_token = {r.path.split("/")[1] for r in fake.requests if "authorization" in r.headers}
    without = {r.path.split("/")[1] for r in fake.requests if "authorization" not in r.headers}
    assert (with_token, without) == ({"v1"}, {"files"})


# --- what a dead or stopped worker bought ---


def finished_by_another(bench: Bench, job: str) -> WorkerProcess:
    """Let the lease of a dead worker's job run out, and another worker finish it."""
    bench.backdate_leases()
    process = bench.start()
    bench.until(job, "completed")
    return process


def test_a_prediction_of_a_killed_worker_is_resumed_not_bought_again(bench, fake, db):
    fake.next(seconds=1)
    process = bench.start()
    job = bench.ask()
    key = bench.bought(job)

    process.kill()
    finished_by_another(bench, job)

    assert len(fake.creates) == 1
    assert bench.outcomes(job) == ["retried", "completed"]
    assert db.value("select count(*) from public.images") == 1
    history = db.execute("select distinct provider_job_id from private.attempts")
    assert history == [{"provider_job_id": key}]
    assert bench.user.credits() == 19


def test_a_worker_killed_while_it_stores_leaves_one_set_of_images(bench, fake, db):
    fake.next(slow={"file": 0.7})
    process = bench.start()
    job = bench.ask(num_outputs=2)
    fake.until(lambda: any(r.path.startswith("/files") for r in fake.requests))

    process.kill()
    finished_by_another(bench, job)

    assert len(fake.creates) == 1
    assert db.value("select count(*) from public.images") == 2
    assert bench.user.credits() == 18


def test_a_stopped_worker_leaves_its_prediction_running_for_the_next(bench, fake, db):
    fake.next(seconds=1.5)
    process = bench.start(WORKER_GRACE_SECONDS=0)
    job = bench.ask()
    key = bench.bought(job)

    assert process.stop() == 0

    ready = db.row("select attempt, provider_job_id from private.ready_jobs")
    assert ready == {"attempt": 0, "provider_job_id": key}
    finished_by_another(bench, job)
    assert bench.outcomes(job) == ["released", "completed"]
    assert len(fake.creates) == 1


def test_a_worker_stopped_during_a_create_keeps_what_it_buys(bench, fake):
    fake.next(slow={"create": 1})
    process = bench.start(WORKER_GRACE_SECONDS=0)
    job = bench.ask()
    fake.until(lambda: fake.creates)

    assert process.stop() == 0

    finished_by_another(bench, job)
    assert bench.outcomes(job) == ["released", "completed"]
    assert len(fake.creates) == 1


def test_a_worker_killed_during_a_create_leaves_the_next_to_find_what_it_bought(bench, fake):
    fake.next(slow={"create": 30})
    process = bench.start()
    job = bench.ask()
    fake.until(lambda: fake.creates)

    process.kill()
    finished_by_another(bench, job)

    assert (len(fake.creates), len(fake.predictions)) == (1, 1)
    assert bench.outcomes(job) == ["retried", "completed"]
    assert bench.user.credits() == 19


def test_a_worker_killed_before_its_create_arrived_is_not_the_last_to_try(bench, fake):
    fake.next(slow={"create": 30}, stored=False, answer=500)
    process = bench.start()
    job = bench.ask()
    fake.until(lambda: fake.creates)

    process.kill()
    finished_by_another(bench, job)

    assert (len(fake.creates), len(fake.predictions)) == (2, 1)


def test_a_worker_stopped_while_it_looks_leaves_the_next_to_look_on(bench, fake):
    fake.next(answer=None, stored=True, hidden=4)
    process = bench.start(WORKER_GRACE_SECONDS=0, REPLICATE_SETTLE_SECONDS=60)
    job = bench.ask()
    fake.until(lambda: any(r.method == "GET" for r in fake.requests))

    assert process.stop() == 0

    assert bench.released(job)["create_started_at"] is not None
    bench.environment["REPLICATE_SETTLE_SECONDS"] = "20"
    finished_by_another(bench, job)
    assert (len(fake.creates), len(fake.predictions)) == (1, 1)


GATE = """
create function public.wait_at_the_gate() returns trigger language plpgsql as $$
begin
  perform pg_advisory_xact_lock(1);
  return new;
end;
$$;
create trigger gate before insert on private.running_jobs
for each row execute function public.wait_at_the_gate();
"""


@pytest.mark.parametrize("is_taken", [True, False], ids=["job taken", "job still its own"])
def test_a_worker_that_was_frozen_before_its_create_looks_whether_it_may(bench, fake, db, is_taken):
    """Meanwhile its lease may have run out, and another worker may have looked and bought."""
    db.execute(GATE)
    gate = db.connect()
    gate.execute("select pg_advisory_lock(1)")
    process = bench.start()
    job = bench.ask()
    waiting = "select count(*) from pg_locks where locktype = 'advisory' and not granted"
    eventually(lambda: db.value(waiting))

    process.signal(signal.SIGSTOP)
    gate.execute("select pg_advisory_unlock(1)")
    eventually(lambda: db.value("select count(*) from private.running_jobs"))
    if is_taken:
        bench.backdate_leases()
        assert db.value("select private.recover_stale_jobs()") == 1
    time.sleep(worker.CREATE_WITHIN_SECONDS + 0.1)  # its clock is the one thing not to be moved
    process.signal(signal.SIGCONT)
    if is_taken:
        process.logged(r"job\.lost")
        assert fake.creates == []
        finished_by_another(bench, job)
    bench.until(job, "completed")
    assert (len(fake.creates), len(fake.predictions)) == (1, 1)
