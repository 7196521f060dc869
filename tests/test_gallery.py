"""History, favorites, tags, delete and restore."""

from __future__ import annotations

import uuid

import pytest
from actors import outcome, refused, together
from database import assert_books_balance, unchanged


@pytest.fixture
def made(alice, worker):
    """Id of a completed generation of alice's."""
    return completed(alice, worker)


def completed(user, worker) -> str:
    """Have a generation completed; return its id."""
    job_id = user.enqueued()
    worker.complete_job(worker.claimed())
    return job_id


def with_history(db, user, count) -> list[str]:
    """Give the user so many finished generations; return their ids, newest first."""
    rows = db.execute(
        "insert into public.generations (user_id, model_id, prompt, input, provider_input, status,"
        " price_credits, image_count, finished_at)"
        " select %s, 'darkroom/preview', 'number ' || n, '{}', '{}', 'canceled', 0, 1, now()"
        " from generate_series(1, %s) as n returning id::text",
        user.id,
        count,
    )
    return sorted((row["id"] for row in rows), reverse=True)


def ids(page) -> list[str]:
    """Return the ids of a page."""
    return [generation["job_id"] for generation in page["generations"]]


def pages(user, **question) -> list[list[str]]:
    """Follow next_before to the end; return the ids of each page."""
    page = user.list_generations(**question)
    result = [ids(page)]
    while page["next_before"]:
        page = user.list_generations(before=page["next_before"], **question)
        result.append(ids(page))
    return result


def rows_seen(user, table, column) -> list[str]:
    """Return what the user reads from the table itself."""
    return [str(row[column]) for row in user.query(f"select {column} from public.{table}")]


# History.


def test_the_history_is_newest_first_and_as_the_status_shows_it(alice, bob, worker):
    assert alice.list_generations() == {"generations": [], "next_before": None}
    first, second = completed(alice, worker), completed(alice, worker)
    completed(bob, worker)
    queued = alice.enqueued()

    page = alice.list_generations()

    assert ids(page) == [queued, second, first]
    assert page["next_before"] is None
    assert page["generations"][1] == alice.get_job_status(second)


def test_pages_follow_one_another_without_gap_or_overlap(db, alice, bob):
    with_history(db, bob, 5)
    history = with_history(db, alice, 46)

    assert [len(page) for page in pages(alice)] == [20, 20, 6]
    assert [len(page) for page in pages(alice, page_size=23)] == [23, 23], "a full one is the last"
    for page_size in (7, 46, 100):
        assert [job_id for page in pages(alice, page_size=page_size) for job_id in page] == history


def test_favorites_tags_and_states_can_be_asked_for_alone_and_together(db, alice, bob):
    theirs = with_history(db, bob, 1)[0]
    bob.set_tags(theirs, "sea")
    bob.set_favorite(theirs)
    history = with_history(db, alice, 6)
    for job_id in history[:3]:
        alice.set_favorite(job_id)
    for job_id in history[1:5]:
        alice.set_tags(job_id, "sea", "night")
    db.execute("update public.generations set status = 'completed' where id = %s", history[2])

    assert pages(alice, only_favorites=True, page_size=2) == [history[:2], history[2:3]]
    assert pages(alice, tag=" SEA", page_size=2) == [history[1:3], history[3:5]]
    assert pages(alice, status="completed") == [[history[2]]]
    assert pages(alice, only_favorites=True, tag="night") == [history[1:3]]
    assert pages(alice, only_favorites=True, tag="sea", status="completed") == [[history[2]]]
    assert pages(alice, tag="se") == [[]]


def test_a_bad_question_or_tag_is_refused_by_name(db, alice, made):
    alice.set_tags(made, "sea")
    tags = [[""], [" \u00a0\u200b"], [None], ["x" * 51], ["sea"] * 21, ["x" * 1_000_000], None]
    page_sizes, blank = [0, 101, None], " " * 100_000
    for call, name, values in (
        ("list_generations", "page_size", page_sizes),
        ("list_generations", "status", ["deleted"]),
        ("list_generations", "tag", ["", "x" * 51, blank]),
        ("set_tags", "tags", tags),
        ("set_favorite", "is_favorite", [None]),
    ):
        rest = {} if call == "list_generations" else {"job_id": made}
        for value in values:
            with unchanged(db), refused("PT400", "invalid_input") as expected:
                alice.call(f"public.{call}", **rest, **{name: value})
            assert expected.detail.startswith(f"{name}: ")


# Favorites and tags.


def test_a_favorite_is_set_shown_and_cleared_also_while_it_is_queued(alice, worker):
    job_id = alice.enqueued()
    alice.set_favorite(job_id)
    worker.complete_job(worker.claimed())
    assert ids(alice.list_generations(only_favorites=True)) == [job_id]

    for value in (False, False, True, True):
        told = alice.set_favorite(job_id, is_favorite=value)
        assert told == {"job_id": job_id, "is_favorite": value}
        assert alice.get_job_status(job_id)["is_favorite"] is value


def test_tags_are_kept_in_one_spelling_and_once_and_replaced_whole(alice, made):
    tags = alice.set_tags(made, "  Sea  side ", "sea\tside", "CAFE\u0301", "café", "night")

    assert tags == ["café", "night", "sea side"] == alice.get_job_status(made)["tags"]
    assert alice.set_tags(made, "night", "storm") == ["night", "storm"]
    assert alice.set_tags(made) == [] == alice.get_job_status(made)["tags"]


# Delete and restore.


def test_what_is_deleted_is_hidden_everywhere_and_can_be_restored(db, alice, made, worker):
    kept = completed(alice, worker)
    for job_id in (made, kept):
        alice.set_favorite(job_id)
        alice.set_tags(job_id, "sea")
    before = alice.get_job_status(made)

    first = alice.delete_generation(made)

    with unchanged(db):
        assert alice.delete_generation(made) == first
    with refused("PT404", "not_found"):
        alice.get_job_status(made)
    for question in ({}, {"only_favorites": True}, {"tag": "sea"}, {"status": "completed"}):
        assert ids(alice.list_generations(**question)) == [kept]
    assert rows_seen(alice, "generations", "id") == [kept]
    for table in ("images", "generation_tags"):
        assert rows_seen(alice, table, "generation_id") == [kept]
    assert_books_balance(db)
    assert alice.restore_generation(made) == before == alice.get_job_status(made)
    with unchanged(db):
        assert alice.restore_generation(made) == before


@pytest.mark.parametrize("is_claimed", [False, True])
def test_what_is_under_way_cannot_be_deleted(db, alice, worker, is_claimed):
    job_id = alice.enqueued()
    if is_claimed:
        worker.claimed()

    with unchanged(db), refused("PT409", "not_finished") as expected:
        alice.delete_generation(job_id)

    assert "cancel_generation" in (expected.refusal.hint or "")


def test_what_is_being_erased_cannot_be_taken_back(db, alice, worker, made):
    db.execute("update private.settings set keep_deleted = '0'")
    alice.delete_generation(made)
    worker.apply_retention()

    with unchanged(db), refused("PT404", "not_found"):
        alice.restore_generation(made)


def test_a_deletion_ends_every_share_and_its_return_does_not_renew_it(alice, anon, made):
    alice.share_image(made, shows_prompt=True)
    alice.delete_generation(made)
    assert anon.list_public_images()["images"] == []

    (image,) = alice.restore_generation(made)["images"]

    assert image["is_public"] is False
    assert anon.list_public_images()["images"] == []


@pytest.mark.parametrize("first", ["share_image", "delete_generation"])
def test_of_a_share_and_a_deletion_at_once_no_share_is_left(db, alice, made, first):
    other = alice.on_another_device()
    second = other.delete_generation if first == "share_image" else other.share_image

    def wait_and_commit() -> None:
        db.wait_for_lock(other.connection)
        alice.connection.execute("commit; begin")

    with alice.acting() as connection:
        connection.execute(f"select public.{first}(%s)", [made])
        answer, _ = together([lambda: outcome(lambda: second(made)), wait_and_commit])

    assert getattr(answer, "token", None) == (None if first == "share_image" else "not_found")
    assert db.value("select count(*) from public.images where share_id is not null") == 0


# Of all of it.


@pytest.mark.parametrize(
    "function",
    ["set_favorite", "set_tags", "delete_generation", "restore_generation", "share_image"],
)
def test_somebody_elses_or_a_deleted_generation_is_as_unknown_as_one_that_never_was(
    db, alice, bob, made, function
):
    rest = {"tags": ["sea"]} if function == "set_tags" else {}
    refusals = []
    for job_id in (made, str(uuid.uuid4()), None):
        with unchanged(db), refused("PT404", "not_found") as expected:
            bob.call(f"public.{function}", job_id=job_id, **rest)
        refusals.append(expected.refusal)
    alice.delete_generation(made)
    if function not in ("delete_generation", "restore_generation"):
        with unchanged(db), refused("PT404", "not_found") as expected:
            alice.call(f"public.{function}", job_id=made, **rest)
        refusals.append(expected.refusal)

    assert len(set(refusals)) == 1
