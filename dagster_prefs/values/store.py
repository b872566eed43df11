"""The Iceberg table of statistics: one row per attribute, relation and UTC day.

It is small (some kilobytes a day), so every write replaces it by one file in one commit: nothing has to be compacted,
and writing a day again leaves the table as it was. Days older than DAYS_KEPT leave it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import fields, replace
from datetime import date, timedelta
from typing import Any

import pyarrow as pa
from pyiceberg.catalog import Catalog
from pyiceberg.exceptions import NoSuchTableError, TableAlreadyExistsError
from pyiceberg.expressions import And, BooleanExpression, EqualTo, GreaterThanOrEqual
from pyiceberg.schema import Schema
from pyiceberg.table import Table
from pyiceberg.types import (
    DateType,
    DoubleType,
    ListType,
    LongType,
    NestedField,
    StringType,
    TimestamptzType,
)

from dagster_prefs.declarations.names import STATISTICS_TABLE
from dagster_prefs.iceberg.catalog import Tables, ensure_namespace, translated
from dagster_prefs.iceberg.files import scan_rows
from dagster_prefs.iceberg.publish import ATTEMPTS
from dagster_prefs.iceberg.replace import ChangedMeanwhile, replace_all
from dagster_prefs.iceberg.tables import STATISTICS, TABLE_PROPERTIES, arrow_schema
from dagster_prefs.values.statistics import Statistics

# A year and the weeks with which its first day is compared.
DAYS_KEPT = 400

RelationDay = tuple[str, date]

_SCHEMA = Schema(
    NestedField(1, "source", StringType(), required=True, doc="tile or view."),
    NestedField(2, "relation", StringType(), required=True, doc="The tile or rolling view."),
    NestedField(3, "day", DateType(), required=True, doc="UTC day of a tile; of a view, when it was read."),
    NestedField(4, "attribute", StringType(), required=True, doc="The column."),
    NestedField(5, "kind", StringType(), required=True, doc="number, text, time, list or personal."),
    NestedField(6, "rows", LongType(), required=True, doc="Rows of the relation."),
    NestedField(7, "sampled", LongType(), required=True, doc="Rows that were read."),
    NestedField(8, "nulls", LongType(), required=True, doc="Rows that were read without a value."),
    NestedField(9, "distinct", LongType(), required=True, doc="Distinct values, estimated."),
    NestedField(10, "minimum", DoubleType(), doc="Least value; of a time in seconds since 1970."),
    NestedField(11, "maximum", DoubleType(), doc="Greatest value."),
    NestedField(12, "mean", DoubleType(), doc="Mean."),
    NestedField(13, "quantiles", ListType(14, DoubleType(), True), required=True, doc="1, 5, 25 … 99 %."),
    NestedField(15, "top_values", ListType(16, StringType(), True), required=True, doc="Frequent texts."),
    NestedField(17, "top_rows", ListType(18, LongType(), True), required=True, doc="Their rows."),
    NestedField(19, "bucket_bounds", ListType(20, DoubleType(), True), required=True, doc="Upper bounds."),
    NestedField(21, "bucket_rows", ListType(22, LongType(), True), required=True, doc="Rows of buckets."),
    NestedField(23, "version", StringType(), required=True, doc="Which rows were described."),
    NestedField(24, "measured_at", TimestamptzType(), required=True, doc="When they were described."),
)
_PLAIN = tuple(
    field.name for field in fields(Statistics) if field.name not in ("quantiles", "values", "buckets")
)


def ensure_statistics(catalog: Catalog, namespace: str) -> Table:
    """Load the table of statistics; create it if it is missing. Raises OfflineError."""
    name = f"{namespace}.{STATISTICS_TABLE}"
    with translated(f"the table {name}"):
        try:
            return catalog.load_table(name)
        except NoSuchTableError:
            ensure_namespace(catalog, namespace)
        try:
            return catalog.create_table(name, _SCHEMA, properties=TABLE_PROPERTIES)
        except TableAlreadyExistsError:
            return catalog.load_table(name)


def write_statistics(
    catalog: Catalog,
    namespace: str,
    statistics: Iterable[Statistics],
    *,
    gone: Collection[RelationDay] = (),
) -> None:
    """Replace the statistics of each relation and day that occurs in `statistics`, and delete those of `gone`.

    Idempotent, and safe while others write. Raises ChangedMeanwhile where others keep being faster, or another
    OfflineError.
    """
    new = list(statistics)
    if not new and not gone:
        return
    replaced = {*gone, *((one.relation, one.day) for one in new)}
    for attempt in range(1, ATTEMPTS + 1):
        table = ensure_statistics(catalog, namespace)
        with translated(f"the table {namespace}.{STATISTICS_TABLE}"):
            schema = arrow_schema(table)
            held = scan_rows(table).read_all()
            days = held["day"].to_pylist()
            oldest = max([*days, *(one.day for one in new)], default=date.min) - timedelta(days=DAYS_KEPT)
            kept = [
                place not in replaced and place[1] >= oldest
                for place in zip(held["relation"].to_pylist(), days, strict=True)
            ]
            rows = pa.concat_tables(
                [
                    held.filter(pa.array(kept, pa.bool_())).cast(schema),
                    pa.Table.from_pylist([_row(one) for one in new if one.day >= oldest], schema),
                ]
            ).sort_by([("relation", "ascending"), ("day", "ascending"), ("attribute", "ascending")])
            try:
                replace_all(table, rows.to_batches(), {"prefs.operation": "statistics"}, kind=STATISTICS)
                return
            except ChangedMeanwhile:
                if attempt == ATTEMPTS:
                    raise


def read_statistics(
    catalog: Tables, namespace: str, *, since: date | None = None, relation: str | None = None
) -> list[Statistics]:
    """Return the statistics from the day `since` on, of one relation or all; empty if there is no table.

    Sorted by relation, day and attribute. Raises OfflineError.
    """
    name = f"{namespace}.{STATISTICS_TABLE}"
    conditions: list[BooleanExpression] = []
    if since is not None:
        conditions.append(GreaterThanOrEqual(term="day", value=since.isoformat()))
    if relation is not None:
        conditions.append(EqualTo(term="relation", value=relation))
    chosen = And(*conditions) if len(conditions) > 1 else conditions[0] if conditions else ""
    with translated(f"the table {name}"):
        try:
            table = catalog.load_table(name)
        except NoSuchTableError:
            return []
        return [_statistics(row) for row in scan_rows(table, None, chosen).read_all().to_pylist()]


def described_days(catalog: Tables, namespace: str) -> dict[RelationDay, str]:
    """Return the version of every relation and day of which there are statistics. Raises OfflineError."""
    name = f"{namespace}.{STATISTICS_TABLE}"
    with translated(f"the table {name}"):
        try:
            table = catalog.load_table(name)
        except NoSuchTableError:
            return {}
        rows = scan_rows(table, ["relation", "day", "version"]).read_all().to_pylist()
    return {(row["relation"], row["day"]): row["version"] for row in rows}


def latest_statistics(catalog: Tables, namespace: str) -> dict[str, dict[str, Statistics]]:
    """Return the newest statistics of every attribute: relation → attribute → statistics.

    A relation is a tile or a rolling view. Days without rows do not count. Raises OfflineError.
    """
    found: dict[str, dict[str, Statistics]] = {}
    # By relation and day, so that the last of an attribute is its newest.
    for one in read_statistics(catalog, namespace):
        if one.rows:
            found.setdefault(one.relation, {})[one.attribute] = one
    newest = {relation: max(one.day for one in attributes.values()) for relation, attributes in found.items()}
    # An attribute that its relation no longer has is in older days only.
    return {
        relation: {name: one for name, one in attributes.items() if one.day == newest[relation]}
        for relation, attributes in found.items()
    }


def _row(one: Statistics) -> dict[str, Any]:
    return {
        **{name: getattr(one, name) for name in _PLAIN},
        "quantiles": list(one.quantiles),
        "top_values": [value for value, _ in one.values],
        "top_rows": [rows for _, rows in one.values],
        "bucket_bounds": [bound for bound, _ in one.buckets],
        "bucket_rows": [rows for _, rows in one.buckets],
    }


def _statistics(row: Mapping[str, Any]) -> Statistics:
    return Statistics(
        **{name: row[name] for name in _PLAIN},
        quantiles=tuple(row["quantiles"]),
        values=tuple(zip(row["top_values"], row["top_rows"], strict=True)),
        buckets=tuple(zip(row["bucket_bounds"], row["bucket_rows"], strict=True)),
    )


def without_extremes(one: Statistics) -> Statistics:
    """Return the statistics without the lowest and highest value, which may be one subject's alone."""
    return replace(one, minimum=None, maximum=None)
