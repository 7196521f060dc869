"""What is sent to providers and what their answers mean, tried by select: recipes as seeded.

provider_answers.json has an answer a row, from the providers' own descriptions and examples; where
PROVIDER_SPECS names a folder with those, what is sent is held to them, too.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import specs
from actors import User, Worker
from database import Database
from psycopg.types.json import Jsonb

ANSWERS = json.loads(Path(__file__).with_name("provider_answers.json").read_text())
SPECS = specs.folder("PROVIDER_SPECS")
STEPS = {"create", "poll", "result", "cancel", "find", "account"}
NAMES = ["replicate", "fal", "bfl", "openai", "comfyui"]
HANDLES = {
    "status": "https://queue.fal.run/fal-ai/flux/requests/1/status",
    "result": "https://queue.fal.run/fal-ai/flux/requests/1",
    "cancel": "https://queue.fal.run/fal-ai/flux/requests/1/cancel",
}
VALUES = {
    "input": {"prompt": 'a "lighthouse" {{secret}} {{key}}\n\\', "seed": 7},
    "ref": "fal-ai/flux/dev",
    "id": "1",
    "key": "00000000-0000-0000-0000-000000000007",
    "deadline": 300,
    "since": "2026-11-30T00:00:00+00:00",
    "handles": HANDLES,
}


@pytest.fixture(scope="module")
def db(server, template) -> Iterator[Database]:
    database = server.create(template)
    yield database
    server.drop(database)


def recipe_of(db: Database, provider: str) -> dict[str, Any]:
    return db.value("select recipe from private.providers where name = %s", provider)


def read(db: Database, provider: str, step: str, status: int | None, body: Any, **more: Any) -> Any:
    query = "select private.read_answer(%s, %s, %s, %s, %s, %s)"
    headers, values = Jsonb(more.get("headers", {})), Jsonb(more.get("vars", {}))
    return db.value(query, provider, step, status, headers, Jsonb(body), values)


def build(db: Database, provider: str, step: str, **values: Any) -> Any:
    query = "select private.build_request(%s, %s, %s)"
    return db.value(query, provider, step, Jsonb(VALUES | values))


@pytest.mark.parametrize("case", ANSWERS, ids=lambda case: case["name"])
def test_an_answer_means_what_the_provider_says(db, case):
    case = dict(case)
    means = case.pop("means")

    answer = read(db, **{key: case[key] for key in case if key != "name"})

    optional = {"reason", "detail", "logs"} - means.keys()
    assert {key: value for key, value in answer.items() if key not in optional} == means


# What is the same for all.

COMMON = [  # step, status, body -> is, code
    ("create", 0, None, "failed", "provider_busy"),  # nothing was sent
    ("create", None, None, "unsure", None),
    ("create", 200, {}, "accepted", None),  # without an id: next_step does not take it
    ("create", 408, None, "unsure", None),
    ("create", 500, "<h1>oh</h1>", "unsure", None),
    ("create", 503, [], "unsure", None),
    ("create", 401, {}, "failed", "provider_refused"),
    ("create", 402, {}, "failed", "provider_refused"),
    ("create", 403, "no", "failed", "provider_refused"),
    ("create", 404, {}, "failed", "model_withdrawn"),
    ("create", 405, {}, "failed", "internal"),
    ("create", 302, "", "failed", "internal"),
    ("create", 400, {}, "failed", "invalid_input"),
    ("create", 413, None, "failed", "invalid_input"),
    ("create", 422, {}, "failed", "invalid_input"),
    ("create", 429, "slow down", "failed", "provider_busy"),
    ("poll", 0, None, "again", "provider_busy"),
    ("poll", None, None, "again", None),
    ("poll", 429, {}, "again", "provider_busy"),
    ("poll", 500, "<h1>oh</h1>", "again", None),
    ("poll", 404, None, "missing", None),
    ("poll", 401, {}, "failed", "provider_refused"),
    ("account", 200, {}, "running", None),
    ("account", 401, {}, "failed", "provider_refused"),
    ("account", None, None, "again", None),
]


@pytest.mark.parametrize("provider", NAMES)
def test_what_http_says_means_the_same_for_all(db, provider):
    steps = recipe_of(db, provider)
    for step, status, body, is_, code in COMMON:
        if step in steps:
            answer = read(db, provider, step, status, body)
            assert (answer["is"], answer.get("code")) == (is_, code), (step, status)


# Nothing that a provider says may stop the others of its call.

STRANGE = [
    *(None, "", 0, False, [], {}, [[]], "<h1>oh</h1>"),
    *({"status": {}}, {"status": []}, {"id": {}}, {"id": "a b"}, {"id": "x" * 10_000}),
    *({"request_id": 7, "status_url": {}}, {"detail": [1, {"msg": {}}]}, {"detail": {}}),
    *({"images": {"url": []}}, {"images": [{"url": 7}, {"url": {}}]}, {"image": "a"}),
    *({"data": [{"b64_json": {}}, 7]}, {"data": "a"}, {"error": None}, {"error": [{}]}),
    *({"status": "Ready", "progress": "x", "result": {"sample": {}, "duration": "x"}},),
    *({"status": "Pending", "progress": -7}, {"status": "Pending", "progress": 1e300}),
    *({"status": "Ready", "result": []}, {"status": "Error", "details": "x" * 10_000}),
    *({"status": "succeeded", "output": {"a": 1, "b": ["x", 7]}}, {"status": "succeeded"}),
    *({"status": "succeeded", "output": "https://", "metrics": {"predict_time": -1e300}},),
    *({"status": "processing", "logs": {}}, {"status": "processing", "logs": " 0%|| 9/0 [\n" * 99}),
    *({"a": {"status": 7, "outputs": 1}}, {"a": {"status": {"status_str": "success"}}}),
    *({"a": {"status": {"status_str": "error", "messages": [["execution_error"], 7, []]}}},),
    *({"a": {"status": {"status_str": "success"}, "outputs": {"9": {"images": [
        {"type": "output"}, {"type": "output", "filename": 7}]}}}},),
    *({"items": [1, {"json_input": None}], "results": 7, "next": {}}, {"queue_running": [[], 7]}),
]  # fmt: skip


@pytest.fixture(scope="module")
def jobs(db) -> dict[str, dict[str, Any]]:
    """A job under way at each provider."""
    db.lift_limits()
    worker, jobs = (
        Worker(
            db,
            slots=9,
            keys=[
                f"{each.upper()}_{what}"
                for each in NAMES
                for what in ("KEY", "API_KEY", "API_TOKEN")
            ],
        ),
        {},
    )
    for provider in NAMES:
        model = f"acme/{provider}"
        db.execute(
            "insert into public.models (id, provider, provider_ref, title, price_credits,"
            " paid_price_credits, client_inputs, input_schema)"
            " values (%s, %s, 'acme/m', 'M', 1, 0, '{}', '{\"properties\": {\"prompt\": {}}}')",
            model,
            provider,
        )
        User(db).has(credits=9).enqueued(model=model)
        job = worker.claimed()
        jobs[provider] = {"job_id": job.job_id, "token": job.token}
    return jobs


@pytest.mark.parametrize("provider", NAMES)
def test_no_answer_stops_those_of_others(db, jobs, provider):
    job, steps, connection = jobs[provider], STEPS & recipe_of(db, provider).keys(), db.connect()
    query = "select step from private.next_steps(array[%s], array[%s], array[%s])"
    for is_bought in (False, True):
        connection.execute(
            "update private.running_jobs set provider_job_id = %s, handles = %s where job_id = %s",
            ["it" if is_bought else None, Jsonb(HANDLES), job["job_id"]],
        )
        for step, status, body in product(steps, (200, 422, 500), STRANGE):
            answer = {"step": step, "status": status, "headers": {}, "body": body}
            answer |= {"memo": {"refused": {"do": "pause"}}} if step == "account" else {}
            with connection.transaction(force_rollback=True):
                said = connection.execute(query, [job["job_id"], job["token"], Jsonb(answer)])
                (told,) = said.fetchone()
            assert is_sane(told), (answer, told)


def is_sane(told: dict[str, Any]) -> bool:
    """Whether a worker can do this."""
    match told["do"]:
        case "send":
            is_possible = 0 <= told["wait"] <= 60 and 0 <= (told["percent"] or 0) <= 100
            return is_possible and isinstance(told["request"]["url"], str)
        case "store":
            return bool(told["outputs"]) and all(isinstance(each, str) for each in told["outputs"])
    return told["do"] in ("fail", "pause", "cancel")


# What words mean.

WORDS = {
    "moderated": [
        "NSFW content detected. Try running it again, or try a different prompt.",
        "The input or output was flagged as sensitive. Please try again with different inputs. (E005)",  # noqa: E501
        "Your prompt was flagged as violating content policies",
        "The response is blocked, as it may violate our policies. Error Code: 58061214",
        "Image generation failed: the prompt could not be submitted. It may violate Responsible AI practices.",  # noqa: E501
        "Explicit content blocked",
        "PROHIBITED_CONTENT",
        "Potential NSFW content was detected in one or more images. A black one returns.",
        "All generated images contained NSFW content. Try running it again with a different prompt",
        "Request rejected by our moderation system",
        "Content Moderated",
        "blocked by the safety filter",
        "This request goes against our usage guidelines",
        "Your request was rejected as a result of our safety system.",
    ],
    "invalid_input": [
        "Prompt is too long: 540 tokens, the maximum is 512",
        "cannot identify image file '/tmp/tmpab12cat.jpg'",
        "Input image is too large: 6000x8000. Maximum is 2048x2048",
        "image file is truncated (3 bytes not processed)",
        "width must be divisible by 8",
        "num_outputs must be between 1 and 4",
    ],
    "provider_busy": [
        "Service is currently unavailable due to high demand. Please try again later. (E003)",
        "Prediction interrupted; please retry (code: PA)",
        "Too many requests",
        "The model is overloaded, try again later",
    ],
    None: [  # so provider_error
        "Model names are case sensitive",
        "I am a sensitive plant",
        "The moderator node is at version 2",
        "safety_tolerance was ignored",
        "Connection reset by peer",
        "list index out of range",
        "",
    ],
    "provider_error": [
        "CUDA out of memory (E1001)",
        "RuntimeError: failed to load StableDiffusionSafetyChecker weights",
        "CUDA error: an illegal memory access was encountered",
        "Traceback (most recent call last): … safety checker",
        "failed to download the content filter",
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("says", "code"), [(says, code) for code, texts in WORDS.items() for says in texts]
)
def test_what_words_mean(db, says, code):
    assert db.value("select private.what_words_mean('replicate', %s)", says) == code


def test_the_words_of_one_provider_are_its_own(db):
    db.execute(
        "insert into private.provider_words (place, provider, pattern, code)"
        " values (5, 'bfl', 'magic smoke', 'provider_busy')"
    )
    for provider, code in (("bfl", "provider_busy"), ("fal", None)):
        query = "select private.what_words_mean(%s, 'the magic smoke is out')"
        assert db.value(query, provider) == code


# What is sent.

SENT = [  # provider, step, method, url
    ("replicate", "create", "POST", "https://api.replicate.com/v1/predictions"),
    ("replicate", "poll", "GET", "https://api.replicate.com/v1/predictions/1"),
    ("replicate", "cancel", "POST", "https://api.replicate.com/v1/predictions/1/cancel"),
    ("replicate", "find", "GET",
     "https://api.replicate.com/v1/predictions?created_after=2026-11-30T00%3A00%3A00%2B00%3A00"),
    ("replicate", "account", "GET", "https://api.replicate.com/v1/account"),
    ("fal", "create", "POST", "https://queue.fal.run/fal-ai/flux/dev"),
    ("fal", "poll", "GET", "https://queue.fal.run/fal-ai/flux/requests/1/status?logs=1"),
    ("fal", "result", "GET", "https://queue.fal.run/fal-ai/flux/requests/1"),
    ("fal", "cancel", "PUT", "https://queue.fal.run/fal-ai/flux/requests/1/cancel"),
    ("fal", "account", "GET", "https://api.fal.ai/v1/account/billing?expand=credits"),
    ("bfl", "create", "POST", "https://api.bfl.ai/v1/fal-ai/flux/dev"),
    ("bfl", "poll", "GET", "https://queue.fal.run/fal-ai/flux/requests/1/status"),
    ("bfl", "account", "GET", "https://api.bfl.ai/v1/credits"),
    ("openai", "create", "POST", "https://api.openai.com/v1/images/generations"),
    ("openai", "account", "GET", "https://api.openai.com/v1/models"),
    ("comfyui", "create", "POST", "http://127.0.0.1:8188/prompt"),
    ("comfyui", "poll", "GET", "http://127.0.0.1:8188/history/1"),
    ("comfyui", "find", "GET", "http://127.0.0.1:8188/queue"),
]  # fmt: skip


@pytest.mark.parametrize(("provider", "step", "method", "url"), SENT)
def test_a_step_is_sent_where_the_provider_says(db, provider, step, method, url):
    request = build(db, provider, step)
    assert (request["method"], request["url"]) == (method, url)


@pytest.mark.parametrize("provider", NAMES)
def test_the_key_stands_in_a_header_alone_and_only_as_a_place(db, provider):
    header = {
        "replicate": ("Authorization", "Bearer {{secret}}"),
        "fal": ("Authorization", "Key {{secret}}"),
        "bfl": ("x-key", "{{secret}}"),
        "openai": ("Authorization", "Bearer {{secret}}"),
    }.get(provider)
    for step in STEPS & recipe_of(db, provider).keys():
        built = build(db, provider, step, secret="s3cret")
        for request in built if isinstance(built, list) else [built]:
            assert "s3cret" not in json.dumps(request)
            assert "{{" not in request["url"]
            if header:
                assert request["headers"][header[0]] == header[1]
            else:
                assert request["headers"] == {}


@pytest.mark.parametrize("provider", ["replicate", "fal", "bfl", "openai"])
def test_the_input_is_sent_as_it_is_whatever_is_written_in_it(db, provider):
    body = build(db, provider, "create")["body"]
    assert (body["input"] if provider == "replicate" else body) == VALUES["input"]


def test_comfyui_is_given_the_graph_and_our_name_for_it(db):
    graph = {"9": {"class_type": "SaveImage", "inputs": {"images": ["8", 0]}}}
    body = build(db, "comfyui", "create", input=graph)["body"]
    assert body == {"prompt": graph, "prompt_id": VALUES["key"]}


def test_comfyui_is_told_to_stop_this_one_only_waiting_or_not(db):
    assert [(each["url"], each["body"]) for each in build(db, "comfyui", "cancel")] == [
        ("http://127.0.0.1:8188/queue", {"delete": ["1"]}),
        ("http://127.0.0.1:8188/interrupt", {"prompt_id": "1"}),
    ]


@pytest.mark.parametrize(
    "ref", ["../account", "a b", "a?b=c", "a#b", "é", "a%2fb", "a\nb", "{{id}}"]
)
def test_no_value_leads_out_of_its_place_in_an_address(db, ref):
    url = build(db, "replicate", "poll", id=ref)["url"]
    assert url.startswith("https://api.replicate.com/v1/predictions/")
    assert not set(url) & set(" ?#\n{}")
    assert url.isascii()


# Held to the API files.

with_specs = pytest.mark.skipif(
    not (SPECS / "fal").exists(), reason="PROVIDER_SPECS names no folder with the providers' files"
)

BODIES = [  # provider, model, input; all are as the importer would let them through
    ("bfl", "flux-2-pro", {"prompt": "a", "width": 1024, "height": 1024, "seed": 42}),
    ("bfl", "flux-2-pro", {"prompt": "a", "input_image": "data:image/png;base64,AA=="}),
    ("bfl", "flux-pro-1.1", {"prompt": "a", "width": 1024, "height": 768}),
    ("bfl", "flux-kontext-pro", {"prompt": "a", "aspect_ratio": "16:9"}),
    ("openai", "", {"model": "gpt-image-1.5", "prompt": "a", "n": 2, "size": "1024x1024"}),
    ("openai", "", {"model": "dall-e-3", "prompt": "a", "response_format": "url"}),
]
FILES = {
    "fal": "platform.subset.json",
    "bfl": "openapi.subset.json",
    "openai": "openapi.images.subset.json",
}


@with_specs
@pytest.mark.parametrize(("provider", "ref", "given"), BODIES)
def test_a_create_is_one_of_the_providers_own(db, provider, ref, given):
    request = build(db, provider, "create", ref=ref, input=given)
    file = SPECS / provider / FILES[provider]
    described = json.loads(file.read_text())
    path = request["url"].removeprefix(described["servers"][0]["url"])
    part = ("paths", path, "post", "requestBody", "content", "application/json", "schema")
    specs.validator(file, *part).validate(request["body"])


@with_specs
@pytest.mark.parametrize(
    ("provider", "step"),
    [("fal", "find"), ("fal", "account"), ("bfl", "account")],
)
def test_what_is_asked_is_in_the_description(db, provider, step):
    if not (request := build(db, provider, step)):
        pytest.skip("not asked")
    described = json.loads((SPECS / provider / FILES[provider]).read_text())
    url, _, query = request["url"].partition("?")
    path = url.removeprefix(described["servers"][0]["url"])
    known = described["paths"][path][request["method"].lower()].get("parameters", [])
    asked = {each.partition("=")[0] for each in query.split("&") if each}
    assert asked <= {each["name"] for each in known}
    assert {each["name"] for each in known if each.get("required")} <= asked


# What it costs.


@pytest.mark.parametrize("case", ANSWERS, ids=lambda case: case["name"])
def test_an_answer_is_read_in_100_microseconds(db, case):
    """Measured against what takes 100 ms where 1,000 answers may take as long."""
    step = (case["provider"], case["step"], case["status"])
    body = (case.get("headers", {}), case["body"], case.get("vars", {}))
    read = "private.read_answer(%s, %s, %s, %s, %s, %s)"
    answers = f"select count({read}) from generate_series(1, 300)"
    yardstick = "select max(md5(n::text)) from generate_series(1, 60000) as n"
    ratios = (
        seconds(db, answers, *step, *map(Jsonb, body)) / seconds(db, yardstick) for _ in range(5)
    )
    assert any(ratio <= 1 for ratio in ratios)


def seconds(db: Database, query: str, *arguments: Any) -> float:
    begun = time.perf_counter()
    db.execute(query, *arguments)
    return time.perf_counter() - begun


def test_of_several_outputs_those_are_kept_that_the_model_says(db):
    body = {"status": "succeeded", "output": ["https://a/map.png", "https://a/picture.png"]}
    query = "select private.read_answer('replicate', 'poll', 200, '{}', %s, %s) -> 'outputs'"

    kept = [
        db.value(query, Jsonb(body), Jsonb({"outputs_path": path, "count": 1}))
        for path in (None, "$.output[last]", "$.output[$count to last]")
    ]

    assert kept == [body["output"], body["output"][1:], body["output"][1:]]
