"""What leaves a database through a publication: a replication slot, its output decoded.

The plugin is PostgreSQL's own `pgoutput`; of its protocol, only what one table's changes need. See
"Logical Replication Message Formats" in PostgreSQL's documentation.
"""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass

from database import Database

Row = dict[str, str | None]


@dataclass(frozen=True)
class Change:
    """One change of one row, as a subscriber gets it."""

    kind: str
    table: str
    new: Row | None = None
    old: Row | None = None


class Slot:
    """A slot in a database with wal_level=logical; it has to be dropped before the database."""

    def __init__(self, db: Database, publication: str) -> None:
        self.db = db
        self.publication = publication
        self.name = f"slot_{db.name}"
        self._tables: dict[int, tuple[str, list[str]]] = {}
        db.execute("select pg_create_logical_replication_slot(%s, 'pgoutput')", self.name)

    def drop(self) -> None:
        self.db.execute("select pg_drop_replication_slot(%s)", self.name)

    def changes(self) -> list[Change]:
        """Return what was committed since the last call, in order."""
        rows = self.db.execute(
            "select data from pg_logical_slot_get_binary_changes(%s, null, null,"
            " 'proto_version', '1', 'publication_names', %s)",
            self.name,
            self.publication,
        )
        changes = [self._decode(io.BytesIO(row["data"])) for row in rows]
        return [change for change in changes if change]

    def _decode(self, message: io.BytesIO) -> Change | None:
        kind = message.read(1).decode()
        if kind == "R":
            oid, schema, table = number(message, "I"), name(message), name(message)
            message.read(1)  # the replica identity
            columns = []
            for _ in range(number(message, "H")):
                message.read(1)  # flags
                columns.append(name(message))
                message.read(8)  # type and its modifier
            self._tables[oid] = (f"{schema}.{table}", columns)
        if kind not in "IUD":
            return None
        table, columns = self._tables[number(message, "I")]
        rows: dict[bytes, Row] = {}
        while part := message.read(1):
            assert number(message, "H") == len(columns)
            row = rows[part] = {}
            for column in columns:
                form = message.read(1)
                if form != b"u":  # else unchanged, and outside the row
                    value = message.read(number(message, "I")) if form == b"t" else None
                    row[column] = None if value is None else value.decode(errors="replace")
        return Change(kind, table, rows.get(b"N"), rows.get(b"K") or rows.get(b"O"))


def number(message: io.BytesIO, form: str) -> int:
    (value,) = struct.unpack(f">{form}", message.read(struct.calcsize(f">{form}")))
    return int(value)


def name(message: io.BytesIO) -> str:
    return b"".join(iter(lambda: message.read(1), b"\0")).decode()
