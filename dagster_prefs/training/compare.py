"""A training set compared with what is served today, attribute by attribute."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from pyiceberg.catalog import Catalog

from dagster_prefs.declarations.contract import LAST_EVENT_AT
from dagster_prefs.declarations.registry import Registry
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.iceberg.catalog import OfflineError, translated
from dagster_prefs.iceberg.duck import duck_session
from dagster_prefs.iceberg.files import scan_rows
from dagster_prefs.training.outputs import is_table
from dagster_prefs.training.windows import Features
from dagster_prefs.values.collect import describe_view
from dagster_prefs.values.describe import SESSION, Described, Measured, describe
from dagster_prefs.values.drift import Level, compare
from dagster_prefs.values.statistics import Statistics

Batches = Callable[[Sequence[str]], Iterable[pa.RecordBatch]]

# The column with the day of the comparison, which the description of statistics asks for.
_DAY = "day compared"
# The types of CSV columns, by what an attribute is.
_CSV = {"number": pa.float64(), "text": pa.string(), "list": pa.string(), "personal": pa.string()}


class SetUnreadable(OfflineError):
    """A training set cannot be compared: it is not there, or lacks what is served."""


@dataclass(frozen=True)
class Compared:
    """One attribute in the training set and as it is served; `psi` and `ks` as `drift` says, `level` by its limits."""

    domain: str
    attribute: str
    in_set: Statistics
    served: Statistics
    psi: float
    ks: float | None
    level: Level

    def as_dict(self) -> dict[str, Any]:
        """Return the comparison as plain values, for JSON."""
        found = {name: value for name, value in asdict(self).items() if name not in ("in_set", "served")}
        return {**found, "in_set": self.in_set.as_dict(), "served": self.served.as_dict()}


@dataclass(frozen=True)
class Comparison:
    """All attributes of a training set; `missing` are served and not in the set."""

    attributes: tuple[Compared, ...]
    missing: tuple[str, ...]


def compare_with_served(
    catalog: Catalog,
    registry: Registry,
    engine: EngineConfiguration,
    features: Features,
    given: str,
    *,
    now: datetime,
) -> Comparison:
    """Compare a training set with the rolling views that are served; `now` is UTC.

    `given` is a Parquet or CSV file, or an Iceberg table `namespace.table`; `@id` behind it names an earlier snapshot.
    The rows of the set are the population that is expected. Raises SetUnreadable, ViewUnreadable, EngineUnavailable,
    or another OfflineError.
    """
    served: dict[str, list[Statistics]] = {}
    with engine.connect() as connection, duck_session(*SESSION) as session:
        for domain in registry.contract.domains.values():
            if domain.name in features.domains:
                served[domain.name] = describe_view(session, connection, engine, registry, domain, now=now)
        kinds = {one.attribute: one.kind for found in served.values() for one in found}
        schema, batches, rows = _opened(catalog, given, kinds)
        if absent := [name for name in features.key_names if name not in schema.names]:
            raise SetUnreadable(
                f"{given} has no column {absent[0]}, the key of {features.entity.name}: name a training set of that "
                f"entity (it has {', '.join(schema.names)})"
            )
        attributes = [
            Measured(value.name, kinds[value.name], _sql(value.name, kinds[value.name], schema))
            for value in features.values
            if value.name in schema.names
        ]
        day = now.astimezone(UTC).date()
        with translated(f"the training set {given}"):
            in_set = describe(
                session,
                Described("view", given, features.key.name, _DAY, {day: (rows, "")}, now),
                attributes,
                schema.append(pa.field(_DAY, pa.date32())),
                lambda columns: _with_day(batches, columns, day),
            )
    expected = {one.attribute: one for one in in_set}
    found = [
        Compared(domain, one.attribute, expected[one.attribute], one, *compare(expected[one.attribute], one))
        for domain, statistics in served.items()
        for one in statistics
        if one.attribute in expected
    ]
    names = {one.attribute for one in found}
    return Comparison(
        tuple(found),
        tuple(
            f"{domain}.{one.attribute}"
            for domain, statistics in served.items()
            for one in statistics
            if one.attribute not in names and one.attribute != LAST_EVENT_AT
        ),
    )


def _sql(name: str, kind: str, schema: pa.Schema) -> str:
    """Return an attribute's number in DuckDB's SQL: of a list its length, also where CSV has it as JSON."""
    if kind != "list":
        return f'"{name}"'
    is_text = pa.types.is_string(schema.field(name).type) or pa.types.is_large_string(schema.field(name).type)
    return f'json_array_length("{name}")' if is_text else f'len("{name}")'


def _with_day(batches: Batches, columns: Sequence[str], day: date) -> Iterator[pa.RecordBatch]:
    for batch in batches([name for name in columns if name != _DAY]):
        days = pa.repeat(pa.scalar(day, pa.date32()), batch.num_rows)
        by_name = {**dict(zip(batch.schema.names, batch.columns, strict=True)), _DAY: days}
        yield pa.RecordBatch.from_arrays([by_name[name] for name in columns], names=list(columns))


def _opened(catalog: Catalog, given: str, kinds: Mapping[str, str]) -> tuple[pa.Schema, Batches, int]:
    """Return the schema of a training set, what yields its rows in columns of choice, and about how many there are."""
    suffix = Path(given).suffix.lower()
    if suffix in (".parquet", ".csv") and not Path(given).is_file():
        raise SetUnreadable(
            f"the training set {given} does not exist: name a file, or a table namespace.table"
        )
    with translated(f"the training set {given}"):
        if suffix == ".parquet":
            with pq.ParquetFile(given) as parquet:
                schema, rows = parquet.schema_arrow, parquet.metadata.num_rows

            def from_parquet(columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
                with pq.ParquetFile(given) as parquet:
                    for batch in parquet.iter_batches(columns=list(columns)):
                        yield batch.select(list(columns))

            return schema.remove_metadata(), from_parquet, rows
        if suffix == ".csv":
            return _opened_csv(given, kinds)
        name, _, snapshot = given.partition("@")
        if not is_table(name) or (snapshot and not snapshot.isdecimal()):
            raise SetUnreadable(
                f"{given} is neither a .parquet nor a .csv file nor an Iceberg table (namespace.table, or "
                "namespace.table@snapshot): name one of these"
            )
        table = catalog.load_table(name)
        chosen = int(snapshot) if snapshot else None
        whole = scan_rows(table, snapshot_id=chosen)
        return (
            whole.schema.remove_metadata(),
            lambda columns: scan_rows(table, list(columns), snapshot_id=chosen),
            0,
        )


def _opened_csv(given: str, kinds: Mapping[str, str]) -> tuple[pa.Schema, Batches, int]:
    """Open CSV as `prefs training-set` writes it: lists are JSON."""
    quoted = pa.csv.ParseOptions(newlines_in_values=True)
    with pa.csv.open_csv(given, parse_options=quoted) as reader:
        names = reader.schema.names
    types = {name: _CSV[kinds[name]] if name in kinds else pa.string() for name in names}

    def rows(columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        options = pa.csv.ConvertOptions(
            include_columns=list(columns),
            column_types=types,
            null_values=[""],
            strings_can_be_null=True,
        )
        with pa.csv.open_csv(given, parse_options=quoted, convert_options=options) as batches:
            yield from batches

    return pa.schema(list(types.items())), rows, 0
