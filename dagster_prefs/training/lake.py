"""What training values are read from: the state of the lake's tables, and the inputs of values as served."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta

import duckdb
import pyarrow as pa
from pyiceberg.catalog import Catalog
from pyiceberg.exceptions import NoSuchTableError
from pyiceberg.table import Table
from pyiceberg.table.snapshots import Snapshot

from dagster_prefs.engine.spreads import Spreads
from dagster_prefs.iceberg.catalog import OfflineError, translated
from dagster_prefs.iceberg.event_reader import (
    Selection,
    complete_from_of,
    complete_until_of,
    load_accepted,
)
from dagster_prefs.iceberg.event_tables import ARRIVED, SENT, EventTable, event_tables
from dagster_prefs.iceberg.export import DEFAULT_NAMESPACE
from dagster_prefs.iceberg.files import read_rows, tile_files
from dagster_prefs.iceberg.tables import TileTable
from dagster_prefs.training.served import ARRIVAL_KNOWN, ServedInputs, TopicEvents
from dagster_prefs.training.served_sql import ServedFeatures

# How much earlier than an event's time its arrival may be, beyond the tolerance of the typed events: a broker's clock
# may be ahead of the engine's.
_CLOCKS = timedelta(days=1)


# How long after it happened an event without a broker's timestamp counts as history.
HISTORY_AFTER = timedelta(days=1)


class SnapshotExpired(OfflineError):
    """A required version of the tiles has expired."""


class EventsIncomplete(OfflineError):
    """The lake does not say up to when it holds the events of a topic."""


@dataclass(frozen=True)
class Pins:
    """The state of the lake from which a training set is made.

    The snapshot of each table by its name, None for a table without any; and for values as served the instant up to
    which each topic's events are complete, and that from which they are, for the topics of which retention has removed
    events.
    """

    snapshots: Mapping[str, int | None]
    watermarks: Mapping[str, datetime] = field(default_factory=dict)
    complete_from: Mapping[str, datetime] = field(default_factory=dict)


def pin_served(
    catalog: Catalog, features: ServedFeatures, *, namespace: str = DEFAULT_NAMESPACE
) -> tuple[dict[str, Table], Pins]:
    """Return the tables that values as served are read from, by name, and their present state.

    Training tables that do not exist are left out: their rows are computed from events. Raises TableMissing for a topic
    that was never exported, EventsIncomplete, or another OfflineError.
    """
    tables: dict[str, Table] = {}
    watermarks: dict[str, datetime] = {}
    complete_from: dict[str, datetime] = {}
    for topic, spec in _events_of(features).items():
        with translated(f"the table {namespace}.{spec.name}"):
            table = catalog.load_table(spec.identifier(namespace))
            until, start = complete_until_of(table), complete_from_of(table)
        if until is None:
            raise EventsIncomplete(
                f"{namespace}.{spec.name} does not say up to when it holds the events of {topic}, because it was "
                "never exported or was rolled back: run `prefs export`"
            )
        tables[spec.name], watermarks[topic] = table, until
        if start is not None:
            complete_from[topic] = start
    for tile in features.tiles:
        with translated(f"the table {namespace}.{tile.spec.name}"):
            try:
                tables[tile.spec.name] = catalog.load_table(tile.spec.identifier(namespace))
            except NoSuchTableError:
                continue
    snapshots = {
        name: current.snapshot_id if (current := table.current_snapshot()) else None
        for name, table in tables.items()
    }
    return tables, Pins(snapshots, watermarks, complete_from)


def lake_inputs(
    catalog: Catalog,
    features: ServedFeatures,
    pins: Pins,
    *,
    spreads: Spreads,
    namespace: str = DEFAULT_NAMESPACE,
) -> ServedInputs:
    """Return the inputs of values as served from the lake in the state of `pins`.

    Raises SnapshotExpired if a snapshot is gone.
    """
    events = {}
    for topic, spec in _events_of(features).items():
        with translated(f"the table {namespace}.{spec.name}"):
            pinned_snapshot(catalog.load_table(spec.identifier(namespace)), pins.snapshots[spec.name])
        loader = _Events(catalog, spec, namespace, pins.snapshots[spec.name], features)
        events[topic] = TopicEvents(
            loader, watermark=pins.watermarks[topic], complete_from=pins.complete_from.get(topic)
        )
    tiles = {
        tile.spec.name: _Tiles(catalog, tile.spec, namespace, pins.snapshots[tile.spec.name])
        for tile in features.tiles
        if tile.spec.name in pins.snapshots
    }
    return ServedInputs(events, tiles, spreads)


def _events_of(features: ServedFeatures) -> dict[str, EventTable]:
    tables = event_tables(features.registry)
    return {topic: tables[topic].typed for topic in features.topics}


@dataclass(frozen=True)
class _Events:
    """Loads the accepted events of a topic's table in the lake."""

    catalog: Catalog
    spec: EventTable
    namespace: str
    snapshot_id: int | None
    features: ServedFeatures

    def __call__(
        self,
        session: duckdb.DuckDBPyConnection,
        name: str,
        columns: Sequence[str],
        since: datetime | None,
    ) -> None:
        tolerance = timedelta(hours=float(self.features.registry.variables.get("future_tolerance_hours", 24)))
        selection = Selection(
            namespace=self.namespace,
            columns=[*columns, SENT],
            arrived_from=None if since is None else since - tolerance - _CLOCKS,
            snapshot_id=self.snapshot_id,
        )
        load_accepted(session, name, self.catalog, self.spec, selection)
        session.execute(f"alter table {name} add column {ARRIVAL_KNOWN} boolean default true")
        if time := self.spec.topic.time:
            # A broker's timestamp shows that an event was on its way. Without one, and long after it happened, it was
            # read from history, and `arrived_at` is when that was read.
            session.execute(
                f"update {name} set {ARRIVAL_KNOWN} = false where {SENT} is null and "
                f"{ARRIVED} > {time} + interval '{HISTORY_AFTER.days} days'"
            )


@dataclass(frozen=True)
class _Tiles:
    """Reads the rows of a training table."""

    catalog: Catalog
    spec: TileTable
    namespace: str
    snapshot_id: int | None

    def __call__(self, columns: Sequence[str], first: date, last: date) -> Iterable[pa.RecordBatch]:
        with translated(f"the table {self.namespace}.{self.spec.name}"):
            table = self.catalog.load_table(self.spec.identifier(self.namespace))
            snapshot = pinned_snapshot(table, self.snapshot_id)
            yield from current_tiles(table, self.spec, snapshot, columns, first, last)


def pinned_snapshot(table: Table, snapshot_id: int | None) -> Snapshot | None:
    """Return a snapshot of a table, None for a table that had none. Raises SnapshotExpired."""
    if snapshot_id is None:
        return None
    snapshot = table.snapshot_by_id(snapshot_id)
    if snapshot is None:
        raise SnapshotExpired(
            f"snapshot {snapshot_id} of {'.'.join(table.name())} has expired, by age or because it held an erased "
            "subject, and this training set cannot be rebuilt: keep snapshots longer or tag those of training sets"
        )
    return snapshot


def current_tiles(
    table: Table,
    spec: TileTable,
    snapshot: Snapshot | None,
    columns: Sequence[str],
    first: date,
    last: date,
) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a snapshot from a day to another: the entity's keys, the day and `columns`."""
    if snapshot is None:
        return
    for files in tile_files(table, spec, first=first, last=last, snapshot_id=snapshot.snapshot_id).values():
        for file in files:
            yield from read_rows(table, file, [*spec.entity.key_names, spec.day, *columns])
