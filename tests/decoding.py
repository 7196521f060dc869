"""What leaves a database through a publication: a replication slot, its output decoded.

The plugin is PostgreSQL's own `pgoutput`; of its protocol, only what one table's changes need. See
"Logical Replication Message Formats" in PostgreSQL's documentation.
"""

from __future__ import annotations

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
        changes = [self._decode(Reader(bytes(row["data"]))) for row in rows]
        return [change for change in changes if change]

    def _decode(self, message: Reader) -> Change | None:
        kind = message.text(1)
        if kind == "R":
            oid, schema, table = message.number("I"), message.name(), message.name()
            message.text(1)  # the replica identity
            columns = [self._column(message) for _ in range(message.number("H"))]
            self._tables[oid] = (f"{schema}.{table}", columns)
        if kind not in "IUD":
            return None
        table, columns = self._tables[message.number("I")]
        rows: dict[str, Row] = {}
        while not message.at_end():
            part = message.text(1)
            rows[part] = message.row(columns)
        return Change(kind, table, rows.get("N"), rows.get("K") or rows.get("O"))

    def _column(self, message: Reader) -> str:
        message.text(1)  # flags
        name = message.name()
        message.text(8)  # type and its modifier
        return name


class Reader:
    """Reads one message from its start to its end."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def at_end(self) -> bool:
        return self._at == len(self._data)

    def text(self, size: int) -> str:
        self._at += size
        return self._data[self._at - size : self._at].decode(errors="replace")

    def name(self) -> str:
        name = self.text(self._data.index(0, self._at) - self._at)
        self._at += 1
        return name

    def number(self, form: str) -> int:
        (value,) = struct.unpack_from(f">{form}", self._data, self._at)
        self._at += struct.calcsize(f">{form}")
        return int(value)

    def row(self, columns: list[str]) -> Row:
        """Return the values that are there: unchanged ones outside the row are not."""
        assert self.number("H") == len(columns)
        row: Row = {}
        for column in columns:
            form = self.text(1)
            if form != "u":
                row[column] = self.text(self.number("I")) if form == "t" else None
        return row
