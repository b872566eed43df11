"""The DynamoDB tables, and the domains published to them, as assets."""

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import dagster as dg

from dagster_prefs.declarations.contract import Domain
from dagster_prefs.defs.column_lineage import same_columns
from dagster_prefs.defs.resources import asset_key, engine_pool, platform_name, table_key
from dagster_prefs.dynamodb.publisher import publish_domain
from dagster_prefs.freshness.online import online_lag
from dagster_prefs.platform import Platform, catch_up
from dagster_prefs.settings import Settings

GROUP = "online_store"
# The tag of these assets, with the platform's name: the group may hold assets of others.
TAG = "dagster_prefs/online_store"


def online_assets(settings: Settings) -> dg.AssetSelection:
    """Return the selection of the tables and of what this platform publishes to them."""
    return dg.AssetSelection.tag(TAG, platform_name(settings))


def build(platform: Platform) -> dg.Definitions:
    """Return the table assets and, if this platform publishes, one asset per domain with its checks."""
    contract = platform.contract
    assets = [_table(platform, entity) for entity in contract.tables]
    if platform.settings.publishes or platform.settings.follows:
        assets += [_published(platform, domain) for domain in contract.domains.values()]
    return dg.Definitions(assets=assets)


def _table(platform: Platform, entity: str) -> dg.AssetsDefinition:
    contract = platform.contract

    @dg.asset(
        key=table_key(platform.settings, contract.tables[entity]),
        pool=engine_pool(platform.settings),
        group_name=GROUP,
        kinds={"dynamodb"},
        tags={TAG: platform_name(platform.settings)},
        owners=[contract.owner],
        description=f"The table with one item per {entity} and domain; created or verified against the contract.",
    )
    def table() -> dg.MaterializeResult[Any]:
        report = platform.provision(platform.dynamodb())[entity]
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

    return table


def _published(platform: Platform, domain: Domain) -> dg.AssetsDefinition:
    settings = platform.settings
    key, sink = asset_key(settings, "online", domain.name), asset_key(settings, domain.sink)
    check = dg.AssetCheckSpec(
        "everything_published",
        asset=key,
        description="DynamoDB holds as many items as the rolling view has rows, and the sampled ones are equal.",
    )

    @dg.asset(
        key=key,
        # Unlike a sink or a view for the publisher, a subscription does not itself depend on the DynamoDB
        # table.
        deps=[
            sink,
            *([table_key(settings, platform.contract.table_of(domain))] if settings.follows else []),
        ],
        group_name=GROUP,
        kinds={"dynamodb"},
        tags={TAG: platform_name(platform.settings)},
        owners=[domain.owner],
        check_specs=[check],
        pool=engine_pool(settings),
        metadata=same_columns(domain.attributes, sink),
        description=f"{domain.description} Upserts the changes of {domain.relation}, deletes items without a row.",
    )
    def published(
        context: dg.AssetExecutionContext,
    ) -> Iterator[dg.MaterializeResult[Any] | dg.AssetCheckResult]:
        (store,) = (one for one in platform.stores() if one.domain == domain)
        if platform.settings.follows:
            metadata = catch_up(store, platform.settings.changefeed_lease_seconds)
            if "token_at" in metadata:
                metadata["token_at"] = dg.MetadataValue.timestamp(metadata["token_at"])
        else:
            report = publish_domain(store)
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
        lag = online_lag(store, now=datetime.now(UTC))
        # No count exists of what a changefeed published, and while a follower runs, the newest changes are in
        # flight.
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
