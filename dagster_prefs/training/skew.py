"""Skew: what was really served, from the served log, beside what a training set `--as served` says was served.

Each logged value is compared with the value that all events which had arrived by then give. A difference is not yet an
error: an event takes a moment from its arrival to the table. So each difference is classed by the first cause that
explains it, and only one that nothing explains is wrong. Between two arrivals of an id's events, and two midnights, its
values do not change: to evaluate each such state once is to evaluate every moment.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from decimal import Decimal
from itertools import chain
from typing import Any, Literal, get_args

import pyarrow as pa

from dagster_prefs.declarations.contract import LAST_EVENT_AT, Domain
from dagster_prefs.declarations.registry import Entity, Registry
from dagster_prefs.errors import excerpt
from dagster_prefs.ids import Id, id_parts
from dagster_prefs.served_rows import BadRow, ServedRow, row_values, with_places
from dagster_prefs.training.labels import TIME

Cause = Literal[
    "fallback",
    "contract version",
    "in flight",
    "eventually consistent",
    "clock difference",
    "beyond the target",
    "erased",
    "wrong",
]
# In this order the first that explains a difference counts.
CAUSES: tuple[Cause, ...] = get_args(Cause)

# How long after a write an eventually consistent read may still return what was there before.
EVENTUAL = timedelta(seconds=1)
# How far the reader's clock may be behind the engine's.
CLOCKS = timedelta(seconds=1)
# How far back an older value is looked for, and at how many states at most.
LOOK_BACK = timedelta(hours=1)
MOST_STATES = 200
# Logged answers (moments of an id) that are evaluated at once.
ROWS_AT_ONCE = 100_000
# Of these so many are Python values at once.
PYTHON_ROWS = 2_000
# Differences of each cause that a report shows.
EXAMPLES = 5
_TICK = timedelta(microseconds=1)

REFUSED = "refused"

AsServed = Callable[[Entity, pa.Table], pa.Table]
"""What a training set `--as served` says: for rows of an entity's keys and `label_time`, in order, every attribute,
`<domain>_last_event_at` (NULL where no item was served), and `refused`, why a row cannot be answered, else NULL.
Columns that it cannot compute are absent."""

Arrivals = Callable[[Entity, frozenset[Id], datetime, datetime], Mapping[Id, Sequence[datetime]]]
"""The arrivals of the accepted events about each of these ids between two moments, both included, in any order."""

Erased = Callable[[Entity, Id], bool]
"""Whether an id was erased at any time."""


@dataclass(frozen=True)
class Evidence:
    """What the log is compared with."""

    as_served: AsServed
    arrivals: Arrivals
    erased: Erased


@dataclass(frozen=True)
class Difference:
    """One logged value that differs; `behind_seconds` is the age of the newest state that has it."""

    row_id: str
    served_at: datetime
    cause: Cause
    served: Any
    expected: Any
    behind_seconds: float | None


@dataclass
class AttributeSkew:
    """The comparison of one attribute: values compared, equal ones, and the others by cause, with some examples."""

    domain: str
    attribute: str
    compared: int = 0
    equal: int = 0
    causes: Counter[Cause] = field(default_factory=Counter)
    examples: list[Difference] = field(default_factory=list)

    @property
    def equal_share(self) -> float:
        """The share of compared values that are equal; 1 if none was compared."""
        return self.equal / self.compared if self.compared else 1.0

    def note(self, difference: Difference) -> None:
        """Count a difference, and keep it as an example if there are few of its cause."""
        self.causes[difference.cause] += 1
        if self.causes[difference.cause] <= EXAMPLES:
            self.examples.append(difference)


@dataclass
class SkewReport:
    """The result of comparing a log.

    `rows` were read, of which `repeated` had been read before. `failed` had no values, because the read failed.
    `refused` could not be answered, by reason; `unknown` are of entities or domains that the project does not have, by
    name. `left_out` are attributes that training does not compute. `behind` has the seconds by which values that differ
    were behind, which shows the latency from an event's arrival to the reader.
    """

    rows: int = 0
    repeated: int = 0
    failed: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    unknown: Counter[str] = field(default_factory=Counter)
    left_out: set[str] = field(default_factory=set)
    attributes: dict[tuple[str, str], AttributeSkew] = field(default_factory=dict)
    behind: list[float] = field(default_factory=list)

    @property
    def compared(self) -> int:
        """The number of compared values."""
        return sum(one.compared for one in self.attributes.values())

    @property
    def causes(self) -> Counter[Cause]:
        """All differences by cause."""
        return sum((one.causes for one in self.attributes.values()), Counter())

    @property
    def behind_seconds(self) -> dict[float, float]:
        """Quantile → seconds that a differing value was behind; empty without any."""
        ordered = sorted(self.behind)
        return (
            {q: ordered[min(len(ordered) - 1, int(q * len(ordered)))] for q in (0.5, 0.95, 1.0)}
            if ordered
            else {}
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain values, for JSON."""
        return {
            "rows": self.rows,
            "repeated": self.repeated,
            "failed": self.failed,
            "refused": dict(self.refused),
            "unknown": dict(self.unknown),
            "left_out": sorted(self.left_out),
            "compared": self.compared,
            "causes": {cause: self.causes[cause] for cause in CAUSES},
            "behind_seconds": {str(q): seconds for q, seconds in self.behind_seconds.items()},
            "attributes": [
                {
                    "domain": one.domain,
                    "attribute": one.attribute,
                    "compared": one.compared,
                    "equal_share": one.equal_share,
                    "causes": {cause: one.causes[cause] for cause in CAUSES if one.causes[cause]},
                    "examples": [
                        {**example.__dict__, "served_at": example.served_at.isoformat()}
                        for example in one.examples
                    ],
                }
                for one in self.attributes.values()
            ],
        }


def measure_skew(registry: Registry, rows: Iterable[ServedRow], evidence: Evidence) -> SkewReport:
    """Compare logged values with those of training as served, and class every difference.

    Rows that came twice (`row_id`) count once. Raises what the evidence raises, and BadRow for values that are not of
    the contract's types.
    """
    report, seen = SkewReport(), set[str]()
    waiting: dict[str, list[ServedRow]] = {}
    names = {domain.key: domain for domain in registry.contract.domains.values()}
    for row in rows:
        report.rows += 1
        if row.row_id in seen:
            report.repeated += 1
            continue
        seen.add(row.row_id)
        domain = names.get(row.domain)
        if domain is None or domain.entity != row.entity:
            report.unknown[f"{row.entity} {row.domain}"] += 1
            continue
        if row.attributes is None:
            report.failed += 1
            continue
        some = waiting.setdefault(row.entity, [])
        some.append(row)
        if len(some) >= ROWS_AT_ONCE:
            _Comparison(registry, registry.entity(row.entity), evidence, report).add(waiting.pop(row.entity))
    for entity, some in waiting.items():
        _Comparison(registry, registry.entity(entity), evidence, report).add(some)
    return report


@dataclass(frozen=True)
class _Logged:
    """A row of the log whose values are read."""

    row: ServedRow
    id: Id
    domain: Domain
    values: Mapping[str, Any]
    differing: Mapping[str, Any] = field(default_factory=dict)

    @property
    def began_at(self) -> datetime:
        """The earliest moment at which the item may have been read."""
        return self.row.served_at - timedelta(seconds=self.row.read_seconds)

    @property
    def target(self) -> timedelta:
        return timedelta(seconds=self.domain.freshness.error_seconds)


class _Comparison:
    """The comparison of some rows of one entity."""

    def __init__(self, registry: Registry, entity: Entity, evidence: Evidence, report: SkewReport) -> None:
        self.entity = entity
        self.table = registry.contract.tables[entity.name]
        self.version = registry.contract.version
        self.domains = {domain.key: domain for domain in registry.contract.domains_of(entity.name)}
        self.evidence = evidence
        self.report = report

    def add(self, rows: Sequence[ServedRow]) -> None:
        """Compare rows, and add them to the report."""
        logged = []
        for row in rows:
            domain = self.domains[row.domain]
            values = row_values(row, domain) or {}
            logged.append(_Logged(row, self._id(row), domain, {**values, LAST_EVENT_AT: row.last_event_at}))
        # All domains of one answer share a moment.
        moments: dict[tuple[Id, datetime], list[_Logged]] = {}
        for one in logged:
            moments.setdefault((one.id, one.row.served_at), []).append(one)
        differing = [
            found
            for moment, expected in self._values(list(moments))
            for one in moments[moment]
            if (found := self._compared(one, expected)) is not None
        ]
        self._explain(differing)

    def _id(self, row: ServedRow) -> Id:
        try:
            return self.table.parse_key(row.key)
        except ValueError:
            # Without the key: it names a person.
            raise BadRow(f"row {excerpt(row.row_id)}: its key is none of {self.entity.name}") from None

    def _values(
        self, moments: Sequence[tuple[Id, datetime]]
    ) -> Iterator[tuple[tuple[Id, datetime], dict[str, Any]]]:
        """Yield each moment of an id with the values as served then, by the names of the columns."""
        for start in range(0, len(moments), ROWS_AT_ONCE):
            some = moments[start : start + ROWS_AT_ONCE]
            parts = list(zip(*(id_parts(id_) for id_, _ in some), strict=True))
            columns: dict[str, pa.Array] = {
                key.name: pa.array(values, pa.int64() if key.type == "bigint" else pa.string())
                for key, values in zip(self.entity.keys, parts, strict=True)
            }
            columns[TIME] = pa.array([at for _, at in some], pa.timestamp("us", "UTC"))
            # Lists of values take many times as much memory in Python as in Arrow.
            found = self.evidence.as_served(self.entity, pa.table(columns)).to_batches(PYTHON_ROWS)
            yield from zip(some, chain.from_iterable(batch.to_pylist() for batch in found), strict=True)

    def _compared(self, one: _Logged, expected: Mapping[str, Any]) -> _Logged | None:
        """Count the equal values of a row; return it with the others, None if there are none."""
        if (reason := expected.get(REFUSED)) is not None:
            self.report.refused[str(reason)] += 1
            return None
        differing = {}
        for name, served in one.values.items():
            column = _column(one.domain, name)
            if column not in expected:
                self.report.left_out.add(f"{one.domain.name}.{name}")
                continue
            skew = self._skew(one.domain, name)
            skew.compared += 1
            if _same(served, expected[column]):
                skew.equal += 1
            else:
                differing[name] = expected[column]
        return _Logged(one.row, one.id, one.domain, one.values, differing) if differing else None

    def _skew(self, domain: Domain, name: str) -> AttributeSkew:
        key = (domain.name, name)
        return self.report.attributes.setdefault(key, AttributeSkew(*key))

    def _explain(self, differing: Sequence[_Logged]) -> None:
        looked: list[_Logged] = []
        for one in differing:
            if one.row.error is not None:
                self._note(one, one.differing, "fallback")
            else:
                looked.append(one)
        if not looked:
            return
        ids = frozenset(one.id for one in looked)
        first = min(one.began_at for one in looked) - LOOK_BACK
        last = max(one.row.served_at for one in looked) + CLOCKS
        arrivals = {
            id_: sorted(found) for id_, found in self.evidence.arrivals(self.entity, ids, first, last).items()
        }
        # Nearly every difference is in flight: only the others are looked for in the many states of an hour.
        for recent in (True, False):
            states = [_states(one, arrivals.get(one.id, []), recent=recent) for one in looked]
            held = self._held(looked, states)
            unexplained = []
            for number, one in enumerate(looked):
                rest = {}
                for name, expected in one.differing.items():
                    place = held.get((number, name))
                    if place is None and recent:
                        rest[name] = expected
                        continue
                    at = None if place is None else states[number][place]
                    self._note(one, {name: expected}, self._cause(one, name, at), at)
                if rest:
                    unexplained.append(replace(one, differing=rest))
            looked = unexplained

    def _held(
        self, looked: Sequence[_Logged], states: Sequence[Sequence[datetime]]
    ) -> dict[tuple[int, str], int]:
        """Return the place of the first state in which each differing value was due, by row and attribute."""
        wanted: dict[tuple[Id, datetime], list[tuple[int, int]]] = {}
        for number, (one, some) in enumerate(zip(looked, states, strict=True)):
            for place, at in enumerate(some):
                wanted.setdefault((one.id, at), []).append((number, place))
        held: dict[tuple[int, str], int] = {}
        for moment, values in self._values(list(wanted)):
            for number, place in wanted[moment]:
                one = looked[number]
                for name in one.differing:
                    if place < held.get((number, name), place + 1) and _holds(one, name, values):
                        held[number, name] = place
        return held

    def _cause(self, one: _Logged, name: str, at: datetime | None) -> Cause:
        """Return the cause of a difference; `at` is the newest moment at which the served value was due."""
        if name in one.row.unknown:
            return "contract version"
        if at is not None:
            if at > one.row.served_at:
                return "clock difference"
            if at >= one.began_at - one.target:
                return "in flight"
            if not one.row.consistent and at >= one.began_at - one.target - EVENTUAL:
                return "eventually consistent"
            return "beyond the target"
        if one.row.contract_version != self.version:
            return "contract version"
        return "erased" if self.evidence.erased(self.entity, one.id) else "wrong"

    def _note(
        self, one: _Logged, differing: Mapping[str, Any], cause: Cause, at: datetime | None = None
    ) -> None:
        behind = None if at is None else (one.row.served_at - at).total_seconds()
        if behind is not None and cause != "clock difference":
            self.report.behind.append(behind)
        for name, expected in differing.items():
            self._skew(one.domain, name).note(
                Difference(one.row.row_id, one.row.served_at, cause, one.values[name], expected, behind)
            )


def _column(domain: Domain, name: str) -> str:
    return f"{domain.name}_{LAST_EVENT_AT}" if name == LAST_EVENT_AT else name


def _states(one: _Logged, arrivals: Sequence[datetime], *, recent: bool) -> list[datetime]:
    """Return moments in which each state of an id around an answer is met, from the newest before it backwards.

    With `recent` those that explain a difference as in flight or eventually consistent, and else all others. A state
    ends when an event arrives, or at a midnight, which differs from id to id. The former is met a tick before the
    arrival, the latter at the ends of the times that are told apart. The states after the answer come last.
    """
    oldest = one.began_at - LOOK_BACK
    before = arrivals[bisect_left(arrivals, oldest) : bisect_left(arrivals, one.row.served_at + _TICK)]
    after = arrivals[bisect_left(arrivals, one.row.served_at + _TICK) :]
    ends = [one.began_at - one.target, one.began_at - one.target - EVENTUAL, oldest]
    past = {*(at - _TICK for at in before[-MOST_STATES:]), *ends}
    limit = one.row.served_at + CLOCKS
    if recent:
        return sorted((at for at in past if at >= ends[1]), reverse=True)
    future = [at for at in after[:MOST_STATES] if at <= limit]
    return [*sorted((at for at in past if at < ends[1]), reverse=True), *future, limit]


def _holds(one: _Logged, name: str, values: Mapping[str, Any]) -> bool:
    return values.get(REFUSED) is None and _same(one.values[name], values[_column(one.domain, name)])


def _same(served: Any, expected: Any) -> bool:
    """Return whether a served value is the expected one, to as many decimal places as the expected one has."""
    if isinstance(served, list) and isinstance(expected, list):
        return len(served) == len(expected) and all(map(_same, served, expected))
    if isinstance(served, Decimal) and isinstance(expected, Decimal):
        exponent = expected.as_tuple().exponent
        places = -exponent if isinstance(exponent, int) and exponent < 0 else 0
        return with_places(served, places) == expected
    return bool(served == expected)
