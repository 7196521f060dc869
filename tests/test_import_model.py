"""scripts/import_model.py: what `make import-model` shows, changes and refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from database import PROJECT, unchanged
from models import TEXT, URI, fal_model, replicate_model
from receiver import Answer, Receiver

MODEL = replicate_model({"prompt": TEXT, "image": URI, "lora": TEXT}, required=["prompt"])


@pytest.fixture
def run(db, tmp_path):
    """Run the script on a model; return exit code and what it says."""

    def run(*arguments: str, model: object = MODEL, **environment: str) -> tuple[int, str]:
        file = tmp_path / "model.json"
        file.write_text(model if isinstance(model, str) else json.dumps(model))
        clean = {
            name: text
            for name, text in os.environ.items()
            if not name.startswith(("REPLICATE", "FAL"))
        }
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
    with unchanged(db):
        code, said = run("--file", "model.json", "--dry-run")
    assert (code, "  title:" in said) == (0, True)

    code, said = run("Somebody/A-Model", "--file", "model.json", "--credits", "3")

    assert code == 0
    assert "  price_credits: - -> 3\n" in said
    assert '  input_schema.properties.image.format: - -> "uri"\n' in said
    row = db.row("select * from public.models where id = 'somebody/a-model'")
    assert (row["price_credits"], row["is_active"], row["client_inputs"]) == (3, True, ["image"])

    assert run("--file", "model.json") == (0, "  nothing changes\n")
    code, said = run("--file", "model.json", "--allow", "lora", "--set", '{"title": "Mine"}')
    assert (code, said) == (0, '  client_inputs: +lora\n  title: "A Model" -> "Mine"\n')


@pytest.mark.parametrize(
    ("arguments", "model", "reason"),
    [
        (["other/model", "--file", "model.json"], MODEL, "holds somebody/a-model, not other/model"),
        (["--file", "model.json"], "{", "is no JSON"),
        (["--file", "model.json"], [], "owner and name"),
        (["--file", "model.json"], replicate_model({}, TEXT), "model: its output is text"),
        (["--file", "nowhere.json"], MODEL, "nowhere.json"),
        (["--file", "model.json", "--set", "{"], MODEL, "--set"),
        (["--file", "model.json", "--set", '{"max_images": 99}'], MODEL, "max_images_is_sane"),
        (["--file", "model.json", "--credits", "-1"], MODEL, "prices_are_not_negative"),
        (["some/model"], MODEL, "REPLICATE_API_TOKEN is not set"),
        (["some/model", "--provider", "fal"], MODEL, "FAL_KEY is not set"),
        (["--file", "model.json", "--set", '{"outputs_path": "$["}'], MODEL, "jsonpath"),
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


REPLICATE = ("somebody/a-model", "replicate", "/v1/models/somebody/a-model", "Bearer k-test")
FAL = (
    *("fal-ai/a/model", "fal"),
    *("/v1/models?endpoint_id=fal-ai/a/model&expand=openapi-3.0", "Key k-test"),
)
FAL_MODEL = {"models": [fal_model("fal-ai/a/model", {"prompt": TEXT})]}


@pytest.mark.parametrize(
    ("asked", "answer", "code"),
    [
        (REPLICATE, Answer(200, body=json.dumps(MODEL).encode()), 0),
        (REPLICATE, Answer(404), 1),
        (FAL, Answer(200, body=json.dumps(FAL_MODEL).encode()), 0),
        (FAL, Answer(200, body=b'{"models": []}'), 1),
    ],
)
def test_it_asks_the_provider(db, run, asked, answer, code):
    name, provider, path, authorization = asked
    with Receiver() as api:
        api.answer = answer
        address = {"REPLICATE_API_TOKEN": "k-test", "FAL_KEY": "k-test"}
        address |= dict.fromkeys(("REPLICATE_API_URL", "FAL_API_URL"), api.url("/v1"))
        done, said = run(name, "--provider", provider, **address)

    assert done == code, said
    assert [request.path for request in api.requests] == [path]
    assert api.requests[0].headers["authorization"] == authorization
    query = "select count(*) from public.models where id in ('somebody/a-model', 'fal-ai/a-model')"
    assert db.value(query) == 1 - code
    assert "k-test" not in said


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
