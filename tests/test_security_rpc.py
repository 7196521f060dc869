"""Every function of the API, given hostile values by everybody who has a token or none.

Twice: over HTTP, where values may be of any type; and past the gateway with values of the right
type, since what a gateway does not understand goes no further.
`HOSTILE=20 pytest tests/test_security_rpc.py` tries 20 times as much.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
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
from http_fixtures import gateway_before
from hypothesis import given
from hypothesis import strategies as st
from test_catalog import MAY_EXECUTE

from stack import Stack, sign_jwt

ROLES: dict[str, list[str]] = {}  # of each function of the API
for _role in API_ROLES:
    for _signature in sorted(MAY_EXECUTE[_role]):
        if _signature.startswith("public."):
            ROLES.setdefault(re.sub(r"^public\.|\(.*", "", _signature), []).append(_role)
FOR_ANYBODY = {"list_models", "list_public_images", "ping"}
JSON = {"Content-Type": "application/json"}
SHOW_DETAIL = {"queue_job", "queue_report"}  # to operators only, and without the prompt
# PostgreSQL's words for a value that is not of its type; a gateway's for a call it cannot make.
CODES = r"PT4\d\d|PT503|42501|22P02|2200[3789]|22021|22P05|25006|42883|42846|PGRST1\d\d|PGRST202"
INSIDE = re.compile(
    r"CONTEXT|PL/pgSQL|SQL (statement|expression|function)|private\.\w+\(|(relation|column) \""
    r"|constraint|Traceback|\n\s+at |\.[jt]s:\d|node_modules|postgres(ql)?://"
)


def function_named(db: Database, name: str) -> Function:
    found = functions(db, ROLES[name][-1], "public")
    return next(each for each in found if each.name == name)


# Past the gateway.


@pytest.mark.parametrize("name", ROLES)
def test_whatever_it_is_given_a_function_answers_or_refuses_in_our_words(db, name):
    victim, function, roles = Victim(db), function_named(db, name), ROLES[name]
    callers: list[Caller] = [Service(db)] if "service_role" in roles else []
    if "authenticated" in roles:
        callers += [Anon(db), User(db).has(100), User(db, victim.id)]

    def attack(caller: Caller, values: dict[str, Any]) -> None:
        answer = function.called_by(caller, values)
        if isinstance(answer, Refusal):
            assert re.fullmatch(r"PT4\d\d|PT503", answer.code), answer
        if isinstance(caller, Anon) and name not in FOR_ANYBODY:
            assert (answer.code, answer.token) == ("PT401", "not_authenticated")
        is_operator = isinstance(caller, Service)
        assert DETAIL not in repr(answer) or (name in SHOW_DETAIL and is_operator)
        may_read = is_operator and name not in SHOW_DETAIL
        assert SECRET not in repr(answer) or may_read or getattr(caller, "id", None) == victim.id

    for values in one_by_one(function, victim):
        attack(callers[-1], values)
    attacks(10)(given(st.sampled_from(callers), arguments(function, victim))(attack))()
    assert_books_balance(db)


@pytest.mark.parametrize("role", API_ROLES)
def test_no_call_costs_more_than_it_weighs(db, role):
    victim = Victim(db)
    callers: dict[str, Callable[[], Caller]] = {
        "anon": lambda: Anon(db),
        "authenticated": lambda: User(db, victim.id),
        "service_role": lambda: Service(db),
    }
    caller = callers[role]()
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

    def __init__(self, db: Database, endpoints: Endpoints, jwt_secret: str) -> None:
        def signed(**claims: str) -> Client:
            return Client(endpoints, sign_jwt(jwt_secret, claims | {"exp": 4_102_444_800}))

        self.db, self.victim = db, Victim(db)
        self.callers = {
            "visitor": Client(endpoints),
            "anon": signed(role="anon"),
            "victim": signed(role="authenticated", sub=self.victim.id),
            "stranger": signed(role="authenticated", sub=User(db).has(100).id),
            "operator": signed(role="service_role"),
        }


@pytest.fixture(scope="module")
def api(server: Server, template: str, stopped_stack: Stack) -> Iterator[Api]:
    """A database with a victim in it, behind a gateway."""
    db = server.create(template)
    limits = httpx.Limits(keepalive_expiry=2)
    with gateway_before(db, stopped_stack) as url, httpx.Client(timeout=60, limits=limits) as http:
        yield Api(db, Endpoints(http, auth="", rest=url, storage=""), stopped_stack.jwt_secret)
    server.drop(db)


def assert_decent(response: httpx.Response) -> None:
    """Assert that a refusal is one, with a code of ours or for a bad value, and no insides."""
    body = response.json()
    if body["code"] == "SUP" and "ERR_INVALID_ARG_TYPE" in body["message"]:
        return  # Lite's driver cannot send such a value, so the database never sees it
    assert set(body) == {"code", "message", "details", "hint"}
    assert re.fullmatch(CODES, body["code"]), body
    assert not INSIDE.search(response.text), body
    assert response.status_code < 500 or body["code"] == "PT503"


@pytest.mark.parametrize("name", ROLES)
def test_no_call_fails_tells_of_others_or_writes_although_refused(api, name):
    function = function_named(api.db, name)
    whose = set(api.callers) - ({"victim"} if name == "share_image" else set())

    @attacks(15)
    @given(
        st.sampled_from(sorted(whose)),
        arguments(function, api.victim, MISFITS),
        st.sets(st.sampled_from([*list(function.arguments)[function.required :], ""])),
        st.sampled_from(["POST", "POST", "GET"]),
    )
    def attack(who: str, values: dict[str, Any], left_out: set[str], method: str) -> None:
        values = {each: value for each, value in values.items() if each not in left_out}
        before = api.db.snapshot()
        if method == "POST":
            how = {"content": json.dumps(values).encode(), "headers": JSON}
        else:  # as far as an address can hold the values
            texts = [
                each if isinstance(each, str) else json.dumps(each) for each in values.values()
            ]
            short = [text[:200].encode(errors="replace") for text in texts]
            how = {"params": dict(zip(values, short, strict=True))}
        response = api.callers[who].rest(method, f"rpc/{name}", **how)
        if response.status_code >= 400:
            assert_decent(response)
            assert api.db.snapshot() == before
        assert (name in SHOW_DETAIL and who == "operator") or DETAIL not in response.text
        assert who in {"victim", "operator"} or SECRET not in response.text

    attack()
    assert_books_balance(api.db)
