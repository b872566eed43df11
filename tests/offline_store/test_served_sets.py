"""Training sets as served from the lake: values, refusals, the manifest, and the same rows again."""

from __future__ import annotations

import dataclasses
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sqlglot
from click.testing import CliRunner
from pyiceberg.catalog import Catalog
from shipped import LONG, WATCH, tile_row, with_computed_attributes

from dagster_prefs.cli import cli
from dagster_prefs.iceberg.catalog import TableMissing
from dagster_prefs.iceberg.event_tables import COMPLETE_FROM
from dagster_prefs.iceberg.tables import arrow_schema, ensure_table
from dagster_prefs.training.labels import LabelsRefused
from dagster_prefs.training.lake import EventsIncomplete, SnapshotExpired
from dagster_prefs.training.served_sql import ServedOptions, choose_served
from dagster_prefs.training.training_set import (
    LabelJoin,
    build_training_set,
    print_training_sql,
    reproduce_training_set,
)
from dagster_prefs.training.windows import collected

from .conftest import DAY
from .lake_world import put_events
from .served_oracle import Interaction, View, viewer_values, with_ids
from .training_world import write_labels

REGISTRY = with_computed_attributes()
FEATURES = choose_served(REGISTRY, "viewer")
NAMES = [feature.name for feature in FEATURES.values]
MIDNIGHT = datetime(DAY.year, DAY.month, DAY.day, tzinfo=UTC)
HOUR = timedelta(hours=1)
NOW = MIDNIGHT + timedelta(days=30)
SPREAD = 7_200

VIEWS = with_ids(
    View(viewer, at, at + late, genre=genre, watch_duration_sec=60 * (number + 1))
    for number, (viewer, at, late, genre) in enumerate(
        [
            (1, MIDNIGHT - timedelta(days=LONG), timedelta(), "drama"),
            (1, MIDNIGHT - 3 * HOUR, 4 * HOUR, "horror"),
            (1, MIDNIGHT + HOUR, timedelta(), "drama"),
            (2, MIDNIGHT - timedelta(days=2), timedelta(days=3), None),
            (2, MIDNIGHT + 20 * HOUR, -19 * HOUR, "drama"),
        ]
    )
)
INTERACTIONS = with_ids([Interaction(1, MIDNIGHT - HOUR, MIDNIGHT, "share")])
LABELS = [(viewer, MIDNIGHT + hours * HOUR) for viewer in (1, 2, 3) for hours in (-1, 0, 1, 2, 30)]
SPREADS = dict.fromkeys(FEATURES.domains, ((MIDNIGHT - HOUR, 0), (MIDNIGHT, SPREAD)))


def lake(catalog: Catalog, *, until: datetime = NOW) -> None:
    # A second delivery of an event, which counts from its first.
    again = dataclasses.replace(VIEWS[0], arrived_at=MIDNIGHT + 5 * HOUR, watch_duration_sec=999)
    put_events(catalog, REGISTRY, "view_events", [*VIEWS, again], until=until)
    put_events(catalog, REGISTRY, "content_interactions", INTERACTIONS, until=until)


def join_of(labels: str, **given: Any) -> LabelJoin:
    return LabelJoin(labels, FEATURES, NOW, **{"meaning": "served", "spreads": SPREADS, **given})


def due(*, happened: bool = False) -> list[dict[str, Any]]:
    found = [
        viewer_values(
            viewer, at, VIEWS, INTERACTIONS, spread=SPREAD if at >= MIDNIGHT else 0, happened=happened
        )
        for viewer, at in LABELS
    ]
    return [{name: row[name] for name in NAMES} for row in found]


def values(path: str) -> list[dict[str, Any]]:
    return [{name: row[name] for name in NAMES} for row in pq.read_table(path).to_pylist()]


def test_a_set_as_served_is_built_and_reproduced(catalog: Catalog, tmp_path: Path) -> None:
    lake(catalog)
    # A stored tile from before the late event: the events of that day decide.
    table = ensure_table(catalog, "training", WATCH)
    stale = tile_row(WATCH, viewer_id=1, watch_date=DAY - timedelta(days=1), views=7, last_event_at=MIDNIGHT)
    names = [column.name for column in WATCH.columns]
    table.append(pa.Table.from_pylist([dict(zip(names, stale, strict=True))], schema=arrow_schema(table)))
    labels = write_labels(tmp_path, LABELS)
    made = build_training_set(catalog, join_of(labels), tmp_path / "set.parquet", tag="model-7")
    assert values(made.output) == due()
    assert pq.read_table(made.output).column_names == ["label", "viewer_id", "label_time", *NAMES]
    known = json.loads(made.manifest.read_text())
    assert (known["meaning"], known["as_known"]) == ("served", False)
    assert known["watermarks"] == dict.fromkeys(("content_interactions", "view_events"), NOW.isoformat())
    assert known["spreads"]["watch"] == [
        [(MIDNIGHT - HOUR).isoformat(), 0], [MIDNIGHT.isoformat(), SPREAD],
    ]  # fmt: skip
    assert set(known["snapshots"]) == {"view_events", "content_interactions", "viewer_watch_daily"}
    assert known["days"] == {
        "first": (DAY - timedelta(days=LONG + 1)).isoformat(),
        "last": (DAY + timedelta(days=1)).isoformat(),
    }
    for name, snapshot in known["snapshots"].items():
        assert catalog.load_table(f"training.{name}").refs()["model-7"].snapshot_id == snapshot
    # What arrives later changes neither the state that the manifest names nor how far it was complete.
    later = with_ids([View(1, MIDNIGHT - HOUR, MIDNIGHT, watch_duration_sec=5000)])
    put_events(
        catalog, REGISTRY, "view_events", [dataclasses.replace(later[0], event_id="late")], until=NOW + HOUR
    )
    again = reproduce_training_set(catalog, made.manifest, tmp_path / "again.parquet", registry=REGISTRY)
    assert again.content_hash == made.content_hash
    assert values(again.output) == due()
    changed = build_training_set(catalog, join_of(labels), tmp_path / "changed.parquet")
    assert changed.content_hash != made.content_hash
    # An expired snapshot is named.
    events = catalog.load_table("training.view_events")
    events.manage_snapshots().remove_tag("model-7").commit()
    events.maintenance.expire_snapshots().by_ids([known["snapshots"]["view_events"]]).commit()
    with pytest.raises(SnapshotExpired, match=r"of training\.view_events has expired"):
        reproduce_training_set(catalog, made.manifest, tmp_path / "gone.parquet", registry=REGISTRY)


def test_as_happened_goes_by_the_events_own_time(catalog: Catalog, tmp_path: Path) -> None:
    lake(catalog)
    labels = write_labels(tmp_path, LABELS)
    made = build_training_set(catalog, join_of(labels, meaning="happened"), tmp_path / "set.parquet")
    assert values(made.output) == due(happened=True)
    assert due(happened=True) != due()
    assert json.loads(made.manifest.read_text())["meaning"] == "happened"
    again = reproduce_training_set(catalog, made.manifest, tmp_path / "again.parquet", registry=REGISTRY)
    assert again.content_hash == made.content_hash


def test_what_cannot_be_built_as_served_is_refused(catalog: Catalog, tmp_path: Path) -> None:
    labels = write_labels(tmp_path, LABELS)
    with pytest.raises(TableMissing, match="content_interactions"):
        build_training_set(catalog, join_of(labels), tmp_path / "set.parquet")
    put_events(catalog, REGISTRY, "content_interactions", INTERACTIONS)
    with pytest.raises(
        EventsIncomplete, match="does not say up to when it holds the events of content_inter"
    ):
        build_training_set(catalog, join_of(labels), tmp_path / "set.parquet")
    lake(catalog, until=MIDNIGHT + 2 * HOUR)
    with pytest.raises(
        LabelsRefused, match="3 of 15 labels cannot have a value as served, the first in row 5"
    ):
        build_training_set(catalog, join_of(labels), tmp_path / "set.parquet")
    with pytest.raises(LabelsRefused, match="--as-known adds nothing to --as served"):
        join_of(labels, as_known=True)
    with pytest.raises(LabelsRefused, match="--as-known contradicts --as happened"):
        join_of(labels, as_known=True, meaning="happened")
    assert not list(tmp_path.glob("set*"))


def test_history_refuses_the_labels_before_it_was_read(catalog: Catalog, tmp_path: Path) -> None:
    """Without a broker's timestamp, an event that arrived days after it happened may have arrived earlier."""
    history = View(1, MIDNIGHT - 3 * HOUR, MIDNIGHT + timedelta(days=9), event_id="old")
    put_events(catalog, REGISTRY, "view_events", [history], until=NOW, by_broker=False)
    put_events(catalog, REGISTRY, "content_interactions", [], until=NOW)
    times = [MIDNIGHT - timedelta(days=3), MIDNIGHT, MIDNIGHT + timedelta(days=9)]
    labels = write_labels(tmp_path, [(1, at) for at in times])
    with pytest.raises(
        LabelsRefused, match=r"1 of 3 labels cannot have a value as served, the first in row 2: .*history"
    ):
        build_training_set(catalog, join_of(labels), tmp_path / "set.parquet")
    labels = write_labels(tmp_path, [(1, times[0]), (1, times[2])])
    made = build_training_set(catalog, join_of(labels), tmp_path / "set.parquet")
    assert [row[f"watch_minutes_{LONG}d"] for row in values(made.output)] == [0, 1]
    # What retention removed, it says, and the manifest too.
    table = catalog.load_table("training.view_events")
    with table.transaction() as change:
        change.set_properties({COMPLETE_FROM: DAY.isoformat()})
    with pytest.raises(
        LabelsRefused, match=r"2 of 2 labels .* no longer holds what arrived in view_events before 2026"
    ):
        build_training_set(catalog, join_of(labels), tmp_path / "gone.parquet")
    again = reproduce_training_set(catalog, made.manifest, tmp_path / "again.parquet", registry=REGISTRY)
    assert again.content_hash == made.content_hash


def test_an_ordered_list_keeps_its_whole_order_in_spark() -> None:
    """Its aggregate has no order: a comparison sorts by each key, in its direction, with NULLs as in the engines."""
    query = sqlglot.parse_one("select array_agg(x order by t desc, e) from r", dialect="risingwave")
    (order,) = query.find_all(sqlglot.exp.Order)
    text = collected(order).sql(dialect="spark")
    assert "STRUCT(t AS k0, e AS k1, x AS value)" in text
    assert "WHEN b.k0 < a.k0 OR (NOT b.k0 IS NULL AND a.k0 IS NULL) THEN -1" in text
    assert "WHEN a.k1 < b.k1 OR (NOT a.k1 IS NULL AND b.k1 IS NULL) THEN -1" in text


@pytest.mark.parametrize("dialect", ["trino", "spark", "athena"])
def test_the_printed_join_as_served_parses(catalog: Catalog, tmp_path: Path, dialect: Any) -> None:
    catalog.create_namespace("ml")
    table = pq.read_table(write_labels(tmp_path, LABELS))
    catalog.create_table("ml.labels", table.schema).append(table)
    for meaning, known in (
        ("served", "arrived_at AS prefs_known"),
        ("happened", "watched_at AS prefs_known"),
    ):
        text = print_training_sql(
            catalog, "ml.labels", dialect, features=FEATURES, served=ServedOptions(meaning, SPREADS)
        )
        query = sqlglot.parse_one(text, dialect=dialect)
        assert query.named_selects[3:] == NAMES
        assert known in text
        assert "EPOCH" not in text.upper(), "only RisingWave, PostgreSQL and DuckDB extract it"
        assert "viewer_watch_daily" not in text, "all values are computed from events"
        assert {one.name for one in query.find_all(sqlglot.exp.Table) if one.db} == {
            "labels", "view_events", "content_interactions",
        }  # fmt: skip


def test_the_command_names_the_meaning(
    catalog: Catalog, warehouse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFS_ICEBERG_WAREHOUSE", warehouse.as_uri())
    monkeypatch.chdir(tmp_path)
    given = ["training-set", "--labels", "labels.csv", "--as", "served", "--as-known"]
    found = CliRunner().invoke(cli, given, standalone_mode=False)
    assert isinstance(found.exception, LabelsRefused)
    assert "--as-known adds nothing to --as served" in str(found.exception)
