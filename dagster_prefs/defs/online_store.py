"""The DynamoDB table and what is published into it."""

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import dagster as dg

from dagster_prefs.defs.resources import TABLE_KEY, Platform
from dagster_prefs.freshness.online import online_lag
from dagster_prefs.online.contract import Domain
from dagster_prefs.online.publisher import publish_domain

GROUP = "online_store"


def build(platform: Platform) -> dg.Definitions:
    """The table asset and, where this platform publishes, one asset per domain with its checks."""
    contract = platform.contract

    @dg.asset(
        key=TABLE_KEY,
        group_name=GROUP,
        kinds={"dynamodb"},
        owners=[contract.owner],
        description="The table with one item per viewer and domain; made or verified against the contract.",
    )
    def viewer_profiles() -> dg.MaterializeResult[Any]:
        report = platform.provision(platform.dynamodb())
        return dg.MaterializeResult(
            metadata={
                "table": report.name,
                "table_id": report.table_id,
                "status": report.status,
                "created": report.created,
                "billing_mode": report.billing_mode,
                "encryption": report.encryption,
                "deletion_protection": report.deletion_protection,
            }
        )

    assets: list[dg.AssetsDefinition] = [viewer_profiles]
    if platform.settings.publishes:
        assets += [_published(platform, domain) for domain in contract.domains.values()]
    return dg.Definitions(assets=assets)


def _published(platform: Platform, domain: Domain) -> dg.AssetsDefinition:
    key = dg.AssetKey(["online", domain.name])
    check = dg.AssetCheckSpec(
        "everything_published",
        asset=key,
        description="DynamoDB holds as many items as the rolling view has rows, and the sampled ones are equal.",
    )

    @dg.asset(
        key=key,
        deps=[dg.AssetKey(domain.sink)],
        group_name=GROUP,
        kinds={"dynamodb"},
        owners=[domain.owner],
        check_specs=[check],
        description=f"{domain.description} Upserts what changed in {domain.relation}, deletes who left it.",
    )
    def published(
        context: dg.AssetExecutionContext,
    ) -> Iterator[dg.MaterializeResult[Any] | dg.AssetCheckResult]:
        client = platform.dynamodb()
        table = platform.provision(client)
        report = publish_domain(platform.engine, client, platform.contract, domain.key, table)
        context.log.info(f"{domain.key}: {report.upserts} upserts, {report.deletes} deletes")
        yield dg.MaterializeResult(
            asset_key=key,
            metadata={
                "upserts": report.upserts,
                "deletes": report.deletes,
                "unchanged": report.unchanged,
                "retries": report.retries,
                "seconds": report.seconds,
                "dagster/row_count": report.upserts + report.unchanged,
            },
        )
        lag = online_lag(platform.engine, client, platform.contract, domain, table, now=datetime.now(UTC))
        yield dg.AssetCheckResult(
            asset_key=key,
            check_name=check.name,
            passed=lag.in_step and lag.view_rows == lag.published_rows,
            metadata={
                "view_rows": lag.view_rows,
                "published_rows": lag.published_rows,
                "sampled": lag.sampled,
                "missing": lag.missing,
                "extra": lag.extra,
                "different": lag.different,
                "attributes": ", ".join(lag.attributes),
            },
        )

    return published
