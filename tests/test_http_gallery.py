"""The gallery over HTTP: pages with GET, and the files of shared images in Storage."""

from __future__ import annotations

import uuid
from typing import Any

import httpx
import pytest
from http_client import Client, SignedUp, answer, refusal
from http_fixtures import through_both_gateways

pytest_plugins = ["http_fixtures"]
pytestmark = through_both_gateways

PNG = b"\x89PNG\r\n\x1a\n" + bytes(100)
PREVIEW_FILE = b"RIFF" + bytes(60)


def not_found(response: httpx.Response) -> bool:
    """Say whether a file seems not to exist: as much as others may learn about it."""
    return response.status_code == 400 and response.json()["statusCode"] == "404"


@pytest.fixture
def guest(endpoints, stack) -> Client:
    """A visitor as supabase-js sends them: with the anon key."""
    return Client(endpoints, stack.anon_key)


@pytest.fixture
def made(user, operator, stack_db) -> str:
    """Id of a completed generation with two images, their files and a preview in Storage."""
    job_id = str(uuid.uuid4())
    stack_db.execute(
        "insert into public.generations (id, user_id, model_id, prompt, input, provider_input,"
        " status, finished_at, price_credits, image_count)"
        " values (%s, %s, 'darkroom/preview', 'a secret', '{}', '{}', 'completed', now(), 0, 2)",
        job_id,
        user.id,
    )
    stack_db.execute(
        "insert into public.images (generation_id, position, user_id, storage_path, preview_path,"
        " content_type, bytes) select %s, n, %s, f.path || '.png',"
        " case n when 0 then f.path || '.preview.webp' end, 'image/png', 108"
        " from generate_series(0, 1) as n"
        " cross join lateral (select concat_ws('/', %s::text, %s::text, n) as path) as f",
        job_id,
        user.id,
        user.id,
        job_id,
    )
    folder = f"generations/{user.id}/{job_id}"
    for name in ("0.png", "1.png"):
        answer(operator.upload(f"{folder}/{name}", PNG))
    answer(operator.upload(f"{folder}/0.preview.webp", PREVIEW_FILE, "image/webp"))
    return job_id


def files(user: SignedUp, job_id: str) -> list[str]:
    """Return the paths of image, preview and the other image, bucket included."""
    folder = f"generations/{user.id}/{job_id}"
    return [f"{folder}/{name}" for name in ("0.png", "0.preview.webp", "1.png")]


def test_a_history_is_paged_with_get(user):
    jobs = [user.enqueued() for _ in range(3)]

    first = answer(user.rpc("list_generations", "GET", page_size=2))
    second = answer(user.rpc("list_generations", "GET", page_size=2, before=first["next_before"]))

    pages = [[job["job_id"] for job in page["generations"]] for page in (first, second)]
    assert pages == [[jobs[2], jobs[1]], [jobs[0]]]
    assert second["next_before"] is None


def test_favorites_and_tags_are_set_and_asked_for(user, made):
    answer(user.rpc("set_favorite", job_id=made, is_favorite=True))
    answer(user.rpc("set_tags", job_id=made, tags=["Sea", "night"]))

    for question in ({"only_favorites": True}, {"tag": "sea"}, {"status": "completed"}):
        (job,) = answer(user.rpc("list_generations", **question))["generations"]
        assert (job["job_id"], job["is_favorite"], job["tags"]) == (made, True, ["night", "sea"])


def test_bad_arguments_are_400(user, made):
    for function, arguments in (
        ("list_generations", {"page_size": 101}),
        ("list_public_images", {"page_size": 0}),
        ("set_tags", {"job_id": made, "tags": [""]}),
        ("save_prompt_template", {"title": "", "prompt": "the sea"}),
    ):
        refused = refusal(user.rpc(function, **arguments))

        assert (refused.status, refused.code, refused.message) == (400, "PT400", "invalid_input")


def test_a_job_under_way_is_not_deleted_and_a_strangers_is_not_found(user, stranger):
    job_id = user.enqueued()

    refused = refusal(user.rpc("delete_generation", job_id=job_id))
    unknown = refusal(stranger.rpc("delete_generation", job_id=job_id))

    assert (refused.status, refused.message) == (409, "not_finished")
    assert (unknown.status, unknown.message) == (404, "not_found")


def test_params_of_a_template_may_be_a_json_string(user):
    for params in ({"seed": 7}, '{"seed": 7}'):
        saved = answer(
            user.rpc("save_prompt_template", title="Sea", prompt="the {word} sea", params=params)
        )

        assert (saved["params"], saved["placeholders"]) == ({"seed": 7}, ["word"])


def shown_to(client: Client, job_id: str) -> list[dict[str, Any]]:
    """Return the shared images of this generation."""
    images = answer(client.rpc("list_public_images", "GET", page_size=100))["images"]
    return [image for image in images if image["job_id"] == job_id]


def test_visitors_see_what_is_shared_with_or_without_the_anon_key(user, visitor, made):
    answer(user.rpc("share_image", job_id=made))

    (shown,) = shown_to(visitor, made)

    assert (shown["position"], shown["prompt"], shown["is_own"]) == (0, None, False)


def test_visitors_download_a_shared_image_and_nothing_else(user, guest, made):
    image, preview, other = files(user, made)
    answer(user.rpc("share_image", job_id=made))

    (shown,) = shown_to(guest, made)
    assert guest.download(f"generations/{shown['path']}").content == PNG
    assert guest.download(f"generations/{shown['preview_path']}").content == PREVIEW_FILE
    assert [f"generations/{shown[name]}" for name in ("path", "preview_path")] == [image, preview]
    assert not_found(guest.download(other))


def test_other_users_download_a_shared_image_and_like_it(user, stranger, made):
    answer(user.rpc("share_image", job_id=made, shows_prompt=True))

    liked = answer(stranger.rpc("like_image", job_id=made))

    assert (liked["is_liked"], liked["like_count"]) == (True, 1)
    (shown,) = shown_to(stranger, made)
    assert (shown["is_liked"], shown["is_own"], shown["prompt"]) == (True, False, "a secret")
    assert stranger.download(files(user, made)[0]).content == PNG


@pytest.mark.parametrize("end", ["unshared", "deleted"])
def test_the_end_of_a_share_ends_all_downloads_but_the_owners(user, stranger, guest, made, end):
    answer(user.rpc("share_image", job_id=made))
    for client in (guest, stranger):
        assert client.download(files(user, made)[0]).content == PNG

    if end == "deleted":
        answer(user.rpc("delete_generation", job_id=made))
    else:
        answer(user.rpc("share_image", job_id=made, is_public=False))

    for path in files(user, made):
        for client in (guest, stranger):
            assert not_found(client.download(path))
            signed = client.storage("POST", f"object/sign/{path}", json={"expiresIn": 60})
            assert not_found(signed)
    assert user.download(files(user, made)[0]).content == PNG
    assert shown_to(guest, made) == []


def test_an_image_is_named_by_its_position(user, stranger, made):
    answer(user.rpc("share_image", job_id=made, image_position=1))

    assert answer(stranger.rpc("like_image", job_id=made, image_position=1))["like_count"] == 1
    assert refusal(stranger.rpc("like_image", job_id=made, image_position=0)).message == "not_found"


def test_visitors_list_no_file_that_is_not_shared(user, guest, made):
    def listed() -> list[str]:
        query = {"prefix": f"{user.id}/{made}"}
        found = answer(guest.storage("POST", "object/list/generations", json=query))
        return sorted(file["name"].rsplit("/", 1)[-1] for file in found)

    assert listed() == []
    answer(user.rpc("share_image", job_id=made))
    assert listed() == ["0.png", "0.preview.webp"]
    answer(user.rpc("share_image", job_id=made, is_public=False))
    assert listed() == []


@pytest.mark.parametrize("name", ["..%2F0.png", "0", "%25", "0.png'--", "💥"])
def test_a_strange_path_is_only_not_found(user, guest, made, name):
    answer(user.rpc("share_image", job_id=made))

    response = guest.download(f"generations/{user.id}/{made}/{name}")

    assert 400 <= response.status_code < 500
    assert PNG not in response.content


def test_a_shared_file_is_not_overwritten_or_removed_by_others(user, stranger, guest, made):
    image = files(user, made)[0]
    answer(user.rpc("share_image", job_id=made))

    for client in (stranger, guest):
        client.upload(image, b"\x89PNG\r\n\x1a\nmine", upsert=True)
        client.storage("DELETE", "object/generations", json={"prefixes": [image.split("/", 1)[1]]})

    assert user.download(image).content == PNG
