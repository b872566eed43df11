"""Assets and checks downstream of the training tables: training sets, parity, maintenance."""

from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timedelta
from typing import Any, Literal

import dagster as dg
from pydantic import Field

from dagster_prefs.declarations.masking import masked_row
from dagster_prefs.defs.resources import asset_job, asset_key, job_schedule, lake_pool, unknown_check
from dagster_prefs.errors import PrefsError
from dagster_prefs.files import make_private_folder
from dagster_prefs.iceberg.catalog import TableMissing
from dagster_prefs.iceberg.maintenance import maintain, maintain_training_sets
from dagster_prefs.ids import id_label, id_parts
from dagster_prefs.platform import Platform
from dagster_prefs.training.logged import DEFAULT_WITHIN, LogSource
from dagster_prefs.training.outputs import output_within
from dagster_prefs.training.parity import (
    AttributeParity,
    Difference,
    ParityReport,
)
from dagster_prefs.training.training_set import CsvOptions, LabelJoin, build_training_set, features_as
from dagster_prefs.training.windows import Features, features_by_entity

MAINTENANCE_JOB = "maintenance"
PARITY_JOB = "parity"
PARITY_CHECK = "parity"

Clock = Callable[[], datetime]


class TrainingSetConfig(dg.Config):
    """The inputs of a training set, as in the options of `prefs training-set`.

    `output` is an Iceberg table, or a file below the folder of PREFS_TRAINING_DIR. `entity` is the entity of
    the labels, and may be omitted if only one entity has features. With the meaning `logged`, values are those of the
    log in the folder of PREFS_SERVED_LOG.
    """

    labels: str
    output: str
    entity: str | None = None
    tag: str | None = None
    timezone: str | None = None
    meaning: Literal["yesterday", "served", "happened", "logged"] = "yesterday"
    as_known: bool = False
    within_seconds: float = DEFAULT_WITHIN.total_seconds()
    domains: list[str] = Field(default_factory=list)
    drop_refused: bool = False
    types: dict[str, str] = Field(default_factory=dict)
    keep_formulas: bool = False


def parity_check(
    platform: Platform, tables: Mapping[str, dg.AssetKey], clock: Clock
) -> dg.AssetChecksDefinition:
    """Return the check that served values equal those of the training tables.

    `tables` are the tables' assets by name.
    """
    entities = features_by_entity(platform.registry)
    keys = {
        domain: tables[features.table_of(domain).name]
        for features in entities.values()
        for domain in features.domains
    }
    checks = {
        # Several domains on one tile each get a check of their own on its asset.
        domain: PARITY_CHECK if list(keys.values()).count(key) == 1 else f"{PARITY_CHECK}_{domain}"
        for domain, key in keys.items()
    }

    @dg.multi_asset_check(
        name=platform.settings.dagster_name("training_parity"),
        specs=[
            dg.AssetCheckSpec(
                checks[domain],
                asset=key,
                description=f"Every served value of domain {domain} equals the one recomputed from this table, "
                f"for {platform.settings.parity_share:.0%} of all ids.",
            )
            for domain, key in keys.items()
        ],
        can_subset=True,
    )
    def parity(context: dg.AssetCheckExecutionContext) -> Iterator[dg.AssetCheckResult]:
        selected = {(key.asset_key, key.name) for key in context.selected_asset_check_keys}
        for features in entities.values():
            wanted = [domain for domain in features.domains if (keys[domain], checks[domain]) in selected]
            if not wanted:
                continue
            try:
                report = platform.parity(features, now=clock())
            except PrefsError as error:
                for domain in wanted:
                    yield unknown_check(keys[domain], checks[domain], "parity", error)
                continue
            for domain in wanted:
                rates = _rates(report.of(domain))
                # Dagster plots the numbers of observations over time, but not those of checks.
                context.op_execution_context.log_event(
                    dg.AssetObservation(
                        asset_key=keys[domain],
                        metadata={f"{checks[domain]}_{name}": rate for name, rate in rates.items()},
                    )
                )
                yield _result(report, features, domain, keys[domain], checks[domain])

    return parity


def _result(
    report: ParityReport, features: Features, domain: str, key: dg.AssetKey, check: str
) -> dg.AssetCheckResult:
    found = report.of(domain)
    examples = [one for one in report.worst if one.domain == domain]
    return dg.AssetCheckResult(
        asset_key=key,
        check_name=check,
        passed=not any(one.mismatched or one.missing or one.extra for one in found),
        description=_sentence(features, domain, examples, report),
        metadata={
            "subjects": report.subjects,
            "in_flight": report.in_flight,
            "items_missing": report.missing[domain],
            "items_extra": report.extra[domain],
            **_rates(found),
            "worst": _table(features, examples),
        },
    )


def maintained(platform: Platform, tables: Mapping[str, dg.AssetKey], clock: Clock) -> dg.AssetsDefinition:
    """Return the asset that compacts the training tables and bounds their history."""
    days = platform.settings.snapshots_kept_days

    @dg.asset(
        key=asset_key(platform.settings, "training", "maintenance"),
        pool=lake_pool(platform.settings),
        deps=list(tables.values()),
        group_name="offline_store",
        kinds={"iceberg"},
        owners=[platform.contract.owner],
        description=f"Snapshots of training tables and sets older than {days} days expire, small files of a day become "
        "one, unreferenced files are deleted. Tagged snapshots stay.",
    )
    def maintenance(context: dg.AssetExecutionContext) -> dg.MaterializeResult[Any]:
        catalog = platform.catalog()
        told: dict[str, Any] = {
            "now": clock(),
            "keep_snapshots": timedelta(days=days),
            "namespace": platform.settings.iceberg_namespace,
        }
        reports = []
        for spec in platform.training_tables.values():
            try:
                reports.append(
                    maintain(catalog, spec, compact=platform.settings.export == "platform", **told)
                )
            except TableMissing as error:
                context.log.info(f"nothing to maintain yet: {error}")
        try:
            reports += maintain_training_sets(catalog, **told)
        except NotImplementedError as error:
            # Some REST catalogs do not list tables.
            context.log.warning(f"tables of training sets keep their snapshots: {error}")
        numbers = dict.fromkeys(("snapshots_expired", "days_compacted", "files_removed", "bytes_freed"), 0)
        for report in reports:
            context.log.info(
                f"{report.table}: {report.snapshots_expired} snapshots expired, "
                f"{len(report.days_compacted)} days compacted, {report.files_removed} files removed "
                f"({report.bytes_freed} bytes), branches removed: {', '.join(report.branches_removed) or 'none'}"
            )
            if report.days_foreign:
                context.log.warning(
                    f"{report.table}: {len(report.days_foreign)} days are left unchanged because another writer "
                    f"changed them (oldest {report.days_foreign[0]}): run `prefs export --replace-foreign`"
                )
            numbers["snapshots_expired"] += report.snapshots_expired
            numbers["days_compacted"] += len(report.days_compacted)
            numbers["files_removed"] += report.files_removed
            numbers["bytes_freed"] += report.bytes_freed
        return dg.MaterializeResult(metadata=numbers)

    return maintenance


def training_set_asset(
    platform: Platform, tables: Mapping[str, dg.AssetKey], clock: Clock
) -> dg.AssetsDefinition:
    """Return the asset of a training set; its run configuration names labels and output."""

    @dg.asset(
        key=asset_key(platform.settings, "training_set"),
        deps=list(tables.values()),
        group_name="offline_store",
        kinds={"duckdb", "parquet"},
        owners=[platform.contract.owner],
        description="Labels joined with the features that were known at each label's time. Asks for the labels "
        "(a Parquet or CSV file, or an Iceberg table) and the output when it is materialized.",
    )
    def training_set(
        context: dg.AssetExecutionContext, config: TrainingSetConfig
    ) -> dg.MaterializeResult[Any]:
        settings = platform.settings
        # Everyone who may start a run chooses the output, so it must not reach a file outside this folder.
        make_private_folder(settings.training_folder)
        made = build_training_set(
            platform.catalog(),
            LabelJoin(
                config.labels,
                features_as(platform.registry, config.entity, config.meaning, config.domains or None),
                clock(),
                timezone=config.timezone,
                as_known=config.as_known,
                namespace=settings.iceberg_namespace,
                csv=CsvOptions(config.types, config.keep_formulas),
                meaning=config.meaning,
                spreads=platform.spreads() if config.meaning in ("served", "happened") else {},
                log=LogSource(settings.served_log_folders, timedelta(seconds=config.within_seconds))
                if config.meaning == "logged" and settings.served_log_folders
                else None,
                drop_refused=config.drop_refused,
            ),
            output_within(settings.training_folder, config.output),
            tag=config.tag,
        )
        context.log.info(f"{made.rows} rows in {made.output} after {made.seconds:.1f} s")
        return dg.MaterializeResult(
            metadata={
                "dagster/row_count": made.rows,
                "cold_start_rows": made.cold_start_rows,
                "output": made.output,
                "manifest": dg.MetadataValue.path(str(made.manifest.absolute())),
                "fingerprint": made.content_hash,
                "snapshots": dg.MetadataValue.json(dict(made.snapshots)),
                "seconds": made.seconds,
                "labels_left_out": sum(made.refused.values()),
            }
        )

    return training_set


def _rates(found: tuple[AttributeParity, ...]) -> dict[str, float]:
    return {
        f"{one.attribute}_{kind}_rate": rate
        for one in found
        for kind, rate in (
            ("mismatch", one.mismatch_rate),
            ("missing", one.missing_rate),
            ("extra", one.extra_rate),
        )
    }


def _sentence(features: Features, domain: str, examples: list[Difference], report: ParityReport) -> str:
    found = report.of(domain)
    wrong = [
        f"{one.attribute} differs for {one.mismatched} of {one.compared}" for one in found if one.mismatched
    ]
    if report.missing[domain]:
        wrong.append(f"{report.missing[domain]} items are missing")
    if report.extra[domain]:
        wrong.append(f"{report.extra[domain]} items should not exist")
    if not wrong and any(one.missing for one in found):
        wrong.append("attributes are missing: " + ", ".join(one.attribute for one in found if one.missing))
    entity = features.entity.name
    unknown = [name for name in report.left_out if name.startswith(f"{domain}.")]
    rest = f"; not compared, because no tile has it: {', '.join(unknown)}" if unknown else ""
    if not wrong:
        return f"every served value of {report.subjects} ids of {entity} equals that of the training tables{rest}"
    first = examples[0] if examples else None
    worst = (
        f"; the worst is {first.attribute} of {entity} {id_label(first.subject)}: "
        f"{_shown(features, first, first.served)} is served, {_shown(features, first, first.due)} is expected"
        if first
        else ""
    )
    return f"{', '.join(wrong)}{worst}{rest}"


def _shown(features: Features, found: Difference, value: Any) -> str:
    """Return a value for people, masked if it is personal."""
    registry = features.registry
    relation = registry.contract.domain(found.domain).relation
    return str(masked_row(registry, relation, {found.attribute: value})[found.attribute])


def _table(features: Features, examples: list[Difference]) -> dg.TableMetadataValue:
    keys = features.keys
    return dg.MetadataValue.table(
        records=[
            dg.TableRecord(
                {
                    **dict(zip(features.key_names, id_parts(one.subject), strict=True)),
                    "attribute": one.attribute,
                    "served": _shown(features, one, one.served),
                    "due": _shown(features, one, one.due),
                }
            )
            for one in examples
        ],
        schema=dg.TableSchema(
            columns=[
                *[dg.TableColumn(key.name, "int" if key.type == "bigint" else "string") for key in keys],
                *[dg.TableColumn(name, "string") for name in ("attribute", "served", "due")],
            ]
        ),
    )


def jobs_of(
    platform: Platform, maintenance: dg.AssetsDefinition, parity: dg.AssetChecksDefinition
) -> tuple[list[Any], list[dg.ScheduleDefinition]]:
    """Return the jobs of maintenance and parity with their daily schedules, at hours of little load."""
    settings = platform.settings
    upkeep = asset_job(
        settings,
        MAINTENANCE_JOB,
        dg.AssetSelection.assets(maintenance),
        "Expire snapshots, compact small files and delete orphans of the training tables.",
    )
    compare = asset_job(
        settings,
        PARITY_JOB,
        dg.AssetSelection.checks(parity),
        "Recompute a sample of ids from the training tables and compare it with what is served.",
    )
    schedules = [
        job_schedule(settings, f"{name}_daily", job, cron, description)
        for name, job, cron, description in (
            (MAINTENANCE_JOB, upkeep, "40 3 * * *", "Maintains the training tables once a day."),
            (PARITY_JOB, compare, "20 4 * * *", "Compares once a day, hours after the windows have moved."),
        )
    ]
    return [upkeep, compare], schedules
