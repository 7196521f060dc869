"""How a worker gets over what went wrong around it, as the chaos runs found it wanting."""

from __future__ import annotations

import asyncio
from urllib.parse import urlsplit

from chaos.proxy import Proxy

import worker


def test_a_dead_workers_job_is_in_other_hands_within_75_seconds(db):
    settings = db.row("select lease, retry_base from private.settings")
    backstop = worker.Settings(
        {
            "DATABASE_URL": "postgresql://localhost",
            "SUPABASE_URL": "http://localhost",
            "SUPABASE_SERVICE_KEY": "key",
        }
    ).poll_seconds

    seconds = settings["lease"].total_seconds() + settings["retry_base"].total_seconds()

    assert seconds + worker.RECOVERY_SECONDS + backstop < 75


def test_a_call_into_a_half_open_connection_is_made_again(db, stack, monkeypatch):
    """Seven seconds: for five of them psycopg tries to cancel."""
    address = urlsplit(stack.worker_database_url)

    async def calls(url: str, proxy: Proxy) -> int:
        database = worker.Database(url)
        await database.pool.open(wait=True)
        await database.call("recover_stale_jobs")
        monkeypatch.setattr(worker, "CALL_SECONDS", 2.0)
        proxy.half_open()
        rows = await database.insist("recover_stale_jobs")
        await database.pool.close()
        return int(rows[0]["recover_stale_jobs"])

    with Proxy(lambda: ("127.0.0.1", address.port or 0)) as proxy:
        netloc = f"{address.username}:{address.password}@127.0.0.1:{proxy.port}"
        url = address._replace(netloc=netloc, path=urlsplit(db.url).path).geturl()
        assert asyncio.run(asyncio.wait_for(calls(url, proxy), 60)) == 0
