"""Cards and the picture over them: shapes, what waits, what failed, and what is done with a picture.

SCREENSHOTS=folder keeps the pictures.
"""

from __future__ import annotations

import re

from app_page import PHONE, App
from playwright.sync_api import Locator, expect
from worker_process import eventually

pytest_plugins = ["http_fixtures"]

LIGHTHOUSE = "a lighthouse at dusk, oil painting"
FOX = "a fox in the snow"
REFUSED = "a city in the rain [fail:moderated]"


def shaped(app: App, prompt: str, shape: str) -> None:
    app.press(shape)
    app.ask(prompt)


def dialog(app: App) -> Locator:
    return app.page.get_by_role("dialog")


def test_zz_states_at_both_sizes(alice, workers):
    shaped(alice, LIGHTHOUSE, "Portrait")
    shaped(alice, FOX, "Landscape")
    alice.until(FOX, "queued")
    alice.look("waiting")
    workers.start(PREVIEW_SECONDS=12)
    expect(alice.until(FOX, "processing")).to_contain_text(re.compile("Developing [67]"), timeout=20_000)
    alice.look("developing")
    alice.until_drawn(FOX)
    alice.until_drawn(LIGHTHOUSE)
    shaped(alice, REFUSED, "Landscape")
    alice.until(REFUSED, "failed")
    alice.look("failed")
    alice.press(f"Open: {LIGHTHOUSE}")
    expect(dialog(alice)).to_be_visible()
    alice.wait(0.5)
    alice.look("viewer")
    alice.press("Delete", dialog(alice))
    alice.look("deleted")
