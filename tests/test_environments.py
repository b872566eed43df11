"""Environments: their names, and two of them side by side on one engine, one AWS account and one lake."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from confluent_kafka import KafkaError, KafkaException
from declared import COURSES

from dagster_prefs.cli import cli
from dagster_prefs.defs.resources import run_tags
from dagster_prefs.dynamodb.environments import StoredTable
from dagster_prefs.dynamodb.tables import TableError, provision
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.engine.dbt import Dbt, DbtError
from dagster_prefs.engine.schemas import SchemaInUse
from dagster_prefs.environment import Environment, EnvironmentNameError
from dagster_prefs.events import groups
from dagster_prefs.events.brokers import KafkaSource
from dagster_prefs.events.contact import KafkaUnavailable
from dagster_prefs.events.raw import RawMessage, RawStore
from dagster_prefs.iceberg.catalog import ensure_namespace, open_catalog
from dagster_prefs.iceberg.namespaces import (
    NamespaceInUse,
    NamespaceSize,
    drop_namespace,
    namespace_size,
    platform_namespaces,
)
from dagster_prefs.live.presence import FollowedElsewhere, follow_lock
from dagster_prefs.platform import Platform
from dagster_prefs.serving import ProfileClient
from dagster_prefs.settings import Settings, SettingsError, load_settings
from dagster_prefs.tools import environments
from dagster_prefs.tools.cost import GIB, Prices
from dagster_prefs.tools.environments import Environments, Found, Holdings


@pytest.mark.parametrize("name", ["dev_anna", "pr_123", "staging", "production", "a", "x" * 20])
def test_a_name_gives_those_of_all_parts(name: str) -> None:
    made = Environment(name)
    assert made.schema == name
    assert made.table_prefix == f"{name.replace('_', '-')}-"
    assert made.namespace == f"{name}_training"
    assert made.consumer_group == f"dagster-prefs-{name}"
    assert made.owns_group(made.consumer_group)
    assert made.owns_group(f"{made.consumer_group}-17"), "RisingWave numbers it"


@pytest.mark.parametrize(
    "name",
    [
        "",
        "Dev",
        "dev-anna",
        "dev__anna",
        "_dev",
        "dev_",
        "1dev",
        "x" * 21,
        "dev anna",
        "dev\n",
        'a"; drop schema',
    ],
)
def test_an_unsuitable_name_is_refused_with_the_rule(name: str) -> None:
    with pytest.raises(EnvironmentNameError, match="1 to 20 of a-z, 0-9 and single `_`"):
        Environment(name)


@pytest.mark.parametrize("name", ["public", "pg_temp", "rw_catalog", "information_schema", "training"])
def test_a_schema_that_others_have_is_no_environment(name: str) -> None:
    with pytest.raises(EnvironmentNameError, match="reserved"):
        Environment(name)


def test_no_environment_owns_the_group_of_another() -> None:
    dev = Environment("dev")
    for other in (
        "dagster-prefs-dev_anna",
        "dagster-prefs-dev_anna-1",
        "dagster-prefs-dev2",
        "dagster-prefs",
        "dev",
    ):
        assert not dev.owns_group(other)


@pytest.mark.parametrize(
    ("name", "is_production"),
    [
        ("production", True),
        ("prod", True),
        ("prod_eu", True),
        ("production_2", True),
        ("preprod", False),
        ("pr_1", False),
    ],
)
def test_production_is_known_by_its_name(name: str, is_production: bool) -> None:
    assert Environment(name).is_production is is_production


class Side:
    """One environment of the courses project."""

    def __init__(self, settings: Settings) -> None:
        self.platform = Platform(settings)
        self.registry = self.platform.registry

    def deploy(self) -> None:
        failed = [result for result in self.platform.dbt.run("run") if not result.ok]
        assert failed == [], [(result.name, result.message) for result in failed]
        self.platform.stores()
        ensure_namespace(self.platform.catalog(), self.platform.settings.iceberg_namespace)
        self.platform.collect_statistics(now=datetime.now(UTC))

    def finish_lesson(self, learner: str, number: int) -> None:
        event = {
            "event_id": f"{learner}/{number}",
            "learner_id": learner,
            "event_type": "started",
            "seconds": 60,
            "happened_at": datetime.now(UTC).isoformat(),
        }
        with RawStore(self.platform.engine) as store:
            message = RawMessage(0, number, json.dumps(event).encode())
            store.write(self.registry.topic("lesson_events"), "file:lessons#1", [message])
        self.platform.refresh()

    def lessons(self, learner: str) -> int | None:
        """What is served of a learner; None without an item."""
        settings = self.platform.settings
        with ProfileClient(
            self.registry,
            endpoint_url=settings.aws_endpoint,
            region=settings.aws_region,
            table_prefix=settings.table_prefix,
        ) as client:
            found = client.get(learner)
        return None if found.cold_start else found.progress.lessons_7d

    def execute(self, query: str) -> list[tuple[Any, ...]]:
        with self.platform.engine.connect() as connection:
            cursor = connection.execute(query.encode())
            return cursor.fetchall() if cursor.description else []


@pytest.fixture
def of(
    engine: EngineConfiguration, aws_endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warm: Any
) -> Callable[[str], Side]:
    """`of(name)`: an environment on the same database, AWS server and lake as the others."""
    for name, value in {
        "PREFS_PROJECT_DIR": str(COURSES),
        "PREFS_ENGINE_PORT": str(engine.port),
        "PREFS_ENGINE_DATABASE": engine.database,
        "PREFS_DATA_DIR": str(tmp_path / "data"),
        "AWS_ENDPOINT_URL": aws_endpoint,
    }.items():
        monkeypatch.setenv(name, value)

    def side(name: str) -> Side:
        monkeypatch.setenv("PREFS_ENVIRONMENT", name)
        return Side(load_settings())

    return side


def test_two_side_by_side_do_not_see_each_other(of: Callable[[str], Side], tmp_path: Path) -> None:
    an, anna = of("dev_an"), of("dev_anna")
    for side in (an, anna):
        side.deploy()
    an.finish_lesson("ana", 1)
    anna.finish_lesson("ana", 1)
    anna.finish_lesson("ana", 2)
    anna.finish_lesson("zoe", 3)
    assert (an.lessons("ana"), an.lessons("zoe")) == (1, None)
    assert (anna.lessons("ana"), anna.lessons("zoe")) == (2, 1)
    assert an.execute("select count(*) from lesson_events") == [(1,)]
    # Nor does a canary of the one: each has a key of its own, and a follower's lock of its own.
    assert an.execute(
        "select count(*) from dev_an.canary_keys join dev_anna.canary_keys using (deployment)"
    ) == [(0,)]
    with an.platform.engine.connect() as connection:
        connection.execute(
            "select pg_advisory_lock(hashtextextended(%s, 0))", [follow_lock(an.platform.engine)]
        )
        assert anna.platform.refresh().startswith("0 messages applied")
        with pytest.raises(FollowedElsewhere, match="follows environment dev_an: stop it"):
            Environments(an.platform.settings).drop(Environment("dev_an"))

    found = Environments(an.platform.settings).find()
    assert found.unread == {}
    assert list(found.environments) == ["dev_an", "dev_anna"]
    one = found.environments["dev_an"]
    assert [table.name for table in one.tables] == ["dev-an-learner_profiles"]
    assert (one.items, found.environments["dev_anna"].items) == (1, 2)
    assert one.schema is not None
    assert one.schema.size_bytes > 0
    assert one.namespace is not None
    assert (one.namespace.name, one.state_bytes > 0) == ("dev_an_training", True)

    listed = CliRunner().invoke(cli, ["environment", "list", "--json"])
    assert listed.exit_code == 0, listed.output
    told = {entry["environment"]: entry for entry in json.loads(listed.stdout)["environments"]}
    assert (told["dev_anna"]["dollars_a_month"], told["dev_anna"]["terraform_workspace"]) == (
        "0.00",
        "dev_anna",
    )
    _refused_by_dbt_alone(an)
    _dropped_alone(an, anna)


def test_the_bytes_of_tables_and_lake_have_their_price() -> None:
    tables = (StoredTable("dev-a", "dev", 10, 4 * GIB), StoredTable("dev-b", "dev", 5, 2 * GIB))
    holdings = Holdings(
        Environment("dev"), tables=tables, namespace=NamespaceSize("dev_training", ("t",), 3, 100 * GIB)
    )
    prices = Prices(table_gib_month=Decimal("0.25"), lake_gib_month=Decimal("0.023"))
    assert holdings.dollars_a_month(prices) == Decimal("3.80")
    assert (holdings.items, holdings.is_empty, Holdings(Environment("dev")).is_empty) == (15, False, True)


class Stub:
    """Environments that hold what they are given, and note what is dropped."""

    def __init__(self, holdings: Holdings, unread: dict[str, str]) -> None:
        self.found = Found({holdings.environment.name: holdings}, unread)
        self.dropped: list[str] = []

    def find(self, only: Environment) -> Found:
        return self.found

    def drop(self, named: Environment, say: Callable[[str], None], *, patience_seconds: float) -> None:
        self.dropped.append(named.name)


@pytest.mark.parametrize(
    ("name", "options", "typed", "dropped", "says"),
    [
        ("dev", [], "dev\n", True, "nothing of environment dev is left"),
        ("dev", [], "no\n", False, "that is not dev: nothing was dropped"),
        ("dev", ["--yes"], "", True, "10 items"),
        ("production", ["--yes"], "", False, "--yes is refused for production"),
        ("production", [], "production\n", False, ""),
        ("production", [], "production\nprod\n", False, "nothing was dropped"),
        ("production", [], "production\nproduction\n", True, "nothing brings it back but a backup"),
    ],
)
def test_drop_asks_for_the_name_and_for_production_twice(
    name: str,
    options: list[str],
    typed: str,
    dropped: bool,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tables = (StoredTable(f"{name}-x", name, 10, 1),)
    stub = Stub(Holdings(Environment(name), tables=tables), {})
    monkeypatch.setattr(environments, "Environments", lambda settings: stub)
    answer = CliRunner().invoke(cli, ["environment", "drop", name, *options], input=typed)
    assert stub.dropped == ([name] if dropped else [])
    assert says in f"{answer.output}{answer.exception}"


def test_nothing_is_dropped_that_could_not_be_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    stub = Stub(Holdings(Environment("dev"), state_bytes=1), {"Kafka": "no answer"})
    monkeypatch.setattr(environments, "Environments", lambda settings: stub)
    answer = CliRunner().invoke(cli, ["environment", "drop", "dev", "--yes"])
    assert "cannot be shown as long as a store cannot be read" in str(answer.exception)
    assert stub.dropped == []


def test_settings_that_name_a_part_differently_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFS_ENVIRONMENT", "dev_anna")
    monkeypatch.setenv("PREFS_TABLE_PREFIX", "dev-anna-")
    settings = load_settings()
    assert (settings.engine_schema, settings.table_prefix, settings.iceberg_namespace, settings.consumer_group) == (
        "dev_anna", "dev-anna-", "dev_anna_training", "dagster-prefs-dev_anna",
    )  # fmt: skip
    assert settings.state_dir == settings.data_dir / "environments" / "dev_anna"
    assert settings.of_environment("pr_1").table_prefix == "pr-1-"
    for name, value in {
        "PREFS_TABLE_PREFIX": "prod-", "PREFS_ENGINE_SCHEMA": "public", "PREFS_ICEBERG_NAMESPACE": "training",
    }.items():  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            with pytest.raises(
                SettingsError, match=f"{name}={value} contradicts PREFS_ENVIRONMENT=dev_anna, which gives"
            ):
                load_settings()
    monkeypatch.setenv("PREFS_ENVIRONMENT", "Dev")
    with pytest.raises(SettingsError, match="PREFS_ENVIRONMENT: 'Dev' is not an environment"):
        load_settings()


class Admin:
    """A broker's consumer groups; `busy` ones have a member."""

    def __init__(self, groups: list[str], busy: str = "") -> None:
        self.groups, self.busy = groups, busy

    def __call__(self, properties: dict[str, Any]) -> Admin:
        return self

    def list_consumer_groups(self, request_timeout: float) -> Future[Any]:
        done: Future[Any] = Future()
        listed = [SimpleNamespace(group_id=name) for name in self.groups]
        done.set_result(SimpleNamespace(valid=listed, errors=[]))
        return done

    def delete_consumer_groups(self, names: list[str], request_timeout: float) -> dict[str, Future[None]]:
        found = {}
        for name in names:
            found[name] = Future()
            if name == self.busy:
                found[name].set_exception(KafkaException(KafkaError(KafkaError.NON_EMPTY_GROUP)))
            else:
                self.groups.remove(name)
                found[name].set_result(None)
        return found


def test_only_the_environments_own_groups_are_deleted(monkeypatch: pytest.MonkeyPatch) -> None:
    others = ["dagster-prefs-dev_anna-1", "dagster-prefs-devel", "somebody"]
    admin = Admin(["dagster-prefs-dev", "dagster-prefs-dev-12", *others])
    monkeypatch.setattr(groups, "AdminClient", admin)
    kafka, owns = KafkaSource("broker:9092"), Environment("dev").owns_group
    admin.busy = "dagster-prefs-dev-12"
    with pytest.raises(KafkaUnavailable, match="dagster-prefs-dev-12 still has a reader: stop it"):
        groups.delete_groups(kafka, owns)
    admin.busy = ""
    assert groups.delete_groups(kafka, owns) == ["dagster-prefs-dev-12"]
    assert groups.delete_groups(kafka, owns) == []
    assert admin.groups == others
    assert groups.delete_groups(KafkaSource(), owns) == []


def test_runs_of_environments_in_one_dagster_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def tags(name: str) -> dict[str, str]:
        monkeypatch.setenv("PREFS_ENVIRONMENT", name)
        return run_tags(load_settings())

    assert tags("dev_anna") == {"dagster_prefs/platform": "default", "prefs/environment": "dev_anna"}
    assert tags("") == {"dagster_prefs/platform": "default"}


def test_a_namespace_of_somebody_else_stays(tmp_path: Path) -> None:
    catalog = open_catalog("sqlite", str(tmp_path))
    catalog.create_namespace("ml_training")
    ensure_namespace(catalog, "dev_training")
    assert platform_namespaces(catalog) == ["dev_training"]
    with pytest.raises(NamespaceInUse, match="ml_training was not made by this platform, and stays"):
        drop_namespace(catalog, "ml_training", str(tmp_path))
    assert drop_namespace(catalog, "dev_training", str(tmp_path), keep_empty=True)
    assert namespace_size(catalog, "dev_training") == NamespaceSize("dev_training", (), 0, 0)
    assert drop_namespace(catalog, "dev_training", str(tmp_path))
    assert not drop_namespace(catalog, "dev_training", str(tmp_path))
    assert catalog.namespace_exists("ml_training")


def _refused_by_dbt_alone(side: Side) -> None:
    """dbt without the platform follows the same rule, and so makes no relation of one environment in another."""
    engine = replace(side.platform.engine, schema="public")
    dbt = Dbt(engine, COURSES, side.platform.dbt.target_dir, {"PREFS_ENVIRONMENT": "dev_an"})
    with pytest.raises(
        DbtError, match="PREFS_ENGINE_SCHEMA=public contradicts PREFS_ENVIRONMENT=dev_an, which gives"
    ):
        dbt.run("run", ["deployments"])
    assert side.execute("select from pg_class where relnamespace = 'public'::regnamespace") == []


def _dropped_alone(an: Side, anna: Side) -> None:
    settings = an.platform.settings
    stores, named = Environments(settings), Environment("dev_an")
    # What others made or read stops it before anything is gone.
    an.execute("create table scratch (id int)")
    with pytest.raises(SchemaInUse, match=r"did not make: scratch\. Nothing was dropped"):
        stores.drop(named)
    an.execute("drop table scratch")
    an.execute("create view dev_anna.borrowed as select * from dev_an.lesson_events")
    with pytest.raises(SchemaInUse, match=r"read from elsewhere, by dev_anna\.borrowed"):
        stores.drop(named)
    an.execute("drop view dev_anna.borrowed")
    assert an.lessons("ana") == 1
    # A table of dev whose name begins like one of dev_an's is somebody else's, and so is one with another tag.
    client = an.platform.dynamodb()
    with pytest.raises(
        TableError, match="belongs to environment dev_an, not to dev; choose another PREFS_ENVIRONMENT"
    ):
        provision(client, an.platform.contract, prefix="dev-an-", environment="dev")

    said: list[str] = []
    stores.drop(named, said.append)
    assert [line.split(" (")[0] for line in said[:2]] == [
        "dropped schema dev_an", "deleted table dev-an-learner_profiles",
    ]  # fmt: skip
    assert client.list_tables()["TableNames"] == ["dev-anna-learner_profiles"]
    assert not (settings.data_dir / "iceberg" / "dev_an_training").exists()
    assert not settings.state_dir.exists()
    assert (anna.lessons("ana"), anna.lessons("zoe")) == (2, 1)
    assert anna.execute("select count(*) from lesson_events") == [(3,)]
    again: list[str] = []
    stores.drop(named, again.append)
    assert again == []
    left = stores.find()
    assert list(left.environments) == ["dev_anna"]
    assert left.environments["dev_anna"].namespace is not None
    anna.finish_lesson("zoe", 4)
    assert anna.lessons("zoe") == 2
