"""scripts/watch.py: `make top` says what is wrong, in words, at one look."""

import base64
import contextlib
import json
import os
import pty
import re
import subprocess
import sys
import time

import pytest
from actors import Worker
from database import PROJECT
from worker_process import eventually

from watch import screen

WATCH = [sys.executable, str(PROJECT / "scripts" / "watch.py")]


@pytest.fixture
def url(db, server):
    """The database as darkroom_monitor, with the password that is in the URL."""
    db.execute("alter role darkroom_monitor password 'looks-on'")
    return db.url.replace(db.url.partition("//")[2].partition("@")[0], "darkroom_monitor:looks-on")


@pytest.fixture
def top(url):
    """Looks once; the value is what `make top` printed."""

    def look(*options):
        environment = os.environ | {"DATABASE_URL": url}
        done = subprocess.run(
            [*WATCH, "top", *options], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return look


def line(text, start):
    """Return the one line that starts so."""
    (found,) = [each for each in text.splitlines() if each.startswith(start)]
    return found


def test_a_database_nobody_uses_is_well(top):
    text = top()

    assert text.startswith("Darkroom  OK ")
    assert "queue     0 ready, 0 delayed, 0 paused · 0 running" in text
    assert "\x1b" not in text


def test_as_json_it_is_one_line(top, alice):
    alice.enqueue()

    text = top("--json")

    assert text.count("\n") == 1
    assert json.loads(text)["health"]["depth"]["ready"] == 1


def test_a_dead_worker(db, alice, top):
    dead = Worker(db)
    alice.enqueue()
    alice.enqueue()
    dead.claimed()
    db.pass_time("200 seconds")

    text = top()

    assert "1 jobs are ready and no worker is alive" in line(text, "! no_worker")
    assert "past lease or deadline" in line(text, "! stuck")
    (row,) = [each for each in text.splitlines() if each.startswith(f"{dead.id} ")]
    assert "silent" in row and "1/4" in row and re.search(r"2\d\d s ago$", row)


def test_cron_that_stopped(db, top):
    db.execute("insert into private.routines (name, every) values ('recover', '1 minute')")
    db.pass_time("10 minutes")

    text = top()

    assert "recover last ran at" in line(text, "! cron_silent")
    assert "recover 00:10:0" in line(text, "cron ")
    assert "cron.job_run_details" in text


def test_a_transaction_that_holds_back_vacuum(db, top):
    session = db.connect()
    session.execute("set application_name = 'forgotten'")
    with session.transaction():
        session.execute("select pg_current_xact_id()")
        assert "forgotten" not in top()  # a moment is no harm
        hold_for_half_an_hour(db)

        text = top()

    held = f"held back by session {session.info.backend_pid} forgotten, idle in transaction"
    assert f"{held} for 00:30:0" in line(text, "vacuum ")


def hold_for_half_an_hour(db):
    """Let each session have begun earlier: xact_start cannot be backdated, but how it is read."""
    view = db.value("select pg_get_viewdef('private.vacuum_holders')")
    assert view.count("now() - a.xact_start") == 1
    later = view.replace("now() - a.xact_start", "now() - a.xact_start + interval '30 minutes'")
    db.execute(f"create or replace view private.vacuum_holders as {later}")


def test_workers_that_notify_does_not_reach(top, worker):
    worker.heartbeat(is_listening=False)

    text = top()

    assert "transaction pooler" in text.split("! not_listening")[1].split("!")[0]
    assert "polling" in line(text, f"{worker.id} ")


def test_a_provider_that_refuses_the_account(alice, top, worker):
    alice.enqueue()
    worker.pause_provider("preview", 60, "create: HTTP 401: invalid token")

    text = top()

    assert "provider preview until" in line(text, "! paused")
    assert "billing and key" in text and "HTTP 401" not in text


def test_errors_are_counted_by_their_code(alice, top, worker):
    alice.enqueue()
    worker.fail_job(worker.claimed(), "internal", "upload: 403 new row violates row-level security")

    (error,) = [each for each in top().splitlines() if " internal " in each and "failed," in each]

    assert error.split()[0] == "1" and "violates" not in error


def test_a_hostile_name_does_not_reach_the_terminal(db, top):
    session = db.connect()
    session.execute("set application_name = 'a\x1b]0;title\x07\u202ec'")
    with session.transaction():
        session.execute("select pg_current_xact_id()")
        hold_for_half_an_hour(db)
        text = top()

    assert "held back by" in text
    assert not {"\x1b", "\x07", "\x9b", "\u202e"} & set(text)


def test_a_look_makes_one_report(db):
    """A report is nearly all that a look costs."""
    environment = os.environ | {"DATABASE_URL": db.url, "PGOPTIONS": "-c track_functions=all"}

    subprocess.run([*WATCH, "top"], env=environment, capture_output=True, check=True)

    made = "select calls from pg_stat_user_functions where funcname = 'queue_report'"
    eventually(lambda: db.execute(made) == [{"calls": 1}])


def test_lines_are_cut_to_the_width(top):
    text = screen(json.loads(top("--json")), 60, is_watched=False)

    assert max(map(len, text.splitlines())) == 60


def test_on_a_terminal_it_looks_again_and_again(url):
    """About 1.5 s, on a terminal of the test's."""
    ours, theirs = pty.openpty()
    environment = os.environ | {"DATABASE_URL": url, "COLUMNS": "100"}
    with subprocess.Popen(
        [*WATCH, "top", "--every", "0.3"], env=environment, stdin=theirs, stdout=theirs
    ) as process:
        os.close(theirs)
        screen, deadline = b"", time.monotonic() + 20
        with contextlib.suppress(OSError):
            while screen.count(b"\x1b[2J") < 3 and time.monotonic() < deadline:
                screen += os.read(ours, 65536)
        process.kill()
    os.close(ours)

    assert screen.count(b"\x1b[H\x1b[2J") >= 3
    assert b"\x1b[1;32mDarkroom  OK" in screen


@pytest.mark.parametrize("every", ["0", "-1", "soon"])
def test_nonsense_is_refused(url, every):
    done = subprocess.run(
        [*WATCH, "top", "--every", every], capture_output=True, text=True, check=False
    )

    assert done.returncode == 2
    assert "--every: invalid positive value" in done.stderr


def test_a_connection_string_that_is_none_is_named(url):
    environment = os.environ | {"DATABASE_URL": "postgresql://u:secret@["}

    done = subprocess.run(
        [*WATCH, "top"], env=environment, capture_output=True, text=True, check=False
    )

    assert (done.returncode, done.stderr) == (1, "top: DATABASE_URL is no connection string\n")


def test_a_key_names_the_role_and_expires():
    environment = os.environ | {"JWT_SECRET": "a secret of the test's"}

    done = subprocess.run(
        [*WATCH, "key", "--days", "2"], env=environment, capture_output=True, text=True, check=True
    )

    body = done.stdout.split(".")[1]
    claims = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
    assert claims["role"] == "darkroom_monitor"
    assert 0 < claims["exp"] - time.time() - 86_400 < 86_500
