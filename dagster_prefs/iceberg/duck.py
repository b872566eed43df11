"""DuckDB sessions with bounded memory and no reach for the network."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import duckdb
import pyarrow as pa

from dagster_prefs.iceberg.catalog import OfflineError, StorageFull

# Memory, and threads at most. Each thread takes its part of the memory: 16 of them cannot join in what 4 do with.
SORTING = ("128MB", 2)
JOINING = ("1GB", 4)


@contextmanager
def duck_session(memory: str, threads: int) -> Iterator[duckdb.DuckDBPyConnection]:
    """A session whose tables live in a temporary file and whose memory is at most `memory` (e.g. `1GB`)."""
    with tempfile.TemporaryDirectory(prefix="prefs-duckdb-") as scratch:
        config: dict[str, str | bool | int | float | list[str]] = {
            "memory_limit": memory,
            # Kept between uses: giving every block back to the system and asking for it anew costs a tenth of a sort.
            "block_allocator_memory": memory,
            "temp_directory": str(Path(scratch, "spill")),
            # The wheel holds all that is used; an extension would be a download.
            "autoinstall_known_extensions": False,
            "autoload_known_extensions": False,
            "preserve_insertion_order": False,
            "threads": min(threads, os.cpu_count() or 1),
        }
        # On disk, unlike in memory, DuckDB compresses its tables.
        try:
            with duckdb.connect(str(Path(scratch, "session.duckdb")), config=config) as session:
                yield session
        except (duckdb.OutOfMemoryException, duckdb.IOException) as error:
            # What spills ends before the disk does: at a part of what was free when the session began.
            if "No space left" in str(error) or "max_temp_directory_size" in str(error):
                raise StorageFull(
                    f"no space left for intermediate results in {scratch}: free some and run it again"
                ) from error
            if isinstance(error, duckdb.OutOfMemoryException):
                raise OfflineError(
                    f"{memory} of memory do not suffice: split what is to be joined or sorted"
                ) from error
            raise


@contextmanager
def registered(
    session: duckdb.DuckDBPyConnection, name: str, schema: pa.Schema, batches: Iterable[pa.RecordBatch]
) -> Iterator[None]:
    """The batches as a relation of the session, to be read once; what reading them raises, the block raises."""
    failures: list[BaseException] = []

    def remember() -> Iterator[pa.RecordBatch]:
        try:
            yield from batches
        except BaseException as error:
            failures.append(error)
            raise

    session.register(name, pa.RecordBatchReader.from_batches(schema, remember()))
    try:
        yield
    except (duckdb.Error, pa.ArrowException) as error:
        # DuckDB knows of it as a text only.
        if failures:
            raise failures[0] from error
        raise
    session.unregister(name)


def sort_batches(
    batches: Iterable[pa.RecordBatch], schema: pa.Schema, key: tuple[str, ...], rows: int
) -> Generator[pa.RecordBatch]:
    """The same rows ordered by `key`, in batches of `rows`; beyond some memory they are sorted on disk.

    Raises what reading `batches` raises, StorageFull, or another OfflineError.
    """
    with duck_session(*SORTING) as session, registered(session, "unsorted", schema, batches):
        for batch in session.sql(f"from unsorted order by {', '.join(key)}").to_arrow_reader(rows):
            if batch.num_rows:
                yield batch.cast(schema)
