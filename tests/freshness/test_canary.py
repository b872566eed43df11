"""The canary through the real path: raw table, views, publisher, DynamoDB, profile client."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from typing import Any

import pytest
from declared import PROJECT
from shipped import REGISTRY, VIEWER_KEY, WATCH

from dagster_prefs.declarations.reserved import CANARY_TEXT, canary_of
from dagster_prefs.errors import PrefsError
from dagster_prefs.events.canaries import CanaryKey, canary_events
from dagster_prefs.freshness.canary import (
    CanaryState,
    PathState,
    Probe,
    canary_paths,
    canary_views,
    percentile,
    read_domains,
    read_views,
    send_canary,
)
from dagster_prefs.freshness.levels import Measure
from dagster_prefs.iceberg.export import export_day
from dagster_prefs.serving.profiles import ClientOptions, ProfileClient

DOMAINS = {domain.name for domain in REGISTRY.contract.domains.values()}


class Bench:
    """A probe on a world whose time passes while it waits; `stream` is what the engine does meanwhile."""

    def __init__(self, world: Any, profiles: ProfileClient) -> None:
        self.world = world
        self.state = CanaryState()
        self.stream: Callable[[], None] = self.flow
        self.probe = Probe(
            send=lambda moment: send_canary(world.engine, REGISTRY, moment),
            readers=[
                lambda: read_domains(profiles, canary_of(VIEWER_KEY)),
                lambda: read_views(world.engine, REGISTRY, canary_views(REGISTRY)),
            ],
            paths=canary_paths(REGISTRY),
            thresholds=world.contract.freshness.canary,
            clock=lambda: world.now,
            wait=self.wait,
            poll_seconds=1,
        )

    def flow(self) -> None:
        self.world.refresh()
        self.world.publish()

    def wait(self, seconds: float) -> None:
        self.world.later(seconds=seconds)
        self.stream()

    def run(self, patience: float = 10) -> dict[str, Measure]:
        # The state survives as text, as it does in a sensor's cursor.
        self.state = CanaryState.loads(self.state.dumps())
        self.state, measures = self.probe.run(self.state, patience_seconds=patience)
        return {measure.name: measure for measure in measures}


@pytest.fixture
def bench(world: Any, aws_endpoint: str) -> Iterator[Bench]:
    world.now = world.now.replace(hour=12)
    with ProfileClient(PROJECT, endpoint_url=aws_endpoint, region="eu-central-1") as profiles:
        yield Bench(world, profiles)


def test_a_canary_is_timed_on_every_path(bench: Bench) -> None:
    measures = bench.run()
    assert set(measures) == {*DOMAINS, "shop_user"}
    assert {m.level for m in measures.values()} == {"ok"}
    assert {m.lag_seconds for m in measures.values()} == {1.0}
    assert measures["watch"].values == {"lost": 0, "window": 1, "p50_seconds": 1.0, "p99_seconds": 1.0}
    bench.world.later(seconds=60)
    assert bench.run()["shop_user"].values["window"] == 2


def test_a_publisher_that_stopped_reddens_the_domains_and_not_the_shop(bench: Bench) -> None:
    bench.run()
    bench.stream = bench.world.refresh
    bench.world.later(seconds=60)
    stuck = bench.run(patience=6)
    assert {name for name, m in stuck.items() if m.level == "error"} == DOMAINS
    assert stuck["shop_user"].level == "ok"
    assert stuck["watch"].lag_seconds == pytest.approx(6)
    bench.stream = bench.flow
    bench.world.publish()
    late = bench.run()
    assert {m.level for m in late.values()} == {"ok"}, "a late canary has arrived, the next one is timely"
    assert late["watch"].values["p99_seconds"] == pytest.approx(6)
    assert late["watch"].values["lost"] == 0


def test_a_canary_that_never_arrives_is_lost(bench: Bench) -> None:
    bench.stream = lambda: None
    assert {m.level for m in bench.run().values()} == {"error"}
    bench.world.later(seconds=301)
    lost = bench.run()
    assert {m.values["lost"] for m in lost.values()} == {1}
    assert {m.level for m in lost.values()} == {"error"}
    assert all("the one before was lost" in m.reason for m in lost.values())
    bench.stream = bench.flow
    assert {m.level for m in bench.run().values()} == {"error"}, "the one under way was not timely"
    well = bench.run()
    assert {m.level for m in well.values()} == {"ok"}
    assert {m.values["lost"] for m in well.values()} == {1}


def test_what_cannot_be_sent_is_unknown(bench: Bench) -> None:
    def refuse(moment: datetime) -> None:
        raise PrefsError("no way out")

    bench.probe = Probe(
        refuse,
        bench.probe.readers,
        bench.probe.paths,
        bench.probe.thresholds,
        lambda: bench.world.now,
        bench.wait,
    )
    measures = bench.run().values()
    assert {m.level for m in measures} == {"unknown"}
    assert all("no way out" in m.reason for m in measures)


def test_what_cannot_be_read_is_never_green(bench: Bench, free_port: Callable[[], int]) -> None:
    with ProfileClient(
        PROJECT,
        endpoint_url=f"http://127.0.0.1:{free_port()}",
        region="eu-central-1",
        options=ClientOptions(budget_seconds=0.2),
    ) as profiles:
        bench.probe = Probe(
            bench.probe.send,
            [lambda: read_domains(profiles, canary_of(VIEWER_KEY)), bench.probe.readers[1]],
            bench.probe.paths,
            bench.probe.thresholds,
            lambda: bench.world.now,
            bench.wait,
            poll_seconds=1,
        )
        measures = bench.run(patience=2)
    assert {name for name, m in measures.items() if m.level == "unknown"} == DOMAINS
    assert measures["shop_user"].level == "ok"


def test_a_canary_of_another_clock_is_not_taken_for_ours(bench: Bench) -> None:
    """Sent by a machine of this deployment whose clock is an hour ahead: it would make every later one seem read."""
    bench.run()
    send_canary(bench.world.engine, REGISTRY, bench.world.now + timedelta(hours=1))
    bench.flow()
    bench.stream = lambda: None
    measures = bench.run()
    assert {m.level for m in measures.values()} == {"error"}
    assert "is dated 3590 s ahead of this clock: correct the clock" in measures["watch"].reason
    assert {m.values["window"] for m in measures.values()} == {1}


def test_the_canary_is_in_no_training_table(bench: Bench) -> None:
    world = bench.world
    moment = world.now - timedelta(days=1)
    send_canary(world.engine, REGISTRY, moment)
    world.watch(5, days_ago=1)
    world.refresh()
    assert world.execute("select count(*) from viewer_watch_metrics_1d") == [(2,)]
    report = export_day(world.engine, world.catalog, WATCH, moment.date())
    assert report.rows == 1


def test_every_message_is_valid(bench: Bench) -> None:
    send_canary(bench.world.engine, REGISTRY, bench.world.now)
    bench.world.refresh()
    assert bench.world.execute("select topic, reason from rejected_events") == []
    assert bench.world.execute("select user_id from user_category_profile") == [(CANARY_TEXT,)]
    messages = canary_events(REGISTRY, CanaryKey.random(), bench.world.now)
    assert set(messages) == set(bench.world.contract.freshness.topics)


@pytest.mark.parametrize("text", [None, "", "{", "[]", '{"watch": 1}', '{"watch": ["x"]}'])
def test_an_unreadable_cursor_is_a_fresh_start(text: str | None) -> None:
    assert CanaryState.loads(text) == CanaryState()


def test_the_cursor_stays_small() -> None:
    path = PathState(1_800_000_000_000, tuple(12.345 for _ in range(200)), 99, True)
    state = CanaryState(dict.fromkeys(("watch", "interactions", "preferences", "shop_user"), path))
    assert CanaryState.loads(state.dumps()) == state
    assert len(state.dumps()) < 8_000


def test_percentiles_are_of_the_nearest_rank() -> None:
    values = [float(number) for number in range(100, 0, -1)]
    assert (percentile(values, 0.5), percentile(values, 0.99), percentile(values, 1)) == (50, 99, 100)
    assert percentile([7.0], 0.99) == 7
