"""Repair DynamoDB items that differ from the rolling views, whichever process writes them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import psycopg
from psycopg import sql

from dagster_prefs.declarations.contract import LAST_EVENT_AT
from dagster_prefs.dynamodb.access import StoreUnavailable
from dagster_prefs.dynamodb.items import ItemEncoder, ItemError
from dagster_prefs.dynamodb.publisher import publish_lock
from dagster_prefs.dynamodb.store import DomainStore
from dagster_prefs.errors import PrefsError
from dagster_prefs.freshness.levels import Unmeasurable
from dagster_prefs.freshness.online import Comparison, Row
from dagster_prefs.ids import Id

CHUNK = 1000


class ReconcileError(PrefsError):
    """A domain could not be reconciled completely; `report` counts what was done."""

    def __init__(self, message: str, report: ReconcileReport) -> None:
        super().__init__(message)
        self.report = report


@dataclass(frozen=True)
class ReconcileReport:
    """The differences that were found, and repaired unless it was a dry run.

    `compared` counts rows and items; `overtaken` counts those that another writer changed in the meantime and
    that were therefore not written.
    """

    domain: str
    compared: int
    missing: int
    different: int
    extra: int
    overtaken: int
    dry_run: bool


def reconcile_domain(
    store: DomainStore,
    *,
    now: datetime,
    dry_run: bool = False,
    grace_seconds: float | None = None,
    wait: Callable[[float], None] = time.sleep,
    progress: Callable[[int], None] | None = None,
) -> ReconcileReport:
    """Compare every id of one domain with DynamoDB; write what is stale or missing, delete what is extra.

    Reads the whole view and the whole table once, in constant memory. Compares differing ids again after
    `grace_seconds` (by default the domain's error threshold where a sink writes, else none), to leave changes
    in flight to their writer; no write replaces an item that is newer than the row. `dry_run` only counts.
    `progress` receives the number of rows and items compared so far. Safe to repeat.

    Raises ReconcileError (with `.report`) naming the first id whose row cannot become an item, after all
    others were repaired; Unmeasurable when view or table cannot be read or written; EngineUnavailable.
    """
    domain = store.domain
    if grace_seconds is None:
        grace_seconds = 0.0 if store.engine.kind == "local" else domain.freshness.error_seconds
    with store.engine.connect() as connection:
        try:
            return _Reconciliation(
                Comparison(connection, store, now),
                store.encoder,
                dry_run,
                lambda: wait(grace_seconds) if grace_seconds else None,
                progress or (lambda compared: None),
            ).run()
        except psycopg.Error as error:
            raise Unmeasurable(
                f"domain {domain.name}: the engine failed while reconciling "
                f"({' '.join(str(error).split())}): run it again, which is safe"
            ) from error
        except StoreUnavailable as error:
            raise Unmeasurable(f"domain {domain.name}: {error}") from None


class _Reconciliation:
    """One pass over one domain."""

    def __init__(
        self,
        comparison: Comparison,
        encoder: ItemEncoder,
        dry_run: bool,
        grace: Callable[[], None],
        progress: Callable[[int], None],
    ) -> None:
        self.sides = comparison
        self.encoder = encoder
        self.dry_run = dry_run
        self.grace = grace
        self.progress = progress
        self.counts = dict.fromkeys(("compared", "missing", "different", "extra", "overtaken"), 0)
        self.refused: list[str] = []

    def run(self) -> ReconcileReport:
        self._keep_publishers_out()
        for ids in self._view():
            self._compare(ids)
        for ids in self.sides.items.pages(self.sides.domain.key):
            with_row = self.sides.rows(ids)
            self._compare([id_ for id_ in ids if id_ not in with_row])
        report = ReconcileReport(domain=self.sides.domain.name, dry_run=self.dry_run, **self.counts)
        if self.refused:
            more = f" (and {len(self.refused) - 1} more)" if len(self.refused) > 1 else ""
            raise ReconcileError(f"domain {report.domain}: {self.refused[0]}{more}", report)
        return report

    def _keep_publishers_out(self) -> None:
        # The publisher takes the same lock, so neither writes an item while the other compares it.
        if self.sides.engine.kind == "local":
            self.sides.connection.execute(
                "select pg_advisory_lock(hashtextextended(%s, 0))",
                [publish_lock(self.sides.engine, self.sides.domain.key)],
            )

    def _view(self) -> Iterator[list[Id]]:
        # A row without a key is never an item.
        beyond: sql.Composable = self.sides.complete
        while True:
            rows = self.sides.connection.execute(
                # RisingWave takes no parameters here, or reads the whole view for each chunk.
                sql.SQL("select {key} from {relation} where {beyond} order by {key} limit {chunk}").format(
                    key=self.sides.key.columns,
                    relation=self.sides.relation,
                    beyond=beyond,
                    chunk=sql.Literal(CHUNK),
                )
            ).fetchall()
            if not rows:
                return
            yield [self.sides.key.id_of(row) for row in rows]
            beyond = _after(self.sides.key_columns, rows[-1])

    def _compare(self, ids: list[Id]) -> None:
        self.counts["compared"] += len(ids)
        if suspects := self._differing(ids):
            self.grace()
            suspects = self._differing(suspects)
        if suspects and not self.dry_run:
            self._unmark_published(suspects)
        for id_, (row, item) in suspects.items():
            kind = "extra" if row is None else "missing" if item is None else "different"
            try:
                repaired = self.dry_run or self._repair(id_, row, item)
            except ItemError as error:
                self.refused.append(str(error))
                continue
            self.counts[kind if repaired else "overtaken"] += 1
        self.progress(self.counts["compared"])

    def _differing(self, ids: Iterable[Id]) -> dict[Id, tuple[Row | None, Mapping[str, Any] | None]]:
        wanted = list(ids)
        items = self.sides.items.get(self.sides.domain.key, wanted)
        rows = self.sides.rows(wanted)
        return {
            id_: (rows.get(id_), items.get(id_))
            for id_ in wanted
            if self.sides.differs(rows.get(id_), items.get(id_))
        }

    def _unmark_published(self, ids: Iterable[Id]) -> None:
        # The publisher's records do not cover these writes. With an emptied record it compares the item again.
        if self.sides.engine.kind == "local":
            self.sides.connection.execute(
                sql.SQL(
                    "insert into {} (table_id, domain_key, entity_key, fingerprint)"
                    " select %s, %s, id, '' from unnest(%s::text[]) as id"
                    " on conflict (table_id, domain_key, entity_key) do update set fingerprint = ''"
                ).format(self.sides.published),
                [
                    self.sides.table.table_id,
                    self.sides.domain.key,
                    [self.encoder.key_text(id_) for id_ in ids],
                ],
            )

    def _repair(self, id_: Id, row: Row | None, item: Mapping[str, Any] | None) -> bool:
        if row is None:
            seen = {} if item is None else item
            return self.sides.items.delete(self.encoder.key(id_), LAST_EVENT_AT, seen.get(LAST_EVENT_AT))
        values = [row.values[name] for name in self.sides.domain.attributes]
        return self.sides.items.put(self.encoder.encode(id_, values), LAST_EVENT_AT)


def _after(columns: Sequence[sql.Identifier], values: Sequence[Any]) -> sql.Composed:
    """Return the SQL condition that a key follows the one with these values."""
    arms = [
        sql.SQL(" and ").join(
            [
                *(sql.SQL("{} = {}").format(column, sql.Literal(value)) for column, value in equal),
                sql.SQL("{} > {}").format(columns[place], sql.Literal(values[place])),
            ]
        )
        for place in range(len(columns))
        for equal in [list(zip(columns[:place], values[:place], strict=True))]
    ]
    return sql.SQL("({})").format(sql.SQL(" or ").join(arms))
