"""Who calls over HTTP: somebody signed up, somebody who is not, the operator's backend.

The HTTP counterpart of actors.py: a thin client that adds the token and returns httpx's response.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any

import httpx

PREVIEW = "darkroom/preview"
PASSWORD = "correct horse battery staple"


@dataclass(frozen=True)
class Endpoints:
    """Where the parts of the API are. `rest` may be another server than the rest."""

    http: httpx.Client
    auth: str
    rest: str
    storage: str


class Client:
    def __init__(self, endpoints: Endpoints, token: str | None = None) -> None:
        self.endpoints = endpoints
        self.token = token

    def with_token(self, token: str) -> Client:
        return Client(self.endpoints, token)

    def rpc(self, function: str, method: str = "POST", **arguments: Any) -> httpx.Response:
        where = "json" if method == "POST" else "params"
        return self.rest(method, f"rpc/{function}", **{where: arguments})

    def rest(self, method: str, path: str, **request: Any) -> httpx.Response:
        return self._send(method, f"{self.endpoints.rest}/{path}", **request)

    # Paths of files begin with their bucket.

    def storage(self, method: str, path: str, **request: Any) -> httpx.Response:
        return self._send(method, f"{self.endpoints.storage}/{path}", **request)

    def download(self, path: str) -> httpx.Response:
        return self.storage("GET", f"object/{path}")

    def upload(
        self, path: str, content: bytes, content_type: str = "image/png", *, upsert: bool = False
    ) -> httpx.Response:
        headers = {"Content-Type": content_type, "x-upsert": str(upsert).lower()}
        return self.storage("POST", f"object/{path}", content=content, headers=headers)

    def _send(
        self, method: str, url: str, headers: dict[str, str] | None = None, **request: Any
    ) -> httpx.Response:
        credentials = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        return self.endpoints.http.request(
            method, url, headers=credentials | (headers or {}), **request
        )


class SignedUp(Client):
    """A new user, with the token that sign-up answered."""

    def __init__(self, endpoints: Endpoints) -> None:
        account = {"email": f"{uuid.uuid4()}@example.com", "password": PASSWORD}
        response = endpoints.http.post(f"{endpoints.auth}/signup", json=account)
        assert response.status_code == 200, response.text
        super().__init__(endpoints, response.json()["access_token"])
        self.id = str(response.json()["user"]["id"])

    def enqueue(
        self, prompt: str = "a lighthouse at dusk", model: str = PREVIEW, **rest: Any
    ) -> httpx.Response:
        return self.rpc("enqueue_generation", model=model, prompt=prompt, **rest)

    def enqueued(self, *arguments: Any, **rest: Any) -> str:
        return str(answer(self.enqueue(*arguments, **rest))["job_id"])

    def get_job_status(self, job_id: str, method: str = "POST") -> httpx.Response:
        return self.rpc("get_job_status", method, job_id=job_id)

    def credits(self) -> int:
        return int(answer(self.rpc("get_entitlement"))["credits"])

    def ledger(self) -> list[tuple[str, int]]:
        entries = answer(self.rest("GET", "credit_ledger?select=kind,amount&order=id"))
        return [(entry["kind"], entry["amount"]) for entry in entries]


@dataclass(frozen=True)
class Refusal:
    """An error as PostgREST's clients see it."""

    status: int
    code: str
    message: str
    details: str | None
    hint: str | None


def answer(response: httpx.Response) -> Any:
    assert response.status_code == 200, f"{response.status_code} {response.text}"
    return response.json()


def refusal(response: httpx.Response) -> Refusal:
    """Return how a call was refused; the body must have PostgREST's four fields."""
    assert response.status_code >= 400, f"not refused: {response.text}"
    return Refusal(response.status_code, **response.json())
