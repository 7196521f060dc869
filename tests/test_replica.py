"""A streaming replica that serves reads: what works there, what does not, and how far behind it is.

MEASURE_SECONDS=5 measures status reads on primary and replica, alone and together.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import httpx
import psycopg
import pytest
import stack_choice
from actors import PREVIEW, Anon, Caller, Monitor, Refusal, Service, User, Worker, outcome, refused
from database import Database, Server
from http_client import Client, Endpoints, answer, refusal
from http_fixtures import postgrest_settings, start_postgrest
from runbook import Section
from worker_process import eventually

from processes import as_user, free_port
from stack import Cluster, Settings, Stack, postgres_program, sign_jwt

MEASURE_SECONDS = os.environ.get("MEASURE_SECONDS", "")


@pytest.fixture(scope="module")
def standby(stopped_stack: Stack, server: Server, template: str) -> Iterator[Cluster]:
    """A replica of the session's cluster, made with the runbook's command."""
    folder = stopped_stack.folder / "standby"
    user = "postgres" if os.geteuid() == 0 else None
    folder.mkdir(mode=0o700)
    (folder / "env").write_text(stopped_stack.settings.file.read_text())  # the same passwords
    settings = Settings(folder / "env")
    settings.new_port("DATABASE_PORT")
    standby = Cluster(folder, settings, fsync=False)
    if user:
        shutil.chown(folder, user)
    try:
        (make,) = Section("Read replicas").of("sh")
        subprocess.run(
            ["bash", "-euc", make],
            check=True,
            cwd="/",
            env={
                "PATH": f"{postgres_program('psql').parent}:{os.environ['PATH']}",
                "ADMIN_URL": server.url,
                "STANDBY": str(standby.data),
            },
            **as_user(user),
        )
        standby.start()
        yield standby
    finally:
        standby.stop()
        standby.delete()
        shutil.rmtree(folder)


@pytest.fixture
def replica(standby: Cluster, db: Database) -> Iterator[Database]:
    """The test's database as the replica has it."""
    path = urlsplit(db.url).path
    copy = Database(urlsplit(standby.url())._replace(path=path).geturl(), db.name)
    catch_up(db, standby)
    yield copy
    copy.close()


def catch_up(db: Database, standby: Cluster) -> None:
    """Wait until the replica has all that the primary has committed."""
    position = db.value("select pg_current_wal_lsn()")
    with psycopg.connect(standby.url()) as connection:
        query = "select pg_last_wal_replay_lsn() >= %s::pg_lsn"
        eventually(lambda: connection.execute(query, [str(position)]).fetchone() == (True,))


def asked(db: Database, user_id: str, job_id: str, batch_id: str) -> dict[str, Callable[[], Any]]:
    """Every call that only reads, by name, as whoever may make it."""
    alice, anon, service = User(db, user_id), Anon(db), Service(db)
    return {
        "ping": anon.ping,
        "list_models": anon.list_models,
        "list_public_images": anon.list_public_images,
        "get_job_status": lambda: alice.get_job_status(job_id),
        "list_active_jobs": lambda: alice.list_active_jobs(job_id),
        "get_batch_status": lambda: alice.get_batch_status(batch_id),
        "get_entitlement": alice.get_entitlement,
        "list_generations": alice.list_generations,
        "list_prompt_templates": alice.list_prompt_templates,
        "list_webhooks": service.list_webhooks,
        "list_deliveries": service.list_deliveries,
        "queue_health": service.queue_health,
        "queue_report": Monitor(db).queue_report,
        "queue_history": lambda: Monitor(db).queue_history(None),
    }


@pytest.fixture
def busy(db: Database) -> tuple[str, str, str]:
    """Return user, a running job and a batch that waits."""
    db.lift_limits()
    alice = User(db).has_paid()
    job_id = alice.enqueued()
    Worker(db).claimed()
    return alice.id, job_id, str(alice.enqueue_batch(["one", "two"])["batch_id"])


def without_times(answer: Any) -> str:
    """What is answered, but for what passes with time."""
    return re.sub(r"'(\w+_seconds|server_time|poll_after_ms)': [^,}]+", "", str(answer))


def test_every_call_that_only_reads_answers_on_a_replica_as_on_the_primary(busy, db, replica):
    there, here = asked(replica, *busy), asked(db, *busy)

    for name, call in there.items():
        answer = call()
        if name not in ("queue_report", "queue_history"):  # full of the time that passes
            assert without_times(answer) == without_times(here[name]()), name
    assert there["get_job_status"]()["status"] == "processing"


def test_a_replica_serves_every_client_function_that_is_stable(db):
    stable = db.execute(
        "select proname::text as name from pg_proc where provolatile = 's'"
        " and pronamespace = 'public'::regnamespace"
    )

    assert {row["name"] for row in stable} == set(asked(db, "", "", ""))


def test_they_run_in_the_read_only_transaction_that_postgrest_makes(busy, db, monkeypatch):
    """For a stable function PostgREST opens one, whatever the server is."""
    plain = Caller.acting

    @contextlib.contextmanager
    def read_only(self: Caller) -> Iterator[psycopg.Connection[Any]]:
        with plain(self) as connection:
            connection.execute("set transaction read only")
            yield connection

    monkeypatch.setattr(Caller, "acting", read_only)

    for call in asked(db, *busy).values():
        call()


def test_a_replica_refuses_what_writes_and_nothing_has_happened(busy, db, replica):
    with refused("PT503", "unavailable"):
        User(replica, busy[0]).enqueue()
    with refused("PT503", "unavailable"):
        User(replica, busy[0]).cancel_generation(busy[1])

    assert db.value("select count(*) from public.generations") == 3


@pytest.fixture
def behind_postgrest(
    request: pytest.FixtureRequest, db: Database, stopped_stack: Stack
) -> Iterator[Client]:
    """A user whose PostgREST stands before a replica, or a database that is read only."""
    if not (binary := stack_choice.postgrest_binary()):
        pytest.skip("no PostgREST for this machine")
    user = User(db)
    on_replica = request.param == "replica"
    cluster = request.getfixturevalue("standby") if on_replica else stopped_stack.cluster
    ports = free_port(), free_port()
    environment = postgrest_settings(stopped_stack, db, cluster.address(), ports)
    if on_replica:
        catch_up(db, cluster)
    else:
        db.execute(f"alter database {db.name} set default_transaction_read_only = on")
    process, url = start_postgrest(binary, stopped_stack, db, environment)
    claims = {"sub": user.id, "role": "authenticated", "exp": 4_102_444_800}
    with httpx.Client() as http:
        yield Client(Endpoints(http, "", url, ""), sign_jwt(stopped_stack.jwt_secret, claims))
    process.stop(signal.SIGTERM, 10)


@pytest.mark.parametrize(
    ("behind_postgrest", "refusal_"),
    [
        ("read only", (503, "PT503", "unavailable", "Try again in 30 seconds.", "30")),
        # PostgREST itself, before a function of ours is called.
        (
            "replica",
            (400, "0A000", "cannot set transaction read-write mode during recovery", None, ""),
        ),
    ],
    indirect=["behind_postgrest"],
)
def test_behind_postgrest_changes_are_refused_and_reads_go_on(behind_postgrest, refusal_):
    user = behind_postgrest

    refused = user.rpc("enqueue_generation", model=PREVIEW, prompt="a lighthouse")
    told = refusal(refused)
    by_get = refusal(user.rpc("enqueue_generation", "GET", model=PREVIEW, prompt="a lighthouse"))

    assert refusal_ == (
        *(told.status, told.code, told.message, told.hint),
        refused.headers.get("Retry-After", "").removeprefix("0, "),  # PostgREST adds one of its own
    )
    assert (by_get.status, by_get.message) == (405, "method_not_allowed")
    for method in ("GET", "POST"):
        assert answer(user.rpc("get_entitlement", method))["credits"] == 10
    assert answer(user.rest("GET", "generations")) == []


def test_a_worker_cannot_work_on_a_replica(replica):
    with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
        Worker(replica)


def test_a_job_that_has_not_arrived_is_not_found_and_arrives_soon(db, replica):
    db.lift_limits()
    alice = User(db).has(credits=100)
    catch_up_seconds = []
    there = User(replica, alice.id)

    for _ in range(50):
        job_id = alice.enqueued()
        committed = time.monotonic()

        def arrived(job_id: str = job_id) -> bool:
            answer = outcome(lambda: there.get_job_status(job_id))
            assert not isinstance(answer, Refusal) or answer.token in ("not_found",)
            return not isinstance(answer, Refusal)

        eventually(arrived)
        catch_up_seconds.append(time.monotonic() - committed)

    milliseconds = sorted(1000 * each for each in catch_up_seconds)
    print(f"lag: p50 {statistics.median(milliseconds):.1f} ms, worst {milliseconds[-1]:.1f} ms")
    assert milliseconds[-1] < 5000


def test_the_runbooks_questions_about_a_replica(db, replica):
    told = Section("Read replicas").sql(db.url)

    assert "walreceiver" in told and "streaming" in told
    (ask_replica,) = [each for each in Section("Read replicas").of("sql") if "recovery" in each]
    assert "seconds_behind" in replica.psql(script=ask_replica).stdout
    assert replica.value("select pg_is_in_recovery()")


@pytest.mark.skipif(not MEASURE_SECONDS, reason="MEASURE_SECONDS is not set")
def test_measured_reads_per_second_of_primary_and_replica(busy, db, replica, tmp_path):
    script = tmp_path / "status.sql"
    script.write_text(
        "begin;\nset local role authenticated;\n"
        f"select set_config('request.jwt.claim.sub', '{busy[0]}', true);\n"
        f"select public.get_job_status('{busy[1]}');\ncommit;\n"
    )

    def reads(url: str) -> float:
        command = [postgres_program("pgbench"), "-n", "-c8", "-M", "prepared", f"-f{script}"]
        command += [f"-T{MEASURE_SECONDS}", url]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return float(re.search(r"tps = ([0-9.]+)", done.stdout)[1])

    alone = {name: reads(each.url) for name, each in {"primary": db, "replica": replica}.items()}
    with ThreadPoolExecutor(2) as pool:
        both = sum(pool.map(reads, [db.url, replica.url]))
    print(f"get_job_status/s, 8 clients: {alone}, both at once {both:.0f}")
