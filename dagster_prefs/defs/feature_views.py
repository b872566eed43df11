"""Every dbt model as an asset: events, tiles, rolling views, preferences and sinks."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from graphlib import TopologicalSorter
from typing import Any

import dagster as dg
from dagster_dbt import DagsterDbtTranslator, dbt_assets
from dagster_dbt.asset_utils import get_asset_check_key_for_test
from pydantic import Field

from dagster_prefs.declarations.lineage import Lineage
from dagster_prefs.declarations.names import FEED_KIND, TABLE_KIND, lake_table
from dagster_prefs.declarations.registry import Registry
from dagster_prefs.declarations.stale import current_registry
from dagster_prefs.defs.column_lineage import same_columns, topic_metadata, view_metadata
from dagster_prefs.defs.deployment import deployment_checks
from dagster_prefs.defs.online_store import online_assets
from dagster_prefs.defs.resources import (
    asset_job,
    asset_key,
    engine_pool,
    job_schedule,
    refresh_embedded,
    table_key,
    training_tables_key,
)
from dagster_prefs.engine.catalog import NotDeployed, estimated_rows, row_counts
from dagster_prefs.engine.version import require_version
from dagster_prefs.errors import PrefsError
from dagster_prefs.platform import Platform
from dagster_prefs.settings import Settings

REFRESH_JOB = "refresh"
TESTS_JOB = "dbt_tests"
EVENT_TABLES_JOB = "event_tables"
TOPICS_GROUP = "kafka"


class ModelsConfig(dg.Config):
    """The run configuration of a materialization of models."""

    rebuild: bool = Field(
        default=False,
        description="Compute every selected view from everything again, though its definition did not change. For the "
        "embedded engine; on RisingWave `prefs apply` rebuilds.",
    )


class ModelTranslator(DagsterDbtTranslator):
    """Translates dbt models: groups from dbt groups, kinds by engine, sinks downstream of their table.

    Each asset says which columns its columns are made from.
    """

    def __init__(self, settings: Settings, registry: Registry, lineage: Lineage) -> None:
        super().__init__()
        self._placed = settings
        contract = registry.contract
        self._columns = {name: view_metadata(lineage, name, self._key_of) for name in lineage.relations}
        for topic in registry.topics.values():
            self._columns |= topic_metadata(topic, self._key_of)
        for domain in contract.domains.values():
            names = (*(key.name for key in contract.table_of(domain).columns), *domain.attributes)
            self._columns[domain.sink] = same_columns(names, self._key_of(domain.relation))
        for tile in registry.tiles.values():
            self._columns[tile.sink] = same_columns(tile.columns, self._key_of(tile.relation))
        self._tables = {domain.sink: contract.table_of(domain) for domain in contract.domains.values()}

    def get_asset_spec(self, manifest: Mapping[str, Any], unique_id: str, project: Any) -> dg.AssetSpec:
        """Return the spec of one model; a sink also depends on the table (DynamoDB, Iceberg) that it
        writes."""
        spec = super().get_asset_spec(manifest, unique_id, project)
        props = self.get_resource_props(manifest, unique_id)
        if props["resource_type"] == "source":
            return spec
        engine = "postgres" if self._placed.engine == "local" else "risingwave"
        kinds = {"dbt", engine}
        if lake_table(props["config"]["meta"]):
            spec = spec.merge_attributes(deps=[training_tables_key(self._placed)])
            kinds.add("iceberg")
        elif props["config"]["materialized"] == "sink":
            spec = spec.merge_attributes(deps=[table_key(self._placed, self._tables[props["name"]])])
            kinds.add("dynamodb")
        columns = self._columns.get(props["name"], {})
        return spec.merge_attributes(metadata=columns).replace_attributes(kinds=kinds)

    def get_asset_key(self, dbt_resource_props: Mapping[str, Any]) -> dg.AssetKey:
        """Return the relation's name as the asset key, because users query it under that name.

        The key of a source, which is a topic, begins with that of the system: it may be named like its typed relation.
        """
        if dbt_resource_props["resource_type"] == "source":
            return topic_key(self._placed, dbt_resource_props["name"])
        return self._key_of(dbt_resource_props["name"])

    def _key_of(self, relation: str) -> dg.AssetKey:
        return asset_key(self._placed, relation)


def topic_key(settings: Settings, topic: str) -> dg.AssetKey:
    """Return the asset of a topic in Kafka, which no run materializes."""
    return asset_key(settings, "kafka", topic)


def _topics(platform: Platform) -> list[dg.AssetSpec]:
    return [
        dg.AssetSpec(
            topic_key(platform.settings, topic.name),
            group_name=TOPICS_GROUP,
            kinds={"kafka"},
            owners=[platform.contract.owner],
            description=f"Topic `{topic.name}`, whose messages arrive in `{topic.raw}`.",
        )
        for topic in platform.registry.topics.values()
    ]


def build(platform: Platform) -> dg.Definitions:
    """Return the dbt assets, their tests as checks, and the job and schedule that refresh them.

    Raises StaleRegistry if the project's files differ from those of its registry, LineageError if its lineage is
    missing or that of other files.
    """
    current_registry(platform.dbt.project_dir)
    manifest = platform.dbt.manifest()
    registry = platform.registry
    settings = platform.settings
    translator = ModelTranslator(settings, registry, platform.lineage)
    models = {
        translator.get_asset_key(node): node["name"]
        for node in manifest["nodes"].values()
        if node["resource_type"] == "model"
    }
    kinds_of = {
        node["name"]: node["config"]["materialized"]
        for node in manifest["nodes"].values()
        if node["resource_type"] == "model"
    }
    checks = {
        key: node["name"]
        for unique_id, node in manifest["nodes"].items()
        if (key := get_asset_check_key_for_test(manifest, translator, unique_id, None)) is not None
    }
    kept = {
        node["name"]
        for node in manifest["nodes"].values()
        if node["resource_type"] == "model" and node["config"]["materialized"] not in ("sink", "subscription")
    }

    upstream = {name: node["depends_on"]["nodes"] for name, node in manifest["nodes"].items()}
    places = {
        manifest["nodes"][unique_id]["name"]: place
        for place, unique_id in enumerate(TopologicalSorter(upstream).static_order())
        if unique_id in manifest["nodes"]
    }

    @dbt_assets(
        manifest=manifest,
        dagster_dbt_translator=translator,
        name=settings.dagster_name("dbt_models"),
        pool=engine_pool(settings),
    )
    def dbt_models(
        context: dg.AssetExecutionContext, config: ModelsConfig
    ) -> Iterator[dg.MaterializeResult[Any] | dg.AssetCheckResult]:
        selected = [name for key, name in models.items() if key in context.selected_asset_keys]
        selected += [name for key, name in checks.items() if key in context.selected_asset_check_keys]
        names = {name: key for key, name in models.items()}
        check_keys = {name: key for key, name in checks.items()}

        def log(result: Any) -> None:
            context.log.info(f"{result.name}: {result.status} {result.message} ({result.seconds:.2f} s)")

        # Checked before the topics are recorded or the table is created; dbt would refuse such a server only
        # later.
        with platform.engine.connect() as connection:
            require_version(connection, platform.engine, platform.dbt)

        feeds = [name for name in selected if kinds_of.get(name) == FEED_KIND]
        if feeds:
            # Recorded before the feeds are created, so that a feed of a recreated topic reads it from its start.
            with suppress(NotDeployed):
                platform.kafka_topics(note=True)

        if platform.engine.kind == "risingwave" and any(kinds_of.get(name) == "sink" for name in selected):
            # Reports a missing table, or one with another key, with the remedy, before a sink is created.
            platform.provision(platform.dynamodb())

        views = [name for name in selected if name in kept and kinds_of[name] != TABLE_KIND]
        applied = _applied(platform, views, config) & set(selected)
        selected = [name for name in selected if name not in applied]
        # A run of all models needs no selection: dbt resolves none faster than one of eighty names.
        everything = len(selected) == len(models) + len(checks)
        results = (
            platform.dbt.run(
                "build",
                () if everything else selected,
                exclude=["resource_type:unit_test"],
                arguments=["--indirect-selection", "empty"] if not everything else (),
                on_result=log,
            )
            if selected
            else []
        )
        with platform.engine.connect() as connection:
            shown = [*sorted(applied), *(r.name for r in results if r.ok and r.name in kept)]
            counts = row_counts(connection, platform.engine, shown)
        made: dict[str, dict[str, Any]] = {
            name: {"dbt": "its definition is already applied"} for name in applied
        }
        failed = []
        for result in results:
            if result.name in names and not result.ok:
                failed.append(result)
            elif result.name in names:
                made[result.name] = {"seconds": result.seconds, "dbt": result.message}
        # Dagster refuses an asset that comes before one which it depends on.
        for name in sorted(made, key=places.__getitem__):
            rows = {"dagster/row_count": counts[name]} if name in counts else {}
            yield dg.MaterializeResult(asset_key=names[name], metadata=made[name] | rows)
        for result in results:
            if result.name in check_keys and result.status != "skipped":
                key = check_keys[result.name]
                yield dg.AssetCheckResult(
                    asset_key=key.asset_key,
                    check_name=key.name,
                    passed=result.status == "pass",
                    severity=dg.AssetCheckSeverity.WARN
                    if result.status == "warn"
                    else dg.AssetCheckSeverity.ERROR,
                    metadata={"failures": result.failures or 0, "message": result.message or "pass"},
                )
        if feeds:
            platform.kafka_topics(note=True)
        if failed:
            errors = [result for result in failed if result.status != "skipped"] or failed
            raise dg.Failure(
                description="; ".join(f"{result.name}: {result.message}" for result in errors),
                metadata={"failed": [result.name for result in failed]},
            )
        if context.run.job_name == settings.dagster_name(REFRESH_JOB) and platform.engine.kind == "local":
            refresh_embedded(platform, context.log.info)

    # One job for steps that follow each other: views first, then publishing from them. The drift checks are
    # excluded, because they compile all models, which reveals nothing right after they were built.
    compared = dg.AssetSelection.checks(*deployment_checks(settings))
    selection = dg.AssetSelection.assets(dbt_models) | online_assets(settings)
    refresh = asset_job(
        settings,
        REFRESH_JOB,
        selection - compared,
        "Apply every definition that changed, test every view, and publish to DynamoDB; on the embedded "
        "engine also apply all that has arrived, as `prefs refresh` does.",
    )
    tests = asset_job(
        settings,
        TESTS_JOB,
        dg.AssetSelection.checks(*checks),
        "Run dbt's tests of every model on the current relations.",
    )
    # If views follow their events, nothing needs a refresh, and only dbt's tests remain.
    hourly = (
        job_schedule(
            settings,
            "dbt_tests_hourly",
            tests,
            "20 * * * *",
            "Runs dbt's tests, because a follower does not run them.",
        )
        if platform.engine.kind == "local"
        else job_schedule(
            settings,
            "refresh_hourly",
            refresh,
            "0 * * * *",
            "Applies and tests every model once an hour.",
        )
    )
    tables = asset_job(
        settings,
        EVENT_TABLES_JOB,
        dg.AssetSelection.assets(
            *[
                translator.get_asset_key(node)
                for node in manifest["nodes"].values()
                if node["resource_type"] == "model" and node["config"]["materialized"] == TABLE_KIND
            ]
        )
        - compared,
        "Create the tables for events, so that loading can begin.",
    )
    return dg.Definitions(
        assets=[dbt_models, *_topics(platform)],
        jobs=[tables, refresh, tests],
        schedules=[hourly],
    )


def _applied(platform: Platform, views: Sequence[str], config: ModelsConfig) -> set[str]:
    """Return the relations whose definition is already deployed, so that dbt need not run for them.

    `views` are the selected ones. Empty on RisingWave, where dbt itself skips existing relations, and for a full
    refresh.
    """
    if platform.engine.kind != "local":
        if config.rebuild:
            raise dg.Failure("`rebuild` is for the embedded engine: on RisingWave run `prefs apply`")
        return set()
    if config.rebuild:
        return set()
    with platform.engine.connect() as connection:
        if not estimated_rows(connection, platform.engine, views):
            # Without any view, a comparison would only compile every model once more.
            return set()
    try:
        return set(platform.plan().unchanged)
    except PrefsError as error:
        raise dg.Failure(description=str(error)) from error
