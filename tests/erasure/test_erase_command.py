"""`prefs erase` as a person runs it, and every command that the operations document has of it."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from erased_world import OWNED, USER, VIEWER, World, redacted
from oracle import Erasure
from psycopg import sql
from relations import RAW_TABLES

from dagster_prefs.cli import cli
from dagster_prefs.erasure.events import SubjectRefused

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "operations.md"


@pytest.fixture
def prefs(world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Result]:
    """Run `prefs` on the world's stores."""
    monkeypatch.chdir(tmp_path)
    for name, value in {
        "PREFS_ENGINE_PORT": str(world.engine.port),
        "PREFS_ENGINE_DATABASE": world.engine.database,
        "PREFS_ICEBERG_WAREHOUSE": world.warehouse.as_uri(),
        "AWS_ENDPOINT_URL": world.client.meta.endpoint_url,
    }.items():
        monkeypatch.setenv(name, value)
    return lambda *words: CliRunner().invoke(cli, list(words))


def test_a_viewer_goes_with_the_views_refreshed_by_dbt(
    world: World, prefs: Callable[..., Result], tmp_path: Path
) -> None:
    file = tmp_path / "viewer.json"
    shown = prefs("subject", "viewer", str(VIEWER), "--output", str(file))
    assert shown.exit_code == 0, (shown.output, shown.exception)
    assert file.stat().st_mode & 0o777 == 0o600
    exported = json.loads(file.read_text())
    all_that_is_stored_is_exported(world, exported)
    assert exported["erased_at"] is None
    done = prefs("erase", "viewer", str(VIEWER), "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["subject_id"] == str(VIEWER)
    assert report["held"]
    assert {store["after"] for store in report["stores"]} == {0}
    assert {store["store"] for store in report["stores"]} == {"engine", "dynamodb", "iceberg", "statistics"}
    at = world.execute("select (extract(epoch from erased_at) * 1000000)::bigint from erased_subjects")[0][0]
    messages = redacted(OWNED, "viewer")
    assert world.differences(messages, [Erasure("viewer", str(VIEWER), at)]) == {}
    assert world.traces(str(VIEWER)) == []
    left = json.loads(prefs("subject", "viewer", str(VIEWER)).stdout)
    assert all(left[store] == {} for store in STORES)
    assert left["erased_at"] is not None


STORES = ("messages", "rows", "items", "training", "training_earlier", "labels")


def all_that_is_stored_is_exported(world: World, exported: dict[str, Any]) -> None:
    """Compared with what a search without any of the product's code finds, and with the messages that were sent."""
    sent = [message for message, owner in OWNED if owner == "viewer"]
    messages = {
        (name, row["source_partition"], row["source_offset"]): row.get("message")
        for name, rows in exported["messages"].items()
        for row in rows
    }
    expected = {(RAW_TABLES[one.topic], one.partition, one.offset): one.data for one in sent}
    assert messages.keys() == expected.keys()
    for place, text in messages.items():
        assert text is None or text.encode() == expected[place], place
    assert sum(text is None for text in messages.values()) == 1, "one message is no text"
    found = {trace.split(": ")[0] for trace in world.traces(str(VIEWER))}
    for name, rows in exported["rows"].items():
        assert {str(row["viewer_id"]) for row in rows} == {str(VIEWER)}, name
        assert len(rows) == len(
            world.execute(
                sql.SQL("select 1 from {} where viewer_id = %s").format(sql.Identifier(name)), [VIEWER]
            )
        )
    # What else names the viewer holds rejected messages, all of which are exported as messages, or the id alone.
    places = {name.removesuffix("__query") for name in found if not name.startswith(("DynamoDB", "/"))}
    rest = {name for name in places if "@" not in name} - {*exported["rows"], *exported["messages"]}
    assert rest <= {"rejected_events", "user_events_parsed", "online_published", "live_changes"}
    items = [item for (viewer, _), item in world.items().items() if viewer == VIEWER]
    (shown_items,) = exported["items"].values()
    assert len(shown_items) == len(items) == len(world.contract.domains)
    rows = {name: [row for row in found if row[0] == VIEWER] for name, found in world.all_rows().items()}
    assert {name.split(".")[-1]: len(found) for name, found in exported["training"].items()} == {
        name: len(found) for name, found in rows.items()
    }


def test_commands_of_the_document(world: World, prefs: Callable[..., Result]) -> None:
    sections = re.findall(
        r"^## (?:Erase|Export) a subject\n(.*?)(?=^## )", f"{DOCUMENT.read_text()}\n## ", re.M | re.DOTALL
    )
    assert len(sections) == 2
    commands = [
        shlex.split(line)
        for section in sections
        for block in re.findall(r"```sh\n(.*?)```", section, re.DOTALL)
        for line in block.splitlines()
    ]
    assert len(commands) >= 4
    for program, *words in commands:
        assert program == "prefs"
        done = prefs(*words)
        assert done.exit_code == 0, (words, done.output, done.exception)
        assert "4711" in done.stdout


def test_people_read_what_was_done(world: World, prefs: Callable[..., Result]) -> None:
    assert prefs("erase", "shop_user", "nobody").exit_code == 0
    said = prefs("erase", "viewer", "5")
    assert "nothing was held" in said.stdout
    assert "point-in-time" in said.stdout
    for words in (["viewer", "-5"], ["shop_user", "canary:1"], ["person", "x"]):
        assert isinstance(prefs("erase", *words).exception, SubjectRefused), words
    assert "the entity of -5 is ambiguous: use `prefs erase viewer -5`" in prefs("erase", "-5").output
    assert "one subject at a time" in prefs("erase", "viewer", "5", USER).output
    assert world.execute("select count(*) from erased_subjects") == [(2,)]
