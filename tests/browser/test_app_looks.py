"""What the app looks like in each of its states, at both sizes: axe-core has nothing against it.

SCREENSHOTS=folder keeps the pictures.
"""

from __future__ import annotations

from app_page import DEAREST
from playwright.sync_api import expect

pytest_plugins = ["http_fixtures"]

LIGHTHOUSE = "a lighthouse at dusk, oil painting"
FOX = "a fox in the snow"
PICTURES = {
    FOX: "Landscape",
    "a city in the rain, neon": "Portrait",
    "a bowl of plums": "Square",
    "a tin robot in a field of poppies": "Landscape",
    "an old map of the moon": "Square",
    LIGHTHOUSE: "Portrait",
}


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


def test_a_new_password(alice, stack):
    alice.press("Sign out")
    alice.come_back(stack)
    alice.look("new-password")


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


def test_completed(alice, workers):
    workers.start(PREVIEW_SECONDS=0.5)
    for prompt, shape in PICTURES.items():
        alice.press(shape)
        alice.ask(prompt)
        alice.until_drawn(prompt)
    alice.look("completed")


def test_refused_and_canceled(alice, operator):
    alice.ask(FOX)
    alice.press("Cancel", alice.until(FOX, "queued"))
    alice.until(FOX, "canceled")
    alice.look("canceled")
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
    alice.ask(FOX)
    alice.until(FOX, "waiting")
    expect(alice.page.get_by_test_id("offline")).to_be_visible()
    alice.look("offline")
    alice.heal()
