"""Assembles `defs/` for given settings; unlike `dagster_prefs.definitions`, importing it builds nothing."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

import dagster as dg

from dagster_prefs.defs import (
    deployment,
    events,
    feature_views,
    freshness,
    lake,
    offline_store,
    online_store,
    retention,
    skew,
    values,
)
from dagster_prefs.errors import PrefsError
from dagster_prefs.platform import Platform
from dagster_prefs.settings import Settings


class UnknownName(PrefsError):
    """A schedule or group that was configured does not exist."""


def build_definitions(settings: Settings) -> dg.Definitions:
    """Return all assets, checks, jobs, schedules and sensors for a code location that has nothing else.

    Raises StaleRegistry if the project's files differ from those of its registry, UnknownName.
    """
    return dg.Definitions.merge(
        place_definitions(settings, {}),
        # One process a run: the steps are short and share dbt, so a process each would only add start-up time.
        dg.Definitions(executor=dg.in_process_executor),
    )


def place_definitions(settings: Settings, group_names: Mapping[str, str]) -> dg.Definitions:
    """Return the definitions of a platform beside others in a code location, whose executor runs them.

    `group_names` maps groups to other names. Raises like `build_definitions`.
    """
    platform = Platform(settings)
    made = dg.Definitions.merge(
        feature_views.build(platform),
        deployment.build(platform),
        online_store.build(platform),
        offline_store.build(platform),
        lake.build(platform),
        events.build(platform),
        freshness.build(platform, settings.alert_webhooks),
        values.build(platform, settings.alert_webhooks),
        skew.build(platform, settings.alert_webhooks),
        retention.build(platform),
    )
    prefix = settings.dagster_name("")
    _known(
        "PREFS_SCHEDULE_CRONS names the schedule",
        settings.schedule_crons,
        [one.name.removeprefix(prefix) for one in made.schedules or ()],
    )
    tags = settings.dagster_tags
    if not group_names and not tags:
        return made
    groups = set()

    def renamed(spec: dg.AssetSpec) -> dg.AssetSpec:
        group = spec.group_name or "default"
        groups.add(group)
        return spec.replace_attributes(group_name=group_names.get(group, group)).merge_attributes(tags=tags)

    given: Any = made.assets or ()
    assets = dg.map_asset_specs(renamed, given)
    _known("group_names names the group", group_names, groups)
    return dg.Definitions(
        assets=list(assets),
        asset_checks=made.asset_checks,
        jobs=made.jobs,
        schedules=made.schedules,
        sensors=made.sensors,
    )


def _known(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    names = sorted(known)
    for name in given:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
            raise UnknownName(f"{what} {name}, which does not exist: {hint}")
