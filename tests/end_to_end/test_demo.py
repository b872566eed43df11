"""The whole demo as a user runs it: once, and again; test_foreign_commands.py kills one in the middle."""

import json
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from dagster_prefs.cli.serving import profile_client
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.serving.why import explain_attribute
from dagster_prefs.settings import load_settings
from tests.end_to_end.conftest import Place

pytestmark = pytest.mark.slow

SMALL = (
    "--viewers", "60", "--view-events", "3000", "--shop-events", "1500", "--interactions", "400",
    "--days", "12", "--until", (datetime.now(UTC).date() - timedelta(days=1)).isoformat(),
)  # fmt: skip


def demo(place: Place) -> dict[str, Any]:
    outcome: dict[str, Any] = json.loads(place.ok("prefs", "demo", "--json", *SMALL))
    return outcome


@pytest.fixture(scope="module")
def place(new_place: Callable[[], Place]) -> Place:
    return new_place()


@pytest.fixture(scope="module")
def first(place: Place) -> dict[str, Any]:
    return demo(place)


def test_it_takes_the_users_way(place: Place, first: dict[str, Any]) -> None:
    assert [step.split()[0] for step in first["seconds"]] == [
        "deploy", "load", "refresh", "test", "export", "read",
    ]  # fmt: skip
    assert not (place.data_dir / "dagster").exists(), "it starts no run"
    # Events are followed from then on, and canaries tell whether that is so.
    end = time.monotonic() + 120
    while not (place.data_dir / "canary.json").exists():
        assert time.monotonic() < end, (place.data_dir / "logs" / "follower.log").read_text()
        time.sleep(0.1)
    profile = json.loads(place.ok("prefs", "profile", str(first["id"]), "--json"))
    assert {read["fresh"] for read in profile["domains"].values()} <= {True, False}


def test_nothing_is_lost(first: dict[str, Any]) -> None:
    rows = first["rows"]
    for topic, name in (
        ("user.events", "user_events"),
        ("view_events", "view_events"),
        ("content_interactions", "content_interactions"),
    ):
        rejected = sum(first["rejected"].get(topic, {}).values())
        assert rejected > 0
        duplicates = rows[f"raw_{name}"] - rows[name] - rejected
        assert duplicates > 0, "the simulator delivers some events twice"
        assert rows[f"{name}_parsed"] == rows[f"raw_{name}"]
    assert rows["rejected_events"] == sum(sum(reasons.values()) for reasons in first["rejected"].values())


def test_every_training_row_is_a_tile(first: dict[str, Any]) -> None:
    for table, tile in (
        ("viewer_watch_daily", "viewer_watch_metrics_1d"),
        ("viewer_genre_daily", "viewer_genre_metrics_1d"),
        ("viewer_interactions_daily", "viewer_interactions_1d"),
    ):
        assert sum(first["snapshots"][table]["rows_per_day"].values()) == first["rows"][tile]


def test_every_served_number_is_what_its_tiles_say(
    place: Place, first: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in place.environment.items():
        monkeypatch.setenv(name, value)
    settings = load_settings()
    asked = [f"{domain}.{name}" for domain, values in first["items"].items() for name in values]
    domains = settings.registry().contract.domains.values()
    assert len(asked) == sum(len(domain.attributes) for domain in domains)
    with profile_client(settings, first["entity"]) as client:
        found = [
            explain_attribute(EngineConfiguration.of(settings), client, first["id"], name) for name in asked
        ]
    assert [(one.attribute, one.online, one.recomputed) for one in found if not one.equal] == []
    # A domain may be made from events alone.
    assert all(one.events for one in found)
    assert any(one.tiles for one in found)
    assert all(rows for one in found for rows in one.tiles.values())


def test_a_second_run_changes_nothing(place: Place, first: dict[str, Any]) -> None:
    second = demo(place)
    assert second["rows"] == first["rows"]
    assert second["rejected"] == first["rejected"]
    assert second["snapshots"] == first["snapshots"]
