"""The measures of all stages for one screen or as JSON, and the exit code that summarizes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from dagster_prefs.declarations.contract import Contract
from dagster_prefs.declarations.registry import Registry
from dagster_prefs.dynamodb.store import DomainStore, domain_stores
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.freshness.catch_up import measure_history
from dagster_prefs.freshness.embedded import measure_embedded
from dagster_prefs.freshness.levels import QUIET, Level, Measure, worst
from dagster_prefs.freshness.measures import (
    measure_exported_events,
    measure_ingestion,
    measure_offline,
    measure_online,
    measure_views,
)
from dagster_prefs.freshness.online import find_tables

if TYPE_CHECKING:
    from mypy_boto3_dynamodb import DynamoDBClient

    from dagster_prefs.events.brokers import KafkaSource
    from dagster_prefs.freshness.exports_memo import ExportsMemo
    from dagster_prefs.iceberg.catalog import Tables

EXIT_CODES: dict[Level, int] = {"ok": 0, "skipped": 0, "catching up": 0, "warn": 1, "error": 2, "unknown": 2}

_STYLES: dict[Level, str] = {
    "ok": "green",
    "skipped": "dim",
    "catching up": "cyan",
    "warn": "yellow",
    "error": "bold red",
    "unknown": "bold magenta",
}
_TITLES = {
    "engine": "embedded engine",
    "history": "history → engine",
    "ingestion": "Kafka → engine",
    "views": "events → views",
    "online": "views → DynamoDB",
    "offline": "tiles → Iceberg",
    "canary": "event → reader",
    "drift": "values",
}


@dataclass(frozen=True)
class Sources:
    """The sources of the measures; nothing connects before it is read.

    `data_dir` is on the disk of the embedded engine. `publishes`, `follows` and `strangers` are as for
    `measure_online`, `by_sink` as for `offline_lag`. `kafka` and `declared` are called at each reading, because they
    need the project. Events are exported every `events_export_seconds`. `exports` measures the training tables instead
    of this process, whose memory Iceberg's libraries would double. `drift` measures the causes of drift.
    """

    engine: EngineConfiguration
    data_dir: Path
    declared: Callable[[], Registry]
    kafka: Callable[[], KafkaSource]
    connect: Callable[[], DynamoDBClient]
    catalog: Callable[[], Tables]
    table_prefix: str
    namespace: str
    export_start: date
    publishes: bool
    follows: bool
    by_sink: bool
    events_export_seconds: float = 3600.0
    strangers: bool = True
    memo: ExportsMemo | None = None
    exports: Callable[[datetime], list[Measure]] | None = None
    drift: Callable[[datetime], list[Measure]] = lambda now: []

    @property
    def registry(self) -> Registry:
        """The project's declarations."""
        return self.declared()

    @property
    def contract(self) -> Contract:
        """The serving contract, with the freshness targets."""
        return self.registry.contract

    def stores(self) -> list[DomainStore]:
        """Return the store of each domain; never creates a table.

        Raises Unmeasurable when a table is missing, or DynamoDB does not answer.
        """
        client, contract = self.connect(), self.contract
        return domain_stores(self.engine, client, contract, find_tables(client, contract, self.table_prefix))

    def embedded(self, now: datetime) -> list[Measure]:
        """Measure the embedded engine and its follower, by the engine's own clock; empty on RisingWave."""
        return measure_embedded(self.engine, self.registry, self.data_dir)

    def history(self, now: datetime) -> list[Measure]:
        """Measure the bootstraps of topics that are not complete, and those that were completed within a day."""
        return measure_history(self.engine, now=now)

    def ingestion(self, now: datetime) -> list[Measure]:
        """Compare Kafka with the raw tables."""
        return measure_ingestion(self.engine, self.registry, self.kafka(), now=now, by_id=True)

    def views(self, now: datetime) -> list[Measure]:
        """Compare raw tables with typed events, and each view with its upstream."""
        return measure_views(self.engine, self.registry, now=now)

    def online(self, now: datetime) -> list[Measure]:
        """Compare rolling views with DynamoDB."""
        return measure_online(
            self.contract,
            self.stores,
            now=now,
            publishes=self.publishes,
            follows=self.follows,
            strangers=self.strangers,
        )

    def exported_events(self, now: datetime) -> list[Measure]:
        """Compare the messages of the engine with what the lake holds of them; empty before the first export."""
        return measure_exported_events(
            self.engine, self.registry, now=now, every_seconds=self.events_export_seconds
        )

    def offline(self, now: datetime) -> list[Measure]:
        """Compare tiles with the training tables, or reuse the last good reading if nothing has changed since."""
        state = self.memo and self.memo.state(self.engine, self.registry, now)
        if self.memo and state and (known := self.memo.recall(state)) is not None:
            return known
        if self.exports is not None:
            return self.exports(now)
        found = self._offline(now)
        if self.memo and state:
            self.memo.remember(state, found)
        return found

    def _offline(self, now: datetime) -> list[Measure]:
        return measure_offline(
            self.engine,
            self.registry,
            self.catalog,
            namespace=self.namespace,
            start=self.export_start,
            now=now,
            by_sink=self.by_sink,
        )


@dataclass(frozen=True)
class Status:
    """All measures of one evaluation. `read_at` is UTC, `seconds` is the duration of the evaluation."""

    read_at: datetime
    seconds: float
    measures: tuple[Measure, ...]

    @property
    def level(self) -> Level:
        """The worst level of all measures; stages that are not configured do not count."""
        return worst(measure.level for measure in self.measures if measure.level != "skipped")

    @property
    def exit_code(self) -> int:
        """0 for ok, 1 for warn, 2 for error and unknown."""
        return EXIT_CODES[self.level]

    def as_dict(self) -> dict[str, Any]:
        """Return the status as plain values, for JSON."""
        return {
            "read_at": self.read_at.isoformat(),
            "seconds": round(self.seconds, 3),
            "level": self.level,
            "measures": [asdict(measure) for measure in self.measures],
        }


def evaluate(sources: Sources, *, now: Callable[[], datetime], extra: Sequence[Measure] = ()) -> Status:
    """Measure and judge every stage; the stages are read concurrently.

    `now` returns the time in UTC; `extra` are measures from elsewhere, such as the canary's. Never raises for
    a stage that cannot be read: those measures are `unknown`.
    """
    started = now()
    stages = (
        sources.embedded,
        sources.history,
        sources.ingestion,
        sources.views,
        sources.online,
        sources.offline,
        sources.exported_events,
        sources.drift,
    )
    with ThreadPoolExecutor(len(stages), thread_name_prefix="freshness") as pool:
        found = [measure for stage in pool.map(lambda read: read(started), stages) for measure in stage]
    return Status(started, (now() - started).total_seconds(), (*found, *extra))


def render_status(status: Status) -> Group:
    """Render the status as one screen for a rich console."""
    parts: list[Any] = []
    for stage, title in _TITLES.items():
        measures = [measure for measure in status.measures if measure.stage == stage]
        if not measures:
            continue
        table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
        table.add_column("", no_wrap=True)
        table.add_column("lag", justify="right", no_wrap=True)
        table.add_column("level", no_wrap=True)
        table.add_column("why", overflow="fold")
        for measure in measures:
            style = _STYLES[measure.level]
            table.add_row(
                measure.name,
                duration(measure.lag_seconds),
                Text(measure.level, style=style),
                Text(measure.reason, style="dim" if measure.level in QUIET else ""),
            )
        parts += [table, Text()]
    parts.append(
        Text.assemble(
            (status.level, _STYLES[status.level]),
            f"  read at {status.read_at:%Y-%m-%d %H:%M:%S} UTC in {status.seconds:.1f} s",
        )
    )
    return Group(*parts)


def duration(seconds: float | None) -> str:
    """Format a lag for display: `0.4 s`, `3 min`, `2.5 h`, `4.0 d`; empty for None."""
    if seconds is None:
        return ""
    for size, unit in ((86_400, "d"), (3_600, "h")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.1f} s"
