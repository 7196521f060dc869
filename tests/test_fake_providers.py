"""Holds the fakes of fal, BFL, OpenAI and ComfyUI to those providers' own API files and examples.

PROVIDER_SPECS names a folder with `<provider>/examples.json` and the API files. They are not part
of this repository. What no file tells, the queue and who may ask, is tested without.
"""

import base64
import io
import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import specs
from fake_providers import FAKES, FakeBfl, FakeComfyUI, FakeFal, FakeOpenAI, FakeProvider
from jsonschema import Draft202012Validator
from PIL import Image
from specs import shape

SPECS = specs.folder("PROVIDER_SPECS")
with_specs = pytest.mark.skipif(
    not (SPECS / "fal").exists(), reason="PROVIDER_SPECS names no folder with the providers' files"
)
FILES = {
    "fal": "platform.subset.json",
    "bfl": "openapi.subset.json",
    "openai": "openapi.images.subset.json",
}
ENDS = ["succeeded", "moderated", "invalid", "failed", "gone"]
GRAPH = {"9": {"class_type": "SaveImage", "inputs": {"filename_prefix": "x", "images": ["8", 0]}}}
PATHS = {
    "fal": "/fal-ai/flux/dev",
    "bfl": "/flux-2-pro",
    "openai": "/images/generations",
    "comfyui": "/prompt",
}


class Client:
    """Somebody who uses a fake as its documentation says."""

    def __init__(self, fake: FakeProvider) -> None:
        header, scheme = fake.login
        login = {header: scheme + fake.key} if fake.key else {}
        self.fake, self.http = fake, httpx.Client(headers=login, trust_env=False)

    def get(self, url: str) -> httpx.Response:
        return self.http.get(url)

    def post(self, path: str, body: Any) -> httpx.Response:
        return self.http.post(self.fake.base_url + path, json=body)

    def creates(self, **behaviour: Any) -> httpx.Response:
        if behaviour:
            self.fake.next(**behaviour)
        body = {"prompt": GRAPH} if self.fake.name == "comfyui" else {"prompt": "a lighthouse"}
        return self.post(PATHS[self.fake.name], body)

    def poll_url(self, create: dict[str, Any]) -> str:
        history = f"{self.fake.origin}/history/{create.get('prompt_id')}"
        return create.get("status_url") or create.get("polling_url") or history

    def polls(self, create: httpx.Response) -> Iterator[httpx.Response]:
        """Poll as often as it takes."""
        for _ in range(9):
            answer = self.get(self.poll_url(create.json()))
            yield answer
            if all(task.is_over for task in self.fake.tasks.values()):
                return

    def ended(self, **behaviour: Any) -> httpx.Response:
        """Create, and return the last answer to polls."""
        return list(self.polls(self.creates(**behaviour)))[-1]

    def result(self, **behaviour: Any) -> httpx.Response:
        """Create, and return what fal's result answers at the end."""
        return self.get(self.ended(**behaviour).json()["response_url"])


@pytest.fixture
def client(request: pytest.FixtureRequest) -> Iterator[Client]:
    with FAKES[request.param]() as fake:
        yield Client(fake)
        assert fake.faults == []


def each(*classes: type[FakeProvider]) -> Any:
    names = [fake.name for fake in classes]
    return pytest.mark.parametrize("client", names, indirect=True)


def validator(provider: str, *path: str) -> Draft202012Validator:
    return specs.validator(SPECS / provider / FILES[provider], *path)


def answer_of(provider: str, path: str, method: str = "get", status: int = 200) -> Any:
    return validator(
        *(provider, "paths", path, method, "responses", str(status)),
        *("content", "application/json", "schema"),
    )


# Held to the API files.


@with_specs
@each(FakeBfl)
@pytest.mark.parametrize("form", ["", "content"])
@pytest.mark.parametrize("ends", ENDS)
def test_bfl_answers_as_specified_from_create_to_each_end(client, ends, form):
    create = client.creates(ends=ends, form=form, polls=3)

    if ends == "invalid":
        answer_of("bfl", "/v1/flux-2-pro", "post", 422).validate(create.json())
    else:
        answer_of("bfl", "/v1/flux-2-pro", "post").validate(create.json())
        for poll in client.polls(create):
            answer_of("bfl", "/v1/get_result").validate(poll.json())
    answer_of("bfl", "/v1/credits").validate(client.get(f"{client.fake.base_url}/credits").json())


@with_specs
@each(FakeOpenAI)
def test_openai_answers_as_specified(client):
    for form in client.fake.forms:
        answer = client.creates(form=form, images=2).json()
        answer_of("openai", "/images/generations", "post").validate(answer)
        assert [list(image) for image in answer["data"]] == [[form], [form]]
    error = validator("openai", "components", "schemas", "ErrorResponse")
    for behaviour in [{"ends": "moderated"}, {"ends": "invalid"}, {"ends": "failed"}]:
        error.validate(client.creates(**behaviour).json())
    for status in (401, 403, 404, 429, 500):
        error.validate(client.creates(answer=status).json())


@with_specs
@each(FakeFal)
def test_fals_platform_answers_as_specified(client):
    fake, path = client.fake, "/models/requests/by-endpoint"
    client.creates()
    for ends in ENDS:
        client.ended(ends=ends)
    for url in (f"?endpoint_id=fal-ai/flux/dev{more}" for more in ("", "&expand=payloads")):
        shown = client.get(f"{fake.platform}/v1{path}{url}").json()
        answer_of("fal", path).validate(shown)
        assert len(shown["items"]) == 6
    account = client.get(f"{fake.platform}/v1/account/billing?expand=credits")
    answer_of("fal", "/account/billing").validate(account.json())
    refused = httpx.get(f"{fake.platform}/v1/account/billing")
    answer_of("fal", "/account/billing", status=401).validate(refused.json())


@with_specs
@each(FakeBfl, FakeOpenAI)
@pytest.mark.parametrize(
    "body", [{"prompt": "a cat"}, {"prompt": "a cat", "seed": 1}, {"prompt": 1}, {}, []], ids=str
)
def test_create_accepts_the_specified_bodies_only(client, body):
    name = {"bfl": "Flux2Inputs", "openai": "CreateImageRequest"}[client.fake.name]
    accepted = validator(client.fake.name, "components", "schemas", name).is_valid(body)

    answer = client.post(PATHS[client.fake.name], body)

    assert answer.is_success == accepted == bool(client.fake.bought)


# Held to the examples.


def examples(provider: str) -> dict[str, Any]:
    return json.loads((SPECS / provider / "examples.json").read_text())


def looks_like(mine: httpx.Response, example: dict[str, Any], *optional: str) -> None:
    """Hold an answer to an example: its status, and all its fields, however deep."""
    body = example.get("answer", example.get("body"))
    assert mine.status_code == example.get("http", example.get("status", 200))
    assert shape(anonymous(mine.json(), optional)) == shape(anonymous(body, optional))


def anonymous(value: Any, optional: tuple[str, ...]) -> Any:
    """Leave of a list one, and of a key that is an id that it is one."""
    if isinstance(value, list):
        return [anonymous(part, optional) for part in value[:1]]
    if not isinstance(value, dict):
        return value
    return {
        re.sub("^(<prompt_id>|[0-9a-f-]{36})$", "id", key): anonymous(part, optional)
        for key, part in value.items()
        if key not in optional
    }


@with_specs
@each(FakeFal)
def test_fal_answers_as_in_the_examples(client):
    example = examples("fal")
    create = client.creates(queued=1, polls=3)
    polls = list(client.polls(create))

    looks_like(create, example["submit"])
    looks_like(polls[0], example["status_in_queue"])
    looks_like(polls[1], example["status_in_progress"])
    looks_like(polls[2], example["status_completed"], "logs")
    urls = "response_url", "status_url", "cancel_url"
    failed = example["status_completed_but_failed"]
    looks_like(client.ended(ends="failed"), failed, *urls, "logs", "metrics")
    looks_like(client.result(form="images"), example["result"])
    looks_like(client.result(ends="moderated"), example["error_validation_422"])
    looks_like(client.creates(answer=422), example["error_422_string"])
    looks_like(client.creates(answer=504), example["error_request"])


@with_specs
@each(FakeFal)
def test_fal_knows_four_answers_to_a_cancel(client):
    def canceled(create: httpx.Response) -> httpx.Response:
        return client.http.put(create.json()["cancel_url"])

    waits, runs, over = client.creates(), client.creates(queued=0), client.creates(polls=1)
    for each in (runs, over):
        client.get(each.json()["status_url"])
    answers = [canceled(each) for each in (waits, runs, over, waits)]

    known = [each["body"]["status"] for each in examples("fal")["cancel"]]
    assert [answer.json()["status"] for answer in answers] == known
    assert answers[1].status_code == 202


@with_specs
@each(FakeBfl)
def test_bfl_answers_as_in_the_examples(client):
    example = examples("bfl")
    create = client.creates(polls=2)

    looks_like(create, example["submit"])
    pending, ready = client.polls(create)
    looks_like(pending, example["pending"])
    looks_like(ready, example["ready"])
    for form, moderated in zip(["", "content"], example["moderated"], strict=True):
        ended = client.ended(ends="moderated", form=form)
        looks_like(ended, moderated, "preview", "progress")
        assert ended.json()["status"] == moderated["body"]["status"]
    unknown = client.get(f"{client.fake.base_url}/get_result?id=nope")
    looks_like(unknown, example["not_found"])
    looks_like(client.creates(ends="invalid"), example["validation_422"])


@with_specs
@each(FakeOpenAI)
def test_openai_answers_as_in_the_examples(client):
    looks_like(client.creates(), examples("openai")["generate"])
    moderated = client.creates(ends="moderated")
    looks_like(moderated, examples("openai")["moderation_error"])
    assert moderated.json()["error"]["code"] == "moderation_blocked"


@with_specs
@each(FakeComfyUI)
def test_comfyui_answers_as_in_the_examples(client):
    example, origin = examples("comfyui"), client.fake.origin
    looks_like(client.creates(), example["prompt"])
    looks_like(client.creates(ends="invalid"), example["invalid"], "extra_info")
    client.creates()
    looks_like(client.get(f"{origin}/queue"), example["queue"], "9")
    looks_like(client.get(f"{origin}/history/nope"), example["history_unknown"])
    client.fake.tasks.clear()
    looks_like(client.ended(), example["history_done"])
    looks_like(client.ended(ends="failed"), example["history_failed"], "prompt", "timestamp")
    uploaded = client.http.post(f"{origin}/upload/image", files={"image": ("cat.png", b"a cat")})
    looks_like(uploaded, example["upload"])


# What no file tells.


@each(FakeFal, FakeBfl, FakeOpenAI)
def test_who_has_no_key_is_refused_and_buys_nothing(client):
    client.http.headers.clear()
    assert client.creates().status_code == 401
    assert client.fake.creates == client.fake.bought == []


@pytest.mark.parametrize("name", FAKES)
def test_a_create_that_is_cut_off_is_bought_or_not_as_a_test_says(name):
    with FAKES[name]() as fake:
        client = Client(fake)
        for stored in (False, True):
            with pytest.raises(httpx.RemoteProtocolError):
                client.creates(answer=None, stored=stored)
        client.creates(answer=500, stored=True)
        assert (len(fake.creates), len(fake.bought)) == (3, 2)


@each(FakeFal, FakeBfl)
def test_pictures_are_elsewhere_and_a_key_that_comes_there_is_a_fault(client):
    client.ended()
    (url,) = client.fake.urls(*client.fake.tasks.values())
    assert httpx.get(url, trust_env=False).content.startswith(b"\x89PNG")
    assert client.fake.faults == []

    client.get(url)

    assert len(client.fake.faults) == 1
    client.fake.faults.clear()


@each(FakeFal)
def test_fals_list_is_in_pages_and_may_show_late(client):
    ids = [client.creates(hidden=1, queued=0, polls=1).json()["request_id"] for _ in range(3)]
    url = f"{client.fake.platform}/v1/models/requests/by-endpoint?endpoint_id=fal-ai/flux/dev"
    assert client.get(url).json()["items"] == []
    first = client.get(f"{url}&limit=2").json()
    second = client.get(f"{url}&limit=2&cursor={first['next_cursor']}").json()
    shown = [item["request_id"] for item in first["items"] + second["items"]]
    assert (set(shown), second["has_more"]) == (set(ids), False)
    assert client.get(f"{url}&start=2999-01-01T00:00:00Z").json()["items"] == []


@each(FakeComfyUI)
def test_comfyui_makes_one_at_a_time_and_forgets_all_when_it_restarts(client):
    first, second, third = (client.creates(polls=2).json()["prompt_id"] for _ in range(3))
    history = f"{client.fake.origin}/history"

    assert client.get(f"{history}/{second}").json() == {}
    queue = client.get(f"{client.fake.origin}/queue").json()
    assert [[each[1] for each in part] for part in queue.values()] == [[first], [second, third]]
    assert client.get(f"{history}/{first}").json()[first]["status"]["status_str"] == "success"
    client.post("/queue", {"delete": [third]})
    client.post("/interrupt", {"prompt_id": first})  # which is over
    client.post("/interrupt", {"prompt_id": second})
    assert list(client.get(f"{client.fake.origin}/queue").json().values()) == [[], []]
    assert client.get(f"{history}/{third}").json() == {}

    client.fake.restart()

    assert client.get(f"{history}/{first}").json() == {}


@each(FakeComfyUI)
def test_comfyui_makes_what_has_the_same_name_again(client):
    for _ in range(2):
        client.post("/prompt", {"prompt": GRAPH, "prompt_id": "mine"})
    assert client.fake.bought == ["mine", "mine"]


@each(FakeComfyUI)
@pytest.mark.parametrize("form", FakeComfyUI.forms)
def test_comfyui_gives_out_what_its_history_names(client, form):
    ((entry,),) = [client.ended(form=form, images=2).json().values()]
    images = [image for node in entry["outputs"].values() for image in node["images"]]
    assert [image["type"] for image in images].count("output") == 2
    for image in images:
        view = client.http.get(f"{client.fake.origin}/view", params=image)
        assert view.headers["content-type"] == "image/png"


def test_a_picture_shows_what_it_was_made_from():
    drawn = set()
    for cat in (b"a cat", b"a dog"):
        with FakeFal() as fake, FakeComfyUI() as comfy:
            given = f"data:image/png;base64,{base64.b64encode(cat).decode()}"
            fake.buy("fal-ai/flux", {"prompt": "", "image_urls": [given]})
            comfy.uploads["cat.png"] = cat
            comfy.buy("", {"prompt": {"1": {"inputs": {"image": "cat.png"}}}})
            files = (io.BytesIO(each.picture(*each.tasks).body) for each in (fake, comfy))
            pictures = {Image.open(file).tobytes() for file in files}
            assert len(pictures) == 1
            drawn |= pictures
    assert len(drawn) == 2
