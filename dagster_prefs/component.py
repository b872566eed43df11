"""The platform in an existing Dagster deployment: as a component, and as a call that returns its definitions."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import dagster as dg
from pydantic import BaseModel, Field

from dagster_prefs.defs.assembly import place_definitions
from dagster_prefs.settings import settings_with

SETTINGS_TOLD = "Settings of .env.example, by variable. The environment of the code location has the others."


def preference_platform(
    project_dir: Path | str,
    *,
    settings: Mapping[str, str] | None = None,
    key_prefix: str = "",
    group_names: Mapping[str, str] | None = None,
    schedules: bool | None = None,
    schedule_crons: Mapping[str, str] | None = None,
    alert_channels: Sequence[str] = (),
) -> dg.Definitions:
    """Return the definitions of one project, to be merged with those of others in a code location.

    `project_dir` is the dbt project. `settings` are those of .env.example by variable; the environment has the others,
    and no `.env` is read. `key_prefix` (`team/shop`) begins every asset key, and the names of jobs, schedules and
    sensors: two platforms in a code location need different ones. `group_names` renames groups. `schedules` says
    whether schedules and sensors run from the start, None leaves it to PREFS_SCHEDULES; `schedule_crons` replaces the
    times of schedules (UTC). `alert_channels` are Slack-compatible webhooks.

    The executor is that of the code location. Raises SettingsError, RegistryError and StaleRegistry with the remedy.
    """
    # A component's templates make a number of a text like "54329".
    given = {"PREFS_PROJECT_DIR": str(project_dir)} | {
        name: str(value) for name, value in (settings or {}).items()
    }
    if key_prefix:
        given["PREFS_ASSET_PREFIX"] = key_prefix
    if schedules is not None:
        given["PREFS_SCHEDULES"] = "on" if schedules else "off"
    if schedule_crons:
        given["PREFS_SCHEDULE_CRONS"] = json.dumps(dict(schedule_crons))
    if alert_channels:
        given["PREFS_ALERT_WEBHOOK"] = ",".join(alert_channels)
    return place_definitions(settings_with(given), group_names or {})


def _project_dir(context: dg.ResolutionContext, given: str) -> str:
    return str(context.resolve_source_relative_path(context.resolve_value(given, as_type=str)))


class PreferencePlatformScaffold(BaseModel):
    """The options of `dg scaffold defs dagster_prefs.PreferencePlatform`."""

    project_dir: str = Field(description="Folder of the dbt project.")
    key_prefix: str | None = Field(None, description="Prefix of every asset key, e.g. shop.")


class PreferencePlatformScaffolder(dg.Scaffolder[PreferencePlatformScaffold]):
    """Writes a `defs.yaml` with the project's folder relative to it."""

    @classmethod
    def get_scaffold_params(cls) -> type[PreferencePlatformScaffold]:
        """Return the options."""
        return PreferencePlatformScaffold

    def scaffold(self, request: dg.ScaffoldRequest[PreferencePlatformScaffold]) -> None:
        """Write the component's file."""
        project = os.path.relpath(Path(request.params.project_dir).absolute(), request.target_path.absolute())
        attributes: dict[str, Any] = {"project_dir": project, "schedules": False}
        if request.params.key_prefix:
            attributes["key_prefix"] = request.params.key_prefix
        dg.scaffold_component(request, attributes)


@dg.scaffold_with(PreferencePlatformScaffolder)
@dataclass
class PreferencePlatform(dg.Component, dg.Resolvable):
    """Real-time preference and engagement profiles of one dbt project that declares topics, tiles and domains.

    Adds its models, DynamoDB tables, training tables and their checks as assets, and the jobs, schedules and sensors
    that keep and watch them.
    """

    project_dir: Annotated[
        str,
        dg.Resolver(
            _project_dir,
            model_field_type=str,
            description="Folder of the dbt project, relative to this file.",
            examples=["../../../../dbt_project"],
        ),
    ]
    settings: Annotated[
        dict[str, str],
        dg.Resolver.default(
            description=SETTINGS_TOLD,
            examples=[{"PREFS_ENGINE": "risingwave", "PREFS_ENGINE_PASSWORD": "{{ env.RW_PASSWORD }}"}],
        ),
    ] = field(default_factory=dict, repr=False)
    key_prefix: Annotated[
        str,
        dg.Resolver.default(
            description="Prefix of every asset key and of the names of jobs, schedules and sensors; two platforms in a "
            "code location need different ones.",
            examples=["shop", "team/shop"],
        ),
    ] = ""
    group_names: Annotated[
        dict[str, str],
        dg.Resolver.default(
            description="Other names for groups of assets.", examples=[{"online_store": "shop_online"}]
        ),
    ] = field(default_factory=dict)
    schedules: Annotated[
        bool | None,
        dg.Resolver.default(
            description="Whether schedules and sensors run from the start; by default as PREFS_SCHEDULES says."
        ),
    ] = None
    schedule_crons: Annotated[
        dict[str, str],
        dg.Resolver.default(
            description="Other times of schedules (cron, UTC), by their names without the prefix.",
            examples=[{"parity_daily": "0 6 * * *"}],
        ),
    ] = field(default_factory=dict)
    alert_channels: Annotated[
        list[str],
        dg.Resolver.default(
            description="Slack-compatible webhooks (https) that receive alerts.",
            examples=[["{{ env.SLACK_WEBHOOK }}"]],
        ),
    ] = field(default_factory=list, repr=False)

    def build_defs(self, context: dg.ComponentLoadContext) -> dg.Definitions:
        """Return the platform's definitions, without an executor."""
        return preference_platform(
            self.project_dir,
            settings=self.settings,
            key_prefix=self.key_prefix,
            group_names=self.group_names,
            schedules=self.schedules,
            schedule_crons=self.schedule_crons,
            alert_channels=self.alert_channels,
        )
