"""What is made of the training tables, and what keeps them right: training sets, parity, upkeep."""

from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timedelta
from typing import Any

import dagster as dg
from pydantic import Field

from dagster_prefs.defs.resources import Platform
from dagster_prefs.errors import PrefsError
from dagster_prefs.files import make_private_folder
from dagster_prefs.offline.catalog import TableMissing
from dagster_prefs.offline.maintenance import maintain, maintain_training_sets
from dagster_prefs.offline.outputs import output_within
from dagster_prefs.offline.parity import AttributeParity, Difference, ParityReport, check_parity, served_items
from dagster_prefs.offline.tables import TILE_TABLES
from dagster_prefs.offline.training_set import CsvOptions, build_training_set
from dagster_prefs.offline.windows import domains, table_of

MAINTENANCE_JOB = "maintenance"
PARITY_JOB = "parity"
PARITY_CHECK = "parity"

Clock = Callable[[], datetime]


class TrainingSetConfig(dg.Config):
    """What a training set is made of, as the options of `prefs training-set` say.

    `output` is an Iceberg table, or a file below the folder of PREFS_TRAINING_DIR.
    """

    labels: str
    output: str
    tag: str | None = None
    timezone: str | None = None
    as_known: bool = False
    types: dict[str, str] = Field(default_factory=dict)
    keep_formulas: bool = False


def parity_check(
    platform: Platform, tables: Mapping[str, dg.AssetKey], clock: Clock
) -> dg.AssetChecksDefinition:
    """The check that what is served equals what the training tables say; `tables` are their assets by name."""
    keys = {domain: tables[table_of(domain).name] for domain in domains()}

    @dg.multi_asset_check(
        name="training_parity",
        specs=[
            dg.AssetCheckSpec(
                PARITY_CHECK,
                asset=key,
                description=f"Every served value of domain {domain} equals the one recomputed from this table, "
                f"for {platform.settings.parity_share:.0%} of all viewers.",
            )
            for domain, key in keys.items()
        ],
        can_subset=True,
    )
    def parity(context: dg.AssetCheckExecutionContext) -> Iterator[dg.AssetCheckResult]:
        settings = platform.settings
        selected = {key.asset_key for key in context.selected_asset_check_keys}
        wanted = {domain: key for domain, key in keys.items() if key in selected}
        table = settings.table_prefix + platform.contract.table.name
        try:
            report = check_parity(
                platform.engine,
                platform.catalog(),
                served_items(platform.dynamodb(), platform.contract, table),
                now=clock(),
                share=settings.parity_share,
                spread_seconds=settings.expiry_spread_seconds,
                namespace=settings.iceberg_namespace,
            )
        except PrefsError as error:
            for key in wanted.values():
                yield dg.AssetCheckResult(
                    asset_key=key,
                    check_name=PARITY_CHECK,
                    passed=False,
                    severity=dg.AssetCheckSeverity.WARN,
                    description=f"parity is unknown: {error}",
                )
            return
        for domain, key in wanted.items():
            found = report.of(domain)
            rates = _rates(found)
            examples = [one for one in report.worst if one.domain == domain]
            # Dagster draws the numbers of observations over time, not those of checks.
            context.op_execution_context.log_event(
                dg.AssetObservation(
                    asset_key=key, metadata={f"parity_{name}": rate for name, rate in rates.items()}
                )
            )
            yield dg.AssetCheckResult(
                asset_key=key,
                check_name=PARITY_CHECK,
                passed=not any(one.mismatched or one.missing or one.extra for one in found),
                description=_sentence(domain, found, examples, report),
                metadata={
                    "viewers": report.viewers,
                    "unsettled": report.unsettled,
                    "items_missing": report.missing[domain],
                    "items_extra": report.extra[domain],
                    **rates,
                    "worst": _table(examples),
                },
            )

    return parity


def maintained(platform: Platform, tables: Mapping[str, dg.AssetKey], clock: Clock) -> dg.AssetsDefinition:
    """The asset that keeps the training tables small and their history bounded."""
    days = platform.settings.snapshots_kept_days

    @dg.asset(
        key=["training", "maintenance"],
        deps=list(tables.values()),
        group_name="offline_store",
        kinds={"iceberg"},
        owners=[platform.contract.owner],
        description=f"Snapshots of training tables and sets older than {days} days expire, small files of a day become "
        "one, files that nothing names are deleted. What a tag points at stays.",
    )
    def maintenance(context: dg.AssetExecutionContext) -> dg.MaterializeResult[Any]:
        catalog = platform.catalog()
        told: dict[str, Any] = {
            "now": clock(),
            "keep_snapshots": timedelta(days=days),
            "namespace": platform.settings.iceberg_namespace,
        }
        reports = []
        for spec in TILE_TABLES.values():
            try:
                reports.append(
                    maintain(catalog, spec, compact=platform.settings.export == "platform", **told)
                )
            except TableMissing as error:
                context.log.info(f"nothing to keep up yet: {error}")
        try:
            reports += maintain_training_sets(catalog, **told)
        except NotImplementedError as error:
            # Not every REST catalog lists tables.
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
                    f"{report.table}: {len(report.days_foreign)} days are left alone because another writer changed "
                    f"them (oldest {report.days_foreign[0]}): run `prefs export --replace-foreign`"
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
    """The asset of a training set; its configuration says which labels and where to."""

    @dg.asset(
        key="training_set",
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
        # Whoever may start a run chooses the output: it must not reach a file outside this folder.
        make_private_folder(settings.training_folder)
        made = build_training_set(
            platform.catalog(),
            config.labels,
            output_within(settings.training_folder, config.output),
            now=clock(),
            contract_version=platform.contract.version,
            tag=config.tag,
            timezone=config.timezone,
            as_known=config.as_known,
            namespace=settings.iceberg_namespace,
            csv=CsvOptions(config.types, config.keep_formulas),
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


def _sentence(
    domain: str, found: tuple[AttributeParity, ...], examples: list[Difference], report: ParityReport
) -> str:
    wrong = [
        f"{one.attribute} differs for {one.mismatched} of {one.compared}" for one in found if one.mismatched
    ]
    if report.missing[domain]:
        wrong.append(f"{report.missing[domain]} items are missing")
    if report.extra[domain]:
        wrong.append(f"{report.extra[domain]} items ought to be gone")
    if not wrong and any(one.missing for one in found):
        wrong.append("attributes are missing: " + ", ".join(one.attribute for one in found if one.missing))
    if not wrong:
        return f"every value of {report.viewers} viewers is served as the tables say"
    first = examples[0] if examples else None
    worst = (
        f"; the worst is {first.attribute} of viewer {first.viewer_id}: {first.served} is served, {first.due} is due"
        if first
        else ""
    )
    return f"{', '.join(wrong)}{worst}"


def _table(examples: list[Difference]) -> dg.TableMetadataValue:
    return dg.MetadataValue.table(
        records=[
            dg.TableRecord(
                {
                    "viewer_id": one.viewer_id,
                    "attribute": one.attribute,
                    "served": str(one.served),
                    "due": str(one.due),
                }
            )
            for one in examples
        ],
        schema=dg.TableSchema(
            columns=[
                dg.TableColumn("viewer_id", "int"),
                *[dg.TableColumn(name, "string") for name in ("attribute", "served", "due")],
            ]
        ),
    )


def jobs_of(
    platform: Platform, maintenance: dg.AssetsDefinition, parity: dg.AssetChecksDefinition
) -> tuple[list[Any], list[dg.ScheduleDefinition]]:
    """The jobs of upkeep and parity with their daily schedules, at hours when little else runs."""
    upkeep = dg.define_asset_job(
        MAINTENANCE_JOB,
        dg.AssetSelection.assets(maintenance),
        description="Expire snapshots, compact small files and delete orphans of the training tables.",
    )
    compare = dg.define_asset_job(
        PARITY_JOB,
        dg.AssetSelection.checks(parity),
        description="Recompute a sample of viewers from the training tables and compare it with what is served.",
    )
    schedules = [
        dg.ScheduleDefinition(
            name=f"{job.name}_daily",
            job=job,
            cron_schedule=cron,
            execution_timezone="UTC",
            default_status=platform.default_schedule_status,
            description=description,
        )
        for job, cron, description in (
            (upkeep, "40 3 * * *", "Keeps the training tables up once a day."),
            (compare, "20 4 * * *", "Compares once a day, hours after the windows have moved."),
        )
    ]
    return [upkeep, compare], schedules
