"""sql/95_gallery.sql: images that everybody may see, and who likes them."""

import uuid

import pytest
from actors import Anon, User, refused, together
from database import unchanged

SHOWN = {
    "share_id",
    "job_id",
    "position",
    "path",
    "preview_path",
    "content_type",
    "width",
    "height",
    "bytes",
    "blurhash",
    "model",
    "prompt",
    "created_at",
    "like_count",
    "is_liked",
    "is_own",
}


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


def places(page) -> list[tuple[str, int]]:
    """Return which images a page shows."""
    return [(image["job_id"], image["position"]) for image in page["images"]]


# Sharing.


def test_nothing_is_shared_until_the_owner_says_so(anon, bob, made):
    for caller in (anon, bob):
        assert caller.list_public_images() == {"images": [], "next_before": None}


@pytest.mark.parametrize("who", ["anon", "alice", "bob"])
def test_everybody_sees_a_shared_image_and_no_other(request, alice, made, who):
    share_id = alice.share_image(made, image_position=1)["share_id"]

    (image,) = request.getfixturevalue(who).list_public_images()["images"]

    assert set(image) == SHOWN
    assert (image["share_id"], image["job_id"], image["position"]) == (share_id, made, 1)
    assert image["path"] == f"{alice.id}/{made}/1.png"
    assert (image["is_own"], image["is_liked"], image["like_count"]) == (who == "alice", False, 0)


def test_the_prompt_is_shown_only_if_the_owner_says_so(alice, anon, made):
    def prompt():
        return anon.list_public_images()["images"][0]["prompt"]

    alice.share_image(made)
    assert prompt() is None
    alice.share_image(made, shows_prompt=True)
    assert prompt() == "a lighthouse at dusk"
    alice.share_image(made)
    assert prompt() is None


def test_the_owner_sees_which_images_are_shared(alice, made):
    alice.share_image(made, image_position=1)

    assert [image["is_public"] for image in alice.get_job_status(made)["images"]] == [False, True]


def test_a_share_ends(alice, anon, made):
    alice.share_image(made, shows_prompt=True)

    answer = alice.share_image(made, is_public=False, shows_prompt=True)

    assert answer == {
        "job_id": made,
        "position": 0,
        "share_id": None,
        "is_public": False,
        "shows_prompt": False,
    }
    assert anon.list_public_images()["images"] == []


def test_what_was_shared_last_is_first_and_sharing_again_moves_nothing(alice, anon, worker, made):
    other = completed(alice, worker)
    first = alice.share_image(other)
    alice.share_image(made)

    assert alice.share_image(other) == first
    assert places(anon.list_public_images()) == [(made, 0), (other, 0)]


def test_pages_follow_one_another(alice, anon, worker, made):
    other = completed(alice, worker)
    for job_id, position in ((made, 0), (made, 1), (other, 0), (other, 1)):
        alice.share_image(job_id, image_position=position)

    first = anon.list_public_images(page_size=3)
    second = anon.list_public_images(page_size=3, before=first["next_before"])

    assert places(first) + places(second) == [(other, 1), (other, 0), (made, 1), (made, 0)]
    assert second["next_before"] is None


@pytest.mark.parametrize("page_size", [0, 101, None])
def test_a_page_has_1_to_100_images(anon, page_size):
    with refused("PT400", "invalid_input"):
        anon.list_public_images(page_size=page_size)


@pytest.mark.parametrize("position", [2, -1, 100_000, None])
def test_an_image_that_is_not_there_is_not_shared(db, alice, made, position):
    with unchanged(db), refused("PT404", "not_found"):
        alice.share_image(made, image_position=position)


@pytest.mark.parametrize("argument", ["is_public", "shows_prompt"])
def test_neither_true_nor_false_is_refused(db, alice, made, argument):
    with unchanged(db), refused("PT400", "invalid_input") as expected:
        alice.share_image(made, **{argument: None})

    assert argument in expected.detail


def test_the_tables_stay_the_owners_when_an_image_is_shared(db, alice, bob, anon, made):
    alice.share_image(made)
    alice.like_image(made)
    db.execute("grant select on all tables in schema public to anon")

    for caller in (bob, anon):
        for table in ("images", "generations", "image_likes"):
            assert caller.query(f"select 1 from public.{table}") == []


# Likes.


def test_a_like_counts_once_for_each_user(alice, bob, anon, made):
    alice.share_image(made)

    assert [bob.like_image(made)["like_count"] for _ in range(2)] == [1, 1]
    assert alice.like_image(made) == {
        "job_id": made,
        "position": 0,
        "is_liked": True,
        "like_count": 2,
    }
    seen = [caller.list_public_images()["images"][0] for caller in (bob, anon)]
    assert [(image["is_liked"], image["like_count"]) for image in seen] == [(True, 2), (False, 2)]


def test_a_like_is_taken_back(alice, bob, made):
    alice.share_image(made)
    for user in (alice, bob):
        user.like_image(made)

    answers = [bob.like_image(made, is_liked=False) for _ in range(2)]

    assert [(each["is_liked"], each["like_count"]) for each in answers] == [(False, 1)] * 2


def test_likes_are_of_one_image(alice, bob, made):
    for position in (0, 1):
        alice.share_image(made, image_position=position)

    bob.like_image(made, image_position=1)

    seen = bob.list_public_images()["images"]
    assert [(image["position"], image["is_liked"]) for image in seen] == [(1, True), (0, False)]


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


def test_likes_outlast_a_share_unseen(alice, bob, made):
    alice.share_image(made)
    bob.like_image(made)

    alice.share_image(made, is_public=False)
    alice.share_image(made)

    assert bob.list_public_images()["images"][0]["like_count"] == 1


def test_a_user_who_is_gone_likes_nothing(db, alice, bob, made):
    alice.share_image(made)
    db.execute("delete from auth.users where id = %s", bob.id)

    with refused("PT401", "not_authenticated"):
        bob.like_image(made)


def test_neither_liked_nor_not_is_refused(alice, made):
    alice.share_image(made)

    with refused("PT400", "invalid_input"):
        alice.like_image(made, is_liked=None)


def test_visitors_like_nothing(alice, anon, made):
    alice.share_image(made)

    with refused("PT401", "not_authenticated"):
        anon.query("select public.like_image(%s)", made)


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


def test_many_like_at_once_and_each_counts(alice, bob, made):
    alice.share_image(made)
    devices = [user.on_another_device() for user in (alice, bob) for _ in range(4)]

    together([lambda device=device: device.like_image(made) for device in devices])

    assert bob.list_public_images()["images"][0]["like_count"] == 2


def test_likes_are_counted_to_an_end(db, alice, bob, made):
    alice.share_image(made)
    for user in (alice, bob):
        user.like_image(made)

    assert db.value("select private.count_likes(%s, 0, 1)", made) == 1


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


def test_the_file_and_preview_of_a_shared_image_are_seen_by_all(alice, bob, anon, made, files):
    alice.share_image(made)

    for caller in (anon, bob):
        assert seen(caller) == [("generations", files[0]), ("generations", files[1])]


@pytest.mark.parametrize("end", ["share_image(%s, is_public => false)", "delete_generation(%s)"])
def test_no_file_is_seen_once_the_share_has_ended(request, alice, made, files, end):
    alice.share_image(made)

    alice.query(f"select public.{end}", made)

    for name in ("anon", "bob"):
        assert seen(request.getfixturevalue(name)) == []


def test_the_owner_keeps_the_files_of_a_deleted_generation_until_they_are_erased(
    alice, made, files
):
    alice.delete_generation(made)

    assert {("generations", name) for name in files} <= set(seen(alice))


def test_a_shared_file_is_not_changed_by_others(alice, bob, made, files):
    alice.share_image(made)

    for change in ("update storage.objects set name = name", "delete from storage.objects"):
        assert bob.query(change + " returning name") == []


def test_a_file_is_looked_up_by_index(db, alice, made):
    alice.share_image(made)
    db.execute(
        "insert into public.images (generation_id, position, user_id, storage_path, content_type,"
        " bytes) select %s, n, %s, concat_ws('/', %s::text, %s::text, n || '.png'), 'image/png', 1"
        " from generate_series(2, 5000) as n",
        made,
        alice.id,
        alice.id,
        made,
    )
    db.execute("analyze public.images")
    read = "select seq_tup_read from pg_stat_xact_user_tables where relname = 'images'"

    with alice.on_another_device().acting() as connection:
        for name in (f"{alice.id}/{made}/0.png", f"{alice.id}/{made}/3.png", "nothing"):
            connection.execute("select from private.shared_paths where path = %s", [name])
        assert connection.execute(read).fetchone() == (0,)


@pytest.mark.parametrize("caller", [Anon, User])
def test_the_bucket_is_listed_without_a_look_for_each_file(db, alice, made, files, caller):
    alice.share_image(made)
    db.execute(
        "insert into storage.objects (bucket_id, name) select 'generations', concat('x/', n)"
        " from generate_series(1, 2000) as n"
    )
    db.execute("analyze storage.objects")
    looks = "select seq_scan + idx_scan from pg_stat_xact_user_tables where relname = 'images'"

    with caller(db).acting() as connection:
        shown = connection.execute("select name from storage.objects order by name").fetchall()
        (count,) = connection.execute(looks).fetchone()

    assert shown == [(files[0],), (files[1],)]
    assert count <= 2
