"""The suite runs wherever a clone lies: the whole of it is too dear here, so a few tests that reach for everything."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from dagster_prefs.settings import load_settings

PROJECT = Path(__file__).parents[1]
# They start the services, compile a dbt project (a small one), call make, and keep examples of hypothesis.
REACHING = (
    "tests/local/test_fixtures.py",
    "tests/declarations/test_projects.py::test_a_spread_of_text_keys_goes_by_their_hash",
    "tests/test_readme.py::test_make_demo_and_make_help_say_what_they_do",
    "tests/test_ids.py",
)
# Bytecode comes along, as far as it is written: to compile everything again says nothing about the place.
LEFT_OUT = shutil.ignore_patterns(
    ".*venv*", ".git", ".prefs", ".feast", ".dlt", ".checkov", ".*_cache", ".hypothesis", "*.pyc.*", "target"
)


# Modes do not keep root from writing; a mount that only the command sees does, and it is gone with it.
READ_ONLY_FOR_ROOT = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && cd "$0" && exec "$@"'


@dataclass(frozen=True)
class Clone:
    """A copy of the tree in which commands run, and which they cannot write."""

    folder: Path
    prefix: tuple[str, ...]

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command in the clone, with the clone's package."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        return subprocess.run(
            [*self.prefix, *command],
            cwd=self.folder,
            env={**kept, "PYTHONPATH": str(self.folder)},
            capture_output=True,
            text=True,
            timeout=600,
        )


@pytest.fixture
def clone(tmp_path: Path) -> Iterator[Clone]:
    """In a folder that only its owner may enter, whose name has blanks and more than ASCII."""
    folder = tmp_path / "nur für mich ✓"
    folder.mkdir(mode=0o700)
    copy = folder / "der klon"
    shutil.copytree(PROJECT, copy, ignore=LEFT_OUT)
    parts = [copy, *copy.rglob("*")]
    (copy / ".venv").symlink_to(Path(sys.executable).parents[1])
    prefix: tuple[str, ...] = ()
    if os.geteuid() == 0:
        prefix = ("unshare", "--mount", "sh", "-c", READ_ONLY_FOR_ROOT, str(copy))
        with contextlib.suppress(FileNotFoundError):
            if subprocess.run([*prefix, "true"], capture_output=True).returncode == 0:
                yield Clone(copy, prefix)
                return
        pytest.skip("no folder can be made read-only for root here")
    for part in parts:
        part.chmod(0o555 if part.is_dir() else 0o444)
    yield Clone(copy, prefix)
    for part in parts:
        part.chmod(0o755 if part.is_dir() else 0o644)


@pytest.fixture
def default_ports_are_busy() -> Iterator[None]:
    """Somebody else, or this test, listens where the services would by default."""
    settings = load_settings()
    with contextlib.ExitStack() as stack:
        for port in (settings.port, settings.local_aws_port):
            holder = stack.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                holder.bind(("127.0.0.1", port))
                holder.listen()
        yield


@pytest.mark.usefixtures("default_ports_are_busy")
def test_a_clone_of_any_kind_passes_beside_this_one(clone: Clone) -> None:
    assert clone.run("touch", "written").returncode != 0
    done = clone.run(str(clone.folder / ".venv" / "bin" / "python"), "-m", "pytest", "-q", *REACHING)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
