"""The skew report: what was served beside what had arrived, and why they differ."""

from __future__ import annotations

import gzip
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pytest
from shipped import REGISTRY

from dagster_prefs.declarations.registry import Entity
from dagster_prefs.ids import Id
from dagster_prefs.served_rows import BadRow, LogUnreadable, ServedRow, read_log
from dagster_prefs.training.skew import (
    EVENTUAL,
    Evidence,
    SkewReport,
    measure_skew,
)

SEQUENCE = REGISTRY.contract.domain("sequence")
TARGET = timedelta(seconds=SEQUENCE.freshness.error_seconds)
NOON = datetime(2026, 3, 15, 12, tzinfo=UTC)
SECOND, TICK = timedelta(seconds=1), timedelta(microseconds=1)


class History:
    """Arrivals of views, and the sequences that they give at any moment, in plain Python."""

    def __init__(self) -> None:
        self.views: dict[int, list[tuple[datetime, str]]] = {}
        self.gone: set[int] = set()
        self.since: datetime | None = None
        self.asked = 0

    def view(self, viewer: int, at: datetime, content: str) -> None:
        self.views.setdefault(viewer, []).append((at, content))

    def sequence(self, viewer: int, at: datetime) -> list[str]:
        """The contents of today that had arrived, newest first: at midnight all leave."""
        inside = [one for one in self.views.get(viewer, []) if one[0] <= at and one[0].date() == at.date()]
        return [content for _, content in sorted(inside, reverse=True)]

    def served(self, viewer: int, at: datetime) -> dict[str, Any]:
        found = self.sequence(viewer, at)
        return {
            "recent_content_ids": found,
            "recent_watched_at": [1] * len(found),
            "recent_completions": [Decimal("0.123457")] * len(found),
        }

    def as_served(self, entity: Entity, rows: pa.Table) -> pa.Table:
        assert entity.name == "viewer"
        self.asked += rows.num_rows
        found = []
        for row in rows.to_pylist():
            at, viewer = row["label_time"], row["viewer_id"]
            if self.since and at < self.since:
                found.append({"refused": "older than what the lake keeps"})
                continue
            newest = 5 if self.sequence(viewer, at) else None
            found.append({**self.served(viewer, at), "sequence_last_event_at": newest, "refused": None})
        numbers = pa.decimal128(28, 6)
        return pa.Table.from_pylist(
            found,
            schema=pa.schema({
                "recent_content_ids": pa.list_(pa.string()), "recent_watched_at": pa.list_(pa.int64()),
                "recent_completions": pa.list_(numbers), "sequence_last_event_at": pa.int64(), "refused": pa.string(),
            }),
        )  # fmt: skip

    def arrivals(
        self, entity: Entity, ids: frozenset[Id], first: datetime, last: datetime
    ) -> Mapping[Id, Sequence[datetime]]:
        return {
            id_: [at for at, _ in self.views[id_] if first <= at <= last]
            for id_ in ids
            if isinstance(id_, int) and id_ in self.views
        }

    def evidence(self) -> Evidence:
        return Evidence(self.as_served, self.arrivals, lambda entity, id_: id_ in self.gone)

    def row(self, viewer: int, at: datetime, *, as_of: datetime | None = None, **given: Any) -> ServedRow:
        """A row of the log, of a read at `at` that found the item as of another moment."""
        values = self.served(viewer, as_of or at)
        # The table holds more places than training sets.
        values["recent_completions"] = [Decimal("0.1234567")] * len(values["recent_content_ids"])
        row = ServedRow(
            row_id=f"log-{viewer}-{at.isoformat()}", served_at=at, read_seconds=0.0, entity="viewer", key=str(viewer),
            domain=SEQUENCE.key, contract_version=REGISTRY.contract.version, state="found", error=None,
            attributes=values, last_event_at=5 if values["recent_content_ids"] else None, unknown=(), partial=False,
            consistent=True, request_id=None, variant=None,
        )  # fmt: skip
        # As it is read back.
        values["recent_completions"] = list(map(str, values["recent_completions"]))
        return replace(row, **given)

    def skew(self, *rows: ServedRow) -> SkewReport:
        return measure_skew(REGISTRY, rows, self.evidence())


def causes(report: SkewReport) -> dict[str, int]:
    found = report.attributes["sequence", "recent_content_ids"].causes
    return {cause: number for cause, number in found.items() if number}


@pytest.fixture
def history() -> History:
    made = History()
    made.view(1, NOON - 600 * SECOND, "a")
    made.view(1, NOON, "b")
    return made


def test_what_equals_is_counted_and_nothing_else_is_asked_for(history: History) -> None:
    rows = [history.row(1, NOON + number * SECOND) for number in (-700, -600, -1, 0, 1)]
    report = history.skew(*rows, history.row(2, NOON), rows[0])
    assert (report.rows, report.repeated, report.compared) == (7, 1, 24)
    assert report.causes.total() == 0
    assert {one.equal_share for one in report.attributes.values()} == {1.0}
    assert {name for _, name in report.attributes} == {*SEQUENCE.attributes}
    assert history.asked == 6
    assert report.behind_seconds == {}


@pytest.mark.parametrize(
    ("late", "given", "cause"),
    [
        (SECOND, {}, "in flight"),
        (TARGET, {}, "in flight"),
        (TARGET + TICK, {}, "beyond the target"),
        # The item was read at some time during the read.
        (TARGET + SECOND, {"read_seconds": 1.0}, "in flight"),
        (TARGET + EVENTUAL, {"consistent": False}, "eventually consistent"),
        (TARGET + EVENTUAL + TICK, {"consistent": False}, "beyond the target"),
        (600 * SECOND, {}, "beyond the target"),
        (2 * 3600 * SECOND, {}, "wrong"),
    ],
)
def test_a_value_that_is_late_is_classed_by_how_late(
    history: History, late: timedelta, given: dict[str, Any], cause: str
) -> None:
    """The event arrived at noon, and its item came so much later."""
    report = history.skew(history.row(1, NOON - TICK + late, as_of=NOON - TICK, **given))
    assert causes(report) == {cause: 1}
    if cause != "wrong":
        (example,) = report.attributes["sequence", "recent_content_ids"].examples
        assert example.behind_seconds == pytest.approx(late.total_seconds())
        assert (example.served, example.expected) == (["a"], ["b", "a"])
        assert report.behind_seconds[0.5] == pytest.approx(late.total_seconds())


def test_a_midnight_that_is_late_is_in_flight_too(history: History) -> None:
    """No event arrives when a day leaves a window."""
    midnight = datetime(2026, 3, 16, tzinfo=UTC)
    late = history.row(1, midnight + SECOND, as_of=midnight - TICK)
    later = history.row(1, midnight + 2 * TARGET, as_of=midnight - TICK)
    assert causes(history.skew(late)) == {"in flight": 1}
    assert causes(history.skew(later)) == {"beyond the target": 1}


def test_every_state_between_two_arrivals_is_found(history: History) -> None:
    """Of three events within a millisecond the second had been published."""
    for number, content in enumerate("xyz"):
        history.view(3, NOON + number * TICK, content)
    row = history.row(3, NOON + SECOND, as_of=NOON + TICK)
    assert row.attributes is not None
    assert row.attributes["recent_content_ids"] == ["y", "x"]
    assert causes(history.skew(row)) == {"in flight": 1}


def test_a_clock_that_is_behind_sees_the_future(history: History) -> None:
    row = history.row(1, NOON - SECOND / 2, as_of=NOON)
    report = history.skew(row)
    assert causes(report) == {"clock difference": 1}
    assert report.behind_seconds == {}
    assert causes(history.skew(history.row(1, NOON - 2 * SECOND, as_of=NOON))) == {"wrong": 1}


def test_other_causes(history: History) -> None:
    of_nothing = {"recent_content_ids": [], "recent_watched_at": [], "recent_completions": []}
    fallback = history.row(
        1, NOON, state="cold_start", error="timeout", attributes=of_nothing, last_event_at=None
    )
    assert causes(history.skew(fallback)) == {"fallback": 1}
    # An item of a version that lacked the attribute.
    lacking = history.row(1, NOON)
    assert lacking.attributes is not None
    lacking = replace(
        lacking,
        attributes={**lacking.attributes, "recent_content_ids": ["z"]},
        unknown=("recent_content_ids",),
    )
    assert causes(history.skew(lacking)) == {"contract version": 1}
    # Another version counted otherwise.
    odd = replace(lacking, unknown=())
    assert causes(history.skew(odd)) == {"wrong": 1}
    assert causes(history.skew(replace(odd, contract_version=REGISTRY.contract.version + 1))) == {
        "contract version": 1
    }
    # Erased later, so that the lake no longer has what she saw.
    seen = history.row(1, NOON)
    history.views.pop(1)
    history.gone.add(1)
    assert causes(history.skew(seen)) == {"erased": 1}
    history.gone.clear()
    assert causes(history.skew(seen)) == {"wrong": 1}


def test_what_cannot_be_compared_is_counted(history: History) -> None:
    history.since = NOON
    row = history.row(1, NOON)
    report = history.skew(
        replace(history.row(1, NOON - SECOND), row_id="early"),
        replace(row, row_id="other", domain="engagement#gone"),
        replace(row, row_id="none", state="failed", error="timeout", attributes=None),
        row,
    )
    assert report.refused == {"older than what the lake keeps": 1}
    assert report.unknown == {"viewer engagement#gone": 1}
    assert (report.failed, report.compared) == (1, 4)
    with pytest.raises(BadRow, match=r"row 'log-.*': its key is none of viewer"):
        history.skew(replace(row, key="x"))


def test_an_attribute_that_training_does_not_compute_is_named(history: History) -> None:
    def without(entity: Entity, rows: pa.Table) -> pa.Table:
        return history.as_served(entity, rows).drop_columns(["recent_completions"])

    report = measure_skew(REGISTRY, [history.row(1, NOON)], replace(history.evidence(), as_served=without))
    assert report.left_out == {"sequence.recent_completions"}
    assert report.compared == 3


def test_any_lag_of_a_publisher_is_explained_and_a_lost_event_is_not() -> None:
    """A thousand reads of a publisher that is up to 3 s behind; then of one that lost an event."""
    random, history = Random(5), History()
    for number in range(400):
        history.view(random.randrange(10), NOON + random.randrange(60_000_000) * TICK, f"c{number}")
    rows, lost = [], 0
    for number in range(1_000):
        viewer, at = random.randrange(10), NOON + random.randrange(5_000_000, 65_000_000) * TICK
        row = history.row(viewer, at, as_of=at - random.randrange(3_000_000) * TICK, row_id=str(number))
        if number % 100 == 0 and row.attributes and len(row.attributes["recent_content_ids"]) > 3:
            lost += 1
            row = replace(
                row, attributes={name: values[:1] + values[2:] for name, values in row.attributes.items()}
            )
        rows.append(row)
    report = history.skew(*rows)
    assert lost > 5
    assert causes(report)["wrong"] == lost
    assert set(causes(report)) == {"in flight", "wrong"}
    # What a lost event leaves behind may look like an older state, attribute by attribute.
    clean = history.skew(*(row for row in rows if int(row.row_id) % 100))
    assert set(clean.causes) == {"in flight"}
    assert clean.causes.total() > 100
    assert 0 < clean.behind_seconds[1.0] <= 3
    told = report.as_dict()
    assert told["causes"]["wrong"] == report.causes["wrong"]
    assert told["attributes"][0]["examples"]


def test_the_log_is_read_from_files_of_every_kind(tmp_path: Path, history: History) -> None:
    rows = [history.row(1, NOON + number * SECOND) for number in range(4)]
    lines = [row.as_json() + b"\n" for row in rows]
    (tmp_path / "served-1.jsonl").write_bytes(lines[0])
    (tmp_path / "served-2.jsonl.gz").write_bytes(gzip.compress(lines[1]))
    (tmp_path / "served-3.jsonl.open").write_bytes(lines[2] + lines[3][:40])
    (tmp_path / "notes.txt").write_text("no log")
    assert [row.row_id for row in read_log([tmp_path])] == [row.row_id for row in rows[:3]]
    assert len(list(read_log([tmp_path / "served-1.jsonl"]))) == 1
    (tmp_path / "served-4.jsonl").write_bytes(lines[0] + lines[3][:40])
    with pytest.raises(LogUnreadable, match=r"served-4\.jsonl, line 2: .* is no row of the served log"):
        list(read_log([tmp_path]))
    with pytest.raises(LogUnreadable, match="has no file of the served log"):
        list(read_log([tmp_path.parent / "x"] if (tmp_path.parent / "x").mkdir() is None else []))
    with pytest.raises(LogUnreadable, match="cannot be read"):
        list(read_log([tmp_path / "gone.jsonl"]))
