"""The deployment as Dagster checks: they report drift between the deployed relations and the models."""

from collections.abc import Iterator

import dagster as dg

from dagster_prefs.defs.resources import asset_job, asset_key, job_schedule
from dagster_prefs.deploy.plan import DEPLOYMENTS
from dagster_prefs.errors import PrefsError
from dagster_prefs.platform import Platform
from dagster_prefs.settings import Settings

JOB = "deployment"
DRIFT, STRANDED, LEFTOVERS = "no_drift", "no_stranded_relations", "no_leftovers"


def deployment_checks(settings: Settings) -> list[dg.AssetCheckKey]:
    """Return the checks that compare what is deployed with the models."""
    key = asset_key(settings, DEPLOYMENTS)
    return [dg.AssetCheckKey(key, name) for name in (DRIFT, STRANDED, LEFTOVERS)]


def build(platform: Platform) -> dg.Definitions:
    """Return the checks of the `deployments` asset, and the job and schedule that evaluate them."""
    settings = platform.settings
    key = asset_key(settings, DEPLOYMENTS)

    @dg.multi_asset_check(
        name=settings.dagster_name("deployment_checks"),
        specs=[
            dg.AssetCheckSpec(DRIFT, asset=key, description="Every relation is deployed as its model says."),
            dg.AssetCheckSpec(
                STRANDED, asset=key, description="No sink or view reads a relation that was swapped away."
            ),
            dg.AssetCheckSpec(
                LEFTOVERS, asset=key, description="No temporary object of a change is left over."
            ),
        ],
        can_subset=True,
    )
    def deployment(context: dg.AssetCheckExecutionContext) -> Iterator[dg.AssetCheckResult]:
        try:
            plan = platform.plan()
        except PrefsError as error:
            raise dg.Failure(description=str(error)) from error
        context.log.info(plan.text())
        drifted = [f"{relation.name}: {relation.action}" for relation in plan.relations]
        drifted += [f"contract: {change.domain}: {change.what}" for change in plan.contract.changes]
        if plan.contract.refusal:
            drifted.append(plan.contract.refusal)
        stranded = [f"{name}: {why}" for name, why in plan.stranded.items()]
        left = [*plan.leftovers, *(f"unfinished plan {one}" for one in plan.unfinished)]
        for name, found, severity, remedy in (
            (DRIFT, drifted, dg.AssetCheckSeverity.WARN, "`prefs plan` shows it, `prefs apply` removes it"),
            (STRANDED, stranded, dg.AssetCheckSeverity.ERROR, "`prefs apply` rebuilds them"),
            (
                LEFTOVERS,
                left,
                dg.AssetCheckSeverity.WARN,
                "`prefs apply` finishes or clears its own, `dbt run-operation cleanup_temp_objects` dbt's",
            ),
        ):
            if dg.AssetCheckKey(key, name) in context.selected_asset_check_keys:
                yield dg.AssetCheckResult(
                    asset_key=key,
                    check_name=name,
                    passed=not found,
                    severity=severity,
                    description=f"{len(found)} found: {remedy}" if found else None,
                    metadata={"count": len(found), "found": found, "unchanged": len(plan.unchanged)},
                )

    job = asset_job(
        settings,
        JOB,
        dg.AssetSelection.checks(deployment),
        "Compare what is deployed with the models, and look for what a change left behind.",
    )
    return dg.Definitions(
        asset_checks=[deployment],
        jobs=[job],
        schedules=[
            job_schedule(
                settings,
                "deployment_daily",
                job,
                "30 5 * * *",
                "Reports drift once a day, because a change outside the platform causes no event.",
            )
        ],
    )
