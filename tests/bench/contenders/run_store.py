"""Downloads, checks and stores images all at once, as a worker does, and prints its peak in MB.

PROGRAM URL JOBS KIND ...    the server of the files, how many, and their names in turn
"""

from __future__ import annotations

import asyncio
import itertools
import sys
import uuid
from types import SimpleNamespace

import httpx
from protocol import resident_megabytes

import worker

MEGABYTE = 2**20


async def store_all(url: str, jobs: int, kinds: list[str]) -> None:
    """What a worker with this many slots does, once all its predictions end at the same moment."""
    async with httpx.AsyncClient(timeout=worker.HTTP_TIMEOUT) as http:
        replicate = worker.Replicate(http, url, "token")
        environment = {"DATABASE_URL": "postgresql://", "SUPABASE_SERVICE_KEY": "key"}
        settings = worker.Settings(environment | {"SUPABASE_URL": url})
        storage = worker.Storage(settings, http, worker.Pictures())
        stored = await asyncio.gather(
            *(
                storage.store(
                    SimpleNamespace(user_id=uuid.uuid4(), job_id=uuid.uuid4()),  # type: ignore[arg-type]
                    0,
                    replicate.read(f"{url}/{kind}"),
                )
                for kind in itertools.islice(itertools.cycle(kinds), jobs)
            )
        )
    assert all(image["bytes"] > 18 * MEGABYTE for image in stored)


if __name__ == "__main__":
    asyncio.run(store_all(sys.argv[1], int(sys.argv[2]), sys.argv[3:]))
    print(resident_megabytes("VmHWM"))
