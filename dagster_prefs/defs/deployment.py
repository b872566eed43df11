"""What runs beside what is written: the plan over this platform's parts, and the check that reports drift."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import cached_property, partial
from typing import Any

import dagster as dg

from dagster_prefs.defs.online_store import catch_up
from dagster_prefs.defs.resources import Platform
from dagster_prefs.engine.apply import apply_plan
from dagster_prefs.engine.plan import DEPLOYMENTS, ContractChange, ContractReview, Plan, make_plan
from dagster_prefs.errors import PrefsError
from dagster_prefs.freshness.reconcile import reconcile_domain
from dagster_prefs.online.contract import (
    Contract,
    ContractError,
    build_contract,
    check_version,
    deployed_contract,
    diff_contracts,
    parse_contract,
)
from dagster_prefs.online.publisher import publish_domain
from dagster_prefs.online.tables import TableReport

JOB = "deployment"
KEY = dg.AssetKey(DEPLOYMENTS)
DRIFT, STRANDED, LEFTOVERS = "no_drift", "no_stranded_relations", "no_leftovers"
DEPLOYMENT_CHECKS = [dg.AssetCheckKey(KEY, name) for name in (DRIFT, STRANDED, LEFTOVERS)]


def review_contract(
    shipped: Contract, fragments: Sequence[Mapping[str, Any]], manifest: Mapping[str, Any]
) -> ContractReview:
    """What the models change of the deployed contract, and why it must not go out, if so.

    Refused are a breaking change without a higher version, and a `shipped` contract that is not the models'.
    """
    written = parse_contract(build_contract(manifest))
    if written != shipped:
        return ContractReview(
            refusal="contract.json is not what the models say: run `prefs contract build` and commit it"
        )
    deployed = deployed_contract(fragments)
    if deployed is None:
        return ContractReview()
    changes = tuple(
        ContractChange(change.kind, change.path, change.what) for change in diff_contracts(deployed, written)
    )
    try:
        check_version(deployed, written)
    except ContractError as error:
        return ContractReview(changes, str(error))
    return ContractReview(changes)


class ProfileStore:
    """The DynamoDB table behind the rolling views, for an apply."""

    def __init__(self, platform: Platform) -> None:
        self._platform = platform

    @cached_property
    def _client(self) -> Any:
        return self._platform.dynamodb()

    @cached_property
    def _table(self) -> TableReport:
        return self._platform.provision(self._client)

    def prepare(self) -> None:
        """Make or verify the table, and those in Iceberg where RisingWave's sinks write them."""
        _ = self._table
        if self._platform.settings.export == "sink":
            self._platform.prepare_training_tables()

    def settle(self, relation: str) -> str:
        """Bring the domain's items to the rows of its rolling view: published here, reconciled behind a sink.

        Behind a changefeed only the holder of its lease writes: this process, or a follower that is at work.
        """
        platform = self._platform
        domain = next(one for one in platform.contract.domains.values() if one.relation == relation)
        if platform.settings.publishes:
            done = publish_domain(platform.engine, self._client, platform.contract, domain.key, self._table)
            return f"{domain.name}: {done.upserts} upserts, {done.deletes} deletes"
        if platform.settings.follows:
            told = catch_up(platform, self._client, domain, self._table)
            return (
                told.get("publisher")
                or f"{domain.name}: {told['upserts']} upserts, {told['deletes']} deletes"
            )
        found = reconcile_domain(
            platform.engine, self._client, platform.contract, domain, self._table, now=datetime.now(UTC)
        )
        return (
            f"{domain.name}: {found.missing} missing, {found.different} stale, {found.extra} extra repaired"
        )


def plan_of(platform: Platform, *, drop_orphans: bool = False) -> Plan:
    """What an apply would change now; see `make_plan`."""
    return make_plan(
        platform.engine, platform.dbt, partial(review_contract, platform.contract), drop_orphans=drop_orphans
    )


def apply_to(
    platform: Platform, *, drop_orphans: bool = False, on_step: Callable[[str], None] = lambda step: None
) -> Plan:
    """Carry the plan out; see `apply_plan`."""
    return apply_plan(
        platform.engine,
        platform.dbt,
        partial(review_contract, platform.contract),
        ProfileStore(platform),
        drop_orphans=drop_orphans,
        on_step=on_step,
    )


def build(platform: Platform) -> dg.Definitions:
    """The checks of the `deployments` asset, and the job and schedule that evaluate them."""

    @dg.multi_asset_check(
        name="deployment_checks",
        specs=[
            dg.AssetCheckSpec(DRIFT, asset=KEY, description="Every relation is deployed as its model says."),
            dg.AssetCheckSpec(
                STRANDED, asset=KEY, description="No sink or view reads what was swapped away."
            ),
            dg.AssetCheckSpec(
                LEFTOVERS, asset=KEY, description="No temporary object of a change is left over."
            ),
        ],
        can_subset=True,
    )
    def deployment(context: dg.AssetCheckExecutionContext) -> Iterator[dg.AssetCheckResult]:
        try:
            plan = plan_of(platform)
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
                default_status=platform.default_schedule_status,
                description="Reports drift once a day, because a change outside the platform tells nobody.",
            )
        ],
    )
