"""The tables of events in the lake: the raw messages and the typed events of each topic, by day of arrival.

Every topic has one of each, named like the relation of the engine that it copies. A row is one delivery of a message,
with its place (source, partition, offset), which is its key and never changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc
from pyiceberg.io.pyarrow import schema_to_pyarrow
from pyiceberg.schema import Schema
from pyiceberg.types import (
    BinaryType,
    BooleanType,
    DateType,
    DecimalType,
    IcebergType,
    IntegerType,
    LongType,
    NestedField,
    StringType,
    TimestamptzType,
)

from dagster_prefs.declarations.names import REDACTED
from dagster_prefs.declarations.registry import Entity, FieldDeclaration, Registry, TopicDeclaration
from dagster_prefs.iceberg.tables import EVENTS, KIND, DeclarationRefused, TableLayout

DAY, REJECTED = "arrival_day", "rejected"
# The key of a delivery, which also decides between deliveries that arrived at the same moment.
PLACE = ("source", "source_partition", "source_offset")
ARRIVED, SENT, DATA = "arrived_at", "kafka_timestamp", "data"
# What audits add up: the offsets, which tell apart what a number of rows alone would not.
OFFSET = "source_offset"

# The digits of a decimal that both engines store exactly.
DECIMAL_DIGITS = 28

# What a table holds completely: all that arrived until then (UTC), as of this snapshot.
COMPLETE_UNTIL, COMPLETE_SNAPSHOT = "prefs.complete-until", "prefs.complete-snapshot"
# The UTC day of arrival before which retention has removed rows; absent where it has not removed any.
COMPLETE_FROM = "prefs.complete-from"
# The sequence number of the newest commit of RisingWave's sink that was compared with the engine.
VERIFIED_SEQUENCE = "prefs.verified-sequence"

Kind = Literal["raw", "typed"]


@dataclass(frozen=True)
class EventTable:
    """A table of one topic's deliveries: `raw` messages with their bytes, or `typed` events with their fields.

    `fields` are the topic's fields among its columns: in a raw table those by which a message is found. `entity` is
    that of the topic, None for reference data.
    """

    kind: Kind
    topic: TopicDeclaration
    entity: Entity | None
    fields: tuple[FieldDeclaration, ...]

    @property
    def name(self) -> str:
        """The table's name in its namespace."""
        return self.topic.raw if self.kind == "raw" else self.topic.relation

    @property
    def key(self) -> str:
        """The column by which files are sorted: the first key of the entity, else the identity."""
        return self.entity.key.name if self.entity else self.topic.identity

    @property
    def identity(self) -> str:
        """The column whose deliveries are one event."""
        return self.topic.identity

    @property
    def partitions(self) -> tuple[str, ...]:
        """The columns by which files are partitioned."""
        return (DAY, REJECTED) if self.kind == "raw" else (DAY,)

    @cached_property
    def schema(self) -> Schema:
        """The schema of a new table."""
        return Schema(
            *(
                NestedField(number, name, kind, required=required, doc=doc)
                for number, (name, kind, required, doc) in enumerate(self._columns(), start=1)
            )
        )

    @cached_property
    def arrow_schema(self) -> pa.Schema:
        """The Arrow schema of its rows."""
        return schema_to_pyarrow(self.schema, include_field_ids=False)

    @property
    def layout(self) -> TableLayout:
        """What the table looks like when it is created."""
        what = "Every message" if self.kind == "raw" else "Every valid delivery"
        return TableLayout(
            self.name,
            self.schema,
            self.partitions,
            (self.key, *PLACE),
            f"{what} of topic `{self.topic.name}`, by day of arrival.",
            self.topic.relation,
            {KIND: EVENTS},
            lasting=True,
        )

    def identifier(self, namespace: str) -> tuple[str, str]:
        """The table's name in a catalog."""
        return namespace, self.name

    def _columns(self) -> Iterator[tuple[str, IcebergType, bool, str]]:
        yield DAY, DateType(), True, "UTC day on which the engine received the message."
        if self.kind == "raw":
            yield REJECTED, BooleanType(), True, "Whether it is no valid event; anything may be in it then."
        yield "source", StringType(), True, "Source of the message."
        yield "source_partition", IntegerType(), True, "Partition within the source."
        yield "source_offset", LongType(), True, "Offset within the partition."
        yield SENT, TimestamptzType(), False, "The broker's timestamp; NULL without a broker."
        yield ARRIVED, TimestamptzType(), True, "Time at which the engine received the message."
        if self.kind == "raw":
            yield DATA, BinaryType(), True, "The bytes of the message."
        certain = {self.topic.identity, self.topic.time, self.entity.key.name if self.entity else None}
        for field in self.fields:
            # Only of typed events: a message may lack anything.
            required = self.kind == "typed" and field.name in certain and not field.optional
            yield field.name, _iceberg_type(field), required, field.description


@dataclass(frozen=True)
class TopicTables:
    """The tables of one topic."""

    raw: EventTable
    typed: EventTable

    @property
    def both(self) -> tuple[EventTable, EventTable]:
        """The raw table and the typed one."""
        return self.raw, self.typed


def event_tables(registry: Registry) -> dict[str, TopicTables]:
    """Return the tables of every topic by its name, in the registry's order.

    Raises DeclarationRefused naming the topic for a name that a column or a training table already has.
    """
    found = {}
    tiles = {tile.table: tile.relation for tile in registry.tiles.values()}
    for topic in registry.topics.values():
        entity = registry.entities[topic.entity] if topic.entity else None
        tables = TopicTables(
            EventTable("raw", topic, entity, topic.sought(entity.key_names if entity else ())),
            EventTable("typed", topic, entity, topic.fields),
        )
        for table in tables.both:
            if table.name in tiles:
                raise DeclarationRefused(
                    f"the tile {tiles[table.name]} is exported to {table.name}, which is the table of topic "
                    f"{topic.name}: give the tile's table another name"
                )
            names = [field.name for field in table.schema.fields]
            if twice := [name for name in names if names.count(name) > 1]:
                raise DeclarationRefused(
                    f"topic {topic.name} has a field {twice[0]}, which is a column of every table of events: rename it"
                )
        found[topic.name] = tables
    return found


def emptied(batch: pa.RecordBatch, mine: pa.Array) -> pa.RecordBatch:
    """Return raw messages of which those in the mask `mine` have no content any more, and are rejected."""
    kept = {DAY, *PLACE, SENT, ARRIVED}
    columns = []
    for name in batch.schema.names:
        values = batch.column(name)
        if name == REJECTED:
            values = pc.or_(values, mine)
        elif name not in kept:
            content = REDACTED if name == DATA else None
            values = pc.if_else(mine, pa.scalar(content, values.type), values)
        columns.append(values)
    return pa.RecordBatch.from_arrays(columns, names=batch.schema.names)


def _iceberg_type(field: FieldDeclaration) -> IcebergType:
    types: Mapping[str, IcebergType] = {
        "text": StringType(),
        "bigint": LongType(),
        "int": IntegerType(),
        "boolean": BooleanType(),
        "timestamptz": TimestamptzType(),
    }
    return types[field.type] if field.type in types else DecimalType(DECIMAL_DIGITS, field.scale or 0)
