"""What is described: the complete days of the training tables, and the rolling views as they are now.

A day of a training table is described again only when its rows changed, which the names of its files tell.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from functools import partial

import duckdb
import psycopg
import pyarrow as pa
from psycopg import sql
from pyiceberg.catalog import Catalog
from pyiceberg.exceptions import NoSuchTableError
from pyiceberg.table import Table
from pyiceberg.types import DateType, StringType, TimestamptzType

from dagster_prefs.declarations.contract import LAST_EVENT_AT, Attribute, Domain
from dagster_prefs.declarations.registry import Registry
from dagster_prefs.declarations.reserved import people_only
from dagster_prefs.engine.catalog import missing_relation, row_counts
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.errors import PrefsError
from dagster_prefs.iceberg.catalog import OfflineError, translated
from dagster_prefs.iceberg.duck import duck_session
from dagster_prefs.iceberg.export import NAMED_REASONS
from dagster_prefs.iceberg.files import LiveFile, parts_of, read_rows, tile_files
from dagster_prefs.iceberg.tables import TileTable, arrow_schema, tile_tables
from dagster_prefs.values.describe import SESSION, Described, Measured, describe
from dagster_prefs.values.statistics import Kind, Statistics
from dagster_prefs.values.store import RelationDay, described_days, write_statistics

# Four earlier days of the same weekday for each day of the last week.
DAYS_DESCRIBED = 35
# Rows of a rolling view that are read, chosen by a hash of the key; their quantiles are a percent off at most.
VIEW_ROWS = 50_000
# The column with the day of a rolling view's rows; no column in SQL has such a name.
DAY = "day described"


class ViewUnreadable(PrefsError):
    """The engine cannot deliver the rows of a rolling view."""


class DaysNotDescribed(OfflineError):
    """Days could not be described, while others were; the message names them with their reasons."""

    def __init__(self, failed: Mapping[str, OfflineError]) -> None:
        reasons = [f"{place}: {error}" for place, error in failed.items()]
        more = f"; and {len(reasons) - NAMED_REASONS} more" if len(reasons) > NAMED_REASONS else ""
        super().__init__(
            f"{len(reasons)} days or tables were not described, every other one was "
            f"({'; '.join(reasons[:NAMED_REASONS])}{more})"
        )


@dataclass(frozen=True)
class Collected:
    """The relations and days that were described, and those whose statistics were deleted with their rows."""

    described: tuple[RelationDay, ...]
    gone: tuple[RelationDay, ...]


def _is_counted_only(registry: Registry, relation: str, column: str) -> bool:
    """Whether no value of a column is kept: of personal data, and of keys, which are names and not values."""
    return registry.is_personal(relation, column) or any(
        column in entity.key_names for entity in registry.entities.values()
    )


def tile_attributes(registry: Registry, spec: TileTable) -> list[Measured]:
    """Return what is described of a tile: every column but its day."""
    found = []
    for column in spec.columns:
        if column.name == spec.day:
            continue
        name = f'"{column.name}"'
        if _is_counted_only(registry, spec.tile, column.name):
            found.append(Measured(column.name, "personal", name))
        elif isinstance(column.type, StringType):
            found.append(Measured(column.name, "text", name))
        elif isinstance(column.type, DateType | TimestamptzType):
            found.append(Measured(column.name, "time", f"epoch({name})"))
        else:
            found.append(Measured(column.name, "number", name))
    return found


def collect_tiles(
    catalog: Catalog,
    registry: Registry,
    namespace: str,
    *,
    now: datetime,
    days: int = DAYS_DESCRIBED,
    empty: Mapping[str, Collection[date]] | None = None,
) -> Collected:
    """Describe those of the last `days` complete days of every training table that are new or have changed.

    `now` is UTC. `empty` are days on which the engine has no rows of a tile (relation → days): no traffic is a value
    too. Idempotent, with one commit. A table or day that cannot be read prevents no other: raises DaysNotDescribed,
    which names each with its reason, once all others are described. Raises another OfflineError where the table of
    statistics itself fails.
    """
    today = now.astimezone(UTC).date()
    first = today - timedelta(days=days)
    known = described_days(catalog, namespace)
    made: list[Statistics] = []
    gone: list[RelationDay] = []
    failed: dict[str, OfflineError] = {}
    with duck_session(*SESSION) as session:
        for spec in tile_tables(registry).values():
            try:
                table_days = TableDays.load(catalog, registry, spec, namespace, first=first)
            except OfflineError as error:
                failed[spec.tile] = error
                continue
            quiet = {day for day in (empty or {}).get(spec.tile, ()) if first <= day < today}
            changed = {
                day
                for day in {*table_days.files, *quiet}
                if day < today and known.get((spec.tile, day)) != table_days.version(day)
            }
            try:
                made += table_days.describe(session, changed, now)
            except OfflineError:
                # One of them cannot be read, and which one it is shows when each is read by itself.
                for day in sorted(changed):
                    try:
                        made += table_days.describe(session, {day}, now)
                    except OfflineError as error:
                        failed[f"{spec.tile} of {day}"] = error
            gone += [
                (relation, day)
                for relation, day in known
                if relation == spec.tile
                and first <= day < today
                and day not in table_days.files
                and day not in quiet
            ]
    write_statistics(catalog, namespace, made, gone=gone)
    if failed:
        raise DaysNotDescribed(failed)
    return Collected(tuple(dict.fromkeys((one.relation, one.day) for one in made)), tuple(gone))


@dataclass(frozen=True)
class TableDays:
    """The days of a training table from some day on, with their files."""

    spec: TileTable
    attributes: Sequence[Measured]
    table: Table | None
    files: Mapping[date, list[LiveFile]]

    @classmethod
    def load(
        cls,
        catalog: Catalog,
        registry: Registry,
        spec: TileTable,
        namespace: str,
        *,
        first: date | None = None,
    ) -> TableDays:
        """Plan the files of the days from `first` on; without any if the table does not exist. Raises OfflineError."""
        attributes = tile_attributes(registry, spec)
        with translated(f"the table {namespace}.{spec.name}"):
            try:
                table = catalog.load_table(spec.identifier(namespace))
            except NoSuchTableError:
                return cls(spec, attributes, None, {})
            held = {column.name for column in table.schema().fields}
            return cls(
                spec,
                # A column that is new in the declaration enters the table with the next export.
                [one for one in attributes if one.name in held],
                table,
                tile_files(table, spec, first=first),
            )

    @property
    def schema(self) -> pa.Schema:
        """The Arrow schema of the table."""
        return arrow_schema(self.table) if self.table is not None else self.spec.arrow_schema

    def version(self, day: date) -> str:
        """Return what identifies a day's rows and what is described of them."""
        content = [*sorted(parts_of(self.files.get(day, []))), *(repr(one) for one in self.attributes)]
        return hashlib.sha256("\n".join(content).encode()).hexdigest()[:16]

    def describe(
        self, session: duckdb.DuckDBPyConnection, days: Collection[date], now: datetime
    ) -> list[Statistics]:
        """Describe these days, in one pass over all of their rows. Raises OfflineError."""
        if not days:
            return []
        files = [file for day in sorted(days) for file in self.files.get(day, [])]
        what = Described(
            source="tile",
            relation=self.spec.tile,
            subject=self.spec.subject,
            day=self.spec.day,
            days={
                day: (
                    sum(file.data.record_count for file in self.files.get(day, [])),
                    self.version(day),
                )
                for day in days
            },
            measured_at=now,
        )
        return describe(session, what, self.attributes, self.schema, partial(self._rows, files))

    def _rows(self, files: Sequence[LiveFile], columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Yield the rows of files in these columns."""
        if self.table is None:
            return
        schema = pa.schema([self.schema.field(name) for name in columns])
        with translated(f"the table {'.'.join(self.table.name())}"):
            for file in files:
                for batch in read_rows(self.table, file, columns):
                    yield batch.cast(schema)


# Rolling views


def collect_views(
    catalog: Catalog, registry: Registry, engine: EngineConfiguration, namespace: str, *, now: datetime
) -> Collected:
    """Describe every domain's rolling view as it is now, as the statistics of the day of `now` (UTC).

    At most some VIEW_ROWS rows of a view are read. Raises ViewUnreadable, EngineUnavailable or OfflineError.
    """
    made: list[Statistics] = []
    with engine.connect() as connection, duck_session(*SESSION) as session:
        for domain in registry.contract.domains.values():
            made += describe_view(session, connection, engine, registry, domain, now=now)
    write_statistics(catalog, namespace, made)
    return Collected(tuple(dict.fromkeys((one.relation, one.day) for one in made)), ())


def describe_view(
    session: duckdb.DuckDBPyConnection,
    connection: psycopg.Connection[tuple[object, ...]],
    engine: EngineConfiguration,
    registry: Registry,
    domain: Domain,
    *,
    now: datetime,
) -> list[Statistics]:
    """Describe a domain's rolling view as it is now, as of the day of `now` (UTC). Raises ViewUnreadable."""
    try:
        count = row_counts(connection, engine, [domain.relation], exact_up_to=VIEW_ROWS)
        rows = _view_rows(connection, engine, registry, domain, count.get(domain.relation, 0))
    except psycopg.Error as error:
        missing = missing_relation(error) or " ".join(str(error).split())
        raise ViewUnreadable(
            f"the rolling view {domain.relation} cannot be read ({missing}): run `prefs apply`"
        ) from error
    day = now.astimezone(UTC).date()
    rows = rows.append_column(DAY, pa.repeat(pa.scalar(day, pa.date32()), rows.num_rows))
    what = Described(
        source="view",
        relation=domain.relation,
        subject=registry.entity(domain.entity).key.name,
        day=DAY,
        days={day: (max(count.get(domain.relation, 0), rows.num_rows), now.isoformat())},
        measured_at=now,
    )
    return describe(session, what, _view_attributes(registry, domain), rows.schema, partial(_batches, rows))


def _batches(rows: pa.Table, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    yield from rows.select(list(columns)).to_batches()


def _view_attributes(registry: Registry, domain: Domain) -> list[Measured]:
    return [
        Measured(
            name,
            "personal" if _is_counted_only(registry, domain.relation, name) else _kind(name, attribute),
            f'"{name}"',
        )
        for name, attribute in domain.attributes.items()
    ]


def _kind(name: str, attribute: Attribute) -> Kind:
    if name == LAST_EVENT_AT:
        return "time"
    if attribute.is_list:
        return "list"
    return "text" if attribute.type == "string" else "number"


def _view_rows(
    connection: psycopg.Connection[tuple[object, ...]],
    engine: EngineConfiguration,
    registry: Registry,
    domain: Domain,
    count: int,
) -> pa.Table:
    """Read a sample of a rolling view: its subjects, and each attribute as the number or text that is described."""
    entity = registry.entity(domain.entity)
    kinds = {one.name: one.kind for one in _view_attributes(registry, domain)}
    columns = [sql.SQL("{}::varchar").format(sql.Identifier(entity.key.name))]
    types: dict[str, pa.DataType] = {entity.key.name: pa.string()}
    for name, kind in kinds.items():
        shape, types[name] = {
            "number": ("{}::double precision", pa.float64()),
            # Milliseconds since 1970.
            "time": ("{}::double precision / 1000", pa.float64()),
            "list": ("cardinality({})::double precision", pa.float64()),
        }.get(kind, ("{}::varchar", pa.string()))
        columns.append(sql.SQL(shape).format(sql.Identifier(name)))
    # The first 28 bits of the hash, in hexadecimal digits that compare as numbers do.
    share = min(1.0, VIEW_ROWS / count) if count else 1.0
    rows = connection.execute(
        sql.SQL("select {} from {} where {} and left(md5({}::varchar), 7) <= {}").format(
            sql.SQL(", ").join(columns),
            sql.Identifier(engine.schema, domain.relation),
            people_only(entity.key),
            sql.Identifier(entity.key.name),
            sql.Literal(f"{round(share * 0xFFFFFFF):07x}"),
        )
    ).fetchall()
    fields = list(types.items())
    return pa.table(
        {name: pa.array([row[place] for row in rows], kind) for place, (name, kind) in enumerate(fields)}
    )
