"""Measures and their levels: the one shape of every reading, and the thresholds that judge it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import psycopg

from dagster_prefs.declarations.contract import Freshness
from dagster_prefs.engine.catalog import missing_relation
from dagster_prefs.errors import PrefsError

Level = Literal["ok", "skipped", "catching up", "warn", "error", "unknown"]

# Ordered from best to worst. "unknown" is worst, because it can hide any state.
LEVELS: tuple[Level, ...] = ("ok", "skipped", "catching up", "warn", "error", "unknown")
# The levels of which nobody is told and with which a check passes.
QUIET: frozenset[Level] = frozenset({"ok", "skipped", "catching up"})

Stage = Literal["engine", "history", "ingestion", "views", "online", "offline", "canary", "drift", "skew"]


class Unmeasurable(PrefsError):
    """A reading could not be taken; the message gives the reason and the remedy."""


def unreadable(what: str, error: psycopg.Error) -> Unmeasurable:
    """Translate an engine's error about `what`: a relation or column is missing, or the statement failed."""
    missing = missing_relation(error)
    if isinstance(error, psycopg.errors.UndefinedColumn):
        missing = error.diag.message_primary
    if missing:
        return Unmeasurable(f"{what}: {missing}: run `dbt build` first")
    return Unmeasurable(
        f"{what}: the engine failed while reading ({' '.join(str(error).split())}): check its log and run again"
    )


@dataclass(frozen=True)
class Measure:
    """One reading of one stage, with its level.

    `name` is the topic, relation, domain, training table, or part of the engine. `lag_seconds` is compared with
    the thresholds; None where it has no meaning or is not known. `values` are further numbers to plot, `notes` texts.
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
        """`<stage>/<name>`, under which alerts and cursors store a measure."""
        return f"{self.stage}/{self.name}"


def judge(lag_seconds: float, thresholds: Freshness) -> Level:
    """Return the level of a lag; `warn` and `error` begin at their thresholds, in seconds."""
    if lag_seconds >= thresholds.error_seconds:
        return "error"
    return "warn" if lag_seconds >= thresholds.warn_seconds else "ok"


def worst(levels: Iterable[Level]) -> Level:
    """Return the worst of some levels, `ok` for none."""
    return max(levels, key=LEVELS.index, default="ok")
