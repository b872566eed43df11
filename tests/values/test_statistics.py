"""Statistics are what a plain computation of the same rows says, name nobody, and are kept once per day."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path
from statistics import mean, quantiles
from typing import Any

import pytest
from personal_data import marked
from prometheus_client import CollectorRegistry, generate_latest
from pyiceberg.catalog import Catalog
from shipped import GENRE, REGISTRY, WATCH
from tile_days import MONDAY, NAMESPACE, at, days_from, export, genre_rows, watch_rows

from dagster_prefs.declarations.registry import Registry
from dagster_prefs.freshness.drift import DriftMemo, DriftReadings, measure_drift
from dagster_prefs.freshness.levels import Measure
from dagster_prefs.freshness.values import ValueMetrics
from dagster_prefs.iceberg.catalog import OfflineError
from dagster_prefs.iceberg.files import day_files
from dagster_prefs.iceberg.maintenance import maintain_training_sets
from dagster_prefs.values import store
from dagster_prefs.values.collect import DaysNotDescribed, collect_tiles
from dagster_prefs.values.drift import Cause, causes, causes_on, judge
from dagster_prefs.values.statistics import BOUNDS, MIN_SUBJECTS, QUANTILES, Statistics
from dagster_prefs.values.store import (
    DAYS_KEPT,
    described_days,
    latest_statistics,
    read_statistics,
    write_statistics,
)

DAYS = days_from(MONDAY, 3)
TABLE = f"{NAMESPACE}.value_statistics"


@pytest.fixture
def described(empty_catalog: Catalog) -> Catalog:
    """Three days of two tables, described."""
    export(empty_catalog, WATCH, DAYS, watch_rows)
    export(empty_catalog, GENRE, DAYS, genre_rows)
    collect_tiles(empty_catalog, REGISTRY, NAMESPACE, now=at(DAYS[-1]))
    return empty_catalog


def snapshots(catalog: Catalog) -> int:
    return len(catalog.load_table(TABLE).snapshots())


def test_numbers_are_those_of_the_rows(described: Catalog) -> None:
    for day in DAYS:
        rows = watch_rows(day)
        found = {
            one.attribute: one
            for one in read_statistics(described, NAMESPACE, relation=WATCH.tile)
            if one.day == day
        }
        assert set(found) == set(WATCH.by_name) - {WATCH.day}
        for name in ("watch_seconds", "watch_time_minutes", "views", "completions"):
            values = [float(row[name]) for row in rows]
            one = found[name]
            assert (one.kind, one.rows, one.sampled, one.nulls) == ("number", len(rows), len(rows), 0)
            assert (one.minimum, one.maximum) == (min(values), max(values))
            assert one.mean == pytest.approx(mean(values))
            assert one.distinct == pytest.approx(len(set(values)), rel=0.1, abs=1)
            cuts = quantiles(values, n=100, method="inclusive")
            for share, value in one.quantiles_by_share.items():
                assert value == pytest.approx(cuts[round(share * 100) - 1], rel=0.15, abs=1), (name, share)
            assert sum(count for _, count in one.buckets) == len(rows)
            for bound, count in one.buckets:
                below = BOUNDS[BOUNDS.index(bound) - 1]
                assert count == sum(below < value <= bound for value in values)
        times = [row["last_event_at"].timestamp() for row in rows]
        newest = found["last_event_at"]
        assert (newest.kind, newest.minimum, newest.maximum) == ("time", min(times), max(times))


def test_texts_are_counted_and_name_nobody(empty_catalog: Catalog) -> None:
    def rows(day: date) -> list[dict[str, Any]]:
        made = genre_rows(day)
        # One viewer's own text, and one that too few share.
        made += [{**made[0], "viewer_id": 900_000, "genre": "the secret of viewer 900000"}]
        made += [
            {**made[0], "viewer_id": number, "genre": "rare"}
            for number in range(5000, 5000 + MIN_SUBJECTS - 2)
        ]
        return made

    export(empty_catalog, GENRE, DAYS[:1], rows)
    collect_tiles(empty_catalog, REGISTRY, NAMESPACE, now=at(DAYS[0]))
    found = latest_statistics(empty_catalog, NAMESPACE)[GENRE.tile]
    counted = Counter(row["genre"] for row in rows(DAYS[0]))
    named = {value: count for value, count in counted.items() if count >= MIN_SUBJECTS}
    assert dict(found["genre"].values) == named
    assert [count for _, count in found["genre"].values] == sorted(named.values(), reverse=True)
    assert found["genre"].distinct == len(counted)
    key = found["viewer_id"]
    assert key.kind == "personal"
    assert key.rows == len(rows(DAYS[0]))
    assert (key.minimum, key.maximum, key.quantiles, key.values, key.buckets) == (None, None, (), (), ())
    kept = repr(read_statistics(empty_catalog, NAMESPACE))
    assert "900000" not in kept
    assert "rare" not in kept


def test_what_is_made_from_a_personal_field_is_only_counted(empty_catalog: Catalog) -> None:
    registry = marked(REGISTRY, view_events__genre=True)
    export(empty_catalog, GENRE, DAYS[:1], genre_rows)
    # What was described before the declaration changed is described again.
    for declared in (REGISTRY, registry):
        collect_tiles(empty_catalog, declared, NAMESPACE, now=at(DAYS[0]))
    genre = latest_statistics(empty_catalog, NAMESPACE)[GENRE.tile]["genre"]
    assert (genre.kind, genre.values) == ("personal", ())


def test_a_day_is_described_once_and_again_when_it_changes(described: Catalog) -> None:
    now, before = at(DAYS[-1]), snapshots(described)
    again = collect_tiles(described, REGISTRY, NAMESPACE, now=now)
    assert (again.described, again.gone, snapshots(described)) == ((), (), before)
    export(described, WATCH, DAYS[1:2], lambda day: watch_rows(day, viewers=100))
    again = collect_tiles(described, REGISTRY, NAMESPACE, now=now)
    assert again.described == ((WATCH.tile, DAYS[1]),)
    found = {one.day: one.rows for one in read_statistics(described, NAMESPACE, relation=WATCH.tile)}
    assert found[DAYS[1]] == len(watch_rows(DAYS[1], viewers=100))
    assert found[DAYS[0]] == len(watch_rows(DAYS[0]))
    table = described.load_table(WATCH.identifier(NAMESPACE))
    table.delete(f"{WATCH.day} = '{DAYS[2]}'")
    assert collect_tiles(described, REGISTRY, NAMESPACE, now=now).gone == ((WATCH.tile, DAYS[2]),)
    assert (WATCH.tile, DAYS[2]) not in described_days(described, NAMESPACE)


def test_today_is_not_complete(described: Catalog) -> None:
    today = DAYS[-1] + timedelta(days=1)
    export(described, WATCH, [today], watch_rows)
    assert collect_tiles(described, REGISTRY, NAMESPACE, now=at(DAYS[-1])).described == ()


def test_writers_at_once_lose_nothing(described: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    found = read_statistics(described, NAMESPACE)
    mine, theirs = (replace(found[0], relation=name) for name in ("mine", "theirs"))
    real = store.replace_all

    def overtaken(*given: Any, **options: Any) -> None:
        monkeypatch.setattr(store, "replace_all", real)
        write_statistics(described, NAMESPACE, [theirs])
        real(*given, **options)

    monkeypatch.setattr(store, "replace_all", overtaken)
    write_statistics(described, NAMESPACE, [mine])
    names = {one.relation for one in read_statistics(described, NAMESPACE)}
    assert names == {WATCH.tile, GENRE.tile, "mine", "theirs"}


def test_old_days_and_old_snapshots_leave(described: Catalog) -> None:
    (first, *_) = read_statistics(described, NAMESPACE)
    write_statistics(described, NAMESPACE, [replace(first, day=DAYS[0] + timedelta(days=DAYS_KEPT + 1))])
    assert DAYS[0] not in {one.day for one in read_statistics(described, NAMESPACE)}
    assert snapshots(described) > 1
    far = at(DAYS[-1]) + timedelta(days=3650)
    maintain_training_sets(described, now=far, keep_snapshots=timedelta(0))
    assert snapshots(described) == 1
    assert read_statistics(described, NAMESPACE, since=DAYS[1])


def test_the_newest_statistics_are_metrics(described: Catalog) -> None:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(ValueMetrics(lambda: latest_statistics(described, NAMESPACE)))
    text = generate_latest(registry).decode()
    rows = len(watch_rows(DAYS[-1]))
    assert f'prefs_values_rows{{attribute="views",relation="{WATCH.tile}"}} {float(rows)}' in text
    assert f'prefs_values_quantile{{attribute="views",quantile="0.5",relation="{WATCH.tile}"}}' in text
    assert text.count('quantile="') == len(QUANTILES) * text.count("prefs_values_mean{")


def test_late_statistics_warn(described: Catalog) -> None:
    found = judge(REGISTRY.tiles[WATCH.tile], DAYS[-1], read_statistics(described, NAMESPACE))
    assert found is not None
    grouped = causes(REGISTRY, [found])
    (fresh,) = measure_drift(grouped, today=DAYS[-1] + timedelta(days=1))
    assert (fresh.key, fresh.level) == ("drift/view_events", "skipped")
    (late,) = measure_drift(grouped, today=DAYS[-1] + timedelta(days=5))
    assert late.level == "warn"
    assert "prefs statistics --collect" in late.reason


def test_drift_is_judged_again_only_when_something_changed(described: Catalog, tmp_path: Path) -> None:
    judged: list[date] = []

    def read() -> list[Cause]:
        judged.append(DAYS[-1])
        return causes_on(described, REGISTRY, NAMESPACE)

    def measures(day: date = DAYS[-1], registry: Registry = REGISTRY) -> list[Measure]:
        memo = DriftMemo(tmp_path / "seen.json", tmp_path / "lake" / "catalog.db", NAMESPACE)
        # Each as a process of its own.
        return DriftReadings(read, lambda: registry, memo)(at(day))

    first = measures()
    assert [(one.key, one.level) for one in first] == [("drift/view_events", "skipped")]
    assert (measures(), len(judged)) == (first, 1)
    (late,) = measures(DAYS[-1] + timedelta(days=5))
    assert (late.level, len(judged)) == ("warn", 2), "another day"
    changed = replace(REGISTRY, hashes={**REGISTRY.hashes, "models/x.yml": "0"})
    assert (measures(registry=changed), len(judged)) == (first, 3), "other limits"
    write_statistics(described, NAMESPACE, [], gone=[(WATCH.tile, DAYS[0])])
    measures()
    assert len(judged) == 4, "other statistics"
    nothing = DriftMemo(tmp_path / "seen.json", tmp_path / "catalog.db", NAMESPACE)
    assert DriftReadings(read, lambda: REGISTRY, nothing)(at(DAYS[-1])) == []
    assert len(judged) == 4, "without statistics nothing is loaded"


def test_the_foreign_project_has_statistics(empty_catalog: Catalog, courses: Registry) -> None:
    from tile_days import lesson_rows

    from dagster_prefs.iceberg.tables import tile_tables

    (spec,) = tile_tables(courses).values()
    export(empty_catalog, spec, DAYS, lesson_rows)
    collect_tiles(empty_catalog, courses, NAMESPACE, now=at(DAYS[-1]))
    found: dict[str, Statistics] = latest_statistics(empty_catalog, NAMESPACE)[spec.tile]
    assert found["learner_id"].kind == "personal"
    assert found["seconds"].maximum == max(row["seconds"] for row in lesson_rows(DAYS[-1]))
    assert "learner-" not in repr(read_statistics(empty_catalog, NAMESPACE))


def test_a_damaged_day_prevents_no_other(empty_catalog: Catalog, tmp_path: Path) -> None:
    export(empty_catalog, WATCH, DAYS, watch_rows)
    export(empty_catalog, GENRE, DAYS[:1], genre_rows)
    (file,) = day_files(empty_catalog.load_table(WATCH.identifier(NAMESPACE)), WATCH, DAYS[1])
    damaged = Path(file.path.removeprefix("file://"))
    damaged.write_bytes(damaged.read_bytes()[:500])
    with pytest.raises(
        DaysNotDescribed, match=f"1 days .*{WATCH.tile} of {DAYS[1]}: .* is damaged"
    ) as caught:
        collect_tiles(empty_catalog, REGISTRY, NAMESPACE, now=at(DAYS[-1]))
    assert isinstance(caught.value, OfflineError)
    assert described_days(empty_catalog, NAMESPACE).keys() == {
        (WATCH.tile, DAYS[0]),
        (WATCH.tile, DAYS[2]),
        (GENRE.tile, DAYS[0]),
    }
    # Exported again it is described.
    export(empty_catalog, WATCH, DAYS[1:2], watch_rows)
    again = collect_tiles(empty_catalog, REGISTRY, NAMESPACE, now=at(DAYS[-1]))
    assert again.described == ((WATCH.tile, DAYS[1]),)
