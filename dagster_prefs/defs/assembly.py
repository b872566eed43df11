"""Assembles `defs/` for given settings; unlike `dagster_prefs.definitions`, importing it builds nothing."""

from __future__ import annotations

from collections.abc import Mapping

import dagster as dg

from dagster_prefs.defs import (
    deployment,
    events,
    feature_views,
    freshness,
    offline_store,
    online_store,
    retention,
    values,
)
from dagster_prefs.platform import Platform
from dagster_prefs.settings import Settings


def build_definitions(settings: Settings) -> dg.Definitions:
    """Return all assets, checks, jobs, schedules and sensors for these settings.

    Raises StaleRegistry if the project's files differ from those of its registry.
    """
    platform = Platform(settings)
    webhook = settings.alert_webhook.get_secret_value() if settings.alert_webhook else None
    merged = dg.Definitions.merge(
        feature_views.build(platform),
        deployment.build(platform),
        online_store.build(platform),
        offline_store.build(platform),
        events.build(platform),
        freshness.build(platform, webhook),
        values.build(platform, webhook),
        retention.build(platform),
        # One process a run: the steps are short and share dbt, so a process each would only add start-up time.
        dg.Definitions(executor=dg.in_process_executor),
    )
    return tagged(merged, settings.dagster_tags)


def tagged(definitions: dg.Definitions, tags: Mapping[str, str]) -> dg.Definitions:
    """Return the definitions with these tags on every asset."""
    if not tags:
        return definitions
    return definitions.map_asset_specs(func=lambda spec: spec.merge_attributes(tags=tags))
