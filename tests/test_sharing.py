"""Images that everybody may see, and who likes them."""

from __future__ import annotations

import uuid

import pytest
from actors import Anon, User, refused
from database import unchanged

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
