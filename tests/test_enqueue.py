"""sql/50_enqueue.sql: the one way in. Accepted as a whole or not at all, once per key, in turn."""

import statistics
import time
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
from actors import PREVIEW, Refusal, Worker, outcome, refused, together
from database import assert_books_balance, unchanged

WARM_UP, MEASURED = 200, 1000


def test_an_accepted_request_is_charged_recorded_and_ready(db, alice):
    answer = alice.enqueue("a lighthouse", params={"seed": 7}, idempotency_key="k")

    assert answer | {"job_id": None} == {
        "job_id": None,
        "status": "queued",
        "reused": False,
        "credits_left": 9,
        "queue_position": None,
        "eta_seconds": None,
        "poll_after_ms": 1000,
    }
    generation = db.row("select * from public.generations where id = %s", answer["job_id"])
    assert str(generation["user_id"]) == alice.id
    assert (generation["prompt"], generation["input"]) == ("a lighthouse", {"seed": 7})
    assert (generation["status"], generation["price_credits"]) == ("queued", 1)
    assert_books_balance(db)


def test_what_is_rolled_back_leaves_nothing(db, alice):
    with unchanged(db), alice.connection.transaction(force_rollback=True):
        alice.enqueue()


def test_exactly_as_many_are_accepted_as_there_are_credits(db, alice):
    db.lift_limits()
    alice.has(credits=100)
    devices = [alice.on_another_device() for _ in range(40)]

    outcomes = together([lambda d=d: [outcome(d.enqueue) for _ in range(5)] for d in devices])

    refusals = [each for five in outcomes for each in five if isinstance(each, Refusal)]
    assert {(each.code, each.token) for each in refusals} == {("PT402", "insufficient_credits")}
    assert len(refusals) == 100
    assert db.value("select count(*) from private.ready_jobs") == 100
    assert alice.credits() == 0
    assert_books_balance(db)


def test_limits_hold_against_requests_at_the_same_moment(db, alice):
    devices = [alice.on_another_device() for _ in range(12)]

    outcomes = together([lambda d=d: outcome(d.enqueue) for d in devices])

    refusals = [each.token for each in outcomes if isinstance(each, Refusal)]
    assert refusals == ["too_many_active"] * 9
    assert_books_balance(db)


@pytest.mark.parametrize("commits", [True, False])
def test_the_last_credit_waits_for_whoever_takes_it_first(db, alice, commits):
    alice.has(credits=1)
    second = alice.on_another_device()

    with ThreadPoolExecutor(1) as pool:
        with alice.connection.transaction(force_rollback=not commits):
            alice.enqueue()
            answer = pool.submit(outcome, second.enqueue)
            db.wait_for_lock(second.connection)

        if commits:
            assert answer.result().token == "insufficient_credits"
        else:
            assert answer.result()["credits_left"] == 0
    assert_books_balance(db)


def test_the_same_key_and_payload_answer_the_same_and_charge_nothing(db, alice):
    first = alice.enqueue("a lighthouse", params={"seed": 7}, idempotency_key="k")

    with unchanged(db):
        assert alice.enqueue("a lighthouse", params={"seed": 7}, idempotency_key="k") == first


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "another"},
        {"params": {"seed": 8}},
        {"params": {}},
        {"model": "black-forest-labs/flux-dev"},
    ],
)
def test_the_same_key_with_another_payload_is_a_conflict(db, alice, change):
    request = {"prompt": "a lighthouse", "params": {"seed": 7}, "idempotency_key": "k"}
    alice.enqueue(**request)

    with unchanged(db), refused("PT409", "idempotency_conflict"):
        alice.enqueue(**request | change)


def test_the_same_key_from_fifty_connections_is_one_job_and_one_charge(db, alice):
    devices = [alice.on_another_device() for _ in range(50)]

    answers = together([lambda d=d: d.enqueue(idempotency_key="k") for d in devices])

    assert all(answer == answers[0] for answer in answers)
    assert alice.ledger() == [("grant", 10), ("charge", -1)]
    assert db.value("select count(*) from public.generations") == 1
    assert_books_balance(db)


def test_a_repeat_is_answered_whatever_the_limits_say_by_now(db, alice):
    alice.has(credits=1)
    first = alice.enqueue(idempotency_key="k")
    db.execute("update private.plans set max_per_minute = 1, max_active = 1")
    db.execute("update public.models set is_active = false")

    assert alice.enqueue(idempotency_key="k") == first


def test_a_repeat_tells_what_has_become_of_the_job(alice, worker):
    first = alice.enqueue(idempotency_key="k")
    worker.complete_job(worker.claimed())

    again = alice.enqueue(idempotency_key="k")

    assert again["job_id"] == first["job_id"]
    assert (again["status"], again["queue_position"], again["poll_after_ms"]) == (
        "completed",
        None,
        None,
    )


def test_the_key_of_a_deleted_job_is_not_found_until_it_is_restored_or_erased(db, alice, worker):
    job_id = alice.enqueued(idempotency_key="k")
    worker.complete_job(worker.claimed())
    alice.delete_generation(job_id)

    with unchanged(db), refused("PT404", "not_found") as refusal:
        alice.enqueue(idempotency_key="k")
    assert refusal.detail == "idempotency_key: its job was deleted"
    with unchanged(db), refused("PT409", "idempotency_conflict"):
        alice.enqueue("another", idempotency_key="k")

    alice.restore_generation(job_id)
    assert alice.enqueued(idempotency_key="k") == job_id

    alice.delete_generation(job_id)
    db.execute("delete from public.generations where id = %s", job_id)
    assert alice.enqueued(idempotency_key="k") != job_id


def test_keys_of_different_users_have_nothing_to_do_with_each_other(alice, bob):
    assert alice.enqueued(idempotency_key="k") != bob.enqueued(idempotency_key="k")


def test_the_schemas_default_says_how_many_images_are_charged_where_params_do_not(db, alice):
    db.execute(
        "update public.models set input_schema ="
        " jsonb_set(input_schema, '{properties,num_outputs,default}', '3')"
    )

    alice.enqueue()

    assert db.value("select provider_input ->> 'num_outputs' from public.generations") == "3"
    assert alice.ledger() == [("grant", 10), ("charge", -3)]


# Fairness: order of the queue.


def claim_all(worker: Worker) -> list[str]:
    """Claim one job after the other; return whose they were."""
    owners = []
    while jobs := worker.claim_jobs(1):
        owners.append(str(jobs[0].user_id))
    return owners


def test_a_users_many_jobs_delay_anothers_first_by_one_slot_at_most(db, alice, bob, worker):
    db.lift_limits()
    alice.has(credits=100)
    for _ in range(30):
        alice.enqueue()
    worker.claim_jobs(5)

    bob.enqueue()

    assert bob.id in claim_all(worker)[:2]


def test_users_with_the_same_weight_take_turns(db, alice, bob, worker):
    for user in (alice, bob):
        for _ in range(3):
            user.enqueue()

    owners = claim_all(worker)

    assert all(set(owners[at : at + 2]) == {alice.id, bob.id} for at in (0, 2, 4))


def test_a_paid_user_gets_four_times_the_share_of_a_free_one(db, alice, bob, worker):
    db.lift_limits()
    alice.has(credits=30)
    bob.has_paid()
    for user in (alice, bob):
        for _ in range(30):
            user.enqueue()

    served = Counter(claim_all(worker)[:25])

    assert served == {bob.id: 20, alice.id: 5}


def test_a_costly_job_takes_as_many_turns_as_it_costs(db, alice, bob, worker):
    db.lift_limits()
    for _ in range(2):
        alice.enqueue(params={"num_outputs": 4})
    for _ in range(8):
        bob.enqueue()

    assert [owner == alice.id for owner in claim_all(worker)].index(True) in (3, 4)


def test_nobody_starves_while_a_paid_user_keeps_the_queue_full(db, alice, bob, worker):
    db.lift_limits()
    bob.has_paid()
    for _ in range(10):
        bob.enqueue()
    alice.enqueue()

    turns = 0
    while str(worker.claimed().user_id) != alice.id:
        bob.enqueue()
        turns += 1

    assert turns <= 5


@pytest.mark.parametrize("is_free_for_all", [True, False])
def test_jobs_that_cost_nothing_do_not_pass_everybody(db, alice, bob, worker, is_free_for_all):
    db.lift_limits()
    bob.has_paid()
    if is_free_for_all:
        db.execute("update public.models set price_credits = 0")
    for _ in range(20):
        bob.enqueue()

    alice.enqueue()

    assert claim_all(worker).index(alice.id) <= 4


def test_what_was_served_before_gives_nobody_a_head_start(db, alice, bob, worker):
    db.lift_limits()
    alice.has(credits=50)
    for _ in range(20):
        alice.enqueue()
    worker.claim_jobs(20)
    for _ in range(5):
        alice.enqueue()
        bob.enqueue()

    owners = claim_all(worker)

    assert all(set(owners[at : at + 2]) == {alice.id, bob.id} for at in range(0, 10, 2))


# Wake-up: NOTIFY only where somebody sleeps.


def test_a_sleeping_worker_is_woken_on_its_own_channel_with_nothing_to_read(alice, worker):
    worker.listening().sleep()

    alice.enqueue()

    assert worker.channel == f"darkroom_worker_{worker.id}"
    assert worker.wake_ups() == [""]


def test_a_worker_that_is_awake_is_not_notified(alice, worker):
    worker.listening()

    alice.enqueue()

    assert worker.wake_ups() == []


def test_a_woken_worker_is_not_notified_again_before_it_sleeps_again(alice, worker):
    worker.listening().sleep()
    alice.enqueue()
    alice.enqueue()
    assert worker.wake_ups() == [""]

    worker.sleep()
    alice.enqueue()

    assert worker.wake_ups() == [""]


def test_each_job_wakes_one_of_many_sleepers(db, alice):
    workers = [Worker(db).listening() for _ in range(4)]
    for worker in workers:
        worker.sleep()

    alice.enqueue()
    alice.enqueue()

    assert sorted(worker.wake_ups() for worker in workers) == [[], [], [""], [""]]


def test_a_batch_wakes_as_many_sleepers_as_it_has_jobs(db, alice):
    workers = [Worker(db).listening() for _ in range(4)]
    for worker in workers:
        worker.sleep()

    alice.enqueue_batch(["one", "two", "three"])

    assert sorted(worker.wake_ups() for worker in workers) == [[], [""], [""], [""]]


def test_what_is_rolled_back_or_refused_wakes_nobody(alice, worker):
    worker.listening().sleep()

    with alice.connection.transaction(force_rollback=True):
        alice.enqueue()
    with refused("PT400"):
        alice.enqueue("")

    assert worker.wake_ups() == []


def test_a_worker_nobody_has_seen_for_a_lease_is_not_woken(db, alice, worker):
    worker.listening().sleep()
    db.pass_time("61 seconds")

    alice.enqueue()

    assert worker.wake_ups() == []


def test_of_many_sleepers_the_one_heard_of_last_is_woken(db, alice):
    workers = [Worker(db).listening() for _ in range(3)]
    for worker in workers:
        worker.sleep()
    workers[1].heartbeat()

    alice.enqueue()

    assert [worker.wake_ups() for worker in workers] == [[], [""], []]


def test_a_worker_somebody_is_waking_does_not_hold_up_others(db, alice, bob, worker):
    worker.sleep()

    with alice.connection.transaction():
        alice.enqueue()
        bob.enqueue()

    assert len(worker.claim_jobs(2)) == 2


def test_its_place_in_the_queue_tells_the_first_look(db, alice, bob):
    db.lift_limits()
    alice.has(credits=20)
    for _ in range(20):
        alice.enqueue()
    bob.enqueue()  # so that his last key counts
    db.execute("update public.entitlements set last_fair_key = 100000 where user_id = %s", bob.id)

    answer = bob.enqueue()

    assert (answer["queue_position"], answer["eta_seconds"]) == (None, None)
    assert bob.get_job_status(answer["job_id"])["queue_position"] == 21


def test_who_becomes_paid_while_a_request_waits_for_the_lock_is_not_refused(db, alice, service):
    with ThreadPoolExecutor(1) as pool:
        with service.connection.transaction():
            service.set_paid(alice, "infinity")
            answer = pool.submit(outcome, alice.enqueue)
            db.wait_for_lock(alice.connection)

        assert answer.result()["status"] == "queued"
    assert_books_balance(db)


def test_how_long_a_warm_call_takes(db, alice, capsys):
    db.lift_limits()
    alice.has(credits=WARM_UP + MEASURED)
    connection = alice.connection
    for name, claim in alice.claims().items():
        connection.execute("select set_config(%s, %s, false)", [f"request.jwt.claim.{name}", claim])
    connection.execute("set role authenticated")
    seconds = []
    for _ in range(WARM_UP + MEASURED):
        before = time.perf_counter()
        connection.execute(
            "select public.enqueue_generation(%s, %s, '{}', %s)",
            [PREVIEW, "a lighthouse at dusk", str(uuid.uuid4())],
        )
        seconds.append(time.perf_counter() - before)

    p50 = statistics.median(seconds[WARM_UP:]) * 1000
    with capsys.disabled():
        print(f"\nenqueue_generation, warm, from a client beside it: p50 {p50:.2f} ms")
