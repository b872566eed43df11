"""The RisingWave that the project needs, as `requires_risingwave` of its dbt_project.yml says."""

from __future__ import annotations

import re
from typing import Any

import psycopg

from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.engine.dbt import Dbt
from dagster_prefs.errors import PrefsError


class EngineTooOld(PrefsError):
    """RisingWave is older than the project needs."""


def server_version(text: str) -> tuple[int, ...]:
    """Major, minor and patch of what `select version()` says; all zero where that is no RisingWave."""
    found = re.search(r"RisingWave-(\d+)\.(\d+)\.(\d+)", text)
    return tuple(map(int, found.groups())) if found else (0, 0, 0)


def require_version(connection: psycopg.Connection[Any], engine: EngineConfiguration, dbt: Dbt) -> None:
    """Refuse a RisingWave that is older than the dbt project needs; the embedded engine is never refused.

    The macro `require_version` refuses it in the same words where dbt runs alone. Raises EngineTooOld.
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
