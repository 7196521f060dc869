"""sql/40_credits.sql: grant, charge, refund, and the paid plan."""

import uuid

import pytest
from actors import Refusal, Service, User, outcome, refused, together
from database import assert_books_balance, unchanged

MOST = 1_000_000_000  # credits that anybody may have


def test_a_new_user_gets_the_welcome_credits(db, alice):
    assert alice.ledger() == [("grant", 10)]
    assert alice.credits() == 10


def test_there_may_be_no_welcome_credits(db):
    db.execute("update private.settings set welcome_credits = 0")

    user = User(db)

    assert user.ledger() == []
    assert user.credits() == 0


def test_the_auth_server_creates_users_without_rights_of_its_own(db):
    db.execute("create role darkroom_auth_server")
    try:
        db.execute("grant usage on schema auth to darkroom_auth_server")
        db.execute("grant insert on auth.users to darkroom_auth_server")
        db.execute("set role darkroom_auth_server")
        db.execute("insert into auth.users (id) values (gen_random_uuid())")
    finally:
        db.execute("reset role")
        db.execute("drop owned by darkroom_auth_server; drop role darkroom_auth_server")

    assert db.value("select credits from public.entitlements") == 10


def test_enqueue_refuses_when_credits_run_out(db, alice):
    alice.has(credits=1)
    alice.enqueue("a lighthouse at dusk")

    with unchanged(db), refused("PT402", "insufficient_credits") as refusal:
        alice.enqueue("a second one")

    assert refusal.detail == "need 1, have 0"
    assert alice.credits() == 0


def test_each_image_costs_the_models_price(db, alice):
    db.execute("update public.models set price_credits = 2")

    answer = alice.enqueue(params={"num_outputs": 3})

    assert answer["credits_left"] == 4
    assert alice.ledger() == [("grant", 10), ("charge", -6)]


def test_a_paid_user_pays_the_paid_price(db, alice):
    db.execute("update public.models set price_credits = 5, paid_price_credits = 2")
    alice.has_paid()

    alice.enqueue()

    assert alice.ledger() == [("grant", 10), ("charge", -2)]


def test_a_paid_user_without_credits_uses_what_is_included(db, alice, worker):
    alice.has(credits=0).has_paid()

    alice.enqueue()
    worker.fail_job(worker.claimed(), "moderated")

    assert alice.ledger()[-2:] == [("charge", 0), ("refund", 0)]
    assert_books_balance(db)


@pytest.mark.parametrize("until", ["2020-01-01", None])
def test_a_plan_that_has_ended_is_free(alice, until):
    alice.has_paid("infinity")

    alice.has_paid(until)

    assert alice.get_entitlement()["plan"] == "free"
    assert alice.enqueue()["credits_left"] == 9


def test_set_paid_answers_the_entitlement_and_may_be_repeated(db, service, alice):
    answer = service.set_paid(alice, "2099-01-01T00:00:00Z")

    assert (answer["plan"], answer["user_id"]) == ("paid", alice.id)
    assert answer["paid_until"].startswith("2099-01-01")
    with unchanged(db):
        assert service.set_paid(alice, "2099-01-01T00:00:00Z") == answer


def test_a_grant_is_applied_once_per_external_id(service, alice):
    first = service.grant_credits(alice, 50, "payment-1")
    again = service.grant_credits(alice, 50, "payment-1")

    assert first == {"credits": 60, "applied": True}
    assert again == {"credits": 60, "applied": False}
    assert alice.ledger() == [("grant", 10), ("grant", 50)]


@pytest.mark.parametrize("change", [{"amount": 51}, {"kind": "adjust"}, {"user": "bob"}])
def test_an_external_id_names_one_grant_only(db, service, alice, bob, change):
    grant = {"user": alice, "amount": 50, "external_id": "payment-1", "kind": "grant"}
    service.grant_credits(**grant)

    with unchanged(db), refused("PT409", "idempotency_conflict"):
        service.grant_credits(**grant | change | ({"user": bob} if "user" in change else {}))


def test_a_webhook_that_arrives_many_times_at_once_grants_once(db, alice):
    services = [Service(db) for _ in range(10)]

    answers = together([lambda s=s: s.grant_credits(alice, 50, "payment-1") for s in services])

    assert sorted(answer["applied"] for answer in answers) == [False] * 9 + [True]
    assert {answer["credits"] for answer in answers} == {60}
    assert_books_balance(db)


def test_one_external_id_for_two_users_at_once_is_granted_to_one(db, alice, bob):
    for _ in range(5):
        payment = str(uuid.uuid4())

        answers = together(
            [
                lambda u=user, p=payment: outcome(lambda: Service(db).grant_credits(u, 5, p))
                for user in (alice, bob)
            ]
        )

        codes = [answer.code for answer in answers if isinstance(answer, Refusal)]
        assert codes in (["PT409"], ["23505"])  # a 409 either way
    assert_books_balance(db)


def test_an_adjustment_takes_credits_back(service, alice):
    answer = service.grant_credits(alice, -4, "chargeback-1", kind="adjust")

    assert answer == {"credits": 6, "applied": True}
    assert alice.ledger() == [("grant", 10), ("adjust", -4)]


@pytest.mark.parametrize(
    "grant",
    [
        {"amount": 0},
        {"amount": -1},
        {"amount": None},
        {"kind": "refund"},
        {"kind": None},
        {"external_id": None},
        {"external_id": ""},
        {"external_id": "x" * 201},
        {"kind": "adjust", "amount": 0},
        {"kind": "adjust", "amount": -11},
        {"amount": 2147483647},
    ],
)
def test_a_grant_that_makes_no_sense_is_refused(db, service, alice, grant):
    usual = {"user": alice, "amount": 1, "external_id": "payment-1"}

    with unchanged(db), refused("PT400", "invalid_input"):
        service.grant_credits(**usual | grant)


def test_there_is_nobody_to_grant_to_but_users(db, service):
    nobody = str(uuid.uuid4())

    with unchanged(db):
        with refused("PT404", "not_found"):
            service.grant_credits(nobody, 1, "payment-1")
        with refused("PT404", "not_found"):
            service.set_paid(nobody, "infinity")


def test_giving_back_twice_moves_the_balance_once(db, alice, worker):
    job_id = alice.enqueued()
    worker.fail_job(worker.claimed(), "moderated")

    with unchanged(db):
        db.execute("select private.refund_generation(%s, %s, 1)", alice.id, job_id)


# The dearest wishes.


@pytest.fixture
def dearest(db, alice):
    """Sixteen pictures at the highest price; alice has as much as anybody may."""
    db.lift_limits()
    db.execute("update private.plans set max_batch = 100")
    db.execute(
        "update public.models set max_images = 16, price_credits = 1000000, paid_price_credits = 0,"
        " input_schema = jsonb_set(input_schema, '{properties,num_outputs,maximum}', '16')"
        " where id = 'darkroom/preview'"
    )
    alice.has(credits=MOST)
    return {"params": {"num_outputs": 16}}


def test_the_dearest_wishes_are_charged_settled_and_summed_up(db, alice, worker, dearest):
    for _ in range(3):
        batch = alice.enqueue_batch(["a lighthouse"] * 62, **dearest)
        done, failed, canceled = worker.claim_jobs(3)
        worker.complete_job(done, images=1)
        worker.fail_job(failed, "moderated")
        alice.cancel_batch(batch["batch_id"])
        worker.cancel_job(canceled)

    assert alice.credits() == MOST - 3 * 1_000_000
    charged = db.row(
        "select sum(credits_charged) as credits_charged, sum(credits_refunded) as credits_refunded"
        " from private.costs"
    )
    assert charged == {"credits_charged": 2_976_000_000, "credits_refunded": 2_973_000_000}
    assert_books_balance(db)


def test_a_price_of_before_there_was_a_highest_is_given_back_in_part(db, alice, worker, dearest):
    db.execute(
        "alter table public.models drop constraint if exists models_prices_are_at_most_a_million"
    )
    db.execute("update public.models set price_credits = 62500000")
    alice.enqueue(**dearest)

    worker.complete_job(worker.claimed(), images=1)

    assert alice.credits() == MOST - 62_500_000
    assert_books_balance(db)


def test_no_grant_makes_a_later_refund_too_much(db, alice, service, worker, dearest):
    job_id = alice.enqueued(**dearest)
    with unchanged(db), refused("PT400", "invalid_input") as refusal:
        service.grant_credits(alice, 1, "payment")
    assert "16000000 are in jobs under way" in refusal.detail
    assert service.grant_credits(alice, -1, "taken back", "adjust")["applied"]

    alice.cancel_generation(job_id)

    assert alice.credits() == MOST - 1
    assert service.grant_credits(alice, 1, "payment")["credits"] == MOST
