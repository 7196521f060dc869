"""Real worker processes, real Storage: a job's way, wake-up, and how a worker ends."""

from __future__ import annotations

import io
import re
import signal
import uuid
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
from database import Database
from PIL import Image
from shared_worker import shared_worker
from worker_process import WorkerProcess, Workers, eventually

from stack import Stack

SMALL = {"width": 64, "height": 64}

world, db, workers = shared_worker(WORKER_POLL_SECONDS=60, WORKER_GRACE_SECONDS=2)


class Client:
    """An app: a user who signs up and does everything over HTTP."""

    def __init__(self, stack: Stack) -> None:
        self.http = httpx.Client(base_url=stack.api_url, headers={"apikey": stack.anon_key})
        account = {"email": f"{uuid.uuid4()}@example.com", "password": "correct horse"}
        session = self.http.post("/auth/v1/signup", json=account).json()
        self.http.headers["Authorization"] = f"Bearer {session['access_token']}"

    def call(self, function: str, **arguments: Any) -> Any:
        return self.http.post(f"/rest/v1/rpc/{function}", json=arguments).raise_for_status().json()

    def download(self, path: str) -> httpx.Response:
        return self.http.get(f"/storage/v1/object/generations/{path}")


# --- from a prompt to an image ---


def test_a_prompt_becomes_an_image_that_its_owner_downloads(stack, tmp_path):
    client, source = Client(stack), io.BytesIO()
    Image.new("RGB", (300, 200), (0, 255, 0)).save(source, "PNG")
    path = f"{client.call('get_entitlement')['user_id']}/source.png"
    client.http.post(
        f"/storage/v1/object/inputs/{path}",
        content=source.getvalue(),
        headers={"content-type": "image/png"},
    ).raise_for_status()
    job = {"model": "darkroom/preview", "prompt": "a lawn", "params": {"width": 320, "image": path}}

    job_id = client.call("enqueue_generation", **job)["job_id"]
    with Workers(Database(stack.database_url, "postgres"), stack, tmp_path) as workers:
        workers.start()
        workers.until(job_id, "completed")

    (image,) = client.call("get_job_status", job_id=job_id)["images"]
    file = client.download(image["path"]).content
    picture = Image.open(io.BytesIO(file))
    assert picture.size == (image["width"], image["height"]) == (320, 1024)
    assert (image["bytes"], image["content_type"]) == (len(file), "image/png")
    assert not Client(stack).download(image["path"]).is_success
    red, green, blue = picture.convert("RGB").getpixel((0, 0))
    assert green > 150 > max(red, blue)  # it started from the source


def test_a_failed_job_keeps_its_input_says_why_and_gives_the_credit_back_once(alice, db, workers):
    prompt = "a lighthouse [fail:nude_alice_smith] [fail:moderated]"  # the first is no known code
    job = alice.enqueued(prompt, params=SMALL | {"seed": 7})
    workers.until(job, "failed")

    row = db.row("select * from public.generations where id = %s", job)
    said = "select message from private.error_codes where code = 'moderated'"
    assert (row["prompt"], row["input"]) == (prompt, SMALL | {"seed": 7})
    assert (row["error_code"], row["error_message"]) == ("moderated", db.value(said))
    assert alice.ledger() == [("grant", 10), ("charge", -1), ("refund", 1)]
    workers.process.logged(f"job.failed job={job} code=moderated reason='asked for by the prompt'")
    assert "nude" not in workers.process.log


def test_a_worker_that_learns_at_the_end_that_its_lease_is_lost_settles_nothing(alice, db, workers):
    lost = workers.running(alice, seconds=0.5)

    workers.give_lease_away(lost)
    workers.process.logged(f"job.lost job={lost}")

    assert workers.status(lost) == "processing"  # its new holder's
    assert not db.execute("select 1 from public.images where generation_id = %s", lost)
    assert alice.credits() == 9
    workers.until(alice.enqueued(params=SMALL), "completed")


def test_a_worker_registers_the_names_of_its_keys_and_nothing_of_what_they_hold(db, workers):
    row = db.row("select * from private.workers where id = %s", workers.process.worker_id)

    assert row["keys"] == ["REPLICATE_API_TOKEN"]
    assert not any(secret in str(row) for secret in workers.secrets())


# --- waking up ---


def test_a_sleeping_worker_is_woken_long_before_the_backstop(alice, workers):
    workers.until_silent()

    job = alice.enqueued(params=SMALL)

    workers.until(job, "processing", "completed", within=2)


def test_a_provider_that_takes_one_job_at_a_time_is_given_one_at_a_time(alice, db, workers):
    db.execute("update private.providers set max_running = 1 where name = 'preview'")
    jobs = [alice.enqueued(params=SMALL) for _ in range(3)]

    for job in jobs:
        workers.until(job, "completed", within=10)  # the backstop is a minute

    spans = db.execute(
        "select started_at, ended_at from private.attempts"
        " where generation_id = any (%s::uuid[]) order by 1",
        jobs,
    )
    assert all(last["ended_at"] <= next["started_at"] for last, next in pairwise(spans))
    db.execute("update private.providers set max_running = null where name = 'preview'")


def test_a_worker_woken_for_a_job_that_another_one_took_goes_to_sleep_again(db, workers):
    workers.process.logged("listen.started")

    for _ in range(5):
        workers.until_asleep(workers.process)  # before its second look
        with db.connect() as connection:
            connection.execute("update private.workers set asleep = false")
            channel = f"darkroom_worker_{workers.process.worker_id}"
            connection.execute("select pg_notify(%s, '')", [channel])

    workers.until_asleep(workers.process, within=2)


def test_a_worker_whose_listen_connection_died_says_so_and_listens_again(alice, db, workers):
    process = workers.process
    process.logged("listen.started")
    workers.until_silent()

    assert workers.terminate_backends("query ilike '%listen%'") == 1
    process.logged(r"listen\.lost[^$]*listen\.started")
    said = "select is_listening from private.workers where id = %s"
    eventually(lambda: not db.value(said, process.worker_id))
    workers.until_silent()

    workers.until(alice.enqueued(params=SMALL), "processing", "completed", within=2)


# --- the end of a worker ---


def laboratory(process: WorkerProcess) -> list[Path]:
    """Return the processes that a worker has started to decode pictures, and theirs."""
    found, look_at = [], [process.pid]
    while look_at:
        pid = look_at.pop()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        look_at += map(int, children)
        found += [Path("/proc", child) for child in children]
    return found


def test_a_killed_workers_job_is_finished_by_another_and_charged_once(alice, workers):
    job, lab = workers.running(alice, seconds=1), eventually(lambda: laboratory(workers.process))
    environments = "".join((each / "environ").read_text() for each in lab)

    workers.process.kill()
    workers.backdate_leases()
    workers.process = workers.start()  # looks for stale jobs at its start
    workers.until(job, "completed")

    assert workers.outcomes(job) == ["retried", "completed"]
    assert alice.ledger() == [("grant", 10), ("charge", -1)]
    eventually(lambda: not any(each.exists() for each in lab))
    assert [each for each in workers.secrets() if each in environments] == []


def test_a_worker_that_is_stopped_finishes_what_it_can_in_time_and_claims_nothing_more(
    alice, db, workers
):
    process, lab = workers.process, eventually(lambda: laboratory(workers.process))
    long, short = workers.running(alice, seconds=4), workers.running(alice, seconds=0.5)
    bought = workers.checkpointed(long)["provider_job_id"]

    process.signal(signal.SIGTERM)
    process.logged(r"worker\.stopping running=2")
    late = alice.enqueued(params=SMALL)
    assert process.wait() == 0

    assert [workers.status(job) for job in (long, short, late)] == ["queued", "completed", "queued"]
    assert not any(each.exists() for each in lab)
    assert not db.execute("select 1 from private.workers where id = %s", process.worker_id)
    ready = db.row("select * from private.ready_jobs where job_id = %s", long)
    assert (ready["attempt"], ready["provider_job_id"]) == (0, bought)
    workers.process = workers.start()
    workers.until(late, "completed")
    workers.until(long, "completed")
    tries = db.execute("select * from private.attempts where generation_id = %s", long)
    assert sorted(each["outcome"] for each in tries) == ["completed", "released"]
    assert {(each["attempt"], each["provider_job_id"]) for each in tries} == {(1, bought)}
    workers.until_asleep(workers.process)
    assert workers.process.stop(within=2) == 0


def test_a_second_signal_ends_the_worker_at_once_and_leaves_jobs_to_their_leases(alice, workers):
    job = workers.running(alice, seconds=60)

    workers.process.signal(signal.SIGTERM)
    workers.process.logged(r"worker\.stopping running=\d")
    workers.process.signal(signal.SIGTERM)

    assert workers.process.wait(within=2) == 3
    assert workers.status(job) == "processing"


def test_a_worker_with_another_role_says_so_and_ends_with_code_2(db, workers):
    db.execute("create role stranger login password 'strange'")
    try:
        url = re.sub("//.*@", "//stranger:strange@", workers.environment["DATABASE_URL"])
        process = workers.launch(DATABASE_URL=url)

        assert process.wait() == 2
        assert "worker.refused DATABASE_URL" in process.log
    finally:
        db.execute("drop role stranger")
