"""Describe the attributes of a relation by statistics, computed by DuckDB from a stream of Arrow batches.

Memory is bounded by the session's limit, whatever the number of rows: every aggregate is a sketch or a counter.
Distinct values are counted by HyperLogLog, quantiles by a t-digest of at most QUANTILE_ROWS rows, both DuckDB's own.
The rows of each bucket are exact, so that two days can be compared without reading their rows again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from typing import Any

import duckdb
import pyarrow as pa

from dagster_prefs.iceberg.duck import quoted, registered
from dagster_prefs.values.statistics import (
    BOUNDS,
    MIN_SUBJECTS,
    MOST_VALUES,
    QUANTILES,
    Kind,
    Source,
    Statistics,
)

# So many rows give every quantile within a tenth of a percent of its rank; more only take time.
QUANTILE_ROWS = 500_000
SESSION = ("192MB", 2)
"""Memory and threads of the DuckDB session that `describe` needs."""


@dataclass(frozen=True, slots=True)
class Measured:
    """An attribute to describe, and its number in SQL: that of `name` itself, or of something derived from it."""

    name: str
    kind: Kind
    sql: str


@dataclass(frozen=True)
class Described:
    """What rows are described: of which relation, and which of its columns tell subjects and days apart.

    `days` are the days to describe, with the number of rows that the relation has of each, and the version of these.
    """

    source: Source
    relation: str
    subject: str
    day: str
    days: Mapping[date, tuple[int, str]]
    measured_at: datetime


def describe(
    session: duckdb.DuckDBPyConnection,
    what: Described,
    attributes: Sequence[Measured],
    schema: pa.Schema,
    batches: Callable[[Sequence[str]], Iterable[pa.RecordBatch]],
) -> list[Statistics]:
    """Describe every attribute on each day, from the rows that `batches` yields for the named columns of `schema`.

    `batches` is called at most twice: once for all numbers, once for the texts. A day without rows has statistics
    too. Raises what it raises, OfflineError where the session's memory or disk does not suffice.
    """
    numbers = _numbers(session, what, attributes, schema, batches)
    texts = _texts(session, what, attributes, schema, batches)
    return [
        _statistics(what, day, one, numbers.get(day, {}), place, texts.get((day, one.name), ()))
        for day in sorted(what.days)
        for place, one in enumerate(attributes)
    ]


def _statistics(
    what: Described,
    day: date,
    one: Measured,
    found: Mapping[str, Any],
    place: int,
    values: Sequence[tuple[str, int]],
) -> Statistics:
    rows, version = what.days[day]
    sampled, known = int(found.get("rows", 0)), int(found.get(f"known_{place}", 0))
    return Statistics(
        source=what.source,
        relation=what.relation,
        day=day,
        attribute=one.name,
        kind=one.kind,
        # Of a tile every row is read, and rows that another engine deleted are not.
        rows=sampled if what.source == "tile" else rows,
        sampled=sampled,
        nulls=sampled - known,
        distinct=min(int(found.get(f"distinct_{place}", 0)), known),
        version=version,
        measured_at=what.measured_at,
        minimum=found.get(f"minimum_{place}"),
        maximum=found.get(f"maximum_{place}"),
        mean=found.get(f"mean_{place}"),
        quantiles=tuple(found.get(f"quantiles_{place}") or ()),
        values=tuple(values),
        buckets=tuple(
            sorted((bucket["key"], int(bucket["value"])) for bucket in found.get(f"buckets_{place}") or ())
        ),
    )


def _numbers(
    session: duckdb.DuckDBPyConnection,
    what: Described,
    attributes: Sequence[Measured],
    schema: pa.Schema,
    batches: Callable[[Sequence[str]], Iterable[pa.RecordBatch]],
) -> dict[date, dict[str, Any]]:
    """Count and summarize all attributes of each day, in one pass over the rows."""
    every = max(1, -(-max((rows for rows, _ in what.days.values()), default=0) // QUANTILE_ROWS))
    sample = f"filter (where hash({quoted(what.subject)}) % {every} = 0)" if every > 1 else ""
    shares = f"[{', '.join(map(str, QUANTILES))}]"
    # As a variable of the session, because the statement would name all bounds once for each attribute.
    session.execute("set variable bounds = $bounds", {"bounds": list(BOUNDS)})
    columns = [f"{quoted(what.day)} as day", "count(*) as rows"]
    for place, one in enumerate(attributes):
        column, number = quoted(one.name), f"({one.sql})::double"
        columns += [
            f"count({column}) as known_{place}",
            f"approx_count_distinct({column}) as distinct_{place}",
        ]
        if one.kind in ("number", "list", "time"):
            columns += [f"min({number}) as minimum_{place}", f"max({number}) as maximum_{place}"]
        if one.kind in ("number", "list"):
            columns += [
                f"avg({number}) as mean_{place}",
                f"approx_quantile({number}, {shares}) {sample} as quantiles_{place}",
                f"list_filter(map_entries(histogram({number}, getvariable('bounds'))),"
                f" lambda bucket: bucket.value > 0) as buckets_{place}",
            ]
    names = list(dict.fromkeys([what.subject, what.day, *(one.name for one in attributes)]))
    selected = pa.schema([schema.field(name) for name in names])
    with registered(session, "described", selected, batches(names)):
        done = session.execute(f"select {', '.join(columns)} from described group by day")
        labels = [column[0] for column in done.description or []]
        rows = [dict(zip(labels, row, strict=True)) for row in done.fetchall()]
    return {row["day"]: row for row in rows}


def _texts(
    session: duckdb.DuckDBPyConnection,
    what: Described,
    attributes: Sequence[Measured],
    schema: pa.Schema,
    batches: Callable[[Sequence[str]], Iterable[pa.RecordBatch]],
) -> dict[tuple[date, str], list[tuple[str, int]]]:
    """Find each day's most frequent values of each text that enough subjects share, in one pass over these columns."""
    names = [one.name for one in attributes if one.kind == "text"]
    if not names:
        return {}
    selected = pa.schema([schema.field(name) for name in dict.fromkeys([what.subject, what.day, *names])])
    columns = [quoted(name) for name in names]
    day, value = quoted(what.day), f"coalesce({', '.join(columns)})"
    with registered(session, "described", selected, batches(selected.names)):
        rows = session.execute(
            f"select {day} as day, grouping({', '.join(columns)}) as place, {value} as value, count(*) as n"
            f" from described group by grouping sets ({', '.join(f'({day}, {name})' for name in columns)})"
            f" having {value} is not null and count(*) >= $least"
            f" and approx_count_distinct({quoted(what.subject)}) >= $least"
            " qualify row_number() over (partition by day, place order by n desc, value) <= $most"
            " order by day, place, n desc, value",
            {"least": MIN_SUBJECTS, "most": MOST_VALUES},
        ).fetchall()
    # `grouping` has a bit for each column, the first one's the highest, which is 0 for the grouped one.
    everything = 2 ** len(names) - 1
    masks = {everything - 2 ** (len(names) - 1 - place): name for place, name in enumerate(names)}
    found: dict[tuple[date, str], list[tuple[str, int]]] = {}
    for on, mask, text, count in rows:
        found.setdefault((on, masks[mask]), []).append((text, int(count)))
    return found
