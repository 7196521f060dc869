"""Storage over HTTP: outputs belong to their owner, inputs go into the user's own folder.

What a path means is up to the Storage server; what may be read is up to our policies. So whatever
a spelling is taken for, the bytes of another user's file never come out, and nothing gets in.
"""

from __future__ import annotations

import asyncio
import io
import uuid

import httpx
import pytest
from actors import Worker
from http_client import answer
from http_fixtures import database_of

from pictures import Pictures
from worker import Settings, Storage

pytest_plugins = ["http_fixtures"]

PNG = b"\x89PNG\r\n\x1a\n" + b"mine".ljust(100)
OTHER = b"\x89PNG\r\n\x1a\n" + b"other".ljust(100)
SPELLINGS = [
    "{other}/{name}",
    "{own}/../{other}/{name}",
    "{own}/%252e%252e%252f{other}%252f{name}",
    "/{other}/{name}",
    "{OTHER}/{name}",
    "{other}/{name}%00.png",
    "..%2fgenerations%2f{other}/{name}",
]


def stored(response: httpx.Response) -> bool:
    """Say whether an upload was accepted; Storage names the reason of a refusal in its body."""
    if response.status_code == 200:
        return True
    assert response.json()["statusCode"] in {"403", "404", "415"}, response.text
    return False


@pytest.fixture
def name(user, operator) -> str:
    """Name of a file of the user's in both buckets, as the worker and the app store them."""
    name = f"{uuid.uuid4()}.png"
    for bucket, client in (("generations", operator), ("inputs", user)):
        assert stored(client.upload(f"{bucket}/{user.id}/{name}", PNG))
    return name


@pytest.mark.parametrize("bucket", ["generations", "inputs"])
def test_no_spelling_opens_changes_or_lists_anothers_file(user, stranger, nobody, name, bucket):
    ids = {"own": stranger.id, "other": user.id, "OTHER": user.id.upper()}
    for client in (stranger, nobody, user.with_token(user.token[:-2])):
        for prefix in ("", "..", "%", user.id, f"{stranger.id}/../{user.id}"):
            listed = client.storage("POST", f"object/list/{bucket}", json={"prefix": prefix})
            assert name not in listed.text, prefix
        for path in (f"{bucket}/{each.format(**ids, name=name)}" for each in SPELLINGS):
            for place in ("object", "object/authenticated", "object/public", "object/info"):
                read = client.storage("GET", f"{place}/{path}")
                assert read.status_code >= 400 and PNG not in read.content
            signed = client.storage("POST", f"object/sign/{path}", json={"expiresIn": 60})
            assert signed.status_code >= 400
            client.upload(path, OTHER, upsert=True)
            client.storage("DELETE", f"object/{path}")
        keys = {"sourceKey": f"{user.id}/{name}", "destinationKey": f"{stranger.id}/{name}"}
        for action in ("move", "copy"):
            body = {"bucketId": bucket, "destinationBucket": "inputs", **keys}
            assert client.storage("POST", f"object/{action}", json=body).status_code >= 400

    path = f"{bucket}/{user.id}/{name}"
    assert user.download(path).content == PNG
    address = answer(user.storage("POST", f"object/sign/{path}", json={"expiresIn": 60}))
    assert httpx.get(user.endpoints.storage + address["signedURL"]).content == PNG
    if bucket == "generations":
        assert not stored(user.upload(path, OTHER, upsert=True)), "the worker alone writes them"
        user.storage("DELETE", f"object/{path}")
        assert user.download(path).content == PNG


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


@pytest.mark.parametrize("name", ["a.png", "mein Bild (1).png", "望舌.png", "a&b=c@d+e,f;g:h!$*'"])
@pytest.mark.parametrize("bucket", ["inputs", "generations"])
def test_whatever_a_source_is_named_the_worker_downloads_it_and_its_address_opens_it(
    user, operator, stack, bucket, name
):
    path = f"{bucket}/{user.id}/{name}"
    assert stored(operator.upload(path, PNG))
    environment = {
        "DATABASE_URL": stack.worker_database_url,
        "SUPABASE_URL": stack.api_url,
        "SUPABASE_SERVICE_KEY": stack.service_role_key,
    }

    async def downloaded_and_signed() -> tuple[bytes, str]:
        file = io.BytesIO()
        async with httpx.AsyncClient() as http:
            storage = Storage(Settings(environment), http, Pictures())
            await storage.fetch(path, file)
            return file.getvalue(), await storage.sign(path, 60)

    downloaded, address = asyncio.run(downloaded_and_signed())

    assert downloaded == httpx.get(address).content == PNG


@pytest.mark.parametrize("end", ["unshared", "deleted"])
def test_a_shared_image_is_everybodys_to_see_until_it_is_no_longer(
    user, operator, stack, stack_db, end
):
    job_id, worker = user.enqueued(), Worker(database_of(user, stack_db))
    (job,) = [each for each in worker.claim_jobs(100) if each.id == job_id]
    worker.complete_job(job)
    worker.unregister_worker()
    path, guest = f"generations/{user.id}/{job_id}/0.png", user.with_token(stack.anon_key)
    assert stored(operator.upload(path, PNG))
    answer(user.rpc("share_image", job_id=job_id))
    assert guest.download(path).content == PNG

    if end == "deleted":
        answer(user.rpc("delete_generation", job_id=job_id))
    else:
        answer(user.rpc("share_image", job_id=job_id, is_public=False))

    assert guest.download(path).status_code == 400
    assert user.download(path).content == PNG
