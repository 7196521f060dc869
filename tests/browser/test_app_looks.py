"""What the app looks like in each of its states, at both sizes: axe-core has nothing against it.

SCREENSHOTS=folder keeps the pictures.
"""

from __future__ import annotations

from app_page import DEAREST
from playwright.sync_api import expect

pytest_plugins = ["http_fixtures"]

LIGHTHOUSE = "a lighthouse at dusk, oil painting"
PROMPTS = ["a fox in the snow", "a city in the rain, neon", "a bowl of plums", LIGHTHOUSE]


def test_signing_in(app):
    app.open()
    app.look("sign-in")
    app.press("Sign in")
    app.look("sign-in-problem")
    app.press("Create an account")
    app.look("sign-up")
    app.press("Back to sign in")
    app.press("Forgot your password?")
    app.look("reset")
    app.page.get_by_label("Email").fill("ada@example.com")
    app.press("Send a code")
    expect(app.page.get_by_label("Code")).to_be_visible()
    app.look("reset-code")


def test_composing(catalogue, alice):
    alice.open()
    alice.look("empty")
    alice.press("Model")
    expect(alice.page.get_by_role("dialog")).to_be_visible()
    alice.look("models")
    alice.press("Close")
    alice.write(LIGHTHOUSE)
    alice.choose(DEAREST)
    alice.look("lacking")
    alice.choose("Preview")
    alice.pick_picture()
    alice.look("start")


def test_waiting(alice, workers):
    alice.ask(LIGHTHOUSE)
    alice.until(LIGHTHOUSE, "queued")
    alice.look("queued")
    workers.start(PREVIEW_SECONDS=20)
    card = alice.until(LIGHTHOUSE, "processing")
    expect(card).to_contain_text("Developing 1", timeout=15_000)
    alice.look("developing")
    alice.press("Cancel", card)
    alice.until(LIGHTHOUSE, "canceled")
    alice.look("canceled")


def test_done(alice, workers):
    workers.start(PREVIEW_SECONDS=0.5)
    for prompt in PROMPTS:
        alice.ask(prompt)
        alice.until_drawn(prompt)
    alice.look("completed")
    alice.press(f"Open: {LIGHTHOUSE}")
    expect(alice.page.get_by_role("dialog")).to_be_visible()
    alice.look("viewer")


def test_refused(alice, workers, operator):
    workers.start(PREVIEW_SECONDS=0.5)
    alice.ask("a fox in the snow [fail:moderated]")
    alice.until("a fox in the snow", "failed")
    alice.look("failed")
    spent = {"amount": -10, "kind": "adjust", "external_id": alice.email}
    assert operator.rpc("grant_credits", user_id=alice.user_id, **spent).is_success
    alice.ask(LIGHTHOUSE)
    alice.until(LIGHTHOUSE, "refused")
    alice.look("refused")


def test_offline(alice, workers):
    workers.start()
    alice.ask(LIGHTHOUSE)
    alice.until_drawn(LIGHTHOUSE)
    alice.cut()
    alice.ask("a fox in the snow")
    alice.until("a fox in the snow", "waiting")
    expect(alice.page.get_by_test_id("offline")).to_be_visible()
    alice.look("offline")
    alice.heal()
