"""DuckDB sessions with bounded memory and no reach for the network."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import duckdb

from dagster_prefs.offline.catalog import OfflineError, StorageFull


@contextmanager
def duck_session(memory: str, folder: Path | None = None) -> Iterator[duckdb.DuckDBPyConnection]:
    """A session whose tables live in a temporary file and whose memory is at most `memory` (e.g. `1GB`).

    `folder` is where that file lies, the system's temporary folder by default; it is removed in the end.
    """
    with tempfile.TemporaryDirectory(prefix="prefs-duckdb-", dir=folder) as scratch:
        config: dict[str, str | bool | int | float | list[str]] = {
            "memory_limit": memory,
            "temp_directory": str(Path(scratch, "spill")),
            # The wheel holds all that is used; an extension would be a download.
            "autoinstall_known_extensions": False,
            "autoload_known_extensions": False,
            "preserve_insertion_order": False,
        }
        # On disk, unlike in memory, DuckDB compresses its tables.
        try:
            with duckdb.connect(str(Path(scratch, "session.duckdb")), config=config) as session:
                yield session
        except duckdb.OutOfMemoryException as error:
            raise OfflineError(
                f"{memory} of memory do not suffice for the join: allow more, or split the labels"
            ) from error
        except duckdb.IOException as error:
            if "space" in str(error):
                raise StorageFull(
                    f"no space left for intermediate results in {scratch}: free some"
                ) from error
            raise
