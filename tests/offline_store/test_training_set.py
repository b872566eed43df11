from __future__ import annotations

import csv
import errno
import json
import os
import stat
import tempfile
import time
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sqlglot
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyiceberg.catalog import Catalog
from shipped import GENRE, INTERACTIONS, LONG, SHORT, TILE_TABLES, WATCH

from dagster_prefs.iceberg import replace as replace_module
from dagster_prefs.iceberg.catalog import (
    CatalogCorrupted,
    OfflineError,
    StorageFull,
    TableMissing,
    open_catalog,
)
from dagster_prefs.iceberg.export import export_day
from dagster_prefs.iceberg.maintenance import maintain
from dagster_prefs.iceberg.tables import TileTable, ensure_table
from dagster_prefs.training.labels import LabelsRefused, read_labels
from dagster_prefs.training.outputs import OutputRefused
from dagster_prefs.training.training_set import (
    CsvOptions,
    LabelJoin,
    NotReproducible,
    SnapshotExpired,
    TagTaken,
    build_training_set,
    print_training_sql,
    reproduce_training_set,
)
from dagster_prefs.training.windows import Dialect

from . import oracle
from .conftest import DAY, Tiles, genre, interactions, watch
from .training_world import FEATURES, NOW, REGISTRY, at, build, fill, write_labels

NAMES = [feature.name for feature in FEATURES.values]


days = st.integers(0, 40).map(lambda number: DAY + timedelta(days=number))
viewers = st.integers(0, 3)


def unique(rows: list[tuple[Any, ...]], key: int) -> list[tuple[Any, ...]]:
    return list({row[:key]: row for row in rows}.values())


@st.composite
def histories(draw: st.DrawFn) -> dict[str, list[tuple[Any, ...]]]:
    seconds = st.integers(0, 100_000)
    small = st.integers(0, 9)
    watched = st.builds(watch, viewers, days, seconds, small, small, small, small)
    by_genre = st.builds(
        genre, viewers, days, st.sampled_from("abcdefgZé"), seconds, st.integers(0, 7), small
    )
    reacted = st.builds(interactions, viewers, days, small, small, small)
    return {
        WATCH.name: unique(draw(st.lists(watched, max_size=40)), 2),
        GENRE.name: unique(draw(st.lists(by_genre, max_size=60)), 3),
        INTERACTIONS.name: unique(draw(st.lists(reacted, max_size=30)), 2),
    }


label_lists = st.lists(
    st.tuples(viewers, st.builds(at, days, st.sampled_from([0.0, 0.0001, 12.0, 23.9999]))),
    min_size=1,
    max_size=25,
)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(rows=histories(), labels=label_lists)
def test_every_value_equals_the_oracles(
    rows: dict[str, list[tuple[Any, ...]]], labels: list[tuple[int, datetime]]
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        catalog = open_catalog("sqlite", str(folder / "warehouse"))
        fill(catalog, rows)
        made, found = build(catalog, write_labels(folder, labels), folder)
        expected = [
            oracle.features(*label, *(rows[spec.name] for spec in (WATCH, GENRE, INTERACTIONS)))
            for label in labels
        ]
        assert [{name: row[name] for name in NAMES} for row in found] == expected
        assert [(row["label"], row["viewer_id"], row["label_time"]) for row in found] == [
            (number, *label) for number, label in enumerate(labels)
        ]
        nobody = oracle.features(-1, NOW, [], [], [])
        assert made.cold_start_rows == sum(row == nobody for row in expected)
        again = reproduce_training_set(catalog, made.manifest, folder / "again.parquet", registry=REGISTRY)
        assert again.content_hash == made.content_hash
        assert pq.read_table(again.output).equals(pq.read_table(made.output))


def test_the_future_changes_nothing(catalog: Catalog, tmp_path: Path) -> None:
    past = {
        WATCH.name: [watch(1, DAY - timedelta(days=1), 600)],
        GENRE.name: [genre(1, DAY - timedelta(days=LONG), "drama", 60)],
        INTERACTIONS.name: [interactions(1, DAY - timedelta(days=SHORT), 1, 2, 3)],
    }
    fill(catalog, past)
    labels = write_labels(tmp_path, [(1, at(DAY, 0)), (1, at(DAY, 23.9))])
    first, before = build(catalog, labels, tmp_path)
    fill(
        catalog,
        {
            WATCH.name: [watch(1, DAY, 7777), watch(1, DAY + timedelta(days=3), 8888)],
            GENRE.name: [
                genre(1, DAY, "horror", 99_999),
                genre(1, DAY - timedelta(days=LONG + 1), "horror", 99_999),
            ],
            INTERACTIONS.name: [interactions(1, DAY, 50, 50, 50)],
        },
    )
    second, after = build(catalog, labels, tmp_path)
    assert after == before
    assert second.content_hash == first.content_hash
    assert second.snapshots != first.snapshots
    # The same event one day earlier is no longer the future, and is seen.
    fill(catalog, {INTERACTIONS.name: [interactions(1, DAY - timedelta(days=1), 5, 0, 0)]})
    _, seen = build(catalog, labels, tmp_path)
    assert [row[f"likes_{LONG}d"] for row in seen] == [6, 6]


def wait_for_next_millisecond() -> datetime:
    """A moment strictly after every commit so far; the catalog's clock counts in milliseconds."""
    start = time.time_ns() // 1_000_000
    while time.time_ns() // 1_000_000 <= start + 1:
        pass
    return datetime.now(UTC)


def test_as_known_sees_the_version_of_the_labels_time(tiles: Tiles, catalog: Catalog, tmp_path: Path) -> None:
    today = datetime.now(UTC).date()
    yesterday = today - timedelta(days=1)
    for spec in (GENRE, INTERACTIONS):
        ensure_table(catalog, "training", spec)
    before = wait_for_next_millisecond()
    tiles.add(WATCH, [watch(1, yesterday, 600)])
    export_day(tiles.engine, catalog, WATCH, yesterday)
    between = wait_for_next_millisecond()
    tiles.replace(WATCH, yesterday, [watch(1, yesterday, 6000)])
    export_day(tiles.engine, catalog, WATCH, yesterday)
    after = wait_for_next_millisecond()
    labels = write_labels(tmp_path, [(1, before), (1, between), (1, after)])
    now = after + timedelta(seconds=1)
    _, plain = build(catalog, labels, tmp_path, now=now)
    assert [row[f"watch_minutes_{SHORT}d"] for row in plain] == [100, 100, 100]
    made, known = build(catalog, labels, tmp_path, now=now, as_known=True)
    assert [row[f"watch_minutes_{SHORT}d"] for row in known] == [0, 10, 100]

    # What is exported afterwards does not change what was known.
    tiles.replace(WATCH, yesterday, [watch(1, yesterday, 60_000)])
    export_day(tiles.engine, catalog, WATCH, yesterday)
    again = reproduce_training_set(catalog, made.manifest, tmp_path / "again.parquet", registry=REGISTRY)
    assert pq.read_table(again.output).to_pylist() == known


def expire_all_but_current(catalog: Catalog, spec: TileTable) -> None:
    table = catalog.load_table(("training", spec.name))
    current = table.current_snapshot()
    assert current is not None
    old = [
        snapshot.snapshot_id for snapshot in table.snapshots() if snapshot.snapshot_id != current.snapshot_id
    ]
    table.maintenance.expire_snapshots().by_ids(old).commit()


def test_expired_snapshots_are_named(catalog: Catalog, tmp_path: Path) -> None:
    fill(catalog, {WATCH.name: [watch(1, DAY, 600)]})
    labels = write_labels(tmp_path, [(1, at(DAY + timedelta(days=1)))])
    made, _ = build(catalog, labels, tmp_path)
    fill(catalog, {WATCH.name: [watch(2, DAY, 600)]})
    expire_all_but_current(catalog, WATCH)
    with pytest.raises(
        SnapshotExpired, match=rf"{made.snapshots[WATCH.name]} of training\.viewer_watch_daily has expired"
    ):
        reproduce_training_set(catalog, made.manifest, tmp_path / "again.parquet", registry=REGISTRY)
    with pytest.raises(SnapshotExpired, match="older snapshots have expired"):
        build(catalog, labels, tmp_path, as_known=True)
    assert not (tmp_path / "again.parquet").exists()


def test_a_tagged_set_outlives_upkeep(catalog: Catalog, tmp_path: Path) -> None:
    fill(catalog, {WATCH.name: [watch(1, DAY, 600)]})
    labels = write_labels(tmp_path, [(1, at(DAY + timedelta(days=1)))])
    made, before = build(catalog, labels, tmp_path, tag="model-7")
    assert build(catalog, labels, tmp_path, tag="model-7")[1] == before
    fill(catalog, {WATCH.name: [watch(2, DAY, 600)]})
    with pytest.raises(TagTaken, match=rf"has model-7 for snapshot {made.snapshots[WATCH.name]} already"):
        build(catalog, labels, tmp_path, tag="model-7")
    with pytest.raises(TagTaken, match="has main for snapshot"):
        build(catalog, labels, tmp_path, tag="main")
    maintain(catalog, WATCH, now=datetime.now(UTC) + timedelta(days=60), keep_snapshots=timedelta(days=30))
    again = reproduce_training_set(catalog, made.manifest, tmp_path / "again.parquet", registry=REGISTRY)
    assert pq.read_table(again.output).to_pylist() == before


def test_a_manifest_that_does_not_fit_is_refused(catalog: Catalog, tmp_path: Path) -> None:
    fill(catalog, {WATCH.name: [watch(1, DAY, 600)]})
    labels = write_labels(tmp_path, [(1, at(DAY + timedelta(days=1)))])
    made, _ = build(catalog, labels, tmp_path)
    known = json.loads(made.manifest.read_text())
    assert known["snapshots"] == dict(made.snapshots)
    assert known["contract_version"] == REGISTRY.contract.version
    write_labels(tmp_path, [(2, at(DAY))])
    again = tmp_path / "again.parquet"
    with pytest.raises(NotReproducible, match="no longer contains the labels"):
        reproduce_training_set(catalog, made.manifest, again, registry=REGISTRY)
    write_labels(tmp_path, [(1, at(DAY + timedelta(days=1)))])
    made.manifest.write_text(json.dumps(known | {"output": known["output"] | {"fingerprint": "0"}}))
    with pytest.raises(NotReproducible, match="rows differ"):
        reproduce_training_set(catalog, made.manifest, again, registry=REGISTRY)
    made.manifest.write_text(json.dumps(known | {"definition": "0"}))
    with pytest.raises(NotReproducible, match="another definition"):
        reproduce_training_set(catalog, made.manifest, again, registry=REGISTRY)
    made.manifest.write_text("{")
    with pytest.raises(NotReproducible, match="is not the manifest"):
        reproduce_training_set(catalog, made.manifest, again, registry=REGISTRY)
    assert not again.exists()


def test_zones_are_explicit(catalog: Catalog, tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_text(
        "viewer_id,label_time,name\n"
        '1,2026-03-10T23:30:00Z,"a, b"\n'
        "1,2026-03-11T00:30:00+01:00,c\n"
        "1,2026-03-10 23:30:00.5 UTC,d\n"
        "1,2026-03-10 18:30:00 -0500,e\n"
    )
    table = read_labels(catalog, str(path), features=FEATURES, now=NOW)
    moment = datetime(2026, 3, 10, 23, 30, tzinfo=UTC)
    assert table["label_time"].to_pylist() == [moment, moment, moment + timedelta(seconds=0.5), moment]
    path.write_text("viewer_id,label_time\n1,2026-03-10T23:30:00Z\n1,2026-03-11T00:30:00\n")
    with pytest.raises(LabelsRefused, match=r"row 2: label_time 2026-03-11T00:30:00 has no zone"):
        read_labels(catalog, str(path), features=FEATURES, now=NOW)
    table = read_labels(catalog, str(path), features=FEATURES, now=NOW, timezone="Europe/Berlin")
    assert table["label_time"].to_pylist() == [moment, moment]
    naive = pa.table(
        {"viewer_id": [1], "label_time": pa.array([datetime(2026, 3, 11, 0, 30)], pa.timestamp("us"))}
    )
    pq.write_table(naive, tmp_path / "naive.parquet")
    with pytest.raises(LabelsRefused, match="has no zone"):
        read_labels(catalog, str(tmp_path / "naive.parquet"), features=FEATURES, now=NOW)
    found = read_labels(
        catalog, str(tmp_path / "naive.parquet"), features=FEATURES, now=NOW, timezone="Europe/Berlin"
    )
    assert found["label_time"].to_pylist() == [moment]
    with pytest.raises(LabelsRefused, match=r"Mars.*: write it with an offset, or name another zone"):
        read_labels(catalog, str(path), features=FEATURES, now=NOW, timezone="Mars/Olympus")
    # A time that the clock skipped, and one that it showed twice.
    for local in ("2026-03-29T02:30:00", "2025-10-26T02:30:00"):
        path.write_text(f"viewer_id,label_time\n1,{local}\n")
        with pytest.raises(LabelsRefused, match=r"in the zone Europe/Berlin \(.*\): write it with an offset"):
            read_labels(catalog, str(path), features=FEATURES, now=NOW, timezone="Europe/Berlin")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("viewer,label_time\n1,2026-03-10T00:00:00Z\n", "no column viewer_id .*rename viewer"),
        ("viewer_id,when\n1,2026-03-10T00:00:00Z\n", "no column label_time"),
        ("viewer_id,label_time\n", "has no rows"),
        ("", "cannot be read as csv"),
        ("viewer_id,label_time\n1,2026-03-10T00:00Z\n1,2026-06-01T00:00:01Z\n", "row 2: .* is in the future"),
        ("viewer_id,label_time\n1,yesterday:00Z\n", "must be ISO 8601"),
        ("viewer_id,label_time\n1,2026-03-10\n", "has no zone"),
        ("viewer_id,label_time\n1,\n", "row 1: label_time is missing|must be ISO 8601|has no zone"),
        ("viewer_id,label_time\n,2026-03-10T00:00:00Z\n", "row 1: viewer_id is missing"),
        ("viewer_id,label_time\n1.5,2026-03-10T00:00:00Z\n", "must be an integer .*: correct it"),
        ("viewer_id,label_time\nx,2026-03-10T00:00:00Z\n", "must be an integer .*: correct it"),
        ("viewer_id,label_time\n2026-03-10,2026-03-10T00:00:00Z\n", "must be an integer .*'2026-03-10': correct it"),
        ("viewer_id,label_time\n1,2026-03-10T00:00Z\n1,2026-03-10T00:00Z,x\n", r"row 2 \(line 3\): .*number of cells"),
        ('viewer_id,label_time,a\n1,2026-03-10T00:00Z,"x\n1,2026-03-10T00:00Z,y\n', r"row 1 .* unclosed quote"),
        (b"viewer_id,label_time,a\n1,2026-03-10T00:00Z,caf\xe9\n", r"row 1 \(line 2\): CSV row that is not UTF-8"),
        ("viewer_id,label_time\n1,2026-03-10T00:00Z\n".encode("utf-16"), "is UTF-16 text: give CSV in UTF-8"),
        ("viewer_id,label_time\n-1,2026-03-10T00:00:00Z\n", "row 1: viewer ids below 0"),
        (f"viewer_id,label_time,likes_{LONG}d\n1,2026-03-10T00:00:00Z,1\n", f"likes_{LONG}d, which is the name of a"),
        ("viewer_id,label_time,a,a\n1,2026-03-10T00:00:00Z,1,2\n", "column a twice"),
        ("viewer_id,label_time,point\n1,2026-03-10T00:00:00Z,1\n", "column point, which is reserved"),
    ],
)  # fmt: skip
def test_labels_that_cannot_be_used(
    catalog: Catalog, tmp_path: Path, text: str | bytes, expected: str
) -> None:
    fill(catalog, {})
    path = tmp_path / "labels.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(OfflineError, match=expected):
        build(catalog, str(path), tmp_path)
    assert not (tmp_path / "set.parquet").exists()


def test_cells_are_text_as_they_stand(catalog: Catalog, tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"labels-\xe9.csv")
    path.write_bytes(
        b"\xef\xbb\xbfviewer_id,label_time,content_id,postal,country,note\r\n"
        b'42.0,2026-03-10T00:00:00Z,007,01234,NA,"two\nlines, ""quoted"""\r\n'
        b"\r\n"
        b' 7 ,2026-03-10T00:00:00Z,1e3,NULL, nan ,""\r\n'
        b"1.2345e4,2026-03-10T00:00:00Z,,,true,2026-01-01\r\n"
    )
    table = read_labels(catalog, str(path), features=FEATURES, now=NOW)
    assert table.schema.field("viewer_id").type == pa.int64()
    assert [tuple(row.values())[2:] for row in table.to_pylist()] == [
        ("007", "01234", "NA", 'two\nlines, "quoted"'),
        ("1e3", "NULL", " nan ", None),
        (None, None, "true", "2026-01-01"),
    ]
    assert table["viewer_id"].to_pylist() == [42, 7, 12345]


def test_a_column_has_the_type_that_is_given_for_it(catalog: Catalog, tmp_path: Path) -> None:
    fill(catalog, {WATCH.name: [watch(1, DAY, 600)]})
    path = tmp_path / "labels.csv"
    path.write_text(
        "viewer_id,label_time,bought,stars,price,share,day,at,postal\n"
        f"1,{at(DAY).isoformat()},true,-3,12.50,0.25,2026-01-02,2026-01-02T03:04:05+01:00,01234\n"
        f"1,{at(DAY).isoformat()},0,,,,,,\n"
    )
    types = {
        "bought": "bool", "stars": "int", "price": "decimal(6,2)", "share": "float", "day": "date",
        "at": "timestamp", "postal": "text",
    }  # fmt: skip
    made, (first, second) = build(catalog, str(path), tmp_path, csv=CsvOptions(types))
    assert [first[name] for name in types] == [
        True, -3, Decimal("12.50"), 0.25, date(2026, 1, 2), datetime(2026, 1, 2, 2, 4, 5, tzinfo=UTC), "01234",
    ]  # fmt: skip
    assert [second[name] for name in types] == [False, None, None, None, None, None, None]
    again = reproduce_training_set(catalog, made.manifest, tmp_path / "again.parquet", registry=REGISTRY)
    assert again.content_hash == made.content_hash
    known = json.loads(made.manifest.read_text())
    assert known["labels"].pop("types") == types
    made.manifest.write_text(json.dumps(known))
    with pytest.raises(NotReproducible, match=r"guessed what the cells .*: install that version, or"):
        reproduce_training_set(catalog, made.manifest, tmp_path / "again.parquet", registry=REGISTRY)


@pytest.mark.parametrize(
    ("types", "expected"),
    [
        ({"a": "int"}, r"row 2: a is 'NA', which is not of type int64: correct it, leave it empty"),
        ({"a": "number"}, "column a cannot be of type 'number': types are text, int"),
        ({"a": "int(3,4)"}, "cannot be of type"),
        ({"a": "decimal(77,2)"}, "cannot be of type"),
        ({"b": "int"}, "the type of b cannot be given: .* has the columns a"),
        ({"viewer_id": "text"}, "the type of viewer_id cannot be given"),
    ],
)
def test_types_that_do_not_fit(
    catalog: Catalog, tmp_path: Path, types: dict[str, str], expected: str
) -> None:
    path = tmp_path / "labels.csv"
    path.write_text("viewer_id,label_time,a\n1,2026-03-10T00:00Z,1\n2,2026-03-10T00:00Z,NA\n")
    with pytest.raises(LabelsRefused, match=expected):
        read_labels(catalog, str(path), features=FEATURES, now=NOW, types=types)
    with pytest.raises(LabelsRefused, match=r"has its own types|cannot be of type"):
        read_labels(catalog, write_labels(tmp_path, [(1, at(DAY))]), features=FEATURES, now=NOW, types=types)


@pytest.mark.parametrize(
    ("viewers", "expected"),
    [
        (["1", "9007199254740993.0"], "row 2: viewer_id 9007199254740993.0 is a float beyond 2\\^53"),
        (["1", "9.007199254740992e15"], "row 2: viewer_id 9.007199254740992e15 is a float beyond 2\\^53"),
        (["1", "9223372036854775808"], "row 2: viewer_id must be an integer of 64 bits, it is '9223372036854775808'"),
        (["7", "0x10"], "row 2: viewer_id must be an integer of 64 bits, it is '0x10'"),
        (["7", "1.5"], "row 2: viewer_id must be an integer of 64 bits, it is '1.5'"),
        (["7", "nan"], "row 2: viewer_id must be an integer"),
        (["7", "inf"], "row 2: viewer_id must be an integer"),
        ([1.0, 2.0**53], "row 2: viewer_id 9007199254740992.0 is a float beyond 2\\^53"),
        ([1.0, 1.5], "row 2: viewer_id must be an integer of 64 bits, it is 1.5"),
        ([1.0, float("nan")], "row 2: viewer_id is missing"),
        ([1.0, float("inf")], "row 2: viewer_id inf is a float beyond 2\\^53"),
        (pa.array([1, 2**63], pa.uint64()), "row 2: .* must be an integer of 64 bits, it is 9223372036854775808"),
        (pa.array([True]), "must be an integer, not bool: convert it"),
    ],
)  # fmt: skip
def test_viewers_that_could_be_others_are_refused(
    catalog: Catalog, tmp_path: Path, viewers: Any, expected: str
) -> None:
    times = pa.array([at(DAY)] * len(viewers), pa.timestamp("us", "UTC"))
    pq.write_table(pa.table({"viewer_id": viewers, "label_time": times}), tmp_path / "labels.parquet")
    with pytest.raises(LabelsRefused, match=expected):
        read_labels(catalog, str(tmp_path / "labels.parquet"), features=FEATURES, now=NOW)


@pytest.mark.parametrize(
    "viewers",
    [
        [-0.0, 2.0**53 - 1],
        pa.array(["-0", "9007199254740991.0"]),
        pa.array(["0", "9007199254740991.00"]).dictionary_encode(),
        pa.array([Decimal("0.00"), Decimal("9007199254740991.00")]),
        pa.array(["0", "9007199254740991"]),
    ],
)
def test_viewers_that_are_exact_are_read_whatever_their_type(
    catalog: Catalog, tmp_path: Path, viewers: Any
) -> None:
    times = pa.array([at(DAY)] * 2, pa.timestamp("us", "UTC"))
    pq.write_table(pa.table({"viewer_id": viewers, "label_time": times}), tmp_path / "labels.parquet")
    table = read_labels(catalog, str(tmp_path / "labels.parquet"), features=FEATURES, now=NOW)
    assert table["viewer_id"].to_pylist() == [0, 2**53 - 1]


def test_parquet_labels_keep_their_types(catalog: Catalog, tmp_path: Path) -> None:
    columns = {
        "viewer_id": pa.array([1]),
        "label_time": pa.array([at(DAY)], pa.timestamp("us", "UTC")),
        "text": ["007"], "list": [["a", "b"]], "struct": [{"a": "b", "c": 1}], "number": [0.5],
        "map": pa.array([[("k", "v")]], pa.map_(pa.string(), pa.string())), "nothing": pa.nulls(1),
        "category": pa.array(["x"]).dictionary_encode(),
    }  # fmt: skip
    given = pa.table(columns)
    pq.write_table(given, tmp_path / "labels.parquet")
    found = read_labels(catalog, str(tmp_path / "labels.parquet"), features=FEATURES, now=NOW)
    assert [field.type for field in found.schema] == [field.type for field in given.schema]
    assert found.to_pylist() == given.to_pylist()


def test_labels_that_cannot_be_read(catalog: Catalog, tmp_path: Path) -> None:
    fill(catalog, {})
    content = Path(write_labels(tmp_path, [(1, at(DAY))])).read_bytes()
    for name, damaged in (
        ("half.parquet", content[: len(content) // 2]),
        ("empty.parquet", b""),
        ("bad.csv", b"\xff,\n1"),
    ):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(LabelsRefused, match=rf"{name} (cannot be read as|has no column viewer_id)"):
            build(catalog, str(tmp_path / name), tmp_path)
    assert not (tmp_path / "set.parquet").exists()


@pytest.mark.parametrize(
    ("values", "output", "expected"),
    [
        (
            pa.array([timedelta(1)]),
            "set.parquet",
            "has the column extra of type duration.*: write it as a number",
        ),
        (
            pa.array([b"a"]),
            "set.csv",
            "column extra is BLOB, which CSV cannot represent: convert it, or write a Parquet",
        ),
        (pa.array([{"a": 1}]), "set.csv", "column extra is STRUCT.*, which CSV cannot represent"),
        (
            pa.array([2**63 + 1], pa.uint64()),
            "ml.set",
            "ml.set cannot hold every column of the labels .*convert that",
        ),
        (
            pa.array([at(DAY)], pa.timestamp("ns")),
            "ml.set",
            "ml.set cannot hold .*'extra' .*: convert that column, or",
        ),
        (pa.nulls(1), "ml.set", "the table ml.set cannot be created .*extra.*: convert that column"),
    ],
)
def test_columns_that_an_output_has_no_equal_of(
    catalog: Catalog, tmp_path: Path, warehouse: Path, values: pa.Array, output: str, expected: str
) -> None:
    fill(catalog, {})
    when = pa.array([at(DAY)], pa.timestamp("us", "UTC"))
    pq.write_table(
        pa.table({"viewer_id": [1], "label_time": when, "extra": values}), tmp_path / "labels.parquet"
    )
    to = output if output.startswith("ml.") else str(tmp_path / output)
    with pytest.raises(OfflineError, match=expected):
        build_training_set(
            catalog,
            LabelJoin(str(tmp_path / "labels.parquet"), FEATURES, NOW),
            to,
            manifest=tmp_path / "m.json",
        )
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == {"labels.parquet"}
    assert list(warehouse.rglob("*.parquet")) == []


@pytest.mark.parametrize("source", ["nowhere.parquet", "nowhere.csv", "labels.txt", "training.nothing"])
def test_labels_that_are_not_there(catalog: Catalog, source: str) -> None:
    with pytest.raises(OfflineError, match=r"does not exist|is neither"):
        read_labels(catalog, source, features=FEATURES, now=NOW)


def test_labels_in_an_iceberg_table(catalog: Catalog, tmp_path: Path) -> None:
    fill(catalog, {WATCH.name: [watch(1, DAY, 600)]})
    rows = pa.table(
        {"viewer_id": [1], "label_time": pa.array([at(DAY + timedelta(days=1))], pa.timestamp("us", "UTC"))}
    )
    catalog.create_table("training.labels", rows.schema).append(rows)
    _, found = build(catalog, "training.labels", tmp_path)
    assert found[0][f"watch_minutes_{LONG}d"] == 10


def test_tables_that_were_never_exported(catalog: Catalog, tmp_path: Path) -> None:
    with pytest.raises(TableMissing, match="export it first"):
        build(catalog, write_labels(tmp_path, [(1, at(DAY))]), tmp_path)


@pytest.mark.parametrize("dialect", ["trino", "spark", "athena"])
def test_every_dialects_text_gives_equal_rows(catalog: Catalog, tmp_path: Path, dialect: Dialect) -> None:
    rows = {
        WATCH.name: [
            watch(v, DAY - timedelta(days=n), 61 * v + n)
            for v in range(4)
            for n in (0, 1, SHORT, SHORT + 1, LONG, LONG + 1)
        ],
        GENRE.name: [
            genre(v, DAY - timedelta(days=n), "abcdefgé"[(3 * v + n) % 8], 7 * v + n % 3, views=1 + n % 3)
            for v in range(4)
            for n in range(30)
        ],
        INTERACTIONS.name: [
            interactions(v, DAY - timedelta(days=n), v, n, 1) for v in (1, 2) for n in (1, 30)
        ],
    }
    fill(catalog, rows)
    moments = [at(DAY, 0), at(DAY, 12), at(DAY, 23.5), at(DAY + timedelta(days=3))]
    labels = pa.table(
        {
            "viewer_id": pa.array([v for v in range(5) for _ in moments], pa.int64()),
            "label_time": pa.array(moments * 5, pa.timestamp("us", "UTC")),
            "select": pa.array(range(5 * len(moments)), pa.int64()),
        }
    )
    # A label that is there twice stays there twice.
    labels = pa.concat_tables([labels, labels.slice(3, 1)])
    catalog.create_table("training.labels", labels.schema).append(labels)
    _, expected = build(catalog, "training.labels", tmp_path)
    text = print_training_sql(catalog, "training.labels", dialect, features=FEATURES)
    with duckdb.connect() as session:
        session.execute("create schema training")
        for name in (*TILE_TABLES, "labels"):
            session.register("found", catalog.load_table(("training", name)).scan().to_arrow())
            session.execute(f"create table training.{name} as from found")
        (back,) = sqlglot.transpile(text, read=dialect, write="duckdb")
        found = session.sql(back).to_arrow_table().to_pylist()

    def place(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["select"], row["viewer_id"]

    assert list(found[0]) == list(expected[0])
    assert sorted(found, key=place) == sorted(expected, key=place)


def test_sql_is_printed_for_a_table_of_labels_only(catalog: Catalog) -> None:
    fill(catalog, {})
    with pytest.raises(LabelsRefused, match="is no Iceberg table"):
        print_training_sql(catalog, "labels.csv", "trino", features=FEATURES)
    with pytest.raises(TableMissing, match=r"training\.nothing does not exist"):
        print_training_sql(catalog, "training.nothing", "trino", features=FEATURES)
    with pytest.raises(LabelsRefused, match="--as-known needs the history"):
        print_training_sql(catalog, "training.nothing", "trino", as_known=True, features=FEATURES)
    naive = pa.schema([("viewer_id", pa.int64()), ("label_time", pa.timestamp("us"))])
    catalog.create_table("training.naive", naive)
    with pytest.raises(LabelsRefused, match=r"label_time is timestamp: spark needs a timestamp with a zone"):
        print_training_sql(catalog, "training.naive", "spark", features=FEATURES)
    catalog.create_table("training.other", pa.schema([("viewer", pa.int64())]))
    with pytest.raises(LabelsRefused, match="no column viewer_id"):
        print_training_sql(catalog, "training.other", "athena", features=FEATURES)


def test_a_training_set_as_csv_and_as_a_table(catalog: Catalog, tmp_path: Path) -> None:
    fill(
        catalog,
        {
            WATCH.name: [watch(1, DAY, 61)],
            GENRE.name: [genre(1, DAY, 'a, "b"', 40), genre(1, DAY, "c", 20)],
        },
    )
    labels = write_labels(tmp_path, [(1, at(DAY + timedelta(days=1), 1.5)), (2, at(DAY))])
    _, expected = build(catalog, labels, tmp_path)
    made = build_training_set(catalog, LabelJoin(labels, FEATURES, NOW), tmp_path / "set.csv")
    first, second = csv.DictReader((tmp_path / "set.csv").open())
    assert first["label_time"] == "2026-03-11T01:30:00.000000Z"
    assert first[f"watch_minutes_{SHORT}d"] == "1.016667"
    assert json.loads(first["favorite_genres"]) == ['a, "b"', "c"]
    assert first["favorite_genre_shares"] == "[0.666667,0.333333]"
    assert (second["favorite_genre"], second["favorite_genres"], second[f"likes_{LONG}d"]) == ("", "[]", "0")
    # Any kind of output can be had again as any other.
    table = reproduce_training_set(catalog, made.manifest, "ml.first_set", registry=REGISTRY)
    assert table.content_hash == made.content_hash
    for _ in range(2):
        made = build_training_set(
            catalog, LabelJoin(labels, FEATURES, NOW), "ml.first_set", manifest=tmp_path / "set.json"
        )
        stored = catalog.load_table("ml.first_set")
        assert stored.scan().to_arrow().to_pylist() == expected
    snapshot = stored.current_snapshot()
    assert snapshot is not None
    assert snapshot.summary is not None
    assert snapshot.summary["prefs.fingerprint"] == made.content_hash
    assert json.loads(made.manifest.read_text())["output"]["path"] == "ml.first_set"
    catalog.create_table("ml.other", pa.schema([("viewer_id", pa.int64())]))
    with pytest.raises(OutputRefused, match=r"ml\.other has other columns \(viewer_id\)"):
        build_training_set(
            catalog, LabelJoin(labels, FEATURES, NOW), "ml.other", manifest=tmp_path / "x.json"
        )
    assert not (tmp_path / "x.json").exists()


FORMULAS = ['=HYPERLINK("http://x")', "+1+1", "-1+1", "@SUM(1)", "\t=1", "\r=1", "\uff1d1", "'=1", "''-x"]
HARMLESS = ["-1", "+1.5", "-.5e-3", "it's = fine", "a=b", "", "'quoted'"]


def test_no_text_of_a_csv_is_a_formula(catalog: Catalog, tmp_path: Path) -> None:
    fill(catalog, {GENRE.name: [genre(1, DAY, "=HYPERLINK(1)", 40)]})
    labels = tmp_path / "labels.parquet"
    texts = [*FORMULAS, *HARMLESS]
    times = pa.array([at(DAY + timedelta(days=1))] * len(texts), pa.timestamp("us", "UTC"))
    pq.write_table(pa.table({"viewer_id": [1] * len(texts), "label_time": times, "=note": texts}), labels)

    def written(**options: Any) -> list[dict[str, str]]:
        made = build_training_set(
            catalog, LabelJoin(str(labels), FEATURES, NOW, **options), tmp_path / "set.csv"
        )
        with (tmp_path / "set.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        # What a formula is stands in the file only, so that the rows can be had again as any output.
        reproduce_training_set(catalog, made.manifest, tmp_path / "again.parquet", registry=REGISTRY)
        assert pq.read_table(tmp_path / "again.parquet")["=note"].to_pylist() == texts
        return rows

    rows = written()
    assert {row["favorite_genre"] for row in rows} == {"'=HYPERLINK(1)"}
    assert [row["'=note"] for row in rows] == [*(f"'{text}" for text in FORMULAS), *HARMLESS]
    assert {row["favorite_genres"] for row in rows} == {'["=HYPERLINK(1)"]'}
    rows = written(csv=CsvOptions(keep_formulas=True))
    assert {row["favorite_genre"] for row in rows} == {"=HYPERLINK(1)"}
    assert [row["=note"] for row in rows] == texts


def test_an_output_is_its_owners_and_no_link_is_followed(catalog: Catalog, tmp_path: Path) -> None:
    fill(catalog, {})
    labels = write_labels(tmp_path, [(1, at(DAY))])
    (tmp_path / "precious").write_text("precious")
    for name in ("set.parquet", "set.parquet.manifest.json", f".set.parquet.{os.getpid()}.partial"):
        (tmp_path / name).symlink_to("precious")
    made, _ = build(catalog, labels, tmp_path)
    assert (tmp_path / "precious").read_text() == "precious"
    for path in (Path(made.output), made.manifest):
        assert stat.S_IMODE(path.lstat().st_mode) == 0o600


@pytest.mark.parametrize("existing", [True, False])
def test_a_table_that_another_writer_changes_meanwhile(
    catalog: Catalog, warehouse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool
) -> None:
    fill(catalog, {WATCH.name: [watch(1, DAY, 600)]})
    labels = write_labels(tmp_path, [(1, at(DAY + timedelta(days=1)))])

    def write(labels: str) -> None:
        build_training_set(
            catalog, LabelJoin(labels, FEATURES, NOW), "ml.set", manifest=tmp_path / "set.json"
        )

    if existing:
        write(labels)
    others = write_labels(tmp_path, [(2, at(DAY)), (3, at(DAY))])
    real = replace_module.parquet_file_to_data_file

    def late(**options: Any) -> Any:
        monkeypatch.setattr(replace_module, "parquet_file_to_data_file", real)
        write(others)
        return real(**options)

    monkeypatch.setattr(replace_module, "parquet_file_to_data_file", late)
    with pytest.raises(OutputRefused, match=r"the table ml\.set was changed by another writer: run it"):
        write(labels)
    stored = catalog.load_table("ml.set")
    assert stored.scan().to_arrow()["viewer_id"].to_pylist() == [2, 3]
    assert len(list((warehouse / "ml").rglob("*.parquet"))) == 1 + existing


@pytest.mark.parametrize(
    ("output", "message"),
    [("set.txt", "is neither a .parquet nor"), ("nowhere/set.csv", "folder .* does not exist")],
)
def test_outputs_that_cannot_be_written_are_refused_first(
    catalog: Catalog, tmp_path: Path, output: str, message: str
) -> None:
    fill(catalog, {})
    join = LabelJoin("no labels.csv", FEATURES, NOW)
    with pytest.raises(OutputRefused, match=message):
        build_training_set(catalog, join, tmp_path / output)
    with pytest.raises(OutputRefused, match="nowhere of the manifest does not exist: create it"):
        build_training_set(catalog, join, tmp_path / "set.csv", manifest=tmp_path / "nowhere" / "set.json")


def test_a_full_disk_keeps_what_was_there(
    catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(catalog, {WATCH.name: [watch(1, DAY, 600)]})
    labels = write_labels(tmp_path, [(1, at(DAY + timedelta(days=1)))])
    build(catalog, labels, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for place in ("pyarrow.parquet.ParquetWriter.write_batch", "os.replace"):
        with monkeypatch.context() as patch:
            patch.setattr(place, full)
            with pytest.raises(StorageFull, match="no space left while writing the"):
                build(catalog, labels, tmp_path)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_damaged_tables_and_a_catalog_that_is_gone_are_named(
    catalog: Catalog, warehouse: Path, tmp_path: Path
) -> None:
    fill(catalog, {WATCH.name: [watch(1, DAY, 600)]})
    labels = write_labels(tmp_path, [(1, at(DAY + timedelta(days=1)))])
    (data,) = (warehouse / "training" / WATCH.name / "data").rglob("*.parquet")
    content = data.read_bytes()
    data.write_bytes(content[: len(content) // 2])
    with pytest.raises(CatalogCorrupted, match=r"training\.viewer_watch_daily cannot be read"):
        build(catalog, labels, tmp_path)
    data.write_bytes(content)
    metadata = Path(catalog.load_table(("training", WATCH.name)).metadata_location.removeprefix("file://"))
    metadata.write_text("{")
    with pytest.raises(CatalogCorrupted, match=r"training\.viewer_watch_daily cannot be read"):
        build(catalog, labels, tmp_path)
    (warehouse / "catalog.db").write_bytes(b"not a database at all" * 100)
    with pytest.raises(CatalogCorrupted, match=r"catalog\.db is damaged"):
        build(open_catalog("sqlite", warehouse.as_uri()), labels, tmp_path)
    assert not (tmp_path / "set.parquet").exists()


def test_days_without_tiles_are_cold_starts(catalog: Catalog, tmp_path: Path) -> None:
    fill(catalog, {WATCH.name: [watch(1, DAY, 600)]})
    made, (row, ancient) = build(
        catalog, write_labels(tmp_path, [(1, at(DAY)), (1, datetime(1, 1, 2, tzinfo=UTC))]), tmp_path
    )
    assert made.cold_start_rows == 2
    assert {name: row[name] for name in NAMES} == oracle.features(1, at(DAY), [], [], [])
    assert ancient["favorite_genres"] == []
