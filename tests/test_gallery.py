"""sql/62_history.sql and sql/95_gallery.sql: history, favorites, tags, delete and restore."""

import uuid

import pytest
from actors import User, outcome, refused, together
from database import assert_books_balance, unchanged

OWN_JOB_FUNCTIONS = {
    "set_favorite": {},
    "set_tags": {"tags": ["sea"]},
    "delete_generation": {},
    "restore_generation": {},
    "share_image": {},
}


@pytest.fixture
def made(alice, worker):
    """Id of a completed generation of alice's."""
    return completed(alice, worker)


def completed(user, worker, prompt="a lighthouse at dusk") -> str:
    """Have a generation completed; return its id."""
    job_id = user.enqueued(prompt)
    worker.complete_job(worker.claimed())
    return job_id


def with_history(db, user, count, change="") -> list[str]:
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


# History.


def test_the_history_is_newest_first_and_as_the_status_shows_it(alice, bob, worker):
    first, second = completed(alice, worker), completed(alice, worker)
    completed(bob, worker)
    queued = alice.enqueued()

    page = alice.list_generations()

    assert ids(page) == [queued, second, first]
    assert page["next_before"] is None
    assert page["generations"][1] == alice.get_job_status(second)


def test_without_history_the_page_is_empty(alice):
    assert alice.list_generations() == {"generations": [], "next_before": None}


def test_pages_follow_one_another_without_gap_or_overlap(db, alice, bob):
    with_history(db, bob, 5)
    history = with_history(db, alice, 45)

    assert [len(page) for page in pages(alice)] == [20, 20, 5]
    for page_size in (1, 7, 45, 100):
        assert [job_id for page in pages(alice, page_size=page_size) for job_id in page] == history


def test_a_page_is_the_same_whatever_is_made_or_deleted_before_it(db, alice):
    history = with_history(db, alice, 9)
    first = alice.list_generations(page_size=3)

    with_history(db, alice, 2)
    alice.delete_generation(history[2])

    assert ids(alice.list_generations(page_size=3, before=first["next_before"])) == history[3:6]


def test_the_last_full_page_has_no_next(db, alice):
    with_history(db, alice, 4)

    assert [len(page) for page in pages(alice, page_size=2)] == [2, 2]


def test_favorites_tags_and_states_can_be_asked_for_alone_and_together(db, alice):
    history = with_history(db, alice, 6)
    for job_id in history[:3]:
        alice.set_favorite(job_id)
    for job_id in history[1:5]:
        alice.set_tags(job_id, "sea", "night")
    db.execute("update public.generations set status = 'completed' where id = %s", history[2])

    assert pages(alice, only_favorites=True) == [history[:3]]
    assert pages(alice, tag=" SEA") == [history[1:5]]
    assert pages(alice, status="completed") == [[history[2]]]
    assert pages(alice, only_favorites=True, tag="night") == [history[1:3]]
    assert pages(alice, only_favorites=True, tag="sea", status="completed") == [[history[2]]]
    assert pages(alice, tag="se") == [[]]


def test_each_question_is_answered_page_by_page_too(db, alice):
    history = with_history(db, alice, 9)
    for job_id in history[::2]:
        alice.set_favorite(job_id)
        alice.set_tags(job_id, "sea")

    for question in ({"only_favorites": True}, {"tag": "sea"}):
        assert pages(alice, page_size=2, **question) == [
            history[0:4:2],
            history[4:8:2],
            history[8:],
        ]


def test_what_is_rare_is_found_over_short_pages(db, alice):
    history = with_history(db, alice, 450)
    db.execute("update public.generations set status = 'completed' where id = %s", history[-1])

    found = pages(alice, status="completed")

    assert [len(page) for page in found] == [0, 0, 1]
    assert found[-1] == [history[-1]]


def test_tags_and_favorites_of_others_are_not_seen(db, alice, bob):
    theirs, mine = with_history(db, bob, 1)[0], with_history(db, alice, 1)[0]
    bob.set_tags(theirs, "sea")
    bob.set_favorite(theirs)

    assert pages(alice, tag="sea") == pages(alice, only_favorites=True) == [[]]
    assert ids(alice.list_generations(before=theirs)) == []
    assert ids(alice.list_generations()) == [mine]


@pytest.mark.parametrize(
    ("argument", "name"),
    [
        ({"page_size": 0}, "page_size"),
        ({"page_size": 101}, "page_size"),
        ({"page_size": -1}, "page_size"),
        ({"page_size": None}, "page_size"),
        ({"status": "deleted"}, "status"),
        ({"tag": ""}, "tag"),
        ({"tag": "x" * 51}, "tag"),
        ({"tag": " " * 100_000}, "tag"),
    ],
)
def test_a_bad_question_is_refused_by_name(alice, argument, name):
    with refused("PT400", "invalid_input") as expected:
        alice.list_generations(**argument)

    assert expected.detail.startswith(f"{name}: ")


@pytest.mark.parametrize(
    "question", [{}, {"only_favorites": True}, {"tag": "sea"}, {"status": "failed"}]
)
def test_a_page_reads_a_bounded_part_of_a_long_history(db, alice, bob, question):
    for user in (bob, alice):
        with_history(db, user, 5000)
    db.execute("update public.generations set is_favorite = (random() < 0.01)")
    db.execute(
        "insert into public.generation_tags select user_id, 'sea', id from public.generations"
    )
    db.execute("analyze public.generations, public.generation_tags")
    read = (
        "select sum(seq_tup_read)::int as scanned, sum(idx_tup_fetch)::int as fetched"
        " from pg_stat_xact_user_tables where relname in ('generations', 'generation_tags')"
    )
    arguments = ", ".join(f"{name} => %({name})s" for name in question)

    with alice.on_another_device().acting() as connection:
        connection.execute(f"select public.list_generations({arguments})", question)
        scanned, fetched = connection.execute(read).fetchone()

    assert scanned == 0
    assert 0 < fetched <= 2 * 200 + 20  # the walk, a look at each, and the tags of a page


# Favorites.


def test_a_favorite_is_set_shown_and_cleared(alice, made):
    assert alice.get_job_status(made)["is_favorite"] is False

    for value in (True, True, False, False):
        answer = alice.set_favorite(made, is_favorite=value)

        assert answer == {"job_id": made, "is_favorite": value}
        assert alice.get_job_status(made)["is_favorite"] is value


def test_a_queued_job_may_be_a_favorite_and_stays_one(alice, worker):
    job_id = alice.enqueued()
    alice.set_favorite(job_id)

    worker.complete_job(worker.claimed())

    assert ids(alice.list_generations(only_favorites=True)) == [job_id]


def test_neither_true_nor_false_is_refused(alice, made):
    with refused("PT400", "invalid_input") as expected:
        alice.set_favorite(made, is_favorite=None)

    assert expected.detail.startswith("is_favorite: ")


# Tags.


def test_tags_are_kept_in_one_spelling_and_once(alice, made):
    tags = alice.set_tags(made, "  Sea  side ", "sea\tside", "CAFE\u0301", "café", "night")

    assert tags == ["café", "night", "sea side"]
    assert alice.get_job_status(made)["tags"] == tags


def test_new_tags_replace_the_old_ones(alice, made):
    alice.set_tags(made, "sea", "night")

    assert alice.set_tags(made, "night", "storm") == ["night", "storm"]
    assert alice.set_tags(made) == []
    assert alice.get_job_status(made)["tags"] == []


@pytest.mark.parametrize(
    "tags",
    [[""], [" \u00a0\u200b"], [None], ["x" * 51], ["sea"] * 21, ["x" * 1_000_000]],
    ids=["empty", "blank", "null", "long", "many", "huge"],
)
def test_bad_tags_are_refused_and_change_nothing(db, alice, made, tags):
    alice.set_tags(made, "sea")

    with unchanged(db), refused("PT400", "invalid_input") as expected:
        alice.set_tags(made, *tags)

    assert expected.detail.startswith("tags: ")


def test_tags_are_not_left_out_by_mistake(alice, made):
    with refused("PT400", "invalid_input"):
        alice.call("public.set_tags", job_id=made, tags=None)


def test_of_two_devices_that_tag_at_once_one_wins_whole(db, alice, made):
    choices = [["a", "b", "c"], ["c", "d", "e"]]
    devices = [alice.on_another_device() for _ in choices]
    calls = [
        lambda device=device, choice=choice: device.set_tags(made, *choice)
        for device, choice in zip(devices, choices, strict=True)
    ]
    for _ in range(20):
        assert together(calls) == choices
        assert alice.get_job_status(made)["tags"] in choices


# Delete and restore.


def test_what_is_deleted_is_hidden_everywhere(alice, made, worker):
    kept = completed(alice, worker)
    for job_id in (made, kept):
        alice.set_favorite(job_id)
        alice.set_tags(job_id, "sea")

    alice.delete_generation(made)

    with refused("PT404", "not_found"):
        alice.get_job_status(made)
    for question in ({}, {"only_favorites": True}, {"tag": "sea"}, {"status": "completed"}):
        assert ids(alice.list_generations(**question)) == [kept]
    assert rows_seen(alice, "generations", "id") == [kept]
    for table in ("images", "generation_tags"):
        assert rows_seen(alice, table, "generation_id") == [kept]


def rows_seen(user, table, column) -> list[str]:
    """Return what the user reads from the table itself."""
    return [str(row[column]) for row in user.query(f"select {column} from public.{table}")]


def test_deleting_again_changes_nothing(db, alice, made):
    first = alice.delete_generation(made)

    with unchanged(db):
        assert alice.delete_generation(made) == first
    assert first["job_id"] == made


def test_the_books_balance_after_a_deletion(db, alice, made):
    alice.delete_generation(made)

    assert_books_balance(db)


@pytest.mark.parametrize("is_claimed", [False, True])
def test_what_is_under_way_cannot_be_deleted(db, alice, worker, is_claimed):
    job_id = alice.enqueued()
    if is_claimed:
        worker.claimed()

    with unchanged(db), refused("PT409", "not_finished") as expected:
        alice.delete_generation(job_id)

    assert "cancel_generation" in (expected.refusal.hint or "")


def test_a_deleted_one_cannot_be_changed(db, alice, made):
    alice.delete_generation(made)

    for function in ("set_favorite", "set_tags", "share_image"):
        with unchanged(db), refused("PT404", "not_found"):
            alice.call(f"public.{function}", job_id=made, **OWN_JOB_FUNCTIONS[function])


def test_a_deletion_can_be_taken_back(db, alice, made):
    alice.set_favorite(made)
    alice.set_tags(made, "sea")
    before = alice.get_job_status(made)
    alice.delete_generation(made)

    assert alice.restore_generation(made) == before == alice.get_job_status(made)
    with unchanged(db):
        assert alice.restore_generation(made) == before


def test_what_is_being_erased_cannot_be_taken_back(db, alice, made):
    alice.delete_generation(made)
    db.execute("update private.settings set keep_deleted = '0'")
    db.execute("select private.apply_retention()")

    with unchanged(db), refused("PT404", "not_found"):
        alice.restore_generation(made)


def test_what_is_too_old_to_be_kept_is_no_longer_shared(db, alice, anon, made):
    alice.share_image(made)
    db.execute("update private.settings set keep_generations = '1 day'")
    db.pass_time("2 days")

    db.execute("select private.apply_retention()")

    assert anon.list_public_images()["images"] == []


def test_a_deletion_ends_every_share_and_its_return_does_not_renew_it(alice, anon, made):
    alice.share_image(made, shows_prompt=True)
    alice.delete_generation(made)
    assert anon.list_public_images()["images"] == []

    (image,) = alice.restore_generation(made)["images"]

    assert image["is_public"] is False
    assert anon.list_public_images()["images"] == []


def test_a_share_under_way_ends_with_the_deletion_that_waited_for_it(db, alice, anon, made):
    other = alice.on_another_device()

    with alice.acting() as connection:
        connection.execute("select public.share_image(%s)", [made])
        calls = [lambda: other.delete_generation(made), lambda: wait_and_commit(db, other, alice)]
        together(calls)

    assert anon.list_public_images()["images"] == []
    assert db.value("select count(*) from public.images where share_id is not null") == 0


def test_a_share_that_waited_for_a_deletion_finds_nothing(db, alice, made):
    other = alice.on_another_device()

    with alice.acting() as connection:
        connection.execute("select public.delete_generation(%s)", [made])
        calls = [
            lambda: outcome(lambda: other.share_image(made)),
            lambda: wait_and_commit(db, other, alice),
        ]
        answer, _ = together(calls)

    assert answer.token == "not_found"
    assert db.value("select count(*) from public.images where share_id is not null") == 0


def wait_and_commit(db, waiting: User, holding: User) -> None:
    """Let the holder go as soon as the other waits for it."""
    db.wait_for_lock(waiting.connection)
    holding.connection.execute("commit; begin")


# Of all of it.


@pytest.mark.parametrize("function", OWN_JOB_FUNCTIONS)
def test_somebody_elses_generation_is_as_unknown_as_one_that_never_was(db, bob, made, function):
    refusals = []
    for job_id in (made, str(uuid.uuid4()), None):
        with unchanged(db), refused("PT404", "not_found") as expected:
            bob.call(f"public.{function}", job_id=job_id, **OWN_JOB_FUNCTIONS[function])
        refusals.append(expected.refusal)

    assert len(set(refusals)) == 1


def test_a_favorites_states_are_hot_updates(alice, worker):
    alice.set_favorite(alice.enqueued())
    stats = (
        "select sum(n_tup_upd)::int, sum(n_tup_hot_upd)::int from pg_stat_xact_user_tables"
        " where relname = 'generations'"
    )

    with worker.connection.transaction():
        worker.complete_job(worker.claimed())
        assert worker.connection.execute(stats).fetchone() == (2, 2)  # to processing, to completed


def test_everything_goes_with_the_user(db, alice, bob, made):
    alice.set_tags(made, "sea")
    alice.share_image(made)
    for user in (alice, bob):
        user.like_image(made)
        user.save_prompt_template("Sea", "the sea")

    db.execute("delete from auth.users where id = %s", alice.id)

    for table in ("generation_tags", "image_likes", "images"):
        assert db.value(f"select count(*) from public.{table}") == 0
    assert db.value("select count(*) from public.prompt_templates") == 1
