"""One loop for what DynamoDB leaves: bounded pauses, within the caller's budget, and no second loop elsewhere."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

import dagster_prefs.dynamodb
from dagster_prefs.dynamodb.backoff import Backoff


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    found: list[float] = []
    monkeypatch.setattr(time, "sleep", found.append)
    monkeypatch.setattr("random.uniform", lambda low, high: high)
    return found


def test_pauses_grow_to_a_bound_and_end(pauses: list[float]) -> None:
    backoff = Backoff(5, first_seconds=1, longest_seconds=3)
    assert [backoff.again() for _ in range(5)] == [True, True, True, True, False]
    assert pauses == [1, 2, 3, 3]


def test_progress_gives_all_attempts_back(pauses: list[float]) -> None:
    backoff = Backoff(2)
    assert backoff.again()
    backoff.progressed()
    assert [backoff.again() for _ in range(3)] == [True, True, False]


def test_no_pause_reaches_the_deadline(pauses: list[float]) -> None:
    assert not Backoff(9, first_seconds=60, longest_seconds=60, deadline=time.monotonic() + 30).again()
    assert pauses == []


def test_nothing_else_of_the_room_pauses_at_random() -> None:
    room = Path(dagster_prefs.dynamodb.__file__).parent
    assert [path.name for path in room.rglob("*.py") if "random.uniform" in path.read_text()] == [
        "backoff.py"
    ]
