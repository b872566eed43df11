"""OpenLineage events as a collector receives them, and as an operator sees that it received none."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from declared import COURSES, PROJECT
from shipped import SHORT

from dagster_prefs import open_lineage
from dagster_prefs.declarations.lineage import load_lineage
from dagster_prefs.declarations.registry import load_registry
from dagster_prefs.iceberg.exporter import DayOutcome, Exporter
from dagster_prefs.platform import Platform
from dagster_prefs.settings import load_settings

PLACES = open_lineage.Places(
    "postgres://engine:4566", "dev.public.", "kafka://broker:9092", {"user.events": "shop-events"},
    "dynamodb://eu-central-1", "prod_", "s3://lake/warehouse", "training.",
)  # fmt: skip


class Collector:
    """A server that takes OpenLineage events; `answer` is its status."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.answer = 201
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                collector.events.append(json.loads(body) | {"path": self.path})
                self.send_response(collector.answer)
                self.end_headers()

            def log_message(self, *words: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    found = Collector()
    thread = threading.Thread(target=found.server.serve_forever)
    thread.start()
    monkeypatch.setenv("OPENLINEAGE_URL", found.url)
    yield found
    # Its client sets these itself, and takes the next collector for the first one.
    for name in [name for name in os.environ if name.startswith("OPENLINEAGE__")]:
        del os.environ[name]
    found.server.shutdown()
    thread.join()
    found.server.server_close()


def used(event: dict[str, Any], column: str) -> dict[tuple[str, str], set[str]]:
    """(Dataset, column) → how an output column uses it."""
    (output,) = event["outputs"]
    fields = output["facets"]["columnLineage"]["fields"][column]["inputFields"]
    return {
        (one["name"], one["field"]): {f"{how['type']} {how['subtype']}" for how in one["transformations"]}
        for one in fields
    }


def test_an_apply_tells_where_each_column_comes_from(collector: Collector) -> None:
    registry = load_registry(PROJECT)
    lineage = load_lineage(PROJECT, registry)
    sent = open_lineage.send(
        "apply", "dagster_prefs", lambda: open_lineage.applied_datasets(registry, lineage, PLACES)
    )
    assert sent is None
    assert {event["path"] for event in collector.events} == {"/api/v1/lineage"}
    assert {event["eventType"] for event in collector.events} == {"COMPLETE"}
    events = {event["outputs"][0]["name"]: event for event in collector.events}
    typed, items = events["dev.public.user_events"], events["prod_viewer_profiles/engagement#watch"]
    assert typed["job"] == {
        "namespace": "dagster_prefs",
        "name": "apply.dev.public.user_events",
        "facets": {},
    }
    assert used(typed, "price")[("shop-events", "price")] == {"DIRECT IDENTITY"}
    assert [one["namespace"] for one in typed["inputs"]] == ["kafka://broker:9092"]
    assert items["outputs"][0]["namespace"] == "dynamodb://eu-central-1"
    assert used(items, f"titles_{SHORT}d") == {
        ("dev.public.viewer_engagement_rolling", f"titles_{SHORT}d"): {"DIRECT IDENTITY"}
    }
    view = events["dev.public.viewer_engagement_rolling"]
    assert used(view, f"titles_{SHORT}d") == {
        ("dev.public.viewer_watch_metrics_1d", "content_started"): {"DIRECT AGGREGATION"},
        ("dev.public.viewer_watch_metrics_1d", "viewer_id"): {"INDIRECT JOIN", "INDIRECT GROUP_BY"},
        ("dev.public.viewer_watch_metrics_1d", "watch_date"): {"INDIRECT FILTER"},
    }
    # Every view and every domain's items, each once.
    assert len(events) == len(collector.events)
    assert len(events) == len(registry.topics) + len(lineage.relations) + len(registry.contract.domains)


def test_an_export_tells_of_its_table_once_and_only_if_it_brought_days_up(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFS_PROJECT_DIR", str(COURSES))
    platform = Platform(load_settings())
    exporter, (spec,) = platform.exporter, platform.training_tables.values()
    today = datetime.now(UTC).date()
    outcomes: list[DayOutcome] = []
    monkeypatch.setattr(Exporter, "_outcomes", lambda *_: iter(outcomes))
    outcomes.append(DayOutcome(spec.name, today, "failed", 0))
    assert list(exporter.bring_up(spec, [today])) == outcomes
    assert collector.events == []
    outcomes += [DayOutcome(spec.name, today - timedelta(days=day), "written", 3) for day in (1, 2)]
    assert list(exporter.bring_up(spec, [date(2026, 1, 1)])) == outcomes
    (event,) = collector.events
    assert event["outputs"][0]["name"] == f"{platform.settings.iceberg_namespace}.{spec.name}"
    assert {name.rpartition(".")[2] for name, _ in used(event, "seconds")} == {spec.tile}


def test_what_cannot_be_sent_is_named_and_stops_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    registry = load_registry(COURSES)

    def send() -> str | None:
        return open_lineage.send(
            "export",
            "courses",
            lambda: [open_lineage.exported_dataset(registry, "learner_lessons_1d", PLACES)],
        )

    monkeypatch.setenv("OPENLINEAGE_CONFIG", os.devnull)
    monkeypatch.setenv("OPENLINEAGE__TRANSPORT__TYPE", "nonsense")
    assert "nonsense" in (send() or "")
    monkeypatch.setattr(open_lineage, "find_spec", lambda name: None)
    assert "install dagster-prefs[lineage]" in (send() or "")
    assert caplog.text.count("lineage of export was not sent to OpenLineage") == 2


def test_a_collector_that_refuses_is_asked_once(
    collector: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    collector.answer = 400
    registry = load_registry(PROJECT)
    lineage = load_lineage(PROJECT, registry)
    with caplog.at_level(logging.WARNING):
        told = open_lineage.send(
            "apply", "shop", lambda: open_lineage.applied_datasets(registry, lineage, PLACES)
        )
    assert told is not None
    assert "400" in told
    assert f"lineage of apply was not sent to OpenLineage: {told}" in caplog.text
    assert len(collector.events) == 1


def test_off_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not open_lineage.is_on({})
    assert open_lineage.is_on({"OPENLINEAGE_URL": "http://collector"})
    assert open_lineage.is_on({"OPENLINEAGE_CONFIG": "lineage.yml"})
    assert not open_lineage.is_on({"OPENLINEAGE_URL": "http://collector", "OPENLINEAGE_DISABLED": "True"})
    script = (
        "import sys; from dagster_prefs import open_lineage; from dagster_prefs.platform import Platform; "
        "from dagster_prefs.settings import load_settings; platform = Platform(load_settings()); "
        "platform._report_applied(); print([one for one in sys.modules if one.startswith('openlineage')])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
