"""params.reuse and model aliases: sql/50_enqueue.sql and sql/30_gating.sql."""

import uuid
from collections import Counter

import pytest
from actors import PREVIEW, User, refused
from database import unchanged

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
def test_any_other_request_is_made_and_the_provider_never_hears_of_reuse(alice, worker, request_):
    completed(alice, worker, params={"seed": 7})

    answer = alice.enqueue(**request_)

    assert (answer["status"], answer["reused"], answer["credits_left"]) == ("queued", False, 8)
    assert "reuse" not in worker.claimed().provider_input


def test_what_is_anothers_failed_in_part_deleted_or_made_from_a_picture_is_not_reused(
    db, alice, bob, worker
):
    db.lift_limits()
    path = f"{alice.id}/cat.png"
    db.execute("insert into storage.objects (bucket_id, name) values ('inputs', %s)", path)
    completed(bob, worker, params={"seed": 7})
    alice.enqueue(params={"seed": 7})
    worker.fail_job(worker.claimed(), "moderated")
    alice.enqueue(params={"seed": 7, "num_outputs": 2})
    worker.complete_job(worker.claimed(), images=1)
    alice.delete_generation(completed(alice, worker, params={"seed": 7}))
    completed(alice, worker, params={"seed": 7, "image": path})

    for more in ({}, {"num_outputs": 2}, {"image": path}):
        assert alice.enqueue(params=AGAIN | more)["reused"] is False


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

    assert alice.enqueue(params=AGAIN)["reused"] is is_reused


@pytest.mark.parametrize("params", [{"reuse": "yes", "seed": 1}, {"reuse": None}, {"reuse": True}])
def test_reuse_is_a_boolean_and_needs_a_seed(db, alice, params):
    with unchanged(db), refused("PT400", "invalid_input"):
        alice.enqueue(params=params)


@pytest.fixture
def arms(db):
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
        query = (
            "insert into public.model_aliases values ('auto/fast', %s, %s), ('auto/fast', %s, %s)"
        )
        db.execute(query, PREVIEW, first, "acme/b", second)

    return weigh


def test_an_alias_stands_for_a_model_which_a_repeat_and_a_retry_keep(db, alice, arms, worker):
    arms(1, 0)
    job_id = alice.enqueued(model="auto/fast", idempotency_key="k")
    worker.fail_job(worker.claimed(), "moderated")
    arms(0, 1)

    assert alice.enqueued(model="auto/fast", idempotency_key="k") == job_id
    with refused("PT409"):
        alice.enqueue(model=PREVIEW, idempotency_key="k")
    again = alice.retry_generation(job_id)["job_id"]
    (other,) = alice.enqueue_batch(["one"], model="auto/fast")["job_ids"]

    query = "select id::text, model_id from public.generations where alias_id = 'auto/fast'"
    stood_for = {row["id"]: row["model_id"] for row in db.execute(query)}
    assert stood_for == {job_id: PREVIEW, again: PREVIEW, other: "acme/b"}


def arm_of(db, user_id):
    gate = "row(%s, 0, 0, 'free', 1, 1, 1, false, true, null, null)::private.gate"
    return db.value(f"select (private.require_model({gate}, 'auto/fast')).id", user_id)


def test_users_are_shared_out_by_weight_and_stay(db, arms):
    arms(3, 1)
    ids = [uuid.UUID(int=n * 2**100) for n in range(1000)]

    first = {user_id: arm_of(db, user_id) for user_id in ids}
    arms(6, 2)  # the same shares

    assert Counter(first.values())[PREVIEW] == pytest.approx(750, abs=60)
    assert {user_id: arm_of(db, user_id) for user_id in ids} == first
    arms(3, 2)
    moved = [user_id for user_id in ids if arm_of(db, user_id) != first[user_id]]
    assert {first[user_id] for user_id in moved} == {PREVIEW}  # only towards what grew


def test_arms_that_are_paused_or_not_for_a_user_are_passed_over(db, arms, service):
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

    db.execute("update public.models set requires_paid = true where id = 'acme/b'")
    assert {arm_of(db, user.id) for user in users} == {PREVIEW}
    db.execute("update public.models set is_active = false where id = %s", PREVIEW)
    with unchanged(db), refused("PT404", "not_found"):
        users[0].enqueue(model="auto/fast")
