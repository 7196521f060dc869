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
from http_fixtures import database_of

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


def encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def token(header: dict[str, Any], claims: dict[str, Any], key: str = "") -> str:
    """Return a token with any header, signed if there is a key."""
    body = ".".join(encode(json.dumps(part).encode()) for part in (header, claims))
    return f"{body}.{encode(hmac.digest(key.encode(), body.encode(), 'sha256')) if key else ''}"


def assert_opens_nothing(client: Client, user: SignedUp, what: object = None) -> None:
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
    "no signature": (HS256, ""),
    "another key": (HS256, MINE),
    "its key in its header": (HS256 | {"jwk": {"kty": "oct", "k": encode(MINE.encode())}}, MINE),
}


@pytest.mark.parametrize("role", ["authenticated", "service_role"])
def test_a_forged_token_opens_nothing(user, stranger, stack_db, role):
    user.enqueued()
    claims = {"sub": user.id, "role": role, "exp": FAR_AWAY}
    forged = [token(header, claims, key) for header, key in FORGERIES.values()]
    head, _, signature = stranger.token.split(".")
    forged.append(f"{head}.{forged[0].split('.')[1]}.{signature}")

    with unchanged(stack_db):
        for each in forged:
            assert_opens_nothing(user.with_token(each), user)


def test_a_good_token_of_strange_claims_is_nobodys(user, stack, stack_db):
    user.enqueued()
    claims = {"sub": user.id, "role": "authenticated", "exp": FAR_AWAY}
    good = user.with_token(sign_jwt(stack.jwt_secret, claims))
    assert answer(good.rpc("get_entitlement"))["user_id"] == user.id

    strange = [{"sub": sub} for sub in ("", "nope", f"{user.id}x", f"{user.id}\0", None)]
    strange += [{"role": role} for role in ("", "nope", "service_role ", "darkroom_worker", 7)]
    with unchanged(stack_db):
        for change in [*strange, {"exp": 1}, {"nbf": FAR_AWAY}]:
            changed = sign_jwt(stack.jwt_secret, claims | change)
            assert_opens_nothing(user.with_token(changed), user, change)


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


def test_users_read_their_own_rows_and_nobody_changes_one(user, stranger, visitor, stack_db):
    for each in (user, stranger):
        each.enqueue()
    headers = {"Prefer": "return=representation"}
    with unchanged(stack_db):
        for table, change in CHANGES.items():
            key = f"id=eq.{PREVIEW}" if table == "models" else f"user_id=eq.{user.id}"
            for client in (user, stranger, visitor):
                for method in ("PATCH", "DELETE"):
                    tried = client.rest(method, f"{table}?{key}", headers=headers, json=change)
                    assert tried.status_code >= 400 or tried.json() == [], table
            db = database_of(user, stack_db)
            row = db.value(f"select to_json(t) from public.{table} as t limit 1")
            if table == "credit_ledger":
                del row["id"]  # a valid new entry
            upsert = {"Prefer": "resolution=merge-duplicates"}
            refused = refusal(user.rest("POST", table, json=row | change, headers=upsert))
            assert (refused.status, refused.code) == (403, "42501"), table
    for table in CHANGES.keys() - {"models"}:
        rows = answer(user.rest("GET", table))
        assert {row["user_id"] for row in rows} == {user.id}, table
        assert answer(stranger.rest("GET", f"{table}?user_id=eq.{user.id}")) == [], table
        seen = visitor.rest("GET", table)
        assert seen.status_code == 401 or seen.json() == [], table
