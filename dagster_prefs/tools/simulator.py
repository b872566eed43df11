"""Delivery of simulated events to the engine, to files or to Kafka."""

from __future__ import annotations

import gzip
import hashlib
import random
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import IO, Any, Protocol

from dagster_prefs.declarations.registry import Registry
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.events.messages import topics_of
from dagster_prefs.events.pace import Pace
from dagster_prefs.events.raw import (
    FileRecord,
    IngestReport,
    Progress,
    ProgressCallback,
    RawMessage,
    RawStore,
)
from dagster_prefs.files import whole_file
from dagster_prefs.tools.generator import GeneratedPlan
from dagster_prefs.tools.scenario import SimulationPlan, scenario_topics
from dagster_prefs.tools.simulation import SERIES, Plan, SimulatedEvent, SimulationError


@dataclass(frozen=True)
class CombinedPlan(Plan):
    """Several plans with one end and one seed, in sequence; live events in proportion to their messages."""

    parts: tuple[Plan, ...] = ()

    @property
    def shape(self) -> str:
        """Twelve hex digits that differ if a part differs in anything but its end."""
        return hashlib.sha256("".join(part.shape for part in self.parts).encode()).hexdigest()[:12]

    def counts(self) -> dict[str, int]:
        """Return the number of messages that the plan yields, by topic."""
        return {topic: count for part in self.parts for topic, count in part.counts().items()}

    def events(self) -> Iterator[SimulatedEvent]:
        """Yield the messages of each part in order of delivery."""
        return chain.from_iterable(replace(part, end=self.end).events() for part in self.parts)

    def live(self) -> Iterator[tuple[str, bytes]]:
        """Yield topic and message of events that happen now, endlessly, in the proportions of the counts."""
        rng = random.Random(self.source)  # noqa: S311 (not a secret)
        streams = [replace(part, end=self.end).live() for part in self.parts]
        weights = [part.messages or 1 for part in self.parts]
        while True:
            yield next(rng.choices(streams, weights)[0])


def fitted(registry: Registry, plan: SimulationPlan) -> Plan:
    """Return a plan for the project: the scenario for the topics that it declares, generated messages for all others.

    The other topics get their share of the plan's events, topic by topic.
    """
    known = scenario_topics(registry)
    others = tuple(topic for name, topic in topics_of(registry).items() if name not in known)
    if not others:
        return plan.only(known)
    timed = sum(topic.time is not None for topic in others)
    told = sum(registry.topics[name].time is not None for name in known)
    made_up = GeneratedPlan(
        plan.end,
        seed=plan.seed,
        days=plan.days,
        topics=others,
        entities=plan.viewers,
        events_total=plan.total * timed // max(1, told or timed),
    )
    parts = (plan.only(known), made_up)
    return CombinedPlan(plan.end, seed=plan.seed, days=plan.days, parts=parts) if known else made_up


class EventSink(Protocol):
    """A destination of simulated messages."""

    def write(self, topic: str, messages: Sequence[tuple[int, bytes]]) -> int:
        """Store messages with their numbers within the topic (from 1), and return how many are new."""

    def finish(self) -> None:
        """Make everything that was written durable."""


class EngineSink:
    """Writes to the engine's raw tables, under one source name."""

    def __init__(self, store: RawStore, registry: Registry, source: str) -> None:
        self._store = store
        self._registry = registry
        self.source = source

    def write(self, topic: str, messages: Sequence[tuple[int, bytes]]) -> int:
        """Store a batch. Raises RawStoreError."""
        rows = [RawMessage(0, offset, message) for offset, message in messages]
        return self._store.write(self._registry.topic(topic), self.source, rows)

    def finish(self) -> None:
        """Do nothing, because every batch is already committed."""


class KafkaSink:
    """Writes to Kafka topics. `names` maps topics to other names in Kafka.

    `client` adds librdkafka properties.
    """

    def __init__(
        self,
        bootstrap: str,
        names: Mapping[str, str] | None = None,
        client: Mapping[str, Any] | None = None,
    ) -> None:
        from dagster_prefs.events.kafka import KafkaWriter

        self._writer = KafkaWriter(bootstrap, client=client)
        self._names = names or {}
        self._checked: set[str] = set()

    def write(self, topic: str, messages: Sequence[tuple[int, bytes]]) -> int:
        """Send a batch. Raises KafkaUnavailable."""
        name = self._names.get(topic, topic)
        if name not in self._checked:
            self._writer.check(name)
            self._checked.add(name)
        for _, message in messages:
            self._writer.send(name, message)
        return len(messages)

    def finish(self) -> None:
        """Wait for every delivery. Raises KafkaUnavailable."""
        self._writer.flush()


def remembered_end(connection: EngineConfiguration, plan: Plan) -> datetime | None:
    """Return the newest end of a plan of this shape that was at least partly written to the engine, or None.

    A run with `replace(plan, end=…)` adds what is missing, and nothing twice. Raises EngineUnavailable,
    RawStoreError.
    """
    with RawStore(connection) as store:
        ends = [int(record.source.rsplit(":", 1)[1]) for record in store.recall_all(plan.series)]
    return datetime.fromtimestamp(max(ends), UTC) if ends else None


def holds_simulated_events(connection: EngineConfiguration) -> bool:
    """Return whether a plan was ever written to the engine. Raises EngineUnavailable, RawStoreError."""
    with RawStore(connection) as store:
        return bool(store.recall_all(SERIES))


def simulate_to_engine(
    connection: EngineConfiguration,
    registry: Registry,
    plan: Plan,
    *,
    batch_size: int = 10_000,
    rate: float | None = None,
    progress: ProgressCallback | None = None,
) -> list[IngestReport]:
    """Write a plan into the raw tables and report per topic; a repeated plan only adds what is missing.

    `rate` limits events per second. Raises EngineUnavailable, RawStoreError.
    """
    started = time.monotonic()
    plan = replace(plan, end=plan.end.replace(microsecond=0))
    with RawStore(connection) as store:
        record = FileRecord(plan.source, "simulation", "all", None, 0, None)
        known = store.remember_start(record)
        if known.completed_at is not None:
            held = plan.counts()
            return [
                IngestReport(plan.source, topic, n, 0, n, 0, 0, time.monotonic() - started)
                for topic, n in held.items()
            ]
        counts = _write(
            plan.events(),
            EngineSink(store, registry, plan.source),
            plan.messages,
            batch_size,
            rate,
            progress,
        )
        store.remember_end(
            replace(record, lines=sum(n for n, _ in counts.values()), completed_at=datetime.now(UTC))
        )
    seconds = time.monotonic() - started
    return [
        IngestReport(plan.source, topic, n, new, n - new, 0, 0, seconds) for topic, (n, new) in counts.items()
    ]


def simulate_to_kafka(
    bootstrap: str,
    plan: Plan,
    *,
    names: Mapping[str, str] | None = None,
    client: Mapping[str, Any] | None = None,
    rate: float | None = None,
    progress: ProgressCallback | None = None,
) -> dict[str, int]:
    """Send a plan to the Kafka topics of its messages, and return the number of messages delivered per topic.

    `names` maps topics to names in Kafka that differ; `client` adds librdkafka properties, e.g. for TLS.

    Raises KafkaUnavailable when a topic is missing or a message was not delivered.
    """
    counts = _write(plan.events(), KafkaSink(bootstrap, names, client), plan.messages, 1000, rate, progress)
    return {topic: n for topic, (n, _) in counts.items()}


def simulate_to_files(
    folder: Path, plan: Plan, *, compress: bool = False, progress: ProgressCallback | None = None
) -> dict[str, Path]:
    """Write a plan as one `.jsonl` (or `.jsonl.gz`) file per topic, and return the files by topic.

    A file gets its name when it is complete, so that an interrupted run leaves no partial file under it.
    Raises SimulationError when the folder cannot be written.
    """
    suffix = ".jsonl.gz" if compress else ".jsonl"
    paths: dict[str, Path] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            files: dict[str, IO[bytes]] = {}
            for done, (topic, message, _) in enumerate(plan.events(), 1):
                if topic not in files:
                    paths[topic] = folder / f"{topic}{suffix}"
                    raw = stack.enter_context(whole_file(paths[topic]))
                    # Without file name and modification time, so that the same plan gives the same bytes.
                    files[topic] = raw
                    if compress:
                        packed: Any = gzip.GzipFile("", "wb", 6, raw, mtime=0)
                        files[topic] = stack.enter_context(packed)
                files[topic].write(message + b"\n")
                if progress is not None and done % 10_000 == 0:
                    progress(Progress(done, done, plan.messages, "messages"))
    except OSError as error:
        raise SimulationError(
            f"{folder} cannot be written ({error.strerror}): choose another folder"
        ) from None
    return paths


def follow(
    sink: EventSink,
    plan: Plan,
    *,
    rate: float = 20.0,
    seconds: float | None = None,
    stop: threading.Event | None = None,
    progress: ProgressCallback | None = None,
) -> dict[str, int]:
    """Write `rate` events per second that happen now, until `stop` or for `seconds`.

    The plan determines seed and participants; topics occur in the proportions of its counts. Returns messages
    per topic. Raises what the sink raises, and SimulationError for a rate of 0 or less.
    """
    if rate <= 0:
        raise SimulationError(f"the rate is {rate:g} events per second: give a positive number")
    events = plan.live()
    stop = stop or threading.Event()
    counts: dict[str, int] = {}
    started = time.monotonic()
    sent = 0
    while not stop.is_set() and (seconds is None or time.monotonic() - started < seconds):
        due = int((time.monotonic() - started) * rate) + 1 - sent
        batches: dict[str, list[tuple[int, bytes]]] = {}
        for _ in range(due):
            topic, message = next(events)
            counts[topic] = counts.get(topic, 0) + 1
            batches.setdefault(topic, []).append((counts[topic], message))
        for topic, batch in batches.items():
            sink.write(topic, batch)
        sent += due
        if progress is not None:
            progress(Progress(sent, sent, None, "messages"))
        stop.wait(max(0.05, min(0.5, 1 / rate)))
    sink.finish()
    return counts


def follow_to_engine(
    connection: EngineConfiguration,
    registry: Registry,
    plan: Plan,
    *,
    rate: float = 20.0,
    seconds: float | None = None,
    stop: threading.Event | None = None,
    progress: ProgressCallback | None = None,
) -> dict[str, int]:
    """Call `follow` for the raw tables, as a source of its own. Raises EngineUnavailable, RawStoreError."""
    plan = replace(plan, end=datetime.now(UTC))
    with RawStore(connection) as store:
        sink = EngineSink(store, registry, f"simulate:{plan.seed}:live:{int(plan.end.timestamp() * 1000)}")
        return follow(sink, plan, rate=rate, seconds=seconds, stop=stop, progress=progress)


def _write(
    events: Iterable[SimulatedEvent],
    sink: EventSink,
    total: int,
    batch_size: int,
    rate: float | None,
    progress: ProgressCallback | None,
) -> dict[str, tuple[int, int]]:
    """Write events by topic in batches, and return messages and new messages per topic."""
    if rate is not None and rate <= 0:
        raise SimulationError(f"the rate is {rate:g} events per second: give a positive number")
    pace = Pace(rate)
    size = pace.batch_size(batch_size)
    batches: dict[str, list[tuple[int, bytes]]] = {}
    counts: dict[str, int] = {}
    new: dict[str, int] = {}

    def flush(topic: str) -> None:
        new[topic] = new.get(topic, 0) + sink.write(topic, batches[topic])
        batches[topic] = []
        done = sum(counts.values())
        pace.wait(done)
        if progress is not None:
            progress(Progress(done, done, total, "messages"))

    for topic, message, _ in events:
        counts[topic] = counts.get(topic, 0) + 1
        batch = batches.setdefault(topic, [])
        batch.append((counts[topic], message))
        if len(batch) >= size:
            flush(topic)
    for topic, batch in batches.items():
        if batch:
            flush(topic)
    sink.finish()
    return {topic: (count, new.get(topic, 0)) for topic, count in counts.items()}
