"""docs/webhooks.md: what it says is sent is sent, and its receiver takes that and nothing else."""

from __future__ import annotations

import contextlib
import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
from database import PROJECT, Database
from documents import Reader, read, shows
from edge import OFFLINE
from receiver import Answer, Receiver, Request
from worker_process import eventually

from processes import free_port, spawn
from stack import DENO, Stack, deno

BLOCKS = read(PROJECT / "docs" / "webhooks.md")
(SOURCE,) = (block.text for block in BLOCKS if "Deno.serve" in block.text)
(SENT,) = (block.text for block in BLOCKS if block.text.startswith("POST "))
SEEN = ("content-type", "webhook-id", "webhook-timestamp", "webhook-signature")


class Backend(Receiver):
    """Takes webhooks, and hands them to the receiver of the page once that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.behind, self.answered = "", [0]
        self.answer = self.hand_on

    def hand_on(self, request: Request) -> Answer:
        self.answered.append(self.status(request.headers, request.body))
        return Answer(self.answered[-1])

    def status(self, headers: dict[str, str], body: bytes) -> int:
        signed = {name: headers[name] for name in SEEN if name in headers}
        return httpx.post(self.behind, headers=signed, content=body).status_code

    @contextlib.contextmanager
    def served(self, folder: Path, secret: str) -> Iterator[Path]:
        """Run the receiver of the page; yield its log."""
        source, listens, log = folder / "receiver.ts", f"127.0.0.1:{free_port()}", folder / "log"
        source.write_text(SOURCE)
        self.behind = f"http://{listens}"
        environment = DENO | {"DENO_DIR": str(folder), "DENO_SERVE_ADDRESS": f"tcp:{listens}"}
        environment |= {"DARKROOM_WEBHOOK_SECRET": secret}
        rights = [f"--allow-net={listens}", "--allow-env=DARKROOM_WEBHOOK_SECRET", "--check"]
        command = [deno(), "run", *OFFLINE, "--cached-only", "--no-prompt", *rights, str(source)]
        process = spawn(command, log=log, cwd=Path("/"), env=environment)
        try:
            process.wait_until(lambda: "Listening" in log.read_text(), 60, log)
            yield log
        finally:
            process.stop(signal.SIGTERM, 10)


class Operator(Reader):
    def __init__(self, stack: Stack, folder: Path, url: str) -> None:
        super().__init__(stack, folder)
        self.environment["WEBHOOK_URL"] = url
        self.blocks = {block.text: block for block in BLOCKS if block.is_run}

    def does(self, start: str) -> str:
        """Run the block that begins so; hold what it prints to the page."""
        (text,) = (text for text in self.blocks if text.startswith(start))
        block = self.blocks.pop(text)
        printed = str(getattr(self, block.language)(block))
        assert shows(printed, block.shown), f"{block.text}\n{printed}"
        return printed

    def makes_a_picture(self) -> str:
        answer = httpx.post(
            f"{self.stack.api_url}/rest/v1/rpc/enqueue_generation",
            headers={
                "apikey": self.stack.anon_key,
                "Authorization": f"Bearer {self.environment['TOKEN']}",
            },
            json={"model": "darkroom/preview", "prompt": "a lighthouse at dusk"},
        )
        return str(answer.raise_for_status().json()["job_id"])


def test_a_receiver_takes_what_is_sent_once_and_refuses_all_else(tmp_path):
    (tmp_path / "reader").mkdir()
    with (
        Backend() as backend,
        Stack(tmp_path / "stack", fsync=False).running() as stack,
        contextlib.closing(Database(stack.database_url, "postgres")) as db,
    ):
        environment = stack.worker_environment() | {"WEBHOOK_ALLOWED_HOSTS": backend.host}
        stack.worker.start(environment)
        operator = Operator(stack, tmp_path / "reader", backend.url("/hooks/darkroom"))
        operator.does("update private.settings")
        operator.does("service() {")
        webhook = json.loads(operator.does("service register_webhook"))
        operator.environment["webhook_id"] = webhook["webhook_id"]

        with backend.served(tmp_path, webhook["secret"]) as log:
            job = operator.makes_a_picture()
            (sent,) = backend.until(1, 60)
            head = "".join(f"{name}: {sent.headers[name]}\n" for name in SEEN)
            assert shows(f"POST {sent.path}\n{head}\n{sent.body.decode()}", SENT), sent
            eventually(lambda: backend.answered[-1] == 204)
            assert log.read_text().count(f"generation.completed {job}") == 1

            stale = sent.headers | {"webhook-timestamp": str(int(time.time()) - 301)}
            for headers in (stale, {}, sent.headers | {"webhook-signature": "v1,"}):
                assert backend.status(headers, sent.body) == 401
            assert backend.status(sent.headers, sent.body.replace(b"dusk", b"dawn")) == 401
            numberless = sent.headers | {"webhook-timestamp": "soon"}
            assert backend.status(numberless, sent.body) == 401

            eventually(
                lambda: db.value("select bool_and(state = 'delivered') from private.deliveries")
            )
            db.execute(
                "update private.deliveries set state = 'dead', attempts = 10, last_status = 500"
            )
            operator.does("service list_deliveries")
            operator.does("service redeliver_dead")
            _, again = backend.until(2, 60)
            assert again.id == sent.id
            eventually(lambda: backend.answered[1:] == [204, 204])
            assert log.read_text().count("generation.completed") == 1

            db.execute("select public.rotate_webhook_secret(%s)", webhook["webhook_id"])
            operator.makes_a_picture()
            backend.until(3, 60)
            eventually(lambda: backend.answered[1:] == [204, 204, 204])
        operator.does("update private.push_texts")
        assert not operator.blocks
