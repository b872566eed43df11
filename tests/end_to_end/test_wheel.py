"""From an empty folder with only the wheel: a project of one's own, extended, filled, and read."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from own_projects import ROOT, build_wheel
from warm import Warm

pytestmark = pytest.mark.slow

DOCUMENT = ROOT / "docs" / "own-project.md"
# Not in the checkout's file, so that it shows where a file comes from.
MARK = "# from the wheel\n"
SMALL = (
    "--viewers",
    "30",
    "--view-events",
    "900",
    "--shop-events",
    "0",
    "--interactions",
    "0",
    "--days",
    "6",
)


@dataclass
class Installed:
    """The package from its wheel, and a folder to work in; commands see neither the checkout nor its settings."""

    package: Path
    folder: Path
    environment: dict[str, str]
    warm: Warm

    def run(self, *command: str, within: str = "") -> subprocess.CompletedProcess[str]:
        """Run a command."""
        return self.warm.run(["prefs", *command], environment=self.environment, cwd=self.folder / within)

    def ok(self, *command: str, within: str = "my-platform") -> str:
        """Run a command that must succeed, and give what it printed."""
        done = self.run(*command, within=within)
        assert done.returncode == 0, f"{command}: {done.stdout}\n{done.stderr}"
        return done.stdout


@pytest.fixture
def installed(
    tmp_path: Path, session_folder: Path, free_port: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Installed]:
    package, folder = tmp_path / "site", tmp_path / "empty"
    folder.mkdir()
    with build_wheel(tmp_path) as wheel:
        wheel.extractall(package)
    with (package / "dagster_prefs" / "data" / ".env.example").open("a") as file:
        file.write(MARK)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("PREFS_", "PYTEST_"))},
        "PYTHONPATH": str(package),
        "PREFS_ENGINE_PORT": str(free_port()),
        "PREFS_LOCAL_AWS_PORT": str(free_port()),
    }
    found = Installed(package, folder, environment, Warm(session_folder, os.getpid(), package=package))
    yield found
    if (folder / "my-platform").is_dir():
        found.ok("down", "--delete-state")


def documented(heading: str) -> list[list[str]]:
    """The commands below a heading of the page about a project of one's own."""
    section = DOCUMENT.read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    (block,) = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)
    return [shlex.split(line) for line in block.splitlines()]


def test_a_project_from_the_wheel_serves_a_profile(installed: Installed) -> None:
    """The commands of the page, as they stand there; the demo is a small one."""
    lost = installed.run("demo")
    assert lost.returncode != 0
    assert "no dbt project in" in lost.stderr
    until = (datetime.now(UTC).date() - timedelta(days=1)).isoformat()
    within, said = "", {}
    for program, *words in documented("From an empty folder to a profile"):
        if program == "cd":
            (within,) = words
            continue
        assert program == "prefs"
        small = ("--json", "--until", until, *SMALL) if words == ["demo"] else ()
        said[words[0]] = installed.ok(*words, *small, within=within)
    assert (installed.folder / within / ".env.example").read_text().endswith(MARK)
    shown: dict[str, Any] = json.loads(said["demo"])
    assert shown["rows"]["raw_page_views"] == 900
    assert shown["entity"] == "visitor"
    assert shown["items"]["pages"].keys() == {"views_28d", "minutes_28d", "seconds_28d", "last_event_at"}
    assert re.search(r"views_28d +│ [1-9]", said["profile"]), said["profile"]
    assert "nothing to do" in said["plan"]
    assert json.loads(said["schema"])["title"] == "page_views"
    assert "every test passed" in said["test"]
    assert (installed.folder / within / ".prefs").is_dir(), "the state is next to the project"
