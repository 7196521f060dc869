"""Tokens that were forged, and such as were signed with strange claims: what they open."""

from __future__ import annotations

import base64
import contextlib
import hmac
import json
import uuid
from typing import Any

import httpx
import pytest
from database import unchanged
from http_client import PREVIEW, Client, SignedUp, answer, refusal
from http_fixtures import through_both_gateways

from stack import sign_jwt

pytest_plugins = ["http_fixtures"]
pytestmark = through_both_gateways

FAR_AWAY = 4_102_444_800
HS256 = {"alg": "HS256", "typ": "JWT"}
MINE = "a key of the forger's own, long enough for anybody"
CLAIMS = {
    "user": {"sub": "{user}", "role": "authenticated", "exp": FAR_AWAY},
    "operator": {"role": "service_role", "exp": FAR_AWAY},
}


def encode(data: bytes) -> str:
    """Return a part of a token."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def token(header: dict[str, Any], claims: str, key: str = "", digest: str = "sha256") -> str:
    """Return a token with any header, signed if there is a key."""
    body = f"{encode(json.dumps(header).encode())}.{encode(claims.encode())}"
    return f"{body}.{encode(hmac.digest(key.encode(), body.encode(), digest)) if key else ''}"


FORGERIES = {
    "alg none": ({"alg": "none"}, ""),
    "alg None": ({"alg": "None"}, ""),
    "alg nOnE with a signature": ({"alg": "nOnE"}, MINE),
    "alg empty": ({"alg": ""}, ""),
    "alg null": ({"alg": None}, ""),
    "alg a list": ({"alg": ["none", "HS256"]}, MINE),
    "no alg": ({"typ": "JWT"}, MINE),
    "no signature": (HS256, ""),
    "another key": (HS256, MINE),
    "a key of one NUL": (HS256, "\0"),
    "a public key taken for a secret": ({"alg": "RS256"}, MINE),
    "its key in its header": (HS256 | {"jwk": {"kty": "oct", "k": encode(MINE.encode())}}, MINE),
    "the address of its key": (HS256 | {"jku": "http://127.0.0.1:9/jwks.json"}, MINE),
    "a key that is a file": (HS256 | {"kid": "../../../../dev/null"}, "\0"),
    "a key from a query": (HS256 | {"kid": f"x' union select '{MINE}' --"}, MINE),
    "a header nobody knows": (HS256 | {"crit": ["mine"], "mine": True}, MINE),
}


@pytest.fixture(params=CLAIMS)
def claims(request, user):
    """What a forger would like to say."""
    return json.dumps(CLAIMS[request.param]).replace("{user}", user.id)


def assert_opens_nothing(client: Client, user: SignedUp, what: object = None) -> None:
    """Assert that a token reads no row and calls no function that anon may not."""
    for function, arguments in {
        "enqueue_generation": {"model": PREVIEW, "prompt": "x"},
        "get_entitlement": {},
        "queue_health": {},
        "grant_credits": {"user_id": user.id, "amount": 1, "kind": "grant", "external_id": "x"},
    }.items():
        refused = refusal(client.rpc(function, **arguments))
        assert (refused.status, refused.code) in {
            *((401, code) for code in ("PGRST301", "PGRST303", "42501", "PT401")),
            *((403, code) for code in ("42501", "PGRST301")),
            # the role, or the user, is none
            *((400, code) for code in ("22P02", "22023", "22021", "22P05")),
        }, (what, function)
    rows = client.rest("GET", "generations")
    assert rows.status_code in {400, 401, 403} or rows.json() == [], what


def test_a_forged_token_opens_nothing(user, stack_db, claims):
    user.enqueued()

    with unchanged(stack_db):
        for forgery, (header, key) in FORGERIES.items():
            assert_opens_nothing(user.with_token(token(header, claims, key)), user, forgery)


def test_a_good_signature_is_good_for_its_own_claims_only(user, stack_db, claims):
    head, body, signature = user.token.split(".")
    other = encode(claims.encode().replace(b" ", b"  "))

    with unchanged(stack_db):
        for forged in (
            f"{head}.{other}.{signature}",
            f"{head}.{body}.{signature[:-2]}",
            f"{head}.{body}.{signature}AAAA",
            f"{encode(json.dumps({'alg': 'none'}).encode())}.{body}.{signature}",
            f"{head}.{body}.{signature}.{signature}",
        ):
            assert_opens_nothing(user.with_token(forged), user)


@pytest.mark.parametrize("size", [20_000, 1_000_000])
def test_a_huge_token_is_refused(user, stack_db, size):
    claims = json.dumps(CLAIMS["operator"] | {"padding": "x" * size})
    forged = user.with_token(token(HS256, claims, MINE))

    with unchanged(stack_db), contextlib.suppress(httpx.TransportError):  # hung up on
        assert forged.rpc("queue_health").status_code in {400, 401, 413, 431}
    assert answer(user.rpc("get_entitlement"))["user_id"] == user.id


# With the right key: an issuer that says strange things. Supabase Lite takes a list of one text for
# that text, and sets any role that there is, `none` too, as the superuser it connects as. PostgREST
# reads a role up to its NUL: the issuer, who alone can say it, could have said just that.


NOBODY = ["", " ", "nope", "' or 1=1 --", "null", str(uuid.UUID(int=7)), "{user}, {user}"]
NOBODY += ["{user}\0", None, 7, True, [], {}, {"$ne": ""}, "x" * 3000]
NO_ROLES = ["", "nope", "SERVICE_ROLE", "service_role ", "\0service_role", "darkroom_worker"]
NO_ROLES += ["authenticated; set role postgres", "'authenticated'", None, 7, {}]


def test_a_user_who_is_nobody_gets_nowhere(user, stack, stack_db):
    user.enqueued()

    with unchanged(stack_db):
        for sub in NOBODY:
            claims = json.dumps({"role": "authenticated", "exp": FAR_AWAY, "sub": sub})
            strange = json.loads(claims.replace("{user}", user.id))
            assert_opens_nothing(user.with_token(sign_jwt(stack.jwt_secret, strange)), user, sub)


def test_a_role_that_is_none_of_the_apis_gets_nowhere(user, stack, stack_db):
    with unchanged(stack_db):
        for role in NO_ROLES:
            strange = sign_jwt(stack.jwt_secret, {"role": role, "exp": FAR_AWAY})
            assert_opens_nothing(user.with_token(strange), user, role)


def test_a_good_token_under_another_scheme_is_no_token(user, nobody):
    for scheme in ("", "Basic", "Token", "Bearer Bearer", "Bearer,"):
        headers = {"Authorization": f"{scheme} {user.token}".strip()}
        refused = refusal(nobody.rest("POST", "rpc/get_entitlement", json={}, headers=headers))
        assert refused.status == 401, scheme


def test_a_token_out_of_its_time_opens_nothing(user, stack, stack_db):
    with unchanged(stack_db):
        for times in ({"exp": 1}, {"exp": -1}, {"exp": 0}, {"nbf": FAR_AWAY}):
            claims = {"sub": user.id, "role": "authenticated", "exp": FAR_AWAY} | times
            assert_opens_nothing(user.with_token(sign_jwt(stack.jwt_secret, claims)), user, times)
