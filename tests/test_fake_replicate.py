"""Holds the fake provider to the real one's specification and recorded predictions.

REPLICATE_SPECS names a folder with the provider's `openapi.json` and `models/*.json`, each a model
with one real prediction as its `default_example`. They are not part of this repository.
"""

import json
import re
from typing import Any

import fake_replicate
import httpx
import pytest
import specs
from fake_replicate import TERMINAL
from jsonschema import Draft202012Validator
from models import recorded_models
from specs import shape

fake = fake_replicate.fake_replicate

SCHNELL = "black-forest-labs/flux-schnell"
SPEC = specs.folder("REPLICATE_SPECS") / "openapi.json"
pytestmark = pytest.mark.skipif(
    not SPEC.exists(), reason="REPLICATE_SPECS names no folder with the provider's specification"
)


@pytest.fixture
def http(fake):
    headers = {"Authorization": f"Bearer {fake.token}"}
    with httpx.Client(base_url=fake.url, headers=headers, trust_env=False) as http:
        yield http


def created(http, version=SCHNELL, **inputs: Any) -> dict[str, Any]:
    body = {"version": version, "input": {"prompt": "a lighthouse"} | inputs}
    return http.post("/predictions", json=body).raise_for_status().json()


def polled(http, prediction: dict[str, Any]) -> dict[str, Any]:
    return http.get(prediction["urls"]["get"]).json()


def finished(http, prediction: dict[str, Any]) -> dict[str, Any]:
    while prediction["status"] not in TERMINAL:
        prediction = polled(http, prediction)
    return prediction


def validator(name: str) -> Draft202012Validator:
    part = ("components", "schemas", f"schemas_{name}")
    return specs.validator(SPEC, *part, closed="schemas_prediction_response")


@pytest.mark.parametrize("removed", [False, True])
@pytest.mark.parametrize("status", sorted(TERMINAL))
def test_a_prediction_answers_as_specified_from_create_to_each_end(fake, http, status, removed):
    schema = validator("prediction_response")
    fake.next(ends=status, removed=removed, polls=3)

    prediction = created(http)
    schema.validate(prediction)
    while prediction["status"] not in TERMINAL:
        prediction = polled(http, prediction)
        schema.validate(prediction)

    assert (prediction["status"], prediction["data_removed"]) == (status, removed)
    validator("paginated_prediction_response").validate(http.get("/predictions").json())


def test_account_cancel_and_upload_answer_as_specified(http):
    answers = json.loads(SPEC.read_text())["paths"]["/account"]["get"]["responses"]
    schema = answers["200"]["content"]["application/json"]["schema"]
    Draft202012Validator(schema).validate(http.get("/account").json())

    canceled = http.post(created(http)["urls"]["cancel"]).json()
    validator("prediction_response").validate(canceled)
    assert canceled["status"] == "canceled"

    uploaded = http.post("/files", files={"content": ("cat.png", b"a cat", "image/png")})
    assert uploaded.status_code == 201
    validator("file_response").validate(uploaded.json())


@pytest.mark.parametrize(
    "body",
    [
        {"version": SCHNELL, "input": {}},
        {"version": SCHNELL, "input": {}, "stream": False},
        {"version": SCHNELL, "input": {}, "webhook": "https://example.com/hook"},
        {"version": SCHNELL, "input": {}, "webhook": 1},
        {"version": SCHNELL, "input": {}, "webhook_events_filter": ["start"]},
        {"version": SCHNELL, "input": {}, "model": SCHNELL},
        {"version": SCHNELL, "input": "a lighthouse"},
        {"version": SCHNELL},
        {"version": 1, "input": {}},
        [],
    ],
    ids=json.dumps,
)
def test_create_accepts_the_specified_bodies_only(fake, http, body):
    accepted = validator("version_prediction_request").is_valid(body)

    assert http.post("/predictions", json=body).status_code == (201 if accepted else 422)
    assert len(fake.predictions) == (1 if accepted else 0)


@pytest.mark.parametrize("model", recorded_models(), ids=lambda model: model["name"])
def test_a_finished_prediction_looks_like_the_recorded_one(http, model):
    real = model["default_example"]

    mine = finished(http, created(http, f"{real['model']}:{real['version']}", **real["input"]))

    assert shape({key: mine[key] for key in real}) == shape(real)
    assert mine.keys() - real.keys() == {"urls", "logs", "source"}  # recorded without
    same = ("model", "version", "input")
    assert [mine[key] for key in same] == [real[key] for key in same]
    assert all(re.fullmatch("[0-9a-z]{26}", each["id"]) for each in (mine, real))
    for key in ("created_at", "started_at", "completed_at"):
        assert re.sub(r"\d", "0", mine[key]) == re.sub(r"\d", "0", real[key])
    assert mine["created_at"] <= mine["started_at"] <= mine["completed_at"]
