"""Status, metrics, dashboard and alerts: the same numbers, shown four ways."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from rich.console import Console

from dagster_prefs.declarations.contract import Freshness
from dagster_prefs.freshness.alerts import AlertError, Webhook, remembered, transitions
from dagster_prefs.freshness.levels import LEVELS, Measure, judge, worst
from dagster_prefs.freshness.metrics import MetricsError, MetricsServer, metric_names, render_metrics
from dagster_prefs.freshness.status import EXIT_CODES, Sources, Status, duration, evaluate, render_status
from dagster_prefs.platform import Platform
from dagster_prefs.settings import Settings

ROOT = Path(__file__).parents[2]
THRESHOLDS = Freshness(3, 5)
AT = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)


def measure(level: Any = "ok", name: str = "watch", **fields: Any) -> Measure:
    return Measure("online", name, level, fields.pop("reason", "because"), **fields)


@pytest.fixture
def sources(world: Any, aws_endpoint: str) -> Sources:
    return Platform(
        Settings(
            engine_port=world.engine.port,
            engine_database=world.engine.database,
            engine_user=world.engine.user,
            aws_endpoint_url=aws_endpoint,
            iceberg_warehouse=world.warehouse.as_uri(),
        )
    ).sources


@pytest.mark.parametrize(
    ("lag", "level"), [(0, "ok"), (2.999, "ok"), (3, "warn"), (4.999, "warn"), (5, "error"), (9e9, "error")]
)
def test_thresholds_begin_where_they_stand(lag: float, level: str) -> None:
    assert judge(lag, THRESHOLDS) == level


def test_the_worst_level_decides_the_exit_code() -> None:
    assert worst([]) == "ok"
    assert [worst([level, "ok"]) for level in LEVELS] == list(LEVELS)
    codes = [Status(AT, 0, (measure(), measure(level))).exit_code for level in LEVELS]
    assert codes == [0, 0, 0, 1, 2, 2]
    assert list(EXIT_CODES) == list(LEVELS)


def test_status_reads_every_stage(world: Any, sources: Sources) -> None:
    status = evaluate(sources, now=lambda: world.now)
    assert status.level == "ok", [m for m in status.measures if m.level not in ("ok", "skipped")]
    stages = {m.stage for m in status.measures}
    assert stages == {"engine", "ingestion", "views", "online", "offline"}
    assert {m.stage for m in status.measures if m.level == "skipped"} == {"ingestion", "engine"}
    world.watch(1, age=10)
    late = evaluate(sources, now=lambda: world.now)
    assert (late.level, late.exit_code) == ("error", 2)
    again = json.loads(json.dumps(late.as_dict()))
    assert again["level"] == "error"
    (found,) = [m for m in again["measures"] if m["name"] == "view_events" and m["stage"] == "views"]
    assert found["lag_seconds"] == pytest.approx(10)
    assert found["thresholds"] == {"warn_seconds": 3, "error_seconds": 5}


def test_a_status_makes_no_table(world: Any, sources: Sources) -> None:
    world.client.delete_table(TableName=world.table.name)
    levels = {m.level for m in sources.online(world.now)}
    assert levels == {"unknown"}
    assert world.client.list_tables()["TableNames"] == []


def test_the_screen_names_every_measure_and_the_sum(world: Any, sources: Sources) -> None:
    world.watch(1, age=10)
    status = evaluate(sources, now=lambda: world.now)
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render_status(status))
    text = console.export_text()
    assert all(m.name in text for m in status.measures)
    assert "1 messages arrived and are not visible, for 10.0 s" in text
    assert text.rstrip().splitlines()[-1].startswith("error")


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(None, ""), (0, "0.0 s"), (119.94, "119.9 s"), (120, "2 min"), (3600, "1.0 h"), (200_000, "2.3 d")],
)
def test_durations(seconds: float | None, shown: str) -> None:
    assert duration(seconds) == shown


SAMPLE = re.compile(r'^(\w+)(?:\{((?:\w+="(?:[^"\\\n]|\\["\\n])*",?)*)\})? (\S+)$')


def parse(text: str) -> dict[tuple[str, str], float]:
    """The samples of an exposition; raises where a line is not of the format."""
    assert text.endswith("\n")
    found: dict[tuple[str, str], float] = {}
    typed = set()
    for line in text.splitlines():
        if line.startswith("# TYPE "):
            assert line.split()[2] not in typed, "one TYPE line per metric"
            typed.add(line.split()[2])
        if line.startswith("#"):
            continue
        match = SAMPLE.match(line)
        assert match, line
        assert match[1] in typed
        key = (match[1], match[2] or "")
        assert key not in found, f"{key} twice"
        found[key] = float(match[3])
    return found


def test_metrics_are_the_numbers_of_the_status(world: Any, sources: Sources) -> None:
    world.watch(2, age=20, completion_pct=7)
    world.refresh()
    world.watch(1, age=10)
    samples = parse(render_metrics(evaluate(sources, now=lambda: world.now)))
    where = 'name="view_events",stage="views"'
    assert samples["prefs_lag_seconds", where] == pytest.approx(10)
    assert samples["prefs_lag_error_seconds", where] == 5
    assert samples["prefs_view_waiting", where] == 1
    assert samples["prefs_messages_total", where] == 1
    assert samples["prefs_rejected_events_total", where] == 1
    assert samples["prefs_level", 'level="error",' + where] == 1
    assert samples["prefs_level", 'level="ok",' + where] == 0
    assert samples["prefs_online_sampled", 'name="watch",stage="online"'] == 0
    assert samples["prefs_status_timestamp_seconds", ""] == pytest.approx(world.now.timestamp())
    assert {name for name, _ in samples} <= set(metric_names())


def test_what_was_not_read_has_no_sample() -> None:
    text = render_metrics(Status(AT, 0.5, (measure("unknown", reason='a "quoted"\nreason'),)))
    samples = parse(text)
    assert "prefs_lag_seconds" not in {name for name, _ in samples}
    assert samples["prefs_level", 'level="unknown",name="watch",stage="online"'] == 1


def test_labels_are_escaped() -> None:
    samples = parse(render_metrics(Status(AT, 0, (measure(name='a"b\\c\nd', lag_seconds=1.5),))))
    assert samples["prefs_lag_seconds", r'name="a\"b\\c\nd",stage="online"'] == 1.5


def test_metrics_are_served_and_one_reading_serves_many_scrapes() -> None:
    readings = []

    def read() -> Status:
        readings.append(1)
        return Status(AT, 0.5, (measure(lag_seconds=1.0),))

    with MetricsServer(read, port=0) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            where = f"http://127.0.0.1:{server.server_port}"
            for _ in range(3):
                with urllib.request.urlopen(f"{where}/metrics", timeout=60) as answer:
                    assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
                    assert ("prefs_lag_seconds", 'name="watch",stage="online"') in parse(
                        answer.read().decode()
                    )
            with pytest.raises(urllib.error.HTTPError, match="404"):
                urllib.request.urlopen(f"{where}/", timeout=60)
            with pytest.raises(MetricsError, match="choose another port"):
                MetricsServer(read, port=server.server_port)
        finally:
            server.shutdown()
            thread.join()
    assert len(readings) == 1


def test_the_dashboard_asks_only_for_metrics_that_exist() -> None:
    dashboard = json.loads((ROOT / "infra/grafana/freshness.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    asked = {name for text in expressions for name in re.findall(r"\bprefs_\w+", text)}
    assert asked <= set(metric_names())
    assert {"prefs_lag_seconds", "prefs_level", "prefs_canary_p99_seconds", "prefs_follower_alive"} <= asked
    identifiers = [panel["id"] for panel in dashboard["panels"]]
    assert len(identifiers) == len(set(identifiers))
    places = [tuple(panel["gridPos"].values()) for panel in dashboard["panels"]]
    assert len(places) == len(set(places))


class Receiver:
    """A webhook on this machine that answers by plan and keeps what it got."""

    def __init__(self, answers: list[int]) -> None:
        self.bodies: list[Any] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.bodies.append(json.loads(body))
                self.send_response(answers.pop(0) if answers else 200)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/services/T0/SECRET"
        self.thread = Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def receive() -> Iterator[Callable[..., Receiver]]:
    made: list[Receiver] = []

    def start(*answers: int) -> Receiver:
        made.append(Receiver(list(answers)))
        return made[-1]

    yield start
    for receiver in made:
        receiver.close()


def hook(receiver: Receiver) -> Webhook:
    return Webhook(receiver.url, wait=lambda seconds: None)


def test_each_transition_is_told_once() -> None:
    known: dict[str, Any] = {}
    told = []
    for level in ("ok", "warn", "warn", "error", "error", "unknown", "skipped", "ok"):
        changed = transitions(known, [measure(level), measure("ok", "interactions")])
        told.append([(one.before, one.after) for one in changed])
        known = remembered(known, changed)
    assert told == [[], [("ok", "warn")], [], [("warn", "error")], [], [], [("error", "ok")], []]
    assert known == {}


def test_a_message_lists_the_worst_first(receive: Callable[..., Receiver]) -> None:
    receiver = receive()
    measures = [measure("warn", "a"), measure("error", "b", reason="stuck"), measure("ok", "c")]
    hook(receiver).tell(transitions({"online/c": "warn"}, measures), at=AT)
    (body,) = receiver.bodies
    assert list(body) == ["text"]
    lines = body["text"].splitlines()
    assert lines[0] == "dagster-prefs, 2026-03-01 12:00:00 UTC"
    assert [line.split()[1] for line in lines[1:]] == ["online/b:", "online/a:", "online/c:"]
    assert lines[1].endswith("ok → error: stuck")


def test_nothing_is_sent_for_no_transition(receive: Callable[..., Receiver]) -> None:
    receiver = receive()
    hook(receiver).tell([], at=AT)
    assert receiver.bodies == []


def test_a_webhook_that_stumbles_is_tried_again(receive: Callable[..., Receiver]) -> None:
    receiver = receive(503, 429)
    hook(receiver).send("hello")
    assert len(receiver.bodies) == 3


@pytest.mark.parametrize(("answers", "requests"), [((500, 500, 500), 3), ((404,), 1)])
def test_a_webhook_that_refuses_says_so_without_its_secret(
    receive: Callable[..., Receiver], answers: tuple[int, ...], requests: int
) -> None:
    receiver = receive(*answers)
    with pytest.raises(AlertError, match=rf"127.0.0.1 .*it answered {answers[0]}") as caught:
        hook(receiver).send("hello")
    assert "SECRET" not in str(caught.value)
    assert len(receiver.bodies) == requests


def test_a_webhook_that_is_down_says_so(free_port: Callable[[], int]) -> None:
    webhook = Webhook(f"http://127.0.0.1:{free_port()}/x", wait=lambda seconds: None)
    with pytest.raises(AlertError, match="did not accept the message"):
        webhook.send("hello")


@pytest.mark.parametrize("url", ["http://example.com/x", "file:///etc/passwd", "hooks.example.com", ""])
def test_a_webhook_that_is_no_https_url_is_refused(url: str) -> None:
    with pytest.raises(AlertError, match="https"):
        Webhook(url)
