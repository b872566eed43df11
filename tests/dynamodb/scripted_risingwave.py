"""The edge of RisingWave that the changefeed speaks to: a view with a history, and cursors over it.

It answers as a server does (3.0.3): SINCE begins with the moment itself, a moment has one net change a row, FULL has no
timestamps and ends with an empty FETCH, a token before the retention is refused, a cursor ends with its session. The
catalog knows a moment before the frontend, which answers a cursor, does; FLUSH waits until it does.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Mapping
from typing import Any

import psycopg
from psycopg import sql

from dagster_prefs.declarations.contract import Contract, Domain
from dagster_prefs.ids import Id, id_parts

KEY_TYPES = {"N": "bigint", "S": "character varying"}
TYPES = {"integer": "bigint", "decimal": "numeric", "string": "character varying"} | {
    "list<string>": "character varying[]",
    "list<decimal>": "numeric[]",
    "list<integer>": "bigint[]",
}


class Result:
    def __init__(self, names: list[str], rows: list[tuple[Any, ...]]) -> None:
        self.description = [type("Column", (), {"name": name})() for name in names]
        self._rows = rows

    def fetchall(self) -> list[tuple[Any, ...]]:
        return self._rows


class ScriptedRisingWave:
    """One server with one domain's view; stands where an EngineConfiguration does."""

    kind = "risingwave"
    schema = "public"
    database = "dev"

    def __init__(self, contract: Contract, domain: Domain) -> None:
        self.domain = domain
        keys = {key.name: KEY_TYPES[key.type] for key in contract.table_of(domain).columns}
        self.keys = list(keys)
        self.names = [*keys, "domain_key", *domain.attributes]
        self.columns = {
            **keys,
            "domain_key": "character varying",
            **{name: TYPES[attribute.type] for name, attribute in domain.attributes.items()},
        }
        self.subscription: tuple[int, str, int, str] | None = (7, "made", 5, domain.relation)
        self.rows: dict[Id, tuple[Any, ...]] = {}
        self.log: list[tuple[int, str, Id, tuple[Any, ...]]] = []
        self.now = 1_000_000
        self.retained_from = 0
        self.page = 1000
        self.declared: list[str] = []
        self.broken = 0
        # What a frontend that lags behind answers from; None where it knows everything at once.
        self.known: tuple[int, dict[Id, tuple[Any, ...]]] | None = None
        # Called when a FETCH waits for a change.
        self.on_wait: Callable[[], None] = lambda: None

    def lag(self) -> None:
        """From now on the frontend learns of changes by FLUSH only."""
        self.known = (len(self.log), dict(self.rows))

    def change(self, rows: Mapping[Any, tuple[Any, ...] | None]) -> int:
        """One moment in which these ids get these attributes, or lose their row; returns its time."""
        self.now += 1000
        for id_, values in rows.items():
            before = self.rows.get(id_)
            if values is None:
                if before is not None:
                    self.log.append((self.now, "Delete", id_, before))
                    del self.rows[id_]
            elif before is None:
                self.log.append((self.now, "Insert", id_, values))
            elif before != values:
                self.log += [
                    (self.now, "UpdateDelete", id_, before),
                    (self.now, "UpdateInsert", id_, values),
                ]
            if values is not None:
                self.rows[id_] = values
        return self.now

    def connect(self) -> _Session:
        return _Session(self)


class _Session:
    def __init__(self, server: ScriptedRisingWave) -> None:
        self.server = server
        self.waiting: list[tuple[Any, ...]] | None = None
        self.read = 0

    def close(self) -> None:
        self.waiting = None

    def execute(self, statement: sql.Composable, *, prepare: bool | None = None) -> Result:
        server, text = self.server, statement.as_string(None)
        if server.broken and text.startswith("fetch"):
            server.broken -= 1
            self.waiting = None
            raise psycopg.OperationalError("server closed the connection unexpectedly")
        if "rw_subscriptions" in text:
            return Result(
                ["id", "made", "upstream", "name"], [server.subscription] if server.subscription else []
            )
        if "information_schema.columns" in text:
            return Result(["column_name", "data_type"], list(server.columns.items()))
        if "rw_hummock_snapshot" in text:
            return Result(["committed"], [(server.now,)])
        if text == "flush":
            if server.known is not None:
                server.lag()
            return Result([], [])
        if found := re.search(r"any\('\{(.*?)\}'", text):
            # An array as PostgreSQL writes it, within a literal; no element here has a quote or backslash of its own.
            (wanted,) = csv.reader([found.group(1).replace("''", "'")]) if found.group(1) else ([],)
            rows = [id_parts(id_) for id_ in server.rows]
            return Result(server.keys, [row for row in rows if str(row[0]) in wanted])
        if text.startswith("declare"):
            server.declared.append(text.split('"')[-1].strip())
            known, rows = (len(server.log), server.rows) if server.known is None else server.known
            if text.endswith(" full"):
                self.waiting = [
                    (*id_parts(id_), server.domain.key, *values, "Insert", None)
                    for id_, values in rows.items()
                ]
                self.read = known
            else:
                since = int(text.rsplit(" ", 1)[1])
                if since < server.retained_from:
                    raise psycopg.errors.InternalError_("rw_timestamp is too small, need to be large")
                self.waiting = []
                self.read = next(
                    (place for place, (at, *_) in enumerate(server.log) if at >= since), len(server.log)
                )
            return Result([], [])
        assert text.startswith("fetch"), text
        if self.waiting is None:
            raise psycopg.errors.InternalError_("Cannot find cursor")
        if not self.waiting:
            known = len(server.log) if server.known is None else server.known[0]
            self.waiting = [
                (*id_parts(id_), server.domain.key, *values, operation, at)
                for at, operation, id_, values in server.log[self.read : known]
            ]
            self.read = max(self.read, known)
        if not self.waiting and "timeout" in text:
            server.on_wait()
        rows, self.waiting = self.waiting[: server.page], self.waiting[server.page :]
        return Result([*server.names, "op", "rw_timestamp"], rows)
