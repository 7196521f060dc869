"""The function of one's own in docs/edge-functions.md: examples/functions/free_picture."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
from database import PROJECT
from documents import read
from edge import served
from http_client import PREVIEW, Client, SignedUp, answer, refusal
from http_fixtures import signed_up

pytest_plugins = ["http_fixtures"]

NAME, SECRET = "free_picture", "secret-of-the-captcha"
WISH = {"model": PREVIEW, "prompt": "a lighthouse at dusk"}


class Captcha(BaseHTTPRequestHandler):
    """Whoever verifies captchas: knows the app by its secret, and one good answer."""

    def do_POST(self) -> None:
        said = json.loads(self.rfile.read(int(self.headers["content-length"])))
        verdict = json.dumps({"success": said == {"secret": SECRET, "response": "solved"}})
        self.send_response(200)
        self.end_headers()
        self.wfile.write(verdict.encode())

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def address(tmp_path_factory, stack) -> Iterator[str]:
    verifier = ThreadingHTTPServer(("127.0.0.1", 0), Captcha)
    threading.Thread(target=verifier.serve_forever, args=[0.01], daemon=True).start()
    variables = {
        "SUPABASE_ANON_KEY": stack.anon_key,
        "SUPABASE_SERVICE_ROLE_KEY": stack.service_role_key,
        "CAPTCHA_SECRET": SECRET,
        "CAPTCHA_URL": f"http://127.0.0.1:{verifier.server_port}",
    }
    with served(tmp_path_factory.mktemp("deno"), NAME, stack.api_url, **variables) as url:
        yield url
    verifier.shutdown()


@pytest.fixture
def newcomer(endpoints, stack_db) -> Iterator[SignedUp]:
    """Somebody who signs up where users begin with nothing, as the page says to set it."""
    blocks = read(PROJECT / "docs/edge-functions.md")
    [setting] = [block.text for block in blocks if block.language == "sql"]
    stack_db.execute(setting)
    try:
        with signed_up(endpoints, stack_db) as user:
            yield user
    finally:
        stack_db.execute("update private.settings set welcome_credits = default")


def invoked(address: str, caller: Client, **body: Any) -> httpx.Response:
    headers = {"Authorization": f"Bearer {caller.token}"} if caller.token else {}
    return httpx.post(f"{address}/{NAME}", headers=headers, json=body, timeout=30)


def test_who_solves_the_captcha_gets_credits_once_a_day_and_the_picture(address, newcomer):
    assert refusal(newcomer.enqueue()).message == "insufficient_credits"

    first = invoked(address, newcomer, captcha="solved", **WISH)
    again = invoked(address, newcomer, captcha="solved", **WISH)

    assert (answer(first)["status"], answer(first)["credits_left"]) == ("queued", 2)
    assert answer(again)["credits_left"] == 1
    assert newcomer.ledger() == [("grant", 3), ("charge", -1), ("charge", -1)]


@pytest.mark.parametrize("captcha", ["wrong", "", None])
def test_a_captcha_that_is_not_solved_gives_nothing(address, user, captcha):
    refused = refusal(invoked(address, user, captcha=captcha, **WISH))

    assert refused.message == ("captcha_failed" if captcha else "invalid_input")
    assert user.ledger() == [("grant", 10)]


def test_nobody_solves_one_for_a_user_whom_the_body_names(address, user, nobody):
    refused = refusal(invoked(address, nobody, captcha="solved", user_id=user.id, **WISH))

    assert (refused.status, refused.message) == (401, "not_authenticated")
    assert user.ledger() == [("grant", 10)]


def test_what_the_database_refuses_is_handed_back_as_it_is(address, user):
    refused = refusal(invoked(address, user, captcha="solved", model="no/such", prompt="a"))

    assert (refused.status, refused.message) == (404, "not_found")
