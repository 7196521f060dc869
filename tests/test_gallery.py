"""History, favorites, tags, delete and restore; shared images and likes; prompts to start from."""

from __future__ import annotations

import uuid

import pytest
from actors import Anon, User, outcome, refused, together
from database import assert_books_balance, unchanged
from psycopg.types.json import Jsonb

SHOWN = """
    share_id job_id position path preview_path content_type width height bytes blurhash model prompt
    created_at like_count is_liked is_own
"""


@pytest.fixture
def made(alice, worker):
    """Id of a completed generation of alice's with two images."""
    return completed(alice, worker)


def completed(user, worker) -> str:
    """Have a generation of two images completed; return its id."""
    job_id = user.enqueued(params={"num_outputs": 2})
    job = worker.claimed()
    preview = f"{user.id}/{job_id}/0.preview.webp"
    worker.complete_job(job, [job.image(0, preview_path=preview), job.image(1)])
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
    for table, column in {
        "generations": "id",
        "images": "generation_id",
        "generation_tags": "generation_id",
    }.items():
        rows = alice.query(f"select {column}::text as id from public.{table}")
        assert {row["id"] for row in rows} == {kept}
    assert_books_balance(db)
    assert alice.restore_generation(made) == before == alice.get_job_status(made)
    with unchanged(db):
        assert alice.restore_generation(made) == before


def test_what_is_under_way_cannot_be_deleted(db, alice, worker):
    job_id = alice.enqueued()
    for _ in ("queued", "running"):
        with unchanged(db), refused("PT409", "not_finished") as expected:
            alice.delete_generation(job_id)
        assert "cancel_generation" in (expected.refusal.hint or "")
        worker.claim_jobs(1)


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

    images = alice.restore_generation(made)["images"]

    assert [image["is_public"] for image in images] == [False, False]
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


# Sharing and likes.


def test_everybody_sees_a_shared_image_and_no_other_until_the_share_ends(alice, bob, anon, made):
    callers = (alice, bob, anon)
    for caller in callers:
        assert caller.list_public_images() == {"images": [], "next_before": None}

    share_id = alice.share_image(made, image_position=1)["share_id"]

    for caller in callers:
        (image,) = caller.list_public_images()["images"]
        assert set(image) == set(SHOWN.split())
        assert (image["share_id"], image["job_id"], image["position"]) == (share_id, made, 1)
        assert image["path"] == f"{alice.id}/{made}/1.png"
        assert (image["is_own"], image["is_liked"]) == (caller is alice, False)
    assert [image["is_public"] for image in alice.get_job_status(made)["images"]] == [False, True]
    for shows_prompt in (False, True, False):
        alice.share_image(made, image_position=1, shows_prompt=shows_prompt)
        (image,) = anon.list_public_images()["images"]
        assert image["prompt"] == ("a lighthouse at dusk" if shows_prompt else None)
    answer = alice.share_image(made, image_position=1, is_public=False, shows_prompt=True)
    assert (answer["share_id"], answer["is_public"], answer["shows_prompt"]) == (None, False, False)
    assert anon.list_public_images()["images"] == []


def test_pages_follow_one_another_from_what_was_shared_last(alice, anon, worker, made):
    other = completed(alice, worker)
    shares = [(made, 0), (made, 1), (other, 0), (other, 1)]
    answers = [alice.share_image(job_id, image_position=n) for job_id, n in shares]
    assert alice.share_image(made) == answers[0], "sharing again moves nothing"

    first = anon.list_public_images(page_size=3)
    second = anon.list_public_images(page_size=3, before=first["next_before"])

    images = first["images"] + second["images"]
    assert [(image["job_id"], image["position"]) for image in images] == shares[::-1]
    assert second["next_before"] is None
    for page_size in (0, 101, None):
        with refused("PT400", "invalid_input"):
            anon.list_public_images(page_size=page_size)
    for position in (2, -1, None):
        with refused("PT404", "not_found"):
            alice.share_image(made, image_position=position)


def test_a_like_counts_once_for_each_user_until_it_is_taken_back(alice, bob, anon, made):
    for position in (0, 1):
        alice.share_image(made, image_position=position)
    assert [bob.like_image(made)["like_count"] for _ in range(2)] == [1, 1]
    told = {"job_id": made, "position": 0, "is_liked": True, "like_count": 2}
    assert alice.like_image(made) == told

    for caller in (bob, anon):
        other, image = caller.list_public_images()["images"]
        assert (image["is_liked"], image["like_count"]) == (caller is bob, 2)
        assert (other["is_liked"], other["like_count"]) == (False, 0)
    answers = [bob.like_image(made, is_liked=False) for _ in range(2)]
    assert [(each["is_liked"], each["like_count"]) for each in answers] == [(False, 1)] * 2
    alice.share_image(made, is_public=False)
    alice.share_image(made)
    assert bob.list_public_images()["images"][0]["like_count"] == 1, "likes outlast a share"
    with refused("PT400", "invalid_input"):
        alice.like_image(made, is_liked=None)


@pytest.mark.parametrize("is_liked", [True, False])
def test_what_is_not_shared_is_as_unknown_as_what_never_was(db, alice, bob, made, is_liked):
    alice.share_image(made)
    alice.share_image(made, image_position=1)
    alice.share_image(made, image_position=1, is_public=False)
    alice.like_image(made)
    alice.delete_generation(made)
    refusals = []
    for job_id, position in ((made, 0), (made, 1), (str(uuid.uuid4()), 0), (None, 0)):
        with unchanged(db), refused("PT404", "not_found") as expected:
            bob.like_image(job_id, image_position=position, is_liked=is_liked)
        refusals.append(expected.refusal)

    assert len(set(refusals)) == 1


def test_nobody_waits_for_a_like_under_way(db, alice, bob, made):
    alice.share_image(made)

    with bob.acting() as connection:
        connection.execute("select public.like_image(%s)", [made])
        db.execute("set statement_timeout = '5s'")
        assert alice.like_image(made)["like_count"] == 1
        alice.share_image(made, shows_prompt=True)
        alice.delete_generation(made)

    with refused("PT404", "not_found"):
        bob.like_image(made)


# Files.


@pytest.fixture
def files(db, alice, made):
    """Storage has the files of the images, and the grants Supabase gives the API roles."""
    db.execute("grant usage on schema storage to anon, authenticated")
    db.execute("grant all on storage.objects to anon, authenticated")
    folder = f"{alice.id}/{made}"
    names = [f"{folder}/{name}" for name in ("0.png", "0.preview.webp", "1.png")]
    strange = ["", "/", "a", f"{folder}/0", f"{folder}/0.png/../1.png", f"{folder}/%", "'; --"]
    for name in names + strange:
        for bucket in ("generations", "inputs"):
            query = "insert into storage.objects (bucket_id, name) values (%s, %s)"
            db.execute(query, bucket, name)
    return names


def seen(caller) -> list[tuple[str, str]]:
    """Return which files of which bucket somebody finds."""
    rows = caller.query("select bucket_id, name from storage.objects")
    return sorted((row["bucket_id"], row["name"]) for row in rows)


@pytest.mark.parametrize("end", ["share_image(%s, is_public => false)", "delete_generation(%s)"])
def test_the_files_of_a_shared_image_are_seen_by_all_until_the_share_ends(db, alice, files, end):
    made, others = files[0].split("/")[1], (Anon(db), User(db))
    alice.share_image(made)

    for caller in others:
        assert seen(caller) == [("generations", files[0]), ("generations", files[1])]
    for change in ("update storage.objects set name = name", "delete from storage.objects"):
        assert others[1].query(change + " returning name") == []

    alice.query(f"select public.{end}", made)
    assert [seen(caller) for caller in others] == [[], []]
    assert {("generations", name) for name in files} <= set(seen(alice))


# Templates.

APPS = "insert into public.prompt_templates (title, prompt) values ('Sky', 'the sky') returning id"


def test_a_template_is_kept_listed_changed_and_deleted_once(alice):
    prompt = "a {animal} in the style of {painter}, {animal}"
    wish = {"prompt": prompt, "model": "darkroom/preview", "params": {"width": 768}}
    saved = alice.save_prompt_template("Animal portrait", **wish)

    assert alice.list_prompt_templates() == [saved]
    assert saved.pop("created_at")
    template_id = saved.pop("id")
    told = {"title": "Animal portrait", "is_own": True, "placeholders": ["animal", "painter"]}
    assert saved == wish | told
    alice.save_prompt_template("Ocean", "the {colour} ocean", id=template_id)
    (template,) = alice.list_prompt_templates()
    assert (template["id"], template["title"]) == (template_id, "Ocean")
    assert (template["placeholders"], template["params"]) == (["colour"], {})
    assert alice.delete_prompt_template(template_id) == {"id": template_id}
    assert alice.list_prompt_templates() == []
    with refused("PT404", "not_found"):
        alice.delete_prompt_template(template_id)


def test_templates_of_others_and_of_the_app_cannot_be_changed(db, alice, bob, service):
    (app,) = service.query(APPS)
    bobs = bob.save_prompt_template("Sea", "the sea")["id"]
    assert [each["title"] for each in bob.list_prompt_templates()] == ["Sea", "Sky"]
    assert [each["title"] for each in alice.list_prompt_templates()] == ["Sky"]
    refusals = []

    for template_id in (str(app["id"]), bobs, str(uuid.uuid4())):
        with unchanged(db), refused("PT404", "not_found") as expected:
            alice.save_prompt_template("Mine", "mine", id=template_id)
        refusals.append(expected.refusal)
        with unchanged(db), refused("PT404", "not_found") as expected:
            alice.delete_prompt_template(template_id)
        refusals.append(expected.refusal)

    assert len(set(refusals)) == 1


def test_a_bad_template_or_one_too_many_is_refused(db, alice):
    for name, values in {
        "title": ["", None, "x" * 101],
        "prompt": [" ", None, "x" * 4001],
        "model": ["", "x" * 101],
        "params": [Jsonb([]), {"x": "y" * 9000}],
    }.items():
        for value in values:
            with unchanged(db), refused("PT400", "invalid_input") as expected:
                alice.save_prompt_template(**{"title": "Sea", "prompt": "the sea"} | {name: value})
            assert expected.detail.startswith(f"{name}: ")

    db.execute(
        "insert into public.prompt_templates (user_id, title, prompt)"
        " select %s, 'Sea', 'the sea' from generate_series(1, 100)",
        alice.id,
    )
    with unchanged(db), refused("PT400", "invalid_input"):
        alice.save_prompt_template("One more", "the sea")
    own = alice.list_prompt_templates()[0]["id"]
    assert alice.save_prompt_template("Changed", "the sea", id=own)["title"] == "Changed"
