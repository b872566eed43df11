"""The training tables: their columns, layout and permitted schema changes.

Every declared tile is exported to one; the order, types, descriptions and minimums of its columns are those
of the declaration.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pyiceberg.catalog import Catalog
from pyiceberg.exceptions import CommitFailedException, TableAlreadyExistsError
from pyiceberg.expressions import BooleanExpression, GreaterThan, NotEqualTo, Or
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
    IntegerType,
    LongType,
    NestedField,
    StringType,
    TimestamptzType,
)

from dagster_prefs.declarations.contract import LAST_EVENT_AT
from dagster_prefs.declarations.registry import Entity, Key, Registry, TileDeclaration
from dagster_prefs.iceberg.catalog import OfflineError, ensure_namespace, translated

# SQL type of a tile → type of its column. Decimals are wide enough for the minutes of any bigint of seconds.
ICEBERG_TYPES: Mapping[str, IcebergType] = {
    "bigint": LongType(),
    "date": DateType(),
    "decimal": DecimalType(28, 6),
    "text": StringType(),
    "timestamptz": TimestamptzType(),
}

# Ids, times and minutes seldom repeat within a row group, so a dictionary costs more time and bytes than it
# saves: a column whose dictionary exceeds this size is written without one.
DICTIONARY_BYTES = 128 * 1024

PARQUET: Mapping[str, Any] = {
    "compression": "zstd",
    "dictionary_pagesize_limit": DICTIONARY_BYTES,
}

# The same settings for other writers of the table.
TABLE_PROPERTIES = {
    "format-version": "2",
    "write.parquet.compression-codec": "zstd",
    "write.parquet.dict-size-bytes": str(DICTIONARY_BYTES),
    "write.metadata.delete-after-commit.enabled": "true",
    "write.metadata.previous-versions-max": "20",
}

# The property by which maintenance and erasure find the tables of training sets, of statistics and of events.
KIND, TRAINING_SET, STATISTICS, EVENTS = "prefs.kind", "training-set", "statistics", "events"


class DeclarationRefused(OfflineError):
    """A declared tile cannot become a training table."""


class SchemaChangeRefused(OfflineError):
    """A schema change would remove or retype a column of a training table."""


def is_training_set(table: Table) -> bool:
    """Return whether a table belongs to training sets."""
    return table.properties.get(KIND) == TRAINING_SET


def is_statistics(table: Table) -> bool:
    """Return whether a table is that of statistics of values."""
    return table.properties.get(KIND) == STATISTICS


def is_events(table: Table) -> bool:
    """Return whether a table holds messages or events of a topic."""
    return table.properties.get(KIND) == EVENTS


@dataclass(frozen=True)
class Column:
    """A column of tile and table; `minimum` is the least value that the audit accepts."""

    name: str
    type: IcebergType
    doc: str
    minimum: int | None = None


@dataclass(frozen=True)
class TileTable:
    """A training table and the tile relation of the engine that fills it.

    `entity` is the subject of its rows. `metric` names the columns whose total is `metric_total` in
    `tile_fingerprints`. `key` makes a row of a day unique. `at_most` lists (smaller, larger) pairs of columns that
    every row must respect. `sink` is the RisingWave sink that writes the table, if sinks export. `subject_kind` is the
    name under which erasures of its subjects are recorded.
    """

    name: str
    tile: str
    doc: str
    entity: Entity
    subject_kind: str
    day: str
    key: tuple[str, ...]
    columns: tuple[Column, ...]
    metric: tuple[str, ...]
    at_most: tuple[tuple[str, str], ...] = ()
    sink: str = ""

    def identifier(self, namespace: str) -> tuple[str, str]:
        """The table's name in a catalog."""
        return namespace, self.name

    @property
    def subject(self) -> str:
        """The entity's first key column, by which rows are reserved for canaries and erased."""
        return self.entity.key.name

    @cached_property
    def by_name(self) -> Mapping[str, Column]:
        """The columns by name."""
        return {column.name: column for column in self.columns}

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

    @property
    def layout(self) -> TableLayout:
        """What the table looks like when it is created."""
        return TableLayout(self.name, self.schema, (self.day,), self.key, self.doc, self.tile)

    @cached_property
    def arrow_schema(self) -> pa.Schema:
        """The Arrow schema of the tile's rows."""
        return schema_to_pyarrow(self.schema, include_field_ids=False)

    @cached_property
    def totals(self) -> tuple[str, ...]:
        """The columns that have exact sums."""
        return tuple(
            column.name
            for column in self.columns
            if isinstance(column.type, LongType | DecimalType) and column.name not in self.key
        )


def tile_tables(registry: Registry) -> dict[str, TileTable]:
    """Return the training table of every declared tile, by table name, in the registry's order.

    Raises DeclarationRefused naming the tile and the column for a tile that no training table can hold.
    """
    return {tile.table: tile_table(registry, tile) for tile in registry.tiles.values()}


def tile_table(registry: Registry, tile: TileDeclaration) -> TileTable:
    """Return the training table of one declared tile. Raises like `tile_tables`."""
    entity = registry.entity(tile.entity)
    for name, column in tile.columns.items():
        if column.type not in ICEBERG_TYPES:
            raise DeclarationRefused(
                f"{tile.relation}.{name} is {column.type}, which training tables cannot store: use one "
                f"of {', '.join(ICEBERG_TYPES)}"
            )
        if column.minimum is not None and column.type not in ("bigint", "decimal"):
            raise DeclarationRefused(
                f"{tile.relation}.{name} is {column.type} and has the minimum {column.minimum}, which only numbers "
                "have: remove it"
            )
    for name, why, kind in (
        *(
            (
                key.name,
                f"{'the' if len(entity.keys) == 1 else 'a'} key of {entity.name}",
                "bigint" if key.type == "bigint" else "text",
            )
            for key in entity.keys
        ),
        (tile.day, "its day", "date"),
        (LAST_EVENT_AT, "the time of a row's newest event, which erasure compares", "timestamptz"),
    ):
        found = tile.columns[name].type if name in tile.columns else "missing"
        if found != kind:
            raise DeclarationRefused(
                f"{tile.relation}.{name} is {found}, and it is {why}: give the tile a column {name} of type {kind}"
            )
    mentioned = [*tile.key, *tile.metric, *(name for pair in tile.at_most for name in pair)]
    if unknown := [name for name in mentioned if name not in tile.columns]:
        raise DeclarationRefused(
            f"{tile.relation} declares {unknown[0]} in its key, metric or at_most, and has no such column "
            f"(it has {', '.join(tile.columns)}): correct the name"
        )
    if absent := [name for name in entity.key_names if name not in tile.key]:
        raise DeclarationRefused(
            f"{tile.relation} has the key ({', '.join(tile.key)}) without {absent[0]}, which names its "
            f"{entity.name}: add it"
        )
    return TileTable(
        name=tile.table,
        tile=tile.relation,
        doc=tile.description,
        entity=entity,
        subject_kind=registry.family(entity.name)[0].name,
        day=tile.day,
        key=tile.key,
        columns=tuple(
            Column(name, ICEBERG_TYPES[column.type], column.description, column.minimum)
            for name, column in tile.columns.items()
        ),
        metric=tile.metric,
        at_most=tile.at_most,
        sink=tile.sink,
    )


@dataclass(frozen=True)
class ErasedSubject:
    """A subject whose rows up to the time `until` (UTC, inclusive) are deleted.

    `key` is the first key column of its entity, `value` the subject's id in it.
    """

    key: Key
    value: int | str
    until: datetime

    def rows_of(self, batch: pa.RecordBatch | pa.Table, time: str = LAST_EVENT_AT) -> pa.Array:
        """Return a mask of the rows to delete; `time` is the column to compare with `until`."""
        times = batch.column(time)
        ids = batch.column(self.key.name)
        return pc.and_(
            pc.equal(ids, pa.scalar(self.value, ids.type)),
            pc.less_equal(times, pa.scalar(self.until, times.type)),
        )

    def others(self, time: str = LAST_EVENT_AT) -> BooleanExpression:
        """Return a row filter for the rows to keep."""
        return Or(
            NotEqualTo(term=self.key.name, value=self.value),
            GreaterThan(term=time, value=self.until.isoformat()),
        )


def exact_sums(batches: Iterable[pa.RecordBatch], columns: Iterable[str]) -> dict[str, Decimal]:
    """Return the sum of each column, which must be integers or decimals; NULL counts as 0."""
    sums = dict.fromkeys(columns, Decimal(0))
    for batch in batches:
        for name in sums:
            sums[name] += _exact_sum(batch.column(name))
    return sums


def _exact_sum(column: pa.Array) -> Decimal:
    if pa.types.is_integer(column.type):
        bounds = pc.min_max(column).as_py()
        largest = max(abs(bounds["min"] or 0), abs(bounds["max"] or 0))
        if largest * len(column) >= 2**63:
            # Arrow adds whole numbers up in 64 bits, and says nothing of more.
            column = column.cast(pa.decimal128(38, 0))
    return Decimal(pc.sum(column).as_py() or 0)


def counted_sums(batches: Iterable[pa.RecordBatch], columns: Iterable[str]) -> tuple[int, dict[str, Decimal]]:
    """Return the number of rows and the sum of each column, from one pass."""
    rows = 0

    def counted() -> Iterator[pa.RecordBatch]:
        nonlocal rows
        for batch in batches:
            rows += batch.num_rows
            yield batch

    sums = exact_sums(counted(), columns)
    return rows, sums


@dataclass(frozen=True)
class TableLayout:
    """A table that this platform creates: its name in a namespace, and what a new one looks like.

    `partitions` and `key` (the sort order) are names of columns. `declared_by` is named in messages. Of a `lasting`
    table no column is ever removed: one that is not declared any more is NULL in new rows.
    """

    name: str
    schema: Schema
    partitions: tuple[str, ...]
    key: tuple[str, ...]
    doc: str
    declared_by: str
    properties: Mapping[str, str] = field(default_factory=dict)
    lasting: bool = False


def ensure_table(catalog: Catalog, namespace: str, spec: TileTable) -> Table:
    """Load the training table of a tile like `ensure_layout`."""
    return ensure_layout(catalog, namespace, spec.layout)


def ensure_layout(catalog: Catalog, namespace: str, layout: TableLayout) -> Table:
    """Load the table of this layout; create it if missing and add columns that are new in its declaration.

    Updates descriptions from the declaration. A new column is optional, so that old rows read as NULL. Safe to
    call from several processes at once.

    Raises SchemaChangeRefused for a removed or retyped column, OfflineError for a failing catalog.
    """
    identifier = (namespace, layout.name)
    with translated(f"the table {namespace}.{layout.name}"):
        if not catalog.table_exists(identifier):
            ensure_namespace(catalog, namespace)
            try:
                return catalog.create_table(
                    identifier,
                    schema=layout.schema,
                    partition_spec=PartitionSpec(
                        *(
                            PartitionField(
                                source_id=layout.schema.find_field(name).field_id,
                                field_id=number,
                                transform=IdentityTransform(),
                                name=name,
                            )
                            for number, name in enumerate(layout.partitions, start=1000)
                        )
                    ),
                    sort_order=SortOrder(
                        *(
                            SortField(
                                source_id=layout.schema.find_field(name).field_id,
                                transform=IdentityTransform(),
                            )
                            for name in layout.key
                        )
                    ),
                    properties={**TABLE_PROPERTIES, **layout.properties, "comment": layout.doc},
                )
            except TableAlreadyExistsError:
                pass
        table = catalog.load_table(identifier)
        for _ in range(5):
            missing, wider = _missing_columns(table, namespace, layout)
            redescribed = [
                column
                for column in layout.schema.fields
                if column not in missing and table.schema().find_field(column.name).doc != column.doc
            ]
            if not missing and not wider and not redescribed:
                break
            try:
                with table.update_schema() as update:
                    for column in missing:
                        update.add_column(column.name, column.field_type, doc=column.doc)
                    for column in wider:
                        update.update_column(column.name, field_type=column.field_type)
                    for column in redescribed:
                        update.update_column(column.name, doc=column.doc)
            except CommitFailedException:
                # Another process changed the schema, most likely by adding the same column.
                pass
            table = catalog.load_table(identifier)
        return table


def _missing_columns(
    table: Table, namespace: str, layout: TableLayout
) -> tuple[list[NestedField], list[NestedField]]:
    """Return the columns that the table lacks, and those of a wider type than the table's."""
    found = {field.name: field for field in table.schema().fields}
    wanted = {field.name: field for field in layout.schema.fields}
    wider = []
    for name, there in found.items():
        if name not in wanted:
            if layout.lasting:
                continue
            raise SchemaChangeRefused(
                f"{namespace}.{layout.name} has the column {name}, which the contract of {layout.declared_by} no "
                "longer has: removing a column is a breaking change; put it back, or give the changed table a new name"
            )
        if wanted[name].field_type == there.field_type:
            continue
        widened = isinstance(there.field_type, IntegerType) and isinstance(wanted[name].field_type, LongType)
        if layout.lasting and widened:
            wider.append(wanted[name])
            continue
        raise SchemaChangeRefused(
            f"{namespace}.{layout.name}.{name} is {there.field_type}, the contract of {layout.declared_by} says "
            f"{wanted[name].field_type}: retyping a column is a breaking change; put the type back, or give the "
            "changed column a new name"
        )
    return [column for name, column in wanted.items() if name not in found], wider


def arrow_schema(table: Table) -> pa.Schema:
    """Return the Arrow schema of the table's files, field ids included."""
    return schema_to_pyarrow(table.schema())
