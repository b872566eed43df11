"""Parity: the comparison of served values with those of the training tables, attribute by attribute.

For a sample of an entity's ids, the values are recomputed by the definition of the training sets, from the tables plus
the days whose newest version only the engine holds, and compared with the items of the online store.
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

from dagster_prefs.declarations.contract import LAST_EVENT_AT, Contract
from dagster_prefs.dynamodb.access import ItemAccess
from dagster_prefs.dynamodb.items import plain
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.iceberg.catalog import translated
from dagster_prefs.iceberg.duck import JOINING, duck_session
from dagster_prefs.iceberg.export import DEFAULT_NAMESPACE, exported_days
from dagster_prefs.iceberg.files import read_rows, tile_files
from dagster_prefs.iceberg.tables import TileTable
from dagster_prefs.iceberg.tiles import tile_snapshot
from dagster_prefs.ids import Id
from dagster_prefs.training.windows import Features, load_tiles, spread_part

Items = Mapping[Id, Mapping[str, Mapping[str, Any]]]
"""Id → domain name → attributes, as served; an id or domain without item is absent."""

# How long after a subject's last tile an item that should be gone is still looked up.
EXTRA_DAYS = 30
# The number of the largest differences that a report names.
EXAMPLES = 20
COMPARED, MISMATCHED, MISSING, EXTRA = range(4)


@dataclass(frozen=True)
class Difference:
    """A served value and the expected one; None stands for NULL. `distance` orders examples."""

    subject: Id
    domain: str
    attribute: str
    served: Any
    due: Any
    distance: float


@dataclass(frozen=True)
class AttributeParity:
    """Counts of one attribute: compared values, mismatches, expected values that are not served, and the reverse.

    Each rate is 0…1, relative to all values that could have been such a case.
    """

    domain: str
    attribute: str
    compared: int
    mismatched: int
    missing: int
    extra: int

    @property
    def mismatch_rate(self) -> float:
        return self.mismatched / self.compared if self.compared else 0.0

    @property
    def missing_rate(self) -> float:
        return self.missing / (self.compared + self.missing) if self.missing else 0.0

    @property
    def extra_rate(self) -> float:
        return self.extra / (self.compared + self.extra) if self.extra else 0.0


@dataclass(frozen=True)
class ParityReport:
    """Result of one comparison.

    `subjects` is the number of compared ids. `missing` and `extra` count, by domain, expected items that are not
    served, and the reverse. `left_out` names the attributes that no tile has, with the reason. `in_flight` counts items
    left out because an event younger than the grace time may not have reached them yet. `engine_days` are the days read
    from the engine, by table. `worst` are the largest differences.
    """

    subjects: int
    attributes: tuple[AttributeParity, ...]
    missing: Mapping[str, int]
    extra: Mapping[str, int]
    in_flight: int
    engine_days: Mapping[str, tuple[date, ...]]
    worst: tuple[Difference, ...]
    left_out: Mapping[str, str]

    @property
    def passed(self) -> bool:
        return not any(found.mismatched or found.missing or found.extra for found in self.attributes)

    def of(self, domain: str) -> tuple[AttributeParity, ...]:
        """Return the attributes of one domain."""
        return tuple(found for found in self.attributes if found.domain == domain)


def served_items(
    client: Any, contract: Contract, table: str, features: Features
) -> Callable[[Sequence[Id]], Items]:
    """Return the reader of an entity's items for `check_parity`: strongly consistent reads of its DynamoDB table.

    Values keep their stored types, whatever the contract says, so that a wrong type is a mismatch of its attribute.
    Raises StoreUnavailable when the reader is called and DynamoDB rejects the request or does not answer.
    """
    access = ItemAccess(client, contract.tables[features.entity.name], table)
    keys = (access.partition_key, access.sort_key)

    def read(subjects: Sequence[Id]) -> Items:
        found: dict[Id, dict[str, dict[str, Any]]] = {}
        for domain in contract.domains.values():
            if domain.name not in features.domains:
                continue
            for subject, item in access.get(domain.key, subjects).items():
                values = {name: plain(typed) for name, typed in item.items() if name not in keys}
                found.setdefault(subject, {})[domain.name] = values
        return found

    return read


@dataclass(frozen=True)
class ParityOptions:
    """Options of a comparison.

    `share` is the part of all ids to compare (0…1), the same ids every time. `spread_seconds` is the setting that moves
    each subject's day boundary. An event younger than `grace_seconds` may not have reached the served items yet.
    `namespace` is that of the training tables.
    """

    share: float = 0.01
    spread_seconds: int = 0
    grace_seconds: float = 60.0
    namespace: str = DEFAULT_NAMESPACE

    @property
    def sampled(self) -> int:
        """The highest 28-bit hash of an id in the sample."""
        return round(self.share * 0xFFFFFFF)


def check_parity(
    engine: EngineConfiguration,
    catalog: Catalog,
    read_items: Callable[[Sequence[Id]], Items],
    *,
    features: Features,
    now: datetime,
    options: ParityOptions = ParityOptions(),
) -> ParityReport:
    """Compare a sample of an entity's ids, chosen by a hash, with what `read_items` returns for them.

    Values are compared exactly. `now` is UTC. Raises OfflineError, EngineUnavailable.
    """
    today = now.astimezone(UTC).date()
    oldest = features.first_day(today) - timedelta(days=EXTRA_DAYS + 1)
    engine_days: dict[str, tuple[date, ...]] = {}
    with duck_session(*JOINING) as session:
        for spec, columns in features.sources:
            names = (*columns, LAST_EVENT_AT)
            engine_days[spec.name] = _load(session, engine, catalog, spec, names, oldest, options)
        boundary = now.timestamp()
        key = ", ".join(features.key_names)
        point_keys = ", ".join(f"points.{name}" for name in features.key_names)
        session.execute(
            f"create table points as select row_number() over (order by {key}) as point, {key}, "
            "date '1970-01-01' + cast(floor(($boundary - case when $spread = 0 then 0 "
            f"else {spread_part(features.key, '$spread')} end) / 86400.0) as integer) as day "
            f"from ({' union '.join(f'select distinct {key} from {spec.name}' for spec, _ in features.sources)})",
            {"boundary": boundary, "spread": options.spread_seconds},
        )
        query = features.sql("serving", last_events=True)
        due = session.execute(
            f"select {point_keys}, due.* exclude (point) from ({query}) as due join points using (point)"
        )
        columns = tuple(column[0] for column in due.description or [])
        rows = [dict(zip(columns, row, strict=True)) for row in due.fetchall()]
    served = read_items([_subject(features, row) for row in rows])
    return _compare(features, rows, served, round((boundary - options.grace_seconds) * 1000), engine_days)


def _load(
    session: duckdb.DuckDBPyConnection,
    engine: EngineConfiguration,
    catalog: Catalog,
    spec: TileTable,
    columns: tuple[str, ...],
    oldest: date,
    options: ParityOptions,
) -> tuple[date, ...]:
    """Create the table of one tile for the sampled ids; return the days that came from the engine."""
    namespace = options.namespace
    exported = exported_days(catalog, spec, namespace=namespace)
    held = {day: found.token for day, found in exported.items()}
    with translated(f"the table {namespace}.{spec.name}"), tile_snapshot(engine, spec) as tiles:
        current = tiles.fingerprints()
        stale = tuple(
            sorted(day for day, found in current.items() if day >= oldest and held.get(day) != found.token)
        )
        try:
            table: Table | None = catalog.load_table(spec.identifier(namespace))
        except NoSuchTableError:
            table = None
        names = [*spec.entity.key_names, spec.day, *columns]

        def batches() -> Iterator[pa.RecordBatch]:
            if table is not None:
                for day, files in tile_files(table, spec, first=oldest).items():
                    if day not in stale:
                        for file in files:
                            yield from read_rows(table, file, names)
            for day in stale:
                yield from tiles.rows(day, spec.arrow_schema)

        sampled = (
            f"cast('0x' || left(md5(cast({spec.subject} as varchar)), 7) as bigint) <= {options.sampled}"
        )
        load_tiles(session, spec, columns, batches(), where=sampled)
    return stale


def _compare(
    features: Features,
    rows: Sequence[Mapping[str, Any]],
    served: Items,
    in_flight_since: int,
    engine_days: Mapping[str, tuple[date, ...]],
) -> ParityReport:
    # Counts per attribute: compared, mismatched, missing, extra.
    counts: dict[tuple[str, str], list[int]] = {
        (domain, name): [0, 0, 0, 0]
        for domain in features.domains
        for name in [*(value.name for value in features.values if value.domain == domain), LAST_EVENT_AT]
    }
    missing = dict.fromkeys(features.domains, 0)
    extra = dict.fromkeys(features.domains, 0)
    in_flight = 0
    differences: list[Difference] = []
    for row in rows:
        subject = _subject(features, row)
        for domain in features.domains:
            item = served.get(subject, {}).get(domain)
            newest = row[f"{domain}_last_event_at"]
            if newest is not None and newest >= in_flight_since:
                in_flight += 1
                continue
            if newest is None and item is None:
                continue
            missing[domain] += item is None
            extra[domain] += newest is None
            for (of, name), count in counts.items():
                if of != domain:
                    continue
                due = newest if name == LAST_EVENT_AT else row[name]
                value = None if item is None else item.get(name)
                if newest is None:
                    kind, due = EXTRA, None
                elif item is None or name not in item:
                    kind = MISSING
                else:
                    count[COMPARED] += 1
                    if value == due:
                        continue
                    kind = MISMATCHED
                count[kind] += 1
                # For an item that is missing or extra as a whole, one attribute is example enough.
                if kind == MISMATCHED or name == LAST_EVENT_AT or (kind == MISSING and item is not None):
                    differences.append(Difference(subject, domain, name, value, due, _distance(value, due)))
    differences.sort(key=lambda found: (-found.distance, found.subject, found.attribute))
    return ParityReport(
        subjects=len(rows),
        attributes=tuple(AttributeParity(*key, *count) for key, count in counts.items()),
        missing=missing,
        extra=extra,
        in_flight=in_flight,
        engine_days=engine_days,
        worst=tuple(differences[:EXAMPLES]),
        left_out=features.left_out,
    )


def _subject(features: Features, row: Mapping[str, Any]) -> Any:
    """Return the id from a row with the entity's key columns."""
    parts = tuple(row[name] for name in features.key_names)
    return parts if len(parts) > 1 else parts[0]


def _distance(served: Any, due: Any) -> float:
    """Return the relative difference of two numbers; infinite if they are not numbers."""
    try:
        return abs(float(served) - float(due)) / max(abs(float(due)), 1.0)
    except (TypeError, ValueError):
        return math.inf
