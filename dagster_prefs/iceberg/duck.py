"""DuckDB sessions with bounded memory and without network access."""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import duckdb
import pyarrow as pa

from dagster_prefs.iceberg.catalog import OfflineError, StorageFull

# Memory and number of threads. Each thread takes its share of the memory: 16 threads cannot join within what
# suffices for 4.
SORTING = ("128MB", 2)
JOINING = ("1GB", 4)
# Up to this size rows are sorted without a session.
SMALL_BYTES = 8 * 1024 * 1024


def quoted(name: str) -> str:
    """Return an identifier as DuckDB's SQL writes it."""
    return '"' + name.replace('"', '""') + '"'


@contextmanager
def duck_session(memory: str, threads: int) -> Iterator[duckdb.DuckDBPyConnection]:
    """Open a session whose tables live in a temporary file; its memory is at most `memory` (e.g. `1GB`)."""
    with tempfile.TemporaryDirectory(prefix="prefs-duckdb-") as scratch:
        config: dict[str, str | bool | int | float | list[str]] = {
            "memory_limit": memory,
            # DuckDB keeps this memory allocated: returning every block to the system and allocating it again
            # costs a tenth of a sort.
            "block_allocator_memory": memory,
            "temp_directory": str(Path(scratch, "spill")),
            # The wheel contains everything that is used here; installing an extension would download it.
            "autoinstall_known_extensions": False,
            "autoload_known_extensions": False,
            "preserve_insertion_order": False,
            "threads": min(threads, os.cpu_count() or 1),
        }
        # DuckDB compresses tables on disk, but not in memory.
        try:
            with duckdb.connect(str(Path(scratch, "session.duckdb")), config=config) as session:
                yield session
        except (duckdb.OutOfMemoryException, duckdb.IOException) as error:
            # The session's limit for temporary files is a part of the disk space that was free when it began,
            # so that spilling never fills the disk.
            if "No space left" in str(error) or "max_temp_directory_size" in str(error):
                raise StorageFull(
                    f"no space is left for intermediate results in {scratch}: free some and run it again"
                ) from error
            if isinstance(error, duckdb.OutOfMemoryException):
                raise OfflineError(
                    f"{memory} of memory are not enough: split the data to be joined or sorted"
                ) from error
            raise


@contextmanager
def registered(
    session: duckdb.DuckDBPyConnection, name: str, schema: pa.Schema, batches: Iterable[pa.RecordBatch]
) -> Iterator[None]:
    """Register the batches as a relation, readable once. Raises what reading the batches raises."""
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
        # DuckDB passes on only the text of an exception, so the original one is kept here.
        if failures:
            raise failures[0] from error
        raise
    session.unregister(name)


def sort_batches(
    batches: Iterable[pa.RecordBatch], schema: pa.Schema, key: tuple[str, ...], rows: int
) -> Generator[pa.RecordBatch]:
    """Sort rows by `key`, in batches of `rows`; sorts on disk beyond a fixed amount of memory.

    Raises what reading `batches` raises, StorageFull, or another OfflineError.
    """
    source = iter(batches)
    ahead: list[pa.RecordBatch] = []
    held = size = 0
    for batch in source:
        ahead.append(batch)
        held, size = held + batch.num_rows, size + batch.nbytes
        if held > rows or size > SMALL_BYTES:
            break
    else:
        # Opening a session takes several times as long as sorting the rows of a small day.
        if held:
            small = pa.Table.from_batches(ahead).sort_by([(name, "ascending") for name in key])
            yield from small.combine_chunks().cast(schema).to_batches()
        return
    batches = itertools.chain(ahead, source)
    with duck_session(*SORTING) as session, registered(session, "unsorted", schema, batches):
        for batch in session.sql(f"from unsorted order by {', '.join(key)}").to_arrow_reader(rows):
            if batch.num_rows:
                yield batch.cast(schema)
