"""Who may do what over HTTP: tokens, tables, schemas, functions of the operator."""

from __future__ import annotations

import base64
import hmac
import json
import uuid
from typing import Any

import pytest
from database import unchanged
from http_client import PREVIEW, Client, SignedUp, answer, refusal
from http_fixtures import through_both_gateways

from stack import sign_jwt

pytest_plugins = ["http_fixtures"]

FAR_AWAY = 4_102_444_800
HS256 = {"alg": "HS256", "typ": "JWT"}
MINE = "a key of the forger's own, long enough for anybody"
CHANGES = {
    "entitlements": {"credits": 1000},
    "credit_ledger": {"amount": 1000},
    "models": {"price_credits": 0},
    "generations": {"status": "completed"},
    "prompt_templates": {"title": "Mine"},
}
FOR_USERS = {
    "enqueue_generation": {"model": PREVIEW, "prompt": "x"},
    "get_job_status": {"job_id": str(uuid.uuid4())},
    "get_entitlement": {},
    "like_image": {"job_id": str(uuid.uuid4())},
}
SOMEBODY = {"user_id": str(uuid.uuid4())}
FOR_OPERATORS = {
    "grant_credits": SOMEBODY | {"amount": 5, "kind": "grant", "external_id": "x"},
    "set_paid": SOMEBODY | {"paid_until": "infinity"},
}


@pytest.fixture
def owner(user) -> SignedUp:
    """A user with rows in every table."""
    user.enqueued()
    answer(user.rpc("save_prompt_template", title="Sea", prompt="the sea"))
    return user


def encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def token(header: dict[str, Any], claims: dict[str, Any], key: str = "") -> str:
    """Return a token with any header, signed if there is a key."""
    body = ".".join(encode(json.dumps(part).encode()) for part in (header, claims))
    return f"{body}.{encode(hmac.digest(key.encode(), body.encode(), 'sha256')) if key else ''}"


def assert_opens_nothing(client: Client, user: SignedUp, what: object) -> None:
    """Assert that a token reads no row and calls no function that anon may not."""
    calls = FOR_USERS | FOR_OPERATORS | {"queue_health": {}}
    for function, arguments in calls.items():
        refused = refusal(client.rpc(function, **arguments))
        assert refused.status in {400, 401, 403}, (what, function)
        # PostgREST's of a token and of a role, PostgreSQL's of a right and of a role, ours
        codes = {"PGRST301", "PGRST303", "42501", "22023", "22021", "22P05", "PT401"}
        assert refused.code in codes, (what, function)
    rows = client.rest("GET", "generations")
    assert rows.status_code in {400, 401, 403} or rows.json() == [], what


# Tokens.


FORGERIES = {
    "alg none": ({"alg": "none"}, ""),
    "alg nOnE with a signature": ({"alg": "nOnE"}, MINE),
    "alg a list": ({"alg": ["none", "HS256"]}, MINE),
    "no alg": ({"typ": "JWT"}, MINE),
    "no signature": (HS256, ""),
    "another key": (HS256, MINE),
    "a key of one NUL": (HS256, "\0"),
    "a public key taken for a secret": ({"alg": "RS256"}, MINE),
    "its key in its header": (HS256 | {"jwk": {"kty": "oct", "k": encode(MINE.encode())}}, MINE),
    "a key that is a file": (HS256 | {"kid": "../../../../dev/null"}, "\0"),
}


@through_both_gateways
@pytest.mark.parametrize("role", ["authenticated", "service_role"])
def test_a_forged_token_opens_nothing(owner, stranger, stack_db, role):
    claims = {"sub": owner.id, "role": role, "exp": FAR_AWAY}
    forged = {name: token(header, claims, key) for name, (header, key) in FORGERIES.items()}
    body, (head, own, signature) = token(HS256, claims).split(".")[1], stranger.token.split(".")
    forged |= {
        "garbage": "a.b.c",
        "another's signature": f"{head}.{body}.{signature}",
        "cut": f"{head}.{own}.{signature[:-2]}",
        "longer": f"{head}.{own}.{signature}AAAA",
    }

    with unchanged(stack_db):
        for name, each in forged.items():
            assert_opens_nothing(owner.with_token(each), owner, name)


def test_a_good_token_of_strange_claims_is_nobodys(owner, stack, stack_db):
    subs = ["", "nope", "' or 1=1 --", f"{owner.id}x", f"{owner.id}\0", None, "x" * 3000]
    roles = ["", "nope", "SERVICE_ROLE", "service_role ", "darkroom_worker", "postgres", 7]
    changes = [*({"sub": sub} for sub in subs), *({"role": role} for role in roles)]
    changes += [{"exp": 1}, {"exp": -1}, {"nbf": FAR_AWAY}]
    claims = {"sub": owner.id, "role": "authenticated", "exp": FAR_AWAY}
    good = owner.with_token(sign_jwt(stack.jwt_secret, claims))
    assert answer(good.rpc("get_entitlement"))["user_id"] == owner.id

    with unchanged(stack_db):
        for change in changes:
            strange = owner.with_token(sign_jwt(stack.jwt_secret, claims | change))
            assert_opens_nothing(strange, owner, change)
            if "sub" in change:
                refused = [strange.rpc(name, **given) for name, given in FOR_USERS.items()]
                assert {refusal(each).message for each in refused} == {"not_authenticated"}


def test_whoever_has_not_signed_in_is_told_so(visitor, stack_db):
    with unchanged(stack_db):
        for function, arguments in FOR_USERS.items():
            refused = refusal(visitor.rpc(function, **arguments))
            said = refused.status, refused.code, refused.message
            assert said == (401, "PT401", "not_authenticated"), function
        for function, arguments in FOR_OPERATORS.items():
            refused = refusal(visitor.rpc(function, **arguments))
            assert (refused.status, refused.code) == (401, "42501"), function


# Functions, schemas, tables.


def test_no_other_schema_is_reachable(user, operator, stack_db):
    with unchanged(stack_db):
        for client in (user, operator):
            for schema in ("private", "auth", "storage", "cron"):
                headers = {"Accept-Profile": schema, "Content-Profile": schema}
                function = client.rest("POST", "rpc/recover_stale_jobs", headers=headers, json={})
                table = client.rest("GET", "settings", headers=headers)
                for refused in map(refusal, (function, table)):
                    assert (refused.status, refused.code) == (406, "PGRST106"), schema
            for function in ("claim_jobs", "private.claim_jobs", "refund_generation"):
                assert refusal(client.rpc(function)).status == 404, function
            for table in ("ready_jobs", "settings", "users"):
                assert refusal(client.rest("GET", table)).status == 404, table


def test_users_read_their_own_rows_and_nobody_changes_one(owner, stranger, visitor, stack_db):
    stranger.enqueue()
    headers = {"Prefer": "return=representation"}
    with unchanged(stack_db):
        for table, change in CHANGES.items():
            key = f"id=eq.{PREVIEW}" if table == "models" else f"user_id=eq.{owner.id}"
            for client in (owner, stranger, visitor):
                for method in ("PATCH", "DELETE"):
                    tried = client.rest(method, f"{table}?{key}", headers=headers, json=change)
                    assert tried.status_code >= 400 or tried.json() == [], table
            row = stack_db.value(f"select to_json(t) from public.{table} as t limit 1")
            if table == "credit_ledger":
                del row["id"]  # a valid new entry
            upsert = {"Prefer": "resolution=merge-duplicates"}
            refused = refusal(owner.rest("POST", table, json=row | change, headers=upsert))
            # 55000: Lite grants everybody everything, so the ledger's trigger comes first.
            assert (refused.status, refused.code) in {(403, "42501"), (500, "55000")}, table
    for table in CHANGES.keys() - {"models"}:
        rows = answer(owner.rest("GET", table))
        assert {row["user_id"] for row in rows} == {owner.id}, table
        assert answer(stranger.rest("GET", f"{table}?user_id=eq.{owner.id}")) == [], table
        seen = visitor.rest("GET", table)
        assert seen.status_code == 401 or seen.json() == [], table
