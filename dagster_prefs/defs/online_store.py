"""The DynamoDB table and what is published into it."""

import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import dagster as dg

from dagster_prefs.defs.resources import TABLE_KEY, Platform
from dagster_prefs.freshness.online import online_lag
from dagster_prefs.online.access import ItemAccess
from dagster_prefs.online.changefeed import PublishedElsewhere, process_label, publish_changes
from dagster_prefs.online.contract import Domain
from dagster_prefs.online.lease import read_lease
from dagster_prefs.online.publisher import publish_domain
from dagster_prefs.online.tables import TableReport

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
    if platform.settings.publishes or platform.settings.follows:
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
        # A view for the publisher waits for the table as a sink does; a subscription knows nothing of DynamoDB.
        deps=[dg.AssetKey(domain.sink), *([TABLE_KEY] if platform.settings.follows else [])],
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
        if platform.settings.follows:
            metadata = catch_up(platform, client, domain, table)
        else:
            report = publish_domain(platform.engine, client, platform.contract, domain.key, table)
            metadata = {
                "upserts": report.upserts,
                "deletes": report.deletes,
                "unchanged": report.unchanged,
                "retries": report.retries,
                "seconds": report.seconds,
                "dagster/row_count": report.upserts + report.unchanged,
            }
        context.log.info(f"{domain.key}: {metadata}")
        yield dg.MaterializeResult(asset_key=key, metadata=metadata)
        lag = online_lag(platform.engine, client, platform.contract, domain, table, now=datetime.now(UTC))
        # Nothing counts what a changefeed published, and beside a follower the newest changes are under way.
        passed = (
            max(lag.oldest_seconds, lag.ahead_seconds) < domain.freshness.error_seconds
            if platform.settings.follows
            else lag.in_step
        )
        yield dg.AssetCheckResult(
            asset_key=key,
            check_name=check.name,
            passed=passed,
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


def catch_up(platform: Platform, client: Any, domain: Domain, table: TableReport) -> dict[str, Any]:
    """Publish what changed by now, unless a follower does so already; what to tell of it."""
    try:
        (report,) = publish_changes(
            platform.engine,
            client,
            platform.contract,
            table,
            mode="once",
            stop=threading.Event(),
            label=process_label(),
            domains=[domain.key],
            promise_seconds=platform.settings.changefeed_lease_seconds,
        )
    except PublishedElsewhere as error:
        state = read_lease(ItemAccess(client, platform.contract, table.name), domain)
        token = None if state is None or state.token is None else state.token / 1000
        return {"publisher": str(error)} | (
            {} if token is None else {"token_at": dg.MetadataValue.timestamp(token)}
        )
    return {
        "upserts": report.upserts,
        "deletes": report.deletes,
        "compared_whole_view": bool(report.resyncs),
        "retries": report.retries,
        "seconds": report.seconds,
    }
