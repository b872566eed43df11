"""What Spark, Trino or Flink leave in a table of ours: delete files of every kind, and files that are not ours."""

from __future__ import annotations

import json
import uuid
import zlib
from collections.abc import Sequence
from datetime import date
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyiceberg.manifest import (
    DataFile,
    DataFileContent,
    FileFormat,
    ManifestContent,
    ManifestEntry,
    ManifestEntryStatus,
    ManifestFile,
    ManifestWriterV2,
)
from pyiceberg.table import Table
from pyiceberg.table.snapshots import Operation
from pyiceberg.table.update.snapshot import _FastAppendFiles
from pyiceberg.typedef import Record
from pyroaring import BitMap

# Field ids that the specification reserves for the two columns of a position delete file.
_POSITIONS = pa.schema(
    [
        pa.field("file_path", pa.string(), False, {"PARQUET:field_id": "2147483546"}),
        pa.field("pos", pa.int64(), False, {"PARQUET:field_id": "2147483545"}),
    ]
)


class _DeleteManifest(ManifestWriterV2):
    def content(self) -> ManifestContent:
        return ManifestContent.DELETES

    @property
    def _meta(self) -> dict[str, str]:
        return {**super()._meta, "content": "deletes"}


class _AddDeletes(_FastAppendFiles):
    """A commit of delete files alone, which pyiceberg itself cannot make."""

    delete_files: Sequence[DataFile] = ()

    def _manifests(self) -> list[ManifestFile]:
        table = self._transaction.table_metadata
        writer = _DeleteManifest(
            table.spec(), table.schema(), self.new_manifest_output(), self._snapshot_id, "gzip"
        )
        with writer:
            for file in self.delete_files:
                writer.add(
                    ManifestEntry.from_args(
                        status=ManifestEntryStatus.ADDED, snapshot_id=self._snapshot_id, data_file=file
                    )
                )
        return [*super()._manifests(), writer.to_manifest_file()]


def commit_deletes(table: Table, *files: DataFile) -> int:
    """Commit the delete files as another engine would; returns the id of the snapshot."""
    transaction = table.transaction()
    commit = _AddDeletes(
        Operation.DELETE, transaction, table.io, snapshot_properties={"engine-name": "spark"}
    )
    commit.delete_files = files
    commit.commit()
    transaction.commit_transaction()
    snapshot = table.refresh().current_snapshot()
    assert snapshot is not None
    return snapshot.snapshot_id


def delete_positions(table: Table, deleted: dict[str, list[int]]) -> DataFile:
    """A position delete file: path of a data file → the numbers of its rows that go."""
    rows = [{"file_path": path, "pos": place} for path in sorted(deleted) for place in sorted(deleted[path])]
    path = _write(table, pa.Table.from_pylist(rows, schema=_POSITIONS))
    return _delete_file(table, path, DataFileContent.POSITION_DELETES, len(rows), _partition(table, deleted))


def delete_equal(table: Table, day: date, **values: list[Any]) -> DataFile:
    """An equality delete file of one day: rows whose columns have these values go."""
    fields = [table.schema().find_field(name) for name in values]
    schema = pa.schema(
        [
            pa.field(field.name, pa.int64(), False, {"PARQUET:field_id": str(field.field_id)})
            for field in fields
        ]
    )
    path = _write(table, pa.table(values, schema=schema))
    partition = Record((day - date(1970, 1, 1)).days)
    content, count = DataFileContent.EQUALITY_DELETES, len(next(iter(values.values())))
    return _delete_file(
        table, path, content, count, partition, equality_ids=[field.field_id for field in fields]
    )


def delete_vector(table: Table, data_path: str, places: list[int], *, codec: str | None = None) -> DataFile:
    """A deletion vector of version 3 in a Puffin file, for one data file."""
    bitmap = b"\x01\0\0\0\0\0\0\0" + b"\0\0\0\0" + BitMap(places).serialize()
    magic = b"\xd1\xd3\x39\x64"
    payload = magic + bitmap
    blob = len(payload).to_bytes(4, "big") + payload + zlib.crc32(payload).to_bytes(4, "big")
    described: dict[str, Any] = {
        "type": "deletion-vector-v1",
        "fields": [2147483645],
        "snapshot-id": -1,
        "sequence-number": -1,
        "offset": 4,
        "length": len(blob),
        "properties": {"referenced-data-file": data_path, "cardinality": str(len(places))},
    }
    if codec:
        described["compression-codec"] = codec
    footer = json.dumps({"blobs": [described], "properties": {}}).encode()
    puffin = b"PFA1" + blob + b"PFA1" + footer + len(footer).to_bytes(4, "little") + b"\0\0\0\0" + b"PFA1"
    path = f"{table.location()}/data/{uuid.uuid4()}-deletes.puffin"
    with table.io.new_output(path).create() as out:
        out.write(puffin)
    content, partition = DataFileContent.POSITION_DELETES, _partition(table, [data_path])
    return _delete_file(table, path, content, len(places), partition, file_format=FileFormat.PUFFIN)


def add_file(table: Table, name: str, rows: pa.Table) -> str:
    """Add a data file under a name of the other engine's, or of ours, without reading the table; returns its path."""
    path = f"{table.location()}/data/{name}"
    with table.io.new_output(path).create() as out:
        pq.write_table(rows, out)
    table.refresh().add_files([path])
    return path


def _write(table: Table, rows: pa.Table) -> str:
    path = f"{table.location()}/data/{uuid.uuid4()}-deletes.parquet"
    with table.io.new_output(path).create() as out:
        pq.write_table(rows, out)
    return path


def _partition(table: Table, paths: Any) -> Record:
    found = {task.file.partition for task in table.scan().plan_files() if task.file.file_path in set(paths)}
    (partition,) = found
    return partition


def _delete_file(
    table: Table, path: str, content: DataFileContent, rows: int, partition: Record, **more: Any
) -> DataFile:
    statistics = ("column_sizes", "value_counts", "null_value_counts", "nan_value_counts")
    told = {name: {} for name in (*statistics, "lower_bounds", "upper_bounds")} | {
        "content": content,
        "file_path": path,
        "file_format": FileFormat.PARQUET,
        "partition": partition,
        "record_count": rows,
        "file_size_in_bytes": len(table.io.new_input(path)),
    }
    file = DataFile.from_args(**{**told, **more})
    file.spec_id = table.spec().spec_id
    return file
