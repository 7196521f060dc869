"""The runbook's move to another project, and then a change of all its keys, on two whole stacks."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import fake_replicate
import httpx
import pytest
from actors import Service, User
from database import Database, assert_books_balance
from http_client import PASSWORD, Client, Endpoints, SignedUp, answer
from runbook import Section
from worker_process import Workers, eventually

from stack import Stack

SMALL = {"width": 64, "height": 64}
PNG = b"\x89PNG"

fake = fake_replicate.fake_replicate


@pytest.fixture(scope="module")
def new_stack() -> Iterator[Stack]:
    """Another project: a database with users and files, without Darkroom."""
    folder = Path(tempfile.mkdtemp(prefix="darkroom-tests-"))
    folder.chmod(0o711)
    stack = Stack(folder, fsync=False)
    stack.settings.secret("JWT_SECRET")
    try:
        stack.cluster.start()
        stack.lite.start(stack.database_url)
        yield stack
    finally:
        stack.clean()
        shutil.rmtree(folder, ignore_errors=True)


def restart_http(stack: Stack) -> None:
    """Have all of it read functions and secrets anew."""
    stack.stop_http()
    stack.start_http()


def endpoints_of(stack: Stack) -> Endpoints:
    http = httpx.Client(headers={"apikey": stack.anon_key})
    return Endpoints(http, *(f"{stack.api_url}/{part}/v1" for part in ("auth", "rest", "storage")))


@dataclass(frozen=True)
class Moved:
    """What was there before the move, and the stack in which it is now."""

    stack: Stack
    account: SignedUp
    email: str
    picture: str  # a job
    upload: str
    waiting: str  # another user's job


@pytest.fixture(scope="module")
def moved(new_stack: Stack, stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Moved:
    """Do what the runbook says, up to the start of the workers."""
    folder = tmp_path_factory.mktemp("move")
    db, new = Database(stack.database_url, "postgres"), new_stack
    account, waits = SignedUp(endpoints_of(stack)), SignedUp(endpoints_of(stack))
    picture = account.enqueued(params=SMALL)
    with Workers(db, stack, folder) as workers:
        workers.start()
        workers.until(picture, "completed")
    upload = f"inputs/{account.id}/mein Bild (1).png"
    answer(account.upload(upload, PNG))
    waiting = waits.enqueued(params=SMALL)
    email = str(db.value("select email from auth.users where id = %s", account.id))

    Section("Backup").sh(folder, ADMIN_URL=stack.database_url)
    Section("Restore").sh(folder, ADMIN_URL=new.database_url)
    Section("Restore").sql(new.database_url)
    new._set_passwords()
    restart_http(new)
    Section("Moving to another project").sh(
        folder,
        OLD_ADMIN_URL=stack.database_url,
        OLD_API_URL=stack.api_url,
        OLD_KEY=stack.service_role_key,
        API_URL=new.api_url,
        SERVICE_ROLE_KEY=new.service_role_key,
    )
    db.execute("delete from auth.users where id = any(%s::uuid[])", [account.id, waits.id])
    db.close()
    return Moved(new, account, email, picture, upload, waiting)


@pytest.fixture
def workers(moved: Moved, tmp_path: Path) -> Iterator[Workers]:
    """Workers of the new project."""
    db = Database(moved.stack.database_url, "postgres")
    db.lift_limits()
    db.execute("update private.settings set retry_base = '0'")
    with Workers(db, moved.stack, tmp_path) as workers:
        yield workers
    db.close()


def test_users_find_their_account_credits_and_pictures_in_the_new_project(moved, workers):
    new = endpoints_of(moved.stack)
    login = {"email": moved.email, "password": PASSWORD}
    session = answer(new.http.post(f"{new.auth}/token?grant_type=password", json=login))
    account = Client(new, session["access_token"])

    job = answer(account.rpc("get_job_status", job_id=moved.picture))
    credits = answer(account.rpc("get_entitlement"))["credits"]
    assert (job["status"], credits) == ("completed", 9)
    picture = account.download(f"generations/{job['images'][0]['path']}").content
    assert picture.startswith(PNG)
    assert account.download(moved.upload).content == PNG
    workers.start()
    workers.until(moved.waiting, "completed")
    assert_books_balance(workers.db)
    query = "select count(*) from cron.job where jobname like 'darkroom%' and active"
    assert workers.db.value(query) == 5
    assert "cron_silent" not in Service(workers.db).alerts()


def key_rotation(block: str, workers: Workers, **variables: object) -> None:
    """Run one of the section's commands."""
    section = Section("Key rotation")
    section.blocks = [("sql", each) for each in section.of("sql") if block in each]
    section.sql(workers.db.url, **variables)


def test_a_new_database_password_loses_no_job(workers):
    old = workers.start(PREVIEW_SECONDS=60, WORKER_GRACE_SECONDS=0.1)
    job = User(workers.db).enqueued(params=SMALL)
    workers.until(job, "processing")

    key_rotation("alter role", workers, password="new/password")
    workers.terminate_backends("true")
    old.logged("database.lost|listen.lost")
    url = urlsplit(workers.environment["DATABASE_URL"])
    host = f"darkroom_worker:new%2Fpassword@{url.hostname}:{url.port}"
    workers.environment["DATABASE_URL"] = url._replace(netloc=host).geturl()
    workers.start(WORKER_POLL_SECONDS=0.1)
    old.kill()  # it cannot hand back what it holds: the lease runs out
    workers.backdate_leases()
    workers.db.execute("select private.recover_stale_jobs()")

    workers.until(job, "completed")
    workers.stack._set_passwords()


def test_a_new_jwt_secret_loses_no_job(workers):
    stack, db = workers.stack, workers.db
    job = User(db).enqueued(params=SMALL)
    db.execute("update private.settings set max_attempts = 100")

    stack.settings.keep("JWT_SECRET", "another-secret-of-at-least-32-characters")
    restart_http(stack)
    late = workers.start(SUPABASE_URL=stack.api_url)  # still with the old key
    late.logged(f"job.retried job={job} code=internal")
    late.kill()
    workers.until_disconnected()  # what it asked for last may still be under way
    workers.environment["SUPABASE_URL"] = stack.api_url
    workers.environment["SUPABASE_SERVICE_KEY"] = stack.service_role_key
    workers.backdate_leases()
    workers.start(WORKER_POLL_SECONDS=0.1)

    workers.until(job, "completed")


def test_a_provider_token_that_was_revoked_too_early_fails_no_job(workers, fake):
    workers.db.execute("update public.models set is_active = true")
    fake.default = fake_replicate.Behaviour(polls=1)
    workers.db.runs_at("replicate", fake.url)
    old = workers.start(WORKER_POLL_SECONDS=0.1, REPLICATE_API_TOKEN=fake.token)
    fake.token = "r8_new"

    job = User(workers.db).enqueued("a lighthouse", "black-forest-labs/flux-schnell")
    eventually(lambda: "paused" in Service(workers.db).alerts())
    assert old.stop() == 0
    workers.start(WORKER_POLL_SECONDS=0.1, REPLICATE_API_TOKEN=fake.token)
    key_rotation("resume_model", workers)
    hook = Service(workers.db).register_webhook()["webhook_id"]
    key_rotation("rotate_webhook", workers, webhook_id=hook)
    Service(workers.db).delete_webhook(hook)

    workers.until(job, "completed")
    assert set(workers.outcomes(job)) == {"released", "completed"}
    assert len(fake.predictions) == 1
