"""The last good reading of the exports, reused while nothing has changed, so that `prefs status` need not load Iceberg.

Loading Iceberg takes longer than the rest of the command. The days of a table follow from its metadata file, which is
never rewritten, and the engine's tiles from their fingerprints: both are compared without Iceberg. Only readings
without any lag or fault are stored, because others change with time. Works for the SQLite catalog of one machine.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date, datetime
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql

from dagster_prefs.declarations.contract import Freshness
from dagster_prefs.declarations.registry import Registry
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.errors import PrefsError
from dagster_prefs.files import local_folder, make_private_folder, write_private
from dagster_prefs.freshness.levels import Measure
from dagster_prefs.iceberg.pointers import catalog_tables


@dataclass(frozen=True)
class ExportsMemo:
    """The last reading of the exports in which all was well, in a file; `catalog` is the SQLite catalog's file."""

    path: Path
    catalog: Path
    namespace: str
    start: date

    def state(self, engine: EngineConfiguration, registry: Registry, now: datetime) -> str | None:
        """Return a digest of all inputs of the reading on the day of `now` (UTC); None if they cannot be read."""
        try:
            tables = list(catalog_tables(self.catalog, self.namespace).items())
            if not all(_is_there(location) for _, location in tables):
                return None
            with engine.connect() as session:
                tiles = session.execute(
                    sql.SQL("select f::text from {} as f order by 1").format(
                        sql.Identifier(engine.schema, "tile_fingerprints")
                    )
                ).fetchall()
        except (OSError, sqlite3.Error, psycopg.Error, PrefsError):
            return None
        known = [str(now.date()), str(self.start), registry.hashes, tables, tiles]
        return hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()

    def recall(self, state: str) -> list[Measure] | None:
        """Return the stored reading of this state, None if there is none."""
        try:
            content: dict[str, Any] = json.loads(self.path.read_text())
            if content["state"] != state:
                return None
            return [
                Measure(**{**found, "thresholds": Freshness(**found["thresholds"])})
                for found in content["measures"]
            ]
        except (OSError, ValueError, LookupError, TypeError):
            return None

    def remember(self, state: str, measures: Sequence[Measure]) -> None:
        """Store the reading if all is well."""
        if any(found.level != "ok" or found.lag_seconds or found.thresholds is None for found in measures):
            return
        content = {"state": state, "measures": [asdict(found) for found in measures]}
        try:
            make_private_folder(self.path.parent)
            write_private(self.path, json.dumps(content))
        except OSError:
            # Without the file, the next reading only takes longer.
            return


def _is_there(location: str) -> bool:
    file = local_folder(location)
    return file is not None and file.is_file()
