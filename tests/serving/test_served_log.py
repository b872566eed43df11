"""The served log: what it holds of an answer, whom it samples, and that a read never waits for it."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import botocore.session
import pytest
from botocore.stub import Stubber
from scripted_dynamodb import Reply, Request, Script, answer, failure
from served import REGION, SERVED, running
from shipped import LONG, SHORT

from dagster_prefs.dynamodb.items import ItemEncoder
from dagster_prefs.served_rows import BadRow, ServedRow, parse_row, row_values
from dagster_prefs.serving import AsyncProfileClient, ClientOptions, ProfileClient, ServedLog, served_log
from dagster_prefs.serving.observing import Watched
from dagster_prefs.serving.served_log import (
    FileRows,
    FirehoseRows,
    KafkaRows,
    LogCounts,
    LogError,
    RowSink,
    called,
)

CONTRACT = SERVED.contract
WATCH = CONTRACT.domain("watch")
PREFERENCES = CONTRACT.domain("preferences")
AT = 1_764_500_000_000
VALUES = {
    "engagement#watch": [Decimal("12.5"), Decimal("40.123456"), 3, 2, 5, AT],
    "engagement#preferences": [
        None,
        ["Krimi ß", "=1"],
        [Decimal("0.75"), Decimal("0.25")],
        None,
        Decimal(1),
        AT,
    ],
}


class Kept:
    """A sink that keeps rows, or fails, or waits, as a test says."""

    def __init__(self) -> None:
        self.rows: list[ServedRow] = []
        self.go = threading.Event()
        self.go.set()
        self.failures = 0
        self.closed = False

    def write(self, rows: Sequence[ServedRow]) -> None:
        self.go.wait(30)
        if self.failures:
            self.failures -= 1
            raise OSError("the disk is full")
        self.rows += rows

    def close(self) -> None:
        self.closed = True


def reply(request: Request) -> Reply:
    """Items of every viewer for two domains; nothing for the others, and of viewer 13 the first domain fails."""

    def item(key: dict[str, Any]) -> dict[str, Any] | None:
        domain = key["domain_key"]["S"]
        if domain not in VALUES:
            return None
        return ItemEncoder(CONTRACT, CONTRACT.domain(domain)).encode(
            int(key["viewer_id"]["N"]), VALUES[domain]
        )

    if request.operation == "GetItem":
        key = request.body["Key"]
        if (key["viewer_id"]["N"], key["domain_key"]["S"]) == ("13", "engagement#watch"):
            return failure("InternalServerError", status=500)
        found = item(key)
        return answer({"Item": found} if found else {})
    ((table, asked),) = request.body["RequestItems"].items()
    items = [made for key in asked["Keys"] if (made := item(key)) is not None]
    return answer({"Responses": {table: items}, "UnprocessedKeys": {}})


@pytest.fixture
def store(script: Script) -> Script:
    script.behave = reply
    return script


@contextmanager
def logged(
    script: Script, sink: RowSink, share: float = 1.0, **given: Any
) -> Iterator[tuple[ProfileClient, ServedLog]]:
    log = ServedLog(sink, share=share, **{"flush_seconds": 0.01, **given})
    options = ClientOptions(30, read_timeout_seconds=30, max_attempts=1, log=log)
    try:
        with ProfileClient(SERVED, endpoint_url=script.endpoint, region=REGION, options=options) as client:
            yield client, log
    finally:
        log.close()


def test_a_row_says_all_of_what_was_served(store: Script) -> None:
    sink = Kept()
    with logged(store, sink, clock=lambda: 1_764_500_001.25) as (client, log):
        with called(request_id="r-1", variant="b"):
            profile = client.get(7, ["watch", "preferences"])
        client.get(13, ["watch", "interactions"], consistent=True)
        client.get(13, ["watch"], fallback="cold_start")
        assert log.flush()
        assert log.counts == LogCounts(written=5, dropped=0, failures=0)
    assert sink.closed
    first, second, failed, new, instead = sink.rows
    assert first == replace(
        first,
        served_at=datetime.fromtimestamp(1_764_500_001.25, UTC), entity="viewer", key="7", domain="engagement#watch",
        contract_version=CONTRACT.version, state="found", error=None, last_event_at=AT, unknown=(), partial=False,
        consistent=False, request_id="r-1", variant="b",
    )  # fmt: skip
    assert 0 < first.read_seconds < 30
    assert len({row.row_id for row in sink.rows}) == 5
    # From the line that is written, every value as the client gave it.
    for row, domain in ((first, WATCH), (second, PREFERENCES)):
        again = parse_row(row.as_json())
        assert again == replace(row, attributes=again.attributes)
        values = row_values(again, domain)
        assert values == {
            name: getattr(profile.domain(domain.name), name)
            for name in domain.attributes
            if name != "last_event_at"
        }
    assert (failed.state, failed.error, failed.attributes, failed.partial) == (
        "failed",
        "unavailable",
        None,
        True,
    )
    assert (failed.consistent, failed.request_id, failed.variant) == (True, None, None)
    assert row_values(parse_row(failed.as_json()), WATCH) is None
    assert (new.state, new.error, new.last_event_at, new.partial) == ("cold_start", None, None, True)
    assert new.attributes == {f"likes_{LONG}d": 0, f"shares_{LONG}d": 0, f"searches_{LONG}d": 0}
    assert (instead.state, instead.error) == ("cold_start", "unavailable")


def test_a_sample_follows_the_same_ids(store: Script) -> None:
    sink = Kept()
    with logged(store, sink, share=0.1) as (client, log):
        client.get_many(range(2_000), ["watch"])
        client.get_many(range(2_000), ["watch"])
        assert log.flush()
    times = Counter(row.key for row in sink.rows)
    assert set(times.values()) == {2}
    assert 140 < len(times) < 260
    with pytest.raises(LogError, match=r"must be a number from 0 to 1, not 1\.5"):
        ServedLog(sink, share=1.5)


def test_nobody_is_logged_at_a_share_of_nothing(store: Script) -> None:
    sink = Kept()
    with logged(store, sink, share=0) as (client, log):
        client.get_many(range(100), ["watch"])
        assert log.flush()
        assert log.counts == LogCounts(0, 0, 0)


def test_a_full_queue_drops_and_counts_and_no_read_waits(store: Script) -> None:
    sink = Kept()
    sink.go.clear()
    with logged(store, sink, queue_limit=10) as (client, log):
        client.get_many(range(100), ["watch", "interactions"])
        # Of the first the thread may have taken some, which wait for the sink.
        dropped = log.counts.dropped
        assert 100 <= dropped <= 180
        assert dropped % 2 == 0
        sink.go.set()
        assert log.flush()
        assert log.counts == LogCounts(written=200 - dropped, dropped=dropped, failures=0)
    assert len(sink.rows) == 200 - dropped


def test_a_sink_that_fails_is_tried_again_and_then_given_up(
    store: Script, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(served_log, "FIRST_PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(served_log, "ATTEMPTS", 3)
    sink = Kept()
    with logged(store, sink) as (client, log):
        sink.failures = 2
        client.get(1, ["watch"])
        assert log.flush()
        assert log.counts == LogCounts(written=1, dropped=0, failures=2)
        sink.failures = 3
        client.get(2, ["watch"])
        assert log.flush()
        assert log.counts == LogCounts(written=1, dropped=1, failures=5)
        client.get(3, ["watch"])
        assert log.flush()
    assert [row.key for row in sink.rows] == ["1", "3"]
    # Once a minute, and without an id.
    assert [one.getMessage() for one in caplog.records] == [
        "the served log does not accept rows (OSError: the disk is full)"
    ]


def rows_of(count: int, size: int = 0) -> list[ServedRow]:
    return [
        ServedRow(
            f"log-{number}", datetime(2026, 1, 1, tzinfo=UTC), 0.001, "viewer", str(number), "engagement#watch", 1,
            "found", None, {"text": "x" * size}, 5, (), False, False, None, None,
        )
        for number in range(count)
    ]  # fmt: skip


def test_files_rotate_and_only_their_owner_reads_them(tmp_path: Path) -> None:
    folder = tmp_path / "log"
    sink = FileRows(folder, max_bytes=1_000)
    for row in rows_of(10):
        sink.write([row])
    (growing,) = folder.glob("*.open")
    sink.close()
    files = sorted(folder.iterdir(), key=lambda path: int(path.stem.rpartition("-")[2]))
    assert {path.suffix for path in files} == {".jsonl"}
    assert len(files) == 3
    assert growing.with_suffix("") == files[-1]
    lines = [line for path in files for line in path.read_bytes().splitlines()]
    assert [parse_row(line).key for line in lines] == [str(number) for number in range(10)]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}
    assert folder.stat().st_mode & 0o777 == 0o700
    # By time as well, and two logs in a folder have files of their own.
    hurried = FileRows(folder, max_seconds=0)
    hurried.write(rows_of(1))
    hurried.write(rows_of(1))
    hurried.close()
    assert len(list(folder.iterdir())) == 5


def test_a_batch_is_in_a_file_as_a_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = FileRows(tmp_path / "log")
    sink.write(rows_of(1))
    file = sink._opened()

    class Full:
        """A file on a disk that takes half of a line."""

        def write(self, data: bytes) -> int:
            file.write(data[: len(data) // 2])
            file.flush()
            raise OSError(28, "No space left on device")

        def __getattr__(self, name: str) -> Any:
            return getattr(file, name)

    sink._file = Full()  # type: ignore[assignment]
    with pytest.raises(OSError, match="No space"):
        sink.write(rows_of(2))
    sink.write(rows_of(2))
    sink.close()
    lines = [line for path in (tmp_path / "log").iterdir() for line in path.read_bytes().splitlines()]
    assert sorted(parse_row(line).row_id for line in lines) == ["log-0", "log-0", "log-1"]


def test_rows_go_to_kafka_by_id_and_over_a_new_producer_after_a_failure() -> None:
    sent: list[tuple[str, bytes, bytes | None]] = []
    made: list[Any] = []

    class Producer:
        def __init__(self) -> None:
            made.append(self)
            self.broken = len(made) == 1

        def send(self, topic: str, value: bytes, key: bytes | None = None) -> None:
            sent.append((topic, value, key))

        def flush(self) -> None:
            if self.broken:
                raise OSError("not delivered")

    sink = KafkaRows(Producer, "served")
    with pytest.raises(OSError, match="not delivered"):
        sink.write(rows_of(1))
    sink.write(rows_of(2))
    sink.close()
    assert len(made) == 2
    assert [(topic, key) for topic, _, key in sent] == [("served", b"0"), ("served", b"0"), ("served", b"1")]
    # The row that came twice has one id.
    assert parse_row(sent[0][1]).row_id == parse_row(sent[1][1]).row_id


def test_rows_go_to_firehose_within_its_limits() -> None:
    client = botocore.session.get_session().create_client(
        "firehose", region_name=REGION, aws_access_key_id="a", aws_secret_access_key="b"
    )
    sizes: list[int] = []

    def record(params: dict[str, Any], **_: Any) -> None:
        sizes.append(len(params["Records"]))
        assert params["DeliveryStreamName"] == "served"
        assert all(one["Data"].endswith(b"\n") for one in params["Records"])
        assert sum(len(one["Data"]) for one in params["Records"]) <= 4_000_000

    client.meta.events.register("provide-client-params.firehose.PutRecordBatch", record)
    sink = FirehoseRows(client, "served")
    with Stubber(client) as stub:
        for count, failed in ((500, 0), (100, 0), (4, 0), (1, 0), (2, 1)):
            answers = [{"ErrorCode": "ServiceUnavailableException", "ErrorMessage": "slow"}] * failed
            answers += [{"RecordId": "1"}] * (count - failed)
            stub.add_response("put_record_batch", {"FailedPutCount": failed, "RequestResponses": answers})
        sink.write(rows_of(600))
        # By bytes too.
        sink.write(rows_of(5, size=999_000))
        with pytest.raises(
            LogError, match=r"Firehose served rejected 1 of 2 rows \(ServiceUnavailableException\)"
        ):
            sink.write(rows_of(2))
    assert sizes == [500, 100, 4, 1, 2]
    with pytest.raises(LogError, match="and Firehose takes 1000000"):
        sink.write(rows_of(1, size=1_000_000))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"served_at": "2026-01-01T00:00:00"}, "needs a zone"),
        ({"state": "guessed"}, "state is one of found, cold_start, failed"),
        ({"row_id": None, "served_at": 5}, "no row of the served log"),
    ],
)
def test_a_line_that_is_no_row_is_named(change: dict[str, Any], message: str) -> None:
    line = json.dumps({**json.loads(rows_of(1)[0].as_json()), **change}).encode()
    with pytest.raises(BadRow, match=message):
        parse_row(line)
    with pytest.raises(BadRow, match="'half' is no row"):
        parse_row(b"half")


def test_values_of_another_version_are_left_out_and_wrong_types_named() -> None:
    (row,) = rows_of(1)
    name = f"titles_{SHORT}d"
    assert row_values(replace(row, attributes={"old": 1, name: 3}), WATCH) == {name: 3}
    for wrong in ("3", 3.5, True, [3]):
        with pytest.raises(BadRow, match=rf"row log-0: watch\.{name} is .* which is no integer"):
            row_values(replace(row, attributes={name: wrong}), WATCH)


def test_the_server_logs_with_the_requests_id_and_variant_and_tells_its_counts(
    store: Script, tmp_path: Path
) -> None:
    log = ServedLog(FileRows(tmp_path), share=1.0, flush_seconds=0.01)
    client = AsyncProfileClient(
        SERVED,
        endpoint_url=store.endpoint,
        region=REGION,
        options=ClientOptions(30, read_timeout_seconds=30, log=log),
    )
    with running(client, None, watched=Watched(log=log)) as caller:
        headers = {"x-request-id": "req-7"}
        assert caller.call("GET", "/v1/profiles/7?domains=watch&variant=b", headers=headers)[0] == 200
        assert caller.post({"viewer_ids": [8, 9], "domains": ["watch"]})[0] == 200
        status, told = caller.get(f"/v1/profiles/7?variant={'v' * 200}")
        assert (status, told["error"]["code"]) == (400, "bad_request")
        assert "give at most 128" in told["error"]["message"]
        assert log.flush()
        metrics = caller.get("/metrics")[1]
        assert "prefs_server_log_rows_total 3.0" in metrics
        assert "prefs_server_log_dropped_total 0.0" in metrics
    # The server closed it.
    rows = [parse_row(line) for path in tmp_path.glob("*.jsonl") for line in path.read_bytes().splitlines()]
    assert [(row.key, row.variant) for row in rows] == [("7", "b"), ("8", None), ("9", None)]
    assert rows[0].request_id == "req-7"
    assert rows[1].request_id
    assert rows[1].request_id == rows[2].request_id
