"""Every dbt model as an asset: events, tiles, rolling views, preferences and sinks."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import dagster as dg
from dagster_dbt import DagsterDbtTranslator, dbt_assets
from dagster_dbt.asset_utils import get_asset_check_key_for_test

from dagster_prefs.declarations.contract import Contract
from dagster_prefs.declarations.stale import current_registry
from dagster_prefs.defs.deployment import DEPLOYMENT_CHECKS
from dagster_prefs.defs.resources import TRAINING_TABLES_KEY, schedule_status, table_key
from dagster_prefs.engine.catalog import NotDeployed, row_counts
from dagster_prefs.engine.version import require_version
from dagster_prefs.platform import Platform

REFRESH_JOB = "refresh"
EVENT_TABLES_JOB = "event_tables"


class ModelTranslator(DagsterDbtTranslator):
    """Translates dbt models: groups from dbt groups, kinds by engine, sinks downstream of their table."""

    def __init__(self, engine_kind: str, contract: Contract) -> None:
        super().__init__()
        self._engine_kind = engine_kind
        self._tables = {domain.sink: contract.table_of(domain) for domain in contract.domains.values()}

    def get_asset_spec(self, manifest: Mapping[str, Any], unique_id: str, project: Any) -> dg.AssetSpec:
        """Return the spec of one model; a sink also depends on the table (DynamoDB, Iceberg) that it
        writes."""
        spec = super().get_asset_spec(manifest, unique_id, project)
        props = self.get_resource_props(manifest, unique_id)
        engine = "postgres" if self._engine_kind == "local" else "risingwave"
        kinds = {"dbt", engine}
        if "training_table" in props["config"]["meta"]:
            spec = spec.merge_attributes(deps=[TRAINING_TABLES_KEY])
            kinds.add("iceberg")
        elif props["config"]["materialized"] == "sink":
            spec = spec.merge_attributes(deps=[table_key(self._tables[props["name"]])])
            kinds.add("dynamodb")
        return spec.replace_attributes(kinds=kinds)

    def get_asset_key(self, dbt_resource_props: Mapping[str, Any]) -> dg.AssetKey:
        """Return the relation's name as the asset key, because users query it under that name."""
        return dg.AssetKey(dbt_resource_props["name"])


def build(platform: Platform) -> dg.Definitions:
    """Return the dbt assets, their tests as checks, and the job and schedule that refresh them.

    Raises StaleRegistry if the project's files differ from those of its registry.
    """
    current_registry(platform.dbt.project_dir)
    manifest = platform.dbt.manifest()
    translator = ModelTranslator(platform.engine.kind, platform.contract)
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

    @dbt_assets(manifest=manifest, dagster_dbt_translator=translator, name="dbt_models")
    def dbt_models(
        context: dg.AssetExecutionContext,
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

        feeds = [name for name in selected if kinds_of.get(name) == "kafka_feed"]
        if feeds:
            # Before the feeds are made, so that one whose topic was recreated reads the new one from its start.
            with suppress(NotDeployed):
                platform.kafka_topics(note=True)

        if platform.engine.kind == "risingwave" and any(kinds_of.get(name) == "sink" for name in selected):
            # Reports a missing table, or one with another key, with the remedy, before a sink is created.
            platform.provision(platform.dynamodb())

        # A run of all models needs no selection: dbt resolves none faster than one of eighty names.
        everything = len(selected) == len(models) + len(checks)
        results = platform.dbt.run(
            "build",
            () if everything else selected,
            exclude=["resource_type:unit_test"],
            arguments=["--indirect-selection", "empty"] if not everything else (),
            on_result=log,
        )
        with platform.engine.connect() as connection:
            counts = row_counts(
                connection, platform.engine, [r.name for r in results if r.ok and r.name in kept]
            )
        failed = []
        for result in results:
            if result.name in names:
                if not result.ok:
                    failed.append(result)
                    continue
                metadata: dict[str, Any] = {"seconds": result.seconds, "dbt": result.message}
                if result.name in counts:
                    metadata["dagster/row_count"] = counts[result.name]
                yield dg.MaterializeResult(asset_key=names[result.name], metadata=metadata)
            elif result.name in check_keys and result.status != "skipped":
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

    # One job for steps that follow each other: views first, then publishing from them. The drift checks are
    # excluded, because they compile all models, which reveals nothing right after they were built.
    compared = dg.AssetSelection.checks(*DEPLOYMENT_CHECKS)
    selection = dg.AssetSelection.assets(dbt_models) | dg.AssetSelection.groups("online_store")
    refresh = dg.define_asset_job(
        REFRESH_JOB,
        selection - compared,
        description="Refresh every view, then publish what changed to DynamoDB.",
    )
    tables = dg.define_asset_job(
        EVENT_TABLES_JOB,
        dg.AssetSelection.assets(
            *[
                translator.get_asset_key(node)
                for node in manifest["nodes"].values()
                if node["resource_type"] == "model"
                and node["config"]["materialized"] == "table_with_connector"
            ]
        )
        - compared,
        description="Make the tables that events arrive in, so that loading can begin.",
    )
    return dg.Definitions(
        assets=[dbt_models],
        jobs=[tables, refresh],
        schedules=[
            dg.ScheduleDefinition(
                name="refresh_hourly",
                job=refresh,
                cron_schedule="0 * * * *",
                execution_timezone="UTC",
                default_status=schedule_status(platform),
                description="Refreshes once an hour even without new events, because windows move with time.",
            )
        ],
    )
