"""docs/providers.md: every block runs and shows what it says, and what it adds makes a picture."""

from __future__ import annotations

import base64
import io
import json

import pytest
from actors import User
from database import PROJECT, Database
from documents import read, run
from PIL import Image
from receiver import Answer, HttpServer, Request
from worker_process import Workers

from stack import postgres_program

KEY = "acme_key_of_this_worker"


class Acme(HttpServer):
    """The invented provider of the page: three phases, and a picture within the answer."""

    def __init__(self) -> None:
        super().__init__()
        self.jobs: list[dict[str, str]] = []
        self.phases = [{"phase": "cooking", "done": 0.4}, {"phase": "ready"}]
        self.keys: set[str | None] = set()

    def respond(self, request: Request) -> Answer:
        self.keys.add(request.headers.get("authorization"))
        if request.method == "POST":
            self.jobs.append(json.loads(request.body))
            return self.said({"job": {"ref": f"j-{len(self.jobs)}"}})
        phase = self.phases.pop(0) if len(self.phases) > 1 else self.phases[0]
        if phase["phase"] == "ready":
            picture = io.BytesIO()
            Image.effect_noise((64, 48), 99).save(picture, "PNG")
            phase = phase | {"pictures": [base64.b64encode(picture.getvalue()).decode()]}
        return self.said(phase)

    @staticmethod
    def said(body: object) -> Answer:
        return Answer(body=json.dumps(body).encode(), headers={"content-type": "application/json"})


@pytest.fixture
def documented(db: Database) -> Database:
    """A database in which all blocks of the page ran, each showing what the page says."""
    for block in read(PROJECT / "docs/providers.md"):
        assert block.is_run and block.language == "sql"
        command = [str(postgres_program("psql")), db.url, "-XAtq", "-v", "ON_ERROR_STOP=1"]
        printed = run(command, block.text)
        if block.shown:
            assert printed == block.shown
    return db


def test_a_provider_of_rows_alone_makes_a_picture(documented, stack, tmp_path):
    with Acme() as acme, Workers(documented, stack, tmp_path) as workers:
        documented.runs_at("acme", acme.origin)
        workers.start(ACME_API_KEY=KEY, WORKER_POLL_SECONDS=0.1)
        workers.extra_secrets = {KEY}
        alice = User(documented).has(credits=5)

        job = alice.enqueued("a lighthouse", "acme/easel", params={"width": 64})
        workers.until(job, "completed")

        assert acme.jobs == [{"model": "easel-2", "prompt": "a lighthouse", "size": "64x512"}]
        assert acme.keys == {f"Bearer {KEY}"}
        (image,) = alice.get_job_status(job)["images"]
        assert (image["width"], image["height"]) == (64, 48)

        acme.phases = [{"phase": "refused", "why": "the chef declined"}]
        refused = alice.enqueued("a lighthouse", "acme/easel")
        workers.until(refused, "failed")

        assert alice.get_job_status(refused)["error"]["code"] == "moderated"
        assert alice.credits() == 4
