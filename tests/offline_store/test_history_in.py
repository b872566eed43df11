"""An Iceberg table as history of events: the rows of a snapshot without deleted ones, each with a lasting place."""

from __future__ import annotations

import json

import pyarrow as pa
import pytest
from pyiceberg.catalog import Catalog
from pyiceberg.table import Table

from dagster_prefs.declarations.registry import Registry
from dagster_prefs.events.columnar import Columns, Converter
from dagster_prefs.events.columnar import Table as ColumnTable
from dagster_prefs.events.inputs import table_inputs
from dagster_prefs.events.messages import topics_of
from dagster_prefs.iceberg.catalog import OfflineError, TableMissing, ensure_namespace
from dagster_prefs.iceberg.files import RowsUnreadable, live_files
from dagster_prefs.iceberg.history import history_files

from .other_engine import commit_deletes, delete_positions, delete_vector


@pytest.fixture
def views(catalog: Catalog) -> Table:
    """Two data files of three views each, whose column `user` is renamed after the first."""
    ensure_namespace(catalog, "lake")
    times = pa.array([1, 2, 3], pa.timestamp("us", "UTC"))
    rows = pa.table({"event_id": ["a", "b", "c"], "user": [1, 2, 3], "watched_at": times})
    table = catalog.create_table("lake.views", rows.schema)
    table.append(rows)
    with table.update_schema() as change:
        change.rename_column("user", "viewer_id")
    table.append(pa.table({"event_id": ["d", "e", "f"], "viewer_id": [1, 2, 3], "watched_at": times}))
    return table.refresh()


def messages(registry: Registry, catalog: Catalog, first: int = 0) -> dict[str, list[tuple[int, str]]]:
    """The rows' numbers and event ids by data file."""
    found = {}
    for given in table_inputs(history_files(catalog, "lake.views")):
        with (
            given.open() as table,
            Converter(table, topics_of(registry)["view_events"], Columns({})) as converter,
        ):
            assert isinstance(table, ColumnTable)
            read = [pair for batch in converter.messages(first) for pair in batch.pairs()]
            assert all(json.loads(text)["viewer_id"] in (1, 2, 3) for _, text in read)
            found[table.identity] = [(row, json.loads(text)["event_id"]) for row, text in read]
    return found


def test_a_row_keeps_its_place_whatever_is_deleted(
    registry: Registry, catalog: Catalog, views: Table
) -> None:
    before = messages(registry, catalog)
    assert sorted(before.values()) == [[(1, "a"), (2, "b"), (3, "c")], [(1, "d"), (2, "e"), (3, "f")]]
    assert sorted(messages(registry, catalog, 2).values()) == [[(3, "c")], [(3, "f")]]
    first, second = sorted(file.path for file in live_files(views))
    commit_deletes(views, delete_positions(views, {first: [0]}), delete_vector(views, second, [1, 2]))
    after = messages(registry, catalog)
    assert after.keys() == before.keys()
    by_path = [after[file.identity] for file in history_files(catalog, "lake.views")]
    whole = [before[file.identity] for file in history_files(catalog, "lake.views")]
    assert by_path == [whole[0][1:], whole[1][:1]]


def test_what_cannot_be_read_is_named(catalog: Catalog, views: Table) -> None:
    with pytest.raises(TableMissing, match=r"write iceberg:NAMESPACE.TABLE"):
        history_files(catalog, "views")
    with pytest.raises(TableMissing, match=r"the Iceberg table lake.nothing does not exist"):
        history_files(catalog, "lake.nothing")
    catalog.create_table("lake.empty", pa.schema([("a", pa.int64())]))
    with pytest.raises(OfflineError, match=r"lake.empty is empty"):
        history_files(catalog, "lake.empty")
    path = min(file.path for file in live_files(views))
    commit_deletes(views, delete_vector(views, path, [0], codec="lz4"))
    first, *_ = history_files(catalog, "lake.views")
    with pytest.raises(RowsUnreadable, match=r"iceberg:lake.views .*: the deletes .*puffin cannot be read"):
        list(first.batches(0, None))
