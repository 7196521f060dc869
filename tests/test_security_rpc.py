"""Every function of the API, given hostile values by everybody who has a token or none.

Twice: over HTTP with gateways and databases of its own, where values may be of any type; and past
the gateway with values of the right type, since what a gateway does not understand goes no further.
`HOSTILE=20 pytest tests/test_security_rpc.py` tries 20 times as much.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import httpx
import pytest
from actors import Anon, Caller, Refusal, Service, User, outcome
from database import Database, Server, assert_books_balance, cost
from hostile import (
    API_ROLES,
    DETAIL,
    HEAVY,
    MISFITS,
    SECRET,
    Function,
    Victim,
    arguments,
    attacks,
    functions,
    literal,
    one_by_one,
)
from http_client import Client, Endpoints
from http_fixtures import GATEWAYS, gateway_before
from hypothesis import given
from hypothesis import strategies as st
from test_catalog import MAY_EXECUTE

from stack import Stack, sign_jwt

CALLS = [
    (role, re.sub(r"^public\.|\(.*", "", signature))
    for role in API_ROLES
    for signature in sorted(MAY_EXECUTE[role])
    if signature.startswith("public.")
]
FOR_ANYBODY = {"list_models", "list_public_images", "ping"}
NAMES = list(dict.fromkeys(name for _, name in CALLS))
# PostgreSQL's words for a value that is not of its type; a gateway's for a call it cannot make.
CODES = r"PT4\d\d|PT503|42501|22P02|2200[378]|22021|22P05|25006|42883|42846|PGRST1\d\d|PGRST202"
INSIDE = re.compile(
    r"CONTEXT|PL/pgSQL|SQL (statement|expression|function)|private\.\w+\(|(relation|column) \""
    r"|constraint|Traceback|\n\s+at |\.[jt]s:\d|node_modules|postgres(ql)?://"
)


def function_named(db: Database, role: str, name: str) -> Function:
    """Return what the catalogue says of it."""
    return next(each for each in functions(db, role, "public") if each.name == name)


SHOWS_DETAIL = "queue_report"  # to operators only, and without the prompt


def tells_secrets(name: str, text: str, caller: object, victim: Victim) -> bool:
    """Say whether an answer of a function holds what only others may read."""
    is_operator = isinstance(caller, Service)
    is_own = getattr(caller, "id", None) == victim.id or is_operator
    if name == SHOWS_DETAIL and is_operator:
        return SECRET in text
    return DETAIL in text or (SECRET in text and not is_own)


# Past the gateway.


@pytest.mark.parametrize(("role", "name"), CALLS)
def test_whatever_it_is_given_a_function_answers_or_refuses_in_our_words(db, role, name):
    victim, function = Victim(db), function_named(db, role, name)
    callers = {
        "anon": [Anon(db)],
        "authenticated": [User(db).has(100), User(db, victim.id)],
        "service_role": [Service(db)],
    }[role]

    def attack(caller: Caller, values: dict[str, Any]) -> None:
        answer = function.called_by(caller, values)
        if isinstance(answer, Refusal):
            assert re.fullmatch(r"PT4\d\d|PT503", answer.code), answer
        if role == "anon" and name not in FOR_ANYBODY:
            assert (answer.code, answer.token) == ("PT401", "not_authenticated")
        assert not tells_secrets(name, repr(answer), caller, victim)

    for values in one_by_one(function, victim):
        attack(callers[-1], values)
    attacks(10)(given(st.sampled_from(callers), arguments(function, victim))(attack))()
    assert_books_balance(db)


@pytest.mark.parametrize("role", API_ROLES)
def test_no_call_costs_more_than_it_weighs(db, role):
    victim = Victim(db)
    caller: Caller = {
        "anon": Anon(db),
        "authenticated": User(db, victim.id),
        "service_role": Service(db),
    }[role]
    pid = caller.connection.info.backend_pid
    plausible = {name: values[0] for name, values in victim.plausible().items()}

    for function in functions(db, role, "public"):
        types = function.arguments
        given = {name: literal(type, plausible[name]) for name, type in types.items()}
        caller.ping()
        heavy = [(name, value) for name in types for value in HEAVY.get(types[name], [])]
        for name, value in heavy:
            values, what = given | {name: value}, (function.name, name, value[:30], len(value))
            call = partial(outcome, partial(caller.call, f"public.{function.name}", **values))
            seconds, grown = cost([pid], call)
            assert grown < 20_000_000, (what, grown)
            assert seconds < 0.25 or cost([pid], call)[0] < 0.25, (what, seconds)


# Over HTTP.


class Api:
    """A gateway of these tests' own: what the operator pauses or grants here concerns no others."""

    def __init__(self, db: Database, url: str, jwt_secret: str, http: httpx.Client) -> None:
        self.db, self.victim, self.jwt_secret = db, Victim(db), jwt_secret
        self.endpoints = Endpoints(http, auth="", rest=url, storage="")
        self.callers = {
            "visitor": Client(self.endpoints),
            "anon": self.with_claims(role="anon"),
            "victim": self.with_claims(role="authenticated", sub=self.victim.id),
            "stranger": self.with_claims(role="authenticated", sub=User(db).has(100).id),
            "operator": self.with_claims(role="service_role"),
        }

    def with_claims(self, **claims: str) -> Client:
        return Client(self.endpoints, sign_jwt(self.jwt_secret, claims | {"exp": 4_102_444_800}))


@pytest.fixture(scope="module", params=GATEWAYS)
def api(
    server: Server, template: str, stopped_stack: Stack, request: pytest.FixtureRequest
) -> Iterator[Api]:
    """A database with a victim in it, behind a gateway."""
    db = server.create(template)
    with (
        gateway_before(db, stopped_stack, request.param) as url,
        httpx.Client(timeout=60, limits=httpx.Limits(keepalive_expiry=2)) as http,
    ):
        yield Api(db, url, stopped_stack.jwt_secret, http)
    server.drop(db)


def send(client: Client, function: Function, values: dict[str, Any], method: str) -> httpx.Response:
    """Call a function by POST, or by GET as far as an address can hold the values."""
    path = f"rpc/{function.name}"
    if method == "POST":
        body = json.dumps(values).encode()
        return client.rest("POST", path, content=body, headers={"Content-Type": "application/json"})
    texts = {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in values.items()
    }
    short = {name: text[:200].encode(errors="replace") for name, text in texts.items()}
    return client.rest("GET", path, params=short)


def assert_decent(response: httpx.Response) -> None:
    """Assert that a refusal is one, with a code of ours or for a bad value, and no insides."""
    if response.status_code < 400:
        return
    body = response.json()
    if body["code"] == "SUP" and "ERR_INVALID_ARG_TYPE" in body["message"]:
        return  # Lite's driver cannot send such a value, so the database never sees it
    assert set(body) == {"code", "message", "details", "hint"}
    assert re.fullmatch(CODES, body["code"]), body
    assert not INSIDE.search(response.text), body
    assert response.status_code < 500 or body["code"] == "PT503"


@pytest.mark.parametrize("name", NAMES)
def test_no_call_fails_tells_of_others_or_writes_although_refused(api, name):
    role = next(role for role, called in CALLS if called == name)
    function = function_named(api.db, role, name)
    whose = set(api.callers) - ({"victim"} if name == "share_image" else set())

    @attacks(15)
    @given(
        st.sampled_from(sorted(whose)),
        arguments(function, api.victim, MISFITS),
        st.sets(st.sampled_from([*list(function.arguments)[function.required :], ""])),
        st.sampled_from(["POST", "POST", "GET"]),
    )
    def attack(who: str, values: dict[str, Any], left_out: set[str], method: str) -> None:
        values = {name: value for name, value in values.items() if name not in left_out}
        before = api.db.snapshot()
        response = send(api.callers[who], function, values, method)
        assert_decent(response)
        assert response.status_code < 400 or api.db.snapshot() == before
        assert (name, who) == (SHOWS_DETAIL, "operator") or DETAIL not in response.text
        assert who in {"victim", "operator"} or SECRET not in response.text

    attack()
    assert_books_balance(api.db)
