"""Who may do what over HTTP: tokens, tables, schemas, functions of the operator."""

from __future__ import annotations

import base64
import json
import uuid

import pytest
from database import unchanged
from http_client import PREVIEW, answer, refusal

from stack import sign_jwt

pytest_plugins = ["http_fixtures"]

LONG_AGO = 1_000_000_000
FAR_AWAY = 4_102_444_800
OWN_ROWS = [
    "entitlements",
    "credit_ledger",
    "generations",
    "images",
    "generation_tags",
    "image_likes",
    "prompt_templates",
]
CHANGES = {
    "entitlements": {"credits": 1000},
    "credit_ledger": {"amount": 1000},
    "models": {"price_credits": 0},
    "generations": {"status": "completed"},
    "images": {"bytes": 1},
    "generation_tags": {"tag": "mine"},
    "image_likes": {"position": 1},
    "prompt_templates": {"title": "Mine"},
}
FOR_USERS = {
    "enqueue_generation": {"model": PREVIEW, "prompt": "x"},
    "get_job_status": {"job_id": str(uuid.uuid4())},
    "list_active_jobs": {},
    "get_entitlement": {},
    "list_generations": {},
    "set_favorite": {"job_id": str(uuid.uuid4())},
    "set_tags": {"job_id": str(uuid.uuid4()), "tags": ["sea"]},
    "delete_generation": {"job_id": str(uuid.uuid4())},
    "restore_generation": {"job_id": str(uuid.uuid4())},
    "share_image": {"job_id": str(uuid.uuid4())},
    "like_image": {"job_id": str(uuid.uuid4())},
    "save_prompt_template": {"title": "Sea", "prompt": "the sea"},
    "delete_prompt_template": {"id": str(uuid.uuid4())},
    "list_prompt_templates": {},
}
USER_ID = str(uuid.uuid4())
FOR_OPERATORS = {
    "grant_credits": {"user_id": USER_ID, "amount": 5, "kind": "grant", "external_id": "x"},
    "set_paid": {"user_id": USER_ID, "paid_until": "infinity"},
}


def encode(part):
    """Return a part of a token."""
    return base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode()


@pytest.fixture(
    params=[
        "garbage",
        "three garbage parts",
        "unsigned",
        "unsigned with signature",
        "somebody else's body",
        "another secret",
        "expired",
    ]
)
def bad_token(request, stack, user, stranger):
    """A token that must not act for `user`, though it names them where it names anybody."""
    claims = {"sub": user.id, "role": "authenticated", "exp": FAR_AWAY}
    good = sign_jwt(stack.jwt_secret, claims)
    body, signature = good.split(".")[1:]
    unsigned = f"{encode({'alg': 'none', 'typ': 'JWT'})}.{body}."
    head, _, others_signature = stranger.token.split(".")
    return {
        "garbage": "garbage",
        "three garbage parts": "a.b.c",
        "unsigned": unsigned,
        "unsigned with signature": unsigned + signature,
        "somebody else's body": f"{head}.{body}.{others_signature}",
        "another secret": sign_jwt("x" * 40, claims),
        "expired": sign_jwt(stack.jwt_secret, claims | {"exp": LONG_AGO}),
    }[request.param]


@pytest.fixture
def user_with_image(user, stack_db):
    """A user with rows in every table, a shared image included."""
    job_id = user.enqueued()
    stack_db.execute(
        "insert into public.images"
        " (generation_id, position, user_id, storage_path, content_type, width, height, bytes)"
        " values (%s, 0, %s, %s, 'image/png', 64, 64, 1000)",
        job_id,
        user.id,
        f"{user.id}/{job_id}/0.png",
    )
    answer(user.rpc("set_tags", job_id=job_id, tags=["sea"]))
    answer(user.rpc("share_image", job_id=job_id))
    answer(user.rpc("like_image", job_id=job_id))
    answer(user.rpc("save_prompt_template", title="Sea", prompt="the sea"))
    return user


# Tokens.


def test_a_token_made_like_ours_with_the_right_secret_is_good(user, stack):
    claims = {"sub": user.id, "role": "authenticated", "exp": FAR_AWAY}
    token = sign_jwt(stack.jwt_secret, claims)

    assert answer(user.with_token(token).rpc("get_entitlement"))["user_id"] == user.id


def test_a_bad_token_never_acts_as_a_user(user_with_image, stack_db, bad_token):
    nobody = user_with_image.with_token(bad_token)
    with unchanged(stack_db):
        refused = {name: refusal(nobody.rpc(name, **with_)) for name, with_ in FOR_USERS.items()}
        response = nobody.rest("GET", "generations")

    assert {each.status for each in refused.values()} == {401}
    # PT401: Lite takes it for anon
    assert {each.code for each in refused.values()} <= {"PGRST301", "PGRST303", "PT401"}, refused
    assert response.status_code == 401 or response.json() == []


def test_a_token_without_user_is_401(user, stack, stack_db):
    nobody = user.with_token(sign_jwt(stack.jwt_secret, {"role": "authenticated"}))
    with unchanged(stack_db):
        for function, arguments in FOR_USERS.items():
            refused = refusal(nobody.rpc(function, **arguments))
            said = refused.status, refused.code, refused.message
            assert said == (401, "PT401", "not_authenticated"), function


# Functions.


def test_whoever_has_not_signed_in_is_told_so(visitor, stack_db):
    with unchanged(stack_db):
        for function, arguments in FOR_USERS.items():
            refused = refusal(visitor.rpc(function, **arguments))
            said = refused.status, refused.code, refused.message
            assert said == (401, "PT401", "not_authenticated"), function


def test_visitors_call_no_function_of_operators(visitor, stack_db):
    with unchanged(stack_db):
        for function, arguments in FOR_OPERATORS.items():
            refused = refusal(visitor.rpc(function, **arguments))
            assert (refused.status, refused.code) == (401, "42501"), function


@pytest.mark.parametrize("sub", ["", "nope", "{user}x", "x" * 3000, "a\0b"])
def test_a_sub_that_is_no_uuid_is_401_for_functions_and_tables(user, stack, stack_db, sub):
    claims = {"sub": sub.format(user=user.id), "role": "authenticated", "exp": FAR_AWAY}
    strange = user.with_token(sign_jwt(stack.jwt_secret, claims))
    calls = [strange.rpc(name, **arguments) for name, arguments in FOR_USERS.items()]
    # Where a table has no row nobody asks whose it is; an empty sub is nobody to Lite's auth.uid().
    reads = [strange.rest("GET", table) for table in ("entitlements", "credit_ledger") if sub]

    for response in calls + reads:
        assert (response.status_code, response.json()["message"]) == (401, "not_authenticated")


def test_users_cannot_call_functions_of_the_operator(user, stack_db):
    with unchanged(stack_db):
        for function, arguments in FOR_OPERATORS.items():
            refused = refusal(user.rpc(function, **arguments | {"user_id": user.id}))
            assert (refused.status, refused.code) == (403, "42501"), function


def test_the_operator_cannot_act_as_a_user(operator, stack_db):
    with unchanged(stack_db):
        for function, arguments in FOR_USERS.items():
            refused = refusal(operator.rpc(function, **arguments))
            assert (refused.status, refused.code) == (403, "42501"), function


@pytest.mark.parametrize("schema", ["private", "auth", "storage", "cron"])
def test_no_other_schema_is_reachable(user, operator, stack_db, schema):
    headers = {"Accept-Profile": schema, "Content-Profile": schema}
    functions, tables = ("recover_stale_jobs", "create_entitlement"), ("settings", "users")
    with unchanged(stack_db):
        for client in (user, operator):
            answers = [
                *(client.rest("POST", f"rpc/{f}", headers=headers, json={}) for f in functions),
                *(client.rest("GET", table, headers=headers) for table in tables),
            ]
            for refused in map(refusal, answers):
                assert (refused.status, refused.code) == (406, "PGRST106")


def test_private_functions_are_not_in_the_api(user, operator):
    for name in ("claim_jobs", "complete_jobs", "refund_generation", "create_entitlement"):
        for function in (name, f"private.{name}"):
            for client in (user, operator):
                assert refusal(client.rpc(function)).status == 404, function


# Tables.


def test_users_read_their_own_rows_only(user_with_image, stranger):
    stranger.enqueue()
    for table in OWN_ROWS:
        rows = answer(user_with_image.rest("GET", table))
        theirs = answer(stranger.rest("GET", f"{table}?user_id=eq.{user_with_image.id}"))

        assert {row["user_id"] for row in rows} == {user_with_image.id}, table
        assert theirs == [], table


def test_visitors_read_no_table(visitor, user_with_image):
    for table in CHANGES:
        response = visitor.rest("GET", table)
        assert response.status_code == 401 or response.json() == [], table


def test_private_tables_are_not_in_the_api(user, operator):
    for table in ("ready_jobs", "running_jobs", "workers", "settings", "users"):
        for client in (user, operator):
            assert refusal(client.rest("GET", table)).status == 404, table


def test_nobody_changes_a_row(user_with_image, stranger, nobody, stack_db):
    headers = {"Prefer": "return=representation"}
    with unchanged(stack_db):
        for table, change in CHANGES.items():
            key = f"id=eq.{PREVIEW}" if table == "models" else f"user_id=eq.{user_with_image.id}"
            rows = f"{table}?{key}"
            for client in (user_with_image, stranger, nobody):
                patched = client.rest("PATCH", rows, headers=headers, json=change)
                deleted = client.rest("DELETE", rows, headers=headers)
                for response in (patched, deleted):
                    assert response.status_code >= 400 or response.json() == [], table


@pytest.mark.parametrize("prefer", ["return=minimal", "resolution=merge-duplicates"])
def test_users_insert_no_row(user_with_image, stack_db, prefer):
    for table in CHANGES:
        where = "id = %s" if table == "models" else "user_id = %s limit 1"
        key = PREVIEW if table == "models" else user_with_image.id
        row = stack_db.value(f"select to_json(t) from public.{table} as t where {where}", key)
        if table == "credit_ledger":
            del row["id"]  # a valid new entry
        with unchanged(stack_db):
            refused = refusal(
                user_with_image.rest("POST", table, json=row, headers={"Prefer": prefer})
            )

        # 55000: Lite grants everybody everything, so the ledger's trigger comes first.
        assert (refused.status, refused.code) in {(403, "42501"), (500, "55000")}, table


# The operator's backend.


def test_the_same_payment_is_granted_once(user, operator):
    payment = {"user_id": user.id, "amount": 50, "kind": "grant", "external_id": f"pay:{user.id}"}

    first = answer(operator.rpc("grant_credits", **payment))
    second = answer(operator.rpc("grant_credits", **payment))
    other = refusal(operator.rpc("grant_credits", **payment | {"amount": 51}))

    assert (first, second) == ({"credits": 60, "applied": True}, {"credits": 60, "applied": False})
    assert (other.status, other.code, other.message) == (409, "PT409", "idempotency_conflict")
    assert user.ledger() == [("grant", 10), ("grant", 50)]


def test_a_plan_begins_and_ends(user, operator):
    paid = answer(operator.rpc("set_paid", user_id=user.id, paid_until="infinity"))
    assert (paid["plan"], paid["max_active"]) == ("paid", 20)
    assert answer(user.enqueue())["credits_left"] == 10, "included in the plan"

    free = answer(operator.rpc("set_paid", user_id=user.id, paid_until=None))
    assert (free["plan"], free["paid_until"]) == ("free", None)
    assert answer(user.enqueue())["credits_left"] == 9


def test_the_operator_hears_of_unknown_users(operator, stack_db):
    with unchanged(stack_db):
        for function, arguments in FOR_OPERATORS.items():
            refused = refusal(operator.rpc(function, **arguments))
            said = refused.status, refused.code, refused.details
            assert said == (404, "PT404", "user_id: no such user"), function
