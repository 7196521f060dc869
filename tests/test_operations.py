"""The runbook's move to another project, and then a change of all its keys, on two whole stacks."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fake_replicate
import httpx
import pytest
from actors import Service, User, Worker
from database import Database, assert_books_balance
from fake_replicate import FakeReplicate
from runbook import Section
from test_worker_process import Client
from worker_process import Workers, eventually

from stack import Stack

SMALL = {"width": 64, "height": 64}

fake = fake_replicate.fake_replicate


@pytest.fixture(scope="module")
def new_stack() -> Iterator[Stack]:
    """Another project: database and gateway, without Darkroom."""
    folder = Path(tempfile.mkdtemp(prefix="darkroom-tests-"))
    folder.chmod(0o711)
    stack = Stack(folder, fsync=False)
    stack.settings.secret("JWT_SECRET")
    try:
        stack.cluster.start()
        stack.gateway.start(stack.database_url)
        yield stack
    finally:
        stack.clean()
        shutil.rmtree(folder, ignore_errors=True)


def restart_gateway(stack: Stack) -> None:
    """Have Lite read functions and secrets anew."""
    stack.gateway.stop()
    stack.gateway.start(stack.database_url)


class Account(Client):
    """A user who can sign in again."""

    def __init__(self, stack: Stack) -> None:
        super().__init__(stack)
        self.id = self.call("get_entitlement")["user_id"]

    def sign_in(self, stack: Stack, email: str) -> None:
        """Sign in to this project, with the password given when signing up."""
        self.http = httpx.Client(base_url=stack.api_url, headers={"apikey": stack.anon_key})
        account = {"email": email, "password": "correct horse"}
        url = "/auth/v1/token?grant_type=password"
        session = self.http.post(url, json=account).raise_for_status().json()
        self.http.headers["Authorization"] = f"Bearer {session['access_token']}"


def move(old: Stack, new: Stack, folder: Path) -> None:
    """Do what the runbook says, up to the start of the workers."""
    Section("Backup").sh(folder, ADMIN_URL=old.database_url)
    Section("Restore").sh(folder, ADMIN_URL=new.database_url)
    Section("Restore").sql(new.database_url)
    new._set_passwords()
    restart_gateway(new)
    Section("Moving to another project").sh(
        folder,
        OLD_ADMIN_URL=old.database_url,
        OLD_API_URL=old.api_url,
        OLD_KEY=old.service_role_key,
        API_URL=new.api_url,
        SERVICE_ROLE_KEY=new.service_role_key,
    )


@pytest.fixture(scope="module")
def moved(new_stack: Stack, stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return the new project's stack, an account with a picture, and one with a job that waits."""
    folder = tmp_path_factory.mktemp("move")
    db = Database(stack.database_url, "postgres")
    account, waits = Account(stack), Account(stack)
    with Workers(db, stack, folder) as workers:
        workers.start()
        job = {"model": "darkroom/preview", "prompt": "a lighthouse", "params": SMALL}
        done = account.call("enqueue_generation", **job)["job_id"]
        workers.until(done, "completed")
    put = f"/storage/v1/object/inputs/{account.id}/mein Bild (1).png"
    png = {"content-type": "image/png"}
    account.http.post(put, content=b"\x89PNG", headers=png).raise_for_status()
    waiting = waits.call("enqueue_generation", **job)["job_id"]
    email = str(db.value("select email from auth.users where id = %s", account.id))
    move(stack, new_stack, folder)
    db.execute("delete from auth.users where id = any(%s::uuid[])", [account.id, waits.id])
    db.close()
    return new_stack, account, email, done, waiting


@pytest.fixture
def workers(moved: Any, tmp_path: Path) -> Iterator[Workers]:
    """Workers of the new project."""
    db = Database(moved[0].database_url, "postgres")
    db.lift_limits()
    db.execute("update private.settings set retry_base = '0'")
    with Workers(db, moved[0], tmp_path) as workers:
        yield workers
    db.close()


def test_users_find_their_account_credits_and_pictures_in_the_new_project(moved, workers):
    new, account, email, done, waiting = moved
    account.sign_in(new, email)

    job = account.call("get_job_status", job_id=done)
    assert (job["status"], account.call("get_entitlement")["credits"]) == ("completed", 9)
    assert account.download(job["images"][0]["path"]).content.startswith(b"\x89PNG")
    own = f"/storage/v1/object/inputs/{account.id}/mein Bild (1).png"
    assert account.http.get(own).content == b"\x89PNG"
    workers.start()
    workers.until(waiting, "completed")
    assert_books_balance(workers.db)


def test_pg_cron_has_its_jobs_in_the_new_project(workers):
    jobs = workers.db.execute(
        "select jobname from cron.job where jobname like 'darkroom%' and active"
    )

    assert len(jobs) == 4
    assert "cron_silent" not in Service(workers.db).alerts()


def key_rotation(block: str, workers: Workers, **variables: object) -> None:
    """Run one of the section's commands."""
    section = Section("Key rotation")
    (wanted,) = [each for each in section.of("sql") if block in each]
    section.blocks = [("sql", wanted)]
    section.sql(workers.db.url, **variables)


def test_a_new_database_password_loses_no_job(workers):
    user = User(workers.db)
    old = workers.start(PREVIEW_SECONDS=60, WORKER_GRACE_SECONDS=0.1)
    job = user.enqueued(params=SMALL)
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


def test_a_new_jwt_secret_loses_no_job(moved, workers):
    stack, db = moved[0], workers.db
    user = User(db)
    old = workers.start(PREVIEW_SECONDS=60, WORKER_GRACE_SECONDS=0.1)
    job = user.enqueued(params=SMALL)
    workers.until(job, "processing")

    assert old.stop() == 0
    stack.settings._keep("JWT_SECRET", "another-secret-of-at-least-32-characters")
    restart_gateway(stack)
    db.execute("update private.settings set max_attempts = 100")
    late = workers.start(SUPABASE_URL=stack.api_url)  # still with the old key
    late.logged(f"job.retried job={job} code=internal")
    late.kill()
    workers.until_disconnected()  # what it asked for last may still be under way
    workers.environment["SUPABASE_URL"] = stack.api_url
    workers.environment["SUPABASE_SERVICE_KEY"] = stack.service_role_key
    workers.backdate_leases()
    workers.start(WORKER_POLL_SECONDS=0.1)

    workers.until(job, "completed")
    assert workers.outcomes(job)[0] == "released"


def test_a_provider_token_that_was_revoked_too_early_fails_no_job(workers, fake: FakeReplicate):
    workers.db.execute("update public.models set is_active = true")
    fake.default = fake_replicate.Behaviour(polls=1)
    at = {"REPLICATE_API_URL": fake.url, "WORKER_POLL_SECONDS": 0.1}
    user = User(workers.db)
    old = workers.start(**at, REPLICATE_API_TOKEN=fake.token)
    fake.token = "r8_new"

    job = user.enqueued("a lighthouse", "black-forest-labs/flux-schnell")
    eventually(lambda: "paused" in Service(workers.db).alerts())
    assert old.stop() == 0
    workers.start(**at, REPLICATE_API_TOKEN=fake.token)
    key_rotation("resume_model", workers)

    workers.until(job, "completed")
    assert set(workers.outcomes(job)) == {"released", "completed"}
    assert len(fake.predictions) == 1


def test_both_webhook_secrets_sign_for_a_day(workers):
    db, service = workers.db, Service(workers.db)
    made = service.register_webhook()
    user, worker = User(db), Worker(db)
    user.enqueue()
    worker.complete_job(worker.claimed())

    key_rotation("rotate_webhook", workers, webhook_id=made["webhook_id"])

    (delivery,) = worker.claim_deliveries(made["webhook_id"])
    assert len(delivery.secrets) == 2 and made["secret"] in delivery.secrets
    query = "select previous_secret_until - now() from private.webhook_endpoints where id = %s"
    left = db.value(query, made["webhook_id"])
    assert re.match(r"23:59|1 day", str(left)), left
    service.delete_webhook(made["webhook_id"])
