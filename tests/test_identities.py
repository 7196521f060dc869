"""sql/42_identities.sql: guests, bans, welcome credits once for each address, and merge_user."""

from __future__ import annotations

import contextlib
import re
import threading
import uuid
from typing import Any

import pytest
from actors import PREVIEW, Service, User, refused, together
from billing import MONTH, NOW, RevenueCat, Stripe, apply
from database import PROJECT, Database, assert_books_balance, unchanged
from psycopg.types.json import Jsonb

MAIL = "alice@example.com"
SECURITY = PROJECT / "docs" / "security.md"


def signed_up(db: Database, **columns: Any) -> User:
    """Sign up as Auth writes it down: a row with these columns."""
    columns = {"id": str(uuid.uuid4())} | columns
    marks = ", ".join(["%s"] * len(columns))
    query = f"insert into auth.users ({', '.join(columns)}) values ({marks})"
    db.connect().execute(query, list(columns.values()))
    return User(db, columns["id"])


def guest(db: Database) -> User:
    return signed_up(db, is_anonymous=True)


def changed(db: Database, user: User, *changes: str) -> None:
    """Have Auth change its row, all in one transaction."""
    connection = db.connect()
    with connection.transaction():
        for change in changes:
            connection.execute(f"update auth.users set {change} where id = %s", [user.id])


def became_permanent(db: Database, user: User, email: str = MAIL) -> None:
    """In the order in which Auth does it: the address comes last."""
    changed(db, user, "is_anonymous = false", f"email = '{email}'", "email_confirmed_at = now()")


def deleted(db: Database, user: User) -> None:
    db.connect().execute("delete from auth.users where id = %s", [user.id])


def guests_begin_with(db: Database, credits: int) -> None:
    db.execute("update private.plans set welcome_credits = %s where name = 'guest'", credits)


# --- guests ---


def test_a_hundred_anonymous_sign_ins_get_no_credits_as_installed(db):
    db.execute(
        "insert into auth.users (id, is_anonymous)"
        " select gen_random_uuid(), true from generate_series(1, 100)"
    )

    query = "select count(*) as guests, sum(credits) as credits from public.entitlements"
    assert db.row(query) == {"guests": 100, "credits": 0}
    user = User(db, str(db.value("select id from auth.users limit 1")))
    assert user.get_entitlement()["plan"] == "guest"
    with refused("PT402", "insufficient_credits"):
        user.enqueue()


def test_guests_have_limits_of_their_own(db):
    guests_begin_with(db, 5)
    user = guest(db)
    user.enqueue()

    with refused("PT429", "too_many_active") as refusal:
        user.enqueue()

    assert user.credits() == 4
    assert refusal.detail.startswith("1 jobs")
    assert User(db).get_entitlement()["max_active"] > 1


def test_a_guest_who_pays_is_a_paid_user(db):
    assert guest(db).has_paid().get_entitlement()["plan"] == "paid"


@pytest.mark.parametrize(("as_guest", "then"), [(0, [10]), (3, [3, 7]), (12, [12])])
def test_who_becomes_permanent_gets_plan_and_welcome_once(db, as_guest, then):
    guests_begin_with(db, as_guest)
    user = guest(db)

    became_permanent(db, user)
    with unchanged(db):
        became_permanent(db, user)
        changed(db, user, "last_sign_in_at = now()")

    assert user.get_entitlement()["plan"] == "free"
    assert user.ledger() == [("grant", amount) for amount in then]
    assert_books_balance(db)


# --- welcome credits, once for each address ---

SAME = [
    ({"email": MAIL}, {"email": MAIL}),
    ({"email": MAIL}, {"email": " Alice+2@EXAMPLE.com"}),
    ({"email": "a.li.ce+x@gmail.com"}, {"email": "alice@googlemail.com"}),
    ({"phone": "4915112345678"}, {"phone": "+49 151 12345678"}),
    ({"email": MAIL}, {"email": MAIL, "phone": "4915112345678"}),
    ({"email": "+1@example.com"}, {"email": "+1@EXAMPLE.com"}),
]
OTHERS = [
    ({"email": MAIL}, {"email": "alice@example.org"}),
    ({"email": "a.b@example.com"}, {"email": "ab@example.com"}),
    ({"email": "+1@example.com"}, {"email": "+2@example.com"}),
    ({"email": "1@example.com"}, {"phone": "1"}),
    ({}, {}),
    ({"email": "", "phone": ""}, {"email": None}),
]


@pytest.mark.parametrize(
    ("first", "second", "welcome"),
    [(*pair, 0) for pair in SAME] + [(*pair, 10) for pair in OTHERS],
)
def test_an_address_is_welcomed_once_though_its_account_is_gone(db, first, second, welcome):
    before = signed_up(db, **first)
    assert before.credits() == 10
    deleted(db, before)

    assert signed_up(db, **second).credits() == welcome
    assert_books_balance(db)


def test_a_guest_is_not_welcomed_with_an_address_that_was(db):
    deleted(db, signed_up(db, email=MAIL))
    user = guest(db)

    became_permanent(db, user)

    assert user.get_entitlement()["plan"] == "free"
    assert user.ledger() == []


def test_of_many_who_sign_up_at_once_with_one_mailbox_one_is_welcomed(db):
    together([lambda n=n: signed_up(db, email=f"alice+{n}@example.com") for n in range(8)])

    assert db.value("select sum(credits) from public.entitlements") == 10
    assert_books_balance(db)


def test_an_address_that_got_nothing_is_not_known(db):
    db.execute("update private.settings set welcome_credits = 0")
    deleted(db, signed_up(db, email=MAIL))
    db.execute("update private.settings set welcome_credits = 10")

    assert signed_up(db, email=MAIL).credits() == 10


def test_who_is_here_already_gets_no_welcome_later(db):
    db.execute("update private.settings set welcome_credits = 0")
    user = signed_up(db, email=MAIL)
    db.execute("update private.settings set welcome_credits = 10")

    changed(db, user, "last_sign_in_at = now()", "banned_until = now() + interval '1 day'")
    changed(db, user, "banned_until = null")

    assert user.credits() == 0


def test_where_each_account_is_welcomed_no_address_is_kept(db):
    db.execute("update private.settings set welcome_once_per_identity = false")

    users = [signed_up(db, email=mail) for mail in (MAIL, "alice+2@example.com")]

    assert [user.credits() for user in users] == [10, 10]
    assert db.value("select count(*) from private.welcomed_identities") == 0


def test_what_is_kept_of_an_address_needs_the_key_and_ends(db, worker):
    deleted(db, signed_up(db, email=MAIL))
    kept = db.value("select identity from private.welcomed_identities")
    known = "select (private.identities_of(%s))[1]"
    query = "select count(*) from private.welcomed_identities"
    worker.apply_retention()

    assert len(kept) == 32
    assert db.value(query) == 1
    assert db.value(known, Jsonb({"email": MAIL})) == kept
    db.execute("update private.settings set identity_key = 'x'")
    assert db.value(known, Jsonb({"email": MAIL})) != kept
    db.pass_time("731 days")
    worker.apply_retention()
    assert db.value(query) == 0


def test_an_address_is_forgotten_as_the_document_says(db):
    (command,) = re.findall(r"(?ms)^```sql\n(.*?)^```$", SECURITY.read_text())
    for address in ("Somebody+x@example.com", MAIL):
        deleted(db, signed_up(db, email=address))

    db.execute(command)

    users = [signed_up(db, email=address) for address in ("somebody@example.com", MAIL)]
    assert [user.credits() for user in users] == [10, 0]


# --- banned and softly deleted users ---

BAN = "banned_until = now() + interval '1 hour'"
SOFT_DELETION = "email = 'S0m3Ha5h', phone = 'S0m3Ha5h', deleted_at = now()"
AGAIN = {
    "enqueue": lambda user, _: user.enqueue(),
    "enqueue_batch": lambda user, _: user.enqueue_batch(["a cat"]),
    "retry_generation": lambda user, job_id: user.retry_generation(job_id),
}


@pytest.mark.parametrize("change", [BAN, "banned_until = 'infinity'", SOFT_DELETION])
@pytest.mark.parametrize("way", AGAIN)
def test_a_blocked_user_asks_for_nothing_new(db, service, worker, way, change):
    user = signed_up(db, email=MAIL)
    job_id = user.enqueued()
    worker.fail_job(worker.claimed(), "moderated")

    changed(db, user, change)

    with unchanged(db), refused("PT403", "account_blocked"):
        AGAIN[way](user, job_id)
    assert service.redrive("moderated") == {"redriven": 0, "skipped": {"account_blocked": 1}}
    changed(db, user, "banned_until = null, deleted_at = null")
    AGAIN[way](user, job_id)


def test_a_ban_ends_by_itself(db):
    user = signed_up(db, email=MAIL)
    changed(db, user, BAN)
    db.pass_time("2 hours")

    user.enqueue()


@pytest.mark.parametrize("change", [BAN, SOFT_DELETION])
def test_what_a_blocked_user_has_queued_is_given_back_and_what_runs_ends(db, worker, change):
    user = signed_up(db, email=MAIL)
    running, queued = user.enqueued(), user.enqueued()
    job = worker.claimed()
    assert job.id == running

    changed(db, user, change)

    assert user.get_job_status(queued)["status"] == "canceled"
    worker.complete_job(job)
    assert user.get_job_status(running)["status"] == "completed"
    assert user.credits() == 9
    assert db.value("select count(*) from public.images") == 1, "nothing is erased yet"
    assert_books_balance(db)


def test_what_is_asked_for_at_the_moment_of_a_ban_is_given_back(db):
    user = signed_up(db, email=MAIL)
    banning = db.connect()
    with user.acting() as asking:
        asking.execute("select public.enqueue_generation(%s, 'a cat')", [PREVIEW])
        thread = threading.Thread(
            target=banning.execute, args=[f"update auth.users set {BAN} where id = %s", [user.id]]
        )
        thread.start()
        db.wait_for_lock(banning)
    thread.join()

    assert db.value("select count(*) from private.ready_jobs") == 0
    assert user.credits() == 10
    assert_books_balance(db)


# --- Auth's table is not ours ---


def test_no_sign_up_fails_because_of_us_and_it_is_made_good(db, worker):
    broken = "alter table public.credit_ledger add constraint broken check (amount <> 10) not valid"
    db.execute(broken)

    user = signed_up(db, email=MAIL)
    banned = guest(db)
    db.execute(
        "alter table public.entitlements add constraint broken check (not is_guest) not valid"
    )
    changed(db, banned, BAN)

    with refused("PT401", "not_authenticated"):
        user.get_entitlement()
    skipped = db.execute("select step, key from private.skipped_rows order by key")
    wanted = sorted([user.id, banned.id])
    assert skipped == [{"step": "follow_user", "key": key} for key in wanted]
    db.execute("alter table public.credit_ledger drop constraint broken")
    db.execute("alter table public.entitlements drop constraint broken")
    worker.apply_retention()
    assert user.credits() == 10
    assert banned.get_entitlement()["blocked_until"]
    assert db.value("select count(*) from private.skipped_rows") == 0


def test_who_lives_in_another_database_is_not_made_here(db):
    db.execute(
        "create or replace function private.follow_elsewhere(p_user_id uuid) returns boolean"
        " language sql return true"
    )

    user_id = db.value("insert into auth.users (id) values (gen_random_uuid()) returning id")

    assert db.execute("select from public.entitlements where user_id = %s", user_id) == []


def test_auth_may_be_older_and_may_alter_its_columns(db):
    for column in ("is_anonymous", "banned_until", "deleted_at"):
        db.execute(f"alter table auth.users drop column {column} cascade")
    db.execute("alter table auth.users alter column email type text")

    user = signed_up(db, email=MAIL)
    changed(db, user, "email = 'other@example.com'")

    assert (user.get_entitlement()["plan"], user.credits()) == ("free", 10)


@pytest.mark.parametrize("passed", ["0", "9 years", "11 years"])
@pytest.mark.parametrize("keep", ["0", "10 years"])
def test_a_user_made_again_under_the_same_id_begins_anew(db, service, worker, keep, passed):
    db.execute("update private.settings set keep_ledger_of_deleted_users = %s", keep)
    user = User(db)
    service.grant_credits(user, 5, "payment-1")
    db.pass_time(passed)
    service.grant_credits(user, 7, "payment-2")
    service.grant_credits(user, -30, "chargeback", "adjust")
    deleted(db, user)
    db.pass_time(passed)
    worker.apply_retention()

    signed_up(db, id=user.id)

    # While the books tell of a welcome there is no other.
    assert user.credits() == (0 if keep != "0" and passed == "0" else 10)
    service.grant_credits(user, 3, "payment-3")
    assert user.enqueue()["credits_left"] == user.credits()
    assert_books_balance(db)


# --- a guest becomes part of another user ---


def with_credits(db: Database, credits: int = 10) -> User:
    """Sign a guest in who has credits of his own."""
    return guest(db).has(credits=credits)


def rows_that_mention(db: Database, text: str) -> set[str]:
    return {name for name, rows in db.snapshot().items() for row in rows if text in row}


def reads(user: User, bucket: str) -> set[str]:
    user.db.execute("grant usage on schema storage to authenticated")
    user.db.execute("grant all on storage.objects to authenticated")
    query = "select name from storage.objects where bucket_id = %s"
    return {row["name"] for row in user.query(query, bucket)}


def stored(db: Database, bucket: str, path: str) -> str:
    db.execute("insert into storage.objects (bucket_id, name) values (%s, %s)", bucket, path)
    return path


TOKEN = "ExponentPushToken[of-the-phone]"
PRODUCT = """
insert into public.credit_products (provider, product_id, credits, makes_paid)
values ('stripe', 'price_monthly', 20, true), ('revenuecat', 'monthly', 20, true)
"""
# Every table that says whose a row is. Whoever adds one decides what merge_user does with it, and
# the test below gives it a row.
MOVED = {
    "public.batches",
    "public.generation_tags",
    "public.generations",
    "public.image_likes",
    "public.images",
    "public.prompt_templates",
    "private.billing_customers",
    "private.billing_events",
    "private.billing_purchases",
    "private.billing_subscriptions",
    "private.credit_buckets",
    "private.deliveries",
    "private.push_tokens",
}
STAYS = {
    "public.credit_ledger": "append-only: what is moved is booked, of both",
    "public.entitlements": "the guest's own, empty and blocked",
    "private.budgets": "of whom an operator made it for",
    "private.expired_files": "whose folder it is in",
    "private.merged_users": "who was merged",
    "private.ready_jobs": "nothing is live",
    "private.running_jobs": "nothing is live",
}


def test_of_each_table_with_a_user_it_is_said_what_a_merge_does(db):
    rows = db.execute(
        "select format('%s.%s', c.relnamespace::regnamespace, c.relname) as name"
        " from pg_class as c inner join pg_attribute as a on a.attrelid = c.oid"
        " where c.relnamespace in ('public'::regnamespace, 'private'::regnamespace)"
        " and c.relkind in ('r', 'p') and not c.relispartition"
        " and a.attname = 'user_id' and not a.attisdropped"
    )

    assert {row["name"] for row in rows} == MOVED | set(STAYS)


def test_what_is_bought_for_one_who_was_merged_is_the_others(db, alice, service):
    visitor = with_credits(db)
    service.merge_user(visitor.id, alice.id)
    db.execute(PRODUCT)

    answer = service.apply_billing_event("stripe", Stripe(visitor).paid(NOW))

    assert (answer["user_id"], answer["credits"]) == (alice.id, 20)
    assert alice.get_entitlement()["plan"] == "paid"


def test_what_is_said_of_a_merged_guest_is_said_of_the_other(db, alice, service):
    visitor = guest(db).has_paid("2099-01-01")
    service.merge_user(visitor.id, alice.id)
    deleted(db, visitor)
    assert alice.get_entitlement()["plan"] == "paid"

    assert service.set_paid(alice, None)["plan"] == "free"
    answer = service.set_paid(visitor, "2099-01-01")

    assert (answer["user_id"], answer["plan"]) == (alice.id, "paid")


def test_what_is_paid_for_while_being_merged_is_the_others(db, alice, service):
    db.execute(PRODUCT)
    visitor, other = guest(db), Service(db)
    paid = Stripe(visitor).paid(NOW)
    answers: list[dict[str, Any]] = []
    thread = threading.Thread(
        target=lambda: answers.append(other.apply_billing_event("stripe", paid))
    )
    with service.acting() as merging:
        merging.execute("select public.merge_user(%s, %s)", [visitor.id, alice.id])
        thread.start()
        db.wait_for_lock(other.connection)
    thread.join()

    assert [(told["outcome"], told["user_id"]) for told in answers] == [("applied", alice.id)]
    assert (alice.credits(), visitor.credits()) == (30, 0)
    assert_books_balance(db)


def test_what_a_guest_bought_is_renewed_and_taken_back_after_the_merge_as_before(
    db, alice, service
):
    visitor = with_credits(db)
    db.execute(PRODUCT)
    store = RevenueCat(visitor)
    sale, renewal = store.renewed(NOW), store.renewed(NOW + MONTH)
    apply(service, store, sale)
    service.merge_user(visitor.id, alice.id)
    before = alice.credits()

    apply(service, store, renewal)
    assert alice.credits() == before + 20
    apply(service, store, store.refunded(sale))
    assert alice.credits() == before
    apply(service, store, sale, renewal)

    assert (alice.credits(), visitor.credits()) == (before, 0)
    assert_books_balance(db)


def test_a_merge_moves_all_there_is_once(db, alice, bob, service, worker):
    visitor = with_credits(db)
    service.register_webhook(url="https://api.example.com/hooks")
    visitor.register_push_token(TOKEN)
    shared = bob.enqueued()
    worker.complete_job(worker.claimed())
    bob.share_image(shared)
    for user in (visitor, alice):
        user.like_image(shared)
    batch = visitor.enqueue_batch(["a cat"], idempotency_key="the same")
    worker.complete_job(worker.claimed())
    alice.enqueue_batch(["a dog"], idempotency_key="the same")
    worker.complete_job(worker.claimed())
    mine = visitor.enqueued(idempotency_key="k")
    job = worker.claimed()
    preview = f"{visitor.id}/{mine}/0.preview.webp"
    worker.complete_job(job, images=[job.image(preview_path=preview)])
    visitor.set_tags(mine, "beach")
    visitor.set_favorite(mine)
    visitor.save_prompt_template("t", "a {thing}")
    visitor.has_paid("2099-01-01")
    db.execute(PRODUCT)
    service.apply_billing_event("stripe", Stripe(visitor).paid(NOW))
    service.call("public.grant_credits", visitor.id, 5, "grant", "pack", "2999-01-01")
    before = alice.credits()

    answer = service.merge_user(visitor.id, alice.id)

    assert answer == {
        "user_id": alice.id,
        "generations": 2,
        "credits": before + 33,
        "applied": True,
    }
    assert rows_that_mention(db, visitor.id) == {
        "public.credit_ledger",
        "public.entitlements",
        "public.images",
        "private.billing_events",
        "private.merged_users",
    }
    assert alice.get_job_status(mine)["tags"] == ["beach"]
    assert alice.get_batch_status(batch["batch_id"])["completed"] == 1
    assert alice.list_generations(tag="beach")["generations"][0]["job_id"] == mine
    assert alice.get_entitlement()["plan"] == "paid"
    assert alice.enqueue_batch(["a dog"], idempotency_key="the same")["completed"] == 1
    assert alice.enqueue(idempotency_key="k")["job_id"] == mine
    assert visitor.get_entitlement()["credits"] == 0
    with refused("PT403", "account_blocked"):
        visitor.enqueue()
    assert_books_balance(db)
    again = answer | {"generations": 0, "applied": False}
    with unchanged(db):
        assert service.merge_user(visitor.id, alice.id) == again
    became_permanent(db, visitor)
    assert visitor.get_entitlement()["blocked_until"] == "infinity"
    assert visitor.credits() == 0
    deleted(db, visitor)
    worker.apply_retention()
    with unchanged(db):
        assert service.merge_user(visitor.id, alice.id) == again
    assert_books_balance(db)
    deleted(db, alice)
    assert rows_that_mention(db, visitor.id) == {"private.expired_files"}


@pytest.mark.parametrize(
    ("has", "debt", "left"), [(20, 5, (15, 0)), (3, 5, (0, 2)), (0, 0, (0, 0))]
)
def test_a_debt_is_merged_too(alice, service, has, debt, left):
    alice.has(credits=has)
    visitor = guest(alice.db)
    if debt:
        service.grant_credits(visitor, -debt, "chargeback", "adjust")

    service.merge_user(visitor.id, alice.id)

    entitlement = alice.get_entitlement()
    assert (entitlement["credits"], entitlement["debt"]) == left
    assert visitor.get_entitlement()["debt"] == 0
    assert_books_balance(alice.db)


def test_credits_keep_their_end_and_what_has_ended_is_not_moved(db, alice, service):
    visitor = guest(db)
    ends = {"ended": "2099-01-01", "ends": "2099-06-01"}
    for name, end in ends.items():
        service.call("public.grant_credits", visitor.id, 5, "grant", name, end)
    service.grant_credits(visitor, 7, "for ever")
    db.execute("update private.credit_buckets set expires_at = now() where external_id = 'ended'")
    db.execute(
        "update public.entitlements set credits_end_at = now() where user_id = %s", visitor.id
    )
    before = alice.credits()

    assert service.merge_user(visitor.id, alice.id)["credits"] == before + 12

    (ending,) = alice.get_entitlement()["credits_ending"]
    assert (ending["credits"], ending["expires_at"][:10]) == (5, "2099-06-01")
    assert_books_balance(db)


def test_what_comes_late_for_a_merged_guest_goes_to_the_other(db, alice, service):
    visitor = guest(db)
    service.grant_credits(visitor, 5, "payment-1")
    service.merge_user(visitor.id, alice.id)
    deleted(db, visitor)
    before = alice.credits()

    assert service.grant_credits(visitor, 5, "payment-1")["applied"] is False
    assert service.grant_credits(visitor, 7, "payment-2")["applied"] is True

    assert alice.credits() == before + 7
    assert_books_balance(db)


@pytest.mark.parametrize(
    ("who", "into", "refusal"),
    [
        ("visitor", "visitor", ("PT400", "invalid_input")),
        (None, "alice", ("PT400", "invalid_input")),
        ("bob", "alice", ("PT400", "invalid_input")),
        ("visitor", "merged", ("PT400", "invalid_input")),
        ("nobody", "alice", ("PT404", "not_found")),
        ("visitor", "nobody", ("PT404", "not_found")),
        ("busy", "alice", ("PT409", "not_finished")),
        ("merged", "alice", ("PT409", "idempotency_conflict")),
    ],
)
def test_a_merge_that_makes_no_sense_changes_nothing(service, who, into, refusal):
    db = service.db
    users = {name: User(db) for name in ("alice", "bob")}
    users |= {name: with_credits(db) for name in ("visitor", "busy", "merged")}
    users["busy"].enqueue()
    service.merge_user(users["merged"].id, users["bob"].id)
    ids = {name: user.id for name, user in users.items()}
    ids |= {"nobody": str(uuid.uuid4()), None: None}

    with unchanged(db), refused(*refusal):
        service.merge_user(ids[who], ids[into])


def test_a_permanent_user_is_merged_when_that_is_said_with_who_was_merged_before(
    db, alice, bob, service
):
    visitor = with_credits(db, 4)
    service.merge_user(visitor.id, bob.id)

    answer = service.merge_user(bob.id, alice.id, allow_permanent=True)

    assert answer["credits"] == 24
    deleted(db, bob)
    for into in (bob, alice):
        again = service.merge_user(visitor.id, into.id)
        assert again == answer | {"generations": 0, "applied": False}
    assert_books_balance(db)


def test_of_two_merges_at_once_one_is_applied(db, alice, bob):
    visitor = with_credits(db, 4)
    services = [Service(db) for _ in range(6)]
    calls = [lambda s=s: s.merge_user(visitor.id, alice.id)["applied"] for s in services]

    assert sorted(together(calls)) == [False] * 5 + [True]

    assert (alice.credits(), visitor.credits()) == (14, 0)
    assert_books_balance(db)


def test_who_waits_to_ask_while_being_merged_is_refused(db, alice, service):
    visitor = with_credits(db)
    outcomes: list[object] = []

    def ask() -> None:
        with refused("PT403", "account_blocked"):
            visitor.enqueue()
        outcomes.append("refused")

    with service.acting() as merging:
        merging.execute("select public.merge_user(%s, %s)", [visitor.id, alice.id])
        thread = threading.Thread(target=ask)
        thread.start()
        db.wait_for_lock(visitor.connection)
    thread.join()

    assert outcomes == ["refused"]
    assert_books_balance(db)


def merged_with_files(
    db: Database, alice: User, service: Service, worker: Any
) -> tuple[User, dict[str, str]]:
    """Have a guest with an output and a source be merged into alice; return the paths."""
    visitor = with_credits(db)
    visitor.enqueue()
    job = worker.claimed()
    worker.complete_job(job)
    files = {
        "generations": stored(db, "generations", f"{visitor.id}/{job.id}/0.png"),
        "inputs": stored(db, "inputs", f"{visitor.id}/cat.png"),
    }
    service.merge_user(visitor.id, alice.id)
    return visitor, files


def expired(db: Database) -> set[tuple[str, str]]:
    rows = db.execute("select bucket, path from private.expired_files")
    return {(row["bucket"], row["path"]) for row in rows}


def test_files_stay_where_they_are_and_are_the_others(db, alice, bob, service, worker):
    visitor, files = merged_with_files(db, alice, service, worker)

    for bucket, path in files.items():
        assert path in reads(alice, bucket)
        assert reads(bob, bucket) == reads(visitor, bucket) == set()
    image = alice.list_generations()["generations"][0]["images"][0]
    assert image["path"] == files["generations"]
    # As a source, too.
    db.execute("update public.models set is_active = true")
    for source in (files["inputs"], f"generations/{files['generations']}"):
        for user in (alice.has(100), bob.has(100), visitor):
            with contextlib.nullcontext() if user is alice else refused("PT400", "invalid_input"):
                user.enqueue(model="black-forest-labs/flux-dev", params={"image": source})
    # And hers to delete.
    with bob.acting() as connection:
        connection.execute("delete from storage.objects")
    assert reads(alice, "inputs") == {files["inputs"]}
    with alice.acting() as connection:
        connection.execute("delete from storage.objects where bucket_id = 'inputs'")
    assert reads(alice, "inputs") == set()


def test_deleting_the_merged_guest_erases_nothing_that_was_moved(db, alice, service, worker):
    visitor, files = merged_with_files(db, alice, service, worker)

    deleted(db, visitor)
    db.pass_time("2 days")
    worker.apply_retention()

    assert expired(db) == set()
    assert alice.list_generations()["generations"]
    assert files["generations"] in reads(alice, "generations")


def test_deleting_the_other_erases_the_files_of_both(db, alice, service, worker):
    _, files = merged_with_files(db, alice, service, worker)
    own = stored(db, "inputs", f"{alice.id}/dog.png")

    deleted(db, alice)

    assert expired(db) == {*files.items(), ("inputs", own)}
    assert rows_that_mention(db, alice.id) == {"private.expired_files"}
    assert set(worker.list_expired_files()) == expired(db)


def test_what_was_merged_is_deleted_and_kept_like_ones_own(db, alice, service, worker):
    db.execute("update private.settings set keep_deleted = '0', keep_inputs = '30 days'")
    visitor, files = merged_with_files(db, alice, service, worker)
    deleted(db, visitor)

    alice.delete_generation(alice.list_generations()["generations"][0]["job_id"])
    db.execute("update storage.objects set updated_at = updated_at - interval '2 days'")
    worker.apply_retention()
    assert expired(db) == {("generations", files["generations"])}
    db.execute("update storage.objects set updated_at = updated_at - interval '31 days'")
    worker.apply_retention()

    assert expired(db) == set(files.items())
