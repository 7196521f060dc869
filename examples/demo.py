"""One picture from prompt to file, over HTTP alone, and one that fails: how an app uses Darkroom.

    make demo PROMPT="a lighthouse at dusk, oil painting"

The class App is all an app needs; `make_picture` and `show_failure` use it. The rest starts the
local stack if it does not run, and prints.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import re
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT / "scripts"))

from processes import StackError  # noqa: E402
from stack import Stack, interrupt  # noqa: E402

MODEL = "darkroom/preview"
SIZE = {"width": 768, "height": 512}
DEFAULT_PROMPT = "a lighthouse at dusk, oil painting"
REFUSED_PROMPT = "a picture the safety filter refuses [fail:moderated]"
PATIENCE_SECONDS = 120

Job = dict[str, Any]
Note = Callable[[str], None]


class DemoError(Exception):
    """What went wrong, for the person at the terminal."""


class App:
    """What an app needs: HTTP and the token of its user."""

    def __init__(self, url: str) -> None:
        self.http = httpx.Client(base_url=url, timeout=30)

    def sign_up(self, email: str, password: str) -> None:
        account = {"email": email, "password": password}
        token = self._send("POST", "/auth/v1/signup", json=account).json()["access_token"]
        self.http.headers["Authorization"] = f"Bearer {token}"

    def rpc(self, function: str, **arguments: Any) -> Any:
        return self._send("POST", f"/rest/v1/rpc/{function}", json=arguments).json()

    def download(self, path: str) -> bytes:
        return self._send("GET", f"/storage/v1/object/generations/{path}").content

    def wait_for(self, job: Job, note: Note) -> Job:
        """Read the job's state as often as it asks for, until there is nothing to wait for."""
        give_up_at = time.monotonic() + PATIENCE_SECONDS
        read_at = time.monotonic() + job["poll_after_ms"] / 1000
        while job["poll_after_ms"] is not None:
            note(job.get("stage") or job["status"])
            time.sleep(0.1)
            if time.monotonic() > read_at:
                job = self.rpc("get_job_status", job_id=job["job_id"])
                read_at = time.monotonic() + (job["poll_after_ms"] or 0) / 1000
            check(time.monotonic() < give_up_at, f"still {job['status']}: does the worker run?")
        return job

    def _send(self, method: str, path: str, **request: Any) -> httpx.Response:
        response = self.http.request(method, path, **request)
        if response.is_error:
            raise DemoError(f"{path} was refused: {response.status_code} {response.text}")
        return response


def make_picture(app: App, prompt: str) -> None:
    """Look around, ask for a picture, download it; say what it cost."""
    with step("ping") as note:
        note("ok" if app.rpc("ping")["ok"] else "not ok")
    with step("list_models") as note:
        prices = {model["id"]: model["price_credits"] for model in app.rpc("list_models")}
        check(MODEL in prices, f"{MODEL} is not in the catalogue")
        note(f"{len(prices)} on offer, a picture by {MODEL} for {prices[MODEL]}")
    with step("get_entitlement") as note:
        before = app.rpc("get_entitlement")
        note(f"{before['plan']} plan, {before['credits']} credits")
    _, job = ask_and_wait(app, prompt)
    check(job["status"] == "completed", f"no picture: {json.dumps(job['error'])}")
    with step("download") as note:
        content = app.download(job["images"][0]["path"])
        note(f"{len(content)} bytes")

    image = Image.open(io.BytesIO(content), formats=["PNG"])
    image.load()  # decodes all of it
    check(image.size == (SIZE["width"], SIZE["height"]), f"the picture has size {image.size}")
    after = app.rpc("get_entitlement")["credits"]
    check(after == before["credits"] - prices[MODEL], f"{after} credits are left")
    slug = re.sub(r"[\W_]+", "-", prompt.lower())[:40].strip("-") or "picture"
    file = PROJECT / "demo" / f"{slug}-{job['job_id'][-8:]}.png"
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content)
    print(f"\nPicture {file.relative_to(PROJECT)} ({image.width} x {image.height})")
    show(job, f"{before['credits']} before, {after} after")


def show_failure(app: App) -> None:
    """Ask for a picture that fails: the job keeps what was asked, the credit comes back."""
    before = app.rpc("get_entitlement")["credits"]
    queued, job = ask_and_wait(app, REFUSED_PROMPT)
    after = app.rpc("get_entitlement")["credits"]

    check(job["status"] == "failed" and job["error"]["code"] == "moderated", "it did not fail")
    check((job["prompt"], job["params"]) == (REFUSED_PROMPT, SIZE), "it lost its input")
    check(queued["credits_left"] < after == before, f"{after} of {before} credits came back")
    print()
    show(job, f"{before} before, {queued['credits_left']} meanwhile, {after} after")


def ask_and_wait(app: App, prompt: str) -> tuple[Job, Job]:
    """Return the answer of enqueue_generation, and the job once it has ended."""
    key = str(uuid.uuid4())  # a request repeated with its key is the same job, charged once
    with step("enqueue_generation") as note:
        queued: Job = app.rpc(
            "enqueue_generation", model=MODEL, prompt=prompt, params=SIZE, idempotency_key=key
        )
        note(f"{queued['status']}, {queued['credits_left']} credits left")
    with step("get_job_status") as note:
        job = app.wait_for(queued, note)
        note(job["status"])
    return queued, job


def show(job: Job, credits: str) -> None:
    """Print what it cost and what the API says of it."""
    print(f"Credits {credits}")
    print(f"Job     {json.dumps(job, indent=2, ensure_ascii=False)}")


def check(is_right: bool, message: str) -> None:
    """Stop the demo if something is off."""
    if not is_right:
        raise DemoError(message)


@contextlib.contextmanager
def step(name: str) -> Iterator[Note]:
    """Print what a step is, what is going on in it and, when it is done, how long it took."""
    started, wheel, last = time.monotonic(), itertools.cycle("|/-\\"), ""
    is_terminal = sys.stdout.isatty()

    def note(text: str) -> None:
        nonlocal last
        if is_terminal:
            print(f"\r\033[K{name:20} {next(wheel)} {text}", end="", flush=True)
        elif last and last != text:
            print(f"{name:20} {last}", flush=True)
        last = text

    yield note
    start_of_line = "\r\033[K" if is_terminal else ""
    print(f"{start_of_line}{name:20} {last:50} {time.monotonic() - started:6.2f} s", flush=True)


def main() -> None:
    """Run the demo with the prompt of the command line."""
    prompt = " ".join(sys.argv[1:]).strip() or DEFAULT_PROMPT
    signal.signal(signal.SIGTERM, interrupt)
    stack = Stack.local(with_worker=True)
    try:
        with contextlib.ExitStack() as at_the_end:
            with step("local stack") as note:
                note("starting, if it does not run")
                at_the_end.enter_context(stack.running())
                note(stack.api_url)
            app = App(stack.api_url)
            with step("sign up") as note:
                email = f"demo-{uuid.uuid4().hex[:8]}@example.com"
                app.sign_up(email, password=uuid.uuid4().hex)
                note(email)
            make_picture(app, prompt)
            print("\nAnd one that fails:\n")
            show_failure(app)
    except (DemoError, StackError, httpx.TransportError, OSError) as error:
        sys.exit(f"\ndemo: {error}")
    except KeyboardInterrupt:
        sys.exit("\ndemo: interrupted")


if __name__ == "__main__":
    main()
