"""The commands on a project with other events, entities and keys than the example's, as its owner types them."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tests.declared import COURSES
from tests.end_to_end.conftest import Place

pytestmark = pytest.mark.slow

SETTINGS = {"PREFS_PROJECT_DIR": str(COURSES), "PREFS_KAFKA_TOPIC_LESSON_EVENTS": "lessons.v2"}
SMALL = (
    "--viewers", "30", "--view-events", "900", "--shop-events", "0", "--interactions", "0",
    "--days", "6", "--until", (datetime.now(UTC).date() - timedelta(days=1)).isoformat(),
)  # fmt: skip


@pytest.fixture(scope="module")
def place(new_place: Callable[..., Place]) -> Place:
    return new_place(**SETTINGS)


@pytest.fixture(scope="module")
def shown(place: Place) -> dict[str, Any]:
    """What the demo ends with."""
    return demo(place)


def demo(place: Place) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(place.ok("prefs", "demo", "--json", *SMALL))
    return found


def test_the_demo_makes_up_events_and_serves_them(shown: dict[str, Any]) -> None:
    rows, rejected = shown["rows"], sum(shown["rejected"]["lesson_events"].values())
    assert set(shown["rejected"]) == {"lesson_events"}
    assert rows["raw_lesson_events"] == rows["lesson_events_parsed"] == 900
    assert 0 < rows["rejected_events"] == rejected
    assert rows["lesson_events"] < 900 - rejected, "some events are delivered twice"
    assert shown["entity"] == "learner"
    assert shown["items"]["progress"]["favorite_subjects"]
    assert (shown["user_id"], shown["ranking"]) == (None, [])
    (snapshot,) = shown["snapshots"].values()
    assert sum(snapshot["rows_per_day"].values()) > 0
    assert [name for name, _, _ in shown["freshness"]] == ["progress"]


def test_kills_in_the_middle_are_made_good_by_the_next_run(
    new_place: Callable[..., Place], shown: dict[str, Any]
) -> None:
    """Killed while it loads, then while it refreshes what was loaded; the third run ends as an undisturbed one."""
    place = new_place(**SETTINGS)
    for moment in ("load events", "refresh every view"):
        process = place.start("prefs", "demo", "--json", *SMALL)
        assert process.stderr is not None
        for line in process.stderr:
            if moment in line:
                break
        else:
            pytest.fail(f"the demo never said that it would {moment}")
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    again = demo(place)
    assert again["rows"] == shown["rows"]
    assert again["snapshots"].keys() == shown["snapshots"].keys()
    for table, snapshot in again["snapshots"].items():
        assert snapshot["rows_per_day"] == shown["snapshots"][table]["rows_per_day"]


def test_a_topic_of_another_project_is_refused(place: Place, shown: dict[str, Any]) -> None:
    refused = place.run("prefs", "rejected", "--topic", "view_events")
    assert refused.returncode != 0
    assert "unknown topic 'view_events'" in refused.stderr + refused.stdout
    assert "the project has lesson_events" in refused.stderr + refused.stdout


def test_a_setting_of_another_project_is_refused(place: Place) -> None:
    other = replace(place, environment={**place.environment, "PREFS_KAFKA_TOPIC_USER_EVENTS": "shop"})
    refused = other.run("prefs", "rejected")
    assert refused.returncode != 0
    assert "unknown setting PREFS_KAFKA_TOPIC_USER_EVENTS" in refused.stderr + refused.stdout
