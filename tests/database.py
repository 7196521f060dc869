"""A database of a test's own, seen from behind the functions: given-steps, time, and the books."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
from psycopg import sql
from psycopg.rows import dict_row

from stack import Cluster, postgres_program

PROJECT = Path(__file__).resolve().parents[1]
SQL_FILES = sorted((PROJECT / "sql").glob("[0-9]*.sql"))
HANG_ENDS = "-c statement_timeout=60s"
SEED = PROJECT / "supabase" / "seed.sql"


class Server:
    """The session's cluster: makes databases from templates and drops them."""

    def __init__(self, cluster: Cluster) -> None:
        self.url = cluster.url()
        self._admin = psycopg.connect(self.url, autocommit=True)
        self._numbers = itertools.count(1)
        self._closing: list[str] = []

    def create(self, template: str = "template0") -> Database:
        """Make a database like the template: copied in memory, not written to the log as well."""
        name = f"test_{next(self._numbers)}"
        query = sql.SQL("create database {} template {} strategy file_copy")
        self._admin.execute(query.format(sql.Identifier(name), sql.Identifier(template)))
        return Database(urlsplit(self.url)._replace(path=f"/{name}").geturl(), name)

    def drop(self, database: Database) -> None:
        """Close what a test left open and drop its database: at the next call, when all are gone.

        A connection takes a moment to end, and the server would look for that once in 100 ms.
        """
        database.close()
        for name in self._closing:
            query = sql.SQL("drop database {} with (force)")
            self._admin.execute(query.format(sql.Identifier(name)))
        self._closing = [database.name]

    def close(self) -> None:
        self._admin.close()


class Database:
    """One database as its superuser."""

    def __init__(self, url: str, name: str) -> None:
        self.url = url
        self.name = name
        self._connections: list[psycopg.Connection[Any]] = []
        self._own: psycopg.Connection[Any] | None = None

    def connect(self) -> psycopg.Connection[Any]:
        connection = psycopg.connect(self.url, autocommit=True, options=HANG_ENDS)
        self._connections.append(connection)
        return connection

    def close(self) -> None:
        for connection in self._connections:
            connection.close()

    def execute(self, query: str, *arguments: Any) -> list[dict[str, Any]]:
        self._own = self._own or self.connect()
        cursor = self._own.cursor(row_factory=dict_row)
        cursor.execute(query, arguments or None)
        if cursor.description:
            return cursor.fetchall()
        # `select from …` has rows, too, without columns.
        return [{}] * cursor.rowcount if (cursor.statusmessage or "").startswith("SELECT") else []

    def row(self, query: str, *arguments: Any) -> dict[str, Any]:
        (row,) = self.execute(query, *arguments)
        return row

    def value(self, query: str, *arguments: Any) -> Any:
        (value,) = self.row(query, *arguments).values()
        return value

    def psql(self, *files: Path, script: str = "") -> subprocess.CompletedProcess[str]:
        """Run files, then a script, with plain psql in one transaction; stop at the first error."""
        text = "\n".join([file.read_text() for file in files] + [script])
        return subprocess.run(
            [str(postgres_program("psql")), self.url, "-qX1", "-v", "ON_ERROR_STOP=1"],
            input=text,
            capture_output=True,
            text=True,
            check=False,
        )

    def runs_at(self, provider: str, base_url: str, settle: str = "20 seconds") -> None:
        """Have a provider be elsewhere, and lost creates be looked for that long."""
        query = "update private.providers set base_url = %s, settle = %s where name = %s"
        self.execute(query, base_url, settle, provider)

    def buys_previews(self, as_of: str = "replicate", **changes: Any) -> None:
        """Have the pictures of the preview be made by a provider, with columns of its row changed.

        So what is bought can be tested with the model that every test has.
        """
        names = ("base_url", "hosts", "key_hosts", "settle", "lost_create", "buys_again", "recipe")
        self.execute(
            f"update private.providers as p set ({', '.join(names)}) ="
            f" (select {', '.join('o.' + n for n in names)} from private.providers as o"
            "   where o.name = %s) where p.name = 'preview'",
            as_of,
        )
        for column, value in changes.items():
            query = sql.SQL("update private.providers set {} = %s where name = 'preview'")
            self._own.execute(query.format(sql.Identifier(column)), [value])

    def install(self, *files: Path) -> str:
        """Build Darkroom from `sql/`, then run more files; return the notices."""
        done = self.psql(*SQL_FILES, *files)
        assert done.returncode == 0, done.stderr
        return done.stderr

    def dump(self, *options: str) -> str:
        """Return the schema as pg_dump writes it, comments and privileges included."""
        command = [str(postgres_program("pg_dump")), self.url, "--schema-only", *options]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return "\n".join(
            line
            for line in text.splitlines()
            if not line.startswith(("\\restrict", "\\unrestrict"))
        )

    def objects(self) -> dict[str, list[str]]:
        """Return what each part of the schema is, comments and privileges included.

        The order of a table's columns and of grants is no part of it: what came later stands last.
        """
        found = {}
        for part in self.dump("--exclude-schema=supabase_migrations").split("\n--\n-- Name: ")[1:]:
            name, _, definition = part.partition("\n--\n\n")
            lines = [line for line in definition.splitlines() if line]
            if "; Type: TABLE;" in name or "; Type: ACL;" in name:
                lines = sorted(line.removesuffix(",") for line in lines)
            found[name] = lines
        return found

    def lift_limits(self) -> None:
        self.execute(
            "update private.plans set max_active = 1000000, max_per_minute = 1000000,"
            " max_burned_per_day = 1000000"
        )

    def pass_time(self, interval: str) -> None:
        """Let time pass without waiting: everything on record moves into the past by as much."""
        columns = self.execute(
            "select c.table_schema, c.table_name, array_agg(c.column_name::text) as names"
            " from information_schema.columns as c"
            " inner join information_schema.tables as t using (table_schema, table_name)"
            " where c.table_schema in ('public', 'private') and t.table_type = 'BASE TABLE'"
            " and not exists (select from pg_inherits as i"  # partitions move with their table
            "   where i.inhrelid = format('%I.%I', c.table_schema, c.table_name)::regclass)"
            " and c.data_type = 'timestamp with time zone' group by 1, 2"
        )
        assert self._own
        with self._own.transaction():
            self.execute("set local session_replication_role = replica")  # no triggers: no change
            for table in columns:
                name = sql.Identifier(table["table_schema"], table["table_name"])
                shifted = [
                    sql.SQL("{0} = {0} - %s::interval").format(sql.Identifier(column))
                    for column in table["names"]
                ]
                change = sql.SQL("update {} set {}").format(name, sql.SQL(", ").join(shifted))
                self._own.execute(change, [interval] * len(shifted))

    def snapshot(self) -> dict[str, list[str]]:
        """Return every row of every table of ours, but for what pg_cron renews each minute."""
        tables = self.execute(
            "select format('%I.%I', schemaname, tablename) as name from pg_tables"
            " where schemaname in ('public', 'private')"
            " and tablename not in ('routines', 'plans', 'retention_walks') order by 1"
        )
        renewed = "'{{part,part_usd}}'::text[]"  # before cells
        query = f"select (to_jsonb(t) - {renewed})::text as text from {{}} as t order by 1"
        names = [table["name"] for table in tables]
        return {name: [row["text"] for row in self.execute(query.format(name))] for name in names}

    def wait_for_lock(self, waiting: psycopg.Connection[Any], seconds: float = 10) -> None:
        """Return as soon as another connection waits for a lock."""
        deadline = time.monotonic() + seconds
        query = "select wait_event_type = 'Lock' from pg_stat_activity where pid = %s"
        while not self.value(query, waiting.info.backend_pid):
            assert time.monotonic() < deadline, "it never waited for a lock"
            time.sleep(0.005)


def memory(pid: int, what: str) -> int:
    """Return what a server process holds (VmRSS) or has held at most (VmHWM), in bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(rf"{what}:\s+(\d+) kB", status)[1]) * 1024


def cost(pids: list[int], call: Callable[[], object]) -> tuple[float, int]:
    """Return the seconds of a core that a call takes of these processes, and the bytes that one
    of them grew by meanwhile. Of a core: what else the machine does is no part of them.
    """
    for pid in pids:
        Path(f"/proc/{pid}/clear_refs").write_text("5")  # what it has held at most, begins anew
    held, used = {pid: memory(pid, "VmRSS") for pid in pids}, sum(map(seconds_of_a_core, pids))
    call()
    seconds = sum(map(seconds_of_a_core, pids)) - used
    return seconds, max(memory(pid, "VmHWM") - held[pid] for pid in pids)


def seconds_of_a_core(pid: int) -> float:
    """Return what a process has used so far, in steps of 10 ms."""
    _, _, fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")
    user, system = fields.split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def unchanged(db: Database) -> Iterator[None]:
    before = db.snapshot()
    yield
    after = db.snapshot()
    assert {t: set(after[t]) ^ set(before[t]) for t in after if after[t] != before[t]} == {}


def assert_books_balance(db: Database) -> None:
    """Assert what must hold for money and places at every moment between transactions."""
    assert db.execute(BOOKS) == []
    broken = db.execute("select * from private.broken_books")
    assert broken == [], broken


# What breaks a rule, told without any function of ours; the rest is private.broken_books.
BOOKS = """
select 'balance = sum of the ledger >= 0' as rule, e.user_id as id
from public.entitlements as e
where e.credits < 0 or e.credits <> (
  select coalesce(sum(l.amount), 0) from public.credit_ledger as l
  where l.user_id = e.user_id and l.id > e.ledger_after
)
union all
select 'debt = sum of its entries >= 0, of who has no credits', e.user_id
from public.entitlements as e
where e.debt < 0 or e.debt > 0 and e.credits > 0 or e.debt <> (
  select coalesce(sum(l.debt), 0) from public.credit_ledger as l
  where l.user_id = e.user_id and l.id > e.ledger_after
)
union all
select 'a bucket has the sum of its entries', b.user_id
from private.credit_buckets as b
where b.credits <> (select sum(l.amount) from public.credit_ledger as l where l.bucket_id = b.id)
union all
select 'no more goes back into a bucket than came from it', l.generation_id
from public.credit_ledger as l
where l.generation_id is not null
group by l.generation_id, l.bucket_id having sum(l.amount - l.debt) > 0
union all
select 'refunded once, what was charged but not made', g.id
from public.generations as g
where (
  select sum(l.amount - l.debt) from public.credit_ledger as l
  where l.generation_id = g.id and l.kind = 'refund'
) is distinct from (
  select case
    when g.status in ('failed', 'canceled')
      then ceil(g.price_credits * coalesce(g.refund_percent, 100) / 100.0)::integer
    when g.status = 'completed' and count(*) < g.image_count
      then g.price_credits / g.image_count * (g.image_count - count(*)::integer)
  end
  from public.images as i where i.generation_id = g.id
)
union all
select 'images exactly where completed', g.id
from public.generations as g
where (g.status = 'completed')
  <> exists (select from public.images as i where i.generation_id = g.id)
"""

# Who may do what with each object of the schemas public and private.
GRANTS = """
select format('%s.%s', n.nspname, o.name) as object, r.rolname as role, a.privilege_type
from (
  select
    relname as name, relnamespace as schema, relacl as acl, 'r'::"char" as kind,
    relowner as owner
  from pg_class where relkind in ('r', 'S', 'v')
  union all
  select oid::regprocedure::text, pronamespace, proacl, 'f', proowner from pg_proc
  union all
  select oid::regtype::text, typnamespace, typacl, 'T', typowner from pg_type where typtype = 'd'
) as o
inner join pg_namespace as n on n.oid = o.schema and n.nspname in ('public', 'private')
cross join aclexplode(coalesce(o.acl, acldefault(o.kind, o.owner))) as a
left join pg_roles as r on r.oid = a.grantee
order by 1, 2, 3
"""
