"""The SQLite catalog of one machine as what it is: a table of names and metadata files, read without Iceberg.

Loading Iceberg, and SQLAlchemy with which it opens this catalog, takes longer than most commands that read.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path


def catalog_tables(catalog: Path, namespace: str) -> dict[str, str]:
    """Return the metadata file of each table of a namespace by the table's name, sorted; empty without the file.

    A metadata file is never rewritten. Raises sqlite3.Error.
    """
    if not catalog.exists():
        return {}
    with closing(sqlite3.connect(f"{catalog.as_uri()}?mode=ro", uri=True)) as connection:
        return dict(
            connection.execute(
                "select table_name, metadata_location from iceberg_tables where table_namespace = ? order by 1",
                [namespace],
            ).fetchall()
        )
