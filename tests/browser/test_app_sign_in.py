"""Signing in, making an account, coming back without the password."""

from __future__ import annotations

import pytest
from app_page import PASSWORD, App
from playwright.sync_api import expect

pytest_plugins = ["http_fixtures"]

NEW_PASSWORD = "a new one, just as long"


@pytest.fixture
def bob(app: App) -> App:
    """The app with an account, and nobody signed in."""
    app.open()
    app.sign_up()
    app.press("Sign out")
    return app


def fill(app: App, **fields: str) -> None:
    for label, text in fields.items():
        app.page.get_by_label(label).fill(text)


def says(app: App, text: str) -> None:
    expect(app.page.get_by_role("alert")).to_have_text(text)


def test_what_is_missing_is_said_before_anybody_is_asked(app):
    app.open()
    app.press("Sign in")
    says(app, "Enter your email address.")
    fill(app, Email=app.email)
    app.press("Sign in")
    says(app, "Enter your password.")
    app.press("Create an account")
    expect(app.page.get_by_role("alert")).to_have_count(0)
    fill(app, Email=app.email, password="short")
    app.press("Create account")
    says(app, "A password has 6 characters or more.")


def test_password_managers_know_which_field_is_what(app):
    app.open()
    kind = {"Email": "email", "Password": "current-password"}
    for label, autocomplete in kind.items():
        expect(app.page.get_by_label(label)).to_have_attribute("autocomplete", autocomplete)
    app.press("Create an account")
    expect(app.page.get_by_label("Email")).to_be_focused()
    field = app.page.get_by_label("New password")
    expect(field).to_have_attribute("autocomplete", "new-password")


def test_a_wrong_password_is_said_and_the_right_one_signs_in(bob):
    fill(bob, Email=bob.email, Password="not the one")
    bob.press("Sign in")
    says(bob, "Email or password is wrong.")

    fill(bob, Password=PASSWORD)
    bob.page.keyboard.press("Enter")

    bob.until_credits(10)


def test_an_account_that_exists_is_said(bob):
    bob.press("Create an account")
    fill(bob, Email=bob.email, password=PASSWORD)
    bob.press("Create account")

    says(bob, "There is an account with this address. Sign in instead.")


def test_a_lost_password_is_replaced_with_a_code_from_a_mail(bob, stack):
    bob.come_back(stack)
    fill(bob, password=NEW_PASSWORD)
    bob.press("Save")
    bob.until_credits(10)

    bob.press("Sign out")
    fill(bob, Email=bob.email, Password=NEW_PASSWORD)
    bob.press("Sign in")

    bob.until_credits(10)


def test_a_wrong_code_is_said(bob):
    bob.press("Forgot your password?")
    fill(bob, Email=bob.email)
    bob.press("Send a code")
    fill(bob, Code="000000")
    bob.press("Continue")

    says(bob, "That code is wrong or too old.")


def test_without_a_server_it_says_so(bob):
    bob.cut()
    fill(bob, Email=bob.email, Password=PASSWORD)
    bob.press("Sign in")

    says(bob, "The server cannot be reached right now.")
    bob.heal()
