"""Parquet and Arrow files as events: what a row becomes, and that each is stored once."""

from __future__ import annotations

import dataclasses
import json
import math
import uuid
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import boto3
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dagster_prefs.declarations.registry import Registry
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.events import columnar, table_ingest
from dagster_prefs.events.columnar import Columns, Converter, Table, TableBatch, open_table
from dagster_prefs.events.dry_run import dry_run_file
from dagster_prefs.events.formats import EventFileError, table_kind
from dagster_prefs.events.ingest import FileOptions, ingest_file
from dagster_prefs.events.inputs import (
    Input,
    ObjectStore,
    dry_run_input,
    ingest_input,
    local_inputs,
    partition_columns,
)
from dagster_prefs.events.messages import Topic, topics_of
from dagster_prefs.events.pace import Pace
from dagster_prefs.events.raw import Batches, Progress
from dagster_prefs.events.validity import rejection_reason
from tests.events.conftest import rows

NOW = datetime(2026, 11, 21, 12, tzinfo=UTC)
VIEWS = {"event_id": ["a", "b"], "viewer_id": [1, 2], "watched_at": [1_790_000_000, 1_790_000_001]}


def stored(engine: EngineConfiguration, table: str = "raw_view_events") -> list[tuple[int, Any]]:
    found = rows(engine, f"select source_offset, data from {table} order by source, source_offset")
    return [(offset, json.loads(data)) for offset, data in found]


def write_parquet(path: Path, columns: Mapping[str, Any], **options: Any) -> Path:
    pq.write_table(pa.table(columns), path, **options)
    return path


def numbered(count: int, size: int = 10) -> dict[str, Any]:
    return {
        "event_id": [f"e{n}" for n in range(count)],
        "viewer_id": [n % size for n in range(count)],
        "watched_at": pa.array([1_790_000_000 + n for n in range(count)], pa.timestamp("s", "UTC")),
    }


def in_memory(columns: Mapping[str, Any]) -> Table:
    table = pa.table(columns)

    def batches(first: int, names: Sequence[str] | None) -> Any:
        for batch in table.slice(first).to_batches():
            yield TableBatch(first, batch if names is None else batch.select(names))

    return Table("rows", "rows", "0" * 64, table.schema, table.num_rows, batches)


def converted(columns: Mapping[str, Any], topic: Topic, **how: Any) -> list[bytes]:
    with Converter(in_memory(columns), topic, Columns(how.pop("renamed", {}), **how)) as converter:
        return [text.encode() for batch in converter.messages() for _, text in batch.pairs()]


# --- what a row becomes ---

ZONED = datetime(2026, 3, 1, 12, 30, 0, 123456, tzinfo=UTC)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (pa.array(['a\\"\t\n\x00é😀']), '"a\\\\\\"\\t\\n\\u0000é😀"'),
        (pa.array(["x"]).dictionary_encode(), '"x"'),
        (pa.array(["x"], pa.string_view()), '"x"'),
        (pc.run_end_encode(pa.array(["x"])), '"x"'),
        (pa.array([2**63 - 1]), "9223372036854775807"),
        (pa.array([2**64 - 1], pa.uint64()), "18446744073709551615"),
        (pa.array([Decimal("9007199254740993.50")], pa.decimal128(38, 2)), '"9007199254740993.5"'),
        (pa.array([Decimal("100")], pa.decimal128(38, 0)), '"100"'),
        (pa.array([Decimal("100.00")], pa.decimal256(60, 2)), '"100"'),
        (pa.array([Decimal("-0.10")], pa.decimal128(4, 2)), '"-0.1"'),
        (pa.array([0.1]), "0.1"),
        (pa.array([0.1], pa.float32()), "0.1"),
        (pa.array([1.5], pa.float16()), "1.5"),
        (pa.array([True]), "true"),
        (pa.array([ZONED], pa.timestamp("us", "Europe/Berlin")), '"2026-03-01 12:30:00.123456Z"'),
        (pa.array([ZONED.replace(tzinfo=None)], pa.timestamp("us")), '"2026-03-01 12:30:00.123456Z"'),
        (pa.array([1_700_000_000_123_456_789], pa.timestamp("ns")), '"2023-11-14 22:13:20.123456789Z"'),
        (pa.array([date(2026, 3, 1)]), '"2026-03-01"'),
        (pa.array([uuid.UUID(int=7).bytes], pa.uuid()), f'"{uuid.UUID(int=7)}"'),
        (pa.array([[1, 2**60]]), "[1,1152921504606846976]"),
        (
            pa.array([[ZONED]], pa.list_(pa.timestamp("us", "Asia/Tokyo"))),
            '["2026-03-01 12:30:00.123456+00"]',
        ),
        (pa.array([{"a": Decimal("12345678901234567.89")}]), '{"a":12345678901234567.89}'),
        (pa.array([math.nan]), '{"number":"nan"}'),
        (pa.array([-math.inf], pa.float32()), '{"number":"-inf"}'),
        (pa.array([None]), None),
        (pa.array([None], pa.int64()), None),
    ],
)
def test_a_value_keeps_every_digit(
    topics: Mapping[str, Topic], values: pa.Array, expected: str | None
) -> None:
    message = "{}" if expected is None else f'{{"other":{expected}}}'
    assert converted({"other": values}, topics["view_events"]) == [message.encode()]


@pytest.mark.parametrize(
    ("topic", "name", "values", "text", "reason"),
    [
        ("items", "item_id", pa.array([12345.0]), "12345", None),
        ("items", "item_id", pa.array([2.0**53 - 1]), "9007199254740991", None),
        # A float from here on stands for several ids.
        ("items", "item_id", pa.array([2.0**53]), None, "bad item_id"),
        ("view_events", "viewer_id", pa.array([2.0**60]), None, "bad viewer_id"),
        ("view_events", "viewer_id", pa.array([math.nan]), None, "bad viewer_id"),
        ("items", "title", pa.array([math.nan]), None, "bad title"),
        ("items", "price", pa.array([math.inf]), None, "bad price"),
        ("items", "item_id", pa.array([Decimal("12345.00")]), "12345", None),
        ("items", "item_id", pa.array(["12345.0"]), "12345.0", None),
        ("items", "title", pa.array([[1]]), None, "bad title"),
        ("view_events", "watched_at", pa.array([date(2026, 3, 1)]), "2026-03-01 00:00:00Z", None),
        ("view_events", "watched_at", pa.array([-(2**62)], pa.timestamp("us")), None, "bad watched_at"),
    ],
)
def test_a_field_is_read_as_its_rules_say(
    topics: Mapping[str, Topic], topic: str, name: str, values: pa.Array, text: str | None, reason: str | None
) -> None:
    valid: dict[str, dict[str, Any]] = {
        "items": {"item_id": ["i"]},
        "view_events": {"event_id": ["e"], "viewer_id": [1], "watched_at": [1_790_000_000]},
    }
    (message,) = converted(valid[topic] | {name: values}, topics[topic])
    assert rejection_reason(message, topics[topic], NOW) == reason
    document = json.loads(message, parse_int=Decimal, parse_float=Decimal)
    if text is not None:
        assert topics[topic].text(document, name) == text


def test_text_that_is_not_utf8_rejects_its_row_alone(topics: Mapping[str, Topic]) -> None:
    offsets = pa.array([0, 2, 6, 6], pa.int32()).buffers()[1]
    titles = pa.StringArray.from_buffers(3, offsets, pa.py_buffer(b"okcaf\xe9"))
    items = {"item_id": ["1", "2", "3"], "title": titles}
    messages = converted(items, topics["items"])
    assert messages[1] == b'{"item_id":"2","title":{"not_utf8":"caf\\\\xe9"}}'
    reasons = [rejection_reason(message, topics["items"], NOW) for message in messages]
    assert reasons == [None, "bad title", None]
    assert converted(items, topics["items"], where="title = 'ok' or title is null") == messages[:2]


texts = st.text(st.characters(codec="utf-8"), max_size=8) | st.sampled_from(["", " ", "007", "1e3", "12.0"])
whole = st.integers(-(2**63), 2**63 - 1) | st.integers(-3, 3)


@settings(max_examples=40)
@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "event_id": st.none() | texts,
                "viewer_id": st.none() | whole,
                "content_id": st.none() | whole,
                "genre": st.none() | texts,
                "watch_duration_sec": st.none() | st.floats(width=32, allow_nan=False, allow_infinity=False),
                "completion_pct": st.none() | st.decimals(-1, 2, places=5),
                "watched_at": st.none() | st.datetimes(datetime(1990, 1, 1), datetime(2110, 1, 1)),
            }
        ),
        min_size=1,
        max_size=12,
    )
)
def test_a_table_is_judged_and_read_like_json_lines(
    topics: Mapping[str, Topic], given_rows: list[dict[str, Any]]
) -> None:
    topic = topics["view_events"]
    types = {
        "event_id": pa.string(), "viewer_id": pa.int64(), "content_id": pa.int64(), "genre": pa.string(),
        "watch_duration_sec": pa.float64(), "completion_pct": pa.decimal128(9, 5), "watched_at": pa.timestamp("us"),
    }  # fmt: skip
    columns = {name: pa.array([row[name] for row in given_rows], kind) for name, kind in types.items()}

    def line(row: dict[str, Any]) -> bytes:
        spelled = {"completion_pct": str, "watched_at": datetime.isoformat}
        held = {
            name: spelled.get(name, lambda same: same)(value)
            for name, value in row.items()
            if value is not None
        }
        return json.dumps(held, ensure_ascii=False).encode()

    for message, row in zip(converted(columns, topic), given_rows, strict=True):
        expected = line(row)
        assert rejection_reason(message, topic, NOW) == rejection_reason(expected, topic, NOW)
        ours, theirs = (
            json.loads(one, parse_int=Decimal, parse_float=Decimal) for one in (message, expected)
        )
        assert topic.moment(ours) == topic.moment(theirs)
        for name in set(topic.names) - {"watched_at"}:
            read, meant = topic.text(ours, name), topic.text(theirs, name)
            assert read == meant or Decimal(read or "x") == Decimal(meant or "x")


# --- which columns ---


REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"raw": [b"x", b"y"]}, {}, "the column raw of .* is binary, .* leave it out with --map raw="),
    ({"raw": [[{"a": b"x"}], []]}, {}, "the column raw of .* is binary"),
    ({"Viewer_ID": [1, 2]}, {}, "viewer_id and Viewer_ID, which are one name in SQL: rename one"),
    (
        {},
        {"renamed": {"user": "viewer_id"}},
        r"--map names the column user, which .* lacks \(it has event_id",
    ),
    ({"user": [3, 4]}, {"renamed": {"user": "viewer_id"}}, "viewer_id and user of .* are both viewer_id"),
    (
        {"user": [3, 4]},
        {"renamed": {"user": "viewer"}},
        "--map user=viewer: view_events has no field viewer; its",
    ),
    ({}, {"renamed": {"viewer_id": None}}, "lacks the columns viewer_id of view_events .* or give --map"),
    ({}, {"arrived_at": "at"}, "--arrived-at names the column at, which"),
    (
        {"at": ["now", "then"]},
        {"arrived_at": "at"},
        "--arrived-at at is string .* and not a time: name a column",
    ),
    (
        {"at": [1_790_000_000, 5]},
        {"arrived_at": "at"},
        "row 2: at has 5, and --arrived-at needs a time from 2000",
    ),
    ({"at": [1_790_000_000, None]}, {"arrived_at": "at"}, "row 2: at has no value"),
    ({"at": [NOW.replace(year=2100, tzinfo=None)] * 2}, {"arrived_at": "at"}, "row 1: at has 2100-11-21"),
    (
        {},
        {"where": "viewer_id >"},
        "--where 'viewer_id >' cannot be evaluated on .*: write an SQL condition",
    ),
    ({}, {"where": "nobody = 1"}, 'Referenced column "nobody" not found'),
    ({}, {"where": "viewer_id"}, "--where is BIGINT and not a condition"),
    ({}, {"where": "true) or (true"}, "Parser Error"),
    ({}, {"where": "event_id::int > 0"}, "Could not convert string 'a' to INT32"),
    ({}, {"where": "exists (from read_text('/etc/passwd'))"}, "file system operations are disabled"),
    ({}, {"where": "exists (from VIEWS)"}, "VIEWS does not exist"),
    ({"__prefs_row": [1, 2]}, {}, "has the column __prefs_row, a reserved name: rename it"),
    ({}, {"shift_to": NOW}, "--shift-to-now does not move the times of"),
]


def test_what_cannot_be_read_is_refused_in_a_sentence(
    registry: Registry, store: EngineConfiguration, tmp_path: Path
) -> None:
    for columns, options, told in REFUSED:
        path = write_parquet(tmp_path / "views.parquet", VIEWS | columns)
        for judge in (ingest_file, dry_run_file):
            with pytest.raises(EventFileError, match=told) as caught:
                judge(store, registry, path, FileOptions("view_events", **options))
            assert "\n" not in str(caught.value)
    assert stored(store) == []


def test_lines_have_no_typed_columns(registry: Registry, store: EngineConfiguration, tmp_path: Path) -> None:
    path = tmp_path / "views.csv"
    path.write_text("event_id,viewer_id,watched_at\n")
    for judge in (ingest_file, dry_run_file):
        with pytest.raises(EventFileError, match="--map and --where need typed columns: write it as Parquet"):
            judge(store, registry, path, FileOptions(renamed={"a": "b"}, where="true"))


def test_columns_are_named_chosen_and_left_out(
    registry: Registry, store: EngineConfiguration, tmp_path: Path
) -> None:
    at = [datetime(2026, 1, day, 5, tzinfo=UTC) for day in (1, 2, 3)]
    path = write_parquet(
        tmp_path / "export.parquet",
        {"id": ["a", "b", "c"], "user": [1, 2, 3], "when": at, "raw": [b"x"] * 3, "Land": ["DE", "AT", None],
         "loaded": [moment + timedelta(seconds=9) for moment in at]},
    )  # fmt: skip
    renamed = {
        "id": "event_id",
        "user": "viewer_id",
        "when": "watched_at",
        "raw": None,
        "Land": None,
        "loaded": None,
    }
    options = FileOptions(renamed=renamed, where="land = 'AT' -- only these", arrived_at="loaded")
    report = ingest_file(store, registry, path, options)
    assert (report.topic, report.lines, report.accepted) == ("view_events", 1, 1)
    assert report.note == "--where left out 2 of 3 rows"
    # The place of a row is that in the file, whatever was left out.
    assert stored(store) == [(2, {"event_id": "b", "viewer_id": 2, "watched_at": "2026-01-02 05:00:00Z"})]
    assert rows(store, "select arrived_at from raw_view_events") == [(at[1] + timedelta(seconds=9),)]
    # Another condition adds its rows to the same source, and what both choose is there once.
    more = dataclasses.replace(options, where="land is distinct from 'DE'")
    report = ingest_file(store, registry, path, more)
    assert (report.lines, report.accepted, report.already_present) == (2, 1, 1)
    report = ingest_file(store, registry, path, dataclasses.replace(options, where=None))
    assert (report.lines, report.accepted, report.already_present) == (3, 1, 2)
    assert [place for place, _ in stored(store)] == [1, 2, 3]
    for again in (options, more, dataclasses.replace(options, where=None)):
        assert ingest_file(store, registry, path, again).accepted == 0
    assert len(rows(store, "select distinct source from raw_view_events")) == 1
    # Other messages are another source.
    other = dataclasses.replace(options, where=None, renamed=renamed | {"Land": "genre"})
    assert ingest_file(store, registry, path, other).accepted == 3


# --- each row once ---


def test_a_file_is_stored_once_with_its_row_numbers(
    registry: Registry, store: EngineConfiguration, tmp_path: Path
) -> None:
    path = write_parquet(tmp_path / "tab\tand\\.parquet", numbered(250), row_group_size=70)
    seen: list[Progress] = []
    report = ingest_file(store, registry, path, batches=Batches(progress=seen.append))
    assert (report.lines, report.accepted) == (250, 250)
    assert (seen[-1].done, seen[-1].total, seen[-1].unit) == (250, 250, "rows")
    found = stored(store)
    assert [place for place, _ in found] == list(range(1, 251))
    assert found[99][1] == {
        "event_id": "e99",
        "viewer_id": 9,
        "watched_at": "2026-09-21 14:15:00Z"[:0] or found[99][1]["watched_at"],
    }
    assert rows(store, "select distinct source, arrived_at is null from raw_view_events") == [
        (report.source, False)
    ]
    copy = tmp_path / "copies" / path.name
    copy.parent.mkdir()
    copy.write_bytes(path.read_bytes())
    assert ingest_file(store, registry, copy).already_present == 250
    write_parquet(path, numbered(251))
    assert ingest_file(store, registry, path).source != report.source


@pytest.mark.parametrize("kind", ["file", "stream"])
def test_arrow_files(registry: Registry, store: EngineConfiguration, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "views.arrow"
    table = pa.table(numbered(50))
    opened: Callable[..., Any] = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
    with opened(path, table.schema) as writer:
        for batch in table.to_batches(20):
            writer.write(batch)

    def stop(progress: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ingest_file(store, registry, path, batches=Batches(progress=stop))
    report = ingest_file(store, registry, path)
    assert (report.lines, report.accepted, report.already_present) == (50, 30, 20)
    assert [place for place, _ in stored(store)] == list(range(1, 51))


@pytest.mark.parametrize("where", [None, "viewer_id <> 3"])
def test_an_interrupted_file_goes_on_where_it_ended(
    registry: Registry,
    store: EngineConfiguration,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str | None,
) -> None:
    path = write_parquet(tmp_path / "views.parquet", numbered(100), row_group_size=30)
    monkeypatch.setattr(table_ingest, "BATCH_ROWS", 7)
    read: list[int] = []
    batches = columnar._parquet_batches

    def counted(path: Path, first: int, columns: Any) -> Any:
        read.append(first)
        return batches(path, first, columns)

    monkeypatch.setattr(columnar, "_parquet_batches", counted)
    options = FileOptions(where=where)

    def stop(progress: Progress) -> None:
        if progress.done > 40:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ingest_file(store, registry, path, options, batches=Batches(progress=stop))
    before = len(stored(store))
    report = ingest_file(store, registry, path, options)
    expected = [n + 1 for n in range(100) if where is None or n % 10 != 3]
    assert [place for place, _ in stored(store)] == expected
    assert (report.lines, report.accepted, report.already_present) == (
        len(expected),
        len(expected) - before,
        before,
    )
    # What a condition left out before is not known, so the file is read again from its start.
    assert read == ([0, 42] if where is None else [0, 0])


def test_a_crash_between_batches_loses_and_doubles_nothing(
    registry: Registry, store: EngineConfiguration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_parquet(tmp_path / "views.parquet", numbered(40))
    monkeypatch.setattr(table_ingest, "BATCH_ROWS", 8)

    def cut(progress: Progress) -> None:
        if progress.done == 16:
            rows(
                store,
                "select pg_terminate_backend(pid) from pg_stat_activity "
                "where datname = current_database() and pid <> pg_backend_pid()",
            )

    with pytest.raises(Exception, match="run the same command again"):
        ingest_file(store, registry, path, batches=Batches(progress=cut))
    # Where the record of the progress was lost, rows that are there are recognized.
    with store.connect() as session:
        session.execute("update ingest_files set lines = null")
    report = ingest_file(store, registry, path)
    assert (report.accepted, report.already_present) == (24, 16)
    assert [place for place, _ in stored(store)] == list(range(1, 41))


def test_without_copy_the_same_is_stored(
    registry: Registry, store: EngineConfiguration, tmp_path: Path
) -> None:
    path = write_parquet(tmp_path / "views.parquet", numbered(30))
    sent: list[tuple[int, bytes]] = []

    def deliver(topic: Any, messages: Sequence[Any]) -> int:
        sent.extend((one.offset, one.data) for one in messages)
        return len(messages)

    assert ingest_file(store, registry, path, deliver=deliver).accepted == 30
    with store.connect() as session:
        session.execute("delete from ingest_files")
    risingwave = dataclasses.replace(store, kind="risingwave")
    with pytest.raises(EventFileError, match="--arrived-at watched_at needs the embedded engine"):
        ingest_file(risingwave, registry, path, FileOptions(arrived_at="watched_at"))
    ingest_file(store, registry, path)
    assert [(place, json.loads(data)) for place, data in sent] == stored(store)


def test_damage_and_change_are_named(registry: Registry, store: EngineConfiguration, tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "views.parquet", numbered(3))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(EventFileError, match=r"views.parquet cannot be read, it is damaged or incomplete"):
        ingest_file(store, registry, path)
    write_parquet(path, numbered(0))
    with pytest.raises(EventFileError, match="it has columns but no rows"):
        ingest_file(store, registry, path)
    write_parquet(path, numbered(3))
    with pytest.raises(EventFileError, match="changed while it was read"):
        ingest_file(store, registry, path, batches=Batches(progress=lambda _: path.touch()))


def test_a_rate_is_kept(
    registry: Registry, store: EngineConfiguration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    clock = iter([0.0, *([1.0] * 100)])
    pace = Pace(100, lambda: next(clock), slept.append)
    assert (pace.batch_size(10_000), pace.batch_size(7), Pace(None).batch_size(7)) == (25, 7, 7)
    pace.wait(50)
    pace.wait(150)
    assert slept == [0.0, 0.5]
    waited: list[int] = []
    monkeypatch.setattr(Pace, "wait", lambda self, sent: waited.append(sent))
    ingest_file(store, registry, write_parquet(tmp_path / "v.parquet", numbered(60)), FileOptions(rate=100))
    lines = tmp_path / "views.jsonl"
    lines.write_bytes(b"\n".join(converted(numbered(30), topics_of(registry)["view_events"])))
    ingest_file(store, registry, lines, FileOptions(rate=40))
    assert waited == [25, 50, 60, 10, 20, 30, 30]


# --- folders ---


def test_a_folder_is_its_files_in_order(
    registry: Registry, store: EngineConfiguration, tmp_path: Path
) -> None:
    for place, folder in enumerate(("day=2026-01-02", "day=2026-01-01", "day=__HIVE_DEFAULT_PARTITION__")):
        (tmp_path / folder).mkdir()
        write_parquet(tmp_path / folder / "part-0.parquet", numbered(place + 1))
    (tmp_path / "_SUCCESS").touch()
    (tmp_path / ".part-0.parquet.crc").write_text("x")
    (tmp_path / "_temporary").mkdir()
    write_parquet(tmp_path / "_temporary" / "part-1.parquet", numbered(9))
    found = list(local_inputs(tmp_path))
    assert [given.name.removeprefix(f"{tmp_path}/") for given in found] == [
        "day=2026-01-01/part-0.parquet",
        "day=2026-01-02/part-0.parquet",
        "day=__HIVE_DEFAULT_PARTITION__/part-0.parquet",
    ]
    options = FileOptions(renamed={"day": "genre"})
    reports = [ingest_input(store, registry, given, options) for given in found]
    assert [report.accepted for report in reports] == [2, 1, 3]
    assert len({report.source for report in reports}) == 3
    assert sorted(str(message.get("genre")) for _, message in stored(store)) == [
        "2026-01-01", "2026-01-01", "2026-01-02", "None", "None", "None",
    ]  # fmt: skip
    assert [ingest_input(store, registry, given, options).accepted for given in local_inputs(tmp_path)] == [
        0,
        0,
        0,
    ]
    with pytest.raises(EventFileError, match="is a folder without files"):
        list(local_inputs(tmp_path / "_temporary" / "..")) and list(local_inputs(_empty(tmp_path)))
    assert partition_columns(["a", "b=1%2F2", "=3"]) == {"b": "1/2"}


def _empty(folder: Path) -> Path:
    empty = folder / "empty"
    empty.mkdir()
    return empty


def test_lines_have_no_partition_columns(
    registry: Registry, store: EngineConfiguration, tmp_path: Path
) -> None:
    (tmp_path / "day=1").mkdir()
    (tmp_path / "day=1" / "views.jsonl").write_text('{"event_id":"a","viewer_id":1,"watched_at":1}\n')
    (given,) = local_inputs(tmp_path)
    with pytest.raises(EventFileError, match=r"folders are named after columns \(day\)"):
        ingest_input(store, registry, given, FileOptions())


def test_what_was_fetched_and_stored_is_not_fetched_again(
    registry: Registry, store: EngineConfiguration, tmp_path: Path
) -> None:
    path = write_parquet(tmp_path / "v.parquet", numbered(3))
    fetched: list[str] = []

    def given(version: str) -> Input:
        def fetch() -> Any:
            fetched.append(version)
            return next(local_inputs(path)).open()

        return Input("s3://bucket/v.parquet", fetch, version)

    assert ingest_input(store, registry, given("1"), FileOptions()).accepted == 3
    again = ingest_input(store, registry, given("1"), FileOptions())
    assert (again.accepted, again.already_present, again.topic) == (0, 3, "view_events")
    assert ingest_input(store, registry, given("2"), FileOptions()).already_present == 3
    assert ingest_input(store, registry, given("1"), FileOptions(where="true")).accepted == 0
    assert fetched == ["1", "2", "1"]
    path.write_bytes(b"PAR1")
    with pytest.raises(EventFileError, match=r"^s3://bucket/v.parquet cannot be read, it is damaged"):
        ingest_input(store, registry, given("3"), FileOptions())


def test_the_format_is_in_the_content(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for head, kind in (
        (b"PAR1", "parquet"),
        (b"ARROW1\0\0", "arrow"),
        (b"\xff\xff\xff\xff", "arrow"),
        (b"{}", None),
    ):
        path.write_bytes(head)
        assert table_kind(path) == kind
    path.write_bytes(b"FEA1")
    with pytest.raises(EventFileError, match="Feather of version 1"):
        table_kind(path)


def test_a_wide_file_is_read_in_small_batches(tmp_path: Path) -> None:
    columns = {"event_id": ["x" * 100_000] * 400, "n": list(range(400))}
    path = write_parquet(tmp_path / "wide.parquet", columns, use_dictionary=False, compression="none")
    batches = list(open_table(path, "parquet", "0").batches(0, None))
    assert max(batch.rows.nbytes for batch in batches) < 2 * columnar.BATCH_BYTES
    assert sum(batch.rows.num_rows for batch in batches) == 400
    assert [batch.first for batch in batches] == [batch.rows["n"][0].as_py() for batch in batches]


# --- S3 ---


def test_objects_are_read_as_files_once(
    registry: Registry,
    store: EngineConfiguration,
    tmp_path: Path,
    aws_endpoint: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    client: Any = boto3.client("s3", endpoint_url=aws_endpoint, region_name="eu-central-1")
    client.create_bucket(Bucket="history", CreateBucketConfiguration={"LocationConstraint": "eu-central-1"})
    path = write_parquet(tmp_path / "part-0.parquet", numbered(4))
    for key in ("views/day=1/part-0.parquet", "views/_SUCCESS", "views/", "views_2/part-0.parquet"):
        client.put_object(Bucket="history", Key=key, Body=b"" if key[-1] in "/S" else path.read_bytes())
    client.put_object(
        Bucket="history", Key="views/day=2/v.jsonl", Body=b'{"event_id":"x","viewer_id":1,"watched_at":1}'
    )
    s3 = ObjectStore("eu-central-1", aws_endpoint)
    (table, lines) = s3.inputs("s3://history/views")
    assert (table.name, table.constants) == ("s3://history/views/day=1/part-0.parquet", {"day": "1"})
    options = FileOptions(renamed={"day": None})
    report = ingest_input(store, registry, table, options)
    assert (report.accepted, report.topic) == (4, "view_events")
    # Named by itself, a file of lines has all its fields.
    (named,) = s3.inputs(lines.name)
    assert ingest_input(store, registry, named, FileOptions()).accepted == 1
    assert [
        path.partition(" ")[0] for (path,) in rows(store, "select path from ingest_files order by path")
    ] == [
        "s3://history/views/day=1/part-0.parquet",
        "s3://history/views/day=2/v.jsonl",
    ]
    with monkeypatch.context() as patch:
        patch.setattr(ObjectStore, "_fetched", lambda *_: pytest.fail("fetched again"))
        assert (
            ingest_input(store, registry, next(s3.inputs("s3://history/views")), options).already_present == 4
        )
    client.put_object(Bucket="history", Key="views/day=1/part-0.parquet", Body=b"PAR1")
    with pytest.raises(EventFileError, match=r"part-0.parquet was replaced while it was read"):
        dry_run_input(store, registry, table, options)
    for uri, told in (
        ("s3://history/nothing", "has no objects"),
        ("s3://", "names no bucket"),
        ("s3://nowhere/x", r"s3://nowhere/x cannot be read \(.*NoSuchBucket.*check the bucket, AWS_REGION"),
    ):
        with pytest.raises(EventFileError, match=told):
            list(s3.inputs(uri))
