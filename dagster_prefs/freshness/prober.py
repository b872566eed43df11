"""The canary of the embedded engine, sent by its follower without Dagster.

Its interval is derived from the freshness target. Its state is stored in a file of the data folder, as the canary's
sensor stores it in its cursor.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql

from dagster_prefs.declarations.contract import Freshness
from dagster_prefs.declarations.registry import Registry
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.errors import PrefsError
from dagster_prefs.events.canaries import canary_events, key_of
from dagster_prefs.events.raw import translated
from dagster_prefs.files import make_private_folder, write_private
from dagster_prefs.freshness.canary import SOURCE, CanaryError, CanaryState, Probe, Tick, epoch_ms
from dagster_prefs.freshness.levels import Measure

STATE = "canary.json"
# A canary's age counts as the delay of its domain (`reads[domain].fresh`), so the next one has to be readable before
# this one is as old as the error threshold. The interval leaves the rest of that time for the next canary to arrive.
INTERVAL_SHARE = 0.8
LONGEST_INTERVAL_SECONDS = 60.0
# A canary that is not readable within this time is read by the next probe.
PATIENCE_SECONDS = 2.0
# How long canaries are kept in the raw tables. Views of a key are computed from all its events, so that an unlimited
# number of canaries would make each one more expensive than the one before.
KEPT = timedelta(minutes=10)
PRUNE_SECONDS = 60.0


def interval_seconds(thresholds: Freshness) -> float:
    """Return the time from one canary to the next."""
    return min(LONGEST_INTERVAL_SECONDS, max(1.0, INTERVAL_SHARE * thresholds.error_seconds))


def prober_ticks(data_dir: Path) -> list[Tick]:
    """Return the last tick of this data folder's prober; none if it was stopped in order, or never ran."""
    try:
        content = json.loads((data_dir / STATE).read_text())
        return [Tick(float(content["at"]), str(content["cursor"]), content["problem"], from_follower=True)]
    except (OSError, ValueError, LookupError, TypeError):
        return []


@dataclass(frozen=True)
class Prober:
    """Sends canaries into the raw tables of the embedded engine, and times them.

    `connect` returns the probe, with clients that it opens in the stack and a session of the engine; its send function
    is replaced. Even with Kafka, the canaries enter through the raw tables, so that a trial sends nothing to topics
    that others read.
    """

    engine: EngineConfiguration
    registry: Registry
    connect: Callable[[ExitStack, psycopg.Connection[Any]], Probe]
    data_dir: Path

    def run(self, stop: threading.Event) -> None:
        """Probe until `stop` is set. Failures are reported by the measures, and retried."""
        state = CanaryState()
        for tick in prober_ticks(self.data_dir):
            state = CanaryState.loads(tick.cursor)
        interval = interval_seconds(self.registry.contract.freshness.canary)
        try:
            while not stop.is_set():
                try:
                    state = self._session(state, interval, stop)
                except PrefsError as error:
                    self._note(state, str(error))
                    stop.wait(interval)
        finally:
            # The file is deleted, because readers take it as the sign of a prober that should be running.
            (self.data_dir / STATE).unlink(missing_ok=True)

    def _session(self, state: CanaryState, interval: float, stop: threading.Event) -> CanaryState:
        """Probe over one set of connections until a failure; return the state for the next session."""
        with ExitStack() as clients:
            connection = clients.enter_context(self.engine.connect(autocommit=True))
            probe = replace(
                self.connect(clients, connection), send=lambda moment: self._send(connection, moment)
            )
            next_prune = 0.0
            while not stop.is_set():
                began = time.monotonic()
                if began >= next_prune:
                    self._prune(connection, datetime.now(UTC) - KEPT)
                    next_prune = began + PRUNE_SECONDS
                state, measures = probe.run(state, patience_seconds=min(interval, PATIENCE_SECONDS))
                problem = _problem(measures)
                self._note(state, problem)
                stop.wait(max(0.0, interval - (time.monotonic() - began)))
                if problem is not None:
                    break
        return state

    def _send(self, connection: psycopg.Connection[Any], moment: datetime) -> None:
        # The key is read each time, so that a deleted key is not used again.
        messages = canary_events(self.registry, key_of(connection, self.engine), moment)
        # In one transaction, which costs the follower one step.
        with translated(self.engine, "the raw tables"), connection.transaction():
            for name, data in messages.items():
                raw = self.registry.topic(name).raw
                with translated(self.engine, raw):
                    connection.execute(
                        sql.SQL(
                            "insert into {} (source, source_partition, source_offset, data) values (%s, 0, %s, %s)"
                        ).format(sql.Identifier(self.engine.schema, raw)),
                        [SOURCE, epoch_ms(moment), data],
                    )

    def _prune(self, connection: psycopg.Connection[Any], before: datetime) -> None:
        """Delete the canaries sent before this moment (UTC); the follower removes them from the views."""
        for topic in self.registry.topics.values():
            with translated(self.engine, topic.raw):
                connection.execute(
                    sql.SQL(
                        "delete from {} where source = %s and source_partition = 0 and source_offset < %s"
                    ).format(sql.Identifier(self.engine.schema, topic.raw)),
                    [SOURCE, epoch_ms(before)],
                )

    def _note(self, state: CanaryState, problem: str | None) -> None:
        content = {"at": time.time(), "cursor": state.dumps(), "problem": problem}
        try:
            make_private_folder(self.data_dir)
            write_private(self.data_dir / STATE, json.dumps(content))
        except OSError as error:
            raise CanaryError(
                f"{self.data_dir / STATE} cannot be written ({error.strerror}): free disk space, or let this user "
                "write there"
            ) from error


def _problem(measures: list[Measure]) -> str | None:
    return next((measure.reason for measure in measures if measure.level == "unknown"), None)
