"""Bad input over HTTP: each is refused with a 4xx and a stable code, and nothing is written."""

from __future__ import annotations

import json

import pytest
from database import unchanged
from http_client import PREVIEW, refusal
from http_fixtures import signed_up, through_both_gateways

pytest_plugins = ["http_fixtures"]
pytestmark = through_both_gateways

JSON = {"Content-Type": "application/json"}
DEEP = '{"a":' * 100_000 + "1" + "}" * 100_000


@pytest.fixture(scope="module")
def user(endpoints, stack_db):
    """One user for all of these: nothing they ask for is ever accepted."""
    with signed_up(endpoints, stack_db) as user:
        yield user


@pytest.mark.parametrize(
    "argument",
    [
        pytest.param({"prompt": "x" * 100_000}, id="prompt of 100 kB"),
        pytest.param({"prompt": "é" * 4001}, id="prompt one character too long"),
        {"prompt": ""},
        {"prompt": None},
        {"idempotency_key": ""},
        pytest.param({"idempotency_key": "k" * 201}, id="key of 201 bytes"),
    ],
    ids=repr,
)
def test_bad_text_is_invalid_input(user, stack_db, argument):
    with unchanged(stack_db):
        refused = refusal(user.enqueue(**argument))

    assert (refused.status, refused.code, refused.message) == (400, "PT400", "invalid_input")
    assert refused.details.startswith(next(iter(argument)))


@pytest.mark.parametrize(
    "params",
    [
        [],
        ["width"],
        [{"width": 64}],
        7,
        True,
        "",
        "width",
        "[]",
        "null",
        '"{}"',
        pytest.param({"width": 10**400}, id="width of 401 digits"),
        pytest.param({"nope" * 5000: 1}, id="huge name"),
        pytest.param({"nope": "y" * 1_000_000}, id="huge value"),
        pytest.param([0] * 100_000, id="huge array"),
        pytest.param(json.loads('{"a":' * 500 + "1" + "}" * 500), id="deeply nested"),
        pytest.param(DEEP, id="deeply nested text"),
        pytest.param(DEEP[:8000], id="broken text"),
        {"nope": 1},
        {"prompt": "another"},
        {"width": "64"},
        {"width": 64.5},
        {"width": None},
        {"width": True},
        {"width": [64]},
        {"width": {}},
        {"width": 0},
        {"width": 63},
        {"height": 2049},
        {"height": -1024},
        {"height": 10**9},
        {"num_outputs": 0},
        {"num_outputs": 5},
        {"seed": -1},
        {"seed": 2**31},
    ],
    ids=repr,
)
def test_bad_params_are_invalid_input(user, stack_db, params):
    with unchanged(stack_db):
        refused = refusal(user.enqueue(params=params))

    assert (refused.status, refused.code, refused.message) == (400, "PT400", "invalid_input")
    assert refused.details.startswith("params")
    assert len(refused.details) < 200


@pytest.mark.parametrize(
    "model", [None, "", "no/such", "DARKROOM/PREVIEW", "black-forest-labs/flux-dev", "x" * 100_000]
)
def test_a_model_that_is_not_on_offer_is_not_found(user, stack_db, model):
    with unchanged(stack_db):
        refused = refusal(user.enqueue(model=model))

    assert (refused.status, refused.code, refused.message) == (404, "PT404", "not_found")


@pytest.mark.parametrize(
    "argument",
    [
        {"prompt": "a\0b"},
        {"model": "a\0b"},
        {"idempotency_key": "a\0b"},
        {"params": {"seed": "\0"}},
    ],
    ids=repr,
)
def test_a_nul_byte_is_refused(user, stack_db, argument):
    with unchanged(stack_db):
        refused = refusal(user.enqueue(**argument))

    assert refused.status == 400
    assert refused.code in {"PT400", "22021", "22P05"}  # ours, Lite's driver's, PostgREST's


@pytest.mark.parametrize("params", ['{"width": 1e999999}', '{"width": 1e-999999}', '"-1e999999"'])
def test_a_number_postgres_cannot_hold_is_refused(user, stack_db, params):
    body = f'{{"model": "{PREVIEW}", "prompt": "x", "params": {params}}}'
    with unchanged(stack_db):
        refused = refusal(user.rest("POST", "rpc/enqueue_generation", content=body, headers=JSON))

    assert refused.status == 400
    assert refused.code in {"PT400", "22003"}  # PostgREST meets it before our function does


# Single values and whole bodies.


@pytest.mark.parametrize("job_id", ["", "nope", 7, [], {}, "x" * 100_000, "0" * 33], ids=ascii)
def test_a_job_id_that_is_no_uuid_is_400(user, job_id):
    refused = refusal(user.get_job_status(job_id))

    assert (refused.status, refused.code) == (400, "22P02")


@pytest.mark.parametrize("arguments", [{}, {"job_id": None, "user_id": None}], ids=repr)
def test_missing_and_unknown_arguments_are_404(user, arguments):
    refused = refusal(user.rpc("get_job_status", **arguments))

    assert (refused.status, refused.code) == (404, "PGRST202")


def test_enqueue_takes_no_user_or_price_from_the_client(user, stack_db):
    for argument in ({"user_id": user.id}, {"price_credits": 0}, {"p_params": {}}):
        with unchanged(stack_db):
            assert refusal(user.enqueue(**argument)).code == "PGRST202"


@pytest.mark.parametrize("body", ["{", '{"model": ', "'", "{'model': 'x'}", "\0"])
def test_a_body_that_is_no_json_is_400(user, stack_db, body):
    with unchanged(stack_db):
        refused = refusal(user.rest("POST", "rpc/enqueue_generation", content=body, headers=JSON))

    assert (refused.status, refused.code) == (400, "PGRST102")


@pytest.mark.parametrize("body", ["null", "7", '"x"', "[]", ""])
def test_a_body_that_is_no_object_is_404(user, stack_db, body):
    with unchanged(stack_db):
        refused = refusal(user.rest("POST", "rpc/enqueue_generation", content=body, headers=JSON))

    assert refused.status == 404
    assert refused.code in {"PGRST202", "42883"}


def test_enqueue_by_get_is_405(user, stack_db):
    with unchanged(stack_db):
        refused = refusal(user.rpc("enqueue_generation", "GET", model=PREVIEW, prompt="x"))

    assert (refused.status, refused.code) == (405, "PT405")
