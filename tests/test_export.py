"""sql/87_export.sql: all that is known of a user, and nothing of anybody else's."""

import json
from itertools import pairwise

import pytest
from actors import User, refused
from billing import PRODUCTS, Stripe, apply
from database import unchanged
from explain import explained, nodes, rows_met
from hostile import DETAIL

# Tables that hold something of a user's or of a generation's, and why they are in no export.
NOT_EXPORTED = {
    "private.budgets": "limits that operators set",
    "private.expired_files": "what Storage still has of them is among the files",
    "private.purchases": "ids of the provider's, for the operator",
    "private.ready_jobs": "the queue: what of it is the user's, the generation says",
    "private.retries": "generations.retry_of",
    "private.running_jobs": "as ready_jobs",
    "private.sources": "generations.input",
    "public.generation_tags": "generations.tags",
}
EXPORTED = "select name, owner from private.exported_tables"


class Somebody:
    """Something of everything, and somebody else with the same."""

    def __init__(self, db, service, worker):
        service.register_webhook()
        db.execute(PRODUCTS)
        self.db, self.user, self.other = db, User(db), User(db)
        for user, liked in ((self.other, None), (self.user, self.other)):
            grant = {"expires_at": "2099-01-01", "priority": -1}
            service.grant_credits(user, 5, f"payment of {user.id}", **grant)
            apply(service, stripe := Stripe(user), stripe.paid())
            user.register_push_token(f"ExponentPushToken[{user.id}]")
            user.save_prompt_template("Sea", f"the sea of {user.id}")
            user.done = user.enqueued(f"a lighthouse of {user.id}")
            worker.complete_job(worker.claimed())
            user.share_image(user.done)
            user.like_image((liked or user).done)
            user.enqueue_batch(["one", "two"])
            user.guest = User(db)
            service.merge_user(user.guest.id, user.id, allow_permanent=True)
            for job in worker.claim_jobs(2):
                worker.fail_job(job, "moderated", DETAIL)
        self.user.delete_generation(self.user.done)
        guest = User(db)
        guest.enqueue()
        worker.complete_job(worker.claimed())
        db.execute("update auth.users set is_anonymous = true where id = %s", guest.id)
        service.merge_user(guest.id, self.user.id)
        self.files = [
            {"bucket": bucket, "path": f"{folder}/{name}"}
            for folder in sorted([self.user.id, guest.id])
            for name in ("a/0.png", "b.png", "b/c.png")
            for bucket in ("generations", "inputs")
        ]
        for file in [
            *self.files,
            {"bucket": "inputs", "path": f"{self.other.id}/b.png"},
            {"bucket": "inputs", "path": f"{self.user.id}0/b.png"},
            {"bucket": "inputs", "path": self.user.id},
        ]:
            add = "insert into storage.objects (bucket_id, name) values (%s, %s)"
            db.execute(add, *file.values())


@pytest.fixture
def somebody(db, service, worker):
    return Somebody(db, service, worker)


def pages(service, user, page_size=1000):
    after = None
    while True:
        page = service.export_user(user.id, after, page_size)
        yield page
        after = page["next_after"]
        if after is None:
            return


def joined(parts):
    """The rows of all pages by their table, and the files."""
    tables, files = {}, []
    for part in parts:
        for name, rows in part["tables"].items():
            tables.setdefault(name, []).extend(rows)
        files += part["files"]
    return tables, files


def test_no_table_that_holds_something_of_a_user_is_forgotten(db):
    tables = db.execute(
        "select distinct format('%%s.%%s', relnamespace::regnamespace, relname) as name"
        " from pg_attribute inner join pg_class as c on c.oid = attrelid"
        " where relnamespace in ('public'::regnamespace, 'private'::regnamespace)"
        " and relkind in ('r', 'p') and not relispartition"
        " and (attname = any(%s) or attname like '%%user_id%%')",
        ["generation_id", "job_id"],
    )
    exported = {row["name"] for row in db.execute(EXPORTED)}

    assert {row["name"] for row in tables} == exported | NOT_EXPORTED.keys()
    assert not exported & NOT_EXPORTED.keys()


def test_all_that_is_known_of_a_user_is_told_and_nothing_of_the_operators_or_others(
    db, service, somebody
):
    with unchanged(db):
        (page,) = pages(service, somebody.user)

    tables, user = page["tables"], somebody.user
    for table in db.execute(EXPORTED):
        name = table["name"].split(".")[1]
        holders = tables["generations"] if table["owner"] == "generation_id" else [tables]
        assert any(holder[name] for holder in holders), name
    assert {row["into_id"] for row in tables.pop("merged_users")} == {user.id}
    assert {row["user_id"] for rows in tables.values() for row in rows} == {user.id}
    assert page["entitlement"] == user.get_entitlement()
    assert page["files"] == somebody.files
    done = next(row for row in tables["generations"] if row["id"] == user.done)
    assert (done["prompt"], done["deleted_at"] is None) == (f"a lighthouse of {user.id}", False)
    assert done["images"][0]["storage_path"] == f"{user.id}/{user.done}/0.png"
    assert done["attempts"][0]["provider"] == "preview"
    told = json.dumps(page)
    assert somebody.other.id not in told
    for word in (DETAIL, "token_id", "worker_id", "cost_usd", "provider_job_id", "last_error"):
        assert word not in told, word


@pytest.mark.parametrize("page_size", [1, 2, 3, 7])
def test_in_pages_of_any_size_all_is_told_once(service, somebody, page_size):
    whole = joined(pages(service, somebody.user))
    parts = list(pages(service, somebody.user, page_size))

    assert joined(parts) == whole
    sizes = [len(p["files"]) + sum(map(len, p["tables"].values())) for p in parts]
    assert max(sizes) <= page_size + 1  # a name may be in both buckets


def test_what_is_added_between_pages_moves_nothing(service, somebody):
    tables, _ = joined(pages(service, somebody.user))
    somebody.user.has(credits=100).db.lift_limits()
    parts = []
    for page in pages(service, somebody.user, 3):
        parts.append(page)
        somebody.user.enqueue()

    ids = [row["id"] for row in joined(parts)[0]["generations"]]
    assert all(one < two for one, two in pairwise(ids))
    assert ids[: len(tables["generations"])] == [row["id"] for row in tables["generations"]]


def test_an_app_adds_a_table_of_its_own_by_a_row(db, service, alice, bob):
    db.execute(
        "create table public.profiles (owner_id uuid primary key, name text, secret text);"
        "insert into private.exported_tables values ('public.profiles', 'owner_id', '{secret}')"
    )
    for user in (alice, bob):
        db.execute("insert into public.profiles values (%s, 'a name', 'a secret')", user.id)

    (page,) = pages(service, alice)

    assert page["tables"]["profiles"] == [{"owner_id": alice.id, "name": "a name"}]


def test_of_whom_nothing_is_known_nothing_is_told(db, service, alice):
    db.execute("update private.settings set keep_ledger_of_deleted_users = '1 day'")
    db.execute("delete from auth.users where id = %s", alice.id)

    (page,) = pages(service, alice)
    assert page["entitlement"] is None
    assert {name: len(rows) for name, rows in page["tables"].items()} == {"credit_ledger": 1}

    db.execute("delete from public.credit_ledger")
    with refused("PT404", "not_found"):
        service.export_user(alice.id)


@pytest.mark.parametrize(
    "rest",
    [
        *({"page_size": size} for size in (0, 1001, None)),
        *({"after": after} for after in ([], ["public.models"], ["private.settings", "1"])),
        *({"after": [name, "nope"]} for name in ("public.generations", "public.batches")),
        {"after": ["public.credit_ledger", "", "9" * 30]},
    ],
    ids=str,
)
def test_what_is_no_page_is_refused(service, alice, rest):
    with refused("PT400", "invalid_input"):
        service.export_user(alice.id, **rest)


def test_a_page_costs_what_is_on_it_however_long_the_history(db, service, alice):
    alice.has_history(5000)
    db.execute("vacuum analyze")
    tables, _ = joined(pages(service, alice))
    middle = tables["generations"][2500]["id"], str(tables["credit_ledger"][2500]["id"])

    for after in (
        ["public.generations", middle[0]],
        ["public.credit_ledger", alice.id, middle[1]],
        ["storage.objects", f"{alice.id}/"],
    ):
        with explained(service.connection) as plans:
            service.export_user(alice.id, after, 10)
        assert sum(rows_met(node) for plan in plans for node in nodes(plan)) < 1000, after
