"""The foreign project on the embedded engine: its relations as dbt makes them, and what learners did."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from datetime import UTC, date, datetime, timedelta
from typing import Any

from declared import COURSES

from dagster_prefs.declarations.registry import Registry, load_registry
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.engine.dbt import Dbt
from dagster_prefs.events.raw import RawMessage, RawStore
from dagster_prefs.live.steps import Steps

REGISTRY: Registry = load_registry(COURSES)
TODAY = datetime.now(UTC).date()


def days_ago(days: int) -> date:
    return TODAY - timedelta(days=days)


def lesson(
    learner: str, days: int, kind: str = "started", seconds: int | None = 60, subject: str | None = "maths"
) -> dict[str, Any]:
    """An event of a learner at noon UTC of a day, or in the first second of today."""
    day = days_ago(days)
    at = datetime(day.year, day.month, day.day, 12 if days else 0, tzinfo=UTC)
    return {
        "event_id": f"{learner}/{days}/{kind}/{seconds}/{subject}",
        "learner_id": learner,
        "event_type": kind,
        "lesson_id": "l1",
        "subject": subject,
        "seconds": seconds,
        "happened_at": at.isoformat(),
    }


class School:
    """The relations of the foreign project in one database, and what was sent to it.

    dbt makes them unless they were `made` before, as in a copy of a database.
    """

    def __init__(self, engine: EngineConfiguration, dbt: Dbt, *, made: bool = False) -> None:
        self.engine = engine
        self.dbt = dbt
        if not made:
            failed = [result for result in dbt.run("run") if not result.ok]
            assert failed == [], [(result.name, result.message) for result in failed]
        ((self._offset,),) = self.execute("select count(*) from raw_lesson_events")

    def execute(self, query: str, parameters: Sequence[Any] | None = None) -> list[tuple[Any, ...]]:
        with self.engine.connect() as connection:
            cursor = connection.execute(query.encode(), parameters)
            return cursor.fetchall() if cursor.description else []

    def send(self, events: Iterable[dict[str, Any] | bytes]) -> None:
        """Store messages in the raw table as a file would bring them."""
        messages = []
        for event in events:
            data = event if isinstance(event, bytes) else json.dumps(event).encode()
            messages.append(RawMessage(0, self._offset, data))
            self._offset += 1
        with RawStore(self.engine) as store:
            store.write(REGISTRY.topic("lesson_events"), "file:lessons#1", messages)

    def refresh(self) -> None:
        """Apply what was sent, as the follower would."""
        steps = Steps(self.engine, REGISTRY)
        try:
            steps.make_all_due()
            while not steps.step().idle:
                pass
        finally:
            steps.close()
