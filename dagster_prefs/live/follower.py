"""The follower: takes steps as events arrive and publishes the touched keys, until it is told to stop."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import psycopg
from psycopg import sql

from dagster_prefs.declarations.contract import Domain
from dagster_prefs.declarations.registry import Registry
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.errors import PrefsError
from dagster_prefs.live.backlog import NOTED_SECONDS, note_backlog
from dagster_prefs.live.presence import (
    CHANNEL,
    RETRY_SECONDS,
    FollowedElsewhere,
    follow_lock,
    make_rebuilt_due,
    read_follower,
)
from dagster_prefs.live.steps import StepReport, Steps
from dagster_prefs.live.trail import note_published
from dagster_prefs.pauses import Pauses

log = logging.getLogger(__name__)

# How often the follower checks for work without being woken, in seconds.
POLL_SECONDS = 1.0
# How often an idle follower writes its sign of life, in seconds. Well below GONE_SECONDS, from which on it is missed.
SIGN_SECONDS = 3.0
# While steps have a backlog, publishing starts at most this often, in seconds. Later steps touch the same keys again,
# and writing an item in between takes longer than the step.
HELD_SECONDS = 5.0
# The number of keys of a domain that are published at once.
KEYS_PER_PUBLISH = 5000

# The number of places of a step that a line of the log names; a step usually takes messages from a few partitions.
PLACES_PER_LINE = 20

# A reader of events counts as working again after this long without an error, in seconds. Longer than the time-outs by
# which it finds the brokers gone: for the ids of the topics, and for the messages.
WORKS_SECONDS = 20.0

# Publishes the items of these keys of a domain (texts as in the engine's outbox), over this connection to the engine;
# None compares all of them.
Publish = Callable[[Domain, Sequence[str] | None, psycopg.Connection[Any]], None]
# Reads events into the raw tables until the event is set.
Read = Callable[[threading.Event], None]


@dataclass(frozen=True)
class Work:
    """What a follower does by a project's declarations: it publishes their domains, and runs `readers`.

    Each reader, keyed by what it reads, has a thread of its own.
    """

    registry: Registry
    publish: Publish
    readers: Mapping[str, Read] = field(default_factory=dict)


class Follower:
    """Takes steps and publishes, for one engine; while it does, it holds the lock of the engine's only follower.

    `declared` returns the work by the declarations as they are now. It is asked again whenever the deployment changed,
    or `applied` (the fingerprint of what was applied last) did, so that a follower needs no restart after an apply.
    `process` is its name in messages. `say` receives one line per event that a person waits for: a rebuild, new
    declarations, a problem and its end. The log also has each step, with its id as `step` and the places of the
    messages that it took, and each publish with the range of its steps.
    """

    def __init__(
        self,
        engine: EngineConfiguration,
        declared: Callable[[], Work],
        *,
        process: str,
        applied: Callable[[], str] = lambda: "",
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.engine = engine
        self.process = process
        self.say = say
        self.work = declared()
        self._declared = declared
        self._applied = applied
        self._stamp = applied()
        self._next: Work | None = None
        # The domains' sinks whose items are still to be compared as a whole.
        self._unmarked: set[str] = set()
        self._reading: list[threading.Thread] = []
        self._end_reading = threading.Event()
        self._problems: dict[str, str] = {}
        self._last_step = 0
        self._signed_at = -math.inf
        self._taken, self._noted_at = 0, -math.inf
        # Only the thread that publishes counts what it has published.
        self._published = self._noted_published = 0
        self._changed = threading.Event()
        self._behind = False

    def run(self, stop: threading.Event) -> None:
        """Follow until `stop` is set. Failures are retried; meanwhile their reason is in `live_follower`.

        Raises FollowedElsewhere at the start if another process follows the engine.
        """
        pauses = Pauses(*RETRY_SECONDS)
        publishing = threading.Thread(target=self._publish_until, args=[stop], name="publish", daemon=True)
        started = False
        try:
            while not stop.is_set():
                try:
                    with self._steps() as steps, self.engine.connect() as listening:
                        listening.execute(sql.SQL("listen {}").format(sql.Identifier(CHANNEL)))
                        self._mark_all_domains(steps.connection)
                        if not started:
                            started = True
                            publishing.start()
                            self._start_readers()
                        while not stop.is_set():
                            self._follow(steps, listening)
                            pauses.reset()
                except FollowedElsewhere:
                    if not started:
                        raise
                    stop.wait(pauses.next())
                except (PrefsError, psycopg.Error, OSError) as error:
                    self._problem("steps", error)
                    stop.wait(pauses.next())
        finally:
            stop.set()
            self._changed.set()
            self._end_readers()
            if started:
                publishing.join()
        self._leave()

    def catch_up(self) -> int:
        """Apply and publish all that has arrived, and return the number of messages read.

        Acts as the engine's follower meanwhile. Raises FollowedElsewhere, NotDeployed, psycopg.Error, and what
        `publish` raises.
        """
        messages = 0
        with self._steps() as steps:
            try:
                steps.make_all_due()
                while True:
                    make_rebuilt_due(steps.connection, self.engine)
                    report = steps.step()
                    self._tell(steps.connection, report)
                    messages += report.messages
                    if report.idle:
                        break
                self._mark_all_domains(steps.connection)
                while self.publish_changes(steps.connection):
                    pass
            finally:
                self._leave()
        return messages

    @contextmanager
    def _steps(self) -> Iterator[Steps]:
        steps = Steps(self.engine, self.work.registry, self._declare)
        try:
            ((taken,),) = steps.connection.execute(
                "select pg_try_advisory_lock(hashtextextended(%s, 0))", [follow_lock(self.engine)]
            ).fetchall()
            if not taken:
                state = read_follower(steps.connection, self.engine)
                raise FollowedElsewhere(
                    f"{state.process if state else 'another process'} follows this engine already: stop it first, or "
                    "leave the work to it"
                )
            _ = steps.views
            # The first step may take minutes; until it ends, nobody would know of this follower.
            self._sign_of_life(steps.connection)
            yield steps
        finally:
            steps.close()

    def _declare(self) -> Registry:
        """Return the declarations as they are now. The work by them begins with `_renew`."""
        self._stamp = self._applied()
        work = self._declared()
        if work.registry != self.work.registry:
            self._next = work
        return work.registry

    def _renew(self) -> None:
        """Go on by the declarations that the last step found, and have the domains that they change compared."""
        work, self._next = self._next, None
        if work is None:
            return
        before = self.work.registry.contract.domains
        self._end_readers()
        self.work = work
        self._unmarked |= {
            domain.sink
            for name, domain in work.registry.contract.domains.items()
            if before.get(name) != domain
        }
        self._start_readers()
        text = "the declarations changed: following the new ones"
        self.say(text)
        log.info(text, extra={"step": self._last_step})

    def _follow(self, steps: Steps, listening: psycopg.Connection[Any]) -> None:
        if self._stamp != self._applied():
            steps.forget_deployed()
        report = steps.step()
        self._renew()
        self._mark_domains(steps.connection)
        self._solved("steps")
        self._tell(steps.connection, report)
        if not report.more and not report.messages:
            # Every environment of the database notifies on this channel. Functions of before 0.2 name no schema.
            for told in listening.notifies(timeout=POLL_SECONDS):
                if told.payload in ("", self.engine.schema):
                    break

    def _tell(self, connection: psycopg.Connection[Any], report: StepReport) -> None:
        if report.step is not None:
            self._last_step = report.step
        for view in report.rebuilt:
            rows = report.changed.get(view, 0)
            text = f"rebuilt {view}: {rows:,} rows differed ({report.seconds:.1f} s)"
            self.say(text)
            log.info(text, extra={"step": report.step, "view": view, "rows": rows})
        if report.step is not None and not report.rebuilt:
            log.info(
                "step %d: %d messages, %d rows changed",
                report.step,
                report.messages,
                sum(report.changed.values()),
                extra={
                    "step": report.step,
                    "taken": [taken._asdict() for taken in report.taken[:PLACES_PER_LINE]],
                    "changed": report.changed,
                    "seconds": round(report.seconds, 3),
                },
            )
        if not report.idle or time.monotonic() >= self._signed_at + SIGN_SECONDS:
            self._sign_of_life(connection)
        self._taken += report.messages
        published = self._published - self._noted_published
        # Nothing is noted while nothing is done: an idle follower costs next to nothing.
        is_due = time.monotonic() >= self._noted_at + NOTED_SECONDS
        if is_due and (published or self._taken or not report.idle):
            note_backlog(connection, self.engine, self.work.registry, self._taken + published)
            self._taken, self._noted_at = 0, time.monotonic()
            self._noted_published += published
        self._behind = report.more
        if not report.idle:
            self._changed.set()

    def _sign_of_life(self, connection: psycopg.Connection[Any]) -> None:
        connection.execute(
            sql.SQL(
                "insert into {} as f (id, process, seen_at, step, problem) values (1, %s, clock_timestamp(), %s, %s)"
                " on conflict (id) do update set process = excluded.process, seen_at = excluded.seen_at,"
                " step = greatest(f.step, excluded.step), problem = excluded.problem"
            ).format(self._table("live_follower")),
            [self.process, self._last_step, "; ".join(self._problems.values()) or None],
        )
        self._signed_at = time.monotonic()

    def _leave(self) -> None:
        """Delete the sign of life, so that a remaining one means that its follower crashed."""
        with suppress(PrefsError, psycopg.Error), self.engine.connect() as connection:
            connection.execute(
                sql.SQL("delete from {} where process = %s").format(self._table("live_follower")),
                [self.process],
            )

    # --- publishing ---

    def _publish_until(self, stop: threading.Event) -> None:
        pauses = Pauses(*RETRY_SECONDS)
        published_at = time.monotonic()
        while not stop.is_set():
            try:
                with self.engine.connect() as connection:
                    while not stop.is_set():
                        self._changed.wait(POLL_SECONDS)
                        self._changed.clear()
                        if self._behind and time.monotonic() < published_at + HELD_SECONDS:
                            continue
                        while self.publish_changes(connection):
                            published_at = time.monotonic()
                        self._solved("publishing")
                        pauses.reset()
            # Catches every error: if the thread ended, items would become stale without an error.
            except Exception as error:
                self._problem("publishing", error)
                stop.wait(pauses.next())

    def publish_changes(self, connection: psycopg.Connection[Any]) -> bool:
        """Publish the keys in the outbox, and compare the pending domains. Return whether there was any work.

        A domain that cannot be published does not delay the others: it stays in the outbox, and its error is raised at
        the end.
        """
        found, errors = False, []
        work = self.work
        domains = {domain.sink: domain for domain in work.registry.contract.domains.values()}
        waiting = connection.execute(
            sql.SQL(
                "select * from (select sink, (select since from {} where relation = sink),"
                "   exists (select from {} where domain_key = key)"
                "   from unnest(%s::text[], %s::text[]) as d (sink, key)) as w (sink, since, touched)"
                " where since is not null or touched"
            ).format(self._table("live_pending"), self._table("live_outbox")),
            [list(domains), [domain.key for domain in domains.values()]],
        ).fetchall()
        for sink, since, _ in waiting:
            domain = domains[sink]
            try:
                if since is not None:
                    found = True
                    work.publish(domain, None, connection)
                    log.info("compared every item of %s", domain.name, extra={"domain": domain.name})
                    connection.execute(
                        sql.SQL("delete from {} where relation = %s and since = %s").format(
                            self._table("live_pending")
                        ),
                        [sink, since],
                    )
                found = self._publish_touched(connection, domain, work.publish) or found
            except PrefsError as error:
                errors.append(error)
        if errors:
            raise errors[0]
        return found

    def _publish_touched(self, connection: psycopg.Connection[Any], domain: Domain, publish: Publish) -> bool:
        rows = connection.execute(
            sql.SQL(
                "select entity_key, step, first_step from {} where domain_key = %s order by first_step limit %s"
            ).format(self._table("live_outbox")),
            [domain.key, KEYS_PER_PUBLISH],
        ).fetchall()
        if not rows:
            return False
        publish(domain, [key for key, _, _ in rows], connection)
        self._published += len(rows)
        steps = [step for _, step, _ in rows]
        log.info(
            "published what %d keys of %s have now",
            len(rows),
            domain.name,
            extra={
                "step": max(steps),
                "first_step": rows[0][2],
                "domain": domain.name,
                "published_keys": len(rows),
            },
        )
        outbox = {"outbox": self._table("live_outbox")}
        with connection.transaction():
            # In the order in which a step stores them, or the two would wait for each other.
            connection.execute(
                sql.SQL(
                    "select from {outbox} where domain_key = %s and entity_key = any(%s)"
                    ' order by entity_key collate "C" for update'
                ).format(**outbox),
                [domain.key, [key for key, _, _ in rows]],
            )
            # A key that a later step touched meanwhile stays in the outbox with that step.
            connection.execute(
                sql.SQL(
                    "with published as (select * from unnest(%(keys)s::text[], %(steps)s::bigint[]) as p (key, step)),"
                    " gone as (delete from {outbox} as o using published as p"
                    "   where o.domain_key = %(domain)s and o.entity_key = p.key and o.step = p.step)"
                    " update {outbox} as o set first_step = o.step from published as p"
                    " where o.domain_key = %(domain)s and o.entity_key = p.key and o.step > p.step"
                ).format(**outbox),
                {"keys": [key for key, _, _ in rows], "steps": steps, "domain": domain.key},
            )
        note_published(connection, self.engine, domain.key, max(steps))
        return True

    def _mark_all_domains(self, connection: psycopg.Connection[Any]) -> None:
        self._unmarked = {domain.sink for domain in self.work.registry.contract.domains.values()}
        self._mark_domains(connection)

    def _mark_domains(self, connection: psycopg.Connection[Any]) -> None:
        """Have domains compared whose items may be from other declarations or another store, once they are deployed."""
        if not self._unmarked:
            return
        marked = connection.execute(
            sql.SQL(
                "insert into {} (relation) select r from unnest(%s::text[]) as r"
                " where to_regclass(format('%%I.%%I', %s::text, r)) is not null"
                # A comparison in progress may have begun with the former declarations.
                " on conflict (relation) do update set since = clock_timestamp() returning relation"
            ).format(self._table("live_pending")),
            [sorted(self._unmarked), self.engine.schema],
        ).fetchall()
        self._unmarked -= {sink for (sink,) in marked}

    # --- reading ---

    def _start_readers(self) -> None:
        self._end_reading = threading.Event()
        self._reading = [
            threading.Thread(
                target=self._read_until, args=[name, read, self._end_reading], name=name, daemon=True
            )
            for name, read in self.work.readers.items()
        ]
        for thread in self._reading:
            thread.start()

    def _end_readers(self) -> None:
        self._end_reading.set()
        for thread in self._reading:
            thread.join()
        for name in self.work.readers:
            self._problems.pop(name, None)

    def _read_until(self, name: str, read: Read, stop: threading.Event) -> None:
        pauses = Pauses(*RETRY_SECONDS)

        def works() -> None:
            self._solved(name)
            pauses.reset()

        while not stop.is_set():
            timer = threading.Timer(WORKS_SECONDS, works)
            timer.start()
            try:
                read(stop)
            except Exception as error:
                self._problem(name, error)
            finally:
                timer.cancel()
            stop.wait(pauses.next())

    # --- problems ---

    def _problem(self, what: str, error: BaseException) -> None:
        text = " ".join(str(error).split()) or type(error).__name__
        if self._problems.get(what) != text:
            self._problems[what] = text
            self.say(f"{what}: {text}")
            log.error("%s: %s", what, text, extra={"step": self._last_step})
        with suppress(PrefsError, psycopg.Error), self.engine.connect() as connection:
            self._sign_of_life(connection)

    def _solved(self, what: str) -> None:
        if self._problems.pop(what, None):
            # Nobody shall read of a problem that is solved.
            self._signed_at = -math.inf
            self.say(f"{what}: works again")
            log.info("%s: works again", what, extra={"step": self._last_step})

    def _table(self, name: str) -> sql.Identifier:
        return sql.Identifier(self.engine.schema, name)
