"""A replica for reads (docs/scale.md): what works there, what does not, how it catches up."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import psycopg
import pytest
from actors import Anon, Monitor, Refusal, Service, User, Worker, outcome, refused
from database import Database, Server
from documents import run
from http_client import Client, Endpoints, answer, refusal
from runbook import SCALE, Section
from worker_process import eventually

from processes import as_user
from stack import Cluster, PostgREST, Settings, Stack, postgres_program, postgrest, sign_jwt

PAGE = Section("A replica for reads", SCALE)


@pytest.fixture(scope="module")
def standby(stopped_stack: Stack, server: Server, template: str) -> Iterator[Cluster]:
    """A replica of the session's cluster, made with the page's command."""
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
        make, _ = PAGE.of("sh")
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


@pytest.fixture
def busy(db: Database) -> tuple[str, str, str]:
    """Return user, a running job and a batch that waits."""
    db.lift_limits()
    alice = User(db).has_paid()
    job_id = alice.enqueued()
    Worker(db).claimed()
    return alice.id, job_id, str(alice.enqueue_batch(["one", "two"])["batch_id"])


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
        "export_user": lambda: service.export_user(user_id),
        "queue_health": service.queue_health,
        "queue_report": Monitor(db).queue_report,
        "queue_job": lambda: Monitor(db).queue_job(job_id),
        "queue_history": lambda: Monitor(db).queue_history(None),
    }


def test_every_call_that_only_reads_answers_on_a_replica(busy, db, replica):
    there = asked(replica, *busy)

    stable = db.execute(
        "select proname::text as name from pg_proc where provolatile = 's'"
        " and pronamespace = 'public'::regnamespace"
    )
    assert {row["name"] for row in stable} == set(there)
    answers = {name: call() for name, call in there.items()}
    assert answers["get_job_status"]["status"] == "processing"
    assert answers["queue_health"]["running"]["jobs"] == 1


def test_a_replica_refuses_what_writes_and_no_worker_works_there(busy, db, replica):
    user = User(replica, busy[0])
    for change in (user.enqueue, lambda: user.cancel_generation(busy[1])):
        with refused("PT503", "unavailable"):
            change()
    with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
        Worker(replica)

    assert db.value("select count(*) from public.generations") == 3


def test_a_job_that_has_not_arrived_is_not_found_and_arrives_soon(db, replica):
    db.lift_limits()
    alice = User(db).has(credits=100)
    there = User(replica, alice.id)

    def arrived(job_id: str) -> bool:
        answer = outcome(lambda: there.get_job_status(job_id))
        assert not isinstance(answer, Refusal) or answer.token == "not_found"
        return not isinstance(answer, Refusal)

    for _ in range(20):
        job_id = alice.enqueued()
        eventually(lambda job_id=job_id: arrived(job_id), within=5)
    told = PAGE.sql(db.url)
    assert "walreceiver" in told and "streaming" in told
    (ask_replica,) = [each for each in PAGE.of("sql") if "recovery" in each]
    assert "seconds_behind" in replica.psql(script=ask_replica).stdout


@pytest.fixture
def api(db, replica, standby, stopped_stack) -> Iterator[Endpoints]:
    """PostgREST before the replica, with the settings that the page gives it."""
    folder = stopped_stack.folder / f"rest-{db.name}"
    folder.mkdir()
    service = PostgREST(folder, stopped_stack.settings)

    def prepare(url: str) -> dict[str, str]:
        usual = PostgREST.prepare(service, db.url)
        password = stopped_stack.settings.secret("AUTHENTICATOR_PASSWORD")
        (_, settings) = PAGE.of("sh")
        script = f"{settings.replace('/postgres', f'/{db.name}')}\nenv | grep ^PGRST"
        own = {"AUTHENTICATOR_PASSWORD": password, "REPLICA": standby.address()}
        return usual | dict(line.split("=", 1) for line in run(["bash"], script, **own).split())

    service.prepare = prepare  # type: ignore[method-assign]
    try:
        service.start(replica.url)
        with httpx.Client(timeout=30) as http:
            yield Endpoints(http, "", service.address(), "")
    finally:
        service.stop()


@pytest.mark.skipif(not postgrest(), reason="there is no PostgREST for this machine")
def test_a_postgrest_before_a_replica_answers_what_reads_and_refuses_what_writes(
    db, standby, api, stopped_stack
):
    db.lift_limits()
    alice = User(db).has(credits=100)
    job_id = alice.enqueued()
    token = sign_jwt(stopped_stack.jwt_secret, {"sub": alice.id, "role": "authenticated"})
    client, operator = Client(api, token), Client(api, stopped_stack.service_role_key)
    catch_up(db, standby)

    for method in ("GET", "POST"):
        assert answer(client.rpc("get_job_status", method, job_id=job_id))["status"] == "queued"
        assert answer(client.rpc("list_public_images", method))["images"] == []
        assert answer(operator.rpc("queue_health", method))["depth"]["ready"] == 1
    assert [row["id"] for row in answer(client.rest("GET", "generations"))] == [job_id]
    for change in (
        client.rpc("enqueue_generation", model="darkroom/preview", prompt="a harbour"),
        client.rpc("cancel_generation", job_id=job_id),
        operator.rest("PATCH", "models?id=eq.darkroom/preview", json={"price_credits": 9}),
    ):
        assert (refusal(change).status, refusal(change).code) == (400, "0A000")
