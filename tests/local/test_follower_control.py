"""The supervisor's follower: started with what was handed over, replaced with its settings, started again."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import waiting

from dagster_prefs.local import follower
from dagster_prefs.local.follower import SOCKET, FollowerControl, hand_over, stop_following
from dagster_prefs.local.state import LocalServicesError

# A follower that says in a file who it is and what it was given.
PROGRAM = """
import os, time, pathlib
pathlib.Path(os.environ["TOLD"]).write_text(f"{os.getpid()} {os.environ.get('PREFS_SECRET', '')}")
time.sleep(600)
"""


wait_for = partial(waiting.wait_for, seconds=120)


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    # Longer than the path of a socket may be.
    folder = tmp_path / ("d" * 120)
    (folder / "logs").mkdir(parents=True)
    return folder


@pytest.fixture
def control(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FollowerControl]:
    monkeypatch.setattr(follower, "PAUSE_SECONDS", (0.0, 0.1))
    made = FollowerControl(data_dir, [sys.executable, "-c", PROGRAM])
    yield made
    made.close()


def test_one_runs_with_the_settings_that_came_last(
    control: FollowerControl, data_dir: Path, tmp_path: Path
) -> None:
    told = tmp_path / "told"

    def running(secret: str) -> int | None:
        control.watch()
        words = told.read_text().split() if told.exists() else []
        return int(words[0]) if words[1:] == [secret] else None

    given = {"PATH": os.environ["PATH"], "TOLD": str(told), "PREFS_SECRET": "first"}
    hand_over(data_dir, given)
    first = wait_for(lambda: running("first"))
    hand_over(data_dir, given)
    assert running("first") == first
    os.kill(first, signal.SIGKILL)
    again = wait_for(lambda: (pid := running("first")) and pid != first and pid)
    hand_over(data_dir, given | {"PREFS_SECRET": "second"})
    second = wait_for(lambda: running("second"))
    with pytest.raises(ProcessLookupError):
        os.kill(again, 0)
    control.close()
    with pytest.raises(ProcessLookupError):
        os.kill(second, 0)
    assert not (data_dir / SOCKET).exists()
    # The settings are in the process alone.
    for file in data_dir.rglob("*"):
        assert not file.is_file() or b"second" not in file.read_bytes(), file


def test_each_environment_has_a_follower_of_its_own(
    control: FollowerControl, data_dir: Path, tmp_path: Path
) -> None:
    def follow(name: str) -> int:
        told = tmp_path / f"told-{name}"
        environment = {"PATH": os.environ["PATH"], "TOLD": str(told), "PREFS_SECRET": "x"}
        hand_over(data_dir, environment | ({"PREFS_ENVIRONMENT": name} if name else {}))
        wait_for(lambda: told.exists() and len(told.read_text().split()) == 2)
        return int(told.read_text().split()[0])

    def runs(pid: int) -> bool:
        control.watch()
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        return True

    pids = {name: follow(name) for name in ("", "dev_anna", "pr_123")}
    assert all(runs(pid) for pid in pids.values())
    stop_following(data_dir, "dev_anna")
    assert {name: runs(pid) for name, pid in pids.items()} == {"": True, "dev_anna": False, "pr_123": True}
    stop_following(data_dir, "dev_anna")
    assert {path.name for path in (data_dir / "logs").iterdir()} == {
        "follower.log", "follower-dev_anna.log", "follower-pr_123.log",
    }  # fmt: skip
    control.close()
    assert not any(runs(pid) for pid in pids.values())


def test_a_supervisor_that_is_not_there_is_named(data_dir: Path) -> None:
    with pytest.raises(
        LocalServicesError, match=r"did not accept the follower's settings .*: run `prefs down`"
    ):
        hand_over(data_dir, {})
