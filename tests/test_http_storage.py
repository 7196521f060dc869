"""Storage over HTTP: outputs belong to their owner, inputs go into the user's own folder.

What a path means is up to the Storage server; what may be read is up to our policies. So whatever
a spelling is taken for, the bytes of another user's file never come out, and nothing gets in.
"""

from __future__ import annotations

import uuid

import httpx
import pytest
from http_client import Client, SignedUp, answer, refusal

pytest_plugins = ["http_fixtures"]

PNG = b"\x89PNG\r\n\x1a\n" + b"mine".ljust(100)
OTHER = b"\x89PNG\r\n\x1a\n" + b"other".ljust(100)
SPELLINGS = [
    "{other}/{name}",
    "{own}/../{other}/{name}",
    "{own}/..%2f{other}/{name}",
    "{own}/%2e%2e/{other}/{name}",
    "{own}/%252e%252e%252f{other}%252f{name}",
    "{own}/..%5c{other}%5c{name}",
    "/{other}/{name}",
    "%2f{other}/{name}",
    "{OTHER}/{name}",
    "{other}/{name}%00.png",
    "{other}/{name}?token={own}",
    "..%2fgenerations%2f{other}/{name}",
]


def stored(response: httpx.Response) -> bool:
    """Say whether an upload was accepted; Storage names the reason of a refusal in its body."""
    if response.status_code == 200:
        return True
    assert response.json()["statusCode"] in {"403", "404", "415"}, response.text
    return False


def not_found(response: httpx.Response) -> bool:
    """Say whether a file seems not to exist: as much as others may learn about it."""
    return response.status_code == 400 and response.json()["statusCode"] == "404"


def listed(client: Client, prefix: str) -> list[str]:
    response = client.storage("POST", "object/list/generations", json={"prefix": prefix})
    return sorted(file["name"].rsplit("/", 1)[-1] for file in answer(response))


@pytest.fixture
def name(user, operator) -> str:
    """Name of a file of the user's in both buckets, as the worker and the app store them."""
    name = f"{uuid.uuid4()}.png"
    for bucket, client in (("generations", operator), ("inputs", user)):
        assert stored(client.upload(f"{bucket}/{user.id}/{name}", PNG))
    return name


def send(client: Client, method: str, path: str, **request: object) -> httpx.Response | None:
    """Send a request with the path as it is written; None if it can not even be sent."""
    try:
        return client.storage(method, path, **request)
    except httpx.InvalidURL:
        return None


@pytest.mark.parametrize("bucket", ["generations", "inputs"])
def test_no_spelling_opens_changes_or_lists_anothers_file(user, stranger, nobody, name, bucket):
    forged = [user.with_token(token) for token in ("garbage", user.token[:-2])]
    for client in (stranger, nobody, *forged):
        for spelling in SPELLINGS:
            ids = {"own": stranger.id, "other": user.id, "OTHER": user.id.upper()}
            path = f"{bucket}/{spelling.format(**ids, name=name)}"
            for place in ("object", "object/authenticated", "object/public", "object/info"):
                read = send(client, "GET", f"{place}/{path}")
                assert read is None or (read.status_code >= 400 and PNG not in read.content)
            signed = send(client, "POST", f"object/sign/{path}", json={"expiresIn": 60})
            assert signed is None or signed.status_code >= 400
            send(client, "POST", f"object/{path}", content=OTHER, headers={"x-upsert": "true"})
            send(client, "DELETE", f"object/{path}")
        for prefix in ("", "/", "..", "%", user.id, f"{stranger.id}/../{user.id}"):
            query = {"prefix": prefix, "limit": 1000}
            response = client.storage("POST", f"object/list/{bucket}", json=query)
            assert name not in response.text, prefix

    assert user.download(f"{bucket}/{user.id}/{name}").content == PNG


@pytest.mark.parametrize("caller", ["user", "stranger", "nobody"])
def test_only_the_worker_writes_generated_images_and_nobody_takes_one(request, user, name, caller):
    client: SignedUp = request.getfixturevalue(caller)
    path = f"{user.id}/{name}"

    assert not stored(client.upload(f"generations/{user.id}/1.png", OTHER))
    assert not stored(client.upload(f"generations/{path}", OTHER, upsert=True))
    client.storage("DELETE", "object/generations", json={"prefixes": [path]})
    for action in ("move", "copy"):
        keys = {"sourceKey": path, "destinationKey": f"{uuid.uuid4()}.png"}
        body = {"bucketId": "generations", "destinationBucket": "inputs", **keys}
        assert client.storage("POST", f"object/{action}", json=body).status_code >= 400

    signed = user.storage("POST", f"object/sign/generations/{path}", json={"expiresIn": 60}).json()
    address = signed.get("signedURL") or signed["signedUrl"]
    response = user.download(f"generations/{path}")
    assert (response.content, response.headers["Content-Type"]) == (PNG, "image/png")
    assert httpx.get(httpx.URL(user.endpoints.storage).join(address)).content == PNG
    assert listed(user, user.id) == [name]


def test_users_put_and_replace_files_in_their_own_input_folder_only(user, stranger, stack_db, name):
    outside = [f"{stranger.id}/a.png", "a.png", f"{user.id}/%2e%2e/{stranger.id}/a.png"]
    outside += [f"{user.id}x/a.png", f"x/{user.id}/a.png", user.id]
    for path in outside:
        assert not stored(user.upload(f"inputs/{path}", PNG)), path

    stack_db.execute("update private.settings set max_input_files = 2")
    try:
        taken = [stored(user.upload(f"inputs/{user.id}/{n}.png", PNG)) for n in range(2)]
        again = user.upload(f"inputs/{user.id}/{name}", OTHER, upsert=True)
    finally:
        stack_db.execute("update private.settings set max_input_files = default")

    assert (taken, stored(again)) == ([True, False], True)
    assert user.download(f"inputs/{user.id}/{name}").content == OTHER


def test_files_a_browser_would_run_are_refused(user, operator):
    for content_type in ("text/html", "image/svg+xml", "application/javascript"):
        for bucket in ("inputs", "generations"):
            for client in (user, operator):
                path = f"{bucket}/{user.id}/page.png"
                assert not stored(client.upload(path, b"<script>", content_type))


# What is shared.


@pytest.fixture
def made(user, operator, stack_db) -> str:
    """Id of a completed generation with two images, the first with a preview, in Storage."""
    job_id = str(uuid.uuid4())
    stack_db.execute(
        "insert into public.generations (id, user_id, model_id, prompt, input, provider_input,"
        " status, finished_at, price_credits, image_count)"
        " values (%s, %s, 'darkroom/preview', 'a secret', '{}', '{}', 'completed', now(), 0, 2)",
        *(job_id, user.id),
    )
    stack_db.execute(
        "insert into public.images (generation_id, position, user_id, storage_path, preview_path,"
        " content_type, bytes) select g.id, n, g.user_id, f.path || '.png',"
        " case n when 0 then f.path || '.preview.webp' end, 'image/png', 108"
        " from public.generations as g cross join generate_series(0, 1) as n"
        " cross join lateral (select concat_ws('/', g.user_id, g.id, n) as path) as f"
        " where g.id = %s",
        job_id,
    )
    for name, kind in (("0.png", "png"), ("1.png", "png"), ("0.preview.webp", "webp")):
        path = f"generations/{user.id}/{job_id}/{name}"
        assert stored(operator.upload(path, PNG, f"image/{kind}"))
    return job_id


@pytest.mark.parametrize("end", ["unshared", "deleted"])
def test_a_shared_image_is_everybodys_to_see_until_it_is_no_longer(
    user, stranger, stack, made, end
):
    guest = user.with_token(stack.anon_key)
    folder = f"{user.id}/{made}"

    def shown_to(client: Client) -> list[dict[str, object]]:
        images = answer(client.rpc("list_public_images", "GET", page_size=100))["images"]
        return [image for image in images if image["job_id"] == made]

    answer(user.rpc("share_image", job_id=made))
    assert answer(stranger.rpc("like_image", job_id=made, image_position=0))["like_count"] == 1
    assert refusal(stranger.rpc("like_image", job_id=made, image_position=1)).status == 404
    for client in (guest, stranger):
        (shown,) = shown_to(client)
        assert (shown["position"], shown["prompt"], shown["is_own"]) == (0, None, False)
        for path in (shown["path"], shown["preview_path"]):
            assert client.download(f"generations/{path}").content == PNG
        assert not_found(client.download(f"generations/{folder}/1.png"))
        assert listed(client, folder) == ["0.png", "0.preview.webp"]
        client.upload(f"generations/{folder}/0.png", OTHER, upsert=True)
        client.storage("DELETE", "object/generations", json={"prefixes": [f"{folder}/0.png"]})

    if end == "deleted":
        answer(user.rpc("delete_generation", job_id=made))
    else:
        answer(user.rpc("share_image", job_id=made, is_public=False))

    for client in (guest, stranger):
        for name in ("0.png", "0.preview.webp", "1.png"):
            path = f"generations/{folder}/{name}"
            assert not_found(client.download(path))
            assert not_found(client.storage("POST", f"object/sign/{path}", json={"expiresIn": 60}))
        assert shown_to(client) == listed(client, folder) == []
    assert user.download(f"generations/{folder}/0.png").content == PNG
