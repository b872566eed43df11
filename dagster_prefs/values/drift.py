"""Drift: whether the values of a complete tile day are those of earlier days of the same weekday.

Days of one weekday are compared, so that a weekly season is no drift, and tiles rather than rolling views, because a
28-day window smears a change over four weeks. Each attribute is compared with up to four earlier days one by one, and
the lower median counts: an odd day among the earlier ones neither hides a drift nor makes one, and a change that stays
is the new normal after two weeks.

- The population stability index, PSI = Σ (p - q) · ln(p / q) over bins, with the customary limits 0.1 (a shift to look
  at) and 0.25 (another population): N. Siddiqi, Credit Risk Scorecards (2006). Numbers are binned by the deciles of the
  earlier day, texts by value; a missing value is a bin too. Every bin counts half a row more, so that none is empty.
- The Kolmogorov-Smirnov distance of two cumulative distributions, for numbers, as a size of effect: on many rows its
  p-value calls every trifle significant.
- Both are above zero by chance alone. Without drift PSI is distributed like (1/n + 1/m) · χ² with one degree of freedom
  fewer than bins: B. Yurdakul and J. Naranjo, Statistical properties of the population stability index, Journal of Risk
  Model Validation 14 (2020); the distance exceeds √(-ln(p/2)/2) · √(1/n + 1/m) with probability p (Smirnov, 1948).
  No limit is below what chance exceeds once in 1 / CHANCE comparisons, so that few rows do not alarm.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date, timedelta
from statistics import NormalDist, median
from typing import Any, Literal

from dagster_prefs.declarations.registry import Registry, TileColumn, TileDeclaration
from dagster_prefs.iceberg.catalog import Tables
from dagster_prefs.values.statistics import BOUNDS, MIN_SUBJECTS, MOST_VALUES, Statistics
from dagster_prefs.values.store import described_days, read_statistics

Level = Literal["ok", "learning", "warn", "error"]
# Ordered from best to worst.
LEVELS: tuple[Level, ...] = ("ok", "learning", "warn", "error")

EXIT_CODES: Mapping[Level, int] = {"ok": 0, "learning": 0, "warn": 1, "error": 2}

WEEKS = 4
LEAST_DAYS = 2
# How often chance alone may exceed a limit, of all comparisons.
CHANCE = 1e-6
BINS = 10
# A text with a smaller share shares a bin with the others.
LEAST_SHARE = 0.01
# A value of which so many rows were due, and of which at most a fourth are left, has vanished.
VANISHED_ROWS = 40


def worst(levels: Iterable[Level]) -> Level:
    """Return the worst of some levels, `learning` of none."""
    return max(levels, key=LEVELS.index, default="learning")


@dataclass(frozen=True, slots=True)
class Limits:
    """From where a number warns and where it is an error."""

    warn: float
    error: float

    @classmethod
    def of(cls, declared: Mapping[str, Any] | Literal[False] | None, name: str, default: Limits) -> Limits:
        """Return the declared limits of this name, or the default."""
        given = declared.get(name) if declared else None
        return cls(given["warn"], given["error"]) if given else default

    def level(self, value: float, floor: float = 0.0) -> Level:
        """Return the level of a value; below `floor` it is chance."""
        if value < floor or value < self.warn:
            return "ok"
        return "error" if value >= self.error else "warn"


# Rows: by which factor they are more or fewer than usual.
ROWS = Limits(2, 4)
PSI = Limits(0.1, 0.25)
KS = Limits(0.15, 0.3)
# With fewer rows nothing is judged.
MIN_ROWS = 100


@dataclass(frozen=True)
class Finding:
    """What was found of one attribute of a day, or of its rows (`attribute` None).

    `psi` and `ks` are None where they were not computed. `what` describes a drift, or why nothing was judged.
    """

    attribute: str | None
    level: Level
    psi: float | None = None
    ks: float | None = None
    what: str = ""


@dataclass(frozen=True)
class DayDrift:
    """What became of the values of a tile on one UTC day, compared with the days `before`.

    `rows` are the day's, `usual` their median before; `findings` start with that of the rows.
    """

    relation: str
    day: date
    before: tuple[date, ...]
    rows: int
    usual: float
    findings: tuple[Finding, ...]

    @property
    def level(self) -> Level:
        """The worst level; `learning` only if nothing could be judged."""
        levels = [one.level for one in self.findings]
        return _ok_of_some(levels)

    @property
    def drifted(self) -> tuple[Finding, ...]:
        """The findings that warn or are errors, errors first."""
        found = [one for one in self.findings if one.level in ("warn", "error")]
        return tuple(sorted(found, key=lambda one: -LEVELS.index(one.level)))

    @property
    def sentence(self) -> str:
        """What was found, in one sentence."""
        place = f"{self.relation} on {self.day:%a} {self.day}"
        if self.drifted:
            return f"{place}: {'; '.join(one.what for one in self.drifted)}"
        if self.level == "learning":
            return f"{place}: learning, {self.findings[0].what if self.findings else 'nothing is judged'}"
        return f"{place}: as on {len(self.before)} earlier days of that weekday"


@dataclass(frozen=True)
class Cause:
    """What the same events brought about: the drift of all tiles of the same topics, on the newest day of each."""

    topics: tuple[str, ...]
    days: tuple[DayDrift, ...]

    @property
    def name(self) -> str:
        """The topics, or the tile where none is known."""
        return "+".join(self.topics) or self.days[0].relation

    @property
    def level(self) -> Level:
        """The worst level of its tiles; `learning` only if none could be judged."""
        return _ok_of_some([one.level for one in self.days])

    def as_dict(self) -> dict[str, Any]:
        """Return what was found as plain values, for JSON."""
        return {
            "cause": self.name,
            "level": self.level,
            "reason": self.reason,
            "tiles": [
                {
                    "relation": one.relation,
                    "day": one.day.isoformat(),
                    "level": one.level,
                    "compared_with": [earlier.isoformat() for earlier in one.before],
                    "rows": one.rows,
                    "usual_rows": one.usual,
                    "findings": [asdict(finding) for finding in one.findings],
                }
                for one in self.days
            ],
        }

    @property
    def reason(self) -> str:
        """What was found, of those tiles that have the worst level."""
        return "; ".join(one.sentence for one in self.days if one.level == self.level)


def judge(tile: TileDeclaration, day: date, statistics: Iterable[Statistics]) -> DayDrift | None:
    """Compare a day of a tile with the earlier days of the same weekday, of which there are `statistics`.

    Returns None where the tile is not judged, or has no statistics of the day.
    """
    by_day: dict[date, dict[str, Statistics]] = {}
    for one in statistics:
        if one.relation == tile.relation:
            by_day.setdefault(one.day, {})[one.attribute] = one
    if tile.drift is False or day not in by_day:
        return None
    before = [
        earlier
        for week in range(1, WEEKS + 1)
        # A day without traffic says nothing about values, and two of them would be the usual traffic.
        if (earlier := day - timedelta(weeks=week)) in by_day and _rows(by_day[earlier])
    ]
    rows = _rows(by_day[day])
    usual = float(median([_rows(by_day[earlier]) for earlier in before])) if before else 0.0
    findings = [_judge_rows(tile, rows, usual, len(before))]
    for name, column in tile.columns.items():
        now = by_day[day].get(name)
        if now is None or now.kind not in ("number", "text") or column.drift is False:
            continue
        earlier_ones = [by_day[earlier][name] for earlier in before if name in by_day[earlier]]
        findings.append(_judge_attribute(column, now, earlier_ones, _least_rows(tile)))
    return DayDrift(tile.relation, day, tuple(before), rows, usual, tuple(findings))


def judge_newest(registry: Registry, statistics: Sequence[Statistics]) -> list[DayDrift]:
    """Judge the newest day of every tile that has statistics, in the registry's order."""
    found = []
    for tile in registry.tiles.values():
        days = [one.day for one in statistics if one.relation == tile.relation]
        if days and (one := judge(tile, max(days), statistics)):
            found.append(one)
    return found


def causes_on(catalog: Tables, registry: Registry, namespace: str, *, day: date | None = None) -> list[Cause]:
    """Judge a day of every tile, or the newest that each has statistics of, and group what is found.

    A tile whose newest day is a week older than that of others is left out. Raises OfflineError.
    """
    newest = day or max((known for _, known in described_days(catalog, namespace)), default=date.max)
    since = newest - timedelta(weeks=WEEKS + (day is None))
    statistics = [one for one in read_statistics(catalog, namespace, since=since) if one.source == "tile"]
    if day is None:
        return causes(registry, judge_newest(registry, statistics))
    found = [judge(tile, day, statistics) for tile in registry.tiles.values()]
    return causes(registry, [one for one in found if one is not None])


def causes(registry: Registry, found: Iterable[DayDrift]) -> list[Cause]:
    """Group what was found by the topics that the tiles are made of: what the same events bring about has one cause."""
    groups: dict[tuple[str, ...], list[DayDrift]] = {}
    for one in found:
        topics = topics_of_tile(registry, one.relation)
        groups.setdefault(topics or (one.relation,), []).append(one)
    return [
        Cause(() if names == (days[0].relation,) else names, tuple(days)) for names, days in groups.items()
    ]


def topics_of_tile(registry: Registry, relation: str) -> tuple[str, ...]:
    """Return the topics whose typed events a relation reads, directly or through other views, sorted."""
    typed = {topic.relation: topic.name for topic in registry.topics.values()}
    found: set[str] = set()
    seen: set[str] = set()
    left = [relation]
    while left:
        name = left.pop()
        if name in typed:
            found.add(typed[name])
        elif name not in seen and name in registry.kept:
            left += registry.kept[name].inputs
        seen.add(name)
    return tuple(sorted(found))


def _ok_of_some(levels: Sequence[Level]) -> Level:
    """Return the worst level; what was judged and is ok counts more than what could not be judged."""
    found = worst(levels)
    return "ok" if found == "learning" and "ok" in levels else found


def _rows(attributes: Mapping[str, Statistics]) -> int:
    return max((one.rows for one in attributes.values()), default=0)


def _least_rows(tile: TileDeclaration) -> int:
    return int(tile.drift.get("min_rows", MIN_ROWS)) if tile.drift else MIN_ROWS


def _judge_rows(tile: TileDeclaration, rows: int, usual: float, days: int) -> Finding:
    if days < LEAST_DAYS:
        return Finding(
            None, "learning", what=f"{days} of at least {LEAST_DAYS} earlier days of that weekday are there"
        )
    if usual < _least_rows(tile):
        return Finding(
            None, "learning", what=f"{usual:,.0f} rows are usual, {_least_rows(tile):,} are needed"
        )
    factor = max(rows, usual) / min(rows, usual) if rows else math.inf
    # Counts vary by their root; six times that is a chance of less than one in a hundred million.
    if abs(rows - usual) <= 6 * math.sqrt(rows + usual):
        factor = 1.0
    return Finding(
        None, Limits.of(tile.drift, "rows", ROWS).level(factor), what=f"{rows:,} rows, {usual:,.0f} are usual"
    )


def _judge_attribute(
    column: TileColumn, now: Statistics, before: Sequence[Statistics], least_rows: int
) -> Finding:
    known = [one for one in before if one.kind == now.kind and one.sampled >= least_rows]
    if len(known) < LEAST_DAYS or now.sampled < least_rows:
        return Finding(
            now.attribute,
            "learning",
            what=f"{now.attribute} has fewer than {least_rows:,} rows, or {LEAST_DAYS} earlier days of that weekday",
        )
    psi_limits, ks_limits = Limits.of(column.drift, "psi", PSI), Limits.of(column.drift, "ks", KS)
    psi, psi_level = _lower_median(
        [(psi_limits.level(value, floor), value) for value, floor in (_psi(one, now) for one in known)]
    )
    parts = [(psi_level, f"PSI {psi:.2f}")]
    ks: float | None = None
    if now.kind == "number":
        ks, ks_level = _lower_median(
            [(ks_limits.level(value, floor), value) for value, floor in (_ks(one, now) for one in known)]
        )
        parts.append((ks_level, f"KS {ks:.2f}"))
    elif vanished := _vanished(known, now):
        parts.insert(0, ("error", f"{', '.join(vanished)} vanished"))
    level = worst(level for level, _ in parts)
    told = ", ".join(text for one, text in parts if one != "ok")
    shift = _shift(known, now) if told else ""
    return Finding(now.attribute, level, psi, ks, f"{now.attribute}: {told}{shift}" if told else "")


def compare(expected: Statistics, actual: Statistics) -> tuple[float, float | None, Level]:
    """Return the stability index and, of numbers, the distance of two descriptions of an attribute, and their level.

    The level is by the default limits; `learning` where one of them has too few rows.
    """
    psi, by_chance = _psi(expected, actual)
    level = PSI.level(psi, by_chance)
    ks: float | None = None
    if actual.kind in ("number", "list"):
        ks, by_chance = _ks(expected, actual)
        level = worst((level, KS.level(ks, by_chance)))
    few = min(expected.sampled, actual.sampled) < MIN_ROWS
    return psi, ks, "learning" if few and level == "ok" else level


def _shift(before: Sequence[Statistics], now: Statistics) -> str:
    """Describe how the middle of a number moved, and how many values are missing now."""
    shifts = []
    middles = [one.quantiles[len(one.quantiles) // 2] for one in before if one.quantiles]
    if middles and now.quantiles:
        shifts.append(f"median {median(middles):g} → {now.quantiles[len(now.quantiles) // 2]:g}")
    missing = median([one.null_share for one in before])
    if abs(now.null_share - missing) >= 0.01:
        shifts.append(f"missing {missing:.0%} → {now.null_share:.0%}")
    return f" ({', '.join(shifts)})" if shifts else ""


def _lower_median(found: Iterable[tuple[Level, float]]) -> tuple[float, Level]:
    ordered = sorted(found, key=lambda one: (LEVELS.index(one[0]), one[1]))
    level, value = ordered[(len(ordered) - 1) // 2]
    return value, level


def psi_of(expected: Sequence[int], actual: Sequence[int]) -> float:
    """Return the population stability index of two counts of the same bins."""
    n, m = sum(expected) + len(expected) / 2, sum(actual) + len(actual) / 2
    return sum(
        ((now + 0.5) / m - (was + 0.5) / n) * math.log(((now + 0.5) / m) / ((was + 0.5) / n))
        for was, now in zip(expected, actual, strict=True)
    )


def psi_by_chance(n: int, m: int, bins: int) -> float:
    """Return the index that two samples of one population exceed with probability CHANCE."""
    free = max(1, bins - 1)
    # The quantile of χ² as E. B. Wilson and M. M. Hilferty approximate it (1931).
    deviate = NormalDist().inv_cdf(1 - CHANCE)
    quantile = free * (1 - 2 / (9 * free) + deviate * math.sqrt(2 / (9 * free))) ** 3
    return (1 / n + 1 / m) * quantile


def ks_by_chance(n: int, m: int) -> float:
    """Return the distance that two samples of one population exceed with probability CHANCE."""
    return math.sqrt(-math.log(CHANCE / 2) / 2) * math.sqrt(1 / n + 1 / m)


def _psi(before: Statistics, now: Statistics) -> tuple[float, float]:
    """Return the index of an attribute, and what chance makes of it."""
    expected, actual = _text_bins(before, now) if now.kind == "text" else _number_bins(before, now)
    return psi_of(expected, actual), psi_by_chance(max(1, before.sampled), max(1, now.sampled), len(expected))


def _number_bins(before: Statistics, now: Statistics) -> tuple[list[int], list[int]]:
    """Count two days of numbers in bins that each hold a tenth of the earlier day, and its missing values."""
    edges: list[float] = []
    seen = cut = 0
    for bound, rows in before.buckets:
        seen += rows
        if seen * BINS >= before.known * (cut + 1):
            edges.append(bound)
            # A frequent value may fill several tenths.
            cut = seen * BINS // before.known
    if edges:
        # What lies below and above all that there was has bins of its own.
        edges.insert(0, BOUNDS[bisect_left(BOUNDS, before.buckets[0][0]) - 1])

    def counted(one: Statistics) -> list[int]:
        counts = [0] * (len(edges) + 1)
        for bound, rows in one.buckets:
            counts[bisect_left(edges, bound)] += rows
        return [*counts, one.nulls]

    return _without_empty(counted(before), counted(now))


def _text_bins(before: Statistics, now: Statistics) -> tuple[list[int], list[int]]:
    """Count two days of texts by value: those that both days name, and the others together.

    A value that only one day names may be among the others of the other day.
    """
    was, is_now = dict(before.values), dict(now.values)
    named = [
        value
        for value in was
        if value in is_now and max(was[value], is_now[value]) >= LEAST_SHARE * max(1, before.known)
    ]

    def counted(one: Statistics, counts: Mapping[str, int]) -> list[int]:
        found = [counts[value] for value in named]
        return [*found, one.known - sum(found), one.nulls]

    return _without_empty(counted(before, was), counted(now, is_now))


def _without_empty(expected: list[int], actual: list[int]) -> tuple[list[int], list[int]]:
    kept = [place for place in range(len(expected)) if expected[place] or actual[place]]
    return [expected[place] for place in kept], [actual[place] for place in kept]


def _ks(before: Statistics, now: Statistics) -> tuple[float, float]:
    """Return the greatest distance of the two cumulative distributions, and what chance makes of it."""
    if not before.known or not now.known:
        return 0.0, math.inf
    bounds = sorted({bound for one in (before, now) for bound, _ in one.buckets})
    was, is_now = dict(before.buckets), dict(now.buckets)
    distance = below_before = below_now = 0.0
    for bound in bounds:
        below_before += was.get(bound, 0) / before.known
        below_now += is_now.get(bound, 0) / now.known
        distance = max(distance, abs(below_before - below_now))
    return distance, ks_by_chance(before.known, now.known)


def _vanished(before: Sequence[Statistics], now: Statistics) -> list[str]:
    """Return the texts that most earlier days have often, and the day hardly or not at all."""
    counts = dict(now.values)
    # A text that is not named has fewer rows than the rarest of a full list, or fewer subjects than it takes.
    unnamed = min(counts.values()) if len(counts) >= MOST_VALUES else MIN_SUBJECTS - 1

    def is_gone(value: str) -> bool:
        due = sorted(dict(one.values).get(value, 0) * now.known / max(1, one.known) for one in before)
        expected = due[(len(due) - 1) // 2]
        return expected >= VANISHED_ROWS and counts.get(value, unnamed) <= expected / 4

    return [
        value for value in dict.fromkeys(value for one in before for value, _ in one.values) if is_gone(value)
    ]
