"""Fixtures of the tests in a browser: the exported app in Chromium, the real stack, real workers.

Not part of `make test`; `make test-app` runs them. With SCREENSHOTS=folder they leave there what
they saw.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from actors import PREVIEW
from app_page import App
from database import Database
from playwright.sync_api import Browser, sync_playwright
from worker_process import Workers

from app import export, serve
from stack import Stack

FLAGS = [
    "--no-sandbox",  # it refuses to start as root with one
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="session")
def app_url(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where the exported app is served: another origin than the API's, as in production."""
    folder = tmp_path_factory.mktemp("app")
    export(folder, stack.api_url, stack.anon_key)
    with serve(folder) as url:
        yield url


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Chromium, as the distribution has it."""
    program = os.environ.get("CHROMIUM") or shutil.which("chromium")
    assert program, "there is no Chromium: run make test-app, or set CHROMIUM"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def app(browser: Browser, app_url: str, stack_db: Database) -> Iterator[App]:
    """The app in a first tab of a profile of its own, not opened yet."""
    context = browser.new_context(base_url=app_url, viewport={"width": 1180, "height": 760})
    app = App(context.new_page(), stack_db)
    yield app
    stack_db.execute("delete from auth.users where email = %s", app.email)
    assert app.problems == []
    context.close()


@pytest.fixture
def alice(app: App) -> App:
    """The app with somebody signed up in it."""
    app.open()
    app.sign_up()
    return app


@pytest.fixture
def catalogue(stack_db: Database) -> Iterator[Database]:
    """All models of the seed, active."""
    stack_db.execute("update public.models set is_active = true")
    yield stack_db
    stack_db.execute("select public.resume_model('stability-ai/sdxl')")
    stack_db.execute(
        "update public.models set is_active = (id = %s), requires_paid = false", PREVIEW
    )


@pytest.fixture
def workers(stack: Stack, stack_db: Database, tmp_path: Path) -> Iterator[Workers]:
    """Starts workers."""
    with Workers(stack_db, stack, tmp_path) as workers:
        yield workers
