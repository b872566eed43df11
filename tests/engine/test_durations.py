"""A duration never goes to an engine without its unit: versions of RisingWave read a bare number differently."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from scripted_wire import RisingWaveWire, timeout_milliseconds

from dagster_prefs.engine.durations import MAX_MILLISECONDS, with_unit
from dagster_prefs.errors import PrefsError
from dagster_prefs.serving.pool import ConnectionPool, EngineBusy

ROOT = Path(__file__).resolve().parents[2]
# Settings of a session that are durations, to PostgreSQL and RisingWave.
SETTING = r"(?:\w+_timeout|statement_timeout|\w+_delay|deadlock_timeout|\w+_duration)"
# `connect_timeout` is libpq's own, in seconds by its definition, and never reaches an engine.
CLIENT = "connect_timeout"
ASSIGNED = re.compile(
    rf"""(?ix) \bset\s+(?:session\s+|local\s+)?({SETTING})\s*(?:to|=)\s*(\S+)   # set x to …, set local x = …
      | \bset_config\(\s*'({SETTING})'\s*,\s*([^,]+),                           # set_config('x', …, …)
      | -c\s*({SETTING})=(\S+)                                                  # options='-c x=…'
      | \bwith\s*\(\s*(timeout|retention)\s*=\s*([^)]+)\)                       # fetch … with (timeout = …)
    """
)
FILES = [
    path
    for folder, kinds in {
        "dagster_prefs": ("*.py", "*.sql"), "dbt_project": ("*.sql", "*.yml"), "docs": ("*.md",), "infra": ("*",),
        "benchmarks": ("*.py",), "tests": ("*.py",),
    }.items()
    for kind in kinds
    for path in sorted((ROOT / folder).rglob(kind))
    if path.is_file() and path != Path(__file__) and not {".terraform", "target", "logs"} & set(path.parts)
]  # fmt: skip


def bare(text: str) -> list[str]:
    """The settings of durations in a text whose value is a number without a unit."""
    found = []
    for match in ASSIGNED.finditer(text):
        name, value = [group for group in match.groups() if group is not None]
        if (
            name.lower() != CLIENT
            and re.fullmatch(r"['\"]?\d+(\.\d+)?['\"]?;?", value.strip())
            and value.strip("'\";") != "0"
        ):
            found.append(f"{name} = {value}")
    return found


def computed(text: str) -> bool:
    """Whether a setting of a duration, or a cursor's patience, is put in from outside the statement."""
    values = [
        [group for group in match.groups() if group is not None][1] for match in ASSIGNED.finditer(text)
    ]
    return any(re.match(r"[{%]", value.strip("'\"")) for value in values)


@pytest.mark.parametrize(
    "wrong",
    [
        "set statement_timeout to 5",
        "set statement_timeout = '5'",
        "SET LOCAL lock_timeout = 5000;",
        "set session idle_in_transaction_session_timeout to 60",
        "select set_config('lock_timeout', '900', false)",
        "options='-c statement_timeout=5'",
        "fetch 10 from c with (timeout = 1)",
        "create subscription s from v with (retention = '24')",
    ],
)
def test_the_search_finds_a_bare_number(wrong: str) -> None:
    assert bare(wrong)


def test_the_search_leaves_units_and_switches_alone() -> None:
    for right in (
        "set statement_timeout to '5s'",
        "set statement_timeout = 0",
        "with (timeout = '1s')",
        "with (retention = '24 hours')",
        "-c statement_timeout=5000ms",
    ):
        assert bare(right) == []


def test_no_statement_of_ours_has_a_bare_number() -> None:
    assert len(FILES) > 200
    wrong = {str(path.relative_to(ROOT)): bare(path.read_text(errors="replace")) for path in FILES}
    assert {path: found for path, found in wrong.items() if found} == {}


def test_what_is_computed_gets_its_unit_from_the_one_helper() -> None:
    sources = {path: path.read_text() for path in FILES if path.is_relative_to(ROOT / "dagster_prefs")}
    setting = {path.name for path, text in sources.items() if computed(text)}
    assert setting >= {"pool.py", "publisher.py", "items.py", "feed.py"}
    assert {
        path.name for path, text in sources.items() if computed(text) and "with_unit(" not in text
    } == set()
    assert computed('connection.execute(f"set statement_timeout to {limit}")')


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(5, "5s"), (5.0, "5s"), (0.05, "50ms"), (1.5, "1500ms"), (0.0001, "1ms"), (1e-12, "1ms"), (0.007, "7ms"),
     (900.0, "900s"), (MAX_MILLISECONDS / 1000, f"{MAX_MILLISECONDS}ms")],
)  # fmt: skip
def test_a_duration_says_its_unit_and_is_never_cut_to_no_limit(seconds: float, text: str) -> None:
    assert with_unit(seconds, "x") == text
    assert timeout_milliseconds(text) >= max(1, seconds * 1000 - 1e-6)


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), MAX_MILLISECONDS / 1000 + 1])
def test_what_no_engine_takes_is_refused_by_name(seconds: float) -> None:
    with pytest.raises(
        PrefsError, match="statement_timeout_seconds must be above 0 and at most 2147483 seconds"
    ):
        with_unit(seconds, "statement_timeout_seconds")


def test_a_read_has_the_time_that_it_was_given() -> None:
    with RisingWaveWire("3.0.3") as server:
        # Longer than five milliseconds, shorter than five seconds.
        server.read_milliseconds = 800
        pool = ConnectionPool(server.engine, 1, 5.0)
        assert pool.run(lambda connection: connection.execute("select 1").fetchall()) == []
        assert "set statement_timeout to '5s'" in server.statements
        pool.close()
        hasty = ConnectionPool(server.engine, 1, 0.5)
        with pytest.raises(EngineBusy, match=r"the engine did not answer within 0\.5 s"):
            hasty.run(lambda connection: connection.execute("select 1").fetchall())
        hasty.close()
        for statement in server.statements:
            assert bare(statement) == []
