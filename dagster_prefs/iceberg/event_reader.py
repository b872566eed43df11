"""Reading the events of the lake: deliveries of a range of arrivals, and the accepted events among them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import duckdb
import pyarrow as pa
from pyiceberg.catalog import Catalog
from pyiceberg.exceptions import NoSuchTableError
from pyiceberg.expressions import (
    AlwaysTrue,
    And,
    BooleanExpression,
    GreaterThan,
    GreaterThanOrEqual,
    LessThanOrEqual,
)
from pyiceberg.expressions.parser import parse
from pyiceberg.table import Table
from pyiceberg.table.snapshots import ancestors_of

from dagster_prefs.iceberg.catalog import translated
from dagster_prefs.iceberg.duck import quoted, registered
from dagster_prefs.iceberg.event_tables import (
    ARRIVED,
    COMPLETE_FROM,
    COMPLETE_SNAPSHOT,
    COMPLETE_UNTIL,
    DAY,
    PLACE,
    EventTable,
)
from dagster_prefs.iceberg.export import DEFAULT_NAMESPACE
from dagster_prefs.iceberg.files import live_files, read_rows, scan_rows

REPLACED = "replaced_at"
# Whether a delivery came from Kafka, also as the correction of a rejected message: `kafka_rank` of macros/messages.sql.
_FROM_KAFKA = "regexp_matches(source, '^(replay:)*kafka:')"


@dataclass(frozen=True)
class Selection:
    """Which deliveries of a table of events are read, and which of its columns (all by default).

    Those that arrived after `arrived_from` and until `arrived_until` (UTC, inclusive), None for no bound, and for which
    the Iceberg filter `where` holds; of the snapshot `snapshot_id`, by default of the current one.
    """

    namespace: str = DEFAULT_NAMESPACE
    columns: Sequence[str] | None = None
    arrived_from: datetime | None = None
    arrived_until: datetime | None = None
    where: str | BooleanExpression = ""
    snapshot_id: int | None = None

    def row_filter(self) -> BooleanExpression:
        """Return the Iceberg filter of the rows, by which whole partitions are left out."""
        found: BooleanExpression = AlwaysTrue()
        if self.where:
            found = self.where if isinstance(self.where, BooleanExpression) else parse(self.where)
        if self.arrived_from is not None:
            first = self.arrived_from.astimezone(UTC)
            found = And(
                found,
                And(
                    GreaterThanOrEqual(term=DAY, value=first.date().isoformat()),
                    GreaterThan(term=ARRIVED, value=first.isoformat()),
                ),
            )
        if self.arrived_until is not None:
            last = self.arrived_until.astimezone(UTC)
            found = And(
                found,
                And(
                    LessThanOrEqual(term=DAY, value=last.date().isoformat()),
                    LessThanOrEqual(term=ARRIVED, value=last.isoformat()),
                ),
            )
        return found


EVERYTHING = Selection()


def complete_until(
    catalog: Catalog, spec: EventTable, *, namespace: str = DEFAULT_NAMESPACE
) -> datetime | None:
    """Return the instant (UTC) up to which the table holds all that arrived, None if that is not known.

    Messages that were imported later with an explicit time of arrival may be missing until the next export. Not known
    before the first export, and after a rollback. Raises OfflineError.
    """
    with translated(f"the table {namespace}.{spec.name}"):
        try:
            table = catalog.load_table(spec.identifier(namespace))
        except NoSuchTableError:
            return None
        return complete_until_of(table)


def complete_until_of(table: Table) -> datetime | None:
    """Return the instant (UTC) up to which a loaded table of events is complete, None if that is not known."""
    until, snapshot = table.properties.get(COMPLETE_UNTIL), table.properties.get(COMPLETE_SNAPSHOT)
    if until is None or snapshot is None:
        return None
    # Rolled back behind the snapshot that was complete, the table lacks what that one added. An expired one was not
    # rolled back: what came after it replaced it.
    rolled_back = table.snapshot_by_id(int(snapshot)) is not None and not any(
        str(one.snapshot_id) == snapshot for one in ancestors_of(table.current_snapshot(), table.metadata)
    )
    return None if rolled_back else datetime.fromisoformat(until)


def complete_from_of(table: Table) -> datetime | None:
    """Return the instant (UTC) before which retention has removed what arrived, None if it has not removed any."""
    first = table.properties.get(COMPLETE_FROM)
    return None if first is None else datetime.fromisoformat(first).replace(tzinfo=UTC)


def read_events(
    catalog: Catalog, spec: EventTable, selection: Selection = EVERYTHING
) -> pa.RecordBatchReader:
    """Read deliveries, in no particular order; one event may have several.

    A column that is newer than a file reads as NULL. Raises TableMissing before the first export, or another
    OfflineError.
    """
    with translated(f"the table {selection.namespace}.{spec.name}"):
        table = catalog.load_table(spec.identifier(selection.namespace))
        return scan_rows(table, selection.columns, selection.row_filter(), selection.snapshot_id)


def all_events(
    catalog: Catalog, spec: EventTable, columns: Sequence[str], *, namespace: str = DEFAULT_NAMESPACE
) -> Iterator[pa.RecordBatch]:
    """Yield these columns of every delivery, in batches whose size does not depend on that of a file.

    Raises like `read_events`.
    """
    with translated(f"the table {namespace}.{spec.name}"):
        table = catalog.load_table(spec.identifier(namespace))
        for file in live_files(table):
            yield from read_rows(table, file, columns)


def load_accepted(
    session: duckdb.DuckDBPyConnection,
    name: str,
    catalog: Catalog,
    spec: EventTable,
    selection: Selection = EVERYTHING,
) -> None:
    """Create the DuckDB table `name` of the typed events that are accepted among the selected deliveries.

    Of several deliveries of an identity the first counts: it is the first at every later time too. Of reference data
    (`keep: last`) every delivery counts until the next one, whose arrival is in the column `replaced_at`, NULL for the
    last; what did not come from Kafka never counts once something from Kafka has arrived, as in the engine
    (`kafka_rank` of macros/messages.sql). The columns are those selected, and always place, arrival and identity.
    Raises like `read_events`.
    """
    columns = selection.columns
    if columns is not None:
        columns = list(dict.fromkeys([*columns, *PLACE, ARRIVED, spec.identity]))
    chosen = Selection(
        selection.namespace,
        columns,
        selection.arrived_from,
        selection.arrived_until,
        selection.where,
        selection.snapshot_id,
    )
    rows = read_events(catalog, spec, chosen)
    table, identity = quoted(name), quoted(spec.identity)
    order = ", ".join((ARRIVED, *PLACE))
    with translated(f"the table {selection.namespace}.{spec.name}"):
        with registered(session, "deliveries", rows.schema, rows):
            if spec.topic.keep == "last":
                session.execute(
                    f"create table {table} as select * exclude (prefs_outranked),"
                    f" lead({ARRIVED}) over (partition by {identity} order by {order}) as {REPLACED}"
                    f" from (select *, not {_FROM_KAFKA} and coalesce(bool_or({_FROM_KAFKA}) over ("
                    f"   partition by {identity} order by {order} rows between unbounded preceding and 1 preceding"
                    f" ), false) as prefs_outranked from deliveries) where not prefs_outranked"
                )
                return
            session.execute(f"create table {table} as from deliveries")
        # Few identities have a second delivery: only these are sorted. A hash takes a fraction of the memory of a
        # text, and equal hashes of different identities only mean that a few more rows are sorted.
        session.execute(
            f"delete from {table} where rowid in (select place from ("
            f"  select rowid as place, row_number() over (partition by {identity} order by {order}) as delivery"
            f"  from {table} where hash({identity}) in ("
            f"    select hash({identity}) from {table} group by 1 having count(*) > 1)"
            f") where delivery > 1)"
        )
