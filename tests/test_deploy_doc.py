"""docs/deploy.md: what it shows of an installation and of a check is what these print."""

from __future__ import annotations

import os
import subprocess

import test_worker_check
from database import PROJECT
from documents import read, shows
from pooler import pgbouncer
from test_migrate import run

fake, check, stack_db = test_worker_check.fake, test_worker_check.check, test_worker_check.stack_db

INSTALL, CHECK = (
    each for each in read(PROJECT / "docs/deploy.md") if each.what == "tests/test_deploy_doc.py"
)


def test_an_installation_beside_another_app_says_what_the_page_says(supabase_db):
    supabase_db.execute("create publication supabase_realtime")
    supabase_db.execute((PROJECT / "tests/other_app.sql").read_text())
    assert INSTALL.text == "make migrate DATABASE_URL=postgresql://…\n"

    done = run(supabase_db.url, f"{supabase_db.name}\n")

    assert done.returncode == 0, done.stderr
    assert shows(done.stdout, INSTALL.shown), done.stdout


def test_a_check_of_what_is_wrong_says_what_the_page_says(check, stack_db):
    cron = "update cron.job set active = {} where jobname = 'darkroom_recover_stale_jobs'"
    rows = "alter table storage.objects {} row level security"
    stack_db.execute(cron.format(False))
    stack_db.execute(rows.format("disable"))
    try:
        with pgbouncer(check.url, "transaction") as url:
            changes = {"DATABASE_URL": url, "REPLICATE_API_TOKEN": "r8_wrong"}
            done = subprocess.run(
                ["bash", "-c", CHECK.text],
                cwd=PROJECT,
                env=os.environ | check.environment | changes,
                capture_output=True,
                text=True,
                check=False,
            )
    finally:
        stack_db.execute(cron.format(True))
        stack_db.execute(rows.format("enable"))

    assert done.returncode == 1, done.stderr
    assert shows(done.stdout, CHECK.shown), done.stdout
