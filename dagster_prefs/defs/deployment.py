"""The deployment as Dagster checks: they report drift between the deployed relations and the models."""

from collections.abc import Iterator

import dagster as dg

from dagster_prefs.defs.resources import schedule_status
from dagster_prefs.deploy.plan import DEPLOYMENTS
from dagster_prefs.errors import PrefsError
from dagster_prefs.platform import Platform

JOB = "deployment"
KEY = dg.AssetKey(DEPLOYMENTS)
DRIFT, STRANDED, LEFTOVERS = "no_drift", "no_stranded_relations", "no_leftovers"
DEPLOYMENT_CHECKS = [dg.AssetCheckKey(KEY, name) for name in (DRIFT, STRANDED, LEFTOVERS)]


def build(platform: Platform) -> dg.Definitions:
    """Return the checks of the `deployments` asset, and the job and schedule that evaluate them."""

    @dg.multi_asset_check(
        name="deployment_checks",
        specs=[
            dg.AssetCheckSpec(DRIFT, asset=KEY, description="Every relation is deployed as its model says."),
            dg.AssetCheckSpec(
                STRANDED, asset=KEY, description="No sink or view reads a relation that was swapped away."
            ),
            dg.AssetCheckSpec(
                LEFTOVERS, asset=KEY, description="No temporary object of a change is left over."
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
            if dg.AssetCheckKey(KEY, name) in context.selected_asset_check_keys:
                yield dg.AssetCheckResult(
                    asset_key=KEY,
                    check_name=name,
                    passed=not found,
                    severity=severity,
                    description=f"{len(found)} found: {remedy}" if found else None,
                    metadata={"count": len(found), "found": found, "unchanged": len(plan.unchanged)},
                )

    job = dg.define_asset_job(
        JOB,
        dg.AssetSelection.checks(deployment),
        description="Compare what is deployed with the models, and look for what a change left behind.",
    )
    return dg.Definitions(
        asset_checks=[deployment],
        jobs=[job],
        schedules=[
            dg.ScheduleDefinition(
                name="deployment_daily",
                job=job,
                cron_schedule="30 5 * * *",
                execution_timezone="UTC",
                default_status=schedule_status(platform),
                description="Reports drift once a day, because a change outside the platform causes no event.",
            )
        ],
    )
