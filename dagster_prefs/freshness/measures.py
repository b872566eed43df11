"""The measures of every stage, judged by the contract's freshness targets. A failed reading is `unknown`, never ok."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import date, datetime
from typing import TYPE_CHECKING, Any

import psycopg

from dagster_prefs.declarations.contract import Contract, Domain, Freshness
from dagster_prefs.declarations.registry import Registry, WatchedView
from dagster_prefs.dynamodb.lease import LeaseState, read_lease
from dagster_prefs.dynamodb.store import DomainStore
from dagster_prefs.engine.catalog import NotDeployed
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.errors import PrefsError
from dagster_prefs.events.progress import EXPORTS_COUNTED, Unexported, unexported
from dagster_prefs.events.rejected import Counts, message_counts
from dagster_prefs.freshness.canary import SOURCE
from dagster_prefs.freshness.catch_up import excused, follower_progress, reading_progress
from dagster_prefs.freshness.levels import Level, Measure, Stage, Unmeasurable, judge, worst
from dagster_prefs.freshness.online import SAMPLE, OnlineLag, online_lag, table_page
from dagster_prefs.freshness.views import Typed, ViewLag, view_lag, watched_relations
from dagster_prefs.ids import Id

if TYPE_CHECKING:
    from dagster_prefs.events.brokers import KafkaSource
    from dagster_prefs.freshness.ingestion import IngestionLag, State
    from dagster_prefs.iceberg.catalog import Tables

# A lease holder that has not renewed for this many lease periods counts as dead.
INACTIVE_PROMISES = 3
# An export of events is late, and very late, after so many of its intervals.
LATE_EXPORTS, LOST_EXPORTS = 3, 24
# A refresh that runs for longer than this no longer excuses a lag.
REFRESH_PATIENCE_SECONDS = 900


def unknown(stage: Stage, names: Iterable[str], why: Exception | str) -> list[Measure]:
    """Return one `unknown` measure per name, with the reason."""
    return [Measure(stage, name, "unknown", " ".join(str(why).split())) for name in names]


def measure_views(
    engine: EngineConfiguration,
    registry: Registry,
    *,
    now: datetime,
    relations: Sequence[Typed | WatchedView] | None = None,
) -> list[Measure]:
    """Measure the freshness of each typed relation and view, all by default. `now` is UTC.

    On the embedded engine a typed relation's measure also has the numbers of its topic's messages and rejected ones.
    Never raises for an engine that is down or a relation that is missing: those measures are `unknown`.
    """
    freshness = registry.contract.freshness
    relations = watched_relations(registry) if relations is None else relations
    names = [relation.relation for relation in relations]
    try:
        with engine.connect() as connection:
            refreshing = refresh_running(connection, engine)
            progress = follower_progress(connection, engine, now)
            measures = []
            arrivals: dict[str, datetime | None] = {}
            counts: Mapping[str, Counts] | None = None
            # RisingWave would read all rejected messages for it. Without the relations the measure of each says so.
            if engine.kind == "local":
                with suppress(psycopg.errors.UndefinedTable):
                    counts = message_counts(connection, engine, without=SOURCE)
            for relation in relations:
                try:
                    lag = view_lag(connection, engine, relation, now=now)
                except Unmeasurable as error:
                    measures += unknown("views", [relation.relation], error)
                    continue
                if isinstance(relation, Typed):
                    arrivals[relation.topic] = lag.newest_arrival
                # Reference data is judged by the freshness target for views.
                promised = isinstance(relation, Typed) and relation.subject is not None
                thresholds = freshness.topics.get(relation.topic) if promised else freshness.views
                measure = _view_measure(lag, arrivals.get(lag.topic), thresholds, refreshing)
                if isinstance(relation, Typed) and counts is not None:
                    count = counts.get(relation.topic, Counts(0, 0))
                    numbers = {"topic_messages": count.messages, "topic_rejected": count.rejected}
                    measure = replace(measure, values={**measure.values, **numbers})
                measures.append(excused(measure, progress))
            return measures
    except (PrefsError, psycopg.Error) as error:
        return unknown("views", names, error)


def _no_threshold(topic: str) -> str:
    return (
        f"the contract has no freshness threshold for topic {topic}: add it to the exposure's "
        "meta.contract.freshness and run `prefs generate`"
    )


def _view_measure(
    lag: ViewLag, newest_arrival: datetime | None, thresholds: Freshness | None, refreshing: bool
) -> Measure:
    values: dict[str, int | float] = {"waiting": lag.waiting, "ahead_seconds": lag.ahead_seconds}
    notes = {"topic": lag.topic}
    if lag.newest_event is not None:
        values["newest_event_at"] = lag.newest_event.timestamp()
        notes["newest_event"] = lag.newest_event.isoformat(timespec="seconds")
    if newest_arrival is not None:
        values["newest_arrival_at"] = newest_arrival.timestamp()
        notes["newest_arrival"] = newest_arrival.isoformat(timespec="seconds")
    level: Level
    if thresholds is None:
        level = "unknown"
        reason = _no_threshold(lag.topic)
    elif lag.waiting and lag.lag_seconds <= -thresholds.error_seconds:
        level = "unknown"
        reason = (
            f"what waits arrived {-lag.lag_seconds:.0f} s in the future: the engine's clock and this "
            "machine's differ, correct them"
            if lag.kind == "typed"
            else f"the events that wait are stamped {-lag.lag_seconds:.0f} s in the future, so their age is "
            "not known: check their producers' clocks"
        )
    elif lag.waiting:
        level = judge(lag.lag_seconds, thresholds)
        what = (
            f"{lag.waiting} messages arrived and are not visible"
            if lag.kind == "typed"
            else "its upstream has newer events"
        )
        reason = f"{what}, for {lag.lag_seconds:.1f} s"
        if refreshing and level == "error":
            level, reason = "warn", f"{reason}; a refresh is running"
    elif lag.ahead_seconds >= thresholds.error_seconds:
        level = "warn"
        reason = f"the newest event is {lag.ahead_seconds:.0f} s in the future: check its producers' clocks"
    else:
        level, reason = "ok", "everything that arrived is visible"
    return Measure("views", lag.relation, level, reason, max(0.0, lag.lag_seconds), thresholds, values, notes)


def measure_online(
    contract: Contract,
    connect: Callable[[], Sequence[DomainStore]],
    *,
    now: datetime,
    publishes: bool,
    follows: bool = False,
    strangers: bool = True,
    wait: Callable[[float], None] = time.sleep,
) -> list[Measure]:
    """Measure the online lag of each domain.

    `publishes` says whether this platform writes DynamoDB, rather than a RisingWave sink; `follows` that
    `prefs publish --follow` does, whose inactivity, stop and rejected rows are reported too; `strangers` that items
    which the publisher does not know of are looked for too, on a page of each table. Never raises for an engine or
    DynamoDB that does not answer: those measures are `unknown`.
    """
    from botocore.exceptions import BotoCoreError

    names = [domain.name for domain in contract.domains.values()]
    if not names:
        return []
    try:
        stores = connect()
        engine = stores[0].engine
        with engine.connect() as connection:
            refreshing = refresh_running(connection, engine)
            progress = follower_progress(connection, engine, now)
    except (PrefsError, BotoCoreError, psycopg.Error) as error:
        return unknown("online", names, error)
    measures = []
    pages: dict[str, dict[str, set[Id]]] = {}
    for store in stores:
        domain, table = store.domain, store.table.name
        try:
            if table not in pages:
                # One for all its domains: a page takes longer than anything else that is read.
                sharing = sum(other.table.name == table for other in stores)
                pages[table] = table_page(store, SAMPLE * sharing, now=now) if strangers else {}
            page = pages[table].get(domain.key, ())
            lag = online_lag(store, now=now, count_rows=False, page=page, wait=wait)
        except (PrefsError, psycopg.Error) as error:
            measures += unknown("online", [domain.name], error)
            continue
        measure = excused(_online_measure(lag, domain, publishes, follows, refreshing), progress)
        if follows:
            try:
                state = read_lease(store.items, domain)
            except PrefsError as error:
                measures += unknown("online", [domain.name], error)
                continue
            measure = _with_follower(measure, state, now)
        measures.append(measure)
    return measures


def _with_follower(measure: Measure, state: LeaseState | None, now: datetime) -> Measure:
    """Add the publisher's lease state to a measure: a stopped publisher lags only after the next change."""
    if state is None:
        reason = f"it has never been published: run `prefs publish --follow`; {measure.reason}"
        return replace(measure, level=worst([measure.level, "warn"]), reason=reason)
    silent = now.timestamp() - state.renewed_ms / 1000
    values: dict[str, int | float] = {
        **measure.values,
        "follower_silent_seconds": max(0.0, silent),
        "refused_rows": state.refused,
    }
    if state.token is not None:
        values["token_age_seconds"] = max(0.0, now.timestamp() - state.token / 1000)
    level, reasons = measure.level, [measure.reason]
    if -silent > INACTIVE_PROMISES * state.lease_seconds:
        level = worst([level, "unknown"])
        reasons.append(
            f"its publisher {state.label} was last heard {-silent:.0f} s in the future: its clock and this machine's "
            "differ, correct them"
        )
    elif state.holder and silent > INACTIVE_PROMISES * state.lease_seconds:
        level = worst([level, "error"])
        reasons.append(
            f"its publisher {state.label} has been silent for {silent:.0f} s: start `prefs publish --follow`"
        )
    elif not state.holder and state.mode == "follow":
        level = worst([level, "warn"])
        reasons.append(
            f"its publisher {state.label} was stopped {max(0.0, silent):.0f} s ago: start `prefs publish --follow`"
        )
    if state.refused:
        level = worst([level, "error"])
        reasons.append(f"{state.refused} rows cannot become items: `prefs publish --full` names them")
    notes = {**measure.notes, "publisher": state.label}
    return replace(measure, level=level, reason="; ".join(reasons), values=values, notes=notes)


def _online_measure(
    lag: OnlineLag, domain: Domain, publishes: bool, follows: bool, refreshing: bool
) -> Measure:
    values: dict[str, int | float] = {
        "sampled": lag.sampled,
        "missing": lag.missing,
        "extra": lag.extra,
        "different": lag.different,
    }
    notes = {"domain": domain.key}
    age = lag.oldest_seconds
    level: Level = "ok"
    reason = f"{lag.sampled} sampled ids are in DynamoDB as they are in {domain.relation}"
    if lag.differences:
        notes["attributes"] = ", ".join(lag.attributes)
        notes["ids"] = ", ".join(str(difference.id) for difference in lag.differences[:10])
        level = judge(age, domain.freshness)
        reason = (
            f"of {lag.sampled} sampled ids {lag.missing} are missing in DynamoDB, {lag.extra} are extra "
            f"and {lag.different} differ, for {age:.1f} s"
        )
        if level != "ok":
            reason += f": {_remedy(lag, domain, publishes, follows)}"
        if refreshing and level == "error":
            level, reason = "warn", f"{reason} (a refresh is running)"
        if lag.ahead_seconds >= domain.freshness.error_seconds:
            level = "unknown"
            reason += (
                f"; some of it became visible {lag.ahead_seconds:.0f} s in the future: the engine's clock and this "
                "machine's differ, correct them"
            )
    return Measure("online", domain.name, level, reason, age, domain.freshness, values, notes)


def _remedy(lag: OnlineLag, domain: Domain, publishes: bool, follows: bool) -> str:
    if follows:
        return (
            "see that `prefs publish --follow` runs, or run `prefs publish --full`, which repairs every item"
        )
    if publishes:
        return f"materialize online/{domain.name}, which publishes what changed, or run `prefs reconcile`"
    if lag.standing:
        # One item that DynamoDB rejects stops a sink for every id, and only a recreated sink continues.
        return (
            f"the sink {domain.sink} is stuck: drop it, rebuild it with `dbt run --select {domain.sink}`, "
            "which backfills, and look for a NULL key upstream"
        )
    return "run `prefs reconcile`, which writes what is stale or missing and deletes what is extra"


def measure_offline(
    engine: EngineConfiguration,
    registry: Registry,
    connect: Callable[[], Tables],
    *,
    namespace: str,
    start: date,
    now: datetime,
    by_sink: bool = False,
) -> list[Measure]:
    """Measure the lag of the training table of each tile.

    `connect` opens the catalog once; `by_sink` is as for `offline_lag`. Never raises for an engine or catalog
    that does not answer: those measures are `unknown`.
    """
    from dagster_prefs.freshness.offline import offline_lag
    from dagster_prefs.iceberg.tables import tile_tables

    specs = tile_tables(registry)
    try:
        catalog = connect()
    except PrefsError as error:
        return unknown("offline", specs, error)
    thresholds = registry.contract.freshness.export
    measures = []
    for spec in specs.values():
        try:
            lag = offline_lag(
                engine, catalog, spec, namespace=namespace, start=start, now=now, by_sink=by_sink
            )
        except (PrefsError, psycopg.Error) as error:
            measures += unknown("offline", [spec.name], error)
            continue
        level = judge(lag.lag_seconds, thresholds)
        reasons = []
        parts = []
        if lag.missing:
            parts.append(f"{len(lag.missing)} complete days are not exported (oldest {lag.missing[0]})")
        if lag.changed:
            parts.append(f"{len(lag.changed)} days changed after their export (oldest {lag.changed[0]})")
            level = "warn" if level == "ok" else level
        if parts:
            reasons.append(" and ".join(parts) + f": materialize these days of training/{spec.name}")
        if lag.foreign:
            # Rows of another writer were never audited against the engine, so they are an error however fresh
            # the day is.
            level = "error"
            oldest = next(iter(lag.foreign))
            reasons.append(
                f"{len(lag.foreign)} days were changed by another writer (oldest {oldest}: {lag.foreign[oldest]}): run "
                "`prefs export --replace-foreign`"
            )
        reason = "; ".join(reasons) or "every complete day is exported in its current version"
        notes = {} if lag.newest_day is None else {"newest_day": lag.newest_day.isoformat()}
        values: dict[str, int | float] = {
            "days_missing": len(lag.missing),
            "days_changed": len(lag.changed),
            "days_foreign": len(lag.foreign),
        }
        measures.append(
            Measure("offline", spec.name, level, reason, lag.lag_seconds, thresholds, values, notes)
        )
    return measures


def measure_exported_events(
    engine: EngineConfiguration, registry: Registry, *, now: datetime, every_seconds: float
) -> list[Measure]:
    """Measure the lag of each topic's events in the lake, of which an export is due every `every_seconds`.

    It is the age of the first message that the lake does not hold, by its arrival; a topic that was never exported has
    no measure. Never raises: an engine that does not answer has none of these measures.
    """
    # The views' measures tell of an engine that is down; which topics are exported, only the engine knows.
    with suppress(PrefsError, psycopg.Error), engine.connect() as connection:
        return [
            _exported_measure(found, every_seconds, now) for found in unexported(connection, engine, registry)
        ]
    return []


def _exported_measure(found: Unexported, every_seconds: float, now: datetime) -> Measure:
    thresholds = Freshness(LATE_EXPORTS * every_seconds, LOST_EXPORTS * every_seconds)
    age = 0.0 if found.since is None else max(0.0, (now - found.since).total_seconds())
    level = judge(age, thresholds)
    reason = f"the lake holds all that arrived until {found.complete_until:%Y-%m-%d %H:%M:%S} UTC"
    if found.messages:
        least = "at least " if found.messages >= EXPORTS_COUNTED else ""
        reason += f", and {least}{found.messages:,} messages wait for the next export"
    if level != "ok":
        reason += ": run `prefs export events`, or see that Dagster's sensor events_to_export runs"
    values = {"events_unexported": found.messages}
    notes = {"complete_until": found.complete_until.isoformat(timespec="seconds")}
    return Measure("offline", found.topic.raw, level, reason, age, thresholds, values, notes)


def refresh_running(connection: psycopg.Connection[Any], engine: EngineConfiguration) -> bool:
    """Return whether dbt is refreshing the embedded engine at the moment, so that views differ for a while.

    Always False on RisingWave, whose views need no refresh.
    """
    if engine.kind != "local":
        return False
    row = connection.execute(
        "select exists (select 1 from pg_stat_activity where datname = current_database()"
        " and application_name = 'dbt' and pid <> pg_backend_pid()"
        " and backend_start > clock_timestamp() - %s * interval '1 second')",
        [REFRESH_PATIENCE_SECONDS],
    ).fetchone()
    return bool(row and row[0])


def measure_ingestion(
    engine: EngineConfiguration,
    registry: Registry,
    kafka: KafkaSource,
    *,
    now: datetime,
    timeout_seconds: float = 7.0,
    by_id: bool = False,
) -> list[Measure]:
    """Measure the ingestion lag of each topic of events.

    With `by_id` the brokers are asked for the topics' ids, which distinguish a recreated topic from the one that was
    read; brokers without ids do not affect the other readings.

    Without brokers (no `kafka.bootstrap`) every measure is `skipped`, with the reason. Never raises for brokers or an
    engine that do not answer: those measures are `unknown`.
    """
    thresholds = registry.contract.freshness.topics
    # Reference data is only measured if the contract has a freshness target for it.
    topics = [topic.name for topic in registry.topics.values() if topic.entity or topic.name in thresholds]
    if kafka.bootstrap is None:
        reason = "no Kafka is configured: set PREFS_KAFKA_BOOTSTRAP to measure ingestion lag"
        return [Measure("ingestion", topic, "skipped", reason) for topic in topics]
    from dagster_prefs.events.contact import KafkaUnavailable
    from dagster_prefs.events.topics import TopicGeneration, broker_ids, topic_generations
    from dagster_prefs.freshness.ingestion import Broker, BrokersSilent, ingestion_lag

    names = kafka.topics
    try:
        with (
            engine.connect() as connection,
            Broker(
                kafka.bootstrap, timeout_seconds=timeout_seconds, client=kafka.client, group=kafka.group
            ) as broker,
        ):
            measures: list[Measure] = []
            generations: dict[str, TopicGeneration] = {}
            if by_id:
                with suppress(KafkaUnavailable, NotDeployed):
                    ids = broker_ids(
                        kafka.bootstrap,
                        [names.get(topic, topic) for topic in topics],
                        client=kafka.client,
                        timeout_seconds=2,
                    )
                    generations = topic_generations(connection, engine, ids)
            for topic in topics:
                try:
                    lag = ingestion_lag(
                        connection,
                        engine,
                        broker,
                        registry.topic(topic),
                        now=now,
                        kafka=kafka,
                        generation=generations.get(names.get(topic, topic)),
                    )
                except BrokersSilent as error:
                    # Every further topic would wait for the same brokers and exceed a sensor's time limit.
                    return measures + unknown("ingestion", topics[len(measures) :], error)
                except Unmeasurable as error:
                    measures += unknown("ingestion", [topic], error)
                    continue
                measure = _ingestion_measure(lag, thresholds.get(topic))
                if measure.level in ("warn", "error") and lag.is_only_behind:
                    progress = reading_progress(
                        connection, engine, registry.topic(topic), lag.messages, lag.lag_seconds or 0.0
                    )
                    measure = excused(measure, progress)
                measures.append(measure)
            return measures
    except (PrefsError, psycopg.Error) as error:
        return unknown("ingestion", topics, error)


def _ingestion_measure(lag: IngestionLag, thresholds: Freshness | None) -> Measure:
    if thresholds is None:
        return Measure("ingestion", lag.topic, "unknown", _no_threshold(lag.topic))
    age = None if lag.lag_seconds is None else max(0.0, lag.lag_seconds)
    levels: list[Level] = []
    reasons = []
    if lag.messages:
        levels.append("unknown" if age is None else judge(age, thresholds))
        since = "for an unknown time" if age is None else f"for {age:.1f} s"
        reasons.append(f"{lag.messages} messages in Kafka are not ingested, {since}")
    ahead = -min((one.lag_seconds for one in lag.partitions if one.lag_seconds is not None), default=0.0)
    if ahead >= thresholds.error_seconds:
        levels.append("unknown")
        reasons.append(
            f"the first of them is stamped {ahead:.0f} s in the future, so its age is not known: check the "
            "clocks of producers and brokers"
        )
    remedies: tuple[tuple[State, Level, str], ...] = (
        (
            "recreated",
            "error",
            "are not those that the engine has read: the topic was recreated; run `prefs topics renew`, which reads "
            "the new one and keeps what is there",
        ),
        (
            "lost",
            "error",
            "lost messages that the brokers deleted before the engine read them: lengthen the topic's "
            "retention and ingest the missing ones from their files",
        ),
        (
            "unknown",
            "unknown",
            "hold messages of which none was ingested, and PREFS_KAFKA_START=latest does not tell whether "
            "any should have been: check that the ingestion runs",
        ),
    )
    for state, level, what in remedies:
        if partitions := lag.in_state(state):
            levels.append(level)
            reasons.append(f"partitions {', '.join(map(str, partitions))} {what}")
    columns = ("partition", "low", "high", "last_offset", "messages", "lag_seconds", "state")
    table = [{name: getattr(partition, name) for name in columns} for partition in lag.partitions]
    return Measure(
        "ingestion",
        lag.topic,
        worst(levels),
        "; ".join(reasons) or "every message in Kafka is ingested",
        age,
        thresholds,
        {"messages_behind": lag.messages, "partitions": len(lag.partitions)},
        {"kafka_topic": lag.kafka_topic, "by_partition": json.dumps(table)},
    )
