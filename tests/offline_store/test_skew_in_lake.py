"""Skew of a served log against events in a lake: reads of a late publisher are explained, a wrong value is not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from random import Random
from typing import Any

import dagster as dg
import pytest
from click.testing import CliRunner
from pyiceberg.catalog import Catalog
from shipped import REGISTRY, SHORT

from dagster_prefs.cli import cli
from dagster_prefs.declarations.contract import LAST_EVENT_AT
from dagster_prefs.defs import skew as definitions
from dagster_prefs.freshness.skew import DomainSkew, measure_skew_of
from dagster_prefs.platform import Platform
from dagster_prefs.served_rows import ServedRow, parse_row, read_log
from dagster_prefs.settings import Settings
from dagster_prefs.training.skew import AttributeSkew, SkewReport, measure_skew
from dagster_prefs.training.skew_evidence import lake_evidence

from .conftest import DAY
from .lake_world import put_events
from .served_oracle import Interaction, View, viewer_values, with_ids

MIDNIGHT = datetime(DAY.year, DAY.month, DAY.day, tzinfo=UTC)
HOUR, SECOND, TICK = timedelta(hours=1), timedelta(seconds=1), timedelta(microseconds=1)
VIEWERS, SPREAD = 8, 600


def sequence_values(viewer: int, t: datetime, views: list[View]) -> dict[str, Any]:
    """The sequence of a viewer at t, of views that are all within the window."""
    seen = [view for view in views if view.viewer_id == viewer and view.arrived_at and view.arrived_at <= t]
    last = sorted(seen, key=lambda view: view.event_id)
    last = sorted(last, key=lambda view: view.watched_at, reverse=True)[:50]
    return {
        "recent_content_ids": [view.content_id for view in last],
        "recent_watched_at": [round((view.watched_at - MIDNIGHT) / (SECOND / 1000)) + _MS for view in last],
        "recent_completions": [view.completion_pct for view in last],
    }


_MS = round(MIDNIGHT.timestamp() * 1000)


class Traffic:
    """An evening of events, and reads of a publisher that is up to four seconds behind."""

    def __init__(self) -> None:
        random = Random(7)
        self.views = with_ids(
            View(
                random.randrange(VIEWERS), at - random.choice([timedelta(), 3 * HOUR]), at,
                content_id=random.choice(["a", "b", None]), genre=random.choice(["drama", "news", None]),
                watch_duration_sec=random.randrange(100), completion_pct=random.choice([None, Decimal("0.123456789")]),
            )
            for at in (MIDNIGHT - HOUR / 6 + random.randrange(1_200_000) * SECOND / 1000 for _ in range(600))
        )  # fmt: skip
        self.touches = with_ids(
            Interaction(random.randrange(VIEWERS), at, at, random.choice(["like", "share"]))
            for at in (MIDNIGHT - HOUR / 6 + random.randrange(1_200_000) * SECOND / 1000 for _ in range(100))
        )
        self.rows = [
            self.row(number, at, at - random.randrange(4_000) * SECOND / 1000, random.randrange(VIEWERS))
            for number in range(300)
            for at in [MIDNIGHT + (random.randrange(1_000_000) - 500_000) * SECOND / 1000]
        ]

    def values(self, viewer: int, t: datetime) -> dict[str, Any]:
        return {
            **viewer_values(viewer, t, self.views, self.touches, spread=SPREAD),
            **sequence_values(viewer, t, self.views),
        }

    def row(self, number: int, at: datetime, as_of: datetime, viewer: int) -> ServedRow:
        domain = list(REGISTRY.contract.domains.values())[number % 4]
        values = self.values(viewer, as_of)
        newest = values.get(f"{domain.name}_{LAST_EVENT_AT}")
        if domain.name == "sequence":
            newest = max(values["recent_watched_at"], default=None)
        row = ServedRow(
            str(number), at, 0.001, "viewer", str(viewer), domain.key, REGISTRY.contract.version, "found", None,
            {name: values[name] for name in domain.attributes if name != LAST_EVENT_AT}, newest, (), False, False,
            None, None,
        )  # fmt: skip
        return parse_row(row.as_json())


@pytest.fixture(scope="module")
def traffic() -> Traffic:
    return Traffic()


def test_late_reads_are_in_flight_and_a_wrong_value_is_found(catalog: Catalog, traffic: Traffic) -> None:
    put_events(catalog, REGISTRY, "view_events", traffic.views, until=MIDNIGHT + 2 * HOUR)
    put_events(catalog, REGISTRY, "content_interactions", traffic.touches, until=MIDNIGHT + 2 * HOUR)
    spreads = {
        domain.name: ((MIDNIGHT - 24 * HOUR, SPREAD),) for domain in REGISTRY.contract.domains.values()
    }
    evidence = lake_evidence(catalog, REGISTRY, spreads=spreads, erased=lambda entity, id_: False)
    report = measure_skew(REGISTRY, traffic.rows, evidence)
    assert report.rows == 300
    assert (report.left_out, report.refused, report.unknown) == (set(), {}, {})
    assert {domain for domain, _ in report.attributes} == {"watch", "interactions", "preferences", "sequence"}
    assert set(report.causes) == {"in flight"}
    assert report.causes.total() > 20
    assert report.behind_seconds[1.0] > 0
    # One value is another, and one row is newer than the lake.
    name = f"titles_{SHORT}d"
    wrong = next(row for row in traffic.rows if row.attributes and name in row.attributes)
    odd = replace(wrong, attributes={**(wrong.attributes or {}), name: 999})
    newer = replace(wrong, row_id="newer", served_at=MIDNIGHT + 3 * HOUR)
    report = measure_skew(REGISTRY, [odd, newer], evidence)
    assert report.causes["wrong"] == report.attributes["watch", name].causes["wrong"] == 1
    assert sum(report.refused.values()) == 1
    assert "and the label is newer" in next(iter(report.refused))


def test_the_check_finds_a_wrong_value_and_the_sensor_tells_of_it_once(
    warehouse: Path, catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, traffic: Traffic
) -> None:
    put_events(catalog, REGISTRY, "view_events", traffic.views, until=MIDNIGHT + 2 * HOUR)
    put_events(catalog, REGISTRY, "content_interactions", traffic.touches, until=MIDNIGHT + 2 * HOUR)
    log = tmp_path / "served"
    log.mkdir()
    settings = Settings(
        iceberg_warehouse=warehouse.as_uri(), data_dir=tmp_path, served_log=f"files:{log}", schedules="on"
    )
    platform = Platform(settings)
    # What the engine would say of its spreads and of erased ids.
    spread = {domain.name: ((MIDNIGHT - 24 * HOUR, SPREAD),) for domain in REGISTRY.contract.domains.values()}
    monkeypatch.setattr(Platform, "spreads", lambda platform: spread)
    monkeypatch.setattr(Platform, "_erased_ids", lambda platform: lambda entity, id_: False)
    now = [MIDNIGHT + HOUR]
    made = dg.Definitions.merge(
        definitions.build(platform, clock=lambda: now[0]), dg.Definitions(executor=dg.in_process_executor)
    )
    (sensor,) = made.sensors or ()
    assert isinstance(sensor, dg.SensorDefinition)

    def checked(instance: dg.DagsterInstance) -> dict[str, dg.AssetCheckEvaluation]:
        result = made.resolve_job_def(definitions.JOB).execute_in_process(instance=instance)
        return {found.asset_key.path[-1]: found for found in result.get_asset_check_evaluations()}

    def told(instance: dg.DagsterInstance, cursor: str | None = None) -> tuple[dict[str, str], str]:
        result = sensor(dg.build_sensor_context(instance=instance, cursor=cursor))
        assert isinstance(result, dg.SensorResult)
        assert isinstance(result.skip_reason, dg.SkipReason)
        return json.loads(result.cursor or "{}"), str(result.skip_reason.skip_message)

    name = f"titles_{SHORT}d"
    rows = [row for row in traffic.rows[:40] if row.domain != "engagement#sequence"]
    with dg.DagsterInstance.ephemeral() as instance:
        assert told(instance)[0] == {}
        (log / "served-1.jsonl").write_bytes(b"".join(row.as_json() + b"\n" for row in rows))
        found = checked(instance)
        assert all(check.passed for check in found.values()), found
        assert found["sequence"].description == "nobody read this domain"
        assert told(instance)[0] == {}
        # One value is really another.
        place = next(number for number, row in enumerate(rows) if name in (row.attributes or {}))
        right = rows[place]
        rows[place] = replace(right, attributes={**(right.attributes or {}), name: 999})
        (log / "served-1.jsonl").write_bytes(b"".join(row.as_json() + b"\n" for row in rows))
        found = checked(instance)
        assert [name for name, check in found.items() if not check.passed] == ["watch"]
        assert f"are wrong: {name} in 1" in str(found["watch"].description)
        assert found["watch"].metadata["wrong"].value == 1
        levels, reason = told(instance)
        assert levels == {"skew/watch": "error"}
        assert "watch: error" in reason
        # Nothing new is told, and then the check is overdue everywhere.
        assert told(instance, json.dumps(levels))[0] == levels
        rows[place] = right
        (log / "served-1.jsonl").write_bytes(b"".join(row.as_json() + b"\n" for row in rows))
        checked(instance)
        assert told(instance, json.dumps(levels))[0] == {}
        now[0] = datetime.now(UTC) + 3 * 24 * HOUR
        assert set(told(instance)[0].values()) == {"warn"}
        # The log has stopped: all rows are older than what is compared.
        found = checked(instance)
        assert {check.severity for check in found.values()} == {dg.AssetCheckSeverity.WARN}
        assert "the served log has no row of the last 2 days" in str(found["watch"].description)
        log.rename(tmp_path / "gone")
        assert "skew is unknown" in str(checked(instance)["watch"].description)
        assert set(told(instance)[0].values()) == {"error"}


@pytest.mark.parametrize(
    ("late", "level"), [(0, "ok"), (9, "ok"), (10, "warn"), (99, "warn"), (100, "error")]
)
def test_too_many_values_beyond_the_target_are_told(late: int, level: str) -> None:
    report = SkewReport(rows=10_000)
    found = AttributeSkew("watch", "titles", compared=10_000, equal=10_000 - late)
    found.causes["beyond the target"] = late
    report.attributes["watch", "titles"] = found
    measure = measure_skew_of(DomainSkew.of(report, "watch"))
    assert (measure.level, measure.key) == (level, "skew/watch")
    assert ("later than the freshness target" in measure.reason) == (level != "ok")
    report.attributes.clear()
    report.refused["the lake is older"] = 7
    refused = measure_skew_of(DomainSkew.of(report, "watch"))
    assert (refused.level, refused.reason) == (
        "warn", "no logged value could be compared (7 rows: the lake is older)",
    )  # fmt: skip


def test_the_command_tells_and_exits_with_two_for_a_wrong_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, traffic: Traffic
) -> None:
    (tmp_path / "served-1.jsonl").write_bytes(b"".join(row.as_json() + b"\n" for row in traffic.rows[:8]))
    asked: list[list[Path]] = []

    def measured(values: Mapping[str, Any]) -> Any:
        def skew(platform: Platform, log: list[Path], **given: Any) -> SkewReport:
            asked.append(list(log))
            report = SkewReport(rows=len(list(read_log(log))), left_out={"watch.odd"})
            report.refused["the lake is older"] = 2
            return report if not values else _with_wrong(report)

        return skew

    def _with_wrong(report: SkewReport) -> SkewReport:
        found = AttributeSkew("watch", "titles", compared=4, equal=3)
        found.causes["wrong"] = 1
        report.attributes["watch", "titles"] = found
        return report

    monkeypatch.setattr(Platform, "skew", measured({}))
    clean = CliRunner().invoke(cli, ["skew", str(tmp_path)], standalone_mode=False)
    assert (clean.return_value, clean.exception) == (0, None)
    assert "8 rows, 0 of them repeated" in clean.output
    assert "2 rows cannot be answered: the lake is older" in clean.output
    assert "watch.odd is not computed by training sets" in clean.output
    monkeypatch.setattr(Platform, "skew", measured({"wrong": 1}))
    monkeypatch.setenv("PREFS_SERVED_LOG", f"files:{tmp_path}")
    told = CliRunner().invoke(cli, ["skew"], standalone_mode=False)
    assert told.return_value == 2
    assert "75.000%" in told.output
    assert asked[-1] == [tmp_path]
    monkeypatch.setenv("PREFS_SERVED_LOG", "firehose:stream")
    assert "name a folder of the log" in str(
        CliRunner().invoke(cli, ["skew"], standalone_mode=False).exception
    )
