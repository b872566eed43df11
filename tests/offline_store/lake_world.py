"""Tables of events in the lake without an engine, for values as served."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
from pyiceberg.catalog import Catalog

from dagster_prefs.declarations.registry import Registry
from dagster_prefs.iceberg.event_tables import COMPLETE_SNAPSHOT, COMPLETE_UNTIL, event_tables
from dagster_prefs.iceberg.tables import arrow_schema, ensure_layout


def put_events(
    catalog: Catalog,
    registry: Registry,
    topic: str,
    rows: Sequence[Any],
    *,
    until: datetime | None = None,
    by_broker: bool = True,
) -> None:
    """Append deliveries to a topic's table, which is then complete until an instant.

    A row has the topic's fields and `arrived_at`; its offset is its position among the rows. Without `by_broker` they
    were read from a file.
    """
    spec = event_tables(registry)[topic].typed
    table = ensure_layout(catalog, "training", spec.layout)
    if rows:
        content = [
            {
                **vars(row),
                "arrival_day": row.arrived_at.astimezone(UTC).date(),
                "source": "test",
                "source_partition": 0,
                "source_offset": offset,
                "kafka_timestamp": row.arrived_at if by_broker else None,
            }
            for offset, row in enumerate(rows)
        ]
        table.append(pa.Table.from_pylist(content, schema=arrow_schema(table)))
    if until is not None:
        if table.current_snapshot() is None:
            table.append(arrow_schema(table).empty_table())
        snapshot = table.current_snapshot()
        assert snapshot is not None
        with table.transaction() as change:
            change.set_properties(
                {COMPLETE_UNTIL: until.isoformat(), COMPLETE_SNAPSHOT: str(snapshot.snapshot_id)}
            )
