"""Erase one subject from every store, and prove it by reading every store back.

The order of the steps makes it safe to stop anywhere and start again: the subject is suppressed first, so
that nothing derives its values again; then messages, views, items and training tables are erased. Each step
reads the current state of its store, not the report of an earlier run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cached_property, partial
from pathlib import Path
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg import sql

from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.erasure.events import AppendOnly, RawMessages, Subject, keyed_relations
from dagster_prefs.erasure.items import EntityItems
from dagster_prefs.erasure.lake import SubjectInEvents, is_there
from dagster_prefs.erasure.served_log import SubjectInServedLog
from dagster_prefs.erasure.statistics import SubjectInStatistics
from dagster_prefs.erasure.training import (
    ErasedTable,
    SubjectInTable,
    SubjectInTiles,
    SubjectInTrainingSet,
    files_holding,
    search_catalog,
)
from dagster_prefs.errors import PrefsError
from dagster_prefs.events.progress import waiting_since
from dagster_prefs.events.raw import translated
from dagster_prefs.iceberg.event_tables import EventTable, event_tables
from dagster_prefs.iceberg.export import DEFAULT_NAMESPACE
from dagster_prefs.iceberg.tables import ErasedSubject, TileTable, tile_tables

if TYPE_CHECKING:
    from pyiceberg.catalog import Catalog

    from dagster_prefs.declarations.registry import Entity, Registry
    from dagster_prefs.engine.dbt import Dbt

ERASED = "erased_subjects"
# Copies outside of the platform's stores, which neither an erasure nor an export reads.
KAFKA_TOPICS = "Kafka topics"
FILES = "files that were ingested, and rejected messages that were exported"
# The store of holdings that say what was computed again, and not that the subject was there.
STATISTICS = "statistics"
# Streaming views follow within a barrier or two; this is the limit under load.
STREAM_SECONDS = 120.0
# Messages that arrived before the erasure began may commit late, which takes another round.
ROUNDS = 5


class ErasureIncomplete(PrefsError):
    """The erasure stopped, or a store still holds data of the subject; the next run continues."""


@dataclass(frozen=True)
class Stores:
    """The stores that may hold a subject.

    `catalog` and `dynamodb` open their stores when first needed; `table_prefix` is the prefix of the DynamoDB
    tables. `refresh` refreshes the embedded engine's views and is not called on RisingWave. `tables_by_sink`
    says that RisingWave's sinks write the training tables, `raw_by_sink` that they write the raw messages too.
    `raw_retention` is the age at which the engine deletes raw messages, None if it keeps them.
    `served_log` is the place of the served log: `files` and a folder, or what else and a name.
    """

    engine: EngineConfiguration
    registry: Registry
    catalog: Callable[[], Catalog]
    dynamodb: Callable[[], Any]
    table_prefix: str
    refresh: Callable[[], None]
    namespace: str = DEFAULT_NAMESPACE
    tables_by_sink: bool = False
    served_log: tuple[str, str] | None = None
    raw_by_sink: bool = False
    raw_retention: timedelta | None = None

    def logged(self, subject: Subject) -> SubjectInServedLog | None:
        """Return the subject's rows in the served log, None if it is not in files of this machine."""
        kind, name = self.served_log or ("", "")
        tables = {entity.name: self.registry.contract.tables[entity.name] for entity in self.served(subject)}
        return SubjectInServedLog(Path(name).expanduser(), subject, tables) if kind == "files" else None

    def served(self, subject: Subject) -> list[Entity]:
        """Return the entities with the subject's first key column that have a table in DynamoDB."""
        family = self.registry.family(subject.kind)
        return [entity for entity in family if entity.name in self.registry.contract.tables]

    def items(self, subject: Subject, entity: Entity, until: datetime) -> EntityItems:
        """Return the subject's items in the table of one of these entities."""
        table = f"{self.table_prefix}{entity.table}"
        return EntityItems(self.dynamodb(), self.registry.contract, entity.name, table, subject.value, until)

    def tiles(self, subject: Subject) -> list[TileTable]:
        """Return the training tables of the entities with the subject's first key column."""
        family = self.registry.family(subject.kind)
        return [spec for spec in tile_tables(self.registry).values() if spec.entity in family]

    def events(self, subject: Subject, catalog: Catalog) -> list[EventTable]:
        """Return the tables of events of the catalog that may name the subject.

        They are the typed events about it, and the raw messages of every topic, because a rejected one may be about
        anybody. Raises OfflineError.
        """
        return [
            table
            for tables in event_tables(self.registry).values()
            for table in tables.both
            if (table.kind == "raw" or subject.is_key_of(table.topic))
            and is_there(catalog, table, self.namespace)
        ]


@dataclass(frozen=True)
class Holding:
    """The amount of the subject's data that one place held when the run began, and holds now."""

    store: str
    place: str
    unit: str
    before: int
    after: int


@dataclass
class ErasureReport:
    """The findings and the outcome of an erasure, without any content.

    Events up to `erased_at` (UTC) stay suppressed, whenever they arrive. `newer_events` of the subject
    happened after it and count again. `kept_by` names tags and branches (table → names) that still keep a
    snapshot with the subject; `training_sets` external files and other writers' tables of labels that hold
    it; `unread` the reason why a table or namespace of the catalog was not searched; `unfinished` what only
    expires with time (what → until when).
    """

    subject: Subject
    erased_at: datetime
    first_erased: bool
    holdings: list[Holding] = field(default_factory=list)
    newer_events: int = 0
    tables: list[ErasedTable] = field(default_factory=list)
    kept_by: dict[str, list[str]] = field(default_factory=dict)
    training_sets: list[str] = field(default_factory=list)
    unread: dict[str, str] = field(default_factory=dict)
    unfinished: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def held(self) -> bool:
        """Whether any data of the subject was found. Statistics do not tell: they are of many subjects."""
        return any(holding.before for holding in self.holdings if holding.store != STATISTICS)

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain values, for JSON."""
        return {
            "subject_kind": self.subject.kind,
            "subject_id": self.subject.id,
            "erased_at": self.erased_at.isoformat(),
            "first_erased": self.first_erased,
            "held": self.held,
            "newer_events": self.newer_events,
            "stores": [vars(holding) for holding in self.holdings],
            "tables": [
                {
                    "table": table.table,
                    "days_from_engine": [day.isoformat() for day in table.days_from_engine],
                    "days_rewritten": [day.isoformat() for day in table.days_rewritten],
                    "refs_removed": list(table.refs_removed),
                    "snapshots_expired": table.snapshots_expired,
                    "files_removed": table.files_removed,
                }
                for table in self.tables
            ],
            "kept_by": self.kept_by,
            "training_sets": self.training_sets,
            "unread": self.unread,
            "unfinished": self.unfinished,
            "seconds": self.seconds,
        }


def refresh_with(dbt: Dbt) -> Callable[[], None]:
    """Return a function that refreshes all views by dbt. It raises ErasureIncomplete for failed models."""

    def refresh() -> None:
        failed = [result for result in dbt.run("run") if not result.ok]
        if failed:
            reasons = "; ".join(f"{result.name}: {result.message}" for result in failed)
            raise ErasureIncomplete(f"the views could not be refreshed ({reasons})")

    return refresh


def erase(
    stores: Stores,
    subject: Subject,
    *,
    now: datetime,
    drop_tags: bool = False,
    training_sets: Sequence[Path] = (),
    step: Callable[[str], None] = lambda _: None,
) -> ErasureReport:
    """Erase one subject from every store, and read every store back.

    `now` (UTC) is the erasure's time, after which new events count again; if the subject was erased before
    and the stores hold nothing newer, the earlier time stays. Messages that arrive during the run are not
    touched: their events before that time are suppressed. `drop_tags` also removes the tags and branches of
    the training tables that keep a snapshot with the subject; without it the report names them.
    `training_sets` are folders whose files of training sets and labels are searched. `step` is called with
    each step before it begins.

    Safe to repeat after any failure. Raises ErasureIncomplete naming the step that failed and why, or the
    places that still hold data of the subject.
    """
    run = _Erasure(stores, subject, now, drop_tags, training_sets, step)
    return run.run()


class _Erasure:
    def __init__(
        self,
        stores: Stores,
        subject: Subject,
        now: datetime,
        drop_tags: bool,
        training_sets: Sequence[Path],
        announce: Callable[[str], None],
    ) -> None:
        self.stores = stores
        self.engine = stores.engine
        self.subject = subject
        self.now = now
        self.drop_tags = drop_tags
        self.training_sets = training_sets
        self.announce = announce
        self.refused: dict[str, str] = {}

    def run(self) -> ErasureReport:
        started = monotonic()
        with self._step("suppress the subject"), self.engine.connect() as connection:
            self.until = connection.execute("select now()").fetchall()[0][0]
            # Counted before the erasure, because RisingWave's views and sinks drop a suppressed subject
            # within a second.
            before = self._engine_counts(connection)
            items = self._items_there()
            first = self._suppress(connection)
        with self._step("read what has arrived"), self.engine.connect() as connection:
            if self.engine.kind == "local" and waiting_since(connection, self.engine, self.stores.registry):
                self.stores.refresh()
        with self._step("redact the messages"), self.engine.connect() as connection:
            self.erased_at = self._extend(connection)
            redacted = self._redact(connection)
        with self._step("refresh the views"):
            self._follow(any(redacted.values()) or any(before.values()))
        report = ErasureReport(self.subject, self.erased_at, first)
        self._delete_items(report, items)
        self._erase_in_log(report)
        self._erase_in_tables(report)
        with self._step("read the engine back"), self.engine.connect() as connection:
            after = self._engine_counts(connection)
            report.newer_events = self._newer_events(connection)
        report.holdings[:0] = [
            Holding(
                "engine",
                place,
                "messages" if place in redacted else "rows",
                # Rows that no refresh has read yet become visible here only after redaction.
                max(before[place], redacted.get(place, 0)),
                count,
            )
            for place, count in after.items()
        ]
        report.unfinished |= self._unfinished(report)
        report.seconds = monotonic() - started
        self._judge(report)
        return report

    @contextmanager
    def _step(self, name: str) -> Iterator[None]:
        self.announce(name)
        try:
            yield
        except PrefsError as error:
            raise ErasureIncomplete(
                f"erasing {self.subject} stopped at: {name} ({error}); the steps before it stay done: "
                "run the same command again"
            ) from error
        except psycopg.Error as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ErasureIncomplete(
                f"erasing {self.subject} stopped at: {name}, because the engine failed ({reason}); what was "
                "done before stays done, run the same command again"
            ) from error

    # the engine

    def _suppress(self, connection: psycopg.Connection[Any]) -> bool:
        """Record the erasure unless the subject already has one. Returns whether it was recorded."""
        if self._recorded(connection) is not None:
            return False
        self._record(connection, self.now)
        return True

    def _recorded(self, connection: psycopg.Connection[Any]) -> datetime | None:
        with translated(self.engine, ERASED):
            row = connection.execute(
                sql.SQL("select erased_at from {} where subject_kind = {} and subject_id = {}").format(
                    self._relation(ERASED), sql.Literal(self.subject.kind), sql.Literal(self.subject.id)
                )
            ).fetchone()
        return row[0] if row else None

    def _record(self, connection: psycopg.Connection[Any], erased_at: datetime) -> None:
        # On RisingWave an insert into a keyed table replaces the row of its key.
        conflict = (
            "on conflict (subject_kind, subject_id) do update"
            " set erased_at = greatest({0}.erased_at, excluded.erased_at)"
            if self.engine.kind == "local"
            else ""
        )
        with translated(self.engine, ERASED):
            connection.execute(
                sql.SQL(
                    "insert into {0} (subject_kind, subject_id, erased_at) values (%s, %s, %s) " + conflict
                ).format(self._relation(ERASED)),
                (self.subject.kind, self.subject.id, erased_at),
            )

    def _extend(self, connection: psycopg.Connection[Any]) -> datetime:
        """Move the erasure's time forward to cover every event that is held, and return it.

        Such events have a producer whose clock runs ahead, or came after an earlier erasure.
        """
        recorded = self._recorded(connection)
        newest = self._messages(connection).newest_event()
        if recorded is None:
            raise ErasureIncomplete(f"{self.subject} was removed from {ERASED} meanwhile")
        if newest is None or newest <= recorded:
            return recorded.astimezone(UTC)
        reached = max(self.now, newest)
        self._record(connection, reached)
        return reached.astimezone(UTC)

    def _messages(self, connection: psycopg.Connection[Any]) -> RawMessages:
        return RawMessages(
            connection, self.engine, self.stores.registry.topics.values(), self.subject, self.until
        )

    def _redact(self, connection: psycopg.Connection[Any]) -> dict[str, int]:
        """Redact the subject's messages, and return their number by raw table."""
        messages = self._messages(connection)
        done = dict.fromkeys(messages.count(), 0)
        for _ in range(ROUNDS):
            found = messages.find()
            for raw_table, positions in found.items():
                try:
                    done[raw_table] += messages.redact(raw_table, positions)
                    if self.engine.kind == "local":
                        messages.redact_read(raw_table, positions)
                except AppendOnly as error:
                    # The other stores are erased nevertheless; the outcome then names this raw table.
                    self.refused[raw_table] = f"{error}: {self._when_gone()}"
            # The embedded engine's parsed relations do not change before the refresh, so one round finds
            # everything.
            if not found.keys() - self.refused.keys() or self.engine.kind == "local":
                break
        return done

    def _when_gone(self) -> str:
        """Say until when RisingWave keeps what had arrived, and what makes relations without it then."""
        retention = self.stores.raw_retention
        when = "their retention ends"
        if retention is not None:
            when = f"{(self.until + retention).astimezone(UTC):%Y-%m-%d %H:%M} UTC"
        return (
            f"the messages leave by themselves until {when}, run `prefs rebuild all --from-lake` after that"
        )

    def _follow(self, changed: bool) -> None:
        """Wait until the views have applied the erasure, or refresh them."""
        if self.engine.kind == "local":
            if changed:
                self.stores.refresh()
            with self.engine.connect() as connection, translated(self.engine, "live_changes"):
                # The views already reflect the erasure: a notification for the follower would still contain the
                # subject's id.
                connection.execute(
                    sql.SQL(
                        "delete from {} where relation = 'erased_subjects' and key ->> 'subject_id' = %s"
                    ).format(self._relation("live_changes")),
                    [self.subject.id],
                )
            return
        deadline = monotonic() + STREAM_SECONDS
        with self.engine.connect() as connection:
            connection.execute("flush")
            while any(self._engine_counts(connection).values()) and monotonic() < deadline:
                if self._newer_events(connection) or self.refused:
                    break
                sleep(1.0)

    def _engine_counts(self, connection: psycopg.Connection[Any]) -> dict[str, int]:
        """Count the subject's messages in each raw table, and its rows in every relation with its key."""
        counts = self._messages(connection).count()
        for name, condition in keyed_relations(connection, self.engine, self.subject).items():
            with translated(self.engine, name):
                row = connection.execute(
                    sql.SQL("select count(*) from {} where {}").format(self._relation(name), condition)
                ).fetchone()
            counts[name] = int(row[0]) if row else 0
        return counts

    def _newer_events(self, connection: psycopg.Connection[Any]) -> int:
        topics = self.stores.registry.topics.values()
        family = {entity.name for entity in self._family}
        typed = [topic.relation for topic in topics if topic.entity in family]
        found = 0
        for name in typed:
            with translated(self.engine, name):
                row = connection.execute(
                    sql.SQL("select count(*) from {} where {} = {}").format(
                        self._relation(name),
                        sql.Identifier(self.subject.key),
                        sql.Literal(self.subject.value),
                    )
                ).fetchone()
            found += int(row[0]) if row else 0
        return found

    def _relation(self, name: str) -> sql.Identifier:
        return sql.Identifier(self.engine.schema, name)

    # DynamoDB, Iceberg, files

    @cached_property
    def _family(self) -> tuple[Entity, ...]:
        """Return the entities whose first key column is the subject's."""
        return self.stores.registry.family(self.subject.kind)

    @property
    def _served(self) -> list[Entity]:
        return self.stores.served(self.subject)

    def _items(self, entity: Entity, until: datetime) -> EntityItems:
        return self.stores.items(self.subject, entity, until)

    def _items_there(self) -> dict[str, int]:
        """Map entities to their items.

        Omits a store that does not answer: it is read again later, and then reports the reason.
        """
        found: dict[str, int] = {}
        for entity in self._served:
            with suppress(PrefsError):
                found[entity.name] = len(self._items(entity, datetime.max.replace(tzinfo=UTC)).keys())
        return found

    def _delete_items(self, report: ErasureReport, items_before: Mapping[str, int]) -> None:
        for entity in self._served:
            with self._step("delete the items in DynamoDB"):
                items = self._items(entity, self.erased_at)
                before = max(items_before.get(entity.name, 0), items.withdraw(self.engine))
                table = f"{self.stores.table_prefix}{entity.table}"
                report.holdings.append(Holding("dynamodb", table, "items", before, len(items.keys())))

    def _erase_in_log(self, report: ErasureReport) -> None:
        log = self.stores.logged(self.subject)
        if log is None:
            return
        with self._step("remove the subject from the served log"):
            held = log.holding()
            log.erase()
        with self._step("read the served log back"):
            left = log.holding()
        report.holdings.append(Holding("served log", str(log.folder), "rows", held.rows, left.rows))
        if left.growing:
            report.unfinished[f"{left.growing} rows in files of the served log that are still written"] = (
                "the files are complete, at most an hour after they were begun: run this command again then"
            )

    def _erase_in_tables(self, report: ErasureReport) -> None:
        erased = ErasedSubject(self.subject.entity.key, self.subject.value, self.erased_at)
        with self._step("open the Iceberg catalog"):
            catalog = self.stores.catalog()
            events = self.stores.events(self.subject, catalog)
        for table in events:
            self._erase_in(
                report,
                partial(
                    SubjectInEvents,
                    catalog,
                    table,
                    self.subject,
                    erased,
                    arrived_until=self.until,
                    namespace=self.stores.namespace,
                    by_sink=self.stores.raw_by_sink,
                ),
            )
        specs = self.stores.tiles(self.subject)
        if not specs:
            return
        namespace, by_sink = self.stores.namespace, self.stores.tables_by_sink
        for spec in specs:
            self._erase_in(
                report,
                partial(
                    SubjectInTiles, catalog, spec, erased, self.engine, namespace=namespace, by_sink=by_sink
                ),
            )
        with self._step("search the Iceberg catalog for training sets"):
            others = search_catalog(catalog, erased)
        for name in others.training_sets:
            self._erase_in(report, partial(SubjectInTrainingSet, catalog, name, erased))
        self._erase_in_statistics(report, catalog, specs)
        report.training_sets += others.holding
        report.unread = dict(others.unread)
        if self.training_sets:
            with self._step("search the training sets"):
                found = files_holding(erased, self.training_sets)
                report.training_sets += [str(path) for path in found]

    def _erase_in_statistics(
        self, report: ErasureReport, catalog: Catalog, specs: Sequence[TileTable]
    ) -> None:
        family = {entity.name for entity in self._family}
        domains = self.stores.registry.contract.domains.values()
        views = [domain.relation for domain in domains if domain.entity in family]
        statistics = SubjectInStatistics(
            catalog, self.stores.registry, specs, views, namespace=self.stores.namespace
        )
        with self._step(f"remove the subject from {statistics.name}"):
            held = statistics.holding()
            statistics.erase()
        with self._step(f"read {statistics.name} back"):
            left = statistics.holding()
        report.holdings += [
            Holding(STATISTICS, statistics.name, "days", held.days, left.days),
            Holding(STATISTICS, statistics.name, "snapshots", held.snapshots, left.snapshots),
        ]

    def _erase_in(self, report: ErasureReport, in_table: Callable[[], SubjectInTable]) -> None:
        table = in_table()
        with self._step(f"remove the subject from {table.name}"):
            held = table.holding()
            report.tables.append(table.erase(drop_tags=self.drop_tags))
        with self._step(f"read {table.name} back"):
            # A new object, so that nothing cached from earlier reads is used.
            left = in_table().holding()
        report.holdings += [
            Holding("iceberg", left.table, "rows", held.rows, left.rows),
            Holding("iceberg", left.table, "snapshots", held.snapshots, left.snapshots),
            Holding("iceberg", left.table, "files", held.files, left.files),
        ]
        if left.kept_by:
            report.kept_by[left.table] = list(left.kept_by)

    # the outcome

    def _judge(self, report: ErasureReport) -> None:
        left = [
            f"{holding.place}: {holding.after} {holding.unit}"
            for holding in report.holdings
            if holding.after
            # The engine's views rightly hold rows of events after the erasure.
            and not (holding.store == "engine" and holding.unit == "rows" and report.newer_events)
            and not (holding.unit in ("snapshots", "files") and holding.place in report.kept_by)
        ]
        if left:
            raise ErasureIncomplete(
                f"{self.subject} is still held after its erasure ({'; '.join(left)}): "
                + ("; ".join(self.refused.values()) or self._writer())
                + ", and run the same command again"
            )

    def _writer(self) -> str:
        if self.stores.tables_by_sink:
            return "RisingWave's sinks write the tables of the lake, wait for their next commits"
        return "find out what writes there"

    def _unfinished(self, report: ErasureReport) -> dict[str, str]:
        engine = (
            "PostgreSQL: old row versions, until vacuum has run and its space was used again; its write-ahead log"
            " and backups, until they are removed"
            if self.engine.kind == "local"
            else "RisingWave: old versions in its state store, until compaction; its backups, until they are removed"
        )
        where, _, until = engine.partition(": ")
        rest = {
            f"the id itself in {ERASED}": "permanently: it keeps replayed events out",
            KAFKA_TOPICS: "the topics' retention ends, or compaction where the key is the subject's; until then "
            "replays stay suppressed",
            FILES: "you delete them; if they are ingested again, they stay suppressed",
            where: until,
        }
        if self.stores.served_log and self.stores.served_log[0] != "files":
            rest["the served log ({} {})".format(*self.stores.served_log)] = "its retention ends"
        if self.stores.raw_by_sink:
            rest["messages that RisingWave's sinks had not committed to the lake yet"] = (
                "minutes have passed and `prefs export events` has run, which removes their content; run this command "
                "again then, for the snapshots"
            )
        if self._served:
            rest["DynamoDB point-in-time recovery"] = (
                "35 days from now; run this command again for a restored table"
            )
        if self.stores.tiles(self.subject):
            rest |= {
                "noncurrent object versions in the lake (S3)": "the lifecycle rule `lake_noncurrent_days` has "
                "removed them",
                f"{self.subject.kind} ids as lowest or highest value in the statistics of manifests": "the table's "
                "maintenance has removed the manifests of expired snapshots",
                "examples in Dagster's event log (parity, publishing)": "the runs are deleted",
                "files of training sets and labels that this platform does not know": "you have searched their "
                "folders (--training-sets) and removed or rebuilt what holds the subject; a set that used an expired "
                "snapshot can no longer be reproduced",
            }
            for table, names in report.kept_by.items():
                rest[f"{table}, kept by {', '.join(names)}"] = (
                    "the tag or branch is dropped: remove it and run the command again, or run it with --drop-tags"
                )
        return rest
