"""The demo: the whole flow on one machine, from deployment and events to the served and exported data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, date, datetime
from decimal import Decimal
from time import monotonic
from typing import Any

import psycopg
from psycopg import sql

from dagster_prefs.declarations.registry import Entity
from dagster_prefs.declarations.reserved import people_only
from dagster_prefs.engine.catalog import row_counts
from dagster_prefs.engine.dbt import DbtError
from dagster_prefs.events.canaries import RELATION as CANARY_KEYS
from dagster_prefs.events.rejected import rejected_counts
from dagster_prefs.freshness.canary import SOURCE
from dagster_prefs.ids import Id
from dagster_prefs.platform import Platform
from dagster_prefs.serving import ClientOptions, ProfileClient, ShopClient
from dagster_prefs.serving.preferences import CATEGORIES, USER
from dagster_prefs.settings import Settings
from dagster_prefs.tools.simulation import Plan
from dagster_prefs.tools.simulator import remembered_end, simulate_to_engine

# How many failing tests an error names.
NAMED_TESTS = 3


@dataclass(frozen=True)
class Snapshot:
    """The current snapshot of a training table."""

    snapshot_id: int
    rows_per_day: dict[date, int]


@dataclass
class Summary:
    """The summary at the demo's end; counts are exact, times in seconds."""

    rows: dict[str, int] = field(default_factory=dict)
    rejected: dict[str, dict[str, int]] = field(default_factory=dict)
    entity: str | None = None
    id: Id | None = None
    items: dict[str, dict[str, Any]] = field(default_factory=dict)
    user_id: str | None = None
    ranking: list[tuple[str, str, Decimal]] = field(default_factory=list)
    snapshots: dict[str, Snapshot] = field(default_factory=dict)
    freshness: list[tuple[str, str, str]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return the summary as plain values for JSON: dates as ISO text, decimals as digits."""
        content = asdict(self)
        for snapshot in content["snapshots"].values():
            snapshot["rows_per_day"] = {day.isoformat(): n for day, n in snapshot["rows_per_day"].items()}
        return content


class Demo:
    """One demo over the state of `settings`; a repeated run adds nothing that is already there.

    Events end at `end` (UTC) if given, else where those of an earlier demo of the same plan ended, else at
    the plan's own end.
    """

    def __init__(
        self,
        settings: Settings,
        plan: Plan,
        say: Callable[[str], None],
        end: datetime | None = None,
    ) -> None:
        self.settings = settings
        self.plan = plan
        self.end = end
        self.say = say
        self.summary = Summary()
        self.platform = Platform(settings)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Announce a step and record its duration."""
        self.say(name)
        started = monotonic()
        yield
        self.summary.seconds[name] = monotonic() - started

    def run(self) -> Summary:
        """Deploy the declared models, load events, apply and publish them, test, export, and read the results.

        Raises PrefsError with the failing step and its reason; the results of earlier steps are kept.
        """
        platform = self.platform
        with self.step("deploy the project"):
            platform.bring_out(lambda step: self.say(f"  {step}"))
        with self.step("load events"):
            # A second demo generates the events of the first one and finds all of them stored, which is
            # quick.
            end = self.end or remembered_end(platform.engine, self.plan) or self.plan.end
            simulate_to_engine(platform.engine, platform.registry, replace(self.plan, end=end))
        if self.settings.engine == "local":
            with self.step("refresh every view and publish to DynamoDB"):
                platform.refresh(lambda line: self.say(f"  {line}"))
            with self.step("test every relation"):
                self._test()
        else:
            with self.step("test every relation and publish to DynamoDB"):
                # RisingWave's views are current; this waits for the process that writes DynamoDB.
                self._run_refresh_job()
        with self.step("export the daily tiles to Iceberg"):
            exporter = platform.exporter
            exporter.export(exporter.look(datetime.now(UTC)).stale, say=self.say)
        with self.step("read it all back"):
            self._look()
        return self.summary

    def _test(self) -> None:
        """Run dbt's tests of the data. Raises DbtError with those that fail."""
        results = self.platform.dbt.run("test", exclude=["resource_type:unit_test"])
        if failed := [f"{result.name}: {result.message}" for result in results if not result.ok]:
            raise DbtError(f"{len(failed)} tests of the relations failed: {'; '.join(failed[:NAMED_TESTS])}")

    def _run_refresh_job(self) -> None:
        from dagster_prefs.defs.feature_views import REFRESH_JOB
        from dagster_prefs.runs import JobRunner

        with JobRunner(self.settings) as runner:
            runner.run(REFRESH_JOB)

    def _look(self) -> None:
        summary, platform = self.summary, self.platform
        names = [
            node["name"]
            for node in platform.dbt.manifest()["nodes"].values()
            if node["resource_type"] == "model" and node["config"]["materialized"] != "sink"
        ]
        with platform.engine.connect() as connection:
            summary.rows = self._row_counts(connection, sorted(names))
            schema = platform.engine.schema
            profiles = self._profiles()
            somebody = connection.execute(profiles[1]).fetchone() if profiles else None
            # Only the example's shop has a ranking.
            user = (
                connection.execute(
                    sql.SQL(
                        "select user_id from {} where {}"
                        " group by user_id order by max(last_engaged_at) desc, user_id limit 1"
                    ).format(sql.Identifier(schema, CATEGORIES), people_only(USER))
                ).fetchone()
                if CATEGORIES in names
                else None
            )
        summary.rejected = rejected_counts(platform.engine)
        if profiles and somebody:
            summary.entity = profiles[0].name
            summary.id = somebody[0] if len(somebody) == 1 else tuple(somebody)
            with ProfileClient(
                platform.registry,
                entity=profiles[0].name,
                endpoint_url=self.settings.aws_endpoint,
                region=self.settings.aws_region,
                table_prefix=self.settings.table_prefix,
                # The local AWS server is slow, and no service waits for this read.
                options=ClientOptions(budget_seconds=30.0, read_timeout_seconds=30.0),
            ) as client:
                profile = client.get(somebody[0])
            summary.items = {name: read["attributes"] for name, read in profile.as_dict()["domains"].items()}
        if user:
            summary.user_id = user[0]
            with ShopClient(platform.engine) as preferences:
                summary.ranking = [
                    (item.item_id, item.title or "", item.score)
                    for item in preferences.rank(user[0], limit=5, now=datetime.now(UTC))
                ]
        catalog = platform.catalog()
        for spec in platform.training_tables.values():
            table = catalog.load_table(spec.identifier(self.settings.iceberg_namespace))
            snapshot = table.current_snapshot()
            if snapshot is not None:
                partitions = table.inspect.partitions().select(["partition", "record_count"]).to_pylist()
                days = {row["partition"][spec.day]: row["record_count"] for row in partitions}
                summary.snapshots[spec.name] = Snapshot(snapshot.snapshot_id, dict(sorted(days.items())))
        measures = platform.sources.online(datetime.now(UTC))
        summary.freshness = [(measure.name, measure.level, measure.reason) for measure in measures]

    def _row_counts(self, connection: psycopg.Connection[Any], names: list[str]) -> dict[str, int]:
        """Count the rows of each relation; on the embedded engine without canaries, which arrive continuously."""
        engine, registry = self.platform.engine, self.platform.registry
        if engine.kind == "risingwave":
            return row_counts(connection, engine, names)
        keys = {entity.key.name: people_only(entity.key) for entity in registry.entities.values()}
        keys["source"] = sql.SQL("source <> {}").format(sql.Literal(SOURCE))
        columns: dict[str, list[str]] = {name: [] for name in names if name != CANARY_KEYS}
        for relation, column in connection.execute(
            "select table_name, column_name from information_schema.columns where table_schema = %s",
            [engine.schema],
        ):
            if relation in columns and column in keys:
                columns[relation].append(column)
        # A parsed message may have no key.
        conditions = {
            name: sql.SQL("").join(sql.SQL(" and ({}) is not false").format(keys[column]) for column in held)
            for name, held in columns.items()
        }
        query = sql.SQL(" union all ").join(
            sql.SQL("select {}, count(*) from {} where true{}").format(
                sql.Literal(name), sql.Identifier(engine.schema, name), condition
            )
            for name, condition in conditions.items()
        )
        return {name: int(count) for name, count in connection.execute(query).fetchall()}

    def _profiles(self) -> tuple[Entity, sql.Composed] | None:
        """Return the first entity with a domain, and a query for its newest key with items in all domains."""
        registry, schema = self.platform.registry, self.platform.engine.schema
        domains = registry.contract.domains.values()
        entity = next((registry.entity(domain.entity) for domain in domains), None)
        if entity is None:
            return None
        first, *others = (
            sql.Identifier(schema, domain.relation) for domain in domains if domain.entity == entity.name
        )
        key = sql.SQL(", ").join(map(sql.Identifier, entity.key_names))
        joins = [
            sql.SQL(" join {} as {} using ({})").format(other, sql.Identifier(f"other_{number}"), key)
            for number, other in enumerate(others)
        ]
        return entity, sql.SQL(
            "select {key} from {first} as newest{joins} where {people}"
            " order by newest.last_event_at desc, {key} limit 1"
        ).format(key=key, first=first, joins=sql.Composed(joins), people=people_only(entity.key))
