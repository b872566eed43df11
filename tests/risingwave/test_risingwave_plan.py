"""A changed model on a real RisingWave: planned, swapped without a gap, killed at every step and continued."""

from __future__ import annotations

import json
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient, NewTopic
from psycopg import sql
from risingwave_server import PROJECT, URL, server_of
from shipped import LONG
from workshop import accept

from dagster_prefs.declarations.contract import Contract, build_contract, parse_contract
from dagster_prefs.deploy.apply import ApplyError, PlanError, apply_plan
from dagster_prefs.deploy.plan import ContractReview, Plan, make_plan
from dagster_prefs.dynamodb.store import DomainStore
from dagster_prefs.dynamodb.tables import TableReport, dynamodb_client, provision
from dagster_prefs.engine.catalog import read_catalog
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.engine.dbt import Dbt
from dagster_prefs.freshness.reconcile import reconcile_domain
from dagster_prefs.platform import review_contract

pytestmark = pytest.mark.skipif(not URL, reason="PREFS_RISINGWAVE_URL names no RisingWave server")

TILE = "models/engagement/viewer_watch_metrics_1d.sql"
ROLLING = "viewer_engagement_rolling"
LAKE_SINK = "sink_training_watch"
# One domain from its topic to its sink, because every relation of the server takes seconds to make.
KEPT = (
    "models/groups.yml", "models/engagement/groups.yml", "models/generated/events/raw_view_events",
    "models/generated/events/sources",
    "models/generated/events/view_events", "models/engagement/view_events",
    "models/engagement/viewer_watch_metrics_1d", "models/engagement/viewer_engagement_rolling",
    "models/generated/operations/deployments", "models/generated/operations/erased_subjects",
    "models/generated/sinks/sink_engagement_watch", "models/generated/events/kafka_view_events",
    "models/generated/operations/kafka_topics", "models/generated/operations/canary_keys",
)  # fmt: skip
MINUTES = {1: Decimal(10), 2: Decimal(20), 3: Decimal(30)}


def review(fragments: Sequence[Mapping[str, Any]], manifest: Mapping[str, Any]) -> ContractReview:
    return review_contract(parse_contract(build_contract(manifest)), fragments, manifest)


@dataclass
class Items:
    """The DynamoDB table of the tests, or only a memory of what was asked where there is none."""

    engine: EngineConfiguration
    contract: Contract
    client: Any
    prefix: str
    asked: list[str] = field(default_factory=list)

    @property
    def table(self) -> TableReport:
        return provision(self.client, self.contract, prefix=self.prefix)["viewer"]

    def prepare(self) -> None:
        self.asked.append("prepare")
        if self.client:
            assert self.table.status == "ACTIVE"

    def reconcile(self, relation: str) -> str:
        self.asked.append(relation)
        if self.client:
            domain = self.contract.domain("watch")
            store = DomainStore(self.engine, self.client, self.contract, domain, self.table)
            reconcile_domain(store, now=datetime.now(UTC), grace_seconds=2)
        return f"{relation} reconciled"

    def minutes(self) -> dict[int, Decimal]:
        """Viewer → minutes of the long window in DynamoDB."""
        found = self.client.scan(TableName=f"{self.prefix}viewer_profiles", ConsistentRead=True)["Items"]
        return {int(item["viewer_id"]["N"]): Decimal(item[f"watch_minutes_{LONG}d"]["N"]) for item in found}


@dataclass
class Server:
    """The reduced project on a database of its own."""

    engine: EngineConfiguration
    dbt: Dbt
    items: Items
    folder: Path
    environment: Mapping[str, str]

    def plan(self) -> Plan:
        return make_plan(self.engine, self.dbt, review)

    def apply(
        self, on_step: Callable[[str], None] = lambda step: None, *, drop_orphans: bool = False
    ) -> Plan:
        return apply_plan(
            self.engine, self.dbt, review, self.items, drop_orphans=drop_orphans, on_step=on_step
        )

    def set(self, **environment: str) -> None:
        """Run dbt with other settings from now on."""
        self.environment = {**self.environment, **environment}
        self.dbt = Dbt(self.engine, self.folder, self.folder / "target", self.environment)

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        with self.engine.connect() as connection:
            return connection.execute(query).fetchall()

    def minutes(self) -> dict[int, Decimal]:
        return dict(self.rows(f"select viewer_id, watch_minutes_{LONG}d from {ROLLING}"))

    def objects(self) -> dict[str, tuple[int, str]]:
        return {
            name: (id_, definition)
            for id_, name, definition in self.rows(
                "select r.id, r.name, r.definition from rw_catalog.rw_relations r"
                " join rw_catalog.rw_schemas n on n.id = r.schema_id where n.name = 'public'"
            )
        }

    def change(self, old: str, new: str) -> None:
        file = self.folder / TILE
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new))
        accept(self.folder)


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, shell_environment: Mapping[str, str]
) -> Iterator[Server]:
    """One domain deployed by `apply` on an empty database, with events in; all of it is dropped afterwards."""
    from oracle import Message, micros

    folder = tmp_path_factory.mktemp("reduced") / "dbt_project"
    shutil.copytree(PROJECT, folder, ignore=shutil.ignore_patterns("target", "logs"))
    for file in (folder / "models").rglob("*.*"):
        if not str(file.relative_to(folder)).startswith(KEPT) or file.name.endswith("_tests.yml"):
            file.unlink()
    # In the place of an Iceberg sink, which needs a catalog.
    (folder / f"models/generated/sinks/{LAKE_SINK}.sql").write_text(
        "{{ config(materialized='sink', meta={'training_table': 'viewer_watch_daily'}) }}\n"
        "create sink {{ this }} from {{ ref('viewer_watch_metrics_1d') }}"
        " with (connector = 'blackhole', type = 'append-only', force_append_only = 'true')\n"
    )
    # Who reads the one domain that is kept; the example's own file names all of them.
    (folder / "models/engagement/exposures.yml").write_text(
        "exposures:\n  - name: recommendation_service\n    type: application\n"
        "    owner: { name: Recommendations, email: recommendations@example.com }\n"
        "    depends_on: [ref('sink_engagement_watch')]\n"
    )
    accept(folder)
    name = f"prefs_{uuid.uuid4().hex[:12]}"
    place = server_of(URL)
    with place.connect() as connection:
        connection.execute(sql.SQL("create database {}").format(sql.Identifier(name)))
    engine = place.with_database(name)
    endpoint = shell_environment.get("AWS_ENDPOINT_URL", "")
    environment = {"PREFS_TABLE_PREFIX": f"{name}_"}
    if endpoint:
        cloud = {key: shell_environment[key] for key in shell_environment if key.startswith("AWS_")}
        environment |= {"PREFS_PUBLISH": "sink", **cloud}
    else:
        environment |= {"PREFS_PUBLISH": "publisher"}
    # Every plan of this suite has a feed beside the views, where there are brokers.
    bootstrap, topic = shell_environment.get("PREFS_KAFKA_BOOTSTRAP", ""), f"{name}_view_events"
    environment |= {"PREFS_KAFKA_BOOTSTRAP": bootstrap, "PREFS_KAFKA_TOPIC_VIEW_EVENTS": topic}
    admin = AdminClient({"bootstrap.servers": bootstrap}) if bootstrap else None
    # An AdminClient has a length, that of its queue, and so is false when nothing waits.
    if admin is not None:
        admin.create_topics([NewTopic(topic, 1, 1)])[topic].result(30)
    dbt = Dbt(engine, folder, folder / "target", environment)
    contract = parse_contract(build_contract(dbt.manifest()))
    with pytest.MonkeyPatch.context() as patch:
        for key, value in environment.items():
            if key.startswith("AWS_"):
                patch.setenv(key, value)
        client = dynamodb_client(endpoint, environment.get("AWS_REGION", "us-east-1")) if endpoint else None
        made = Server(engine, dbt, Items(engine, contract, client, f"{name}_"), folder, environment)
        try:
            first = made.apply()
            assert {relation.action for relation in first.relations} == {"create"}
            with engine.connect() as connection:
                now = micros(connection.execute("select now()").fetchall()[0][0])
                for viewer, minutes in MINUTES.items():
                    body = {
                        "event_id": f"e{viewer}", "viewer_id": viewer, "content_id": "c", "genre": "drama",
                        "watch_duration_sec": int(minutes * 60), "completion_pct": 1,
                        "watched_at": datetime.fromtimestamp(now / 1e6 - 60, UTC).isoformat(),
                    }  # fmt: skip
                    message = Message("view_events", "test", 0, viewer, json.dumps(body).encode(), None, now)
                    connection.execute(
                        "insert into raw_view_events (source, source_partition, source_offset, data, arrived_at)"
                        " values (%s, %s, %s, %s, now())",
                        (message.source, message.partition, message.offset, message.data),
                    )
            until(lambda: made.minutes() == MINUTES)
            if client:
                until(lambda: made.items.minutes() == MINUTES)
            yield made
        finally:
            with engine.connect() as connection:
                connection.execute("drop schema public cascade")
            with place.connect() as connection:
                connection.execute(sql.SQL("drop database {}").format(sql.Identifier(name)))
            if client:
                client.delete_table(TableName=f"{name}_viewer_profiles")
            if admin is not None:
                admin.delete_topics([topic])[topic].result(30)


def until(condition: Callable[[], bool], tries: int = 600) -> None:
    """Poll a condition that something else brings about."""
    pause = threading.Event()
    for _ in range(tries):
        if condition():
            return
        pause.wait(0.2)
    raise AssertionError("it did not come about")


class Killed(BaseException):
    """The process ends here; nothing of ours may catch it."""


class Watcher(threading.Thread):
    """Reads the view, and the items where there are any, all the time; keeps what it saw and what went wrong."""

    def __init__(self, server: Server) -> None:
        super().__init__(daemon=True)
        self.server, self.stopped = server, threading.Event()
        self.seen: set[tuple[Decimal | None, ...]] = set()
        self.items: set[tuple[Decimal | None, ...]] = set()
        self.reads = 0
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            with self.server.engine.connect() as connection:
                while not self.stopped.wait(0.1):
                    rows: dict[int, Decimal] = dict(
                        connection.execute(
                            f"select viewer_id, watch_minutes_{LONG}d from {ROLLING}"
                        ).fetchall()
                    )
                    self.seen.add(tuple(rows.get(viewer) for viewer in MINUTES))
                    self.reads += 1
                    if self.server.items.client:
                        items = self.server.items.minutes()
                        self.items.add(tuple(items.get(viewer) for viewer in MINUTES))
        except BaseException as error:
            self.error = error

    def __enter__(self) -> Watcher:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self.join(timeout=60)


def test_a_second_apply_changes_nothing(server: Server) -> None:
    before = server.objects()
    done = server.apply()
    assert not done.changes, done.text()
    assert "nothing to do" in done.text()
    assert server.objects() == before


def test_an_abandoned_change_is_cleared_and_the_old_pipeline_serves(server: Server) -> None:
    before = server.objects()
    records = server.rows("select relation, kind, checksum, state from deployments order by 1")
    server.change("count(*) as views", "count(*) + 1 as views")

    def die(step: str) -> None:
        if step == "go live":
            raise Killed

    with pytest.raises(Killed):
        server.apply(die)
    left = [name for name in server.objects() if "__next_" in name]
    assert {name.split("__next_")[0] for name in left if not name.startswith("__dbt_index")} == {
        "viewer_watch_metrics_1d", ROLLING, "sink_engagement_watch", LAKE_SINK
    }  # fmt: skip
    server.change("count(*) + 1 as views", "count(*) as views")
    assert server.minutes() == MINUTES
    server.apply()
    assert [name for name in server.objects() if "__next_" in name] == []
    assert server.minutes() == MINUTES
    after = server.objects()
    assert {name for name in {**before, **after} if before.get(name) != after.get(name)} == {LAKE_SINK}
    assert server.rows("select relation, kind, checksum, state from deployments order by 1") == records
    assert not server.plan().changes


def test_a_change_that_cannot_be_built_leaves_everything_as_it_was(server: Server) -> None:
    before = server.objects()
    server.change("count(*) as views", "count(*) + no_such_column as views")
    with pytest.raises(Exception, match=r"no_such_column.*What ran before still serves"):
        server.apply()
    assert {name: one for name, one in server.objects().items() if "__next_" not in name} == before
    server.change("count(*) + no_such_column as views", "count(*) as views")
    server.apply()
    assert server.objects() == before
    assert not server.plan().changes


def test_a_reader_of_others_is_refused(server: Server) -> None:
    with server.engine.connect() as connection:
        connection.execute("create view somebodys as select viewer_id from viewer_watch_metrics_1d")
    server.change("count(*) as views", "count(*) + 2 as views")
    before = server.objects()
    with pytest.raises(PlanError, match="somebodys depends on it and is not this project's"):
        server.apply()
    assert server.objects() == before
    server.change("count(*) + 2 as views", "count(*) as views")
    with server.engine.connect() as connection:
        connection.execute("drop view somebodys")


def test_a_change_is_swapped_without_a_gap_though_it_is_killed_at_every_step(server: Server) -> None:
    before = server.objects()
    indexes = [
        name
        for name in before
        if name.startswith("__dbt_index_viewer_") or name.endswith("_by_last_event_at")
    ]
    assert f"{ROLLING}_by_last_event_at" in indexes
    # Twice the minutes, and viewer 3 leaves the view.
    server.change("sum(watch_duration_sec)", "2 * sum(watch_duration_sec)")
    server.change('from {{ ref("view_events") }}', 'from {{ ref("view_events") }}\n  where viewer_id <> 3')
    plan = server.plan()
    (changed,) = plan.relations
    assert (changed.name, changed.action, changed.how) == ("viewer_watch_metrics_1d", "changed", "swap")
    assert ROLLING in changed.views
    assert "sink_engagement_watch" in (*changed.sinks, *changed.views)
    assert f"engagement#watch.watch_minutes_{LONG}d" in changed.attributes
    assert changed.consumers == ("recommendation_service",)
    assert "2 * SUM(watch_duration_sec)" in changed.diff
    passed: set[str] = set()

    def die_at_each_step_once(step: str) -> None:
        # Two of them would write every row twice.
        lake_sinks = [name for name in server.objects() if name.startswith(LAKE_SINK)]
        assert len(lake_sinks) <= 1, lake_sinks
        if step not in passed:
            passed.add(step)
            raise Killed

    with Watcher(server) as watcher:
        for _attempt in range(60):
            try:
                server.apply(die_at_each_step_once)
            except Killed:
                continue
            break
        else:
            pytest.fail(f"it never came to its end: {sorted(passed)}")
    assert watcher.error is None
    assert watcher.reads > 10
    old = tuple(MINUTES.values())
    new = (MINUTES[1] * 2, MINUTES[2] * 2, None)
    assert watcher.seen == {old, new}
    assert {step.split()[0] for step in passed} >= {"build", "swap", "reconcile", "drop", "record"}
    assert server.minutes() == {1: MINUTES[1] * 2, 2: MINUTES[2] * 2}
    if server.items.client:
        assert server.items.minutes() == {1: MINUTES[1] * 2, 2: MINUTES[2] * 2}
        # Those who stay were never without an item.
        assert {item for seen in watcher.items for item in seen[:2]} <= {*old[:2], *new[:2]}
    after = server.objects()
    assert after.keys() == before.keys()
    assert {name for name in after if after[name][0] != before[name][0]} == {
        "viewer_watch_metrics_1d", ROLLING, "sink_engagement_watch", LAKE_SINK, *indexes
    }  # fmt: skip
    # In a CTE, RisingWave's text of a view keeps the name its relation had then; what counts is what it reads.
    with server.engine.connect() as connection:
        reads = read_catalog(connection, server.engine).reads
    assert "viewer_watch_metrics_1d" in reads[ROLLING]
    assert reads["sink_engagement_watch"] >= {ROLLING}
    assert not [name for names in reads.values() for name in names if "__next_" in name]
    done = server.apply()
    assert not done.changes, done.text()
    assert server.objects() == after


def test_with_kafka_models_and_brokers_change_one_after_the_other(server: Server) -> None:
    bootstrap = server.environment["PREFS_KAFKA_BOOTSTRAP"]
    if not bootstrap:
        pytest.skip("PREFS_KAFKA_BOOTSTRAP names no brokers")
    feed = {"kafka_view_events", "kafka_view_events_feed"}
    assert feed <= server.objects().keys()
    done = server.apply()
    assert not done.changes, done.text()
    assert not server.plan().changes

    # A changed model leaves the feed as it is.
    before = server.objects()
    server.change("count(*) as views", "count(*) + 1 as views")
    (changed,) = server.plan().relations
    assert (changed.name, changed.how) == ("viewer_watch_metrics_1d", "swap")
    server.apply()
    assert {name: server.objects()[name] for name in feed} == {name: before[name] for name in feed}
    assert not server.plan().changes

    # Other brokers, which are the same ones here, replace the feed and nothing else.
    send(server, bootstrap, "before", 11)
    until(lambda: 11 in server.minutes())
    before = server.objects()
    server.set(PREFS_KAFKA_BOOTSTRAP=f"{bootstrap},{bootstrap}")
    (changed,) = server.plan().relations
    assert (changed.name, changed.action, changed.how) == ("kafka_view_events", "changed", "in place")
    assert f"+  properties.bootstrap.server = '{bootstrap},{bootstrap}'" in changed.diff
    server.apply()
    after = server.objects()
    assert {name for name in {**before, **after} if before.get(name) != after.get(name)} == feed
    assert not server.plan().changes
    send(server, bootstrap, "after", 12)
    until(lambda: 12 in server.minutes())
    read = server.rows("select source_offset from raw_view_events where source like 'kafka:%' order by 1")
    assert read == [(0,), (1,)]

    # Brokers that do not answer leave the old feed at work, and the next apply goes on from there.
    server.set(PREFS_KAFKA_BOOTSTRAP="127.0.0.1:1")
    with pytest.raises(
        ApplyError, match=r"kafka_view_events: RisingWave got no answer from Kafka at 127.0.0.1:1"
    ):
        server.apply()
    send(server, bootstrap, "meanwhile", 13)
    until(lambda: 13 in server.minutes())
    server.set(PREFS_KAFKA_BOOTSTRAP=bootstrap)
    server.apply()
    assert not server.plan().changes
    assert server.plan().leftovers == ()

    # Without Kafka the feed has no model, and can be dropped; the raw table keeps what it read.
    server.set(PREFS_KAFKA_BOOTSTRAP="")
    assert [relation.name for relation in server.plan().of("orphaned")] == ["kafka_view_events"]
    server.apply(drop_orphans=True)
    assert not feed & server.objects().keys()
    assert not server.plan().relations
    assert server.rows("select count(*) from raw_view_events where source like 'kafka:%'") == [(3,)]


def send(server: Server, bootstrap: str, event: str, viewer: int) -> None:
    """One minute watched, through the topic."""
    body = {
        "event_id": event, "viewer_id": viewer, "content_id": "c", "genre": "drama", "watch_duration_sec": 60,
        "completion_pct": 1, "watched_at": datetime.now(UTC).isoformat(),
    }  # fmt: skip
    producer: Any = Producer({"bootstrap.servers": bootstrap})
    producer.produce(server.environment["PREFS_KAFKA_TOPIC_VIEW_EVENTS"], json.dumps(body).encode())
    assert producer.flush(30) == 0
