"""Where Dagster is not installed, the commands that do not run it work all the same."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from built_state import command_environment
from warm import Warm

from dagster_prefs.engine.connection import EngineConfiguration


def test_plan_apply_publish_status_and_erase(
    copied_database: Callable[..., AbstractContextManager[EngineConfiguration]],
    deployed_template: EngineConfiguration,
    aws_endpoint: str,
    tmp_path: Path,
    session_folder: Path,
) -> None:
    with copied_database("without_dagster", deployed_template) as engine:
        # In the run's folder, so that it takes over what the other server has parsed.
        without_dagster = Warm(session_folder, os.getpid(), without="dagster")
        environment = command_environment(engine, tmp_path / "state", aws_endpoint)

        def run(*command: str) -> subprocess.CompletedProcess[str]:
            return without_dagster.run(["prefs", *command], environment=environment)

        assert run("apply").returncode == 0
        planned = run("plan", "--json")
        assert (planned.returncode, json.loads(planned.stdout)["relations"]) == (0, []), planned.stderr
        assert run("publish").returncode == 0
        assert run("refresh").returncode == 0
        status = json.loads(run("status", "--json").stdout)
        canaries = [one for one in status["measures"] if one["stage"] == "canary"]
        assert canaries
        assert {one["level"] for one in canaries} == {"skipped"}
        assert all(one["reason"].startswith("the canary is off: ") for one in canaries)
        assert run("export").stdout == "every complete day is exported in its current version\n"
        erased = json.loads(run("erase", "viewer", "5", "--json").stdout)
        assert erased["held"] is False
        # The hook works: what runs Dagster cannot.
        assert "No module named 'dagster'" in run("ui").stderr
