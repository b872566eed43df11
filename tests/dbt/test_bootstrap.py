"""A topic's history next to Kafka: whatever overlaps, stops and comes again, every view is what the oracle says."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from built_state import BuiltState
from click.testing import CliRunner
from oracle import HOUR, SECOND, Message, Oracle
from psycopg import sql
from relations import differences, insert_canary_keys, insert_events, instant, refresh
from shipped import REGISTRY
from streams import NOW
from workshop import PROJECT

from dagster_prefs.cli.root import cli
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.engine.dbt import Dbt
from dagster_prefs.errors import PrefsError
from dagster_prefs.events import engine_history
from dagster_prefs.events.bootstrap import BootstrapState, parse_until
from dagster_prefs.events.columnar import Columns, Converter, Table, TableBatch
from dagster_prefs.events.engine_history import EngineHistory, insert_statement
from dagster_prefs.events.formats import EventFileError
from dagster_prefs.events.ingest import FileOptions
from dagster_prefs.events.messages import topics_of
from dagster_prefs.events.raw import RawStore
from dagster_prefs.iceberg.history import history_snapshot
from dagster_prefs.iceberg.tables import exact_sums
from dagster_prefs.platform import Platform
from dagster_prefs.settings import load_settings

VIEWS, ITEMS = "view_events", "items"
# Of the history: its first event, and how far apart two are.
FIRST, STEP = NOW - 60 * HOUR, HOUR // 2
EVENTS, FILES = 120, 4


def body(number: int) -> dict[str, Any]:
    """An event as Kafka had it; the history holds the same ones."""
    chance = random.Random(number)
    return {
        "event_id": f"e{number}",
        "viewer_id": chance.randrange(9),
        "content_id": f"c{chance.randrange(5)}",
        "genre": chance.choice(["drama", None, 'a"\\b']),
        "watch_duration_sec": chance.randrange(-1, 4000),
        "completion_pct": chance.choice([0.25, 1.0, 0.95]),
        "watched_at": instant(FIRST + number * STEP),
    }


def from_kafka(numbers: Sequence[int]) -> list[Message]:
    return [
        Message(
            VIEWS,
            "kafka:view_events",
            number % 2,
            number,
            json.dumps(body(number), default=str).encode(),
            FIRST + number * STEP,
            NOW - HOUR + number * SECOND,
        )
        for number in numbers
    ]


class Bootstrap:
    """One engine with its platform, and a folder of history in Parquet."""

    def __init__(self, platform: Platform, order: Sequence[str], folder: Path) -> None:
        self.platform = platform
        self.engine = platform.engine
        self.order = order
        self.folder = folder

    def write(self, name: str, rows: Sequence[dict[str, Any]]) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(list(rows)), path)
        return path

    def run(self, topic: str, given: Path | str, **options: Any) -> BootstrapState:
        return self.platform.bootstrap(topic, str(given), FileOptions(**options))

    def arrive(self, messages: Sequence[Message]) -> None:
        with self.engine.connect() as connection:
            insert_events(connection, messages)

    def ask(self, query: str) -> list[tuple[Any, ...]]:
        with self.engine.connect() as connection:
            return connection.execute(query).fetchall()  # type: ignore[arg-type]

    def delivered(self) -> list[Message]:
        """What the raw tables hold, for the oracle."""
        found = []
        for topic, table in ((VIEWS, "raw_view_events"), (ITEMS, "raw_items")):
            for row in self.ask(
                "select source, source_partition, source_offset, data,"
                " (extract(epoch from kafka_timestamp) * 1000000)::bigint,"
                f" (extract(epoch from arrived_at) * 1000000)::bigint from {table}"
            ):
                found.append(Message(topic, *row))
        return found

    def differences(self) -> dict[str, Any]:
        with self.engine.connect() as connection:
            refresh(connection, self.order)
            return differences(connection, Oracle(self.delivered(), NOW))


@pytest.fixture
def made(
    deployed: EngineConfiguration,
    deployed_state: BuiltState,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Bootstrap:
    for name, value in {
        "PREFS_ENGINE_PORT": str(deployed.port),
        "PREFS_ENGINE_DATABASE": deployed.database,
        "PREFS_ENGINE_USER": deployed.user,
        "PREFS_ICEBERG_WAREHOUSE": (tmp_path / "lake").as_uri(),
        "PREFS_DATA_DIR": str(tmp_path / "data"),
    }.items():
        monkeypatch.setenv(name, value)
    platform = Platform(load_settings())
    platform.engine = deployed
    with deployed.connect() as connection:
        insert_canary_keys(connection)
    return Bootstrap(platform, deployed_state.views, tmp_path / "history")


def test_a_stopped_bootstrap_goes_on_and_overlaps_with_kafka(
    made: Bootstrap, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in range(FILES):
        rows = [
            {**body(number), "loaded_at": instant(FIRST + number * STEP + SECOND)}
            for number in range(file, EVENTS, FILES)
        ]
        made.write(f"views/part-{file}.parquet", rows)
    # Kafka's retention has left the newest: some of them arrive before the history, and some after it.
    made.arrive(from_kafka(range(80, 110)))
    copied, calls = RawStore.copy_lines, []

    def fails(self: RawStore, *given: Any) -> int:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return copied(self, *given)

    options = {"renamed": {"loaded_at": None}, "arrived_at": "loaded_at"}
    monkeypatch.setattr(RawStore, "copy_lines", fails)
    with pytest.raises(KeyboardInterrupt):
        made.run(VIEWS, made.folder / "views", **options)
    (stopped,) = made.platform.bootstraps(VIEWS)
    assert (stopped.parts_done, stopped.parts, stopped.is_complete) == (2, 4, False)
    assert stopped.messages == EVENTS / FILES * 2
    assert (stopped.seconds_left or 0) > 0
    monkeypatch.setattr(RawStore, "copy_lines", copied)
    state = made.run(VIEWS, made.folder / "views", **options)
    assert (state.parts_done, state.messages, state.seconds_left) == (4, EVENTS, 0.0)
    made.arrive(from_kafka(range(110, 140)))
    assert made.differences() == {}
    events = made.ask("select event_id, watch_duration_sec, viewer_id from view_events")
    expected = [body(number) for number in range(140) if body(number)["watch_duration_sec"] >= 0]
    assert sorted(events) == sorted(
        (one["event_id"], one["watch_duration_sec"], one["viewer_id"]) for one in expected
    )
    # Once more: no message is new.
    assert made.run(VIEWS, made.folder / "views", **options).messages == EVENTS
    assert len(made.delivered()) == EVENTS + 60


def test_history_of_reference_data_gives_way_to_kafka(made: Bootstrap) -> None:
    items = made.write(
        "items.parquet", [{"item_id": f"i{n}", "title": "old", "price": 1.5} for n in range(6)]
    )
    told = [
        Message(
            ITEMS, "kafka:items", 0, n, json.dumps({"item_id": f"i{n}", "title": "new"}).encode(), NOW, FIRST
        )
        for n in range(3)
    ]
    made.arrive(told[:2])
    assert made.run(ITEMS, items).is_complete
    made.arrive(told[2:])
    assert made.differences() == {}
    assert sorted(made.ask("select title from items")) == [("new",)] * 3 + [("old",)] * 3
    with pytest.raises(EventFileError, match="items is reference data"):
        made.run(ITEMS, items, until=datetime(2026, 1, 1, tzinfo=UTC))


def test_history_ends_where_kafka_begins(made: Bootstrap) -> None:
    rows = [body(number) for number in range(EVENTS)]
    rows[7]["watched_at"] = None
    path = made.write("views.parquet", rows)
    lines = made.folder / "views.jsonl"
    lines.write_text(json.dumps(rows[0], default=str) + "\n")
    end = instant(FIRST + 50 * STEP)
    assert made.run(VIEWS, path, until=end).messages == 50
    held = made.ask("select count(*), count(*) filter (where data like '%\"e7\"%') from raw_view_events")
    assert held == [(50, 1)], "a row without a time is stored, to be rejected"
    # A later end adds what is missing, and one that was stopped is superseded.
    later = made.run(VIEWS, path, until=end + timedelta(hours=1))
    assert (later.messages, made.ask("select count(*) from raw_view_events")) == (52, [(52,)])
    assert [state.history.options[:5] for state in made.platform.bootstraps(VIEWS)] == ["until", "until"]
    with pytest.raises(EventFileError, match=r"--until need"):
        made.run(VIEWS, lines, until=end)
    text = made.write("texts.parquet", [{**one, "watched_at": str(one["watched_at"])} for one in rows])
    with pytest.raises(EventFileError, match="--until compares watched_at, which is string"):
        made.run(VIEWS, text, until=end)
    found = CliRunner().invoke(cli, ["bootstrap", VIEWS, "--status", "--json"], catch_exceptions=False)
    states = json.loads(found.stdout)
    # What was refused as a whole left no record.
    assert [(one["state"], one["messages"]) for one in states] == [("complete", 50), ("complete", 52)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2026-01-31", datetime(2026, 1, 31, tzinfo=UTC)),
        ("2026-01-31T01:00:00+01:00", datetime(2026, 1, 31, tzinfo=UTC)),
        ("0:1200,1:7", {0: 1200, 1: 7}),
        ("0:1,0:2", "names a partition twice"),
        ("yesterday", "neither a time nor offsets"),
    ],
)
def test_an_end_is_a_time_or_offsets(text: str, expected: Any) -> None:
    if isinstance(expected, str):
        with pytest.raises(PrefsError, match=expected):
            parse_until(text)
    else:
        assert parse_until(text) == expected


# --- what RisingWave reads itself ---


def history_of(table: pa.Table, options: Columns, span: Any = None) -> EngineHistory:
    def batches(first: int, names: Sequence[str] | None) -> Any:
        for batch in table.slice(first).to_batches():
            yield TableBatch(first, batch if names is None else batch.select(names))

    of = Table("iceberg:lake.views", "lake.views", "7", table.schema, table.num_rows, batches)
    return EngineHistory("history_of_view_events", 7, of, options, span)


def test_the_engines_own_reading_makes_the_same_events(made: Bootstrap) -> None:
    """But for the table's version the statement is PostgreSQL's too: its messages are read as the Converter's."""
    rows = [body(number) for number in range(EVENTS)]
    columns = {
        "id": [f"e{number}" for number in range(EVENTS)] + ["text", None],
        "viewer_id": pa.array(
            [float(one["viewer_id"]) for one in rows] + [float("nan"), 2.0**53], pa.float64()
        ),
        "genre": [one["genre"] for one in rows] + ["é\t", ""],
        "watch_duration_sec": [one["watch_duration_sec"] for one in rows] + [1, None],
        "completion_pct": pa.array([one["completion_pct"] for one in rows] + [0.1, 0.5], pa.float32()),
        "watched_at": pa.array(
            [one["watched_at"] for one in rows] + [instant(FIRST)] * 2, pa.timestamp("us", "UTC")
        ),
        "raw": [b"x"] * (EVENTS + 2),
    }
    table = pa.table(columns)
    options = Columns({"id": "event_id", "raw": None})
    topic = topics_of(REGISTRY)[VIEWS]
    history = history_of(table, options)
    statement = insert_statement(made.engine, topic, history, sql.SQL("true"))
    with made.engine.connect() as connection:
        connection.execute("set timezone = 'UTC'")
        connection.execute(
            "create table history_of_view_events (id text, viewer_id float8, genre text, watch_duration_sec bigint,"
            " completion_pct float4, watched_at timestamptz, raw bytea)"
        )
        with connection.cursor() as cursor:
            cursor.executemany(
                "insert into history_of_view_events values (%s, %s, %s, %s, %s, %s, %s)",
                [tuple(row.values()) for row in table.to_pylist()],
            )
        text = statement.as_string(connection)
        assert " for system_version as of 7 " in text
        connection.execute(text.replace(" for system_version as of 7", ""))
        places = "select source_partition, source_offset, data from raw_view_events order by 1, 2"
        first = connection.execute(places).fetchall()
        assert len(first) == EVENTS + 2
        assert all(0 <= partition < 256 and 0 <= offset < 2**60 for partition, offset, _ in first)
        refresh(connection, made.order)
        read = "select {} from view_events_parsed order by event_id nulls last, viewer_id".format(
            ", ".join([*topic.names, "reason"])
        )
        engines = connection.execute(read).fetchall()
        connection.execute("delete from raw_view_events")
        with Converter(history.table, topic, options) as converter:
            ours = [
                Message(VIEWS, "file:x", 0, row, message.encode(), None, NOW)
                for batch in converter.messages()
                for row, message in batch.pairs()
            ]
        insert_events(connection, ours)
        refresh(connection, made.order)
        assert connection.execute(read).fetchall() == engines
        # The place of a message is that of its bytes, whatever is read around it.
        connection.execute("delete from raw_view_events")
        connection.execute(text.replace(" for system_version as of 7 where true", " where id like 'e1%'"))
        again = connection.execute(places).fetchall()
        assert len(again) > 10
        assert set(again) < set(first)


def test_parts_are_days_that_the_scan_can_skip(made: Bootstrap, monkeypatch: pytest.MonkeyPatch) -> None:
    topic = topics_of(REGISTRY)[VIEWS]
    table = pa.table(
        {
            "event_id": ["a"],
            "viewer_id": [1],
            "watched_at": pa.array([NOW], pa.timestamp("us", "UTC")),
            "loaded": pa.array([NOW], pa.timestamp("us")),
        }
    )
    span = (datetime(2026, 1, 1, 5, tzinfo=UTC), datetime(2026, 1, 3, 1, tzinfo=UTC))
    asked: list[str] = []

    def inserts(connection: Any, engine: Any, topic: Any, history: Any, condition: Any) -> int:
        asked.append(condition.as_string(connection))
        return 1

    monkeypatch.setattr(engine_history, "insert_rows", inserts)

    def parts(options: Columns, span: Any = span) -> list[str]:
        return [part.name for part in history_of(table, options, span).parts(made.engine, topic)]

    assert parts(Columns({"loaded": None})) == ["2026-01-01", "2026-01-02", "2026-01-03", "without a time"]
    assert parts(Columns({"loaded": None}), None) == ["all"]
    until = Columns({"loaded": None}, until=datetime(2026, 1, 2, 12, tzinfo=UTC))
    assert parts(until) == ["2026-01-01", "2026-01-02", "without a time"]
    far = (span[0], datetime(2100, 1, 1, tzinfo=UTC))
    assert 900 < len(parts(Columns({"loaded": None}), far)) <= engine_history.PARTS + 2
    # `flush` is RisingWave's own statement.
    monkeypatch.setattr(engine_history, "FLUSH", "select")
    for part in history_of(table, until, span).parts(made.engine, topic):
        assert part.read() == 1
    days = [f"2026-01-0{day} {hour}:00:00+00:00" for day, hour in ((1, "00"), (2, "00"), (2, 12))]
    assert asked == [
        *(
            f"\"watched_at\" >= '{first}'::timestamptz and \"watched_at\" < '{end}'::timestamptz"
            for first, end in pairwise(days)
        ),
        '"watched_at" is null',
    ]
    with pytest.raises(EventFileError, match="names the column gone"):
        parts(Columns({"gone": None}))
    with made.engine.connect() as connection:
        told = insert_statement(
            made.engine,
            topic,
            history_of(table, Columns({"loaded": None}, arrived_at="loaded")),
            sql.SQL("true"),
        ).as_string(connection)
    assert "arrived_at) select 'file:iceberg:lake.views'" in told
    assert """"loaded" at time zone 'UTC' as arrived_at""" in told


def test_a_snapshot_of_iceberg_tells_its_span(made: Bootstrap) -> None:
    catalog = made.platform.catalog()
    catalog.create_namespace("lake")
    rows = pa.table(
        {
            "watched_at": pa.array([instant(FIRST), instant(NOW), None], pa.timestamp("us", "UTC")),
            "n": [1, 2, 3],
        }
    )
    table = catalog.create_table("lake.views", rows.schema)
    table.append(rows)
    first = history_snapshot(catalog, "lake.views")
    assert (first.rows, first.span("watched_at"), first.span("n")) == (
        3,
        (instant(FIRST), instant(NOW)),
        None,
    )
    table.append(pa.table({"watched_at": pa.array([None], pa.timestamp("us", "UTC")), "n": [4]}))
    assert history_snapshot(catalog, "lake.views").rows == 4
    again = history_snapshot(catalog, "lake.views", first.snapshot_id)
    assert (again.snapshot_id, again.files) == (first.snapshot_id, first.files)
    assert history_snapshot(catalog, "lake.views", 1).rows == 4, (
        "an expired snapshot gives way to the current one"
    )


@pytest.mark.parametrize(
    ("given", "options", "wrong"),
    [
        ("/tmp/x.parquet", {}, "RisingWave reads a history itself from Iceberg"),
        ("iceberg:lake.views", {}, "cannot read the SQLite catalog"),
    ],
)
def test_what_risingwave_cannot_read_is_refused(
    given: str, options: dict[str, Any], wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFS_ENGINE", "risingwave")
    monkeypatch.setenv("PREFS_ICEBERG_CATALOG", "sqlite")
    with pytest.raises(PrefsError, match=wrong):
        Platform(load_settings()).bootstrap(VIEWS, given, FileOptions(**options))


def test_the_audit_adds_places_of_any_size_up() -> None:
    """A place is a hash of up to 60 bits, of which sixteen are more than Arrow adds up."""
    offsets = [2**60 - 1 - number for number in range(40)]
    batch = pa.record_batch({"source_offset": pa.array(offsets)})
    assert exact_sums([batch, batch], ["source_offset"]) == {"source_offset": 2 * sum(offsets)}
    small = pa.record_batch({"source_offset": pa.array([3, None, -1])})
    assert exact_sums([small, small.slice(3)], ["source_offset"]) == {"source_offset": 2}


def test_the_source_names_its_credentials_as_secrets(tmp_path: Path) -> None:
    nowhere = EngineConfiguration("127.0.0.1", 1, "any", "any", schema="any", kind="risingwave")
    told = {
        "PREFS_ICEBERG_CATALOG": "rest",
        "PREFS_ICEBERG_URI": "http://catalog",
        "PREFS_ICEBERG_CREDENTIAL": "prefs:top",
        "PREFS_ICEBERG_WAREHOUSE": "s3://lake",
        "AWS_ACCESS_KEY_ID": "id",
        "AWS_SECRET_ACCESS_KEY": "top",
        "PREFS_RISINGWAVE_SECRETS": "on",
    }
    dbt = Dbt(nowhere, PROJECT, tmp_path, told)
    inline = ["compile", "--no-introspect", "--no-populate-cache", "--inline"]
    (result,) = dbt._invoke([*inline, "{{ history_source('history_of_view_events', 'lake', 'views') }}"])
    statement = result["compiled"]
    assert statement.startswith('create source "any"."any"."history_of_view_events"\nwith (\n')
    assert "top" not in statement
    for option in (
        "catalog.credential = secret any.prefs_iceberg_credential",
        "s3.secret.key = secret any.prefs_aws_secret_access_key",
        "database.name = 'lake'",
        "table.name = 'views'",
    ):
        assert f"  {option},\n" in statement
