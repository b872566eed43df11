"""A daily check that what was served is what training sets say was served."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import dagster as dg

from dagster_prefs.defs.resources import asset_job, asset_key, job_schedule, unknown_check
from dagster_prefs.errors import PrefsError
from dagster_prefs.platform import Platform
from dagster_prefs.training.skew import CAUSES, AttributeSkew, SkewReport

JOB = "skew"
CHECK = "skew"


def build(platform: Platform) -> dg.Definitions:
    """Return the check of every served domain, its job and schedule; nothing if no log is in files of this machine."""
    settings = platform.settings
    if not settings.served_log_folders:
        return dg.Definitions()
    checks = _checks(platform, settings.served_log_folders)
    job = asset_job(
        settings,
        JOB,
        dg.AssetSelection.checks(checks),
        "Compare the served log with values as served, computed from the events in the lake.",
    )
    return dg.Definitions(
        asset_checks=[checks],
        jobs=[job],
        schedules=[
            job_schedule(
                settings,
                f"{JOB}_daily",
                job,
                "20 5 * * *",
                "Compares once a day, when the events of the day before are in the lake.",
            )
        ],
    )


def _checks(platform: Platform, log: Sequence[Path]) -> dg.AssetChecksDefinition:
    settings = platform.settings
    keys = {
        domain.name: asset_key(settings, "online", domain.name)
        for domain in platform.contract.domains.values()
    }

    @dg.multi_asset_check(
        name=settings.dagster_name("served_skew"),
        specs=[
            dg.AssetCheckSpec(
                CHECK,
                asset=key,
                description=f"Every logged value of domain {name} equals what had arrived by then, or its difference "
                "is explained.",
            )
            for name, key in keys.items()
        ],
        can_subset=True,
    )
    def served_skew(context: dg.AssetCheckExecutionContext) -> Iterator[dg.AssetCheckResult]:
        selected = {key.asset_key for key in context.selected_asset_check_keys}
        try:
            report = platform.skew(log)
        except PrefsError as error:
            for key in selected:
                yield unknown_check(key, CHECK, "skew", error)
            return
        for name, key in keys.items():
            if key in selected:
                yield _result(report, name, key)

    return served_skew


def _result(report: SkewReport, domain: str, key: dg.AssetKey) -> dg.AssetCheckResult:
    found = [one for one in report.attributes.values() if one.domain == domain]
    wrong = [
        f"{one.attribute} is wrong in {one.causes['wrong']} of {one.compared}"
        for one in found
        if one.causes["wrong"]
    ]
    return dg.AssetCheckResult(
        asset_key=key,
        check_name=CHECK,
        passed=not wrong,
        description=", ".join(wrong)
        or f"{sum(one.compared for one in found)} logged values are equal or explained",
        metadata={
            "compared": sum(one.compared for one in found),
            "refused": sum(report.refused.values()),
            **{cause: sum(one.causes[cause] for one in found) for cause in CAUSES},
            **{f"{one.attribute}_equal_share": one.equal_share for one in found},
            "examples": _examples(found),
        },
    )


def _examples(found: list[AttributeSkew]) -> dg.TableMetadataValue:
    """Show differences by the ids of their rows, which name nobody."""
    return dg.MetadataValue.table(
        records=[
            dg.TableRecord(
                {
                    "row": example.row_id,
                    "attribute": one.attribute,
                    "cause": example.cause,
                    "served": str(example.served),
                    "expected": str(example.expected),
                }
            )
            for one in found
            for example in one.examples
        ],
        schema=dg.TableSchema(
            columns=[
                dg.TableColumn(name, "string") for name in ("row", "attribute", "cause", "served", "expected")
            ]
        ),
    )
