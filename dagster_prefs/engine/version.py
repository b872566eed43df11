"""The RisingWave version that a project requires, from `requires_risingwave` in its dbt_project.yml."""

from __future__ import annotations

import re
from typing import Any

import psycopg

from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.engine.dbt import Dbt
from dagster_prefs.errors import PrefsError


class EngineTooOld(PrefsError):
    """RisingWave is older than the project requires."""


def server_version(text: str) -> tuple[int, ...]:
    """Parse the result of `select version()` into major, minor and patch; zeros if it is not RisingWave."""
    found = re.search(r"RisingWave-(\d+)\.(\d+)\.(\d+)", text)
    return tuple(map(int, found.groups())) if found else (0, 0, 0)


def require_version(connection: psycopg.Connection[Any], engine: EngineConfiguration, dbt: Dbt) -> None:
    """Raise EngineTooOld if RisingWave is older than the dbt project requires; never for the embedded engine.

    The macro `require_version` reports the same error in the same words when dbt runs alone.
    """
    if engine.kind != "risingwave":
        return
    needed = next(
        node["config"]["meta"]["requires_risingwave"]
        for node in dbt.manifest()["nodes"].values()
        if "requires_risingwave" in node["config"].get("meta", {})
    )
    ((text,),) = connection.execute("select version()").fetchall()
    if server_version(text) < tuple(map(int, needed["version"].split("."))):
        shown = text.split("RisingWave-")[-1].split(" ")[0]
        raise EngineTooOld(
            f"RisingWave at {engine.host}:{engine.port} is {shown}, and this project needs {needed['version']} or "
            f"newer: {needed['because']}. Nothing was changed: upgrade RisingWave, then run again"
        )
