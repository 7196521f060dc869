"""sql/40_credits.sql: grant, charge, refund, and the paid plan."""

import pytest
from actors import Service, User, refused, together
from database import assert_books_balance, unchanged

MOST = 1_000_000_000  # credits that anybody may have


@pytest.mark.parametrize(("welcome", "ledger"), [(10, [("grant", 10)]), (0, [])])
def test_a_new_user_gets_the_welcome_credits(db, welcome, ledger):
    db.execute("update private.settings set welcome_credits = %s", welcome)

    user = User(db)

    assert user.ledger() == ledger
    assert user.credits() == welcome


def test_each_image_costs_the_price_of_the_users_plan(db, alice, bob):
    db.execute("update public.models set price_credits = 3, paid_price_credits = 2")
    bob.has_paid()

    left = [user.enqueue(params={"num_outputs": 2})["credits_left"] for user in (alice, bob)]

    assert left == [4, 6]
    with unchanged(db), refused("PT402", "insufficient_credits") as refusal:
        alice.enqueue(params={"num_outputs": 2})
    assert refusal.detail == "need 6, have 4"


@pytest.mark.parametrize("until", ["2020-01-01", None])
def test_the_paid_plan_is_given_for_a_time(db, service, alice, until):
    answer = service.set_paid(alice, "2099-01-01T00:00:00Z")
    assert (answer["plan"], answer["user_id"]) == ("paid", alice.id)
    assert answer["paid_until"].startswith("2099-01-01")
    with unchanged(db):
        assert service.set_paid(alice, "2099-01-01T00:00:00Z") == answer

    alice.has_paid(until)

    assert alice.get_entitlement()["plan"] == "free"
    assert alice.enqueue()["credits_left"] == 9


@pytest.mark.parametrize("change", [{"amount": 51}, {"kind": "adjust"}, {"user": "bob"}])
def test_an_external_id_names_one_grant_only(db, service, alice, bob, change):
    grant = {"user": alice, "amount": 50, "external_id": "payment-1", "kind": "grant"}
    assert service.grant_credits(**grant) == {"credits": 60, "debt": 0, "applied": True}

    with unchanged(db):
        assert service.grant_credits(**grant) == {"credits": 60, "debt": 0, "applied": False}
        with refused("PT409", "idempotency_conflict"):
            service.grant_credits(**grant | change | ({"user": bob} if "user" in change else {}))


def test_a_webhook_that_arrives_many_times_at_once_grants_once(db, alice):
    services = [Service(db) for _ in range(10)]

    answers = together([lambda s=s: s.grant_credits(alice, 50, "payment-1") for s in services])

    assert sorted(answer["applied"] for answer in answers) == [False] * 9 + [True]
    assert {answer["credits"] for answer in answers} == {60}
    assert_books_balance(db)


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
        {"kind": "adjust", "amount": -2147483648},
        {"amount": 2147483647},
        {"kind": "adjust", "amount": -1, "expires_at": "2999-01-01"},
        {"expires_at": "-infinity"},
        {"priority": 101},
        {"priority": None},
    ],
)
def test_a_grant_that_makes_no_sense_is_refused(db, service, alice, grant):
    usual = {"user": alice, "amount": 1, "external_id": "payment-1"}

    with unchanged(db), refused("PT400", "invalid_input"):
        service.grant_credits(**usual | grant)


def test_giving_back_twice_moves_the_balance_once(db, alice, worker):
    job_id = alice.enqueued()
    worker.fail_job(worker.claimed(), "moderated")

    with unchanged(db):
        db.execute("select private.refund_generation(%s, %s, 1)", alice.id, job_id)


def test_no_grant_makes_a_later_refund_too_much(db, alice, service):
    alice.has(credits=MOST)
    job_id = alice.enqueued()
    with unchanged(db), refused("PT400", "invalid_input") as refusal:
        service.grant_credits(alice, 1, "payment")
    assert "1 are in jobs under way" in refusal.detail

    alice.cancel_generation(job_id)

    assert alice.credits() == MOST
