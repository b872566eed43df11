"""The whole flow on one machine: services, events, every asset through Dagster, and what came out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any

import dagster as dg
from psycopg import sql

from dagster_prefs.defs.feature_views import EVENT_TABLES_JOB, REFRESH_JOB
from dagster_prefs.defs.instance import ensure_dagster_home
from dagster_prefs.defs.offline_store import EXPORT_JOB, days_that_need_export, range_tags, ranges
from dagster_prefs.defs.resources import Platform
from dagster_prefs.definitions import build_definitions
from dagster_prefs.engine.catalog import row_counts
from dagster_prefs.errors import PrefsError
from dagster_prefs.events.rejected import rejected_counts
from dagster_prefs.events.simulator import SimulationPlan, simulate_to_engine
from dagster_prefs.offline.export import exported_days
from dagster_prefs.offline.tables import TILE_TABLES
from dagster_prefs.serving import PreferenceClient, ProfileClient
from dagster_prefs.settings import Settings


class RunFailed(PrefsError):
    """A Dagster run of the demo failed."""


@dataclass
class Summary:
    """What the demo shows at its end; counts are exact, times in seconds."""

    rows: dict[str, int] = field(default_factory=dict)
    rejected: list[tuple[str, str, int]] = field(default_factory=list)
    viewer_id: int | None = None
    items: dict[str, dict[str, Any]] = field(default_factory=dict)
    user_id: str | None = None
    ranking: list[tuple[str, str, Decimal]] = field(default_factory=list)
    snapshots: dict[str, tuple[int, dict[date, int]]] = field(default_factory=dict)
    freshness: dict[str, float | None] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


class Demo:
    """One demo over the state of `settings`; running it again adds nothing that is there already."""

    def __init__(self, settings: Settings, plan: SimulationPlan, say: Callable[[str], None]) -> None:
        self.settings = settings
        self.plan = plan
        self.say = say
        self.summary = Summary()
        self.platform = Platform(settings)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Announce a step and record how long it took."""
        self.say(name)
        started = time.monotonic()
        yield
        self.summary.seconds[name] = time.monotonic() - started

    def run(self, progress: Callable[[int], None] | None = None) -> Summary:
        """Make the event tables, load events, refresh, publish, export, and look at the outcome.

        Raises RunFailed with the failing step and its reason; what earlier steps did is kept.
        """
        with self.step("load the definitions"):
            definitions = build_definitions(self.settings)
            home = ensure_dagster_home(self.settings.data_dir)
            instance = dg.DagsterInstance.from_config(str(home))
        with instance:
            with self.step("make the event tables"):
                self._execute(definitions, instance, EVENT_TABLES_JOB)
            with self.step("load events"):
                simulate_to_engine(self.platform.engine, self.plan, progress=progress)
            with self.step("refresh every view and publish to DynamoDB"):
                self._execute(definitions, instance, REFRESH_JOB)
            with self.step("export the daily tiles to Iceberg"):
                for first, last in ranges(days_that_need_export(self.platform)):
                    self._execute(definitions, instance, EXPORT_JOB, range_tags(first, last))
        with self.step("read it all back"):
            self._look()
        return self.summary

    def _execute(
        self,
        definitions: dg.Definitions,
        instance: dg.DagsterInstance,
        job: str,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        result = definitions.resolve_job_def(job).execute_in_process(
            instance=instance,
            tags=dict(tags or {}),
            raise_on_error=False,
            run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
        )
        if not result.success:
            reasons = [
                event.step_failure_data.error.message.strip()
                for event in result.all_events
                if event.is_step_failure and event.step_failure_data.error
            ]
            raise RunFailed(f"the Dagster run of {job} failed: {'; '.join(reasons) or 'see the UI'}")

    def _look(self) -> None:
        summary, platform = self.summary, self.platform
        names = [
            node["name"]
            for node in platform.dbt.manifest()["nodes"].values()
            if node["resource_type"] == "model" and node["config"]["materialized"] != "sink"
        ]
        with platform.engine.connect() as connection:
            summary.rows = row_counts(connection, platform.engine, sorted(names))
            summary.rejected = [(row.topic, row.reason, row.events) for row in rejected_counts(connection)]
            schema = platform.engine.schema
            # Somebody with something in every domain shows most.
            viewer = connection.execute(
                sql.SQL(
                    "select w.viewer_id from {} w join {} i using (viewer_id) join {} p using (viewer_id)"
                    " where w.viewer_id >= 0 order by w.watch_minutes_7d desc, w.viewer_id limit 1"
                ).format(
                    sql.Identifier(schema, "viewer_engagement_rolling"),
                    sql.Identifier(schema, "content_interactions_rolling"),
                    sql.Identifier(schema, "viewer_preferences_rolling"),
                )
            ).fetchone()
            user = connection.execute(
                sql.SQL(
                    "select user_id from {} where user_id not like 'canary:%%'"
                    " group by user_id order by max(last_engaged_at) desc, user_id limit 1"
                ).format(sql.Identifier(schema, "user_category_profile"))
            ).fetchone()
        if viewer:
            summary.viewer_id = viewer[0]
            with ProfileClient(
                endpoint_url=self.settings.aws_endpoint,
                region=self.settings.aws_region,
                table_prefix=self.settings.table_prefix,
            ) as client:
                profile = client.get(viewer[0])
            summary.items = profile.as_dict()
        if user:
            summary.user_id = user[0]
            with PreferenceClient(platform.engine) as preferences:
                summary.ranking = [
                    (item.item_id, item.title or "", item.score)
                    for item in preferences.rank(user[0], limit=5, now=datetime.now(UTC))
                ]
        catalog = platform.catalog()
        for spec in TILE_TABLES.values():
            summary.snapshots[spec.name] = exported_days(
                catalog, spec, namespace=self.settings.iceberg_namespace
            )
