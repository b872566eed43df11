"""The cost model: writes, reads, storage and dollars of a workload, for `prefs cost` and docs/scale.md.

Every figure follows from a `Workload` and the `Shape` of an entity's tiles and domains, which a project's
registry gives, by one of the small functions below, each with its formula in its docstring. The figures are
expected values, computed as floats and rounded to whole rows, items and units at the end; dollars are
computed exactly from those. A test compares them with the writes of a simulated run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from decimal import ROUND_HALF_UP, Decimal, InvalidOperation
from functools import cache, partial
from typing import Any

import sqlglot
from sqlglot import exp

from dagster_prefs.declarations.contract import LAST_EVENT_AT, Attribute, Contract, Domain
from dagster_prefs.declarations.registry import Entity, Registry, TileDeclaration
from dagster_prefs.errors import PrefsError
from dagster_prefs.iceberg import FILE_BYTES
from dagster_prefs.training.windows import Features, relations_read

DAY_SECONDS = 86_400
MONTH_DAYS = 30
GIB = 1024**3

# --- DynamoDB, from its developer guide
# -----------------------------------------------------------------------

WRITE_UNIT_BYTES = 1024
READ_UNIT_BYTES = 4096
# Added to an item's own bytes, because storage is also billed for its index entry.
ITEM_OVERHEAD_BYTES = 100
# Default quota of an on-demand table.
TABLE_WRITE_UNITS = 40_000

# Bytes of the contract's types, with values as the views produce them: a number (N) takes 1 byte and 1 more
# per two digits. Milliseconds have 13 digits, a count of some weeks 2, a rounded minute or ratio 8; a list
# takes 3 bytes, and 1 more per element.
_EPOCH_MS_BYTES = 8.0
_VALUE_BYTES = {"integer": 2.0, "decimal": 5.0, "float": 10.0, "string": 7.0}
# A list of integers is taken for one of times.
_ELEMENT_BYTES = {"list<string>": 1 + 7, "list<decimal>": 1 + 4, "list<integer>": 1 + _EPOCH_MS_BYTES}
# Bytes of a key in DynamoDB; a bigint takes half a byte per digit. A text is assumed to be as long as a short
# name.
_KEY_BYTES = {"text": 16, "uuid": 36}

# --- the offline store
# ----------------------------------------------------------------------------------------

# Parquet bytes (zstd) of a value by its type, in files of thousands of rows sorted by key, in which all rows
# have the same day and most counts are small.
_PARQUET_BYTES = {"bigint": 1.6, "date": 0.0, "decimal": 4.0, "text": 2.0, "timestamptz": 6.0}
_PARQUET_KEY_BYTES = {"bigint": 1.6, "text": 8.0, "uuid": 16.0}
# A day is staged on a branch and then published: three metadata files, a manifest list and a manifest.
METADATA_FILES_PER_COMMIT = 5

# Defaults for what a project does not declare in the variable `workload`: rows of a tile per entity and day,
# for each key column beyond the entity's, distinct values for each `count(distinct …)`, and elements of a list.
ROWS_PER_FURTHER_KEY = 1.5
VALUES_PER_DISTINCT_COUNT = 3.0
ELEMENTS_PER_LIST = 4.0

# --- the engine's state
# ---------------------------------------------------------------------------------------

# Bytes of one row in the engine's state, including keys, indexes and operators' copies, before compression.
# Measured on RisingWave 2.6.3 with simulated events (rw_catalog.rw_table_stats), except for windows and
# rolling views: they are a small part, and use the tiles' values.
STATE_ROW_BYTES: Mapping[str, float] = {
    "raw events": 280.0,
    "typed events": 1_150.0,
    "tiles": 300.0,
    "tile aggregates": 100.0,
    "windows": 180.0,
    "rolling views": 300.0,
}


class CostError(PrefsError):
    """A workload or a price is invalid."""


@dataclass(frozen=True)
class Prices:
    """List prices in US dollars, which can be overridden.

    The defaults are AWS's public list prices for us-east-1 as of 2025-07-01 (DynamoDB on demand, standard
    table class, after the reduction of 2024-11-01; S3 Standard, first tier), without free tier, discount or
    tax.
    """

    million_write_units: Decimal = Decimal("0.625")
    million_read_units: Decimal = Decimal("0.125")
    table_gib_month: Decimal = Decimal("0.25")
    recovery_gib_month: Decimal = Decimal("0.20")
    lake_gib_month: Decimal = Decimal("0.023")
    thousand_lake_writes: Decimal = Decimal("0.005")

    def __post_init__(self) -> None:
        for price in fields(self):
            value = getattr(self, price.name)
            if not value.is_finite() or value < 0:
                raise CostError(f"the price {price.name} is {value}: give US dollars, 0 or more")


PRICES_FROM = "AWS list prices, us-east-1, on demand, as of 2025-07-01"


def overrides(given: Sequence[str], of: type[Prices] | type[Capacities]) -> dict[str, Any]:
    """Parse NAME=VALUE texts into arguments of `of`.

    Raises CostError for a text of another form, an unknown name or a value that is not a number.
    """
    known = {entry.name: Decimal if of is Prices else int for entry in fields(of)}
    found = {}
    for text in given:
        name, sign, value = text.partition("=")
        if not sign or name not in known:
            raise CostError(
                f"{text!r} is not NAME=VALUE with one of the names {', '.join(known)}: correct it"
            )
        try:
            found[name] = known[name](value)
        except (ValueError, InvalidOperation):
            raise CostError(f"{name} is {value!r}, which is not a number: write e.g. {name}=1") from None
    return found


def share_overrides(given: Sequence[str]) -> dict[str, float]:
    """Parse TOPIC=SHARE texts into shares by topic. Raises CostError for a text of another form."""
    found = {}
    for text in given:
        name, _, value = text.partition("=")
        try:
            found[name] = float(value)
        except ValueError:
            raise CostError(f"{text!r} is not TOPIC=SHARE: write e.g. {name or 'view'}=0.9") from None
    return found


@dataclass(frozen=True)
class Workload:
    """The number of entities of one kind, and their activity.

    `entities` have an event within the longest window; `events_per_day` are valid events of all topics about
    them, and `shares` is the part of them that each topic's typed relation gets (together 1).
    `daily_active_share` of the entities have an event of the topic with the largest share on a given day;
    events of the other topics fall on entities at random. `reads_per_day` are calls of the profile client for
    all domains, eventually consistent. `refresh_seconds` is the interval at which changes are written:
    RisingWave's barrier, or the pause between refreshes on the embedded engine. `spread_seconds` is
    PREFS_EXPIRY_SPREAD_SECONDS. `peak_factor` is the load of the busiest second over the mean. `late_days`
    are days before the newest one that each day's export finds changed; `history_days` are days of events
    that the engine keeps, `raw_days` days of raw messages (PREFS_RAW_RETENTION_SECONDS), None for as many.
    `fenced` says that items are written in transactions, as PREFS_PUBLISH=changefeed does, at twice the write
    units.

    Raises CostError naming the number, its rule and a remedy.
    """

    entities: int
    events_per_day: int
    shares: Mapping[str, float]
    daily_active_share: float = 0.25
    reads_per_day: int = 0
    refresh_seconds: float = 1.0
    spread_seconds: int = 0
    peak_factor: float = 3.0
    late_days: float = 3.0
    history_days: int = 365
    raw_days: int | None = None
    fenced: bool = False

    def __post_init__(self) -> None:
        for name, least in (("entities", 1), ("events_per_day", 0), ("reads_per_day", 0), ("late_days", 0)):
            if not getattr(self, name) >= least:
                raise CostError(f"{name} is {getattr(self, name)}: give {least} or more")
        for name, share in (("daily_active_share", self.daily_active_share), *self.shares.items()):
            if not 0 <= share <= 1:
                raise CostError(f"{name} is {share}: give a share from 0 to 1")
        if not math.isclose(sum(self.shares.values()), 1):
            raise CostError(
                f"the shares of {', '.join(self.shares) or 'no topic'} add up to {sum(self.shares.values()):g}: "
                "they must add up to 1"
            )
        for name in ("peak_factor", "history_days"):
            if not getattr(self, name) >= 1:
                raise CostError(f"{name} is {getattr(self, name)}: give 1 or more")
        if self.raw_days is not None and not 1 <= self.raw_days <= self.history_days:
            raise CostError(f"raw_days is {self.raw_days}: give 1 to history_days ({self.history_days})")
        if not 0 < self.refresh_seconds <= DAY_SECONDS:
            raise CostError(f"refresh_seconds is {self.refresh_seconds}: give more than 0 and at most a day")
        if not 0 <= self.spread_seconds < DAY_SECONDS:
            raise CostError(f"spread_seconds is {self.spread_seconds}: give 0 to 86399, less than a day")
        main, active = self.main_topic, self.entities * self.daily_active_share
        if self.events_of({main}) < active:
            raise CostError(
                f"{self.events_of({main}):,.0f} events a day of {main} cannot make {active:,.0f} entities "
                "active: raise events_per_day or lower daily_active_share"
            )

    @property
    def main_topic(self) -> str:
        """The topic with the largest share of the events."""
        return max(self.shares, key=lambda topic: self.shares[topic])

    def events_of(self, topics: Collection[str]) -> float:
        """Return the events per day of these topics."""
        return self.events_per_day * sum(self.shares[topic] for topic in topics)

    def active_in(self, topics: Collection[str]) -> float:
        """Return the entities per day with an event of any of these topics: V · (1 - Π (1 - p)).

        The product is over the topics. p is `daily_active_share` for the topic with the largest share, else 1
        - e^(-events / V), for random events.
        """
        idle = 1.0
        for topic in topics:
            chance = (
                self.daily_active_share
                if topic == self.main_topic
                else -math.expm1(-self.events_of({topic}) / self.entities)
            )
            idle *= 1 - chance
        return self.entities * (1 - idle)


@dataclass(frozen=True)
class TileLoad:
    """The properties of a tile that determine its load.

    The topics it counts, bytes of an exported row, and rows of an active entity's day.
    `distinct_per_active_day` is the number of distinct values that the engine stores for an active entity's
    day.
    """

    name: str
    topics: frozenset[str]
    row_bytes: float
    rows_per_active_day: float = 1.0
    distinct_per_active_day: float = 0.0


@dataclass(frozen=True)
class DomainLoad:
    """The properties of a domain that determine its load: bytes of its item, windows in days, and topics.

    A domain without windows is computed from all of history: its rows never expire. One `of_events` reads no tile, so
    that the engine keeps the events of its window for it.
    """

    name: str
    item_bytes: float
    windows: tuple[int, ...]
    topics: frozenset[str]
    of_events: bool = False

    def events(self, workload: Workload) -> float:
        """Return the events per day that change a row of this domain."""
        return workload.events_of(self.topics)

    def active(self, workload: Workload) -> float:
        """Return the number of entities per day whose row in this domain an event changes."""
        return workload.active_in(self.topics)


@dataclass(frozen=True)
class Shape:
    """The tiles and domains of one entity."""

    tiles: tuple[TileLoad, ...]
    domains: tuple[DomainLoad, ...]

    @property
    def longest_window(self) -> int:
        """Days of the longest window of any domain; 0 if none has a window."""
        return max((days for domain in self.domains for days in domain.windows), default=0)


def served_entity(registry: Registry, named: str | None) -> Entity:
    """Return the entity of this name, or the only one with a domain.

    Raises CostError if it has no domain, or if several have one and `named` is None.
    """
    served = dict.fromkeys(domain.entity for domain in registry.contract.domains.values())
    if named is None and len(served) == 1:
        named = next(iter(served))
    if named not in served:
        what = "several entities have domains" if named is None else f"the entity {named} has no domain"
        raise CostError(
            f"{what}: give --entity with one of {', '.join(served) or '(no entity has a domain)'}"
        )
    return registry.entity(named)


def topic_shares(
    registry: Registry, entity: Entity, given: Mapping[str, float] | None = None
) -> dict[str, float]:
    """Return the share of the events that each typed relation about an entity gets.

    `given` takes precedence over the project's variable `workload`; topics without a value share the rest
    equally. Raises CostError for a name that is no topic of the entity.
    """
    topics = [topic.relation for topic in registry.topics.values() if topic.entity == entity.name]
    said = _assumed(registry, "shares", topics) if given is None else dict(given)
    if wrong := sorted(set(said) - set(topics)):
        raise CostError(
            f"{wrong[0]} is no topic about {entity.name}: name {', '.join(topics) or '(it has none)'}"
        )
    open_ = [topic for topic in topics if topic not in said]
    rest = max(0.0, 1 - sum(said.values()))
    return {topic: said[topic] if topic in said else rest / len(open_) for topic in topics}


def project_shape(registry: Registry, entity: Entity, entities: int) -> Shape:
    """Return the declared tiles and domains of an entity, for this number of entities.

    Raises CostError for a variable `workload` that names what the project does not declare.
    """
    features = Features(registry, entity)
    tiles = {tile.relation: tile for tile in registry.tiles.values() if tile.entity == entity.name}
    rows = _assumed(registry, "rows_per_active_day", registry.tiles)
    distinct = _assumed(registry, "distinct_per_active_day", registry.tiles)
    elements = _assumed(
        registry, "list_elements", [domain.relation for domain in registry.contract.domains.values()]
    )
    return Shape(
        tuple(
            TileLoad(
                name,
                _topics_behind(registry, entity, name),
                _row_bytes(entity, tile),
                rows.get(name, ROWS_PER_FURTHER_KEY ** (len(tile.key) - len(entity.keys))),
                distinct.get(name, _distinct_counts(registry, name) * VALUES_PER_DISTINCT_COUNT),
            )
            for name, tile in tiles.items()
        ),
        tuple(
            DomainLoad(
                domain.name,
                item_bytes(
                    registry.contract,
                    entity,
                    domain,
                    entities,
                    [
                        (
                            name,
                            _value_bytes(name, attribute, elements.get(domain.relation, ELEMENTS_PER_LIST)),
                        )
                        for name, attribute in domain.attributes.items()
                    ],
                ),
                features.windows_of(domain.name)
                if domain.name in features.domains
                else _windows(registry.query(domain.relation)),
                _topics_behind(registry, entity, domain.relation),
                of_events=domain.name not in features.domains,
            )
            for domain in registry.contract.domains.values()
            if domain.entity == entity.name
        ),
    )


def _value_bytes(name: str, attribute: Attribute, elements: float) -> float:
    """Return the bytes of an attribute's value, of which a list has so many elements."""
    if attribute.is_list:
        return 3 + elements * _ELEMENT_BYTES[attribute.type]
    return _EPOCH_MS_BYTES if name == LAST_EVENT_AT else _VALUE_BYTES[attribute.type]


@cache
def _windows(query: str) -> tuple[int, ...]:
    """Return the days of each window in which a view that reads no tile reads its events, ascending."""
    tree = sqlglot.parse_one(query, dialect="risingwave")
    days = {
        # The condition is day + (N + 1) days > now.
        int(interval.this.name) - 1
        for now in tree.find_all(exp.CurrentTimestamp)
        if (condition := now.find_ancestor(exp.Predicate)) is not None
        for interval in condition.find_all(exp.Interval)
        if str(interval.args.get("unit")).upper() in ("DAY", "DAYS")
    }
    return tuple(sorted(days))


def uniform_shape(shape: Shape, domains: int, attributes: int) -> Shape:
    """Return the tiles of a shape with `domains` identical domains of `attributes` attributes each.

    The attributes are decimals with long names in all of the shape's windows, changed by every event. Raises
    CostError unless there is at least one domain with one attribute.
    """
    if domains < 1 or attributes < 1:
        raise CostError(
            f"{domains} domains of {attributes} attributes are no contract: give at least 1 of each"
        )
    value = len("a_long_attribute_name_00") + _VALUE_BYTES["decimal"]
    size = 40 + attributes * value + len(LAST_EVENT_AT) + _EPOCH_MS_BYTES
    windows = tuple(sorted({days for domain in shape.domains for days in domain.windows}))
    topics = frozenset[str]().union(*(domain.topics for domain in shape.domains))
    return replace(
        shape,
        domains=tuple(
            DomainLoad(f"domain {number}", size, windows, topics) for number in range(1, domains + 1)
        ),
    )


def item_bytes(
    contract: Contract, entity: Entity, domain: Domain, entities: int, attributes: Sequence[tuple[str, float]]
) -> float:
    """Return the bytes of one item as DynamoDB counts them: names and values of all keys and attributes.

    A number takes 1 byte and 1 more per two of its digits, a text its UTF-8 bytes.
    """
    table, digits = contract.table_of(domain), len(str(entities))
    first, *rest = entity.keys
    key = _KEY_BYTES[first.type] if first.type in _KEY_BYTES else 1 + math.ceil(digits / 2)
    # The sort key contains further key columns as text, each after a separator.
    further = sum(1 + _KEY_BYTES.get(column.type, digits) for column in rest)
    keys = len(table.partition_key.name) + key + len(table.sort_key.name) + len(domain.key) + further
    return keys + sum(len(name) + value for name, value in attributes)


def _assumed(registry: Registry, what: str, known: Collection[str]) -> dict[str, float]:
    """Return one part of the project's variable `workload`."""
    given = registry.variables.get("workload", {}).get(what, {})
    if wrong := sorted(set(given) - set(known)):
        raise CostError(
            f"dbt_project.yml, vars, workload, {what}: {wrong[0]} is not declared: name one of {', '.join(known)}"
        )
    return {name: float(value) for name, value in given.items()}


@cache
def _tables(query: str) -> frozenset[str]:
    """Return the relations that a view's compiled query reads."""
    return frozenset(relations_read(sqlglot.parse_one(query, dialect="postgres")))


def _topics_behind(registry: Registry, entity: Entity, relation: str) -> frozenset[str]:
    """Return the typed relations about an entity behind a view, or all of them if its query names none."""
    topics = {topic.relation for topic in registry.topics.values() if topic.entity == entity.name}
    found: set[str] = set()
    seen, left = set(), {relation}
    while left:
        name = left.pop()
        seen.add(name)
        if name in topics:
            found.add(name)
        elif name in registry.queries:
            left |= _tables(registry.query(name)) - seen
    return frozenset(found or topics)


def _distinct_counts(registry: Registry, tile: str) -> int:
    """Count the distinct counts in a tile."""
    query = sqlglot.parse_one(registry.query(tile), dialect="postgres")
    return sum(isinstance(count.this, exp.Distinct) for count in query.find_all(exp.Count))


def _row_bytes(entity: Entity, tile: TileDeclaration) -> float:
    """Return the bytes of one exported row in Parquet, from the types of its columns."""
    keys = {key.name: _PARQUET_KEY_BYTES[key.type] for key in entity.keys}
    return sum(keys.get(name, _PARQUET_BYTES[column.type]) for name, column in tile.columns.items())


def rows_kept(workload: Workload, domain: DomainLoad) -> float:
    """Return the rows of a rolling view: entities with an event in its longest window or on the current day.

    V · (1 - (1 - p)^(N + 1)), where p = active / V is the probability that an entity is active on a day; V if
    the domain has no window.
    """
    if not domain.windows:
        return workload.entities
    return workload.entities * _at_least_once(
        domain.active(workload) / workload.entities, max(domain.windows) + 1
    )


def event_writes(workload: Workload, domain: DomainLoad) -> float:
    """Return the items put per day because of events. An event changes its entity's row, which is one put.

    Changes of one row within a refresh are one put. With A entities active a day, k = events / A for each,
    and a refresh every f of a day: A · (1 - (1 - f)^k) / f. For short refreshes that is the number of events,
    for one refresh a day the number of active entities.
    """
    active = domain.active(workload)
    if not active:
        return 0.0
    part = workload.refresh_seconds / DAY_SECONDS
    return active * _at_least_once(part, domain.events(workload) / active) / part


def expiry_writes(workload: Workload, domain: DomainLoad) -> float:
    """Return the items put or deleted when windows move at midnight UTC.

    A row changes when a day with its entity's events leaves one of its w windows: V · (1 - (1 - p)^w). A row
    that becomes empty is deleted, which costs as much as a put.
    """
    return workload.entities * _at_least_once(
        domain.active(workload) / workload.entities, len(domain.windows)
    )


def _at_least_once(chance: float, times: float) -> float:
    """Compute 1 - (1 - chance)^times, exact for tiny chances too."""
    if chance >= 1:
        return 1.0 if times > 0 else 0.0
    return -math.expm1(times * math.log1p(-chance))


def tile_rows(workload: Workload, shape: Shape) -> dict[str, float]:
    """Return the rows per day of each tile: the active entities times the rows of an active day."""
    return {tile.name: workload.active_in(tile.topics) * tile.rows_per_active_day for tile in shape.tiles}


@dataclass(frozen=True)
class Limit:
    """A limit that a workload may reach: the load, the capacity, and a remedy."""

    name: str
    load: float
    capacity: float
    remedy: str

    @property
    def used(self) -> float:
        """Load over capacity; above 1 the limit is exceeded."""
        return self.load / self.capacity


@dataclass(frozen=True)
class Capacities:
    """Capacities without a published limit, which can be overridden by measured values.

    `engine_events_per_second` and `engine_state_gib` are those of the whole RisingWave cluster,
    `export_rows_per_second` of one exporting process (benchmarks/export.py prints it), `export_seconds` the
    permitted duration of a day's export. `table_write_units` is the table's quota.
    """

    table_write_units: int = TABLE_WRITE_UNITS
    engine_events_per_second: int = 50_000
    engine_state_gib: int = 10_000
    export_rows_per_second: int = 100_000
    export_seconds: int = 14_400

    def __post_init__(self) -> None:
        for capacity in fields(self):
            if not getattr(self, capacity.name) >= 1:
                raise CostError(f"{capacity.name} is {getattr(self, capacity.name)}: give 1 or more")


@dataclass(frozen=True)
class Estimate:
    """The estimate for a workload. Rows, items, units and files are whole numbers; dollars are for 30 days.

    `burst_writes` are due at midnight; `burst_per_second` is the rate that writes them within the spread, or
    within the freshness target without a spread. `peak_write_units` is the busiest second of the day.
    `needed_spread_seconds` is the smallest spread that keeps the burst, together with the mean load, within
    the table's quota, None if no spread does.
    """

    workload: Workload
    item_bytes: Mapping[str, int]
    events_per_second: int
    event_writes_per_day: int
    writes_per_event: Decimal
    burst_writes: int
    burst_per_second: int
    needed_spread_seconds: int | None
    write_units_per_day: int
    peak_write_units: int
    read_units_per_day: int
    items: int
    table_bytes: int
    tile_rows_per_day: Mapping[str, int]
    lake_files_per_day: int
    lake_bytes_per_year: int
    lake_writes_per_day: int
    engine_rows: Mapping[str, int]
    engine_bytes: int
    dollars: Mapping[str, Decimal]
    limits: tuple[Limit, ...] = field(repr=False)

    @property
    def breaks_first(self) -> Limit:
        """The limit of which this workload uses the largest share."""
        return max(self.limits, key=lambda limit: limit.used)

    def as_dict(self) -> dict[str, Any]:
        """Return the estimate as plain values, for JSON."""
        content = {name: getattr(self, name) for name in self.__dataclass_fields__}
        content["workload"] = asdict(self.workload)
        content["limits"] = [asdict(limit) | {"used": limit.used} for limit in self.limits]
        return content


def estimate(
    workload: Workload,
    shape: Shape,
    *,
    target_seconds: float,
    prices: Prices | None = None,
    capacities: Capacities | None = None,
) -> Estimate:
    """Compute the estimate. `target_seconds` is the contract's freshness target (its `error_seconds`)."""
    prices, capacities = prices or Prices(), capacities or Capacities()
    domains = shape.domains
    units = {
        domain.name: math.ceil(domain.item_bytes / WRITE_UNIT_BYTES) * (2 if workload.fenced else 1)
        for domain in domains
    }
    puts = {domain.name: event_writes(workload, domain) for domain in domains}
    expiring = {domain.name: expiry_writes(workload, domain) for domain in domains}
    kept = {domain.name: rows_kept(workload, domain) for domain in domains}

    mean_units = sum(puts[name] * units[name] for name in units) / DAY_SECONDS
    burst_units = sum(expiring[name] * units[name] for name in units)
    burst_rate = burst_units / max(workload.spread_seconds, target_seconds)
    # If the entities live in a few time zones, the busiest second and midnight are hours apart, so they do
    # not add up.
    peak = max(mean_units * workload.peak_factor, mean_units + burst_rate)
    room = capacities.table_write_units - mean_units
    needed = math.ceil(burst_units / room) if room > 0 else DAY_SECONDS

    table_bytes = sum(kept[domain.name] * (domain.item_bytes + ITEM_OVERHEAD_BYTES) for domain in domains)
    read_units = workload.reads_per_day * sum(
        math.ceil(domain.item_bytes / READ_UNIT_BYTES) / 2 for domain in domains
    )
    tiles = tile_rows(workload, shape)
    sizes = {tile.name: tiles[tile.name] * tile.row_bytes for tile in shape.tiles}
    files = {name: max(1, math.ceil(size / FILE_BYTES)) for name, size in sizes.items()}
    lake_bytes = 365 * sum(sizes.values())
    lake_writes = (1 + workload.late_days) * sum(files.values()) + (
        (1 + workload.late_days) * len(files) * METADATA_FILES_PER_COMMIT
    )
    state = engine_rows(workload, shape)
    state_bytes = sum(rows * STATE_ROW_BYTES[name] for name, rows in state.items())
    write_units = round(mean_units * DAY_SECONDS + burst_units)
    events_per_second = workload.events_per_day / DAY_SECONDS

    return Estimate(
        workload=workload,
        item_bytes={domain.name: round(domain.item_bytes) for domain in domains},
        events_per_second=round(events_per_second),
        event_writes_per_day=round(sum(puts.values())),
        writes_per_event=_rounded(
            sum(puts.values()) / workload.events_per_day if workload.events_per_day else 0
        ),
        burst_writes=round(sum(expiring.values())),
        burst_per_second=round(sum(expiring.values()) / max(workload.spread_seconds, target_seconds)),
        needed_spread_seconds=None if needed >= DAY_SECONDS else 0 if needed <= target_seconds else needed,
        write_units_per_day=write_units,
        peak_write_units=round(peak),
        read_units_per_day=round(read_units),
        items=round(sum(kept.values())),
        table_bytes=round(table_bytes),
        tile_rows_per_day={name: round(rows) for name, rows in tiles.items()},
        lake_files_per_day=sum(files.values()),
        lake_bytes_per_year=round(lake_bytes),
        lake_writes_per_day=round(lake_writes),
        engine_rows={name: round(rows) for name, rows in state.items()},
        engine_bytes=round(state_bytes),
        dollars=_dollars(
            prices, write_units, round(read_units), round(table_bytes), round(lake_bytes), round(lake_writes)
        ),
        limits=(
            Limit(
                "write units in the busiest second",
                mean_units * workload.peak_factor,
                capacities.table_write_units,
                "ask AWS to raise the table's quota, or refresh less often",
            ),
            Limit(
                "write units at midnight",
                mean_units + burst_rate,
                capacities.table_write_units,
                "raise PREFS_EXPIRY_SPREAD_SECONDS",
            ),
            Limit(
                "events a second into the engine",
                events_per_second * workload.peak_factor,
                capacities.engine_events_per_second,
                "add compute nodes and Kafka partitions",
            ),
            Limit(
                "state of the engine",
                state_bytes / GIB,
                capacities.engine_state_gib,
                "keep fewer days of events in the engine: the tiles are in the lake",
            ),
            Limit(
                "time of one exporter",
                sum(tiles.values()) * (1 + workload.late_days),
                capacities.export_rows_per_second * capacities.export_seconds,
                "export with RisingWave's own sink, or several exporters by table",
            ),
        ),
    )


def engine_rows(workload: Workload, shape: Shape) -> dict[str, float]:
    """Return the rows that the engine keeps, by kind, with H days of history and E events a day.

    Typed events: E · H, because the first delivery of an event wins forever; raw ones for the days that they
    are kept. Tiles: a day's tile rows · H. Tile aggregates: every event once for each tile it is in (the
    newest event's time must be found again when events are deleted), and the distinct values of an entity's
    day. Windows: the tiles of the longest window and the current day, and the events of the windows of domains that
    read no tile. Rolling views: their rows.
    """
    history = workload.history_days
    tiles = sum(tile_rows(workload, shape).values())
    return {
        "raw events": workload.events_per_day * (workload.raw_days or history),
        "typed events": workload.events_per_day * history,
        "tiles": tiles * history,
        "tile aggregates": history
        * sum(
            workload.events_of(tile.topics) + workload.active_in(tile.topics) * tile.distinct_per_active_day
            for tile in shape.tiles
        ),
        "windows": (tiles * (shape.longest_window + 1) if shape.longest_window else 0.0)
        + sum(
            workload.events_of(domain.topics) * (max(domain.windows) + 1 if domain.windows else history)
            for domain in shape.domains
            if domain.of_events
        ),
        "rolling views": sum(rows_kept(workload, domain) for domain in shape.domains),
    }


def _rounded(value: float) -> Decimal:
    return Decimal(value).quantize(Decimal("0.01"), ROUND_HALF_UP)


def _dollars(
    prices: Prices, write_units: int, read_units: int, table_bytes: int, lake_bytes: int, lake_writes: int
) -> dict[str, Decimal]:
    """Return the dollars of a month of 30 days, by purpose; for the lake after its first year."""
    million, cent = Decimal(1_000_000), Decimal("0.01")
    table_gib, lake_gib = Decimal(table_bytes) / GIB, Decimal(lake_bytes) / GIB
    dollars = {
        "writes": write_units * MONTH_DAYS / million * prices.million_write_units,
        "reads": read_units * MONTH_DAYS / million * prices.million_read_units,
        "table": table_gib * prices.table_gib_month,
        "recovery": table_gib * prices.recovery_gib_month,
        "lake": lake_gib * prices.lake_gib_month
        + Decimal(lake_writes * MONTH_DAYS) / 1000 * prices.thousand_lake_writes,
    }
    dollars = {name: amount.quantize(cent, ROUND_HALF_UP) for name, amount in dollars.items()}
    return dollars | {"total": sum(dollars.values(), Decimal(0))}


STEPS = (1_000_000, 10_000_000, 100_000_000, 1_000_000_000)
# For the scale table: an entity's events per day, and the spread that it compares with no spread.
EVENTS_PER_ENTITY = 2
SPREAD_SECONDS = 3_600


def scale_table(
    registry: Registry, entity: Entity, *, prices: Prices | None = None, capacities: Capacities | None = None
) -> str:
    """Return `scale_table_of` what the project declares about this entity."""
    return scale_table_of(
        entity.name,
        partial(project_shape, registry, entity),
        topic_shares(registry, entity),
        target_seconds=target_of(registry.contract, entity),
        prices=prices,
        capacities=capacities,
    )


def scale_table_of(
    entity: str,
    shape_for: Callable[[int], Shape],
    shares: Mapping[str, float],
    *,
    target_seconds: float,
    prices: Prices | None = None,
    capacities: Capacities | None = None,
) -> str:
    """Return a table in Markdown, as in docs/scale.md: figures per number of entities, and the first limit.

    `shape_for` returns the tiles and domains for a number of entities.
    """
    head = (
        f"{entity}s", "events/s", "items put/day by events", "at midnight", "per second, not spread",
        "needed spread, s", "peak write units/s", "table, GiB", "lake files/day", "lake, GiB/year", "engine rows/year",
        "engine state, GiB", "$/month", "breaks first, not spread", f"breaks first, spread over {SPREAD_SECONDS:,} s",
    )  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + "---:|" * (len(head) - 2) + "---|---|"]
    for entities in STEPS:
        plain = Workload(entities, EVENTS_PER_ENTITY * entities, shares)
        shape = shape_for(entities)
        found, spread = (
            estimate(
                workload,
                shape,
                target_seconds=target_seconds,
                prices=prices,
                capacities=capacities,
            )
            for workload in (plain, replace(plain, spread_seconds=SPREAD_SECONDS))
        )
        needed = found.needed_spread_seconds
        cells = (
            f"{entities:,}", f"{found.events_per_second:,}", short(found.event_writes_per_day),
            short(found.burst_writes), short(found.burst_per_second),
            "none is enough" if needed is None else f"{needed:,}", short(spread.peak_write_units),
            f"{found.table_bytes / GIB:,.1f}", f"{found.lake_files_per_day:,}",
            f"{found.lake_bytes_per_year / GIB:,.1f}", short(sum(found.engine_rows.values())),
            f"{found.engine_bytes / GIB:,.0f}", f"{found.dollars['total']:,.0f}",
            shown(found.breaks_first), shown(spread.breaks_first),
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def target_of(contract: Contract, entity: Entity) -> float:
    """Return the strictest freshness target of an entity's domains, in seconds."""
    return min(
        domain.freshness.error_seconds for domain in contract.domains.values() if domain.entity == entity.name
    )


def shown(limit: Limit) -> str:
    """Format a limit for one cell: its name, and load over capacity."""
    return (
        f"{limit.name}: {limit.used:,.2g} times"
        if limit.used < 10
        else f"{limit.name}: {limit.used:,.0f} times"
    )


def short(number: float) -> str:
    """Format a number with three digits and a unit: 1.25 M, 730 G."""
    for size, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"
