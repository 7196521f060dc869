"""params.reuse and model aliases: sql/50_enqueue.sql and sql/30_gating.sql."""

from collections import Counter

import pytest
from actors import PREVIEW, User, refused
from database import assert_books_balance, unchanged

AGAIN = {"seed": 7, "reuse": True}


def completed(user, worker, **rest):
    """Have a finished generation; return its id."""
    job_id = user.enqueued(**rest)
    job = worker.claimed()
    worker.complete_job(job, images=job.image_count)
    return job_id


def test_the_same_request_with_a_seed_is_answered_with_what_is_there_free(db, alice, worker):
    job_id = completed(alice, worker, params={"seed": 7})

    with unchanged(db):
        answer = alice.enqueue(params=AGAIN)

    assert (answer["job_id"], answer["status"], answer["reused"]) == (job_id, "completed", True)
    assert (answer["credits_left"], answer["poll_after_ms"]) == (9, None)
    assert alice.get_job_status(job_id)["images"]


@pytest.mark.parametrize(
    "request_",
    [
        {"params": {"seed": 7}},
        {"params": {"seed": 7, "reuse": False}},
        {"params": {"seed": 8, "reuse": True}},
        {"params": AGAIN | {"width": 512}},
        {"params": AGAIN, "prompt": "another"},
    ],
)
def test_any_other_request_is_made(alice, worker, request_):
    completed(alice, worker, params={"seed": 7})

    answer = alice.enqueue(**request_)

    assert (answer["status"], answer["reused"], answer["credits_left"]) == ("queued", False, 8)


def test_what_is_not_whole_is_not_reused(db, alice, bob, worker):
    db.lift_limits()
    completed(bob, worker, params={"seed": 7})  # somebody else's
    alice.enqueue(params={"seed": 7})
    worker.fail_job(worker.claimed(), "moderated")
    alice.enqueue(params={"seed": 7, "num_outputs": 2})
    worker.complete_job(worker.claimed(), images=1)
    deleted = completed(alice, worker, params={"seed": 7})
    db.execute("update public.generations set deleted_at = now() where id = %s", deleted)

    for params in (AGAIN, AGAIN | {"num_outputs": 2}):
        assert alice.enqueue(params=params)["reused"] is False


def test_what_was_made_from_a_picture_is_not_reused(db, alice, worker):
    path = f"{alice.id}/cat.png"
    db.execute("insert into storage.objects (bucket_id, name) values ('inputs', %s)", path)
    completed(alice, worker, params={"seed": 7, "image": path})

    assert alice.enqueue(params=AGAIN | {"image": path})["reused"] is False


@pytest.mark.parametrize("params", [{"reuse": "yes", "seed": 1}, {"reuse": None}, {"reuse": True}])
def test_reuse_is_a_boolean_and_needs_a_seed(db, alice, params):
    with unchanged(db), refused("PT400", "invalid_input"):
        alice.enqueue(params=params)


def test_the_provider_never_hears_of_reuse(alice, worker):
    alice.enqueue(params=AGAIN)

    assert "reuse" not in worker.claimed().provider_input


@pytest.mark.parametrize(("others", "is_reused"), [(199, True), (200, False)])
def test_what_is_reused_is_among_the_last_two_hundred(db, alice, worker, others, is_reused):
    completed(alice, worker, params={"seed": 7})
    db.execute(
        "insert into public.generations (user_id, model_id, prompt, input, provider_input, status,"
        " price_credits, image_count, finished_at) select user_id, model_id, prompt,"
        " '{\"seed\": 1}', jsonb_build_object('seed', n), status, 0, 1, now()"
        " from public.generations cross join generate_series(1, %s) as n",
        others,
    )

    assert alice.enqueue(params={"seed": 7, "reuse": True})["reused"] is is_reused


# Aliases.


@pytest.fixture
def arms(db, alice):
    """Add a second model and return a function that sets the weights of auto/fast."""
    columns = "title, provider, provider_ref, price_credits, paid_price_credits, input_schema,"
    columns += " client_inputs, image_count_input, max_images"
    db.execute(
        f"insert into public.models (id, {columns}) select 'acme/b', {columns}"
        " from public.models where id = %s",
        PREVIEW,
    )

    def weigh(first, second):
        db.execute("delete from public.model_aliases")
        db.execute(
            "insert into public.model_aliases values ('auto/fast', %s, %s),"
            " ('auto/fast', 'acme/b', %s)",
            PREVIEW,
            first,
            second,
        )

    return weigh


def test_an_alias_stands_for_a_model_and_is_kept(db, alice, arms, worker):
    arms(1, 0)

    job_id = alice.enqueued(model="auto/fast")

    row = db.row("select model_id, alias_id from public.generations where id = %s", job_id)
    assert row == {"model_id": PREVIEW, "alias_id": "auto/fast"}
    assert worker.claimed().id == job_id


def test_the_same_key_for_an_alias_is_no_conflict_whatever_it_stands_for_now(db, alice, arms):
    arms(1, 0)
    job_id = alice.enqueued(model="auto/fast", idempotency_key="k")
    arms(0, 1)

    assert alice.enqueued(model="auto/fast", idempotency_key="k") == job_id
    with refused("PT409"):
        alice.enqueue(model=PREVIEW, idempotency_key="k")


def arm_of(db, user_id):
    query = (
        "select m.id from private.require_model("
        " row(%s, 0, 0, 'free', 1, 1, 1, false, true, null)::private.gate, 'auto/fast') as m"
    )
    return db.value(query, user_id)


def test_users_are_shared_out_by_weight_and_stay(db, arms):
    arms(3, 1)
    ids = [
        row["id"]
        for row in db.execute("select gen_random_uuid() as id from generate_series(1, 4000)")
    ]

    first = {user_id: arm_of(db, user_id) for user_id in ids}
    arms(6, 2)  # the same shares

    assert Counter(first.values())[PREVIEW] == pytest.approx(3000, abs=120)
    assert {user_id: arm_of(db, user_id) for user_id in ids} == first
    arms(3, 2)
    moved = [user_id for user_id in ids if arm_of(db, user_id) != first[user_id]]
    assert {first[user_id] for user_id in moved} == {PREVIEW}  # only towards what grew


def test_arms_that_a_user_may_not_use_are_passed_over(db, alice, arms):
    arms(1, 1)
    db.execute("update public.models set requires_paid = true where id = 'acme/b'")
    assert {arm_of(db, User(db).id) for _ in range(20)} == {PREVIEW}

    db.execute("update public.models set is_active = false where id = %s", PREVIEW)
    with unchanged(db), refused("PT404", "not_found"):
        alice.enqueue(model="auto/fast")


def test_a_paused_arm_is_passed_over_until_all_are_paused(db, arms, service):
    arms(1, 1)
    users = [User(db) for _ in range(20)]
    before = [arm_of(db, user.id) for user in users]

    service.pause_model("acme/b")

    assert {arm_of(db, user.id) for user in users} == {PREVIEW}
    service.pause_model(PREVIEW)
    with unchanged(db), refused("PT503", "model_paused"):
        users[0].enqueue(model="auto/fast")
    for model in (PREVIEW, "acme/b"):
        service.resume_model(model)
    assert [arm_of(db, user.id) for user in users] == before


def test_a_model_goes_before_an_alias_of_its_name(db, alice, arms):
    db.execute("insert into public.model_aliases values (%s, 'acme/b', 1)", PREVIEW)

    job_id = alice.enqueued()

    query = "select model_id, alias_id from public.generations where id = %s"
    assert db.row(query, job_id) == {"model_id": PREVIEW, "alias_id": None}


def test_a_retry_stays_with_the_model(db, alice, arms, worker):
    arms(1, 0)
    job_id = alice.enqueued(model="auto/fast")
    worker.fail_job(worker.claimed(), "moderated")
    arms(0, 1)

    again = alice.retry_generation(job_id)["job_id"]

    query = "select model_id, alias_id from public.generations where id = %s"
    assert db.row(query, again) == {"model_id": PREVIEW, "alias_id": "auto/fast"}
    assert_books_balance(db)


def test_batches_know_aliases_too(db, alice, arms):
    arms(0, 1)

    batch = alice.enqueue_batch(["one", "two"], model="auto/fast")

    rows = db.execute(
        "select model_id, alias_id from public.generations where batch_id = %s", batch["batch_id"]
    )
    assert rows == [{"model_id": "acme/b", "alias_id": "auto/fast"}] * 2
