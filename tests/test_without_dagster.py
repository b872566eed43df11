"""Where Dagster is not installed, the commands that do not run it work all the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from dagster_prefs.engine.connection import EngineConfiguration

# Every import of a package of Dagster's ends as where it is not installed.
WITHOUT = """
import sys

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0].startswith("dagster") and not name.startswith("dagster_prefs"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NotInstalled())
from dagster_prefs.cli import main
main()
"""


def test_plan_apply_publish_status_and_erase(
    copied_database: Callable[..., AbstractContextManager[EngineConfiguration]],
    deployed_template: EngineConfiguration,
    aws_endpoint: str,
    tmp_path: Path,
) -> None:
    with copied_database("without_dagster", deployed_template) as engine:
        environment = {
            **os.environ,
            "PREFS_ENGINE_PORT": str(engine.port),
            "PREFS_ENGINE_USER": engine.user,
            "PREFS_ENGINE_DATABASE": engine.database,
            "PREFS_DATA_DIR": str(tmp_path / "state"),
            "AWS_ENDPOINT_URL": aws_endpoint,
        }

        def run(*command: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [sys.executable, "-c", WITHOUT, *command], env=environment, capture_output=True, text=True
            )

        assert run("apply").returncode == 0
        planned = run("plan", "--json")
        assert (planned.returncode, json.loads(planned.stdout)["relations"]) == (0, []), planned.stderr
        assert run("publish").returncode == 0
        status = json.loads(run("status", "--json").stdout)
        canaries = [one for one in status["measures"] if one["stage"] == "canary"]
        assert canaries
        assert {one["level"] for one in canaries} == {"skipped"}
        assert {one["reason"] for one in canaries} == {
            "the canary is a sensor of Dagster, which is not installed here"
        }
        erased = json.loads(run("erase", "viewer", "5", "--json").stdout)
        assert erased["held"] is False
        # The hook works: what runs Dagster cannot.
        assert "No module named 'dagster'" in run("refresh").stderr
