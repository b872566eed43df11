"""Environments: their names, and two of them side by side on one engine, one AWS account and one lake."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from declared import COURSES

from dagster_prefs.cli import cli
from dagster_prefs.dynamodb.tables import TableError, provision
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.engine.schemas import SchemaInUse
from dagster_prefs.environment import Environment, EnvironmentNameError
from dagster_prefs.events.raw import RawMessage, RawStore
from dagster_prefs.iceberg.catalog import ensure_namespace
from dagster_prefs.live.presence import FollowedElsewhere, follow_lock
from dagster_prefs.platform import Platform
from dagster_prefs.serving import ProfileClient
from dagster_prefs.settings import Settings, load_settings
from dagster_prefs.tools.environments import Environments


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

    _dropped_alone(an, anna)
    # Deployed again, it is a new one.
    assert CliRunner().invoke(cli, ["environment", "list", "--json"]).exit_code == 0


def _dropped_alone(an: Side, anna: Side) -> None:
    settings = an.platform.settings
    environments, named = Environments(settings), Environment("dev_an")
    # What others made or read stops it before anything is gone.
    an.execute("create table scratch (id int)")
    with pytest.raises(SchemaInUse, match=r"did not make: scratch\. Nothing was dropped"):
        environments.drop(named)
    an.execute("drop table scratch")
    an.execute("create view dev_anna.borrowed as select * from dev_an.lesson_events")
    with pytest.raises(SchemaInUse, match=r"read from elsewhere, by dev_anna\.borrowed"):
        environments.drop(named)
    an.execute("drop view dev_anna.borrowed")
    assert an.lessons("ana") == 1
    # A table of dev whose name begins like one of dev_an's is somebody else's, and so is one with another tag.
    client = an.platform.dynamodb()
    with pytest.raises(
        TableError, match="belongs to environment dev_an, not to dev; choose another PREFS_ENVIRONMENT"
    ):
        provision(client, an.platform.contract, prefix="dev-an-", environment="dev")

    said: list[str] = []
    environments.drop(named, said.append)
    assert [line.split(" (")[0] for line in said[:2]] == [
        "dropped schema dev_an", "deleted table dev-an-learner_profiles",
    ]  # fmt: skip
    assert client.list_tables()["TableNames"] == ["dev-anna-learner_profiles"]
    assert not (settings.data_dir / "iceberg" / "dev_an_training").exists()
    assert not settings.state_dir.exists()
    assert (anna.lessons("ana"), anna.lessons("zoe")) == (2, 1)
    assert anna.execute("select count(*) from lesson_events") == [(3,)]
    again: list[str] = []
    environments.drop(named, again.append)
    assert again == []
    left = environments.find()
    assert list(left.environments) == ["dev_anna"]
    assert left.environments["dev_anna"].namespace is not None
    anna.finish_lesson("zoe", 4)
    assert anna.lessons("zoe") == 2
