"""The platform knows no name of the example that it ships with: a project declares its own.

Searched are the compound names of the example's registry (with `_`, `.` or `#`), because a word like `items` means
other things too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from shipped import SHORT

from dagster_prefs.declarations.registry import Registry

PACKAGE = Path(__file__).resolve().parents[1] / "dagster_prefs"
# The example's own code: its scenario, the mapping that feeds its shop, its ranking, and the demo with its options.
OF_THE_EXAMPLE = frozenset(
    {
        "cli/services.py",
        "tools/demo.py",
        "events/rees46.py",
        "tools/scenario.py",
        "serving/catalogue.py",
        "serving/preferences.py",
    }
)
# Left to be cleaned: what names the example as an instance, in messages and docstrings, or ranks over HTTP.
NOT_YET = frozenset(
    {
        "declarations/check.py",
        "declarations/check_domains.py",
        "declarations/findings.py",
        "declarations/read.py",
        "serving/openapi.py",
        "serving/server.py",
    }
)
# Words of the platform that a field of the example is called by as well.
OF_THE_PLATFORM = frozenset({"event_id", "event_time", "last_event_at"})


def names(registry: Registry) -> Iterator[str]:
    """Every name that the example declares."""
    for entity in registry.entities.values():
        yield from (entity.name, *(key.name for key in entity.keys))
        yield from [entity.table] if entity.table else []
    for topic in registry.topics.values():
        yield from (topic.name, topic.relation, topic.raw, topic.parsed, *topic.by_name)
    for tile in registry.tiles.values():
        yield from (tile.relation, tile.table, *tile.columns)
    for key, domain in registry.contract.domains.items():
        yield from (key, domain.relation, domain.sink, *domain.attributes)
    yield from registry.queries


def compound(registry: Registry) -> set[str]:
    return {name for name in names(registry) if re.search("[_.#]", name)} - OF_THE_PLATFORM


def told(text: str, searched: set[str]) -> list[str]:
    """The names in a text, each with its line."""
    either = "|".join(map(re.escape, sorted(searched, key=len, reverse=True)))
    pattern = re.compile(rf"(?<![\w.#])(?:{either})(?![\w#])")
    return [
        f"{number}: {name}"
        for number, line in enumerate(text.splitlines(), 1)
        for name in pattern.findall(line)
    ]


def named(registry: Registry) -> dict[str, list[str]]:
    """File of the package → the example's names in it; files without one are absent."""
    searched = compound(registry)
    found = {
        path.relative_to(PACKAGE).as_posix(): told(path.read_text(encoding="utf-8"), searched)
        for path in sorted(PACKAGE.rglob("*.py"))
    }
    return {path: lines for path, lines in found.items() if lines}


def test_no_name_of_the_example(registry: Registry) -> None:
    found = named(registry)
    assert {path: found[path] for path in found.keys() - OF_THE_EXAMPLE - NOT_YET} == {}
    cleaned = (OF_THE_EXAMPLE | NOT_YET) - found.keys()
    assert not cleaned, f"clean by now: take {', '.join(sorted(cleaned))} off the list, so that they stay so"


def test_what_is_searched_is_of_every_kind(registry: Registry) -> None:
    searched = compound(registry)
    assert {
        "user.events", "raw_view_events", "items_parsed", "viewer_id", "shop_user", "watch_duration_sec",
        "viewer_genre_metrics_1d", "viewer_genre_daily", "engagement#watch", f"watch_minutes_{SHORT}d",
        "viewer_profiles",
    } <= searched  # fmt: skip
    assert told("a viewer_id, raw_view_events_2 and `user.events`.", searched) == [
        "1: viewer_id",
        "1: user.events",
    ]
