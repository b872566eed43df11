"""The `prefs` command as a shell sees it: one clear sentence and an exit code, never a traceback."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from dagster_prefs.cli import cli
from dagster_prefs.cli.root import plain_console, table_of

PREFS = Path(sys.executable).with_name("prefs")


@pytest.fixture
def prefs(tmp_path: Path, free_port: Callable[[], int]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `prefs` with a data folder of its own, in which nothing was started."""

    def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [PREFS, *words],
            env={
                **os.environ,
                "PREFS_DATA_DIR": str(tmp_path / "state"),
                "PREFS_ENGINE_PORT": str(free_port()),
                "PREFS_LOCAL_AWS_PORT": str(free_port()),
                **environment,
            },
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run


Prefs = Callable[..., subprocess.CompletedProcess[str]]


def sentence(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 1, done
    assert "Traceback" not in done.stderr
    (line,) = done.stderr.strip().splitlines()
    return line.removeprefix("error: ")


def test_a_missing_file_is_named(prefs: Prefs) -> None:
    assert "nowhere.jsonl" in sentence(prefs("ingest", "nowhere.jsonl"))


def test_a_stopped_engine_is_named_with_the_remedy(prefs: Prefs, tmp_path: Path) -> None:
    events = tmp_path / "views.jsonl"
    events.write_text('{"event_id": "1", "viewer_id": 1, "watched_at": "2026-01-01T00:00:00Z"}\n')
    said = sentence(prefs("ingest", str(events)))
    assert "127.0.0.1" in said
    assert "prefs up" in said


def test_an_unknown_setting_is_named_with_the_nearest(prefs: Prefs) -> None:
    said = sentence(prefs("up", PREFS_ENGIN="local"))
    assert "PREFS_ENGIN" in said
    assert "PREFS_ENGINE" in said


def test_a_missing_webhook_is_named(prefs: Prefs) -> None:
    assert "PREFS_ALERT_WEBHOOK" in sentence(prefs("alerts", "test"))


def test_status_of_nothing_is_an_error_that_says_so(prefs: Prefs) -> None:
    done = prefs("status", "--json")
    assert done.returncode == 2
    assert '"level": "unknown"' in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("viewer", ["42", "-1"])
def test_a_profile_that_cannot_be_read_is_an_error(prefs: Prefs, viewer: str) -> None:
    said = sentence(prefs("profile", viewer, "--json"))
    assert "DynamoDB cannot be reached" in said
    assert "prefs up" in said


def test_nothing_is_written_past_the_lease_of_a_changefeed(prefs: Prefs) -> None:
    said = sentence(prefs("reconcile", PREFS_ENGINE="risingwave", PREFS_PUBLISH="changefeed"))
    assert "prefs publish --full" in said


def test_a_port_in_use_is_named_before_anything_starts(prefs: Prefs, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"port {port} (--port)" in sentence(prefs("ui", "--port", str(port)))
    assert not (tmp_path / "state").exists()


def test_text_of_others_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    at = datetime(2026, 3, 10, 1, 2, 3, 456_789, tzinfo=timezone(timedelta(hours=1)))
    payload = "[/b] :smile: " + "x" * 200
    plain_console().print(table_of("Rejected [red]", ["message", "at"], [(payload, at), (None, ["a", "b"])]))
    shown = capsys.readouterr().out
    title, *lines = shown.splitlines()
    assert title == "Rejected [red]"
    cells = [line.partition("│") for line in lines[2:]]
    assert "".join(left.strip() for left, _, _ in cells[:-1]).replace(" ", "") == payload.replace(" ", "")
    assert "2026-03-10 00:02:03Z" in " ".join(right.strip() for _, _, right in cells)
    assert [cells[-1][0].strip(), cells[-1][2].strip()] == ["-", "a, b"]


def test_every_command_explains_itself_in_a_line(prefs: Prefs) -> None:
    lines = prefs("--help").stdout.partition("Commands:\n")[2].splitlines()
    assert [line.split()[0] for line in lines] == sorted(cli.commands)
    assert [line for line in lines if not line.endswith(".") or line.endswith("...")] == []
