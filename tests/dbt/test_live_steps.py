"""Steps leave every view as everything computed at once would: whatever happens, in whatever order."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace

import psycopg
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from oracle import DAY, HOUR, SECOND, Erasure, Message, Oracle
from psycopg import sql
from relations import RAW_TABLES, differences, insert_canary_keys, instant, replace_events
from shipped import LONG, SHORT
from streams import NOW, messages, quick

from dagster_prefs.declarations.registry import Registry
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.events.raw import Place, RawMessage, RawStore
from dagster_prefs.live import steps as live_steps
from dagster_prefs.live.presence import make_rebuilt_due
from dagster_prefs.live.steps import StepReport, Steps, mark_pending
from dagster_prefs.live.trail import Trail, forget_old_steps, note_published, read_trail

EMPTIED = b'{"erased": true}'
SUBJECTS = [("viewer", "1"), ("viewer", "-1"), ("viewer", "u1"), ("shop_user", "u1"), ("shop_user", "1")]
WAITS = [1, HOUR, 11 * HOUR + 30 * 60 * SECOND, SHORT * DAY, 14 * DAY, LONG * DAY, 105 * DAY, -2 * DAY]


@pytest.fixture
def steps(deployed: EngineConfiguration, registry: Registry) -> Iterator[Steps]:
    made = Steps(deployed, registry)
    # Nothing here must survive a crash of the machine.
    made.connection.execute("set synchronous_commit to off")
    yield made
    made.close()


def at(steps: Steps, clock: int) -> None:
    steps.connection.execute("select set_config('prefs.clock', %s, false)", [instant(clock).isoformat()])


def catch_up(steps: Steps) -> None:
    """Take steps until nothing is left, as if the interval of what is rebuilt at one had passed."""
    steps.make_all_due()
    while True:
        make_rebuilt_due(steps.connection, steps.engine)
        if steps.step().idle:
            return


class Interrupted(Exception):
    """The process ends in the middle of a step."""


@st.composite
def happenings(draw: st.DrawFn) -> list[tuple[str, object]]:
    """What happens one after another: writes, erasures, redactions, time, steps, steps that fail, runs of dbt."""
    # Writes whose offsets lie between each other's, as those of writers beside each other.
    stream = draw(st.permutations(draw(messages(max_size=40))))
    found: list[tuple[str, object]] = []
    while stream:
        size = draw(st.integers(1, 12))
        found.append(("write", stream[:size]))
        stream = stream[size:]
    others = st.one_of(
        st.tuples(st.just("step"), st.none()),
        st.tuples(st.just("interrupted"), st.integers(0, 20)),
        st.tuples(st.just("wait"), st.sampled_from(WAITS)),
        st.tuples(st.just("erase"), st.tuples(st.sampled_from(SUBJECTS), st.integers(NOW - 30 * DAY, NOW))),
        st.tuples(st.just("empty"), st.integers(0, 39)),
        st.tuples(st.just("delete"), st.integers(0, 39)),
        st.tuples(st.just("rebuild"), st.integers(0, 30)),
        st.tuples(st.just("pending"), st.lists(st.integers(0, 30), min_size=2)),
        st.tuples(st.just("keys"), st.booleans()),
    )
    builds = st.one_of(
        st.tuples(st.just("begin"), st.lists(st.integers(0, 30), min_size=1, max_size=4)),
        *[st.tuples(st.just("go_on"), st.integers(0, 30))] * 3,
        st.tuples(st.just("builders_end"), st.none()),
    )
    for happening in [*draw(st.lists(others, max_size=15)), *draw(st.lists(builds, max_size=10))]:
        found.insert(draw(st.integers(0, len(found))), happening)
    return found


class World:
    """What was done to the engine, for the oracle."""

    def __init__(self, steps: Steps) -> None:
        self.steps = steps
        self.clock = NOW
        self.stream: list[Message] = []
        self.erased: dict[tuple[str, str], int] = {}
        # Builds whose rows are computed and committed, but not shown to the steps yet.
        self.computed: set[str] = set()
        self.builders_end(None)
        replace_events(steps.connection, [])
        at(steps, NOW)

    def write(self, stream: Sequence[Message]) -> None:
        self.stream += stream
        for topic, raw in RAW_TABLES.items():
            rows = [message for message in stream if message.topic == topic]
            self.steps.connection.execute(
                sql.SQL(
                    "insert into {} (source, source_partition, source_offset, data, kafka_timestamp, arrived_at)"
                    " select * from unnest(%s::text[], %s::int[], %s::bigint[], %s::bytea[], %s::timestamptz[],"
                    " %s::timestamptz[])"
                ).format(sql.Identifier(raw)),
                [
                    [row.source for row in rows],
                    [row.partition for row in rows],
                    [row.offset for row in rows],
                    [row.data for row in rows],
                    [None if row.kafka_timestamp is None else instant(row.kafka_timestamp) for row in rows],
                    [instant(row.arrived_at) for row in rows],
                ],
            )

    def step(self, _: None) -> None:
        self.steps.step()

    def interrupted(self, number: int) -> None:
        calls = 0
        bring = live_steps._Step._bring

        def interrupt(step: live_steps._Step, *given: object) -> None:
            nonlocal calls
            calls += 1
            if calls > number:
                raise Interrupted
            bring(step, *given)  # type: ignore[arg-type]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(live_steps._Step, "_bring", interrupt)
            with suppress(Interrupted):
                self.steps.step()

    def wait(self, micros: int) -> None:
        self.clock += micros
        at(self.steps, self.clock)
        self.steps.make_all_due()

    def erase(self, erasure: tuple[tuple[str, str], int]) -> None:
        (kind, subject), moment = erasure
        self.erased[kind, subject] = moment
        self.steps.connection.execute(
            "insert into erased_subjects (subject_kind, subject_id, erased_at) values (%s, %s, %s)"
            " on conflict (subject_kind, subject_id) do update set erased_at = excluded.erased_at",
            [kind, subject, instant(moment)],
        )

    def _of(self, number: int, statement: str, *values: object) -> Message | None:
        if not self.stream:
            return None
        message = self.stream[number % len(self.stream)]
        self.steps.connection.execute(
            sql.SQL(statement + " where source = %s and source_partition = %s and source_offset = %s").format(
                sql.Identifier(RAW_TABLES[message.topic])
            ),
            [*values, message.source, message.partition, message.offset],
        )
        return message

    def empty(self, number: int) -> None:
        if message := self._of(number, "update {} set data = %s", EMPTIED):
            self.stream[self.stream.index(message)] = replace(message, data=EMPTIED)

    def delete(self, number: int) -> None:
        if message := self._of(number, "delete from {}"):
            self.stream.remove(message)

    def rebuild(self, number: int) -> None:
        names = list(self.steps.views.views)
        self.steps.connection.execute("select prefs_rebuild(%s)", [names[number % len(names)]])

    def pending(self, numbers: Sequence[int]) -> None:
        names = list(self.steps.views.views)
        mark_pending(
            self.steps.connection, self.steps.engine, {names[number % len(names)] for number in numbers}
        )

    def keys(self, there: bool) -> None:
        self.steps.connection.execute("delete from canary_keys")
        if there:
            insert_canary_keys(self.steps.connection)

    def begin(self, numbers: Sequence[int]) -> None:
        """Begin to build views, as if their definitions had changed."""
        connection, views = self.steps.connection, self.steps.views.views
        names = list(views)
        for name in {names[number % len(names)] for number in numbers}:
            with connection.transaction():
                row = connection.execute(
                    "select prefs_begin_build(%s, %s)", [name, views[name].definition]
                ).fetchone()
                assert row is not None
                if views[name].unique:
                    connection.execute(
                        sql.SQL("create unique index on {} ({})").format(
                            sql.Identifier(row[0]),
                            sql.SQL(", ").join(map(sql.Identifier, views[name].unique)),
                        )
                    )
            self.computed.discard(name)

    def go_on(self, number: int) -> None:
        """Bring one of the builds a bit further, as `build_beside` does."""
        connection = self.steps.connection
        builds = connection.execute(
            "select relation, built, filled from live_builds order by relation"
        ).fetchall()
        if not builds:
            return
        name, built, filled = builds[number % len(builds)]
        if name not in self.computed:
            # The steps until the next call go on while the rows are computed, and see none of them.
            assert connection.execute("select prefs_fill_build(%s)", [name]).fetchone() == (None,)
            connection.execute("update live_builds set filled = false where relation = %s", [name])
            self.computed.add(name)
        elif not filled:
            connection.execute("update live_builds set filled = true where relation = %s", [name])
        else:
            with connection.transaction():
                found = connection.execute(
                    "select prefs_catch_up_build(%s, %s)", [name, number % 5 == 0]
                ).fetchone()
                if found == ("ready",):
                    # In place of what dbt does: it renames the table and recreates what reads it.
                    connection.execute(
                        sql.SQL(
                            "delete from {0}; insert into {0} select * from {1}; select prefs_end_build({2})"
                        ).format(sql.Identifier(name), sql.Identifier(built), sql.Literal(name))
                    )

    def builders_end(self, _: None) -> None:
        self.steps.connection.execute("update live_builds set builder = -1")
        self.steps.connection.execute("select prefs_drop_dead_builds()")
        self.computed.clear()

    def happen(self, happened: Sequence[tuple[str, object]]) -> None:
        for what, given_ in happened:
            getattr(self, what)(given_)
        if not self.steps.connection.execute("select from canary_keys").fetchall():
            insert_canary_keys(self.steps.connection)
        while self.steps.connection.execute("select from live_builds").fetchall():
            self.go_on(0)
            self.steps.step()
        catch_up(self.steps)

    def oracle(self) -> Oracle:
        return Oracle(
            self.stream,
            self.clock,
            erased=[Erasure(kind, subject, moment) for (kind, subject), moment in self.erased.items()],
        )


LIMITS = ("MESSAGES_PER_STEP", "CHANGES_PER_STEP", "DUE_PER_STEP", "ARRIVALS_PER_STEP")


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step takes so little that whatever waits needs several."""
    for name in LIMITS:
        monkeypatch.setattr(live_steps, name, 3)


# `TEST_SEQUENCES=600` takes some minutes.
SEQUENCES = int(os.environ.get("TEST_SEQUENCES", "10"))


@pytest.mark.usefixtures("small_steps")
@settings(quick, max_examples=SEQUENCES, phases=[Phase.explicit, Phase.generate])
@given(happened=happenings())
def test_any_sequence_equals_the_oracle(steps: Steps, happened: list[tuple[str, object]]) -> None:
    world = World(steps)
    world.happen(happened)
    assert differences(steps.connection, world.oracle()) == {}
    # And what is told to nobody any more: a rebuild changes nothing.
    changed = {
        name: steps.connection.execute("select prefs_rebuild(%s)", [name]).fetchone()
        for name in steps.views.views
    }
    assert {name for name, count in changed.items() if count != (0,)} == set()
    assert not steps.connection.execute("select from live_pending where relation not like 'sink%'").fetchall()
    left = "select relation from live_due union all select relation from live_builds"
    assert steps.connection.execute(left).fetchall() == []


def test_a_step_without_work_is_one_statement_and_misses_nothing(
    steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each second of an idle follower costs what this does."""
    World(steps)
    catch_up(steps)
    steps.step()
    execute, asked = steps.connection.execute, []

    def counted(query: object, *given: object, **named: object) -> object:
        asked.append(query)
        return execute(query, *given, **named)  # type: ignore[arg-type, call-overload]

    monkeypatch.setattr(steps.connection, "execute", counted)
    assert steps.step().idle
    assert len(asked) == 1
    monkeypatch.undo()
    view = steps.views.ordered[-1].name
    with steps.engine.connect() as other:
        mark_pending(other, steps.engine, [view])
        assert steps.step().rebuilt == [view]
        other.execute("insert into live_due (relation, key) values (%s, '{1}')", [view])
        step, _ = steps.step(), steps.step()
        assert not step.rebuilt
        assert other.execute("select from live_due").fetchall() == []
        before = steps.views
        assert steps.step().idle
        assert steps._views is before
        other.execute("update deployments set checksum = 'another' where relation = %s", [view])
        steps.step()
        assert steps._views is not before


def test_views_that_do_not_depend_on_each_other_are_rebuilt_at_once(
    steps: Steps, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, *_ = sorted(topic.parsed for topic in registry.topics.values() if topic.entity)
    reader = next(name for name in steps.views.views if steps.views.depends(name, [first, second]))
    World(steps)
    catch_up(steps)
    rebuild, locked = steps._rebuild, []

    def beside(connection: psycopg.Connection[tuple[object, ...]], view: str, report: StepReport) -> None:
        if connection is not steps.connection:
            with steps.engine.connect() as other:
                query = "select pg_try_advisory_xact_lock(hashtext('dagster-prefs'), hashtext(%s))"
                locked.extend(other.execute(query, [steps.engine.schema]).fetchall())
            if len(locked) == 1:
                raise Interrupted
        rebuild(connection, view, report)

    monkeypatch.setattr(steps, "_rebuild", beside)
    mark_pending(steps.connection, steps.engine, [first, second, reader])
    with pytest.raises(Interrupted):
        steps.step()
    # The other one is done, and the one that failed is still to do, before what reads both.
    done = {first, second} & set(steps.step().rebuilt)
    assert len(done) == 1
    mark_pending(steps.connection, steps.engine, [first, second, reader])
    assert set(steps.step().rebuilt) == {first, second}
    assert steps.step().rebuilt[0] == reader
    # No apply can begin before both ended, and after a failure the next one is not held up.
    assert set(locked) == {(False,)}
    with steps.engine.connect() as other:
        query = "select pg_try_advisory_lock(hashtext('dagster-prefs'), hashtext(%s))"
        assert other.execute(query, [steps.engine.schema]).fetchall() == [(True,)]


def test_a_steps_number_leads_from_a_message_to_the_publishing_of_its_items(
    steps: Steps, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    World(steps)
    catch_up(steps)
    event = {
        "viewer_id": 7,
        "genre": "crime",
        "watch_duration_sec": 60,
        "watched_at": instant(NOW).isoformat(),
    }
    written = [
        RawMessage(0, number, json.dumps({**event, "event_id": f"e{number}"}).encode())
        for number in range(1, 6)
    ]
    with RawStore(steps.engine) as store:
        store.write(registry.topic("view_events"), "file:x", written)

    def trail(offset: int) -> Trail:
        return read_trail(
            steps.connection, steps.engine, registry.topic("view_events"), Place("file:x", 0, offset)
        )

    assert trail(1).arrived_at is not None
    assert trail(1).step is None
    assert trail(6) == Trail()
    # One write may be more than a step takes.
    monkeypatch.setattr(live_steps, "MESSAGES_PER_STEP", 3)
    reports = [steps.step(), steps.step()]
    assert [report.messages for report in reports] == [3, 2]
    assert [trail(offset).step for offset in (1, 3, 4, 5)] == [
        reports[0].step, reports[0].step, reports[1].step, reports[1].step,
    ]  # fmt: skip
    outbox = dict(steps.connection.execute("select domain_key, step from live_outbox").fetchall())
    assert outbox["engagement#watch"] == reports[1].step
    assert trail(4).published_at == {}
    assert reports[0].step is not None
    assert reports[1].step is not None
    note_published(steps.connection, steps.engine, "engagement#preferences", reports[0].step)
    note_published(steps.connection, steps.engine, "engagement#watch", reports[1].step)
    assert set(trail(1).published_at or {}) == {"engagement#preferences", "engagement#watch"}
    assert set(trail(4).published_at or {}) == {"engagement#watch"}
    found = trail(4)
    assert found.arrived_at is not None
    assert found.committed_at is not None
    assert found.arrived_at <= found.committed_at <= (found.published_at or {})["engagement#watch"]
    for table, column in (("live_trail", "committed_at"), ("live_published", "published_at")):
        steps.connection.execute(f"update {table} set {column} = {column} - interval '16 minutes'")
    forget_old_steps(steps.connection, steps.engine)
    assert trail(4) == Trail(found.arrived_at)
    assert steps.connection.execute("select count(*) from live_published").fetchone() == (0,)
