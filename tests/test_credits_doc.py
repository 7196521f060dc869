"""docs/credits.md: all that it says can be done is done, in order, and shows what it says."""

from __future__ import annotations

import contextlib
import secrets

import pytest
from actors import Service, User
from database import PROJECT, Database
from documents import read, run, shows
from edge import Edge, served
from http_fixtures import gateway_before
from runbook import Section

from stack import KEYS_EXPIRE_AT, Stack, postgres_program, sign_jwt

SECRETS = {
    "STRIPE_WEBHOOK_SECRET": f"whsec_{secrets.token_hex(16)}",
    "REVENUECAT_WEBHOOK_AUTHORIZATION": f"Bearer {secrets.token_hex(16)}",
}


class Reader:
    """Somebody who does what the page says, with a project before a database."""

    def __init__(self, db: Database, stack: Stack, edge: Edge) -> None:
        self.db, self.user = db, User(db)
        claims = {"sub": self.user.id, "role": "authenticated", "aud": "authenticated"}
        self.environment = SECRETS | {
            "API_URL": edge.url,
            "ANON_KEY": stack.anon_key,
            "USER_ID": self.user.id,
            "TOKEN": sign_jwt(stack.jwt_secret, claims | {"exp": KEYS_EXPIRE_AT}),
        }
        self.functions = ""  # of the shell, as the blocks before have defined them

    def sql(self, block: str) -> str:
        variables = {"user_id": self.user.id}
        if ":'guest_id'" in block:
            query = "insert into auth.users (id, is_anonymous) values (gen_random_uuid(), true)"
            [guest] = self.db.execute(f"{query} returning id")
            variables["guest_id"] = str(guest["id"])
        options = [f"--set={name}={value}" for name, value in variables.items()]
        command = [str(postgres_program("psql")), self.db.url, "-XAtq", "--set=ON_ERROR_STOP=1"]
        return run([*command, *options], block)

    def sh(self, block: str) -> str:
        if "() {" in block:
            self.functions += block
            return ""
        return run(["bash", "-euo", "pipefail"], self.functions + block, **self.environment)


@pytest.fixture
def reader(db, stack, tmp_path):
    keys = {"SUPABASE_SERVICE_ROLE_KEY": stack.service_role_key, "SUPABASE_SECRET_KEYS": None}
    with contextlib.ExitStack() as running:
        gateway = running.enter_context(gateway_before(db, stack))
        edge = running.enter_context(Edge(gateway))
        running.callback(edge.shutdown)
        edge.says(None)
        for variable, secret in SECRETS.items():
            name = f"{variable.partition('_')[0].lower()}_webhook"
            function = served(tmp_path, name, edge.url, **keys, **{variable: secret})
            edge.addresses[name] = running.enter_context(function)
        yield Reader(db, stack, edge)


def test_what_the_page_says_can_be_done_and_shows_what_it_says(reader):
    for block in read(PROJECT / "docs/credits.md"):
        if block.is_run:
            printed = getattr(reader, block.language)(block.text)
            assert shows(printed, block.shown), f"{block.text}\n{printed}"


def test_a_payment_of_somebody_unknown_is_found_and_given_to_whom_the_operator_names(db, alice):
    service, section = Service(db), Section("A payment gave no credits")
    query = "insert into public.credit_products (provider, product_id, credits) values (%s, %s, 7)"
    db.execute(query, "stripe", "pack")
    of = {"id": "cs_1", "mode": "payment", "payment_status": "paid", "customer": "cus_1"}
    of |= {"metadata": {"product": "pack"}}
    event = {"id": "evt_1", "type": "checkout.session.completed", "created": 1796052000}
    event |= {"data": {"object": of}}
    assert service.apply_billing_event("stripe", event)["outcome"] == "waiting"
    known = {"provider": "stripe", "customer": "cus_1", "user_id": alice.id}

    assert '{"user stripe:cus_1"}' in section.sql(db.url, **known)
    db.execute("select private.apply_retention()")

    assert alice.credits() == 17
    assert "stripe:cs_1" in section.sql(db.url, **known | {"customer": "cus_2"})
