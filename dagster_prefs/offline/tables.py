"""The training tables: what each holds, how it is laid out, and how its schema may change.

Columns with their order, types and descriptions are those of the tile's dbt contract, which `prefs contract build`
writes to `tiles.json`; what the audit asks of them is said here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pyiceberg.catalog import Catalog
from pyiceberg.exceptions import CommitFailedException, TableAlreadyExistsError
from pyiceberg.io.pyarrow import schema_to_pyarrow
from pyiceberg.partitioning import PartitionField, PartitionSpec
from pyiceberg.schema import Schema
from pyiceberg.table import Table
from pyiceberg.table.sorting import SortField, SortOrder
from pyiceberg.transforms import IdentityTransform
from pyiceberg.types import (
    DateType,
    DecimalType,
    IcebergType,
    LongType,
    NestedField,
    StringType,
    TimestamptzType,
)

from dagster_prefs.offline.catalog import OfflineError, ensure_namespace, explained
from dagster_prefs.online.contract import LAST_EVENT_AT

VIEWER = "viewer_id"
TILES_PATH = Path(__file__).with_name("tiles.json")

# SQL type of a tile → type of its column; decimals are wide enough for the minutes of any bigint of seconds.
ICEBERG_TYPES: Mapping[str, IcebergType] = {
    "bigint": LongType(),
    "date": DateType(),
    "decimal": DecimalType(28, 6),
    "text": StringType(),
    "timestamptz": TimestamptzType(),
}

# Ids, times and minutes seldom repeat within a row group, and a dictionary of them costs more time and bytes than they
# do: a column whose dictionary grows beyond this goes on without one.
DICTIONARY_BYTES = 128 * 1024

PARQUET: Mapping[str, Any] = {
    "compression": "zstd",
    "dictionary_pagesize_limit": DICTIONARY_BYTES,
}

# The same for whoever else writes to a table.
TABLE_PROPERTIES = {
    "format-version": "2",
    "write.parquet.compression-codec": "zstd",
    "write.parquet.dict-size-bytes": str(DICTIONARY_BYTES),
    "write.metadata.delete-after-commit.enabled": "true",
    "write.metadata.previous-versions-max": "20",
}


class SchemaChangeRefused(OfflineError):
    """A column of a training table would be removed or retyped."""


@dataclass(frozen=True)
class Column:
    """One column of tile and table; `minimum` is the least value that the audit accepts."""

    name: str
    type: IcebergType
    doc: str
    minimum: int | None = None


@dataclass(frozen=True)
class TileTable:
    """A training table and the tile relation of the engine that fills it.

    `metric` names the columns whose total is `metric_total` in `tile_fingerprints`; `key` makes a row of a
    day unique; `at_most` lists (smaller, larger) pairs of columns that every row must respect.
    """

    name: str
    tile: str
    doc: str
    day: str
    key: tuple[str, ...]
    columns: tuple[Column, ...]
    metric: tuple[str, ...]
    at_most: tuple[tuple[str, str], ...] = ()

    def identifier(self, namespace: str) -> tuple[str, str]:
        """The table's name in a catalog."""
        return namespace, self.name

    @cached_property
    def schema(self) -> Schema:
        """The schema of a new table; every column is required."""
        return Schema(
            *(
                NestedField(
                    field_id=number, name=column.name, field_type=column.type, required=True, doc=column.doc
                )
                for number, column in enumerate(self.columns, start=1)
            )
        )

    @cached_property
    def arrow_schema(self) -> pa.Schema:
        """The Arrow schema of the tile's rows."""
        return schema_to_pyarrow(self.schema, include_field_ids=False)

    @cached_property
    def totals(self) -> tuple[str, ...]:
        """The columns that can be summed exactly."""
        return tuple(
            column.name
            for column in self.columns
            if isinstance(column.type, LongType | DecimalType) and column.name not in self.key
        )


@dataclass(frozen=True)
class ErasedViewer:
    """A viewer whose rows go, as far as their time is not after `until` (UTC)."""

    viewer_id: int
    until: datetime

    def rows_of(self, batch: pa.RecordBatch | pa.Table, time: str = LAST_EVENT_AT) -> pa.Array:
        """A mask of the rows that go; `batch` has `viewer_id` and `time`, the column that `until` is compared with."""
        times = batch.column(time)
        return pc.and_(
            pc.equal(batch.column(VIEWER), self.viewer_id),
            pc.less_equal(times, pa.scalar(self.until, times.type)),
        )

    def others(self, time: str = LAST_EVENT_AT) -> str:
        """A row filter of the rows that stay."""
        return f"({VIEWER} != {self.viewer_id} or {time} > '{self.until.isoformat()}')"


def exact_sums(batches: Iterable[pa.RecordBatch], columns: Iterable[str]) -> dict[str, Decimal]:
    """The sum of each of the columns, which are integers or decimals; NULL counts nothing."""
    sums = dict.fromkeys(columns, Decimal(0))
    for batch in batches:
        for name in sums:
            sums[name] += Decimal(pc.sum(batch.column(name)).as_py() or 0)
    return sums


def counted_sums(batches: Iterable[pa.RecordBatch], columns: Iterable[str]) -> tuple[int, dict[str, Decimal]]:
    """The number of rows and the sum of each of the columns, in one reading."""
    rows = 0

    def counted() -> Iterator[pa.RecordBatch]:
        nonlocal rows
        for batch in batches:
            rows += batch.num_rows
            yield batch

    sums = exact_sums(counted(), columns)
    return rows, sums


_DECLARED: Mapping[str, Any] = json.loads(TILES_PATH.read_text(encoding="utf-8"))


def _tile(
    tile: str,
    *,
    name: str,
    day: str,
    metric: tuple[str, ...],
    key: tuple[str, ...] = ("viewer_id",),
    minimum: Mapping[str, int],
    at_most: tuple[tuple[str, str], ...] = (),
) -> TileTable:
    declared = _DECLARED[tile]
    columns = tuple(
        Column(column, ICEBERG_TYPES[found["type"]], found["description"], minimum.get(column))
        for column, found in declared["columns"].items()
    )
    return TileTable(name, tile, declared["description"], day, key, columns, metric, at_most)


WATCH = _tile(
    "viewer_watch_metrics_1d",
    name="viewer_watch_daily",
    day="watch_date",
    metric=("watch_seconds",),
    minimum={
        "viewer_id": 0,
        "watch_seconds": 0,
        "watch_time_minutes": 0,
        "views": 1,
        "content_started": 0,
        "completions": 0,
        "genres_watched": 0,
    },
    at_most=(("content_started", "views"), ("completions", "views"), ("genres_watched", "views")),
)

GENRE = _tile(
    "viewer_genre_metrics_1d",
    name="viewer_genre_daily",
    day="watch_date",
    key=("viewer_id", "genre"),
    metric=("watch_seconds",),
    minimum={"viewer_id": 0, "watch_seconds": 0, "views": 1, "completions": 0},
    at_most=(("completions", "views"),),
)

INTERACTIONS = _tile(
    "viewer_interactions_1d",
    name="viewer_interactions_daily",
    day="interaction_date",
    metric=("likes", "shares", "searches"),
    minimum={"viewer_id": 0, "likes": 0, "shares": 0, "searches": 0},
)

TILE_TABLES: Mapping[str, TileTable] = {spec.name: spec for spec in (WATCH, GENRE, INTERACTIONS)}


def render_tiles(manifest: Mapping[str, Any]) -> str:
    """The text of `tiles.json`: columns, types and descriptions of the exported tiles in dbt's manifest.

    Raises SchemaChangeRefused for a column of a type that training tables have no equal of.
    """
    nodes = {node["name"]: node for node in manifest["nodes"].values() if node["resource_type"] == "model"}
    content: dict[str, Any] = {}
    for spec in TILE_TABLES.values():
        columns = {}
        for name, column in nodes[spec.tile]["columns"].items():
            if column["data_type"] not in ICEBERG_TYPES:
                raise SchemaChangeRefused(
                    f"{spec.tile}.{name} is {column['data_type']}, which training tables have no equal of: use one "
                    f"of {', '.join(ICEBERG_TYPES)}"
                )
            columns[name] = {"type": column["data_type"], "description": _line(column["description"])}
        content[spec.tile] = {"description": _line(nodes[spec.tile]["description"]), "columns": columns}
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _line(text: str) -> str:
    return " ".join(text.split())


def ensure_table(catalog: Catalog, namespace: str, spec: TileTable) -> Table:
    """The table of `spec`, created where missing and extended by what the contract gained.

    Descriptions follow the contract. A new column is optional, so that old days read as NULL. Safe to call from
    several processes at once.

    Raises SchemaChangeRefused for a removed or retyped column, OfflineError for a failing catalog.
    """
    identifier = spec.identifier(namespace)
    with explained(f"the table {namespace}.{spec.name}"):
        if not catalog.table_exists(identifier):
            ensure_namespace(catalog, namespace)
            try:
                return catalog.create_table(
                    identifier,
                    schema=spec.schema,
                    partition_spec=PartitionSpec(
                        PartitionField(
                            source_id=spec.schema.find_field(spec.day).field_id,
                            field_id=1000,
                            transform=IdentityTransform(),
                            name=spec.day,
                        )
                    ),
                    sort_order=SortOrder(
                        *(
                            SortField(
                                source_id=spec.schema.find_field(name).field_id, transform=IdentityTransform()
                            )
                            for name in spec.key
                        )
                    ),
                    properties={**TABLE_PROPERTIES, "comment": spec.doc},
                )
            except TableAlreadyExistsError:
                pass
        table = catalog.load_table(identifier)
        for _ in range(5):
            missing = _missing_columns(table, namespace, spec)
            redescribed = [
                column
                for column in spec.columns
                if column not in missing and table.schema().find_field(column.name).doc != column.doc
            ]
            if not missing and not redescribed:
                break
            try:
                with table.update_schema() as update:
                    for column in missing:
                        update.add_column(column.name, column.type, doc=column.doc)
                    for column in redescribed:
                        update.update_column(column.name, doc=column.doc)
            except CommitFailedException:
                # Another process changed the schema, most likely by the very same column.
                pass
            table = catalog.load_table(identifier)
        return table


def _missing_columns(table: Table, namespace: str, spec: TileTable) -> list[Column]:
    found = {field.name: field for field in table.schema().fields}
    wanted = {column.name: column for column in spec.columns}
    for name, field in found.items():
        if name not in wanted:
            raise SchemaChangeRefused(
                f"{namespace}.{spec.name} has the column {name}, which the contract of {spec.tile} no longer has: "
                "removing a column is a breaking change; put it back, or give the changed table a new name"
            )
        if wanted[name].type != field.field_type:
            raise SchemaChangeRefused(
                f"{namespace}.{spec.name}.{name} is {field.field_type}, the contract of {spec.tile} says "
                f"{wanted[name].type}: retyping a column is a breaking change; put the type back, or give the "
                "changed column a new name"
            )
    return [column for name, column in wanted.items() if name not in found]


def arrow_schema(table: Table) -> pa.Schema:
    """The Arrow schema of the table's files, field ids included."""
    return schema_to_pyarrow(table.schema())
