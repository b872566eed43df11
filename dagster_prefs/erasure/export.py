"""Export all that is stored of one subject: what `erase` would remove, read from the same places."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql
from psycopg.rows import dict_row
from pyiceberg.expressions import EqualTo

from dagster_prefs.erasure.erase import ERASED, FILES, KAFKA_TOPICS, Stores
from dagster_prefs.erasure.events import RawMessages, Subject, keyed_relations
from dagster_prefs.erasure.lake import SubjectInEvents
from dagster_prefs.erasure.training import (
    SubjectInTable,
    SubjectInTiles,
    SubjectInTrainingSet,
    files_holding,
    rows_of_file,
    search_catalog,
)
from dagster_prefs.errors import PrefsError
from dagster_prefs.events.raw import translated
from dagster_prefs.events.schema_registry import unframed
from dagster_prefs.iceberg.event_tables import DATA
from dagster_prefs.iceberg.files import scan_rows
from dagster_prefs.iceberg.tables import ErasedSubject

# Every row of the subject, whenever its newest event was.
_ALWAYS = datetime(9999, 12, 31, tzinfo=UTC)

Rows = list[dict[str, Any]]


class ExportIncomplete(PrefsError):
    """A store could not be read, so that nothing is exported."""


@dataclass
class SubjectExport:
    """All that is stored of one subject.

    `messages` by raw table, redacted ones excluded; `rows` by relation of the engine; `items` by DynamoDB
    table; `training` by Iceberg table, and `earlier` what only its history or unreferenced files hold;
    `labels` by file, or by another writer's table; `served_log` by its folder. `erased_at` is the time of an
    erasure, if there was one. `unread` gives the reason why a table or namespace of the catalog was not searched.
    """

    subject: Subject
    exported_at: datetime
    erased_at: datetime | None = None
    messages: dict[str, Rows] = field(default_factory=dict)
    rows: dict[str, Rows] = field(default_factory=dict)
    items: dict[str, Rows] = field(default_factory=dict)
    training: dict[str, Rows] = field(default_factory=dict)
    earlier: dict[str, Rows] = field(default_factory=dict)
    labels: dict[str, Rows] = field(default_factory=dict)
    served_log: dict[str, Rows] = field(default_factory=dict)
    unread: dict[str, str] = field(default_factory=dict)

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """The number of entries by store and place, without places that hold nothing."""
        return {
            store: {place: len(found) for place, found in places.items() if found}
            for store, places in self._stores().items()
        }

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON: times as ISO 8601, decimals as digits, bytes that are no text as base64."""
        return {
            "subject_kind": self.subject.kind,
            "subject_id": self.subject.id,
            "exported_at": self.exported_at.isoformat(),
            "erased_at": None if self.erased_at is None else self.erased_at.isoformat(),
            **{
                store: {place: [_plain(row) for row in found] for place, found in places.items() if found}
                for store, places in self._stores().items()
            },
            "unread": self.unread,
            "not_searched": [KAFKA_TOPICS, FILES],
        }

    def _stores(self) -> dict[str, Mapping[str, Rows]]:
        return {
            "messages": self.messages,
            "rows": self.rows,
            "items": self.items,
            "training": self.training,
            "training_earlier": self.earlier,
            "labels": self.labels,
            "served_log": self.served_log,
        }


def export_subject(
    stores: Stores,
    subject: Subject,
    *,
    now: datetime,
    training_sets: Sequence[Path] = (),
    step: Callable[[str], None] = lambda _: None,
) -> SubjectExport:
    """Read one subject from every store; changes nothing.

    `training_sets` are folders whose files of training sets and labels are searched. `step` is called with
    each step before it begins. Raises ExportIncomplete naming the step that failed and why.
    """
    found = SubjectExport(subject, now)
    with _step("read the engine", subject, step), stores.engine.connect() as connection:
        _read_engine(found, stores, connection)
    for entity in stores.served(subject):
        with _step("read the items in DynamoDB", subject, step):
            found.items[f"{stores.table_prefix}{entity.table}"] = stores.items(
                subject, entity, _ALWAYS
            ).read()
    if (log := stores.logged(subject)) is not None:
        with _step("read the served log", subject, step):
            found.served_log[str(log.folder)] = log.rows()
    searched = ErasedSubject(subject.entity.key, subject.value, _ALWAYS)
    with _step("open the Iceberg catalog", subject, step):
        catalog = stores.catalog()
        events = stores.events(subject, catalog)
    for spec in events:
        held = SubjectInEvents(
            catalog, spec, subject, searched, arrived_until=_ALWAYS, namespace=stores.namespace
        )
        with _step(f"read {held.name}", subject, step):
            found.training[held.name], found.earlier[held.name] = (
                [_message(row) if DATA in row else row for row in rows] for rows in held.rows()
            )
    if specs := stores.tiles(subject):
        tables: list[SubjectInTable] = [
            SubjectInTiles(catalog, spec, searched, stores.engine, namespace=stores.namespace)
            for spec in specs
        ]
        with _step("search the Iceberg catalog for training sets", subject, step):
            others = search_catalog(catalog, searched)
            for name in others.holding:
                mine = EqualTo(term=subject.key, value=str(subject.value))
                rows = scan_rows(catalog.load_table(name), row_filter=mine).read_all()
                found.labels[name] = rows.to_pylist()
        tables += [SubjectInTrainingSet(catalog, name, searched) for name in others.training_sets]
        found.unread = dict(others.unread)
        for table in tables:
            with _step(f"read {table.name}", subject, step):
                found.training[table.name], found.earlier[table.name] = table.rows()
    if training_sets:
        with _step("search the training sets", subject, step):
            for path in files_holding(searched, training_sets):
                found.labels[str(path)] = rows_of_file(path, searched)
    return found


@contextmanager
def _step(name: str, subject: Subject, announce: Callable[[str], None]) -> Iterator[None]:
    announce(name)
    try:
        yield
    except PrefsError as error:
        raise ExportIncomplete(
            f"the export of {subject} stopped at: {name} ({error}); nothing was written"
        ) from error
    except psycopg.Error as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ExportIncomplete(
            f"the export of {subject} stopped at: {name}, because the engine failed ({reason}); nothing was written: "
            "run the same command again"
        ) from error


def _read_engine(found: SubjectExport, stores: Stores, connection: psycopg.Connection[Any]) -> None:
    engine, subject = stores.engine, found.subject
    until = connection.execute("select now()").fetchall()[0][0]
    messages = RawMessages(connection, engine, stores.registry.topics.values(), subject, until)
    for raw_table, positions in messages.find().items():
        found.messages[raw_table] = [_message(row) for row in messages.read(raw_table, positions)]
    with translated(engine, ERASED):
        recorded = connection.execute(
            sql.SQL("select erased_at from {} where subject_kind = {} and subject_id = {}").format(
                sql.Identifier(engine.schema, ERASED), sql.Literal(subject.kind), sql.Literal(subject.id)
            )
        ).fetchone()
    found.erased_at = recorded[0].astimezone(UTC) if recorded else None
    for name, condition in keyed_relations(connection, engine, subject).items():
        query = sql.SQL("select * from {} where {}").format(sql.Identifier(engine.schema, name), condition)
        with translated(engine, name), connection.cursor(row_factory=dict_row) as cursor:
            found.rows[name] = cursor.execute(query).fetchall()


def _message(row: dict[str, Any]) -> dict[str, Any]:
    data = bytes(row.pop(DATA))
    try:
        return {**row, "message": unframed(data).decode()}
    except UnicodeDecodeError:
        return {**row, "message_base64": base64.b64encode(data).decode()}


def _plain(value: Any) -> Any:
    match value:
        case dict():
            return {str(name): _plain(one) for name, one in value.items()}
        case list() | tuple() | set() | frozenset():
            return [_plain(one) for one in value]
        case datetime():
            return (value if value.tzinfo is None else value.astimezone(UTC)).isoformat()
        case date():
            return value.isoformat()
        case Decimal():
            # An exact integer stays a number, as DynamoDB's are.
            return int(value) if value == value.to_integral_value() and abs(value) < 2**53 else str(value)
        case bytes() | bytearray() | memoryview():
            return base64.b64encode(bytes(value)).decode()
        case None | bool() | int() | float() | str():
            return value
    return str(value)
