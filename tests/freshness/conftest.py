"""A world per test: the real dbt project in a database, DynamoDB, Iceberg, and ways to make each stale."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from built_state import BuiltState
from declared import PROJECT
from kafka_cluster import Cluster
from psycopg import sql
from shipped import REGISTRY, TILE_TABLES

from dagster_prefs.declarations.contract import Contract, load_contract
from dagster_prefs.dynamodb.publisher import publish_domain
from dagster_prefs.dynamodb.store import DomainStore, domain_stores
from dagster_prefs.dynamodb.tables import dynamodb_client, provision
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.freshness.levels import Measure
from dagster_prefs.freshness.measures import measure_offline, measure_online, measure_views
from dagster_prefs.iceberg.catalog import open_catalog
from dagster_prefs.iceberg.export import export_day, exported_days, stale_days

NAMESPACE = "training"

RAW = {
    "user.events": "raw_user_events",
    "view_events": "raw_view_events",
    "content_interactions": "raw_content_interactions",
    "items": "raw_items",
}


@dataclass
class World:
    """Everything that freshness looks at; `now` is the clock that the measures are given."""

    engine: EngineConfiguration
    connection: Any
    now: datetime
    order: Sequence[str]
    contract: Contract = field(default_factory=lambda: load_contract(PROJECT))
    client: Any = None
    table: Any = None
    warehouse: Path = Path()
    offsets: dict[str, int] = field(default_factory=dict)
    cluster: Cluster | None = None

    @property
    def catalog(self) -> Any:
        return open_catalog("sqlite", self.warehouse.as_uri())

    def execute(self, statement: Any, parameters: Sequence[Any] | None = None) -> list[tuple[Any, ...]]:
        cursor = self.connection.execute(statement, parameters)
        return cursor.fetchall() if cursor.description else []

    def arrive(self, topic: str, *messages: Any, age: float = 0.0) -> None:
        """Messages reach the raw table `age` seconds before now; texts as they are, others as JSON."""
        for message in messages:
            self.offsets[topic] = self.offsets.get(topic, 0) + 1
            data = message if isinstance(message, str) else json.dumps(message)
            self.execute(
                sql.SQL(
                    "insert into {} (source, source_partition, source_offset, data, arrived_at)"
                    " values ('test', 0, %s, %s, %s)"
                ).format(sql.Identifier(RAW[topic])),
                [self.offsets[topic], data.encode(), self.now - timedelta(seconds=age)],
            )

    def watch(self, viewer: int, *, age: float = 0.0, days_ago: float = 0.0, **fields: Any) -> dict[str, Any]:
        """One view event that happened `days_ago` days and arrived `age` seconds before now."""
        event = {
            "event_id": uuid.uuid4().hex,
            "viewer_id": viewer,
            "content_id": "c1",
            "genre": "drama",
            "watch_duration_sec": 600,
            "completion_pct": 0.95,
            "watched_at": self.moment(age, days_ago).isoformat(),
            **fields,
        }
        self.deliver("view_events", event, age=age)
        return event

    def like(self, viewer: int, *, age: float = 0.0, days_ago: float = 0.0) -> None:
        event = {
            "event_id": uuid.uuid4().hex,
            "viewer_id": viewer,
            "event_type": "like",
            "event_ts": self.moment(age, days_ago).isoformat(),
        }
        self.deliver("content_interactions", event, age=age)

    def shop(self, user: str, *, age: float = 0.0, days_ago: float = 0.0, **fields: Any) -> None:
        event = {
            "event_id": uuid.uuid4().hex,
            "user_id": user,
            "item_id": "i1",
            "event_type": "view",
            "category": "books",
            "brand": "acme",
            "price": "12.50",
            "session_id": "s1",
            "event_time": self.moment(age, days_ago).isoformat(),
            **fields,
        }
        self.deliver("user.events", event, age=age)

    def moment(self, age: float, days_ago: float = 0.0) -> datetime:
        return self.now - timedelta(days=days_ago, seconds=age)

    def deliver(self, topic: str, event: dict[str, Any], *, age: float) -> None:
        """Where events go: the raw table, or the Kafka topic of a test that sets `cluster`."""
        if self.cluster is None:
            self.arrive(topic, event, age=age)
        else:
            self.cluster.send(topic, 1, self.moment(age), json.dumps(event).encode())

    def refresh(self, *relations: str, age: float = 0.0) -> None:
        """Refresh these views, or all in their order, as a dbt run begun `age` seconds ago would have."""
        for relation in relations or self.order:
            self.execute("select prefs_rebuild(%s)", [relation])
            self.execute(
                "update deployments set deployed_at = %s where relation = %s",
                [self.now - timedelta(seconds=age), relation],
            )

    def publish(self) -> None:
        for store in self.stores():
            publish_domain(store)

    def stores(self, client: Any = None) -> list[DomainStore]:
        return domain_stores(self.engine, client or self.client, self.contract, {"viewer": self.table})

    def store(self, domain: str) -> DomainStore:
        return next(store for store in self.stores() if store.domain.name == domain)

    def export(self) -> None:
        for spec in TILE_TABLES.values():
            for day in stale_days(
                self.engine, spec, exported_days(self.catalog, spec, namespace=NAMESPACE), until=self.today
            ):
                export_day(self.engine, self.catalog, spec, day, namespace=NAMESPACE)

    @property
    def today(self) -> date:
        return self.now.astimezone(UTC).date()

    def later(self, **step: float) -> None:
        self.now += timedelta(**step)

    def views(self) -> list[Measure]:
        return measure_views(self.engine, REGISTRY, now=self.now)

    def online(self, client: Any = None, **options: Any) -> list[Measure]:
        return measure_online(
            self.contract,
            lambda: self.stores(client),
            now=self.now,
            **{"publishes": True, **options},
        )

    def offline(self, *, by_sink: bool = False) -> list[Measure]:
        return measure_offline(
            self.engine,
            REGISTRY,
            lambda: self.catalog,
            namespace=NAMESPACE,
            start=date(2020, 1, 1),
            now=self.now,
            by_sink=by_sink,
        )

    def measures(self) -> dict[str, Measure]:
        return {measure.key: measure for measure in (*self.views(), *self.online(), *self.offline())}

    def bad(self) -> dict[str, str]:
        """Every measure that is not ok, by key, with its level."""
        return {key: measure.level for key, measure in self.measures().items() if measure.level != "ok"}


@dataclass(frozen=True)
class Template:
    """A database to copy: its views in the order of refresh, the moment it was filled for, its offsets."""

    engine: EngineConfiguration
    order: Sequence[str]
    now: datetime
    offsets: dict[str, int]


Copied = Callable[..., Any]


@pytest.fixture(scope="session")
def empty_template(deployed_state: BuiltState, deployed_template: EngineConfiguration) -> Template:
    """The whole dbt project without events."""
    now = datetime.now(UTC)
    if (now.hour, now.minute // 10) == (0, 0):
        # Events of some minutes ago must have happened on the same day.
        now -= timedelta(minutes=10)
    return Template(deployed_template, deployed_state.views, now, {})


@pytest.fixture(scope="session")
def busy_template(copied_database: Copied, empty_template: Template) -> Iterator[Template]:
    """Forty viewers on two days, one shop user, one malformed message, everything refreshed."""
    with copied_database("freshness_busy", empty_template.engine) as engine:
        with engine.connect() as connection:
            made = World(engine, connection, now=empty_template.now, order=empty_template.order)
            for viewer in range(40):
                for days in (0, 1):
                    made.watch(viewer, age=60, days_ago=days)
                    made.like(viewer, age=60, days_ago=days)
            made.shop("u1", age=60)
            made.shop("u1", age=59, category=None, brand=None)
            made.arrive("view_events", "not json", age=59)
            made.refresh()
        yield Template(engine, empty_template.order, empty_template.now, made.offsets)


@pytest.fixture(scope="session")
def busy_lake(busy_template: Template, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the busy template's warehouse, and a copy of it to go back to."""
    folder = tmp_path_factory.mktemp("lake")
    with busy_template.engine.connect() as connection:
        made = World(
            busy_template.engine,
            connection,
            now=busy_template.now,
            order=busy_template.order,
            warehouse=folder / "iceberg",
        )
        made.export()
    shutil.copytree(folder / "iceberg", folder / "fresh")
    return folder


def _world(
    copied_database: Copied, name: str, template: Template, endpoint: str, warehouse: Path
) -> Iterator[World]:
    client = dynamodb_client(endpoint, "eu-central-1")
    with copied_database(name, template.engine) as engine, engine.connect() as connection:
        yield World(
            engine=engine,
            connection=connection,
            now=template.now,
            order=template.order,
            offsets=dict(template.offsets),
            client=client,
            table=provision(client, load_contract(PROJECT))["viewer"],
            warehouse=warehouse,
        )


@pytest.fixture
def world(
    copied_database: Copied, empty_template: Template, aws_endpoint: str, tmp_path: Path
) -> Iterator[World]:
    """The deployed project without events."""
    yield from _world(copied_database, "freshness_empty", empty_template, aws_endpoint, tmp_path / "iceberg")


@pytest.fixture
def busy(
    copied_database: Copied, busy_template: Template, busy_lake: Path, aws_endpoint: str
) -> Iterator[World]:
    """The busy template, published and exported: nothing is stale."""
    # Tables name their files by their path, so every test has its warehouse at the same place.
    shutil.rmtree(busy_lake / "iceberg")
    shutil.copytree(busy_lake / "fresh", busy_lake / "iceberg")
    for made in _world(copied_database, "freshness", busy_template, aws_endpoint, busy_lake / "iceberg"):
        made.publish()
        yield made


@pytest.fixture
def cluster() -> Cluster:
    """A Kafka cluster with every topic of the contract."""
    made = Cluster()
    for topic in load_contract(PROJECT).freshness.topics:
        made.producer.produce(topic, None, partition=0)
    assert made.producer.flush(60) == 0
    return made
