"""A place of its own for a whole run of the product: state, ports and environment as a user would have them."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from warm import COMMANDS, Warm, WarmProcess

PROJECT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


@dataclass
class Place:
    """A data folder with its own services; commands run in it as a user's shell would run them."""

    data_dir: Path
    environment: Mapping[str, str]
    warm: Warm

    def start(self, *command: str) -> subprocess.Popen[str] | WarmProcess:
        """Start a command of the project in a process group of its own."""
        if command[0] in COMMANDS:
            return self.warm.start(command, environment=self.environment, cwd=PROJECT)
        return subprocess.Popen(
            [str(BIN / command[0]), *command[1:]],
            cwd=PROJECT,
            env=dict(self.environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *command: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        process = self.start(*command)
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def ok(self, *command: str, timeout: float = 300) -> str:
        """Run a command that must succeed, and give what it printed."""
        done = self.run(*command, timeout=timeout)
        assert done.returncode == 0, f"{command}: {done.stdout}\n{done.stderr}"
        return done.stdout


@pytest.fixture(scope="module")
def new_place(
    tmp_path_factory: pytest.TempPathFactory, free_port: Callable[[], int], warm: Warm
) -> Iterator[Callable[[], Place]]:
    places = []

    def make(**settings: str) -> Place:
        data_dir = tmp_path_factory.mktemp("place") / "state"
        environment = {
            **os.environ,
            "PREFS_DATA_DIR": str(data_dir),
            "PREFS_ENGINE_PORT": str(free_port()),
            "PREFS_LOCAL_AWS_PORT": str(free_port()),
            **settings,
        }
        places.append(Place(data_dir, environment, warm))
        return places[-1]

    yield make
    for place in places:
        place.run("prefs", "down", "--delete-state")
