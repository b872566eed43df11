"""Replacement of all rows of a small table by one file, in one commit."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping

import pyarrow as pa
import pyarrow.parquet as pq
from pyiceberg.exceptions import CommitFailedException
from pyiceberg.io.pyarrow import parquet_file_to_data_file
from pyiceberg.table import Table

from dagster_prefs.iceberg.catalog import OfflineError, conflicts_named
from dagster_prefs.iceberg.files import live_files
from dagster_prefs.iceberg.tables import KIND, PARQUET, arrow_schema


class ChangedMeanwhile(OfflineError):
    """Another writer changed a table between its being read and being replaced; nothing was changed."""


def replace_all(
    table: Table, rows: Iterable[pa.RecordBatch], properties: Mapping[str, str], *, kind: str
) -> None:
    """Make `rows` all that a table holds, in one commit, whose snapshot gets `properties`.

    `kind` becomes the table's property KIND, by which maintenance and erasure find it. Raises ChangedMeanwhile where
    another writer has changed the table since it was loaded.
    """
    path = table.location_provider().new_data_location(f"{uuid.uuid4().hex}.parquet")
    schema = arrow_schema(table)
    published = False
    try:
        with (
            table.io.new_output(path).create(overwrite=False) as sink,
            pq.ParquetWriter(sink, schema, store_schema=False, **PARQUET) as writer,
        ):
            for batch in rows:
                writer.write_batch(batch.cast(schema))
        file = parquet_file_to_data_file(io=table.io, table_metadata=table.metadata, file_path=path)
        try:
            with conflicts_named(), table.transaction() as transaction:
                transaction.set_properties({KIND: kind})
                with transaction.update_snapshot(
                    snapshot_properties=dict(properties)
                ).overwrite() as snapshot:
                    for held in live_files(table):
                        snapshot.delete_data_file(held.data)
                    snapshot.append_data_file(file)
            published = True
        except CommitFailedException as error:
            raise ChangedMeanwhile(
                f"the table {'.'.join(table.name())} was changed by another writer: run it again"
            ) from error
        except Exception:
            # The commit may have taken place although its reply was lost, so the file stays.
            published = True
            raise
    finally:
        if not published:
            table.io.delete(path)
