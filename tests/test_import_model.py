"""scripts/import_model.py: what `make import-model` shows, changes and refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from database import PROJECT, unchanged
from models import TEXT, URI, model_id, recorded_models, replicate_model

MODEL = replicate_model({"prompt": TEXT, "image": URI, "lora": TEXT}, required=["prompt"])


@pytest.fixture
def run(db, tmp_path):
    """Run the script on a model; return exit code and what it says."""

    def run(*arguments: str, model: object = MODEL, **environment: str) -> tuple[int, str]:
        file = tmp_path / "model.json"
        file.write_text(model if isinstance(model, str) else json.dumps(model))
        clean = {name: text for name, text in os.environ.items() if "REPLICATE" not in name}
        done = subprocess.run(
            [sys.executable, PROJECT / "scripts" / "import_model.py", *arguments],
            cwd=tmp_path,
            env=clean | {"DATABASE_URL": db.url} | environment,
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr

    return run


def test_it_shows_what_changes_and_changes_it(db, run):
    code, said = run("Somebody/A-Model", "--file", "model.json", "--credits", "3")

    assert code == 0
    assert "  price_credits: - -> 3\n" in said
    assert '  input_schema.properties.image.format: - -> "uri"\n' in said
    row = db.row("select * from public.models where id = 'somebody/a-model'")
    assert (row["price_credits"], row["is_active"], row["client_inputs"]) == (3, True, ["image"])


def test_again_it_shows_only_what_is_new(db, run):
    run("--file", "model.json")

    assert run("--file", "model.json") == (0, "  nothing changes\n")
    code, said = run("--file", "model.json", "--allow", "lora", "--set", '{"title": "Mine"}')

    assert (code, said) == (0, '  client_inputs: +lora\n  title: "A Model" -> "Mine"\n')


def test_a_dry_run_changes_nothing(db, run):
    with unchanged(db):
        code, said = run("--file", "model.json", "--dry-run")

    assert (code, "  title:" in said) == (0, True)


@pytest.mark.parametrize(
    ("arguments", "model", "reason"),
    [
        (["other/model", "--file", "model.json"], MODEL, "holds somebody/a-model, not other/model"),
        (["--file", "model.json"], "{", "is no JSON"),
        (["--file", "model.json"], [], "owner and name"),
        (["--file", "model.json"], replicate_model({}, TEXT), "model: its output is text"),
        (["--file", "nowhere.json"], MODEL, "nowhere.json"),
        (["--file", "model.json", "--allow", "x"], MODEL, "model: it has no input x"),
        (["--file", "model.json", "--set", "{"], MODEL, "--set"),
        (["--file", "model.json", "--set", '{"max_images": 99}'], MODEL, "max_images_is_sane"),
        (["--file", "model.json", "--credits", "-1"], MODEL, "prices_are_not_negative"),
        (["some/model"], MODEL, "REPLICATE_API_TOKEN is not set"),
        ([], MODEL, "say which model"),
    ],
)
def test_what_is_refused_ends_in_one_with_the_reason(db, run, arguments, model, reason):
    with unchanged(db):
        code, said = run(*arguments, model=model)

    assert code == 1
    assert said.splitlines()[-1].startswith("import-model: ") or reason in said
    assert reason in said
    assert "Traceback" not in said


@pytest.fixture
def api():
    """A provider that knows one model."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = self.path == "/v1/models/somebody/a-model"
            allowed = self.headers["Authorization"] == "Bearer r8_test"
            self.send_response(200 if known and allowed else 404)
            self.end_headers()
            self.wfile.write(json.dumps(MODEL).encode())

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(("name", "code"), [("somebody/a-model", 0), ("somebody/else", 1)])
def test_it_asks_the_provider(db, run, api, name, code):
    done, said = run(name, REPLICATE_API_TOKEN="r8_test", REPLICATE_API_URL=api)

    assert done == code, said
    query = "select count(*) from public.models where id = 'somebody/a-model'"
    assert db.value(query) == 1 - code
    assert "r8_test" not in said


def test_make_passes_everything_on(db, tmp_path):
    file = tmp_path / "a model.json"
    file.write_text(json.dumps(MODEL))
    options = ["CREDITS=4", "PAID_CREDITS=0", "ALLOW=lora", 'SET={"deadline": "9 minutes"}']

    done = subprocess.run(
        ["make", "-s", "import-model", f"FILE={file}", "MODEL=somebody/a-model", *options],
        cwd=PROJECT,
        env=os.environ | {"DATABASE_URL": db.url},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    row = db.row("select * from public.models where id = 'somebody/a-model'")
    assert (row["price_credits"], row["paid_price_credits"]) == (4, 0)
    assert (row["client_inputs"], str(row["deadline"])) == (["image", "lora"], "0:09:00")


@pytest.mark.parametrize("model", recorded_models(), ids=model_id)
def test_it_maps_every_recorded_model(db, run, model):
    db.execute("delete from public.models")

    assert run("--file", "model.json", model=model)[0] == 0
