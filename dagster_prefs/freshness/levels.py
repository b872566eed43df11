"""What a reading means: levels, the thresholds they come from, and readings in one shape."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import psycopg

from dagster_prefs.declarations.contract import Freshness
from dagster_prefs.engine.catalog import missing_relation
from dagster_prefs.errors import PrefsError

Level = Literal["ok", "skipped", "warn", "error", "unknown"]

# From best to worst. What could not be read is worst: it may hide anything.
LEVELS: tuple[Level, ...] = ("ok", "skipped", "warn", "error", "unknown")

Stage = Literal["ingestion", "views", "online", "offline", "canary"]


class Unmeasurable(PrefsError):
    """A reading could not be taken; the message says why and what to do."""


def unreadable(what: str, error: psycopg.Error) -> Unmeasurable:
    """Why the engine did not answer about `what`: it lacks a relation or column, or it failed."""
    missing = missing_relation(error)
    if isinstance(error, psycopg.errors.UndefinedColumn):
        missing = error.diag.message_primary
    if missing:
        return Unmeasurable(f"{what}: {missing}: run `dbt build` first")
    return Unmeasurable(
        f"{what}: the engine failed while reading ({' '.join(str(error).split())}): look at its log and run again"
    )


@dataclass(frozen=True)
class Measure:
    """One reading of one stage, judged.

    `name` is the topic, relation, domain or training table. `lag_seconds` is what the thresholds judge,
    None where it has no meaning or is not known. `values` are further numbers to plot, `notes` texts.
    """

    stage: Stage
    name: str
    level: Level
    reason: str
    lag_seconds: float | None = None
    thresholds: Freshness | None = None
    values: Mapping[str, int | float] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """`<stage>/<name>`, what alerts and cursors remember a measure by."""
        return f"{self.stage}/{self.name}"


def judge(lag_seconds: float, thresholds: Freshness) -> Level:
    """The level of a lag: `warn` and `error` begin at their thresholds, in seconds."""
    if lag_seconds >= thresholds.error_seconds:
        return "error"
    return "warn" if lag_seconds >= thresholds.warn_seconds else "ok"


def worst(levels: Iterable[Level]) -> Level:
    """The worst of some levels; `ok` for none."""
    return max(levels, key=LEVELS.index, default="ok")
