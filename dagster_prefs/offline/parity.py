"""Parity: whether what is served equals what the training tables say, attribute by attribute.

A sample of viewers is recomputed by the definition that training sets use, from the tables plus those days
that only the engine holds in their newest version, and compared with the items of the online store.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any

import duckdb
import pyarrow as pa
from pyiceberg.catalog import Catalog
from pyiceberg.exceptions import NoSuchTableError
from pyiceberg.table import Table

from dagster_prefs.engine.connection import EngineConnection
from dagster_prefs.offline.catalog import explained
from dagster_prefs.offline.duck import duck_session
from dagster_prefs.offline.export import DEFAULT_NAMESPACE, exported_fingerprints
from dagster_prefs.offline.publish import day_of, read_file
from dagster_prefs.offline.tables import TileTable
from dagster_prefs.offline.tiles import tile_snapshot
from dagster_prefs.offline.windows import domains, features, features_sql, first_day, sources

Items = Mapping[int, Mapping[str, Mapping[str, Any]]]
"""Viewer → domain name → attributes, as served; a viewer or domain without item is absent."""

# How long after a viewer's last tile an item that ought to be gone is still looked for.
EXTRA_DAYS = 30
LAST_EVENT_AT = "last_event_at"


@dataclass(frozen=True)
class Difference:
    """One value that is served and one that was due; None stands for NULL, `distance` orders examples."""

    viewer_id: int
    domain: str
    attribute: str
    served: Any
    due: Any
    distance: float


@dataclass(frozen=True)
class AttributeParity:
    """Counts of one attribute; `rate` is the share of the compared values that differ."""

    domain: str
    attribute: str
    compared: int
    mismatched: int

    @property
    def rate(self) -> float:
        return self.mismatched / self.compared if self.compared else 0.0


@dataclass(frozen=True)
class ParityReport:
    """Result of one comparison.

    `missing` and `extra` count, by domain, items that ought to be there and are not, and the reverse;
    `unsettled` counts items left out because an event younger than the settling time may still be on its way;
    `engine_days` are the days that were read from the engine, by table; `worst` are the largest differences.
    """

    viewers: int
    attributes: tuple[AttributeParity, ...]
    missing: Mapping[str, int]
    extra: Mapping[str, int]
    unsettled: int
    engine_days: Mapping[str, tuple[date, ...]]
    worst: tuple[Difference, ...]

    @property
    def passed(self) -> bool:
        return not (
            any(attribute.mismatched for attribute in self.attributes)
            or any(self.missing.values())
            or any(self.extra.values())
        )


def check_parity(
    engine: EngineConnection,
    catalog: Catalog,
    read_items: Callable[[Sequence[int]], Items],
    *,
    now: datetime,
    share: float = 0.01,
    spread_seconds: int = 0,
    settle: timedelta = timedelta(seconds=60),
    namespace: str = DEFAULT_NAMESPACE,
    examples: int = 20,
    memory: str = "512MB",
) -> ParityReport:
    """Compare a sample of viewers, chosen by a hash of their id, with what `read_items` returns for them.

    `share` is the part of all viewers to look at (0…1), always the same ones; `spread_seconds` is the setting
    that moves each viewer's day boundary. Values are compared exactly. Raises OfflineError,
    EngineUnavailable.
    """
    today = now.astimezone(UTC).date()
    oldest = first_day(today) - timedelta(days=EXTRA_DAYS + 1)
    threshold = round(share * 0xFFFFFFF)
    engine_days: dict[str, tuple[date, ...]] = {}
    with duck_session(memory) as session:
        for spec, columns in sources():
            engine_days[spec.name] = _load(
                session, engine, catalog, namespace, spec, (*columns, LAST_EVENT_AT), oldest, threshold
            )
        boundary = now.timestamp()
        session.execute(
            "create table points as select row_number() over (order by viewer_id) as point, viewer_id, "
            "date '1970-01-01' + cast(floor(($boundary - case when $spread = 0 then 0 "
            "else abs(viewer_id % $spread) end) / 86400.0) as integer) as day "
            f"from ({' union '.join(f'select viewer_id from {spec.name}' for spec, _ in sources())})",
            {"boundary": boundary, "spread": spread_seconds},
        )
        query = features_sql("serving", last_events=True)
        due = session.execute(
            f"select points.viewer_id, due.* exclude (point) from ({query}) as due join points using (point)"
        )
        names = [column[0] for column in due.description or []]
        rows = [dict(zip(names, row, strict=True)) for row in due.fetchall()]
    served = read_items([row["viewer_id"] for row in rows])
    return _compare(rows, served, int((now - settle).timestamp() * 1000), engine_days, examples)


def _load(
    session: duckdb.DuckDBPyConnection,
    engine: EngineConnection,
    catalog: Catalog,
    namespace: str,
    spec: TileTable,
    columns: tuple[str, ...],
    oldest: date,
    threshold: int,
) -> tuple[date, ...]:
    """Make the table of one tile for the sampled viewers; returns the days that came from the engine."""
    fields = [pa.field("viewer_id", pa.int64()), pa.field(spec.day, pa.date32())]
    fields += [pa.field(name, pa.string() if name == "genre" else pa.int64()) for name in columns]
    shape = pa.schema(fields)
    kinds = {"genre": "varchar", spec.day: "date"}
    types = [f"{name} {kinds.get(name, 'bigint')}" for name in shape.names]
    session.execute(f"create table {spec.name} ({', '.join(types)})")
    held = exported_fingerprints(catalog, spec, namespace=namespace)
    with explained(f"the table {namespace}.{spec.name}"), tile_snapshot(engine, spec) as tiles:
        current = tiles.fingerprints()
        stale = tuple(
            sorted(day for day, found in current.items() if day >= oldest and held.get(day) != found.token)
        )
        try:
            table: Table | None = catalog.load_table(spec.identifier(namespace))
        except NoSuchTableError:
            table = None
        names = ["viewer_id", spec.day, *columns]

        def batches() -> Iterator[pa.RecordBatch]:
            if table is not None:
                for task in table.scan().plan_files():
                    if day_of(task.file) >= oldest and day_of(task.file) not in stale:
                        yield from read_file(table, task.file, names)
            for day in stale:
                yield from tiles.rows(day, spec.arrow_schema)

        for batch in batches():
            arrays = [batch.column(field.name).cast(field.type) for field in shape]
            session.register("incoming", pa.Table.from_arrays(arrays, schema=shape))
            session.execute(
                f"insert into {spec.name} select * from incoming "
                "where cast('0x' || left(md5(cast(viewer_id as varchar)), 7) as bigint) <= $threshold",
                {"threshold": threshold},
            )
            session.unregister("incoming")
    return stale


def _compare(
    rows: Sequence[Mapping[str, Any]],
    served: Items,
    settled_before: int,
    engine_days: Mapping[str, tuple[date, ...]],
    examples: int,
) -> ParityReport:
    compared: dict[tuple[str, str], list[int]] = {
        (domain, name): [0, 0]
        for domain in domains()
        for name in [*(feature.name for feature in features() if feature.domain == domain), LAST_EVENT_AT]
    }
    missing = dict.fromkeys(domains(), 0)
    extra = dict.fromkeys(domains(), 0)
    unsettled = 0
    differences: list[Difference] = []
    for row in rows:
        viewer = row["viewer_id"]
        for domain in domains():
            item = served.get(viewer, {}).get(domain)
            newest = row[f"{domain}_last_event_at"]
            if newest is not None and newest >= settled_before:
                unsettled += 1
                continue
            if newest is None or item is None:
                missing[domain] += newest is not None and item is None
                extra[domain] += newest is None and item is not None
                continue
            for (of, name), counts in compared.items():
                if of != domain:
                    continue
                due = newest if name == LAST_EVENT_AT else row[name]
                counts[0] += 1
                if item.get(name) != due:
                    counts[1] += 1
                    value = item.get(name)
                    differences.append(Difference(viewer, domain, name, value, due, _distance(value, due)))
    differences.sort(key=lambda found: (-found.distance, found.viewer_id, found.attribute))
    return ParityReport(
        viewers=len(rows),
        attributes=tuple(AttributeParity(*key, *counts) for key, counts in compared.items()),
        missing=missing,
        extra=extra,
        unsettled=unsettled,
        engine_days=engine_days,
        worst=tuple(differences[:examples]),
    )


def _distance(served: Any, due: Any) -> float:
    """Relative difference of two numbers; infinite where they are no numbers."""
    try:
        return abs(float(served) - float(due)) / max(abs(float(due)), 1.0)
    except (TypeError, ValueError):
        return math.inf
