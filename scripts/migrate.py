"""Apply `supabase/migrations` and the seed to a database: show what will be done, ask, do it.

Needs no Node and no Docker, but leaves what the Supabase CLI leaves: a row for each migration in
supabase_migrations.schema_migrations, and the seed's hash in seed_files. Either tool goes on where
the other one stopped. Each migration is one transaction, its row included.

Errors begin with a stable token: cannot_connect, server_too_old, missing_auth, missing_pg_cron,
role_lacks_rights, not_recorded, unknown_migration, changed_migration, out_of_order, bad_credits,
confirmation_needed, locked, migration_failed, database_error. Exit codes: 0 done or nothing to do,
1 an error, 2 not confirmed.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql

from worker import libpq_url

SUPABASE = Path(__file__).resolve().parents[1] / "supabase"
SEED = SUPABASE / "seed.sql"
OLDEST_SERVER = 15
PUBLICATION = "supabase_realtime"
WELCOME_CREDITS = 10  # the default of private.settings

# As the Supabase CLI makes them.
HISTORY = """
create schema if not exists supabase_migrations;
create table if not exists supabase_migrations.schema_migrations (
  version text not null primary key
);
alter table supabase_migrations.schema_migrations add column if not exists statements text[];
alter table supabase_migrations.schema_migrations add column if not exists name text;
create table if not exists supabase_migrations.seed_files (
  path text not null primary key, hash text not null
);
"""


class MigrateError(Exception):
    """Why nothing (more) was done: a stable token, then words."""


@dataclass(frozen=True)
class Migration:
    """A file of supabase/migrations: <version>_<name>.sql."""

    version: str
    name: str
    text: str

    def __str__(self) -> str:
        return f"{self.version}_{self.name}"

    def differs_from(self, statements: list[str] | None) -> bool:
        """Whether something else was applied; the CLI keeps each statement without its semicolon.

        The first edition was one migration of this name, and the row of who upgraded it stays.
        """
        text = "".join(statements or [])
        is_first_edition = self.name == "create_darkroom" and "private.purchases" not in text
        return not is_first_edition and squeeze(text) not in ("", squeeze(self.text))


def squeeze(text: str) -> str:
    return re.sub(r"[\s;]", "", text)


def read_migrations() -> list[Migration]:
    """Return all there are, oldest first."""
    files = sorted((SUPABASE / "migrations").glob("*.sql"))
    names = [file.stem.partition("_") for file in files]
    return [
        Migration(version, name, file.read_text())
        for (version, _, name), file in zip(names, files, strict=True)
    ]


class Target:
    """The database to migrate."""

    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        self.connection = connection
        self.seed_hash = hashlib.sha256(SEED.read_bytes()).hexdigest()
        self.seed_path = f"supabase/{SEED.name}"

    def value(self, query: str, *arguments: Any) -> Any:
        """Return the one value of a query."""
        row = self.connection.execute(query, arguments or None).fetchone()
        return row[0] if row else None

    def has(self, table: str) -> bool:
        """Whether there is such a table, also where this role may not look."""
        query = "select exists (select from pg_tables where schemaname = %s and tablename = %s)"
        return bool(self.value(query, *table.split(".")))

    def describe(self) -> Iterator[tuple[str, str]]:
        """Yield what this database is, a title and a text for each line."""
        info = self.connection.info
        version = self.value("show server_version").split()[0]
        yield "server", f"PostgreSQL {version} at {info.host}:{info.port}"
        yield "database", info.dbname
        yield "role", info.user + (" (superuser)" if self.is_superuser() else "")
        query = "select string_agg(extname || ' ' || extversion, ', ' order by 1) from pg_extension"
        yield "extensions", self.value(query)
        yield "pg_cron", "for this database" if self.wants_cron() else "no: workers do its work"
        filled = self.filled_tables()
        more = f" and {len(filled) - 4} more" if len(filled) > 4 else ""
        yield "data", f"rows in {', '.join(filled[:4])}{more}" if filled else "none"

    def is_superuser(self) -> bool:
        return bool(self.value("select rolsuper from pg_roles where rolname = current_user"))

    def wants_cron(self) -> bool:
        """Whether the migration will make cron jobs: sql/90_schedule.sql asks the same."""
        query = (
            "select setting = current_database() from pg_settings where name = 'cron.database_name'"
        )
        return bool(self.value(query))

    def filled_tables(self) -> list[str]:
        """Return the tables that hold rows this role can see, but for what every server has."""
        tables = self.connection.execute(
            "select schemaname, tablename from pg_tables"
            " where schemaname not in"
            " ('pg_catalog', 'information_schema', 'cron', 'supabase_migrations')"
            " and (schemaname <> 'auth' or tablename = 'users')"
            " and has_table_privilege(format('%I.%I', schemaname, tablename), 'select')"
            " and has_schema_privilege(schemaname, 'usage') order by 1, 2"
        ).fetchall()
        exists = sql.SQL("select exists (select from {})")
        return [
            f"{schema}.{table}"
            for schema, table in tables
            if self.connection.execute(exists.format(sql.Identifier(schema, table))).fetchone()
            == (True,)
        ]

    def applied(self) -> dict[str, list[str] | None]:
        """Return the recorded migrations: version -> statements."""
        if not self.has("supabase_migrations.schema_migrations"):
            return {}
        query = "select version, statements from supabase_migrations.schema_migrations order by 1"
        return dict(self.connection.execute(query).fetchall())

    def wants_seed(self) -> bool:
        """Whether this seed was not yet run here."""
        if not (self.has("supabase_migrations.seed_files") and self.has("public.models")):
            return True
        query = "select hash from supabase_migrations.seed_files where path = %s"
        return bool(self.value(query, self.seed_path) != self.seed_hash)

    def outside(self, welcome_credits: int) -> Iterator[tuple[str, str]]:
        """Yield what an installation makes that is not in schemas of its own."""
        triggers = "create_entitlement, follow_user, lock_jobs, delete_entitlement"
        yield "outside", "roles darkroom_worker, darkroom_monitor, and those of the API not there"
        yield "outside", f"triggers on auth.users: darkroom_{triggers.replace(', ', ', darkroom_')}"
        if self.has("storage.objects"):
            yield "outside", "policies on storage.objects (6), and buckets generations and inputs"
        if self.has("realtime.messages"):
            yield "outside", "a policy on realtime.messages"
        if self.value("select exists (select from pg_publication where pubname = %s)", PUBLICATION):
            yield "outside", f"public.generations in publication {PUBLICATION}"
        if self.wants_cron():
            yield "outside", "extension pg_cron, and its jobs darkroom_* (5)"
        there = "those who are there"
        if self.value("select has_table_privilege('auth.users', 'select')"):
            users = self.value("select count(*) from auth.users")
            there = f"the {users} who are there: {users * welcome_credits}"
        each = f"{welcome_credits} for each new user"
        yield "credits", f"{each}, and for {there}; WELCOME_CREDITS=… changes that"

    def refuse_unfit(self) -> None:
        """Raise MigrateError if the migration could not succeed here."""
        if self.connection.info.server_version // 10000 < OLDEST_SERVER:
            raise MigrateError(f"server_too_old: PostgreSQL {OLDEST_SERVER} or later is needed")
        if not self.has("auth.users"):
            raise MigrateError(
                "missing_auth: there is no auth.users: start Supabase Auth (GoTrue) on it first"
            )
        cron = "select count(*) from pg_available_extensions where name = 'pg_cron'"
        if self.wants_cron() and not self.value(cron):
            raise MigrateError(
                "missing_pg_cron: cron.database_name names this database, and the extension is not"
                " installed on the server (on Debian: postgresql-15-cron)"
            )
        if lacking := self.lacking_rights():
            raise MigrateError(f"role_lacks_rights: {'; '.join(lacking)}")

    def lacking_rights(self) -> list[str]:
        """Return what this role must be allowed and is not."""
        rights = {
            "CREATE on the database": "has_database_privilege(current_database(), 'create')",
            "CREATE on schema public": "has_schema_privilege('public', 'create')",
            "USAGE on schema auth": "has_schema_privilege('auth', 'usage')",
            "CREATEROLE": "(select rolcreaterole or rolsuper from pg_roles"
            " where rolname = current_user)",
        }
        return [name for name, test in rights.items() if not self.value(f"select {test}")]

    def apply(self, migration: Migration) -> None:
        """Apply one migration and record it, or do neither."""
        record = (
            "insert into supabase_migrations.schema_migrations (version, name, statements)"
            " values (%s, %s, %s)"
        )
        values = (migration.version, migration.name, [migration.text])
        self._run(str(migration), migration.text, record, values)

    def seed(self) -> None:
        """Run the seed and record it, or do neither."""
        record = (
            "insert into supabase_migrations.seed_files (path, hash) values (%s, %s)"
            " on conflict (path) do update set hash = excluded.hash"
        )
        self._run(self.seed_path, SEED.read_text(), record, (self.seed_path, self.seed_hash))

    def _run(self, name: str, script: str, record: str, values: tuple[Any, ...]) -> None:
        try:
            with self.connection.transaction():
                self.connection.execute(HISTORY.encode())
                self.connection.execute(record.encode(), values)
                self.connection.execute(script.encode())
        except psycopg.errors.InsufficientPrivilege as error:
            raise MigrateError(f"role_lacks_rights: {name}: {told(error)}") from None
        except psycopg.errors.LockNotAvailable as error:
            raise MigrateError(
                f"locked: {name}: {told(error)}. A long transaction holds a table that others need;"
                " nothing was changed: end it, or try again at a quieter time"
            ) from None
        except psycopg.Error as error:
            raise MigrateError(f"migration_failed: {name}: {told(error)}") from None


def told(error: psycopg.Error) -> str:
    """Return what the server says in one line, with its hint."""
    said = [error.diag.message_primary or str(error), error.diag.message_hint]
    return ". ".join(" ".join(each.split()) for each in said if each)


def pass_on(notice: psycopg.errors.Diagnostic) -> None:
    """Print what the migration itself says; the server's own notices are about nothing."""
    text = notice.message_primary or ""
    if text.startswith("Darkroom: "):
        print(f"{'notice':11} {text}")


def plan(target: Target, migrations: list[Migration]) -> list[Migration]:
    """Return what is to be applied. Raises MigrateError where that cannot be known."""
    applied = target.applied()
    if unknown := sorted(applied.keys() - {each.version for each in migrations}):
        raise MigrateError(
            f"unknown_migration: {', '.join(unknown)} was applied and has no file here. This"
            " checkout is older than the database, or the history is another project's: then"
            " copy supabase/migrations there"
        )
    if changed := [m for m in migrations if m.differs_from(applied.get(m.version))]:
        raise MigrateError(
            f"changed_migration: {', '.join(map(str, changed))} changed after it was applied here."
            " Bring the file back, as by git checkout, and put the change into a new one: make"
            " migration NAME=what_changes. If the database is what the file says already, record"
            f" it: npx supabase migration repair --status applied {changed[0].version}"
        )
    pending = [each for each in migrations if each.version not in applied]
    if pending and applied and pending[0].version < max(applied):
        raise MigrateError(f"out_of_order: {pending[0]} is older than what was applied last")
    if migrations[0] in pending and target.has("private.settings"):
        is_first_edition = not target.has("private.purchases")  # which was in one migration
        there = [each.version for each in (pending[:1] if is_first_edition else pending)]
        raise MigrateError(
            "not_recorded: Darkroom is installed, and nothing says what is applied. Record it:"
            f" npx supabase migration repair --status applied {' '.join(there)}"
        )
    return pending


def apply(target: Target, pending: list[Migration], say: Callable[[str], object]) -> bool:
    """Apply these and the seed, if it is new; answer whether anything was. Raises MigrateError."""
    wants_seed = target.wants_seed()  # of the database as it is: after uninstall.sql, too
    for each in pending:
        say(str(each))
        target.apply(each)
    if wants_seed:
        say(target.seed_path)
        target.seed()
    return bool(pending) or wants_seed


def show(
    target: Target, migrations: list[Migration], pending: list[Migration], welcome_credits: int
) -> None:
    """Print what is there and what will be done."""
    lines = list(target.describe())
    lines += [("pending" if each in pending else "applied", str(each)) for each in migrations]
    lines.append(("pending" if target.wants_seed() else "applied", target.seed_path))
    if migrations[0] in pending:
        lines += target.outside(welcome_credits)
    for title, text in lines:
        print(f"{title:11} {text}")


def confirm(target: Target, ask: Callable[[str], str]) -> None:
    """Ask whether to go on; where there is data, for the database's name. Raises MigrateError."""
    name = target.connection.info.dbname
    has_data = bool(target.filled_tables())
    wanted = name if has_data else "y"
    question = f"Type the database's name to apply this ({name}): " if has_data else "Apply? [y/N] "
    try:
        answer = ask(question).strip()
    except EOFError:
        answer = ""
    if answer != wanted:
        raise MigrateError("confirmation_needed: nothing was done; YES=1 answers for scripts")


def read_credits(text: str) -> int:
    """Return WELCOME_CREDITS. Raises MigrateError."""
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise MigrateError("bad_credits: WELCOME_CREDITS: not a number of credits")
    return int(text)


def migrate(
    url: str,
    *,
    is_confirmed: bool,
    ask: Callable[[str], str] = input,
    welcome_credits: int = WELCOME_CREDITS,
) -> None:
    """Do all of it. Raises MigrateError."""
    try:
        connection = psycopg.connect(
            libpq_url(url), autocommit=True, connect_timeout=10, prepare_threshold=None
        )
    except (psycopg.OperationalError, psycopg.ProgrammingError) as error:
        text = str(error) if isinstance(error, psycopg.OperationalError) else "not an address"
        raise MigrateError(f"cannot_connect: DATABASE_URL: {' '.join(text.split())}") from None
    with connection:
        connection.add_notice_handler(pass_on)
        target, migrations = Target(connection), read_migrations()
        target.refuse_unfit()
        pending = plan(target, migrations)
        show(target, migrations, pending, welcome_credits)
        if not pending and not target.wants_seed():
            print("nothing to do")
            return
        if not is_confirmed:
            confirm(target, ask)
        target.value(
            "select set_config(%s, %s, false)", "darkroom.welcome_credits", str(welcome_credits)
        )
        apply(target, pending, lambda name: print(f"{'applying':11} {name}", flush=True))
        print("done")


def main() -> int:
    """Migrate $DATABASE_URL; answer the exit code."""
    url = os.environ.get("DATABASE_URL")
    if not url:
        print("migrate: cannot_connect: DATABASE_URL: missing", file=sys.stderr)
        return 1
    try:
        welcome_credits = read_credits(os.environ.get("WELCOME_CREDITS") or str(WELCOME_CREDITS))
        is_confirmed = os.environ.get("YES") == "1"
        migrate(url, is_confirmed=is_confirmed, welcome_credits=welcome_credits)
    except psycopg.Error as error:
        lacks = isinstance(error, psycopg.errors.InsufficientPrivilege)
        token = "role_lacks_rights" if lacks else "database_error"
        print(f"migrate: {token}: {told(error)}", file=sys.stderr)
        return 1
    except MigrateError as error:
        print(f"migrate: {error}", file=sys.stderr)
        return 2 if str(error).startswith("confirmation_needed") else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
