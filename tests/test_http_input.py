"""Bad input over HTTP: each is refused with a 4xx and a stable code, and nothing is written."""

from __future__ import annotations

import json

import pytest
from database import unchanged
from http_client import PREVIEW, refusal
from http_fixtures import signed_up

pytest_plugins = ["http_fixtures"]

DEEP = '{"a":' * 100_000 + "1" + "}" * 100_000
INVALID, UNKNOWN = (400, "PT400", "invalid_input"), (404, "PT404", "not_found")
# By argument: what is given, and how it is refused. What fits a schema: test_gating, test_input.
ARGUMENTS = {
    "prompt": (["x" * 100_000, "", None], INVALID),
    "idempotency_key": (["", "k" * 201], INVALID),
    "model": ([None, "no/such", "x" * 100_000], UNKNOWN),
    "params": (
        [
            *([], ["width"], 7, True, "", "width", "[]", "null", '"{}"', [0] * 100_000),
            *({"nope": 1}, {"width": "64"}, {"width": [10**400]}, {"nope" * 5000: 1}, DEEP),
            *(DEEP[:8000], json.loads('{"a":' * 500 + "1" + "}" * 500)),
        ],
        INVALID,
    ),
}
ENQUEUE = f'{{"model": "{PREVIEW}", "prompt": "x", "params": %s}}'
BODIES = {
    # body: status and codes: ours; PostgREST's, that meets it before our function; Lite's
    '{"model": "a\\u0000b", "prompt": "x"}': (400, {"PT400", "22021", "22P05"}),
    ENQUEUE % '{"seed": "\\u0000"}': (400, {"PT400", "22021", "22P05"}),
    # By itself Lite reads it as null, which is not given.
    ENQUEUE % '{"width": [1e999999]}': (400, {"PT400", "22003"}),
    ENQUEUE % '"-1e999999"': (400, {"PT400", "22003"}),
    **dict.fromkeys(["{", '{"model": ', "'", "{'model': 'x'}", "\0"], (400, {"PGRST102"})),
    **dict.fromkeys(["null", "7", '"x"', "[]", ""], (404, {"PGRST202", "42883"})),
    '{"model": "x", "prompt": "x", "user_id": "x"}': (404, {"PGRST202"}),
    '{"model": "x", "prompt": "x", "price_credits": 0}': (404, {"PGRST202"}),
}


@pytest.fixture(scope="module")
def user(endpoints, stack_db):
    """One user for all of these: nothing they ask for is ever accepted."""
    with signed_up(endpoints, stack_db) as user:
        yield user


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_bad_argument_is_named_and_changes_nothing(user, stack_db, name):
    values, expected = ARGUMENTS[name]
    with unchanged(stack_db):
        for value in values:
            refused = refusal(user.enqueue(**{name: value}))

            said = repr(value)[:80]
            assert (refused.status, refused.code, refused.message) == expected, said
            assert refused.details.startswith(name) and len(refused.details) < 200, said


def test_a_body_that_is_no_json_no_object_or_no_such_arguments_changes_nothing(user, stack_db):
    headers = {"Content-Type": "application/json"}
    with unchanged(stack_db):
        for body, (status, codes) in BODIES.items():
            response = user.rest("POST", "rpc/enqueue_generation", content=body, headers=headers)

            assert refusal(response).status == status, body
            assert refusal(response).code in codes, body


def test_a_job_id_that_is_no_uuid_is_400(user):
    for job_id in ("", "nope", 7, [], {}, "x" * 100_000, "0" * 33):
        refused = refusal(user.get_job_status(job_id))

        assert (refused.status, refused.code) == (400, "22P02")
    assert refusal(user.rpc("get_job_status")).code == "PGRST202"
