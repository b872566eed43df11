"""docs/architecture.md names each rule and each room once, and the files and functions that it names exist."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs/architecture.md").read_text()


def table(heading: str) -> list[list[str]]:
    """The cells of each row of the table below a heading, without its header."""
    below = TEXT.split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in below.splitlines() if line.startswith("| ")]
    return rows[1:]


RULES = table("Where a rule is")


def test_no_rule_has_two_rows() -> None:
    assert len(RULES) > 20
    assert max(Counter(rule for rule, *_ in RULES).values()) == 1
    # Two names of one rule point to the same place.
    places = Counter(tuple(places) for _, *places in RULES)
    assert [place for place, number in places.items() if number > 1] == []


def test_what_a_rule_is_said_to_be_in_is_there() -> None:
    missing = []
    for rule, *cells in RULES:
        for cell, home in zip(cells, ("dbt_project", "dagster_prefs"), strict=True):
            for path, name in re.findall(r"`([\w/]+(?:\.(?:py|sql|yml)|/))`(?: \(`(\w+)`\))?", cell):
                file = next((base / path for base in (ROOT / home, ROOT) if (base / path).exists()), None)
                if file is None or (name and not re.search(rf"\b{name}\b", file.read_text())):
                    missing.append(f"{rule}: {path} {name}")
            for name, path in re.findall(r"`(\w+)` in `([\w/.]+)`", cell):
                if not re.search(rf"\b{name}\b", (ROOT / home / path).read_text()):
                    missing.append(f"{rule}: {name} in {path}")
    assert not missing, "\n".join(missing)


@pytest.mark.parametrize("row", table("The way of one event"), ids=lambda row: row[0])
def test_the_files_of_each_step_exist(row: list[str]) -> None:
    paths = [path for path in re.findall(r"`([\w/]+\.\w+)`", row[1]) if "<" not in path]
    found = [
        path
        for path in paths
        if any((ROOT / home / path).exists() for home in ("dbt_project", "dagster_prefs"))
    ]
    assert found == paths


def test_every_room_has_a_row() -> None:
    rooms = sorted(f"`{path.parent.name}/`" for path in (ROOT / "dagster_prefs").glob("*/__init__.py"))
    assert sorted(room for room, *_ in table("Rooms and arrows") if room.endswith("/`")) == rooms
