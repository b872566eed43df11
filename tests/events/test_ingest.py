from __future__ import annotations

import base64
import csv
import gzip
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
import pytest

from dagster_prefs.declarations.registry import Registry
from dagster_prefs.engine.connection import EngineConfiguration, EngineUnavailable
from dagster_prefs.events.formats import EventFileError
from dagster_prefs.events.ingest import FileOptions, file_source, ingest_file
from dagster_prefs.events.raw import (
    BYTES_PER_INSERT,
    ROWS_PER_INSERT,
    Batches,
    Progress,
    RawMessage,
    RawStoreError,
    inserted_at_once,
    translated,
)
from dagster_prefs.events.rejected import RejectedEvent, rejected_counts, rejected_events
from tests.events.conftest import rows

REPOSITORY = Path(__file__).resolve().parents[2]
SAMPLE = REPOSITORY.parent / "shared" / "data" / "rees46-2019-10-sample.csv"
NOW = datetime(2026, 11, 21, 12, 0, 0, tzinfo=UTC)


def write_views(path: Path, count: int) -> Path:
    lines = (
        f'{{"event_id":"e{n}","viewer_id":{n % 50},"watched_at":"2026-10-01T00:00:{n % 60:02d}Z"}}\n'
        for n in range(count)
    )
    path.write_text("".join(lines))
    return path


def stored(engine: EngineConfiguration, table: str = "raw_view_events") -> list[tuple[int, bytes]]:
    return rows(engine, f"select source_offset, data from {table} order by source, source_offset")  # type: ignore[return-value]


def test_an_insert_has_so_many_rows_and_bytes_and_no_message_is_left_out() -> None:
    large = BYTES_PER_INSERT // 3
    sizes = [1] * (ROWS_PER_INSERT + 1) + [large] * 4 + [2 * BYTES_PER_INSERT, 1]
    messages = [RawMessage(0, offset, bytes(size)) for offset, size in enumerate(sizes)]
    parts = list(inserted_at_once(messages))
    assert [len(part) for part in parts] == [ROWS_PER_INSERT, 4, 1, 1, 1]
    assert [message for part in parts for message in part] == messages
    assert list(inserted_at_once([])) == []


def test_every_line_is_stored_once_with_its_number(
    registry: Registry, store: EngineConfiguration, tmp_path: Path
) -> None:
    path = tmp_path / "views.jsonl"
    path.write_bytes(b'{"event_id":"a","viewer_id":1,"watched_at":1}\n\n{broken\n\xff\xfe\r\n')
    seen: list[Progress] = []
    first = ingest_file(store, registry, path, batches=Batches(2, seen.append))
    assert (first.topic, first.lines, first.accepted, first.already_present, first.blank) == (
        "view_events", 3, 3, 0, 1,
    )  # fmt: skip
    assert first.source == f"file:views.jsonl#{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"
    expected = [(1, b'{"event_id":"a","viewer_id":1,"watched_at":1}'), (3, b"{broken"), (4, b"\xff\xfe")]
    assert stored(store) == expected
    assert seen[-1].messages == 3
    assert seen[-1].done == seen[-1].total == path.stat().st_size
    second = ingest_file(store, registry, path)
    assert (second.lines, second.accepted, second.already_present) == (3, 0, 3)
    assert stored(store) == expected


def test_an_interrupted_file_is_completed(
    registry: Registry, store: EngineConfiguration, tmp_path: Path
) -> None:
    path = write_views(tmp_path / "views.jsonl", 500)

    def interrupt(progress: Progress) -> None:
        if progress.messages >= 200:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ingest_file(store, registry, path, batches=Batches(100, interrupt))
    assert len(stored(store)) == 200
    report = ingest_file(store, registry, path, batches=Batches(70))
    assert (report.accepted, report.already_present) == (300, 200)
    assert stored(store) == list(enumerate(path.read_bytes().splitlines(), 1))


def test_a_killed_ingest_is_completed_exactly(
    registry: Registry, store: EngineConfiguration, tmp_path: Path
) -> None:
    path = write_views(tmp_path / "views.jsonl", 30_000)
    script = (
        "import sys; from pathlib import Path;"
        "from dagster_prefs.engine.connection import EngineConfiguration;"
        "from dagster_prefs.events.ingest import ingest_file;"
        "from dagster_prefs.events.raw import Batches;"
        "from dagster_prefs.settings import load_settings;"
        "engine = EngineConfiguration('127.0.0.1', int(sys.argv[1]), sys.argv[2], 'prefs');"
        "ingest_file(engine, load_settings().registry(), Path(sys.argv[3]),"
        " batches=Batches(50))"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(store.port), store.database, str(path)], cwd=REPOSITORY
    )
    deadline = time.monotonic() + 60
    while not rows(store, "select 1 from raw_view_events limit 1"):
        assert child.poll() is None
        assert time.monotonic() < deadline
    child.send_signal(signal.SIGKILL)
    assert child.wait(30) == -signal.SIGKILL
    before = rows(store, "select count(*) from raw_view_events")[0][0]
    report = ingest_file(store, registry, path)
    # The server may still have committed the batch that was under way when its client died.
    assert before <= report.already_present < 30_000
    assert report.accepted + report.already_present == 30_000
    assert stored(store) == list(enumerate(path.read_bytes().splitlines(), 1))


def test_a_truncated_gzip_keeps_what_came_before(
    registry: Registry, store: EngineConfiguration, tmp_path: Path
) -> None:
    draw = random.Random(3)
    lines = [
        json.dumps({"event_id": draw.random(), "viewer_id": 1, "watched_at": n}).encode()
        for n in range(20_000)
    ]
    whole = gzip.compress(b"\n".join(lines))
    path = tmp_path / "views.jsonl.gz"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(EventFileError, match=r"truncated gzip.*get the whole file") as caught:
        ingest_file(store, registry, path)
    kept = stored(store)
    assert f"after line {len(kept)})" in str(caught.value)
    assert 1000 < len(kept) < 20_000
    assert kept == list(enumerate(lines[: len(kept)], 1))
    assert rows(store, "select completed_at from ingest_files") == [(None,)]
    path.write_bytes(whole)
    assert ingest_file(store, registry, path).accepted == 20_000


def test_damage_inside_a_gzip_is_named(
    registry: Registry, store: EngineConfiguration, tmp_path: Path
) -> None:
    content = bytearray(gzip.compress(b'{"event_id":1,"viewer_id":1,"watched_at":1}\n' * 100))
    content[-6] ^= 0xFF
    path = tmp_path / "views.gz"
    path.write_bytes(content)
    with pytest.raises(EventFileError, match="damaged gzip"):
        ingest_file(store, registry, path)
    assert len(stored(store)) == 100


def test_a_shift_ends_now_and_is_remembered(
    registry: Registry, store: EngineConfiguration, tmp_path: Path
) -> None:
    path = tmp_path / "views.jsonl"
    path.write_text(
        '{"event_id":"a","viewer_id":1,"watched_at":"2020-01-01 00:00:00 UTC"}\n'
        '{"event_id":"b","viewer_id":1,"watched_at":"2020-01-02T00:00:00.250Z"}\n'
        '{"event_id":"c","viewer_id":1,"watched_at":1577836800000}\n'
        '{"event_id":"d","viewer_id":1,"watched_at":"never"}\n'
        '{"event_id":"e","viewer_id":1,"watched_at":"2100-01-01T00:00:00Z"}\n'
    )

    def interrupt(_: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ingest_file(store, registry, path, FileOptions(shift_to=NOW), batches=Batches(2, interrupt))
    report = ingest_file(store, registry, path, FileOptions(shift_to=NOW + timedelta(days=9)))
    newest = datetime(2020, 1, 2, 0, 0, 0, 250_000, tzinfo=UTC)
    shift = (NOW - newest) // timedelta(seconds=1)
    assert (report.shift_seconds, report.accepted) == (shift, 3)
    times = [json.loads(data)["watched_at"] for _, data in stored(store)]
    moved = (newest + timedelta(seconds=shift)).replace(tzinfo=None).isoformat() + "Z"
    assert times[1] == moved
    assert timedelta() <= NOW - datetime.fromisoformat(moved) < timedelta(seconds=1)
    assert times[0] == (datetime(2020, 1, 1) + timedelta(seconds=shift)).isoformat() + "Z"
    assert times[2] == 1577836800000 + shift * 1000
    assert times[3] == "never"
    assert ingest_file(store, registry, path).shift_seconds == shift


def test_a_file_first_taken_as_it_is_stays_so(
    registry: Registry, store: EngineConfiguration, tmp_path: Path
) -> None:
    path = write_views(tmp_path / "views.jsonl", 3)
    ingest_file(store, registry, path)
    report = ingest_file(store, registry, path, FileOptions(shift_to=NOW))
    assert report.shift_seconds == 0
    assert "stay as they are" in (report.note or "")


@pytest.mark.skipif(not SAMPLE.is_file(), reason="the REES46 sample is not beside the repository")
def test_the_rees46_sample_is_stored_row_by_row(registry: Registry, store: EngineConfiguration) -> None:
    report = ingest_file(store, registry, SAMPLE, FileOptions(shift_to=NOW))
    assert (report.topic, report.lines, report.accepted) == ("user.events", 1000, 1000)
    with SAMPLE.open(newline="") as file:
        originals = list(csv.DictReader(file))
    shift = timedelta(seconds=report.shift_seconds)
    for (_, data), row in zip(stored(store, "raw_user_events"), originals, strict=True):
        message = json.loads(data)
        assert (message["user_id"], message["item_id"], message["price"], message["session_id"]) == (
            row["user_id"], row["product_id"], row["price"], row["user_session"],
        )  # fmt: skip
        assert message.get("category", "") == row["category_code"]
        assert message.get("brand", "") == row["brand"]
        assert message["event_type"] == row["event_type"].replace("cart", "add_to_cart")
        old = datetime.strptime(row["event_time"], "%Y-%m-%d %H:%M:%S UTC").replace(tzinfo=UTC)
        assert datetime.fromisoformat(message["event_time"]) == old + shift
    assert rows(
        store, "select count(distinct convert_from(data, 'utf8')::json->>'event_id') from raw_user_events"
    ) == [(len({tuple(row.values()) for row in originals}),)]


@pytest.mark.skipif(not SAMPLE.is_file(), reason="the REES46 sample is not beside the repository")
def test_the_rees46_sample_saved_again_by_pandas_counts_once(
    registry: Registry, store: EngineConfiguration, tmp_path: Path
) -> None:
    """An index column in front, another order, floats where a column had gaps, shorter prices, NaN for gaps."""
    with SAMPLE.open(newline="") as file:
        originals = list(csv.DictReader(file))
    order = ["", "price", *(name for name in originals[0] if name != "price")]
    again = tmp_path / "again.csv"
    with again.open("w", newline="") as file:
        writer = csv.DictWriter(file, order)
        writer.writeheader()
        for number, row in enumerate(originals):
            writer.writerow(
                {name: cell or "NaN" for name, cell in row.items()}
                | {"": number, "price": repr(float(row["price"])), "user_id": f"{row['user_id']}.0"}
            )
    ingest_file(store, registry, SAMPLE)
    assert ingest_file(store, registry, again).accepted == len(originals)
    distinct = len({tuple(row.values()) for row in originals})
    identities = (
        "select count(*), count(distinct convert_from(data, 'utf8')::json->>'event_id') from raw_user_events"
    )
    assert rows(store, identities) == [(2 * len(originals), distinct)]


def test_rows_that_cannot_be_read_are_named_with_their_lines(
    registry: Registry, store: EngineConfiguration, tmp_path: Path
) -> None:
    path = tmp_path / "items.csv"
    path.write_bytes(b"item_id,title\n1,good\n2\n3,caf\xe9\n" + b"4,a,b\n" * 6)
    report = ingest_file(store, registry, path)
    assert (report.lines, report.accepted, report.malformed) == (9, 9, 8)
    assert report.examples[:2] == (
        (3, "CSV row with another number of cells than its header: 1 cells, 2 columns"),
        (4, "CSV row that is not UTF-8"),
    )
    assert [line for line, _ in report.examples] == [3, 4, 5, 6, 7]
    held = [json.loads(data) for _, data in stored(store, "raw_items")]
    assert [one.get("row") for one in held] == [None, "2", "3,caf\\xe9", *["4,a,b"] * 6]
    assert base64.b64decode(held[2]["row_base64"]) == b"3,caf\xe9"


def test_a_file_whose_name_is_not_utf8(
    registry: Registry, store: EngineConfiguration, tmp_path: Path
) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9.jsonl")
    path.write_bytes(b'{"event_id":"a","viewer_id":1,"watched_at":1}\n')
    report = ingest_file(store, registry, path)
    assert report.source == f"file:caf\\xe9.jsonl#{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"
    assert rows(store, "select source, path, completed_at is not null from ingest_files") == [
        (report.source, f"{tmp_path}/caf\\xe9.jsonl", True)
    ]
    assert ingest_file(store, registry, path).already_present == 1


def test_a_header_alone_is_an_empty_file(
    registry: Registry, store: EngineConfiguration, tmp_path: Path
) -> None:
    path = tmp_path / "items.csv"
    path.write_text("item_id,title\n")
    with pytest.raises(EventFileError, match="header but no rows"):
        ingest_file(store, registry, path)


def test_an_unreadable_file_is_named(registry: Registry, store: EngineConfiguration, tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root reads every file")
    path = write_views(tmp_path / "views.jsonl", 1)
    path.chmod(0)
    with pytest.raises(EventFileError, match="check its permissions"):
        ingest_file(store, registry, path)


def test_one_content_is_one_topic(registry: Registry, store: EngineConfiguration, tmp_path: Path) -> None:
    path = write_views(tmp_path / "views.jsonl", 1)
    ingest_file(store, registry, path)
    with pytest.raises(EventFileError, match="was ingested as view_events before"):
        ingest_file(store, registry, path, FileOptions("items"))


def test_missing_tables_name_the_remedy(
    registry: Registry, engine: EngineConfiguration, tmp_path: Path
) -> None:
    with pytest.raises(RawStoreError, match=r"no table ingest_files .* `dbt run`"):
        ingest_file(engine, registry, write_views(tmp_path / "views.jsonl", 1))


def test_a_foreign_table_of_the_same_name_is_left_alone(
    registry: Registry, store: EngineConfiguration, tmp_path: Path
) -> None:
    with store.connect() as session:
        session.execute("drop table raw_view_events; create table raw_view_events (mine int)")
    with pytest.raises(RawStoreError, match="other columns than this project's"):
        ingest_file(store, registry, write_views(tmp_path / "views.jsonl", 1))


def test_no_engine(registry: Registry, tmp_path: Path, free_port: Callable[[], int]) -> None:
    nowhere = EngineConfiguration("127.0.0.1", free_port(), "prefs", "prefs")
    with pytest.raises(EngineUnavailable, match="prefs up"):
        ingest_file(nowhere, registry, write_views(tmp_path / "views.jsonl", 1))


def test_an_engine_that_goes_away_keeps_what_it_took(
    registry: Registry, store: EngineConfiguration, tmp_path: Path
) -> None:
    path = write_views(tmp_path / "views.jsonl", 300)

    def cut(progress: Progress) -> None:
        if progress.messages == 100:
            rows(
                store,
                "select pg_terminate_backend(pid) from pg_stat_activity "
                "where datname = current_database() and pid <> pg_backend_pid()",
            )

    with pytest.raises(
        RawStoreError, match=r"connection to the engine .* was lost .* run the same command again"
    ):
        ingest_file(store, registry, path, batches=Batches(100, cut))
    assert len(stored(store)) == 100
    report = ingest_file(store, registry, path)
    assert (report.accepted, report.already_present) == (200, 100)


def test_a_full_disk_is_named(engine: EngineConfiguration) -> None:
    # The server cannot be made to run out of disk here; the error it would raise is raised at the edge.
    with pytest.raises(RawStoreError, match=r"disk is full .* free space"), translated(engine, "raw_items"):
        raise psycopg.errors.DiskFull("could not extend file: No space left on device")


def test_the_insert_path_without_copy_counts_the_same(
    registry: Registry, store: EngineConfiguration, tmp_path: Path
) -> None:
    path = write_views(tmp_path / "views.jsonl", 2500)
    with store.connect() as session:
        session.execute(
            "insert into raw_view_events (source, source_partition, source_offset, data) "
            "values (%s, 0, 7, 'first')",
            (file_source(path),),
        )
    # RisingWave's statements are plain SQL, so the embedded engine runs them too.
    from dagster_prefs.events.raw import RawMessage, RawStore

    with RawStore(store) as writer:
        writer.engine = replace(store, kind="risingwave")
        messages = [RawMessage(0, n, line) for n, line in enumerate(path.read_bytes().splitlines(), 1)]
        assert writer.write(registry.topics["view_events"], file_source(path), messages) == 2499
        assert writer.write(registry.topics["view_events"], file_source(path), messages) == 0
    expected = list(enumerate(path.read_bytes().splitlines(), 1))
    expected[6] = (7, b"first")
    assert stored(store) == expected


def test_rejected_events_are_read_by_topic_and_reason(engine: EngineConfiguration) -> None:
    with pytest.raises(RawStoreError, match="rejected_events"):
        rejected_counts(engine)
    with engine.connect() as session:
        session.execute(
            'create table rejected_events (topic text, source text, "partition" int, "offset" bigint, '
            "reason text, payload text)"
        )
        session.execute(
            "insert into rejected_events values ('items', 'f', 0, 2, 'negative price', 'b'), "
            "('items', 'f', 0, 1, 'negative price', 'a'), ('items', 'f', 0, 3, 'bad price', 'c'), "
            "('view_events', 'f', 0, 1, 'not valid JSON', '{'), "
            "('view_events', 'f', 0, 2, 'genre has 8192 bytes, at most 1024', 'g'), "
            "('view_events', 'f', 0, 3, 'genre has 1025 bytes, at most 1024', 'h')"
        )
    too_long = "genre has too many bytes, at most 1024"
    assert rejected_counts(engine) == {
        "items": {"negative price": 2, "bad price": 1},
        "view_events": {"not valid JSON": 1, too_long: 2},
    }
    # What is counted can be listed, and so can what is listed.
    assert [event.payload for event in rejected_events(engine, reason=too_long)] == ["g", "h"]
    assert [
        event.payload for event in rejected_events(engine, reason="genre has 8192 bytes, at most 1024")
    ] == ["g"]
    assert rejected_events(engine, "items", "negative price", limit=1) == [
        RejectedEvent("items", "f", 0, 1, "negative price", "a")
    ]
    assert len(rejected_events(engine)) == 6
