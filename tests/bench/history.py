"""Whether a million finished generations make the calls slower that every job needs.

    python tests/bench/history.py [GENERATIONS] [ROUNDS]   # 1000000 300

Two databases in one throw-away cluster, one with that much history and one with none, are called in
turn, so that both meet the same noise. Prints the median of each call in both and its ratio, and
fails where that is above 1.5.
"""

from __future__ import annotations

import functools
import itertools
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

PROJECT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(PROJECT / "tests"), str(PROJECT / "scripts")]

from actors import User, Worker  # noqa: E402
from database import SEED, Database, Server  # noqa: E402
from psycopg.rows import namedtuple_row  # noqa: E402

from stack import Cluster, Settings  # noqa: E402

MOST = 1.5
USERS, CALLERS = 1000, 20
WAITING = 500  # jobs of others in the queue
# What Darkroom needs of Supabase.
AUTH = """
create schema auth;
create table auth.users (id uuid primary key);
create function auth.uid() returns uuid language sql stable as $$
  select nullif(current_setting('request.jwt.claim.sub', true), '')::uuid
$$;
grant usage on schema auth to public;
"""
# A year of it: one in ten failed or canceled; each claimed once.
HISTORY = """
set session_replication_role = replica;
set synchronous_commit = off;
create temporary table made as
select
  (lpad(to_hex((extract(epoch from at) * 1000)::bigint), 12, '0') || '7' || substr(hash, 1, 3)
    || '8' || substr(hash, 4, 15))::uuid as id,
  users.ids[1 + n % cardinality(users.ids)] as user_id, at, hash,
  case n % 20 when 0 then 'failed' when 1 then 'canceled' else 'completed' end as status
from generate_series(1, {count}) as n
cross join (select array_agg(id order by id) as ids from auth.users) as users
cross join lateral (
  select now() - interval '1 year' * (1 - n / {count}.0) as at, md5(n::text) as hash
) as drawn;
insert into public.generations (
  id, user_id, model_id, prompt, input, provider_input, status, error_code, error_message,
  price_credits, image_count, created_at, started_at, finished_at, updated_at
)
select
  id, user_id, 'darkroom/preview', 'a lighthouse at dusk, ' || hash,
  case when hash < '2' then jsonb_build_object('seed', hash) else '{{}}' end,
  jsonb_build_object('prompt', hash, 'seed', hash, 'width', 1024, 'height', 1024), status,
  case status when 'failed' then 'moderated' end, case status when 'failed' then 'No.' end,
  1, 1, at, at + interval '1 second', at + interval '9 seconds', at + interval '9 seconds'
from made;
insert into public.images (
  generation_id, position, user_id, storage_path, preview_path, content_type, width, height, bytes,
  blurhash, created_at
)
select
  id, 0, user_id, concat(user_id, '/', id, '/0.png'), concat(user_id, '/', id, '/0.preview.webp'),
  'image/png', 1024, 1024, 1500000, 'LEHV6nWB2yk8pyo0adR*.7kCMdnj', at
from made where status = 'completed';
insert into private.attempts (
  generation_id, token, model_id, attempt, worker_id, started_at, ended_at, outcome, error_code,
  provider_job_id, provider_seconds, cost_usd
)
select
  id, nextval('private.lease_tokens'), 'darkroom/preview', 1, 1,
  at + interval '1 second', at + interval '9 seconds',
  status, case status when 'failed' then 'moderated' end, hash, 7, 0.003
from made;
insert into public.credit_ledger (user_id, generation_id, kind, amount, balance_after, created_at)
select made.user_id, made.id, entry.kind, entry.amount, 10 + entry.amount, made.at
from made cross join lateral (
  values ('charge', -1), (case when made.status <> 'completed' then 'refund' end, 1)
) as entry (kind, amount)
where entry.kind is not null;
drop table made;
set session_replication_role = default;
vacuum analyze;
checkpoint;
"""

T = TypeVar("T")
say = functools.partial(print, file=sys.stderr, flush=True)


class Side:
    """One of the two databases, with those who call it."""

    def __init__(self, db: Database) -> None:
        self.db = db
        self.seconds: dict[str, list[float]] = defaultdict(list)
        query = "select id::text from auth.users order by id limit %s"
        ids = [row["id"] for row in db.execute(query, CALLERS + 1)]
        crowd, *callers = [User(db, user_id) for user_id in ids]
        self.callers = itertools.cycle([user.has(credits=10**6) for user in callers])
        cursor = db.connect().cursor(row_factory=namedtuple_row)
        query = "select id as job_id, user_id from public.generations tablesample bernoulli (1)"
        self.chance, self.finished = random.Random(1), cursor.execute(query).fetchall()
        self.worker, self.reader = Worker(db, slots=20), User(db, crowd.id)
        crowd.has(credits=10**6)
        for _ in range(WAITING):
            crowd.enqueue()

    def timed(self, name: str, call: Callable[..., T], *arguments: Any) -> T:
        """Call, and note how long it took."""
        began = time.perf_counter()
        answer = call(*arguments)
        self.seconds[name].append(time.perf_counter() - began)
        return answer

    def play(self) -> None:
        """Ask for as many jobs as are claimed, so the queue stays as long as it is."""
        user = next(self.callers)
        ids = [self.timed("enqueue_generation", user.enqueue)["job_id"] for _ in range(11)]
        self.timed("get_job_status, queued", user.get_job_status, ids[-1])
        self.timed("list_active_jobs", user.list_active_jobs)
        jobs = self.timed("claim_jobs(1)", self.worker.claim_jobs, 1)
        jobs += self.timed("claim_jobs(10)", self.worker.claim_jobs, 10)
        assert len(jobs) == 11
        self._look_at(jobs[0], "running")
        for job in jobs:
            self.timed("complete_job", self.worker.complete_job, job)
        self._look_at(jobs[0], "finished")
        self._look_at(self.chance.choice(self.finished or jobs), "long finished")

    def _look_at(self, job: Any, state: str) -> None:
        self.reader.id = str(job.user_id)
        self.timed(f"get_job_status, {state}", self.reader.get_job_status, str(job.job_id))

    def median(self, name: str) -> float:
        """Milliseconds."""
        return statistics.median(self.seconds[name]) * 1000


def build(server: Server, count: int) -> tuple[Side, Side]:
    """Make both databases; they differ in history alone."""
    none = server.create()
    done = none.psql(script=AUTH)
    assert done.returncode == 0, done.stderr
    none.install(SEED)
    none.lift_limits()
    none.execute(
        "insert into auth.users select private.uuid_v7() from generate_series(1, %s)", USERS
    )
    none.close()
    much = server.create(none.name)
    none, much = Database(none.url, none.name), Database(much.url, much.name)
    connection = much.connect()
    connection.execute("set statement_timeout = 0")
    for statement in filter(str.strip, HISTORY.format(count=count).split(";\n")):
        began = time.monotonic()
        connection.execute(statement.encode())
        say(f"  {' '.join(statement.split())[:50]:50} {time.monotonic() - began:6.1f} s")
    none.execute("vacuum analyze")
    return Side(none), Side(much)


def measure(server: Server, count: int, rounds: int) -> dict[str, tuple[float, float]]:
    """Return the median milliseconds of each call without and with history."""
    say(f"making {count} generations")
    none, much = build(server, count)
    for number in range(rounds + 10):
        for side in (none, much) if number % 2 else (much, none):
            side.play()
            if number == 9:
                side.seconds.clear()  # caches are warm
        if number % 50 == 0:
            say(f"round {number} of {rounds}")
    size = much.db.value("select pg_size_pretty(pg_database_size(current_database()))")
    say(f"the larger database has {size}")
    names = list(none.seconds)
    result = {name: (none.median(name), much.median(name)) for name in names}
    none.db.close()
    much.db.close()
    return result


def main(count: int = 1_000_000, rounds: int = 300) -> int:
    """Run it, print the table, and answer the exit code."""
    with tempfile.TemporaryDirectory(prefix="darkroom-bench-") as folder:
        Path(folder).chmod(0o711)
        cluster = Cluster(Path(folder), Settings(Path(folder) / "env"), fsync=False)
        try:
            cluster.start()
            medians = measure(Server(cluster), count, rounds)
        finally:
            cluster.stop()
            cluster.delete()
    print(f"{'p50 in ms':26}{'none':>8}{count:>12}{'ratio':>8}")
    for name, (none, much) in medians.items():
        print(f"{name:26}{none:8.2f}{much:12.2f}{much / none:8.2f}")
    return int(any(much / none > MOST for none, much in medians.values()))


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
