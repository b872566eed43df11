"""The follower: takes steps as events arrive, and has the touched keys published, until it is told to stop."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from types import MappingProxyType
from typing import Any

import psycopg
from psycopg import sql

from dagster_prefs.declarations.contract import Domain
from dagster_prefs.declarations.registry import Registry
from dagster_prefs.engine.catalog import missing_relation
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.errors import PrefsError
from dagster_prefs.live.steps import StepReport, Steps
from dagster_prefs.live.trail import note_published

# The channel on which writers wake the follower (macros/engine/kept.sql).
CHANNEL = "prefs_live"
# How often it looks although nobody woke it, seconds.
POLL_SECONDS = 1.0
# How long it waits after a problem before it tries again, seconds, doubled up to the second figure.
RETRY_SECONDS = (0.5, 10.0)
# From this age on its last sign of life says that it is gone, seconds.
GONE_SECONDS = 10.0
# How many keys of a domain are published at once.
KEYS_PER_PUBLISH = 5000

# So long does a reader of events work without an error until it counts as working again, seconds: longer than it takes
# to find the brokers gone, for the ids of the topics and for the messages.
WORKS_SECONDS = 20.0

# Publishes the items of these keys (texts as in the engine's outbox) of a domain, or with None compares all.
Publish = Callable[[Domain, Sequence[str] | None], None]
# Brings events into the raw tables until the event is set.
Read = Callable[[threading.Event], None]


class FollowedElsewhere(PrefsError):
    """Another process follows this engine; the message names it."""


class FollowerProblem(PrefsError):
    """The follower cannot go on; the message says why, and what to do."""


@dataclass(frozen=True)
class FollowerState:
    """The last sign of life: which `process` follows, `seen_at` (UTC), its `problem` if it has one."""

    process: str
    seen_at: datetime
    step: int
    problem: str | None

    def alive(self, now: datetime) -> bool:
        """Whether it gave a sign of life in the last seconds before `now` (UTC)."""
        return abs((now - self.seen_at).total_seconds()) < GONE_SECONDS


def read_follower(connection: psycopg.Connection[Any], engine: EngineConfiguration) -> FollowerState | None:
    """Return the state of the last follower; None where there was none. Raises psycopg.Error."""
    try:
        row = connection.execute(
            sql.SQL("select process, seen_at, step, problem from {}").format(
                sql.Identifier(engine.schema, "live_follower")
            )
        ).fetchone()
    except psycopg.Error as error:
        if missing_relation(error):
            return None
        raise
    return None if row is None else FollowerState(*row)


def follow_lock(engine: EngineConfiguration) -> str:
    """The name whose advisory lock the follower of an engine holds."""
    return f"dagster-prefs follow {engine.schema}"


class Follower:
    """Steps and publishing over one engine; whoever takes steps holds the lock of its only follower.

    `process` names it to people. Of `readers`, by what they read, each has a thread of its own. `say` gets a line for
    each thing worth a log's line: a rebuild, a problem and its end.
    """

    def __init__(
        self,
        engine: EngineConfiguration,
        registry: Registry,
        publish: Publish,
        *,
        process: str,
        readers: Mapping[str, Read] = MappingProxyType({}),
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.engine = engine
        self.registry = registry
        self.publish = publish
        self.process = process
        self.readers = readers
        self.say = say
        self._problems: dict[str, str] = {}
        self._changed = threading.Event()

    def run(self, stop: threading.Event) -> None:
        """Follow until `stop` is set. What fails is tried again, with the reason in `live_follower` meanwhile.

        Raises FollowedElsewhere at the beginning.
        """
        pause = _Pause()
        threads = [
            threading.Thread(target=self._publish_until, args=[stop], name="publish", daemon=True),
            *(
                threading.Thread(target=self._read_until, args=[name, read, stop], name=name, daemon=True)
                for name, read in self.readers.items()
            ),
        ]
        started = False
        try:
            while not stop.is_set():
                try:
                    with self._steps() as steps, self.engine.connect() as listening:
                        listening.execute(sql.SQL("listen {}").format(sql.Identifier(CHANNEL)))
                        self._mark_domains(steps.connection)
                        if not started:
                            started = True
                            for thread in threads:
                                thread.start()
                        while not stop.is_set():
                            self._follow(steps, listening)
                            pause.reset()
                except FollowedElsewhere:
                    if not started:
                        raise
                    stop.wait(pause.next())
                except (PrefsError, psycopg.Error, OSError) as error:
                    self._problem("steps", error)
                    stop.wait(pause.next())
        finally:
            stop.set()
            self._changed.set()
            for thread in threads if started else ():
                thread.join()
        self._leave()

    def catch_up(self) -> int:
        """Apply and publish all that has arrived, as the engine's follower for so long; returns the messages read.

        Raises FollowedElsewhere, NotDeployed, psycopg.Error, and what `publish` raises.
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
                self._mark_domains(steps.connection)
                while self.publish_changes(steps.connection):
                    pass
            finally:
                self._leave()
        return messages

    @contextmanager
    def _steps(self) -> Iterator[Steps]:
        steps = Steps(self.engine, self.registry)
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
            yield steps
        finally:
            steps.close()

    def _follow(self, steps: Steps, listening: psycopg.Connection[Any]) -> None:
        report = steps.step()
        self._solved("steps")
        self._tell(steps.connection, report)
        if not report.more and not report.messages:
            for _ in listening.notifies(timeout=POLL_SECONDS, stop_after=1):
                pass

    def _tell(self, connection: psycopg.Connection[Any], report: StepReport) -> None:
        if report.rebuilt:
            rows = report.changed.get(report.rebuilt, 0)
            self.say(f"rebuilt {report.rebuilt}: {rows:,} rows differed ({report.seconds:.1f} s)")
        self._sign_of_life(connection)
        if not report.idle:
            self._changed.set()

    def _sign_of_life(self, connection: psycopg.Connection[Any]) -> None:
        connection.execute(
            sql.SQL(
                "insert into {} as f (id, process, seen_at, step, problem) values (1, %s, clock_timestamp(), 1, %s)"
                " on conflict (id) do update set process = excluded.process, seen_at = excluded.seen_at,"
                " step = f.step + 1, problem = excluded.problem"
            ).format(self._table("live_follower")),
            [self.process, "; ".join(self._problems.values()) or None],
        )

    def _leave(self) -> None:
        """Take the sign of life back, so that one which is left is that of a follower that died."""
        with suppress(PrefsError, psycopg.Error), self.engine.connect() as connection:
            connection.execute(
                sql.SQL("delete from {} where process = %s").format(self._table("live_follower")),
                [self.process],
            )

    # --- publishing ---

    def _publish_until(self, stop: threading.Event) -> None:
        pause = _Pause()
        while not stop.is_set():
            try:
                with self.engine.connect() as connection:
                    while not stop.is_set():
                        self._changed.wait(POLL_SECONDS)
                        self._changed.clear()
                        while self.publish_changes(connection):
                            pass
                        self._solved("publishing")
                        pause.reset()
            # Whatever it is: a thread that ended would leave the items as they are without a word.
            except Exception as error:
                self._problem("publishing", error)
                stop.wait(pause.next())

    def publish_changes(self, connection: psycopg.Connection[Any]) -> bool:
        """Publish what the outbox holds, and compare the domains that are pending; returns whether there was any.

        A domain that cannot be published holds up no other: it stays in the outbox, and its error is raised at the end.
        """
        found, errors = False, []
        domains = {domain.sink: domain for domain in self.registry.contract.domains.values()}
        pending = dict(
            connection.execute(
                sql.SQL("select relation, since from {} where relation = any(%s)").format(
                    self._table("live_pending")
                ),
                [list(domains)],
            ).fetchall()
        )
        for sink, domain in domains.items():
            try:
                if sink in pending:
                    found = True
                    self.publish(domain, None)
                    connection.execute(
                        sql.SQL("delete from {} where relation = %s and since = %s").format(
                            self._table("live_pending")
                        ),
                        [sink, pending[sink]],
                    )
                found = self._publish_touched(connection, domain) or found
            except PrefsError as error:
                errors.append(error)
        if errors:
            raise errors[0]
        return found

    def _publish_touched(self, connection: psycopg.Connection[Any], domain: Domain) -> bool:
        rows = connection.execute(
            sql.SQL(
                "select entity_key, step from {} where domain_key = %s order by first_step limit %s"
            ).format(self._table("live_outbox")),
            [domain.key, KEYS_PER_PUBLISH],
        ).fetchall()
        if not rows:
            return False
        self.publish(domain, [key for key, _ in rows])
        # A key that a step touched again meanwhile stays, as of that step.
        connection.execute(
            sql.SQL(
                "with published as (select * from unnest(%(keys)s::text[], %(steps)s::bigint[]) as p (key, step)),"
                " gone as (delete from {0} as o using published as p"
                "   where o.domain_key = %(domain)s and o.entity_key = p.key and o.step = p.step)"
                " update {0} as o set first_step = o.step from published as p"
                " where o.domain_key = %(domain)s and o.entity_key = p.key and o.step > p.step"
            ).format(self._table("live_outbox")),
            {
                "keys": [key for key, _ in rows],
                "steps": [step for _, step in rows],
                "domain": domain.key,
            },
        )
        note_published(connection, self.engine, domain.key, max(step for _, step in rows))
        return True

    def _mark_domains(self, connection: psycopg.Connection[Any]) -> None:
        """Have every domain compared once: the store may be another one than when the last follower ended."""
        connection.execute(
            sql.SQL(
                "insert into {0} (relation) select r from unnest(%s::text[]) as r"
                " where to_regclass(format('%%I.%%I', %s::text, r)) is not null on conflict do nothing"
            ).format(self._table("live_pending")),
            [
                [domain.sink for domain in self.registry.contract.domains.values()],
                self.engine.schema,
            ],
        )

    # --- reading ---

    def _read_until(self, name: str, read: Read, stop: threading.Event) -> None:
        pause = _Pause()

        def works() -> None:
            self._solved(name)
            pause.reset()

        while not stop.is_set():
            timer = threading.Timer(WORKS_SECONDS, works)
            timer.start()
            try:
                read(stop)
            except Exception as error:
                self._problem(name, error)
            finally:
                timer.cancel()
            stop.wait(pause.next())

    # --- problems ---

    def _problem(self, what: str, error: BaseException) -> None:
        text = " ".join(str(error).split()) or type(error).__name__
        if self._problems.get(what) != text:
            self._problems[what] = text
            self.say(f"{what}: {text}")
        with suppress(PrefsError, psycopg.Error), self.engine.connect() as connection:
            self._sign_of_life(connection)

    def _solved(self, what: str) -> None:
        if self._problems.pop(what, None):
            self.say(f"{what}: works again")

    def _table(self, name: str) -> sql.Identifier:
        return sql.Identifier(self.engine.schema, name)


class _Pause:
    """The pauses between attempts: each twice the one before, up to a limit."""

    def __init__(self) -> None:
        self._next = RETRY_SECONDS[0]

    def next(self) -> float:
        """The next pause, seconds."""
        pause = self._next
        self._next = min(2 * pause, RETRY_SECONDS[1])
        return pause

    def reset(self) -> None:
        """Begin again: something worked."""
        self._next = RETRY_SECONDS[0]


def make_rebuilt_due(connection: psycopg.Connection[Any], engine: EngineConfiguration) -> None:
    """Have pending views rebuilt now, whatever their interval. Raises psycopg.Error."""
    connection.execute(
        sql.SQL("update {} set since = '-infinity' where relation in (select relation from {})").format(
            sql.Identifier(engine.schema, "live_pending"), sql.Identifier(engine.schema, "live_views")
        )
    )


def wait_until_applied(
    engine: EngineConfiguration, *, seconds: float, say: Callable[[str], None] = lambda line: None
) -> None:
    """Wait until the follower, another process, has applied and published all that has arrived by now.

    Raises FollowerProblem if it has a problem, ends, or is not done within `seconds`; psycopg.Error.
    """
    with engine.connect() as connection:
        table = {
            name: sql.Identifier(engine.schema, name)
            for name in ("raw_arrivals", "live_changes", "live_pending", "live_due", "live_outbox")
        }
        connection.execute(
            sql.SQL(
                "create temporary table prefs_arrived as"
                " select relation, source, source_partition, last_offset from {raw_arrivals}"
            ).format(**table)
        )
        ((changes,),) = connection.execute(
            sql.SQL("select coalesce(max(id), 0) from {live_changes}").format(**table)
        ).fetchall()
        connection.execute(sql.SQL("notify {}").format(sql.Identifier(CHANNEL)))
        _wait(
            engine,
            connection,
            sql.SQL(
                "select exists (select from {raw_arrivals} join pg_temp.prefs_arrived"
                "   using (relation, source, source_partition, last_offset))"
                " or exists (select from {live_changes} where id <= {changes})"
            ).format(changes=sql.Literal(changes), **table),
            seconds,
        )
        make_rebuilt_due(connection, engine)
        connection.execute(sql.SQL("notify {}").format(sql.Identifier(CHANNEL)))
        _wait(
            engine,
            connection,
            sql.SQL("select exists (select from {live_pending} where since = '-infinity')").format(**table),
            seconds,
        )
        ((step,),) = connection.execute(
            sql.SQL("select coalesce(max(step), 0) from {live_outbox}").format(**table)
        ).fetchall()
        _wait(
            engine,
            connection,
            sql.SQL("select exists (select from {live_outbox} where first_step <= {step})").format(
                step=sql.Literal(step), **table
            ),
            seconds,
        )


def _wait(
    engine: EngineConfiguration, connection: psycopg.Connection[Any], waits: sql.Composed, seconds: float
) -> None:
    end = time.monotonic() + seconds
    while True:
        ((still,),) = connection.execute(waits).fetchall()
        if not still:
            return
        state = read_follower(connection, engine)
        if state and state.problem:
            raise FollowerProblem(f"the follower ({state.process}) has a problem: {state.problem}")
        if state is None or not _is_held(engine, connection):
            raise FollowerProblem("the follower ended: run the command again, or `prefs up`")
        if time.monotonic() > end:
            raise FollowerProblem(
                f"the follower ({state.process}) has not applied everything within {seconds:g} s: see `prefs status`, "
                "or run the command again to go on waiting"
            )
        time.sleep(0.02)


def _is_held(engine: EngineConfiguration, connection: psycopg.Connection[Any]) -> bool:
    """Whether a process holds the follower's lock, as during a long step."""
    ((free,),) = connection.execute(
        "select pg_try_advisory_lock(hashtextextended(%s, 0))", [follow_lock(engine)]
    ).fetchall()
    if free:
        connection.execute("select pg_advisory_unlock(hashtextextended(%s, 0))", [follow_lock(engine)])
    return not free
