"""Pauses double up to their limit, however often an attempt fails, and nothing else computes them."""

import re
from pathlib import Path

from dagster_prefs.pauses import Pauses

PACKAGE = Path(__file__).parents[1] / "dagster_prefs"


def test_pauses_double_up_to_the_limit_and_start_again() -> None:
    pauses = Pauses(1.0, 30.0)
    assert [pauses.next() for _ in range(7)] == [1, 2, 4, 8, 16, 30, 30]
    pauses.reset()
    assert [pauses.next() for _ in range(2)] == [1, 2]


def test_an_outage_of_a_day_overflows_nothing() -> None:
    """A power of the number of failures overflowed after 1,024 of them: half a day of a changefeed's pauses."""
    pauses = Pauses(1.0, 30.0)
    assert {pauses.next() for _ in range(3000)} == {1, 2, 4, 8, 16, 30}


def test_nothing_else_doubles_a_pause() -> None:
    doubling = re.compile(
        r"(pause|patience|delay|wait)\w*\)? ?(\*= ?2|= .*\b2 ?\*|= .*\* ?2\b)|(wait|sleep|pause)\(.*2 ?\*\*"
    )
    wrong = [
        f"{path.relative_to(PACKAGE)}: {line.strip()}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for line in path.read_text().splitlines()
        if path.name != "pauses.py" and doubling.search(line)
    ]
    assert not wrong, "\n".join(wrong)
