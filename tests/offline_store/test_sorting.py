"""Rows of an export are sorted in memory if they are few, and on disk if they are many, with the same result."""

from __future__ import annotations

import random

import pyarrow as pa
import pytest

from dagster_prefs.iceberg import duck

SCHEMA = pa.schema([("who", pa.large_string()), ("part", pa.int64()), ("value", pa.decimal128(24, 2))])


def batch(rows: list[tuple[str, int, int]]) -> pa.RecordBatch:
    who, part, value = zip(*rows, strict=True) if rows else ((), (), ())
    columns = [pa.array(who, SCHEMA.types[0]), pa.array(part, SCHEMA.types[1])]
    return pa.record_batch([*columns, pa.array(value, pa.int64()).cast(SCHEMA.types[2])], schema=SCHEMA)


def test_rows_in_memory_are_sorted_as_those_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    shuffled = random.Random(7)
    rows = [
        (who, part, part * 3) for who in ("", "Z", "a", "a b", "ä", "漢", "😀") for part in range(-40, 40)
    ]
    shuffled.shuffle(rows)
    batches = [batch(rows[at : at + 70]) for at in range(0, len(rows), 70)]
    sessions = []
    monkeypatch.setattr(
        duck, "duck_session", lambda *limits, of=duck.duck_session: sessions.append(limits) or of(*limits)
    )

    def sort(batches: list[pa.RecordBatch], at_once: int) -> list[tuple[str, int]]:
        groups = list(duck.sort_batches(iter(batches), SCHEMA, ("who", "part"), at_once))
        assert all(group.schema == SCHEMA and 0 < group.num_rows <= at_once for group in groups)
        return [(row["who"], row["part"]) for group in groups for row in group.to_pylist()]

    wanted = sorted(((who, part) for who, part, _ in rows), key=lambda key: (key[0].encode(), key[1]))
    assert sort(batches, len(rows)) == wanted
    assert sort([], 10) == sort([batch([])], 10) == []
    assert sessions == []
    assert sort(batches, len(rows) - 1) == wanted
    monkeypatch.setattr(duck, "SMALL_BYTES", batches[0].nbytes)
    assert sort(batches, len(rows)) == wanted
    assert sessions == [duck.SORTING] * 2
