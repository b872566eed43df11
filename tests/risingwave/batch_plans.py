"""What RisingWave would read for a query, by its EXPLAIN of it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import psycopg
from psycopg import sql

from dagster_prefs.engine.connection import EngineConfiguration

SCAN = re.compile(r"BatchScan \{ table: (\w+)")
LOOKUP = re.compile(r"lookup table: (\w+)")
# What hands rows on one by one, so that a limit above ends the scan below.
STREAMED = ("BatchFilter", "BatchProject", "BatchScan")


def read_whole(plan: list[str]) -> set[str]:
    """What a plan reads from end to end: scans without ranges and without a limit; and what it looks keys up in."""
    above: list[tuple[int, str]] = []
    found = set()
    for line in plan:
        depth = len(line) - len(line.lstrip(" │├└─"))
        node = line[depth:].split(" ")[0]
        above = [one for one in above if one[0] < depth]
        if (scan := SCAN.search(line)) and "scan_ranges" not in line:
            nearest = next((name for _, name in reversed(above) if name not in STREAMED), "")
            if nearest != "BatchLimit":
                found.add(scan[1])
        elif lookup := LOOKUP.search(line):
            # Which of its columns it looks up by is not told.
            found.add(lookup[1])
        above.append((depth, node))
    return found


@dataclass(frozen=True)
class Explained(EngineConfiguration):
    """An engine whose queries are explained before they run; `plans` is query → plan."""

    plans: dict[str, list[str]] = field(default_factory=dict, compare=False)

    def connect(self, *, autocommit: bool = True) -> psycopg.Connection[tuple[Any, ...]]:
        connection = super().connect(autocommit=autocommit)
        plans = self.plans

        class Cursor(psycopg.Cursor[tuple[Any, ...]]):
            def execute(self, query: Any, params: Any = None, **options: Any) -> Any:
                text = query.as_string(self) if isinstance(query, sql.Composable) else str(query)
                if text.startswith("select"):
                    bound = psycopg.ClientCursor(self.connection).mogrify(text, params)
                    rows = psycopg.Cursor(self.connection).execute(f"explain {bound}".encode()).fetchall()
                    plans[bound] = [line for (line,) in rows]
                return super().execute(query, params, **options)

        connection.cursor_factory = Cursor
        return connection
