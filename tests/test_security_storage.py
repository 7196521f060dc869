"""Storage attacked by address: other users' folders by every spelling, lists, and signed addresses.

What a path means is up to the Storage server; what may be read is up to our policies. So whatever
a spelling is taken for, the bytes of another user's file never come out, and nothing gets in.
"""

from __future__ import annotations

import uuid

import httpx
import pytest
from http_client import Client, SignedUp

pytest_plugins = ["http_fixtures"]

MINE = b"\x89PNG\r\n\x1a\n" + b"theirs".ljust(100)
PLANTED = b"\x89PNG\r\n\x1a\n" + b"planted".ljust(100)
SPELLINGS = [
    "{own}/../{other}/{name}",
    "{own}/..%2f{other}/{name}",
    "{own}/%2e%2e/{other}/{name}",
    "{own}/%2e%2e%2f{other}%2f{name}",
    "{own}/%252e%252e%252f{other}%252f{name}",
    "{own}/..%5c{other}%5c{name}",
    "{own}%2f..%2f{other}/{name}",
    "{own}//../{other}/{name}",
    "/{other}/{name}",
    "./{other}/{name}",
    "%2f{other}/{name}",
    "{OTHER}/{name}",
    "{other}%00/{name}",
    "{other}/{name}%00.png",
    "{other}/{name}?token={own}",
    "{other}/{name};{own}/a.png",
    "..%2fgenerations%2f{other}/{name}",
    "{own}/..;/{other}/{name}",
]


@pytest.fixture
def name(operator: Client, user: SignedUp) -> str:
    """A file of the user's in both buckets, whose name nobody needs to guess."""
    name = f"{uuid.uuid4()}.png"
    for bucket in ("generations", "inputs"):
        assert operator.upload(f"{bucket}/{user.id}/{name}", MINE).status_code == 200
    return name


def send(client: Client, method: str, path: str, **request: object) -> httpx.Response | None:
    """Send a request with the path as it is written; None if it can not even be sent."""
    try:
        return client.storage(method, path, **request)
    except httpx.InvalidURL:
        return None


def spelled(spelling: str, owner: SignedUp, attacker: SignedUp, name: str) -> str:
    return spelling.format(own=attacker.id, other=owner.id, OTHER=owner.id.upper(), name=name)


def attack(client: Client, path: str) -> None:
    """Read a file in every way there is, then overwrite and delete it; nothing may be read."""
    for place in ("object", "object/authenticated", "object/public", "object/info"):
        response = send(client, "GET", f"{place}/{path}")
        assert response is None or (response.status_code >= 400 and MINE not in response.content)
    signed = send(client, "POST", f"object/sign/{path}", json={"expiresIn": 60})
    assert signed is None or signed.status_code >= 400
    send(client, "POST", f"object/{path}", content=PLANTED, headers={"x-upsert": "true"})
    send(client, "DELETE", f"object/{path}")


@pytest.mark.parametrize("bucket", ["generations", "inputs"])
def test_no_spelling_opens_or_changes_anothers_file(user, stranger, nobody, name, bucket):
    for spelling in SPELLINGS:
        for client in (stranger, nobody):
            attack(client, f"{bucket}/{spelled(spelling, user, stranger, name)}")

        assert user.download(f"{bucket}/{user.id}/{name}").content == MINE, spelling


@pytest.mark.parametrize("bucket", ["generations", "inputs"])
def test_no_prefix_lists_anothers_files(user, stranger, nobody, name, bucket):
    for spelling in ("", "/", ".", "..", "%", "_", "*", "{other}", "{other}/", "{own}/../{other}"):
        prefix = spelled(spelling, user, stranger, name)
        for client in (stranger, nobody):
            for query in ({"prefix": prefix}, {"prefix": prefix, "search": name, "limit": 1000}):
                response = client.storage("POST", f"object/list/{bucket}", json=query)
                assert name not in response.text, spelling


@pytest.mark.parametrize("action", ["copy", "move"])
def test_anothers_file_is_not_taken_by_a_copy_or_a_move(user, stranger, name, action):
    for source in ("generations", "inputs"):
        keys = {"sourceKey": f"{user.id}/{name}", "destinationKey": f"{stranger.id}/{name}"}
        body = {"bucketId": source, "destinationBucket": "inputs", **keys}
        assert stranger.storage("POST", f"object/{action}", json=body).status_code >= 400

        assert stranger.download(f"inputs/{stranger.id}/{name}").status_code >= 400
        assert user.download(f"{source}/{user.id}/{name}").content == MINE


def test_a_signed_address_opens_its_own_file_only(user, stranger, name):
    own = f"inputs/{stranger.id}/own.png"
    assert stranger.upload(own, PLANTED).status_code == 200
    signed = stranger.storage("POST", f"object/sign/{own}", json={"expiresIn": 60}).json()
    url = httpx.URL(stranger.endpoints.storage).join(signed.get("signedURL") or signed["signedUrl"])
    other = str(url).replace(own, f"inputs/{user.id}/{name}")

    assert httpx.get(url).content == PLANTED
    assert httpx.get(other).content != MINE
    assert httpx.get(str(url).replace("own.png", f"..%2f{user.id}%2f{name}")).content != MINE
