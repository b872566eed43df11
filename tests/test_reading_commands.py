"""A command that reads loads only what it reads with, so that it answers within a second."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from built_state import command_environment
from shipped import SHORT

from dagster_prefs.engine.connection import EngineConfiguration

HEAVY = {
    "dagster",
    "dagster_dbt",
    "dbt",
    "boto3",
    "duckdb",
    "moto",
    "nicegui",
    "pyarrow",
    "pyiceberg",
    "sqlalchemy",
    "sqlglot",
}

# In this order in one process, so that one start suffices: each may load what those before it were allowed to.
COMMANDS: list[tuple[str, set[str]]] = [
    ("--help", set()),
    ("why --help", set()),
    ("rejected", set()),
    ("profile 5", set()),
    ("rank u1", set()),
    ("topics", set()),
    (f"lineage watch.titles_{SHORT}d", set()),
    # The views' own SQL says what they read.
    (f"why 5 watch_minutes_{SHORT}d", {"sqlglot"}),
    ("why u1 user_category_profile.affinity_score", {"sqlglot"}),
    (f"catalog --search titles_{SHORT}d", {"sqlglot"}),
    ("catalog view_events.genre --json", {"sqlglot"}),
    # The training tables are Iceberg's, and windows are those of the training sets' own SQL.
    ("statistics", {"sqlglot", "pyarrow", "pyiceberg"}),
    ("drift", {"sqlglot", "pyarrow", "pyiceberg"}),
    ("cost", {"sqlglot", "pyarrow", "pyiceberg"}),
    ("status --json", {"sqlglot", "pyarrow", "pyiceberg", "sqlalchemy"}),
]

SCRIPT = """
import contextlib, io, json, sys
from dagster_prefs.cli import cli
from dagster_prefs.errors import PrefsError

for command in json.loads(sys.argv[1]):
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        try:
            cli.main(command.split(), standalone_mode=False)
        except PrefsError as error:
            print(error)
    loaded = sorted({name.partition(".")[0] for name in sys.modules})
    print(json.dumps([command, loaded, said.getvalue()]), file=sys.stderr)
"""


def test_what_each_command_loads(
    copied_database: Callable[..., AbstractContextManager[EngineConfiguration]],
    deployed_template: EngineConfiguration,
    aws_endpoint: str,
    tmp_path: Path,
) -> None:
    with copied_database("reading_commands", deployed_template) as engine:
        environment = command_environment(engine, tmp_path / "state", aws_endpoint)

        def told(commands: list[str]) -> list[tuple[str, list[str], str]]:
            """Command, what is loaded then, and what it said, of each."""
            done = subprocess.run(
                [sys.executable, "-c", SCRIPT, json.dumps(commands)],
                env=environment,
                capture_output=True,
                text=True,
            )
            found = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("[")]
            assert [command for command, _, _ in found] == commands, done.stderr
            return found

        # Lines of text need nothing of what reads tables of columns.
        events = tmp_path / "views.jsonl"
        events.write_text('{"event_id": "1", "viewer_id": 1, "watched_at": "2026-01-01T00:00:00Z"}\n')
        commands = [(f"ingest --dry-run {events}", set()), (f"ingest {events}", set()), *COMMANDS]
        lines = told([command for command, _ in commands])
        repeated = told(["status --json"])
    for (command, allowed), (_, loaded, said) in zip(commands, lines, strict=True):
        assert HEAVY & set(loaded) <= allowed, f"prefs {command}\n{said}"
    said = {command: text for command, _, text in lines}
    assert "field content_id of topic view_events" in said[f"lineage watch.titles_{SHORT}d"]
    assert "user_category_profile.affinity_score" in said["why u1 user_category_profile.affinity_score"]
    (genre,) = json.loads(said["catalog view_events.genre --json"])
    assert genre["sample"] == {"rows": 0, "null_share": None, "examples": []}
    status = said["status --json"]
    # Nothing has changed since the exports were found to be well, so Iceberg is not asked again.
    ((_, _, again),) = repeated
    assert (HEAVY | {"confluent_kafka"}) & set(repeated[0][1]) == set(), again
    assert [one for one in json.loads(again)["measures"] if one["stage"] == "offline"] == [
        one for one in json.loads(status)["measures"] if one["stage"] == "offline"
    ]
    # Not refused before they read anything.
    assert (
        f"{events}: 1 messages of view_events, 0 would be rejected; nothing was written"
        in said[commands[0][0]]
    )
    assert f"{events}: 1 messages into view_events" in said[commands[1][0]]
    assert "the canary is off" in said["status --json"]
    assert "offline" in said["status --json"]
