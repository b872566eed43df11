"""What a workload writes, reads, keeps and costs: the formulas behind `prefs cost` and docs/scale.md.

Every figure follows from a `Workload` and the serving contract by one of the small functions below, each with its
formula in its docstring. They are expectations, so they are floats inside and rounded to whole rows, items and
units at the end; money is exact on top of those. A test holds them against what a simulated run really wrote.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from decimal import ROUND_HALF_UP, Decimal, InvalidOperation
from typing import Any, Literal

from dagster_prefs.declarations.contract import LAST_EVENT_AT, Contract, Table
from dagster_prefs.errors import PrefsError
from dagster_prefs.iceberg.publish import FILE_BYTES
from dagster_prefs.ids import SEPARATOR

DAY_SECONDS = 86_400
MONTH_DAYS = 30
GIB = 1024**3

# --- DynamoDB, as its developer guide has it ------------------------------------------------------------------

WRITE_UNIT_BYTES = 1024
READ_UNIT_BYTES = 4096
# Beside an item's own bytes, storage is billed for its index entry.
ITEM_OVERHEAD_BYTES = 100
# Default quota of a table on demand, and what a new one bears at once; it doubles from its former peak.
TABLE_WRITE_UNITS = 40_000
NEW_TABLE_WRITE_UNITS = 4_000

# Values of the contract's types as the views produce them: N is 1 byte and 1 more for each two digits. Milliseconds
# have 13 digits, a count of some weeks 2, a rounded minute or ratio 8; a list 3 bytes, and 1 for each element.
_VALUE_BYTES = {
    "integer": 2.0,
    "decimal": 5.0,
    "float": 10.0,
    "string": 7.0,
    "list<string>": 3 + 4.0 * (1 + 7),
    "list<decimal>": 3 + 4.0 * (1 + 4),
}
_EPOCH_MS_BYTES = 8.0
# Of a part of a composite key in the sort key: the name of a category, or a number's digits.
_KEY_PART_BYTES = 12
# Of a domain none of whose attributes has days in its name.
DEFAULT_WINDOW_DAYS = 28
_WINDOW = re.compile(r"_(\d+)d$")

# --- what the offline store writes ----------------------------------------------------------------------------

# Parquet bytes of one exported row, zstd, in files of thousands of rows and more.
TILE_ROW_BYTES: Mapping[str, float] = {"watch": 20.0, "genre": 15.0, "interactions": 12.0}
# A day is staged on a branch and published from there: three metadata files, a manifest list and a manifest.
METADATA_FILES_PER_COMMIT = 5

# --- what the engine keeps ------------------------------------------------------------------------------------

# Bytes of one row in the engine's state, keys, indexes and operators' copies included, before compression: measured
# on RisingWave 2.6.3 with simulated events (rw_catalog.rw_table_stats); those of windows and rolling views, which
# are a small part, are taken from the tiles'.
STATE_ROW_BYTES: Mapping[str, float] = {
    "raw events": 280.0,
    "typed events": 1_150.0,
    "tiles": 300.0,
    "tile aggregates": 100.0,
    "windows": 180.0,
    "rolling views": 300.0,
}


class CostError(PrefsError):
    """A workload that cannot be, or a price that is none."""


@dataclass(frozen=True)
class Prices:
    """List prices in US dollars, to be replaced by one's own.

    The defaults are AWS's public list prices for us-east-1 as of 2025-07-01 (DynamoDB on demand, standard table
    class, after the reduction of 2024-11-01; S3 Standard, first tier), without free tier, discount or tax.
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
    """NAME=VALUE texts as arguments of `of`.

    Raises CostError for a text of another form, an unknown name or a value that is no number.
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
            raise CostError(f"{name} is {value!r}, which is no number: write e.g. {name}=1") from None
    return found


@dataclass(frozen=True)
class Workload:
    """How many viewers do how much.

    `viewers` were seen within the long window; `events_per_day` are valid view events and interactions together,
    of them `interaction_share` interactions. `daily_active_share` of the viewers watch on a given day, in
    `genres_per_active_day` genres and `contents_per_active_day` contents. `reads_per_day` are calls of the
    profile client for all domains, eventually consistent. `refresh_seconds` is how often changes are written:
    RisingWave's barrier, or the pause between refreshes on the embedded engine. `spread_seconds` is
    PREFS_EXPIRY_SPREAD_SECONDS. `peak_factor` is the busiest second over the mean. `late_days` are days before
    the newest one that each day's export finds changed; `history_days` are days of events that the engine keeps,
    `raw_days` days of raw messages (PREFS_RAW_RETENTION_SECONDS), None meaning as many. `fenced` is whether items
    are written in transactions, as PREFS_PUBLISH=changefeed does, which costs twice the units.

    Raises CostError naming the number, its rule and a remedy.
    """

    viewers: int
    events_per_day: int
    interaction_share: float = 0.1
    daily_active_share: float = 0.25
    genres_per_active_day: float = 1.5
    contents_per_active_day: float = 5.0
    reads_per_day: int = 0
    refresh_seconds: float = 1.0
    spread_seconds: int = 0
    peak_factor: float = 3.0
    late_days: float = 3.0
    history_days: int = 365
    raw_days: int | None = None
    fenced: bool = False

    def __post_init__(self) -> None:
        for name, least in (("viewers", 1), ("events_per_day", 0), ("reads_per_day", 0), ("late_days", 0)):
            if not getattr(self, name) >= least:
                raise CostError(f"{name} is {getattr(self, name)}: give {least} or more")
        for name in ("interaction_share", "daily_active_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise CostError(f"{name} is {getattr(self, name)}: give a share from 0 to 1")
        for name in ("genres_per_active_day", "contents_per_active_day", "peak_factor", "history_days"):
            if not getattr(self, name) >= 1:
                raise CostError(f"{name} is {getattr(self, name)}: give 1 or more")
        if self.raw_days is not None and not 1 <= self.raw_days <= self.history_days:
            raise CostError(f"raw_days is {self.raw_days}: give 1 to history_days ({self.history_days})")
        if not 0 < self.refresh_seconds <= DAY_SECONDS:
            raise CostError(f"refresh_seconds is {self.refresh_seconds}: give more than 0 and at most a day")
        if not 0 <= self.spread_seconds < DAY_SECONDS:
            raise CostError(f"spread_seconds is {self.spread_seconds}: give 0 to 86399, less than a day")
        if self.views_per_day < self.active_viewers:
            raise CostError(
                f"{self.views_per_day:,.0f} view events a day cannot make {self.active_viewers:,.0f} viewers "
                "active: raise events_per_day or lower daily_active_share"
            )

    @property
    def views_per_day(self) -> float:
        """View events a day."""
        return self.events_per_day * (1 - self.interaction_share)

    @property
    def interactions_per_day(self) -> float:
        """Likes, shares and searches a day."""
        return self.events_per_day * self.interaction_share

    @property
    def active_viewers(self) -> float:
        """Viewers with a view event on a given day."""
        return self.viewers * self.daily_active_share

    @property
    def interacting_viewers(self) -> float:
        """Viewers with an interaction on a given day: V · (1 - e^(-interactions / V)), single events at random."""
        return self.viewers * -math.expm1(-self.interactions_per_day / self.viewers)


@dataclass(frozen=True)
class DomainLoad:
    """What matters of a domain here: bytes of its item, its windows in days, and the events that change it."""

    name: str
    item_bytes: float
    windows: tuple[int, ...]
    fed_by: Literal["views", "interactions"]

    def events(self, workload: Workload) -> float:
        """Events a day that change a row of this domain."""
        return workload.views_per_day if self.fed_by == "views" else workload.interactions_per_day

    def active(self, workload: Workload) -> float:
        """Viewers a day whose row in this domain an event changes."""
        return workload.active_viewers if self.fed_by == "views" else workload.interacting_viewers


def contract_domains(contract: Contract, viewers: int) -> tuple[DomainLoad, ...]:
    """The contract's domains; their windows are read from the names of their attributes (`…_28d`)."""
    loads = []
    for domain in contract.domains.values():
        attributes = [
            (name, _EPOCH_MS_BYTES if name == LAST_EVENT_AT else _VALUE_BYTES[attribute.type])
            for name, attribute in domain.attributes.items()
        ]
        windows = {int(found[1]) for name in domain.attributes if (found := _WINDOW.search(name))}
        # Only how viewers react comes from the other topic.
        fed_by: Literal["views", "interactions"] = (
            "interactions" if domain.name == "interactions" else "views"
        )
        loads.append(
            DomainLoad(
                domain.name,
                item_bytes(contract.table_of(domain), viewers, domain.key, attributes),
                tuple(sorted(windows)) or (DEFAULT_WINDOW_DAYS,),
                fed_by,
            )
        )
    return tuple(loads)


def uniform_domains(
    contract: Contract, viewers: int, domains: int, attributes: int
) -> tuple[DomainLoad, ...]:
    """So many domains of so many attributes: decimals with long names, both windows, changed by every view.

    Raises CostError unless there is at least one domain with one attribute.
    """
    if domains < 1 or attributes < 1:
        raise CostError(
            f"{domains} domains of {attributes} attributes are no contract: give at least 1 of each"
        )
    named = [(f"watch_minutes_of_kind_{number:02d}", _VALUE_BYTES["decimal"]) for number in range(attributes)]
    named.append((LAST_EVENT_AT, _EPOCH_MS_BYTES))
    size = item_bytes(next(iter(contract.tables.values())), viewers, "engagement#domain", named)
    return tuple(DomainLoad(f"domain {number}", size, (7, 28), "views") for number in range(1, domains + 1))


def item_bytes(table: Table, viewers: int, domain_key: str, attributes: Sequence[tuple[str, float]]) -> float:
    """Bytes of one item: names and values of both keys and of every attribute, as DynamoDB counts them.

    A number is 1 byte and 1 more for each two of its digits, a text its UTF-8 bytes.
    """
    viewer_bytes = 1 + math.ceil(len(str(viewers)) / 2)
    keys = len(table.partition_key.name) + viewer_bytes + len(table.sort_key.name) + len(domain_key)
    keys += len(table.rest_keys) * (len(SEPARATOR) + _KEY_PART_BYTES)
    return keys + sum(len(name) + value for name, value in attributes)


def rows_kept(workload: Workload, domain: DomainLoad) -> float:
    """Rows of a rolling view: viewers with an event in its longest window or on the running day.

    V · (1 - (1 - p)^(N + 1)), where p = active / V is the chance that a viewer is active on a day.
    """
    return workload.viewers * _at_least_once(
        domain.active(workload) / workload.viewers, max(domain.windows) + 1
    )


def event_writes(workload: Workload, domain: DomainLoad) -> float:
    """Items put a day because of events. An event changes its viewer's row: one put, whatever the row holds.

    Changes of one row within a refresh are one put. With A viewers active a day, k = events / A for each, and a
    refresh every f of a day: A · (1 - (1 - f)^k) / f. For short refreshes that is the number of events, for one
    refresh a day the number of active viewers.
    """
    active = domain.active(workload)
    if not active:
        return 0.0
    part = workload.refresh_seconds / DAY_SECONDS
    return active * _at_least_once(part, domain.events(workload) / active) / part


def expiry_writes(workload: Workload, domain: DomainLoad) -> float:
    """Items put or deleted when windows move on at midnight UTC.

    A row changes when a day with its viewer's events leaves one of its w windows: V · (1 - (1 - p)^w). A row that
    this empties is deleted, which costs what a put costs.
    """
    return workload.viewers * _at_least_once(domain.active(workload) / workload.viewers, len(domain.windows))


def _at_least_once(chance: float, times: float) -> float:
    """1 - (1 - chance)^times, exact for tiny chances too."""
    if chance >= 1:
        return 1.0 if times > 0 else 0.0
    return -math.expm1(times * math.log1p(-chance))


def tile_rows(workload: Workload) -> dict[str, float]:
    """Rows a day of each tile: one per active viewer; in the genre tile one per viewer and genre."""
    return {
        "watch": workload.active_viewers,
        "genre": workload.active_viewers * workload.genres_per_active_day,
        "interactions": workload.interacting_viewers,
    }


@dataclass(frozen=True)
class Limit:
    """Something that a workload runs into: what it asks for over what there is, and what helps."""

    name: str
    load: float
    capacity: float
    remedy: str

    @property
    def used(self) -> float:
        """Load over capacity; above 1 it breaks."""
        return self.load / self.capacity


@dataclass(frozen=True)
class Capacities:
    """What the places bear that have no published limit; replace them by what yours were seen to do.

    `engine_events_per_second` and `engine_state_gib` are of the whole RisingWave cluster,
    `export_rows_per_second` is of one exporting process (benchmarks/export.py prints it), `export_seconds` how
    long a day's export may take. `table_write_units` is the table's quota.
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
    """What a workload comes to. Rows, items, units and files are whole; bytes are bytes; dollars are of 30 days.

    `burst_writes` are due at midnight; `burst_per_second` is how fast they must go to be written within the spread,
    or within the promised freshness where there is none. `peak_write_units` is the busiest second of the day.
    `needed_spread_seconds` is the least spread that keeps the burst within the table's quota beside the mean
    load, None where no spread does.
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
        """The limit that this workload uses most of."""
        return max(self.limits, key=lambda limit: limit.used)

    def as_dict(self) -> dict[str, Any]:
        """The estimate as JSON holds it."""
        content = {name: getattr(self, name) for name in self.__dataclass_fields__}
        content["workload"] = asdict(self.workload)
        content["limits"] = [asdict(limit) | {"used": limit.used} for limit in self.limits]
        return content


def estimate(
    workload: Workload,
    domains: Sequence[DomainLoad],
    *,
    target_seconds: float,
    prices: Prices | None = None,
    capacities: Capacities | None = None,
) -> Estimate:
    """Add it all up. `target_seconds` is the freshness that the contract promises (its `error_seconds`)."""
    prices, capacities = prices or Prices(), capacities or Capacities()
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
    # The busiest second and midnight are hours apart wherever the viewers live in a few time zones.
    peak = max(mean_units * workload.peak_factor, mean_units + burst_rate)
    room = capacities.table_write_units - mean_units
    needed = math.ceil(burst_units / room) if room > 0 else DAY_SECONDS

    table_bytes = sum(kept[domain.name] * (domain.item_bytes + ITEM_OVERHEAD_BYTES) for domain in domains)
    read_units = workload.reads_per_day * sum(
        math.ceil(domain.item_bytes / READ_UNIT_BYTES) / 2 for domain in domains
    )
    tiles = tile_rows(workload)
    files = {
        name: max(1, math.ceil(rows * TILE_ROW_BYTES[name] / FILE_BYTES)) for name, rows in tiles.items()
    }
    lake_bytes = 365 * sum(rows * TILE_ROW_BYTES[name] for name, rows in tiles.items())
    lake_writes = (1 + workload.late_days) * sum(files.values()) + (
        (1 + workload.late_days) * len(files) * METADATA_FILES_PER_COMMIT
    )
    state = engine_rows(workload, domains)
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


def engine_rows(workload: Workload, domains: Sequence[DomainLoad]) -> dict[str, float]:
    """Rows that the engine keeps, by kind, with H days of history and E events a day.

    Typed events: E · H, because the first delivery of an event wins for ever; raw ones for the days that they
    are kept. Tiles: a day's tile rows · H. Tile aggregates: every event once for each tile it is in (the newest
    event's time must be found again when events go), and the distinct contents and genres of a viewer's day.
    Windows: the tiles of the longest window and the running day. Rolling views: their rows.
    """
    history = workload.history_days
    events = workload.events_per_day * history
    tiles = sum(tile_rows(workload).values())
    distinct = workload.contents_per_active_day + workload.genres_per_active_day
    window = max(max(domain.windows) for domain in domains)
    return {
        "raw events": workload.events_per_day * (workload.raw_days or history),
        "typed events": events,
        "tiles": tiles * history,
        "tile aggregates": (2 * workload.views_per_day + workload.interactions_per_day) * history
        + workload.active_viewers * distinct * history,
        "windows": tiles * (window + 1),
        "rolling views": sum(rows_kept(workload, domain) for domain in domains),
    }


def _rounded(value: float) -> Decimal:
    return Decimal(value).quantize(Decimal("0.01"), ROUND_HALF_UP)


def _dollars(
    prices: Prices, write_units: int, read_units: int, table_bytes: int, lake_bytes: int, lake_writes: int
) -> dict[str, Decimal]:
    """Dollars of a month of 30 days, by what they are for; the lake after its first year."""
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
# Of the scale table: a viewer's events a day, and the spread that it compares with none.
EVENTS_PER_VIEWER = 2
SPREAD_SECONDS = 3_600


def scale_table(
    contract: Contract, *, prices: Prices | None = None, capacities: Capacities | None = None
) -> str:
    """The table of docs/scale.md in Markdown: what grows with the viewers, and what breaks first at each step."""
    head = (
        "viewers", "events/s", "items put/day by events", "at midnight", "per second, not spread", "needed spread, s",
        "peak write units/s", "table, GiB", "lake files/day", "lake, GiB/year", "engine rows/year",
        "engine state, GiB", "$/month", "breaks first, not spread", f"breaks first, spread over {SPREAD_SECONDS:,} s",
    )  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + "---:|" * (len(head) - 2) + "---|---|"]
    for viewers in STEPS:
        plain = Workload(viewers, EVENTS_PER_VIEWER * viewers)
        of_contract = contract_domains(contract, viewers)
        found, spread = (
            estimate(
                workload,
                of_contract,
                target_seconds=target_of(contract),
                prices=prices,
                capacities=capacities,
            )
            for workload in (plain, replace(plain, spread_seconds=SPREAD_SECONDS))
        )
        needed = found.needed_spread_seconds
        cells = (
            f"{viewers:,}", f"{found.events_per_second:,}", short(found.event_writes_per_day),
            short(found.burst_writes), short(found.burst_per_second),
            "none is enough" if needed is None else f"{needed:,}", short(spread.peak_write_units),
            f"{found.table_bytes / GIB:,.1f}", f"{found.lake_files_per_day:,}",
            f"{found.lake_bytes_per_year / GIB:,.1f}", short(sum(found.engine_rows.values())),
            f"{found.engine_bytes / GIB:,.0f}", f"{found.dollars['total']:,.0f}",
            shown(found.breaks_first), shown(spread.breaks_first),
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def target_of(contract: Contract) -> float:
    """The freshness that the contract promises for its strictest domain, in seconds."""
    return min(domain.freshness.error_seconds for domain in contract.domains.values())


def shown(limit: Limit) -> str:
    """A limit in one cell: its name and how many times what there is the workload asks for."""
    return (
        f"{limit.name}: {limit.used:,.2g} times"
        if limit.used < 10
        else f"{limit.name}: {limit.used:,.0f} times"
    )


def short(number: float) -> str:
    """A number with three digits and a unit: 1.25 M, 730 G."""
    for size, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"
