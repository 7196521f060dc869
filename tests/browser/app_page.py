"""The app as somebody sees it in one tab: press, look, and what it asked the server for."""

from __future__ import annotations

import io
import os
import re
import uuid
from pathlib import Path
from typing import Any

from database import PROJECT, Database
from PIL import Image
from playwright.sync_api import Locator, Page, ViewportSize, expect
from worker_process import eventually

from stack import Stack

AXE = PROJECT / "examples/expo/node_modules/axe-core/axe.min.js"
WIDE: ViewportSize = {"width": 1280, "height": 720}
PHONE: ViewportSize = {"width": 390, "height": 844}
DEAREST = "Recraft 3 SVG"  # 16 credits, more than anybody has at first
PASSWORD = "correct horse battery staple"
API = re.compile(r"/(auth|rest|storage)/v1/")

# From the press to the frame after the one in which the card is there, in milliseconds.
WATCH_FOR_CARD = """prompt => {
  window.cardAfter = new Promise(resolve => {
    let pressedAt = null;
    const onPress = event => { pressedAt ??= event.timeStamp; };
    document.addEventListener('click', onPress, {capture: true, once: true});
    new MutationObserver((_, observer) => {
      const cards = [...document.querySelectorAll('[data-testid^="card-"]')];
      if (pressedAt === null || !cards.some(card => card.textContent.includes(prompt))) return;
      observer.disconnect();
      requestAnimationFrame(() => {
        const painted = new MessageChannel();
        painted.port1.onmessage = () => resolve(performance.now() - pressedAt);
        painted.port2.postMessage(null);
      });
    }).observe(document.body, {childList: true, subtree: true, characterData: true});
  });
}"""
# What is smaller than any preview is the blurhash.
IS_DRAWN = """prompt => [...document.querySelectorAll('[data-testid="card-completed"]')]
  .filter(card => card.textContent.includes(prompt))
  .flatMap(card => [...card.querySelectorAll('img[src^="blob:"]')])
  .some(picture => picture.complete && picture.naturalWidth >= 256)"""
# axe-core asks of a target no more than 24 pixels.
VIOLATIONS = """() => axe.run().then(({violations}) => [
  ...violations.flatMap(({id, help, nodes}) => nodes.map(node => `${id}: ${help}: ${node.html}`)),
  ...[...document.querySelectorAll('button, input, textarea')]
    .map(each => [each.getBoundingClientRect(), each])
    .filter(([{width, height}]) => width > 0 && Math.min(width, height) < 44)
    .map(([{width, height}, each]) => `${width} x ${height}: ${each.outerHTML}`),
])"""
SET_VISIBILITY = """state => {
  Object.defineProperty(document, 'visibilityState', {value: state, configurable: true});
  Object.defineProperty(document, 'hidden', {value: state === 'hidden', configurable: true});
  document.dispatchEvent(new Event('visibilitychange'));
}"""


def shot(page: Page, name: str, *, full: bool = False) -> None:
    """Keep what is on the screen, if somebody wants it."""
    if folder := os.environ.get("SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=Path(folder) / f"{name}.png", animations="disabled", full_page=full)


class App:
    def __init__(self, page: Page, db: Database) -> None:
        self.page, self.db = page, db
        self.email = f"ada-{uuid.uuid4().hex[:12]}@example.com"
        self.user_id = ""
        self.problems: list[str] = []
        page.on("pageerror", lambda error: self.problems.append(str(error)))

    # What somebody does.

    def open(self) -> None:
        self.page.goto("/")

    def sign_up(self) -> None:
        self.press("Create an account")
        self.page.get_by_label("Email").fill(self.email)
        self.page.get_by_label("Password").fill(PASSWORD)
        self.press("Create account")
        self.until_credits(10)
        query = "select id::text from auth.users where email = %s"
        self.user_id = str(self.db.value(query, self.email))

    def come_back(self, stack: Stack) -> None:
        """Have the password forgotten, and sign in with the code from the mail."""
        self.press("Forgot your password?")
        self.page.get_by_label("Email").fill(self.email)
        self.press("Send a code")
        self.page.get_by_label("Code").fill(self.code(stack))
        self.press("Continue")
        expect(self.page.get_by_label("New password")).to_be_visible()

    def code(self, stack: Stack) -> str:
        """The code in the last mail: the local stack writes into a log what others send."""

        def find() -> str | None:
            _, *mails = stack.lite.log.read_text().split(self.email)
            found = re.findall(r"\b\d{6}\b", mails[-1]) if mails else []
            return found[0] if found else None

        return str(eventually(find))

    def write(self, prompt: str) -> None:
        self.page.get_by_label("Prompt").fill(prompt)

    def press(self, name: str, within: Locator | None = None) -> None:
        (within or self.page).get_by_role("button", name=name).click()

    def ask(self, prompt: str) -> None:
        self.write(prompt)
        self.press("Generate")

    def choose(self, model: str) -> None:
        """Take another model from the sheet."""
        dialog = self.page.get_by_role("dialog")
        self.press("Model")
        self.press(model, dialog)
        expect(dialog).to_have_count(0)

    def pick_picture(self) -> None:
        """Start from a picture of the device."""
        content = io.BytesIO()
        Image.new("RGB", (64, 48), "teal").save(content, "PNG")
        with self.page.expect_file_chooser() as chooser:
            self.press("From a picture")
        chooser.value.set_files(
            {"name": "a.png", "mimeType": "image/png", "buffer": content.getvalue()}
        )

    def wait(self, seconds: float) -> None:
        """Let time pass in which nothing should happen, so that there is nothing to wait for."""
        self.page.wait_for_timeout(seconds * 1000)

    # What the network does.

    def cut(self) -> None:
        """Let no request reach the server."""
        self.page.route(API, lambda route: route.abort("connectionrefused"))

    def heal(self) -> None:
        self.page.unroute_all(behavior="ignoreErrors")

    # What is to be seen.

    def card(self, prompt: str, state: str | None = None) -> Locator:
        selector = f'[data-testid="card-{state}"]' if state else '[data-testid^="card-"]'
        return self.page.locator(selector, has_text=prompt)

    def until(self, prompt: str, state: str) -> Locator:
        card = self.card(prompt, state)
        expect(card).to_be_visible(timeout=20_000)
        return card

    def until_drawn(self, prompt: str) -> None:
        """Wait until the picture is there."""
        self.page.wait_for_function(IS_DRAWN, arg=prompt, timeout=20_000)

    def milliseconds_to_card(self, prompt: str) -> float:
        """Ask for a picture; return how long it took from the press to the card on the screen."""
        self.write(prompt)
        self.page.evaluate(WATCH_FOR_CARD, prompt)
        self.press("Generate")
        return float(self.page.evaluate("window.cardAfter"))

    def place(self, prompt: str) -> dict[str, float]:
        """Where the card is, and how large."""
        box = self.card(prompt).bounding_box()
        assert box
        return dict(box)

    def until_credits(self, count: int) -> None:
        expect(self.page.get_by_test_id("credits")).to_have_text(f"{count} credits", timeout=15_000)

    def shot(self, name: str) -> None:
        shot(self.page, name)

    def violations(self) -> list[str]:
        """What axe-core has against what is on the screen, and what is too small for a finger."""
        if not self.page.evaluate("'axe' in window"):
            self.page.evaluate(AXE.read_text())
        return list(self.page.evaluate(VIOLATIONS))

    def look(self, state: str) -> None:
        """Keep what is on the screen at both sizes, and hold it to the rules of accessibility."""
        before = self.page.viewport_size
        for suffix, size in (("", WIDE), ("-phone", PHONE)):
            self.page.set_viewport_size(size)
            self.wait(0.4)  # a picture fades in
            self.shot(state + suffix)
            problems = self.violations()
            assert not problems, "\n".join([state + suffix, *problems])
            assert self.page.evaluate("document.documentElement.scrollWidth") == size["width"]
        if before:
            self.page.set_viewport_size(before)

    def jobs(self) -> list[dict[str, Any]]:
        query = "select * from public.generations where user_id = %s order by id"
        return self.db.execute(query, self.user_id)
