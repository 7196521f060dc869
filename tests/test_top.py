"""scripts/watch.py: `make top` says what is wrong, in words, at one look."""

import base64
import json
import os
import re
import subprocess
import sys
import time

import pytest
from actors import Worker
from database import PROJECT

from watch import screen

WATCH = [sys.executable, str(PROJECT / "scripts" / "watch.py")]


def run(*arguments, **environment):
    return subprocess.run(
        [*WATCH, *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def url(db):
    """The database as darkroom_monitor, with the password that is in the URL."""
    db.execute("alter role darkroom_monitor password 'looks-on'")
    return db.url.replace(db.url.partition("//")[2].partition("@")[0], "darkroom_monitor:looks-on")


def line(text, start):
    """Return the one line that starts so."""
    (found,) = [each for each in text.splitlines() if each.startswith(start)]
    return found


def test_it_prints_the_report_as_text_or_as_one_line_of_json(url, alice):
    alice.enqueue()

    text = run("top", DATABASE_URL=url).stdout
    told = run("top", "--json", DATABASE_URL=url).stdout

    assert text.startswith("Darkroom  CRITICAL ")
    assert "queue     1 ready, 0 delayed, 0 paused" in text and "· 0 running" in text
    assert "\x1b" not in text
    assert told.count("\n") == 1
    assert json.loads(told)["health"]["depth"]["ready"] == 1


def test_it_names_what_is_wrong(db, alice, monitor):
    dead = Worker(db)
    db.execute("insert into private.routines (name, every) values ('recover', '1 minute')")
    for _ in range(2):
        alice.enqueue()
        dead.claimed()
    alice.enqueue()
    db.pass_time("600 seconds")
    deaf = Worker(db)
    deaf.heartbeat(is_listening=False)
    deaf.pause_provider("preview", 60, "create: HTTP 401: invalid token")
    db.execute("insert into private.budgets (period, limit_usd) values ('day', 0)")
    report = monitor.queue_report()
    name = "a\x1b]0;title\x07\u202ec"  # a session may be called anything
    holder = {"kind": "session", "pid": 7, "name": name, "state": "idle in transaction"}
    report["vacuum_holders"] = [
        {**holder, "seconds": 59, "transactions": 3},  # a moment is no harm
        {**holder, "seconds": 1805, "transactions": 3},
    ]

    text = screen(report, 200, is_watched=False)

    assert "past lease or deadline" in line(text, "! stuck")
    assert re.search(r"silent .* 2/4 +60\d s ago$", line(text, f"{dead.id} "))
    assert "recover last ran at" in line(text, "! cron_silent")
    assert "recover 00:10:0" in line(text, "cron ")
    assert "cron.job_run_details" in text
    assert "transaction pooler" in text.split("! not_listening")[1].split("!")[0]
    assert "polling" in line(text, f"{deaf.id} ")
    assert "provider preview until" in line(text, "! paused")
    assert "app: 0.00 of 0.00 USD of this day" in line(text, "! budget")
    assert "0.00 reserved of 0.00 USD this day" in line(text, "budget ")
    assert "billing and key" in text and "HTTP 401" not in text
    held = "held back by session 7 a·]0;title··c, idle in transaction for 00:30:05"
    assert held in line(text, "vacuum ")
    assert max(map(len, screen(report, 60, is_watched=False).splitlines())) == 60


def test_nonsense_is_refused():
    for every in ("0", "-1", "soon"):
        done = run("top", "--every", every)
        assert done.returncode == 2
        assert "--every: invalid positive value" in done.stderr
    done = run("top", DATABASE_URL="postgresql://u:secret@[")
    assert (done.returncode, done.stderr) == (1, "top: DATABASE_URL is no connection string\n")


def test_a_key_names_the_role_and_expires():
    done = run("key", "--days", "2", JWT_SECRET="a secret of the test's")

    body = done.stdout.split(".")[1]
    claims = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
    assert claims["role"] == "darkroom_monitor"
    assert 0 < claims["exp"] - time.time() - 86_400 < 86_500
