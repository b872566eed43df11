"""The `prefs` command as a shell sees it: one clear sentence and an exit code, never a traceback."""

import ast
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import click
import pytest
from warm import Warm

from dagster_prefs import cli as cli_package
from dagster_prefs.cli import cli
from dagster_prefs.cli.root import plain_console, print_json, say, table_of
from dagster_prefs.cli.training import column_types
from dagster_prefs.freshness.levels import Measure
from dagster_prefs.freshness.status import Status, render_status
from dagster_prefs.printable import printable


@pytest.fixture
def prefs(
    tmp_path: Path, free_port: Callable[[], int], warm: Warm
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `prefs` with a data folder of its own, in which nothing was started."""

    def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return warm.run(
            ["prefs", *words],
            environment={
                **os.environ,
                "PREFS_DATA_DIR": str(tmp_path / "state"),
                "PREFS_ENGINE_PORT": str(free_port()),
                "PREFS_LOCAL_AWS_PORT": str(free_port()),
                **environment,
            },
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


def test_every_command_explains_itself_in_a_line() -> None:
    # The installed script itself, which the other tests do without.
    script = Path(sys.executable).with_name("prefs")
    shown = subprocess.run([script, "--help"], capture_output=True, text=True, check=True).stdout
    lines = shown.partition("Commands:\n")[2].splitlines()
    assert [line.split()[0] for line in lines] == sorted(cli.commands)
    assert [line for line in lines if not line.endswith(".") or line.endswith("...")] == []


HOSTILE = "a\x1b[31mred\x07\x9b2J\u202egnp\u2066x\x7f\udce9z\x00\u2028end"
SHOWN = r"a\x1b[31mred\x07\x9b2J\u202egnp\u2066x\x7f\xe9z\x00\u2028end"


def test_control_characters_are_shown_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    measure = Measure("views", "view_events", "error", f"of {HOSTILE}")
    shown = plain_console()
    shown.print(f"plain {HOSTILE}")
    shown.print(f"dim {HOSTILE}", style="dim")
    shown.print(table_of(f"title {HOSTILE}", ["x"], [(HOSTILE,), ([HOSTILE, "b\nc\td"],)]))
    shown.print(render_status(Status(datetime(2026, 1, 1, tzinfo=UTC), 0.1, (measure,))))
    say(f"said {HOSTILE}")
    print_json({HOSTILE: HOSTILE})
    out = capsys.readouterr().out
    assert not set(out) & set("\x00\x07\x1b\x7f\x9b\u202e\u2066\u2028\udce9")
    squeezed = "".join(out.split())
    for start in ("plain", "dim", "title", "said", "of"):
        # rich's own text drops a few control characters before a console sees them.
        assert start + SHOWN in squeezed or (start + SHOWN).replace(r"\x07", "") in squeezed
    assert rf"{SHOWN},b\nc\td" in squeezed
    assert "\\u001b[31mred" in out
    assert "\\u007f" in out


def test_control_characters_in_logs_are_shown_escaped() -> None:
    script = (
        "import logging, sys; from dagster_prefs.cli import root;"
        "root.cli.main = lambda **_: logging.getLogger('dagster_prefs.serving').warning('of %s', sys.argv[1]);"
        "root.main()"
    )
    done = subprocess.run([sys.executable, "-c", script, HOSTILE.replace("\0", "")], capture_output=True)
    assert done.stderr.decode() == f"of {SHOWN}\n".replace(r"\x00", "")


def test_text_in_any_script_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    texts = ["نمی\u200cخواهم", "👩\u200d👩\u200d👧", "नमस्ते", "日本語", "naïve = <b>", "tab\tand\nline"]  # noqa: RUF001
    for text in texts:
        assert printable(text) == text
    plain_console().print(table_of("", ["x"], [(text,) for text in texts[:-1]]))
    out = capsys.readouterr().out
    assert [text for text in texts[:-1] if text not in out] == []


def test_every_command_prints_through_the_one_place() -> None:
    """Whatever a command shows goes through `say`, `print_json` or the console of root.py, which escape it."""
    wrong = []
    for path in sorted((Path(cli_package.__file__).parent).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if name in (
                "print",
                "click.echo",
                "click.secho",
                "Console",
                "sys.stdout.write",
                "sys.stderr.write",
            ):
                wrong.append(f"{path.name}: {name}")
    assert wrong == ["root.py: click.echo", "root.py: click.echo"]


def test_names_of_files_may_be_any_bytes(prefs: Prefs, tmp_path: Path) -> None:
    events = tmp_path / os.fsdecode(b"caf\xe9 {x} \x1b[31m.jsonl")
    missing = sentence(prefs("ingest", str(events)))
    assert r"caf\xe9 {x} \x1b[31m.jsonl does not exist" in missing
    events.write_text('{"event_id": "1", "viewer_id": 1, "watched_at": "2026-01-01T00:00:00Z"}\n')
    assert "prefs up" in sentence(prefs("ingest", str(events)))


@pytest.mark.parametrize(
    ("text", "types"),
    [
        (None, {}),
        ("bought=bool", {"bought": "bool"}),
        (" a = int , b=decimal(18,2),c=d=date", {"a": "int", "b": "decimal(18,2)", "c=d": "date"}),
    ],
)
def test_types_of_columns_are_read(text: str | None, types: dict[str, str]) -> None:
    assert column_types(text) == types


@pytest.mark.parametrize("text", ["a", "=int", "a=int,a=text", "a=int,"])
def test_types_of_columns_that_say_nothing_are_refused(text: str) -> None:
    with pytest.raises(click.UsageError, match="column=type once for each column"):
        column_types(text)
