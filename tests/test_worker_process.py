"""Real worker processes against a real database and Storage, with the preview provider.

Each test has a database of its own; Storage is the stack's. Two tests use the stack's own database:
the one that goes the whole way over HTTP, and the one that waits for pg_cron.
"""

from __future__ import annotations

import contextlib
import functools
import io
import re
import signal
import statistics
import threading
import time
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from database import Database
from PIL import Image
from worker_process import WorkerProcess, Workers, eventually

from stack import Stack

SMALL = {"width": 64, "height": 64}
LONG = {"PREVIEW_SECONDS": 60}  # the job will not end by itself


@pytest.fixture
def workers(db: Database, stack: Stack, tmp_path: Path) -> Iterator[Workers]:
    """Starts workers on the test's database."""
    db.lift_limits()
    db.execute("update private.settings set retry_base = '0'")
    with Workers(db, stack, tmp_path) as workers:
        yield workers


@pytest.fixture
def live_workers(stack: Stack, tmp_path: Path) -> Iterator[Workers]:
    """Starts workers on the stack's own database."""
    db = Database(stack.database_url, "postgres")
    with Workers(db, stack, tmp_path) as workers:
        yield workers
    db.close()


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


def test_a_prompt_becomes_an_image_that_its_owner_downloads(stack, live_workers):
    live_workers.start()
    client = Client(stack)
    job = {"model": "darkroom/preview", "prompt": "a lighthouse", "params": {"width": 320}}

    job_id = client.call("enqueue_generation", **job)["job_id"]
    live_workers.until(job_id, "completed")

    (image,) = client.call("get_job_status", job_id=job_id)["images"]
    file = client.download(image["path"])
    assert Image.open(io.BytesIO(file.content)).size == (320, 1024)
    assert (image["width"], image["height"]) == (320, 1024)
    assert (image["bytes"], image["content_type"]) == (len(file.content), "image/png")
    assert not Client(stack).download(image["path"]).is_success


def test_a_picture_may_start_from_one_of_the_users_own(stack, live_workers):
    live_workers.start()
    client = Client(stack)
    source = io.BytesIO()
    Image.new("RGB", (300, 200), (0, 255, 0)).save(source, "PNG")
    path = f"{client.call('get_entitlement')['user_id']}/source.png"
    client.http.post(
        f"/storage/v1/object/inputs/{path}",
        content=source.getvalue(),
        headers={"content-type": "image/png"},
    ).raise_for_status()
    job = {"model": "darkroom/preview", "prompt": "a lawn", "params": SMALL | {"image": path}}

    job_id = client.call("enqueue_generation", **job)["job_id"]
    live_workers.until(job_id, "completed")

    (image,) = client.call("get_job_status", job_id=job_id)["images"]
    picture = Image.open(io.BytesIO(client.download(image["path"]).content))
    red, green, blue = picture.convert("RGB").getpixel((0, 0))
    assert green > 150 > max(red, blue)


def test_every_image_asked_for_is_made_and_stored(alice, db, workers):
    workers.start()

    job = alice.enqueued(params=SMALL | {"num_outputs": 3})
    workers.until(job, "completed")

    images = db.execute("select * from public.images order by position")
    files = [workers.stored_file(image["storage_path"]) for image in images]
    assert [image["position"] for image in images] == [0, 1, 2]
    assert [image["bytes"] for image in images] == [len(file) for file in files]
    assert len(set(files)) == 3
    assert alice.credits() == 7


def test_how_long_an_idle_worker_takes_to_start_a_job(alice, db, workers):
    alice.has(credits=100)
    process = workers.start(PREVIEW_SECONDS=0, WORKER_POLL_SECONDS=60)
    whole, after = [], []  # seconds from the call of enqueue, and from its answer
    for _ in range(50):
        workers.until_asleep(process)
        called = time.time()
        job = alice.enqueued(params=SMALL)
        answered = time.time()
        claimed = process.logged_at(rf"job\.claimed job={job}")
        whole.append(claimed - called)
        after.append(claimed - answered)
        process.logged(rf"job\.completed job={job}")

    for name, seconds in {"call": whole, "answer": after}.items():
        p50, p95 = statistics.median(seconds) * 1e3, statistics.quantiles(seconds, n=20)[-1] * 1e3
        print(f"from the {name} of enqueue to the claim: p50 {p50:.1f} ms, p95 {p95:.1f} ms")


# --- failure ---


def test_a_failed_job_keeps_its_input_says_why_and_gives_the_credit_back_once(alice, db, workers):
    workers.start()
    prompt = "a lighthouse [fail:moderated]"

    job = alice.enqueued(prompt, params=SMALL | {"seed": 7})
    workers.until(job, "failed")

    row = db.row("select * from public.generations where id = %s", job)
    assert (row["prompt"], row["input"]) == (prompt, SMALL | {"seed": 7})
    assert row["error_code"] == "moderated"
    assert row["error_message"] == db.value(
        "select message from private.error_codes where code = 'moderated'"
    )
    assert alice.ledger() == [("grant", 10), ("charge", -1), ("refund", 1)]


def test_a_retryable_failure_waits_then_is_tried_until_attempts_run_out(alice, db, workers):
    db.execute("update private.settings set retry_base = '1 day', retry_cap = '1 day'")
    workers.start(WORKER_POLL_SECONDS=0.1)

    job = alice.enqueued("[fail:provider_error]", params=SMALL)
    for attempt in (1, 2):
        waiting = f"select 1 from private.ready_jobs where attempt = {attempt} and run_at > now()"
        eventually(functools.partial(db.execute, waiting))
        assert alice.credits() == 9
        db.execute("update private.ready_jobs set run_at = now()")
    workers.until(job, "failed")

    assert workers.outcomes(job) == ["retried", "retried", "failed"]
    assert alice.ledger() == [("grant", 10), ("charge", -1), ("refund", 1)]


def test_a_job_that_outlives_its_deadline_fails_with_timeout(alice, db, workers):
    db.execute("update public.models set deadline = '0.5 seconds'")
    workers.start(**LONG)

    job = alice.enqueued(params=SMALL)
    workers.until(job, "failed")

    assert workers.outcomes(job) == ["failed"]
    assert db.value("select error_code from public.generations") == "timeout"


def test_an_output_over_the_cap_is_the_providers_error(alice, db, workers):
    db.execute("update private.settings set max_attempts = 1")
    workers.start(MAX_IMAGE_BYTES=100)

    job = alice.enqueued(params=SMALL)
    workers.until(job, "failed")

    assert db.value("select error_code from public.generations") == "provider_error"
    assert db.value("select error_detail from private.attempts") == "output: more than 100 bytes"


# --- a worker is killed ---


def test_a_killed_workers_job_is_finished_by_another_and_charged_once(alice, db, workers):
    killed = workers.start(**LONG)
    job = alice.enqueued(params=SMALL)
    workers.until(job, "processing")

    killed.kill()
    workers.backdate_leases()
    workers.start()  # looks for stale jobs at its start
    workers.until(job, "completed")

    assert workers.outcomes(job) == ["retried", "completed"]
    assert alice.ledger() == [("grant", 10), ("charge", -1)]
    assert db.value("select count(*) from public.images") == 1


def test_pg_cron_recovers_a_killed_workers_job_with_no_worker_alive(stack, live_workers):
    """The one slow test: it waits for the real minute job."""
    db, client = live_workers.db, Client(stack)
    killed = live_workers.start(**LONG)
    job = client.call("enqueue_generation", model="darkroom/preview", prompt="x", params=SMALL)
    live_workers.until(job["job_id"], "processing")
    runs = "select count(*) from cron.job_run_details join cron.job using (jobid)"
    runs += " where jobname = 'darkroom_recover_stale_jobs' and status = 'succeeded'"
    before = db.value(runs)
    silence = "select now() - last_run_at from private.routines where name = 'recover_stale_jobs'"

    killed.kill()
    live_workers.backdate_leases()
    live_workers.until(job["job_id"], "queued", within=75)

    eventually(lambda: db.value(runs) > before)
    assert db.value(silence).total_seconds() < 61
    assert live_workers.outcomes(job["job_id"]) == ["retried"]
    live_workers.start(WORKER_POLL_SECONDS=0.1)
    live_workers.until(job["job_id"], "completed")
    assert client.call("get_entitlement")["credits"] == job["credits_left"] == 9


# --- a worker is stopped ---


def test_jobs_in_flight_finish_within_the_grace_time(alice, workers):
    process = workers.start(PREVIEW_SECONDS=0.7)
    jobs = [alice.enqueued(params=SMALL) for _ in range(3)]
    for job in jobs:
        workers.until(job, "processing")

    assert process.stop() == 0

    assert [workers.status(job) for job in jobs] == ["completed"] * 3


def test_jobs_that_outlast_the_grace_time_are_released_and_cost_no_attempt(alice, db, workers):
    process = workers.start(**LONG, WORKER_GRACE_SECONDS=0.1)
    job = alice.enqueued(params=SMALL)
    running = eventually(lambda: workers.checkpointed(job))

    assert process.stop() == 0

    (ready,) = db.execute("select attempt, provider_job_id from private.ready_jobs")
    assert ready == {"attempt": 0, "provider_job_id": running["provider_job_id"]}
    workers.start()
    workers.until(job, "completed")
    history = db.execute("select outcome, attempt, provider_job_id from private.attempts")
    assert [row["outcome"] for row in history] == ["released", "completed"]
    assert {row["attempt"] for row in history} == {1}
    assert {row["provider_job_id"] for row in history} == {running["provider_job_id"]}


def test_a_stopping_worker_claims_nothing_more(alice, workers):
    process = workers.start(PREVIEW_SECONDS=0.7)
    running = alice.enqueued(params=SMALL)
    workers.until(running, "processing")

    process.signal(signal.SIGTERM)
    process.logged(r"worker\.stopping")
    late = alice.enqueued(params=SMALL)
    assert process.wait() == 0

    assert (workers.status(running), workers.status(late)) == ("completed", "queued")


def test_a_second_signal_ends_the_worker_at_once_and_leaves_jobs_to_their_leases(alice, workers):
    process = workers.start(**LONG)
    job = alice.enqueued(params=SMALL)
    workers.until(job, "processing")

    process.signal(signal.SIGTERM)
    process.logged(r"worker\.stopping running=1")
    process.signal(signal.SIGTERM)

    assert process.wait(within=2) == 3
    assert workers.status(job) == "processing"


def test_an_idle_worker_stops_at_once(workers):
    process = workers.start(WORKER_POLL_SECONDS=60)
    workers.until_asleep(process)

    assert process.stop(within=2) == 0


def test_a_worker_with_another_role_says_so_and_ends_with_code_2(db, workers):
    db.execute("create role stranger login password 'strange'")
    try:
        url = workers.environment["DATABASE_URL"]
        url = re.sub("//.*@", "//stranger:strange@", url)
        process = workers.launch(DATABASE_URL=url)

        assert process.wait() == 2
        assert "worker.refused DATABASE_URL" in process.log
    finally:
        db.execute("drop role stranger")


# --- leases ---


def beat_often(db: Database) -> None:
    db.execute("update private.settings set heartbeat = '0.2 seconds', lease = '5 seconds'")


def test_heartbeats_extend_the_lease_and_tell_the_progress(alice, db, workers):
    beat_often(db)
    workers.start(PREVIEW_SECONDS=5)
    job = alice.enqueued(params=SMALL)
    workers.until(job, "processing")
    lease = "select lease_until from private.running_jobs"
    first = db.value(lease)

    eventually(lambda: db.value(lease) > first)
    eventually(lambda: alice.get_job_status(job)["progress"])


def test_a_beat_that_finds_the_lease_lost_drops_the_job_and_frees_its_slot(alice, db, workers):
    beat_often(db)
    process = workers.start(**LONG, WORKER_SLOTS=1)
    lost, other = alice.enqueued(params=SMALL), alice.enqueued(params=SMALL)
    workers.until(lost, "processing")

    workers.give_lease_away(lost)
    workers.until(other, "processing")

    assert f"job.lost job={lost}" in process.log
    assert workers.status(lost) == "processing"  # its new holder's


def test_a_worker_that_learns_at_the_end_that_its_lease_is_lost_settles_nothing(alice, db, workers):
    process = workers.start(PREVIEW_SECONDS=0.5)
    lost = alice.enqueued(params=SMALL)
    workers.until(lost, "processing")

    workers.give_lease_away(lost)
    process.logged(f"job.lost job={lost}")

    assert workers.status(lost) == "processing"
    assert db.value("select count(*) from public.images") == 0
    assert alice.credits() == 9
    workers.until(alice.enqueued(params=SMALL), "completed")


def test_a_worker_may_claim_its_own_lost_job_again(alice, db, workers):
    db.execute("update private.settings set heartbeat = '0.7 seconds', lease = '60 seconds'")
    process = workers.start(PREVIEW_SECONDS=1.5)
    job = alice.enqueued(params=SMALL)
    workers.until(job, "processing")

    workers.backdate_leases()
    assert db.value("select private.recover_stale_jobs()") == 1
    workers.until(job, "completed")

    assert workers.outcomes(job) == ["retried", "completed"]
    assert process.log.count(f"job.claimed job={job}") == 2
    assert process.stop() == 0
    assert process.log.count(f"job.lost job={job}") == 1
    assert "Error" not in process.log


# --- waking up ---


def test_a_sleeping_worker_is_woken_long_before_the_backstop(alice, workers):
    workers.start(WORKER_POLL_SECONDS=60)
    workers.until_silent()

    job = alice.enqueued(params=SMALL)

    workers.until(job, "processing", "completed", within=2)


def test_a_worker_woken_for_a_job_that_another_one_took_goes_to_sleep_again(db, workers):
    process = workers.start(WORKER_POLL_SECONDS=60)
    process.logged("listen.started")

    for _ in range(5):
        workers.until_asleep(process)  # before its second look
        with db.connect() as connection:
            connection.execute("update private.workers set asleep = false")
            connection.execute(
                "select pg_notify('darkroom_worker_' || %s, '')", [process.worker_id]
            )

    workers.until_asleep(process, within=2)


def test_a_wake_up_that_met_a_heartbeat_is_made_good_by_the_beat(alice, db, workers):
    """wake_worker skips a worker whose row is locked, and its own beat locks it."""
    db.execute("update private.settings set heartbeat = '1 second'")
    workers.start(WORKER_POLL_SECONDS=60)
    workers.until_silent()

    beat = db.connect()
    with beat.transaction():
        beat.execute("update private.workers set seen_at = now()")
        job = alice.enqueued(params=SMALL)

    workers.until(job, "processing", "completed", within=3)


def test_a_worker_whose_listen_connection_died_listens_again(alice, db, workers):
    process = workers.start(WORKER_POLL_SECONDS=60)
    process.logged("listen.started")
    workers.until_silent()

    assert workers.terminate_backends("query ilike '%listen%'") == 1
    process.logged(r"listen\.lost[^$]*listen\.started")
    workers.until_silent()

    workers.until(alice.enqueued(params=SMALL), "processing", "completed", within=2)


def test_health_hears_of_a_worker_whose_listen_connection_died(db, service, workers):
    db.execute("update private.settings set heartbeat = '1 second'")
    workers.start().logged("listen.started")
    workers.until_silent()
    assert service.alerts() == {}

    assert workers.terminate_backends("query ilike '%listen%'") == 1

    eventually(lambda: service.alerts() == {"not_listening": "1 of 1 workers"})
    eventually(lambda: service.alerts() == {}, within=20)  # once it is sure that it listens again


def test_a_sleeping_worker_is_woken_although_another_one_stopped_asleep(alice, workers):
    processes = [workers.start(WORKER_POLL_SECONDS=60) for _ in range(3)]
    workers.until_silent()

    for process in processes[1:]:  # those seen last
        assert process.stop() == 0

    workers.until(alice.enqueued(params=SMALL), "processing", "completed", within=2)


def test_jobs_survive_the_loss_of_all_database_connections(alice, workers):
    process = workers.start(PREVIEW_SECONDS=0.5)
    jobs = [alice.enqueued(params=SMALL) for _ in range(4)]
    for job in jobs:
        workers.until(job, "processing")

    def a_jobs_call_was_cut_off() -> bool:
        workers.terminate_backends("true")
        cut_off = r"database\.lost call=(begin|checkpoint|report|complete)"
        return bool(re.search(cut_off, process.log))

    eventually(a_jobs_call_was_cut_off)
    for job in jobs:
        workers.until(job, "completed")

    assert [workers.outcomes(job) for job in jobs] == [["completed"]] * 4
    assert alice.credits() == 6


# --- a database that is there and does nothing ---


@contextlib.contextmanager
def saying(db: Database, state: str, *functions: str) -> Iterator[None]:
    """Have functions do nothing but fail with an SQLSTATE."""
    query = "select pg_get_functiondef(%s::regproc) as text"
    texts = [str(db.value(query, f"private.{name}")) for name in functions]
    says = f"AS $function$ begin raise sqlstate '{state}'; end $function$"
    for text in texts:
        head = re.sub(r"LANGUAGE \w+", "LANGUAGE plpgsql", text.split("AS $function$")[0])
        db.execute((head + says).replace("%", "%%"))
    try:
        yield
    finally:
        for text in texts:
            db.execute(text.replace("%", "%%"))


@contextlib.contextmanager
def read_only(workers: Workers) -> Iterator[None]:
    """Have the database take no writes, as a full disk or a standby does."""
    db, switch = workers.db, "set default_transaction_read_only"
    db.execute(f"alter database {db.name} {switch} = on")
    workers.terminate_backends("true")
    try:
        yield
    finally:
        db.execute(f"alter database {db.name} reset default_transaction_read_only")


def test_a_read_only_database_ends_no_worker_and_loses_no_job(alice, db, workers):
    beat_often(db)
    process = workers.start(PREVIEW_SECONDS=1, WORKER_SLOTS=3, WORKER_POLL_SECONDS=0.2)
    jobs = [alice.enqueued(params=SMALL) for _ in range(2)]
    for job in jobs:
        eventually(lambda job=job: workers.checkpointed(job))  # what comes next is its progress

    with read_only(workers):
        jobs += [alice.enqueued(params=SMALL) for _ in range(4)]
        late = workers.launch()
        for call in ("claim_jobs", "heartbeat", "recover_stale_jobs", "report_progress"):
            process.logged(rf"database\.lost call={call} error=ReadOnlySqlTransaction")
        late.logged(r"database\.lost call=register_worker error=ReadOnlySqlTransaction")
        db.execute("update private.running_jobs set lease_until = now() + interval '1 minute'")

    late.logged(r"worker\.started", within=20)
    for job in jobs:
        workers.until(job, "completed", within=30)
    assert process.is_running() and late.is_running()
    assert [workers.outcomes(job) for job in jobs] == [["completed"]] * 6
    assert alice.credits() == 4
    assert process.log.count("WARNING") < 20  # not one for each try


# What a server may say of itself, in a class of its own each.
TROUBLES = (
    "08006 0A000 25006 25P02 26000 3F000 40P01 42501 42P01 53100 55P03 57014 57P01 58030 XX000"
)


def test_whatever_the_server_says_of_itself_is_waited_out(alice, db, workers):
    beat_often(db)
    alice.has(credits=100)
    process = workers.start(PREVIEW_SECONDS=0, WORKER_POLL_SECONDS=0.2)
    calls = ("claim_jobs", "sleep", "heartbeat", "recover_stale_jobs", "due_lanes")
    for state in TROUBLES.split():
        with saying(db, state, *calls):
            job = alice.enqueued(params=SMALL)
            for call in ("claim_jobs", "heartbeat", "due_lanes"):
                process.logged(rf"database\.lost call={call} error=\w+ {state}")
        workers.until(job, "completed")

    assert process.is_running()


def test_what_the_server_says_of_a_completion_fails_no_job(alice, db, workers):
    process = workers.start(PREVIEW_SECONDS=0, WORKER_SLOTS=2)
    for state in ("25006", "42501", "53100", "XX000"):
        with saying(db, state, "complete_jobs"):
            jobs = [alice.enqueued(params=SMALL) for _ in range(2)]
            process.logged(rf"database\.lost call=complete_jobs error=\w+ {state}")
        for job in jobs:
            workers.until(job, "completed")
            assert workers.outcomes(job) == ["completed"]


# --- many jobs ---


def test_never_more_jobs_at_once_than_slots(alice, db, workers):
    alice.has(credits=100)
    workers.start(WORKER_SLOTS=3, PREVIEW_SECONDS=0.2)

    jobs = [alice.enqueued(params=SMALL) for _ in range(10)]
    for job in jobs:
        workers.until(job, "completed")

    assert workers.most_at_once() == 3


def test_two_workers_share_the_queue_and_run_every_job_once(alice, db, workers):
    alice.has(credits=100)
    for _ in range(2):
        workers.start(WORKER_SLOTS=2)

    jobs = [alice.enqueued(params=SMALL) for _ in range(20)]
    for job in jobs:
        workers.until(job, "completed")

    assert [workers.outcomes(job) for job in jobs] == [["completed"]] * 20
    assert db.value("select count(distinct worker_id) from private.attempts") == 2
    assert alice.credits() == 80


# --- Storage ---


class FlakyStorage(BaseHTTPRequestHandler):
    """In front of the real Storage: refuses the first requests of each file."""

    protocol_version = "HTTP/1.1"
    target: str
    refusals: int
    seen: list[tuple[str, int]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if len(self.seen) < self.refusals:
            status, answer = 503, b"try later"
        else:
            headers = {k: v for k, v in self.headers.items() if k.lower() != "host"}
            response = httpx.post(self.target + self.path, content=body, headers=headers)
            status, answer = response.status_code, response.content
        self.seen.append((self.path, status))
        self.send_response(status)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def flaky_storage(stack: Stack) -> Iterator[Any]:
    """Storage that answers 503 twice before it works."""
    kind = type("Storage", (FlakyStorage,), {"target": stack.api_url, "refusals": 2, "seen": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), kind) as server:
        kind.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield kind
        server.shutdown()


def test_an_upload_is_repeated_until_storage_takes_it(alice, db, workers, flaky_storage):
    workers.start(SUPABASE_URL=flaky_storage.url)

    job = alice.enqueued(params=SMALL)
    workers.until(job, "completed")

    path = db.value("select storage_path from public.images")
    assert [status for _, status in flaky_storage.seen] == [503, 503, 200]
    assert {seen for seen, _ in flaky_storage.seen} == {f"/storage/v1/object/generations/{path}"}
    assert workers.stored_file(path)
    assert workers.outcomes(job) == ["completed"]


def test_the_image_is_not_lost_to_a_storage_that_is_down(alice, db, workers, flaky_storage):
    flaky_storage.refusals = 6  # more than one attempt repeats
    workers.start(SUPABASE_URL=flaky_storage.url, WORKER_POLL_SECONDS=0.1)

    job = alice.enqueued(params=SMALL)
    workers.until(job, "completed")

    assert workers.outcomes(job) == ["retried", "completed"]
    assert db.value("select count(distinct provider_job_id) from private.attempts") == 1


# --- what decodes its pictures ---


def laboratory(process: WorkerProcess) -> list[int]:
    """Return the processes that a worker has started, and theirs."""
    found, look_at = [], [process.pid]
    while look_at:
        pid = look_at.pop()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        look_at += map(int, children)
        found += map(int, children)
    return found


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_what_decodes_pictures_knows_no_secret_and_ends_with_the_worker(alice, workers, how):
    process = workers.start()
    workers.until(alice.enqueued(params=SMALL), "completed")
    pids = laboratory(process)
    environments = [Path(f"/proc/{pid}/environ").read_text() for pid in pids]

    process.signal(how)
    process.wait()

    assert pids
    assert [each for each in workers.secrets() if each in "".join(environments)] == []
    eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), within=5)


# --- what is written to the log ---


def test_the_log_says_why_a_job_failed_and_a_prompt_chooses_known_codes_only(alice, db, workers):
    process = workers.start()
    prompts = ["[fail:moderated]", "[fail:nude_alice_smith] [fail:internal]"]
    failed, drawn = [alice.enqueued(prompt, params=SMALL) for prompt in prompts]

    workers.until(failed, "failed")
    workers.until(drawn, "completed")

    reason = "reason='asked for by the prompt'"
    process.logged(f"job.failed job={failed} code=moderated {reason}")
    assert "nude" not in process.log


def test_logs_tell_jobs_and_errors_but_no_prompt_key_or_password(alice, db, workers, stack):
    process = workers.start(WORKER_SLOTS=1)
    done = alice.enqueued("a lighthouse at dusk", params=SMALL)
    failed = alice.enqueued("a very private prompt [fail:moderated]", params=SMALL)
    workers.until(failed, "failed")

    process.logged(f"job.completed job={done}")
    process.logged(f"job.failed job={failed} code=moderated")
    assert {"a lighthouse at dusk", stack.service_role_key} < workers.secrets()
    assert workers.leaks() == []  # as after every test here
