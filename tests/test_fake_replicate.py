"""Holds the fake provider to the real one's specification and recorded predictions.

REPLICATE_SPECS names a folder with the provider's `openapi.json` and `models/*.json`, each a model
with one real prediction as its `default_example`. They are not part of this repository; without
them the comparisons are skipped and only the fake's own behaviour is tested.
"""

import io
import json
import os
import re
from pathlib import Path
from typing import Any

import fake_replicate
import httpx
import pytest
from fake_replicate import TERMINAL, FakeReplicate
from jsonschema import Draft202012Validator
from PIL import Image

fake = fake_replicate.fake_replicate

SCHNELL = "black-forest-labs/flux-schnell"
SPECS = Path(os.environ.get("REPLICATE_SPECS") or "/nonexistent")
needs_specs = pytest.mark.skipif(
    "REPLICATE_SPECS" not in os.environ,
    reason="REPLICATE_SPECS is unset: it names the folder of the provider's specification",
)


class Client:
    """A client of the fake, as plain as can be."""

    def __init__(self, fake: FakeReplicate) -> None:
        headers = {"Authorization": f"Bearer {fake.token}"}
        self.http = httpx.Client(base_url=fake.url, headers=headers, trust_env=False)

    def create(self, version: str = SCHNELL, **inputs: Any) -> dict[str, Any]:
        answer = self.post({"version": version, "input": {"prompt": "a lighthouse"} | inputs})
        assert answer.status_code == 201, answer.text
        return answer.json()

    def post(self, body: Any) -> httpx.Response:
        return self.http.post("/predictions", json=body)

    def get(self, prediction: dict[str, Any]) -> dict[str, Any]:
        return self.http.get(prediction["urls"]["get"]).raise_for_status().json()

    def cancel(self, prediction: dict[str, Any]) -> dict[str, Any]:
        return self.http.post(prediction["urls"]["cancel"]).raise_for_status().json()

    def finish(self, prediction: dict[str, Any]) -> dict[str, Any]:
        while prediction["status"] not in TERMINAL:
            prediction = self.get(prediction)
        return prediction

    def upload(self, content: Any) -> httpx.Response:
        return self.http.post("/files", files={"content": content})

    def list(self, **query: str) -> dict[str, Any]:
        return self.http.get("/predictions", params=query).raise_for_status().json()

    def file(self, prediction: dict[str, Any]) -> httpx.Response:
        return httpx.get(prediction["output"][0], trust_env=False)


@pytest.fixture
def client(fake):
    client = Client(fake)
    with client.http:
        yield client


def recorded() -> list[Any]:
    """The real predictions, one per model; none where there are no specs."""
    models = [json.loads(path.read_text()) for path in sorted(SPECS.glob("models/*.json"))]
    return [pytest.param(model["default_example"], id=model["name"]) for model in models]


def strict(schema: Any) -> Any:
    """The provider's schema as JSON Schema means it.

    It marks nulls in the manner of OpenAPI 3.0, and its `oneOf` of any string and "hidden"
    refuses "hidden", which matches both.
    """
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: strict(part) for key, part in schema.items()}
    if schema.get("nullable") is True:
        schema["type"] = [schema["type"], "null"]
    if "oneOf" in schema:
        schema["anyOf"] = schema.pop("oneOf")
    return schema


def validator(name: str) -> Draft202012Validator:
    spec = strict(json.loads((SPECS / "openapi.json").read_text()))
    spec["components"]["schemas"]["schemas_prediction_response"]["additionalProperties"] = False
    spec["$ref"] = f"#/components/schemas/schemas_{name}"
    return Draft202012Validator(spec)


def shape(value: Any) -> Any:
    """A value with its types instead of its contents; an integer may stand for a float."""
    if isinstance(value, dict):
        return {key: shape(part) for key, part in value.items()}
    if isinstance(value, list):
        return [shape(part) for part in value]
    return "number" if isinstance(value, int | float) else type(value).__name__


# The specification


@needs_specs
def test_the_account_answers_as_specified(client):
    spec = json.loads((SPECS / "openapi.json").read_text())
    answer = spec["paths"]["/account"]["get"]["responses"]["200"]["content"]["application/json"]

    Draft202012Validator(answer["schema"]).validate(client.http.get("/account").json())


@needs_specs
def test_create_answers_as_specified(client):
    validator("prediction_response").validate(client.create())


@needs_specs
@pytest.mark.parametrize("queued", [0, 1])
@pytest.mark.parametrize("status", sorted(TERMINAL))
def test_every_poll_until_each_end_answers_as_specified(fake, client, status, queued):
    schema = validator("prediction_response")
    fake.next(ends=status, queued=queued)
    prediction = client.create()

    while prediction["status"] not in TERMINAL:
        prediction = client.get(prediction)
        schema.validate(prediction)

    assert prediction["status"] == status


@needs_specs
def test_cancel_answers_as_specified(client):
    canceled = client.cancel(client.create())

    validator("prediction_response").validate(canceled)
    assert canceled["status"] == "canceled"


@needs_specs
def test_list_answers_as_specified(fake, client):
    fake.page_size = 2
    for _ in range(3):
        client.finish(client.create())

    first = client.list()
    last = client.http.get(first["next"]).json()

    for page in (first, last):
        validator("paginated_prediction_response").validate(page)


@needs_specs
def test_an_uploaded_file_is_answered_as_specified(client):
    answer = client.upload(("cat.png", b"a cat", "image/png"))

    assert answer.status_code == 201
    validator("file_response").validate(answer.json())


@needs_specs
@pytest.mark.parametrize("removed", [False, True])
def test_a_removed_prediction_is_as_specified(fake, client, removed):
    fake.next(removed=removed)

    prediction = client.finish(client.create())

    validator("prediction_response").validate(prediction)
    assert (prediction["data_removed"], prediction["output"] is None) == (removed, removed)


@needs_specs
@pytest.mark.parametrize(
    "body",
    [
        {"version": SCHNELL, "input": {}},
        {"version": SCHNELL, "input": {}, "stream": False},
        {"version": SCHNELL, "input": {}, "webhook": "https://example.com/hook"},
        {"version": SCHNELL, "input": {}, "webhook": 1},
        {"version": SCHNELL, "input": {}, "webhook_events_filter": ["start"]},
        {"version": SCHNELL, "input": {}, "model": SCHNELL},
        {"version": SCHNELL, "input": {}, "lifetime": "5m"},
        {"version": SCHNELL, "input": "a lighthouse"},
        {"version": SCHNELL},
        {"version": 1, "input": {}},
        {"input": {}},
        [],
    ],
    ids=json.dumps,
)
def test_create_accepts_the_specified_bodies_only(fake, client, body):
    accepted = validator("version_prediction_request").is_valid(body)

    assert client.post(body).status_code == (201 if accepted else 422)
    assert len(fake.predictions) == (1 if accepted else 0)


# The recorded predictions


@needs_specs
@pytest.mark.parametrize("real", recorded())
def test_a_finished_prediction_looks_like_the_recorded_one(client, real):
    version = f"{real['model']}:{real['version']}"

    mine = client.finish(client.create(version, **real["input"]))

    assert shape({key: mine[key] for key in real}) == shape(real)
    assert mine.keys() - real.keys() == {"urls", "logs", "source"}  # recorded without
    assert (mine["model"], mine["version"]) == (real["model"], real["version"])
    assert mine["input"] == real["input"]


@needs_specs
@pytest.mark.parametrize("real", recorded())
def test_times_are_written_like_the_recorded_ones(client, real):
    mine = client.finish(client.create())

    for key in ("created_at", "started_at", "completed_at"):
        assert re.sub(r"\d", "0", mine[key]) == re.sub(r"\d", "0", real[key])
    assert mine["created_at"] <= mine["started_at"] <= mine["completed_at"]


@needs_specs
@pytest.mark.parametrize("real", recorded())
def test_ids_look_like_the_recorded_ones(client, real):
    pattern = "[0-9a-z]{26}"

    assert re.fullmatch(pattern, real["id"])
    assert re.fullmatch(pattern, client.create()["id"])


# The fake itself


def test_a_prediction_starts_runs_and_ends_as_it_is_polled(client):
    prediction = client.create(num_inference_steps=4)
    running, done = client.get(prediction), client.get(prediction)

    statuses = [step["status"] for step in (prediction, running, done)]
    assert statuses == ["starting", "processing", "succeeded"]
    assert " 50%|" in running["logs"]
    assert done["logs"].startswith(running["logs"])
    assert "100%|" in done["logs"]


@pytest.mark.parametrize("format", ["webp", "jpg", "png"])
def test_outputs_are_images_of_the_format_asked_for(client, format):
    done = client.finish(client.create(output_format=format, num_outputs=3))

    images = [httpx.get(url, trust_env=False) for url in done["output"]]

    assert len({image.content for image in images}) == 3
    for image in images:
        kind = format.replace("jpg", "jpeg")
        assert image.headers["content-type"] == f"image/{kind}"
        assert Image.open(io.BytesIO(image.content)).format == kind.upper()


def test_the_api_wants_its_token(client):
    for token in ("", "Bearer", "Bearer wrong"):
        answer = client.http.get("/predictions", headers={"Authorization": token})
        assert answer.status_code == 401, token


@pytest.mark.parametrize("status", [401, 402, 408, 422, 429, 500])
def test_a_refused_create_buys_nothing_and_the_next_one_works(fake, client, status):
    fake.next(answer=status, error="no")

    refused = client.post({"version": SCHNELL, "input": {}})
    client.create()

    assert refused.status_code == status
    assert [create.status for create in fake.creates] == [status, 201]
    assert len(fake.predictions) == 1


@pytest.mark.parametrize("hints", ["header", "body", "text", "header body text"])
def test_a_throttled_create_says_when_to_come_back_in_these_places_only(fake, client, hints):
    fake.next(answer=429, retry_after=7, retry_hints=hints)

    answer = client.post({"version": SCHNELL, "input": {}})

    said = {
        "header": answer.headers.get("retry-after") == "7",
        "body": answer.json().get("retry_after") == 7,
        "text": "~7s" in answer.json()["detail"],
    }
    assert [place for place in said if said[place]] == hints.split()


@pytest.mark.parametrize("stored", [True, False])
def test_a_lost_create_may_have_been_stored(fake, client, stored):
    fake.next(answer=None, stored=stored)

    with pytest.raises(httpx.RemoteProtocolError):
        client.create()

    assert len(client.list()["results"]) == (1 if stored else 0)


def test_a_slow_create_is_stored_before_its_answer(fake, client):
    fake.next(slow={"create": 60})

    with pytest.raises(httpx.ReadTimeout):
        client.http.post(
            "/predictions", json={"version": SCHNELL, "input": {}}, timeout=httpx.Timeout(0.2)
        )

    fake.until(lambda: fake.creates)
    assert len(fake.predictions) == 1


def test_failing_polls_do_not_move_the_prediction(fake, client):
    fake.next(failing_gets=2, get_status=503, polls=1)
    prediction = client.create()

    answers = [client.http.get(prediction["urls"]["get"]) for _ in range(3)]

    assert [answer.status_code for answer in answers] == [503, 503, 200]
    assert answers[2].json()["status"] == "succeeded"


def test_a_prediction_can_run_by_time(fake, client):
    fake.next(seconds=0)
    fake.next(seconds=float("inf"))

    ended, endless = client.create(), client.create()

    assert client.get(ended)["status"] == "succeeded"
    assert {client.get(endless)["status"] for _ in range(5)} == {"starting"}


def test_a_finished_prediction_stays_as_it_is_when_canceled(client):
    done = client.finish(client.create())

    assert client.cancel(done) == done


def test_an_expired_prediction_has_lost_its_data_and_files(fake, client):
    done = client.finish(client.create())

    fake.expire(done["id"])

    assert client.file(done).status_code == 404
    assert client.get(done)["input"] == {}


@pytest.mark.parametrize(
    ("file", "status", "length"), [("gone", 404, 9), ("junk", 200, 40), ("redirect", 302, 0)]
)
def test_files_may_be_bad(fake, client, file, status, length):
    fake.next(file=file)

    answer = client.file(client.finish(client.create()))

    assert (answer.status_code, len(answer.content)) == (status, length)
    assert answer.headers.get("location", fake.elsewhere).startswith(fake.elsewhere)


@pytest.mark.parametrize(("file", "told"), [("large", True), ("unsized", False)])
def test_a_large_file_may_tell_its_length(fake, client, file, told):
    fake.large_bytes = 1_000_000
    fake.next(file=file)

    answer = client.file(client.finish(client.create()))

    assert len(answer.content) > 1_000_000
    assert ("content-length" in answer.headers) == told


def test_a_broken_file_ends_before_its_length(fake, client):
    fake.next(file="broken")
    done = client.finish(client.create())

    with pytest.raises(httpx.RemoteProtocolError):
        client.file(done)


def test_the_list_is_newest_first_and_pages_to_the_end(fake, client):
    fake.page_size = 2
    ids = [client.create()["id"] for _ in range(5)]

    page = client.list(created_before="2999-01-01")
    seen = page["results"]
    while page["next"]:
        page = client.http.get(page["next"]).json()
        seen += page["results"]

    assert [prediction["id"] for prediction in seen] == ids[::-1]


def test_the_list_keeps_to_the_times_asked_for(fake, client):
    times = ["2026-01-01T00:00:00.000000Z", "2026-01-02T00:00:00.000000Z"]
    for at in times:
        fake.predictions[client.create()["id"]]["created_at"] = at

    after = client.list(created_after=times[1])["results"]
    before = client.list(created_before="2026-01-02T01:00:00+01:00")["results"]

    assert [row["created_at"] for row in after + before] == times[::-1]


@pytest.mark.parametrize("version", ["stability-ai/sdxl", "flux", f"{SCHNELL}:abc", "a" * 64])
def test_create_refuses_a_version_nobody_may_run(client, version):
    answer = client.post({"version": version, "input": {}})

    assert answer.status_code == 422
    assert answer.json()["title"] == "Invalid version or not permitted"


def test_create_accepts_a_known_hash_alone(fake, client):
    fake.versions["a" * 64] = SCHNELL

    assert client.create("a" * 64)["model"] == SCHNELL


@pytest.mark.parametrize("content", [b"a cat", bytes(range(256)) * 9000], ids=len)
def test_a_file_is_kept_with_name_type_and_bytes(fake, client, content):
    file = client.upload(("a cat.png", content, "image/png")).json()

    assert fake.uploads == {file["id"]: ("a cat.png", content)}
    assert (file["content_type"], file["size"]) == ("image/png", len(content))
    assert file["urls"]["get"] == f"{fake.url}/files/{file['id']}"


def test_an_upload_may_be_refused_and_needs_a_file(fake, client):
    fake.file_answers.append(413)

    assert client.upload(("cat.png", b"a cat")).status_code == 413
    assert client.http.post("/files", data={"metadata": "{}"}).status_code == 400
    assert fake.uploads == {}


def test_lists_may_fail_and_show_a_prediction_late(fake, client):
    fake.next(hidden=1)
    fake.list_answers.append(500)
    client.create()

    assert client.http.get("/predictions").status_code == 500
    assert client.list()["results"] == []
    assert len(client.list()["results"]) == 1


def test_a_picture_bomb_is_a_small_file_of_many_pixels(fake, client):
    fake.next(file="bomb")
    file = client.file(client.finish(client.create()))

    assert len(file.content) < 1000
    with pytest.raises(Image.DecompressionBombError):
        Image.open(io.BytesIO(file.content))


def test_requests_are_recorded_with_their_headers(fake, client):
    client.http.headers["Cancel-After"] = "5m"

    created = client.create()

    assert fake.creates == fake.requests
    assert fake.creates[0].headers["cancel-after"] == "5m"
    assert fake.creates[0].prediction_id == created["id"]
