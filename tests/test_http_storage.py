"""Storage over HTTP: outputs belong to their owner, inputs go into the user's own folder."""

from __future__ import annotations

import uuid

import httpx
import pytest
from http_client import Client

pytest_plugins = ["http_fixtures"]

PNG = b"\x89PNG\r\n\x1a\n" + bytes(100)
OTHER = b"\x89PNG\r\n\x1a\n" + bytes(50)


def stored(response: httpx.Response) -> bool:
    """Say whether an upload was accepted; Storage names the reason of a refusal in its body."""
    if response.status_code == 200:
        return True
    assert response.json()["statusCode"] in {"403", "404", "415"}, response.text
    return False


def not_found(response: httpx.Response) -> bool:
    """Say whether a file seems not to exist: as much as others may learn about it."""
    return response.status_code == 400 and response.json()["statusCode"] == "404"


def test_an_input_with_the_name_of_its_folder_is_refused_and_so_is_one_too_many(user, stack_db):
    stack_db.execute("update private.settings set max_input_files = 2")
    try:
        names = [user.id, f"{user.id}/a.png", f"{user.id}/b.png", f"{user.id}/c.png"]
        taken = [stored(user.upload(f"inputs/{name}", PNG)) for name in names]
        again = user.upload(f"inputs/{names[1]}", OTHER, upsert=True)
    finally:
        stack_db.execute("update private.settings set max_input_files = default")

    assert (taken, stored(again)) == ([False, True, True, False], True)


@pytest.fixture
def image(user, operator) -> str:
    """Path of a generated image of the user's, bucket included, stored as the worker does."""
    path = f"generations/{user.id}/{uuid.uuid4()}/0.png"
    assert stored(operator.upload(path, PNG))
    return path


def test_the_owner_downloads_a_generated_image(user, image):
    response = user.download(image)

    assert (response.status_code, response.content) == (200, PNG)
    assert response.headers["Content-Type"] == "image/png"


def test_the_owner_gets_a_signed_address_that_works_alone(user, stranger, image):
    signed = user.storage("POST", f"object/sign/{image}", json={"expiresIn": 60}).json()
    address = signed.get("signedURL") or signed["signedUrl"]
    url = httpx.URL(user.endpoints.storage).join(address)

    assert httpx.get(url).content == PNG
    assert not_found(stranger.storage("POST", f"object/sign/{image}", json={"expiresIn": 60}))


def test_another_user_does_not_find_a_generated_image(stranger, image):
    assert not_found(stranger.download(image))
    assert not_found(stranger.storage("GET", f"object/info/{image}"))


def test_visitors_find_no_generated_image(visitor, image):
    bucket, path = image.split("/", 1)

    assert not_found(visitor.download(image))
    assert not_found(visitor.download(f"public/{bucket}/{path}"))
    assert not_found(visitor.storage("POST", f"object/sign/{image}", json={"expiresIn": 60}))


def test_a_bad_token_finds_no_generated_image(user, image):
    head, body, _ = user.token.split(".")
    for token in ("garbage", f"{head}.{body}.", f"{head}.{body}.{'A' * 43}"):
        response = user.with_token(token).download(image)
        assert response.status_code >= 400
        assert PNG not in response.content


def test_only_the_owner_sees_a_generated_image_in_a_list(user, stranger, nobody, image):
    def listed(client: Client) -> int:
        query = {"prefix": user.id}
        return len(client.storage("POST", "object/list/generations", json=query).json())

    assert (listed(user), listed(stranger), listed(nobody)) == (1, 0, 0)


@pytest.mark.parametrize("caller", ["user", "stranger", "nobody"])
def test_only_the_worker_writes_generated_images(request, user, image, caller):
    client = request.getfixturevalue(caller)
    folder = image.rsplit("/", 1)[0]

    assert not stored(client.upload(f"{folder}/1.png", OTHER))
    assert not stored(client.upload(image, OTHER, upsert=True))
    for action in ("move", "copy"):
        keys = {"sourceKey": image.split("/", 1)[1], "destinationKey": f"{client.token}.png"}
        body = {"bucketId": "generations", **keys}
        assert not stored(client.storage("POST", f"object/{action}", json=body))
    assert user.download(image).content == PNG


@pytest.mark.parametrize("caller", ["user", "stranger", "nobody"])
def test_users_cannot_delete_generated_images(request, user, image, caller):
    client = request.getfixturevalue(caller)
    client.storage("DELETE", "object/generations", json={"prefixes": [image.split("/", 1)[1]]})

    assert user.download(image).content == PNG


def test_users_put_read_and_replace_images_in_their_own_input_folder(user):
    path = f"inputs/{user.id}/source.png"

    assert stored(user.upload(path, PNG))
    assert stored(user.upload(path, OTHER, upsert=True))
    assert user.download(path).content == OTHER


def test_an_input_is_its_users_alone(user, stranger, nobody):
    path = f"inputs/{user.id}/source.png"
    assert stored(user.upload(path, PNG))

    for client in (stranger, nobody):
        assert not_found(client.download(path))
        assert not stored(client.upload(path, OTHER, upsert=True))
    assert user.download(path).content == PNG


@pytest.mark.parametrize(
    "path",
    ["{other}/a.png", "a.png", "{own}/%2e%2e/{other}/a.png", "{own}x/a.png", "x/{own}/a.png"],
)
def test_users_put_nothing_outside_their_own_input_folder(user, stranger, path):
    path = path.format(own=user.id, other=stranger.id)

    assert not stored(user.upload(f"inputs/{path}", PNG))


@pytest.mark.parametrize("content_type", ["text/html", "image/svg+xml", "application/javascript"])
@pytest.mark.parametrize("bucket", ["inputs", "generations"])
def test_files_a_browser_would_run_are_refused(user, operator, bucket, content_type):
    for client in (user, operator):
        path = f"{bucket}/{user.id}/page.png"
        assert not stored(client.upload(path, b"<script>", content_type))
