"""One step of the embedded engine: passes arrivals, changed rows and due keys through all views at once.

A step is one transaction: the work that it claims, the rows of every view, and the keys for the publisher. So a crash
at any moment repeats the step, and no reader sees half of one.

New work is what has been committed: writers insert a row in their own transaction (`raw_arrivals`, `live_changes`), and
a step claims the rows that it can see. A cursor on a sequence or a clock would miss rows that are committed late.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple

import psycopg
from psycopg import sql

from dagster_prefs.declarations.registry import Registry, TopicDeclaration
from dagster_prefs.engine.catalog import NotDeployed, missing_relation
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.engine.lock import deployment_locked, lock_deployment
from dagster_prefs.live.backlog import make_backlog
from dagster_prefs.live.presence import pending_views, rebuilding_session
from dagster_prefs.live.trail import forget_old_steps, make_trail, note_step
from dagster_prefs.live.views import (
    CLOCK,
    PLACE,
    Build,
    LiveViews,
    View,
    delta_table,
    raw_sql,
    read_builds,
    read_views,
    topics_of_key,
)

# The limits of one step, which keep it short and its memory bounded, however much is waiting.
MESSAGES_PER_STEP = 2000
CHANGES_PER_STEP = 2000
DUE_PER_STEP = 1000
ARRIVALS_PER_STEP = 1000
# The longest delay with which a row leaves a window because time has passed, in seconds.
DUE_SECONDS = 30.0
# From this number of messages and this share of the stored ones, rebuilding is faster than steps.
REBUILD_MESSAGES = 20_000
REBUILD_SHARE = 0.2

Key = tuple[str, ...]


class Taken(NamedTuple):
    """The places of the messages that a step took from one partition of one source, first and last included."""

    topic: str
    source: str
    partition: int
    first_offset: int
    last_offset: int
    messages: int


@dataclass
class StepReport:
    """The result of a step: `messages` read, changed rows per view, and the views that were rebuilt.

    `step` is its id, which grows from step to step; None if it did nothing. The keys that it touched have it as `step`
    in the outbox, so it leads from an event's place (`taken`) to the item that is published because of it. `more` says
    whether something was left for the next step; `seconds` is wall time.
    """

    step: int | None = None
    taken: list[Taken] = field(default_factory=list)
    messages: int = 0
    changed: dict[str, int] = field(default_factory=dict)
    rebuilt: list[str] = field(default_factory=list)
    more: bool = False
    seconds: float = 0.0

    @property
    def idle(self) -> bool:
        """Whether there was no work."""
        return not (self.messages or self.changed or self.rebuilt or self.more)


class Steps:
    """The steps over one connection; only one process at a time takes them.

    `declared` returns the project's declarations as they are now, the same ones by default. It is asked whenever the
    deployment changed, so that views and declarations belong together.
    """

    def __init__(
        self,
        engine: EngineConfiguration,
        registry: Registry,
        declared: Callable[[], Registry] | None = None,
    ) -> None:
        self.engine = engine
        self.registry = registry
        self.connection = engine.connect()
        self._declared = declared or (lambda: registry)
        # A statement is planned anew for its keys, because their number varies from a handful to thousands.
        self.connection.prepare_threshold = None
        self._deployed: tuple[str, Mapping[str, Build]] | None = None
        self._views: LiveViews | None = None
        self._due_at = 0.0
        self._look_for_work = b""

    def close(self) -> None:
        """Close the connection."""
        self.connection.close()

    @property
    def views(self) -> LiveViews:
        """The kept views as currently deployed. Raises NotDeployed before the first run of dbt, RegistryError."""
        try:
            ((deployed,),) = self.connection.execute(
                sql.SQL("select {}").format(self._fingerprint())
            ).fetchall()
        except psycopg.Error as error:
            if missing := missing_relation(error):
                raise NotDeployed(f"{missing}: nothing is deployed yet; run `prefs apply`") from None
            raise
        builds = read_builds(self.connection, self.engine)
        if self._views is None or (deployed, builds) != self._deployed:
            if self._deployed is not None:
                self.registry = self._declared()
            views = read_views(self.connection, self.engine, self.registry)
            self._prepare(views)
            self._views, self._deployed = views, (deployed, builds)
            self._look_for_work = self._waiting()
        return self._views

    def _fingerprint(self) -> sql.Composed:
        """Return the SQL expression of what is deployed."""
        return sql.SQL(
            "(select md5(string_agg(concat_ws('/', relation, checksum, state), ',' order by relation)) from {}"
            " where not starts_with(relation, 'pending:'))"
        ).format(self._table("deployments"))

    def _waiting(self) -> bytes:
        """Return the statement that tells what is deployed, and whether a step may have work."""
        # A build needs no step of its own: what it has to catch up on arrives, or is due.
        tables = ("raw_arrivals", "live_changes", "live_due")
        return (
            sql.SQL("select {}, {} or exists (select from ({}) as p where due and relation = any(%s))")
            .format(
                self._fingerprint(),
                sql.SQL(" or ").join(
                    sql.SQL("exists (select from {})").format(self._table(table)) for table in tables
                ),
                pending_views(self.engine, self.registry),
            )
            .as_bytes(None)
        )

    def _is_idle(self) -> bool:
        """Return whether nothing waits for a step, by one statement instead of a dozen."""
        if self._views is None or self._deployed is None:
            return False
        try:
            ((deployed, waiting),) = self.connection.execute(
                self._look_for_work, [list(self._views.views)]
            ).fetchall()
        except psycopg.errors.UndefinedTable:
            # What is deployed is of another version.
            return False
        return not waiting and deployed == self._deployed[0]

    def step(self) -> StepReport:
        """Take one step and report on it. Raises psycopg.Error; the next step then repeats the failed work."""
        started = time.monotonic()
        report = StepReport()
        if started < self._due_at and self._is_idle():
            report.seconds = time.monotonic() - started
            return report
        with ExitStack() as beside, self.connection.transaction():
            lock_deployment(self.connection, self.engine)
            views = self.views
            if self._prefer_rebuilding(views):
                report.more = True
            elif self._rebuild_pending(views, report, beside):
                report.step = next_step(self.connection, self.engine)
            else:
                _Step(self.connection, self.engine, views, report).run(due=started >= self._due_at)
                if started >= self._due_at:
                    forget_old_steps(self.connection, self.engine)
                    if len(views.ordered) > len(views.views):
                        self.connection.execute(
                            sql.SQL("select {}()").format(self._table("prefs_drop_dead_builds"))
                        )
                    self._due_at = started + DUE_SECONDS
        report.seconds = time.monotonic() - started
        return report

    def forget_deployed(self) -> None:
        """Have the next step read views and declarations again, though the deployed models may be the same."""
        self._views, self._deployed = None, ("", {})

    def make_all_due(self) -> None:
        """Have the next step check the clock, regardless of the last check."""
        self._due_at = 0.0

    def _rebuild_pending(self, views: LiveViews, report: StepReport, beside: ExitStack) -> bool:
        """Rebuild a pending view that is due, the one that reads most, and as long as that takes others `beside` it.

        Returns whether there was one. A view waits for the pending ones that it reads, directly or not.
        """
        pending = dict(self.connection.execute(pending_views(self.engine, self.registry)).fetchall())
        due = [name for name in views.views if pending.get(name)]
        if not due:
            return False
        first, *others = self._by_size(views, [name for name in due if not views.depends(name, due)])
        if others:
            beside.enter_context(self._rebuilding(others, report))
        self._rebuild(self.connection, first, report)
        report.more = True
        return True

    def _by_size(self, views: LiveViews, names: Sequence[str]) -> list[str]:
        """Order views by the bytes of what they read, most first."""
        read = [(name, relation) for name in names for relation in views.views[name].feeds]
        sizes = self.connection.execute(
            sql.SQL(
                "select view, sum(pg_relation_size(to_regclass(format('%%I.%%I', {}, relation))))"
                " from unnest(%s::text[], %s::text[]) as read (view, relation) group by view"
            ).format(sql.Literal(self.engine.schema)),
            [[view for view, _ in read], [relation for _, relation in read]],
        ).fetchall()
        bytes_of = {view: size or 0 for view, size in sizes}
        return sorted(names, key=lambda name: -bytes_of.get(name, 0))

    @contextmanager
    def _rebuilding(self, names: Sequence[str], report: StepReport) -> Iterator[None]:
        """Rebuild views on a second connection, each in a transaction of its own, until the step has done its part.

        The deployment stays locked until they end: whoever marks a view as pending meanwhile would lose the mark.
        """
        ended = threading.Event()

        def rebuild(connection: psycopg.Connection[Any]) -> None:
            for name in names:
                if not ended.is_set():
                    self._rebuild(connection, name, report)

        with (
            deployment_locked(self.connection, self.engine),
            self.engine.connect() as connection,
            ThreadPoolExecutor(1, "rebuild") as thread,
        ):
            # The lock ends with this process, so its second transaction must not outlive it either.
            connection.execute("set client_connection_check_interval = '500ms'")
            connection.execute(
                "select set_config('application_name', %s, false)", [rebuilding_session(self.engine)]
            )
            ((clock,),) = self.connection.execute(
                "select coalesce(current_setting('prefs.clock', true), '')"
            ).fetchall()
            connection.execute("select set_config('prefs.clock', %s, false)", [clock])
            rebuilding = thread.submit(rebuild, connection)
            try:
                yield
            finally:
                ended.set()
            rebuilding.result()

    def _rebuild(self, connection: psycopg.Connection[Any], view: str, report: StepReport) -> None:
        ((changed,),) = connection.execute(
            sql.SQL("select {}(%s)").format(self._table("prefs_rebuild")), [view]
        ).fetchall()
        report.rebuilt.append(view)
        if changed:
            report.changed[view] = changed

    def _prefer_rebuilding(self, views: LiveViews) -> bool:
        """Have views rebuilt for which too many messages wait. Returns whether there was one."""
        raw = {topic.raw: parsed for parsed, topic in views.parsed.items()}
        waiting = self.connection.execute(
            sql.SQL(
                "select raw, sum(messages) from unnest(%s::text[]) as raw"
                " cross join lateral (select messages from {} where relation = raw limit {}) as a"
                " group by raw having sum(messages) >= %s"
            ).format(self._table("raw_arrivals"), sql.Literal(REBUILD_MESSAGES)),
            [list(raw), REBUILD_MESSAGES],
        ).fetchall()
        marked = False
        for relation, messages in waiting:
            ((stored,),) = self.connection.execute(
                sql.SQL("select greatest(reltuples, 0) from pg_class where oid = {}::regclass").format(
                    self._name(raw[relation])
                )
            ).fetchall()
            if messages >= REBUILD_SHARE * stored:
                # The rebuild reads the arrivals visible now; later ones are left to the following steps.
                self.connection.execute(
                    sql.SQL("delete from {} where relation = %s").format(self._table("raw_arrivals")),
                    [relation],
                )
                mark_pending(self.connection, self.engine, [raw[relation]])
                marked = True
        return marked

    def _prepare(self, views: LiveViews) -> None:
        """Create what steps need and no model declares: indexes, the trail, this session's tables of changed rows."""
        self.connection.execute("set client_min_messages to warning")
        make_trail(self.connection, self.engine)
        make_backlog(self.connection, self.engine)
        for parsed, topic in views.parsed.items():
            for column, where in _lookups(self.registry, topic).items():
                self._index(parsed, [column], where)
        for view in views.ordered:
            for flip in view.flips:
                self._index(flip.relation, [flip.rows.replace("%%", "%")])
            for relation, key in view.reads.items():
                # For tiles: their day is an expression over the events.
                if key and relation in views.views and not all(map(str.isidentifier, key)):
                    self._index(relation, key)
        for relation in views.merging:
            self.connection.execute(sql.SQL("drop table if exists {}").format(delta_table(relation)))
            self.connection.execute(
                sql.SQL(
                    "create temporary table {} on commit delete rows as"
                    " select 0 as prefs_sign, t.* from {} as t with no data"
                ).format(delta_table(relation), self._table(relation))
            )

    def _index(self, relation: str, expressions: Sequence[str], where: str = "true") -> None:
        name = hashlib.md5("/".join([relation, *expressions]).encode(), usedforsecurity=False).hexdigest()
        columns = [sql.Identifier(one) if one.isidentifier() else raw_sql(one) for one in expressions]
        # An expression that depends on the session cannot be indexed; its steps read more rows.
        with suppress(psycopg.errors.InvalidObjectDefinition), self.connection.transaction():
            self.connection.execute(
                sql.SQL("create index if not exists {} on {} ({}) where {}").format(
                    sql.Identifier(f"live_{name}"),
                    self._table(relation),
                    sql.SQL(", ").join(columns),
                    raw_sql(where),
                )
            )

    def _table(self, name: str) -> sql.Identifier:
        return sql.Identifier(self.engine.schema, name)

    def _name(self, relation: str) -> sql.Literal:
        return sql.Literal(f'"{self.engine.schema}"."{relation}"')


def next_step(connection: psycopg.Connection[Any], engine: EngineConfiguration) -> int:
    """Return the id of a new step. Raises psycopg.Error."""
    ((step,),) = connection.execute(
        "select nextval(%s::regclass)", [f'"{engine.schema}"."live_steps"']
    ).fetchall()
    return int(step)


def mark_pending(
    connection: psycopg.Connection[Any], engine: EngineConfiguration, relations: Iterable[str]
) -> None:
    """Mark views to be rebuilt, or sinks to be compared, as a whole; already pending ones stay as they are."""
    connection.execute(
        sql.SQL(
            "insert into {} (relation) select unnest(%s::text[]) on conflict (relation) do nothing"
        ).format(sql.Identifier(engine.schema, "live_pending")),
        [sorted(relations)],
    )


def _lookups(registry: Registry, topic: TopicDeclaration) -> dict[str, str]:
    """Return the columns by which a step looks up a topic's messages, each with the condition of its index.

    Rejected messages are excluded, because their fields may have any length.
    """
    found = {topic.identity: "reason is null"}
    if topic.entity is not None:
        found |= {registry.entities[topic.entity].key.name: "reason is null", "canary": "canary is not null"}
    return found


class _Step:
    """The work of one step, within its transaction."""

    def __init__(
        self,
        connection: psycopg.Connection[Any],
        engine: EngineConfiguration,
        views: LiveViews,
        report: StepReport,
    ) -> None:
        self.connection = connection
        self.engine = engine
        self.views = views
        self.report = report
        self.touched: dict[str, set[Key]] = {}
        self.outbox: dict[str, set[str]] = {}
        self.pending: set[str] = set()
        self.logged: set[str] = set()

    def run(self, *, due: bool) -> None:
        self._claim_arrivals()
        self._claim_changes()
        if due:
            self._note_due()
        self._claim_due()
        computed = []
        for view in self.views.ordered:
            if view.how == "keys" and self.touched.get(view.name):
                keys = self.touched.pop(view.name)
                if view.builds is not None:
                    self._keep_build(view, keys)
                else:
                    self._bring(view, keys)
                computed += [view.name] if view.timed and view.filled else []
            elif view.how == "merging" and view.builds is None:
                self._merge(view)
        if computed:
            self._note_moment(computed)
        self._remember()

    # --- what is new ---

    def _claim_arrivals(self) -> None:
        for parsed, topic in self.views.parsed.items():
            arrivals = self.connection.execute(
                sql.SQL(
                    "select source, source_partition, first_offset, last_offset, messages from {} where relation = %s"
                    " order by arrived_at limit %s"
                ).format(self.views.table("raw_arrivals")),
                [topic.raw, ARRIVALS_PER_STEP],
            ).fetchall()
            room = MESSAGES_PER_STEP - self.report.messages
            taken: list[Any] = []
            for arrival in arrivals:
                if taken and arrival[4] > room:
                    break
                taken.append(arrival)
                room -= arrival[4]
            if not taken or (room < -MESSAGES_PER_STEP and self.report.messages):
                self.report.more = self.report.more or bool(arrivals)
                continue
            self.report.more = (
                self.report.more or len(taken) < len(arrivals) or len(arrivals) == ARRIVALS_PER_STEP
            )
            self._take(topic, parsed, taken)

    def _take(self, topic: TopicDeclaration, parsed: str, arrivals: Sequence[Sequence[Any]]) -> None:
        sources, partitions, firsts, lasts, _ = map(list, zip(*arrivals, strict=True))
        given = {
            "name": topic.raw,
            "s": sources,
            "p": partitions,
            "f": firsts,
            "l": lasts,
            "most": MESSAGES_PER_STEP,
        }
        places = self.connection.execute(
            sql.SQL(
                "select distinct new.* from unnest(%(s)s::text[], %(p)s::int[], %(f)s::bigint[], %(l)s::bigint[])"
                " as a (s, p, f, l) cross join lateral ("
                "   select source, source_partition, source_offset from {} as raw"
                "   where source = a.s and source_partition = a.p and source_offset between a.f and a.l"
                "   and not exists (select from {} as parsed where parsed.source = raw.source"
                "     and parsed.source_partition = raw.source_partition"
                "     and parsed.source_offset = raw.source_offset)"
                "   order by source_offset limit %(most)s"
                " ) as new order by 1, 2, 3 limit %(most)s"
            ).format(self.views.table(topic.raw), self.views.table(parsed)),
            given,
        ).fetchall()
        if len(places) == MESSAGES_PER_STEP:
            self.report.more = True
            if len(arrivals) > 1:
                # The range of a write's offsets may contain messages of other writes, so that the count is too high.
                self._take(topic, parsed, arrivals[:1])
                return
            # A write with more messages than a step takes: its rest is stored as another arrival.
            self._shorten(topic, arrivals[0], int(places[-1][2]) + 1)
        else:
            self.connection.execute(
                sql.SQL(
                    "delete from {} as t using unnest(%(s)s::text[], %(p)s::int[], %(f)s::bigint[]) as a (s, p, f)"
                    " where t.relation = %(name)s and t.source = a.s and t.source_partition = a.p"
                    " and t.first_offset = a.f"
                ).format(self.views.table("raw_arrivals")),
                given,
            )
        self.report.messages += len(places)
        for (source, partition), found in groupby(places, key=lambda place: place[:2]):
            offsets = [place[2] for place in found]
            self.report.taken.append(
                Taken(topic.name, source, partition, offsets[0], offsets[-1], len(offsets))
            )
        self._claim(parsed, [tuple(map(str, place)) for place in places])

    def _shorten(self, topic: TopicDeclaration, arrival: Sequence[Any], first: int) -> None:
        source, partition, old, _, messages = arrival
        self.connection.execute(
            sql.SQL(
                "with old as (delete from {0} where relation = %s and source = %s and source_partition = %s"
                " and first_offset = %s returning *)"
                " insert into {0} select relation, source, source_partition, %s, last_offset, %s, arrived_at from old"
                " on conflict (relation, source, source_partition, first_offset) do update"
                " set last_offset = greatest({0}.last_offset, excluded.last_offset),"
                " messages = {0}.messages + excluded.messages"
            ).format(self.views.table("raw_arrivals")),
            [topic.raw, source, partition, old, first, max(1, messages - MESSAGES_PER_STEP)],
        )

    def _claim_changes(self) -> None:
        rows = self.connection.execute(
            sql.SQL(
                "delete from {0} where id in (select id from {0} order by id limit %s) returning relation, key"
            ).format(self.views.table("live_changes")),
            [CHANGES_PER_STEP],
        ).fetchall()
        self.report.more = self.report.more or len(rows) == CHANGES_PER_STEP
        by_relation: dict[str, list[Mapping[str, Any]]] = {}
        for relation, key in rows:
            by_relation.setdefault(relation, []).append(key)
        topics = {topic.raw: topic for topic in self.views.registry.topics.values()}
        for relation, keys in by_relation.items():
            if relation in topics:
                self._messages_changed(topics[relation], keys)
            elif relation == "erased_subjects":
                self._subjects_erased(keys)
            elif relation == "canary_keys":
                self._canaries_changed(keys)
            else:
                self.pending.update(view.name for view in self.views.ordered if relation in view.feeds)

    def _messages_changed(self, topic: TopicDeclaration, keys: Sequence[Mapping[str, Any]]) -> None:
        self._claim(topic.parsed, [tuple(str(key[name]) for name in PLACE) for key in keys])

    def _subjects_erased(self, keys: Sequence[Mapping[str, Any]]) -> None:
        entities = self.views.registry.entities
        for kind in {str(key["subject_kind"]) for key in keys} & set(entities):
            ids = [str(key["subject_id"]) for key in keys if key["subject_kind"] == kind]
            column = entities[kind].key
            for topic in topics_of_key(self.views.registry, column.name):
                kind_of = "bigint" if column.type == "bigint" else "text"
                self._touch_identities(
                    topic,
                    sql.SQL(
                        "t.{} = any(array(select id::{} from unnest(%s::text[]) as id where pg_input_is_valid(id, {})))"
                    ).format(sql.Identifier(column.name), sql.SQL(kind_of), sql.Literal(kind_of)),
                    ids,
                )

    def _touch_identities(self, topic: TopicDeclaration, where: sql.Composable, ids: Sequence[str]) -> None:
        if topic.parsed not in self.views.parsed:
            return
        rows = self.connection.execute(
            sql.SQL("select distinct {0} from {1} as t where {2} and t.reason is null").format(
                sql.Identifier("t", topic.identity), self.views.table(topic.parsed), where
            ),
            [list(ids)],
        ).fetchall()
        self._claim(topic.relation, [(str(identity),) for (identity,) in rows])

    def _canaries_changed(self, keys: Sequence[Mapping[str, Any]]) -> None:
        deployments = [str(key["deployment"]) for key in keys]
        for parsed, topic in self.views.parsed.items():
            if topic.entity is not None:
                rows = self.connection.execute(
                    sql.SQL(
                        "select source, source_partition, source_offset from {} where canary = any(%s::text[])"
                    ).format(self.views.table(parsed)),
                    [deployments],
                ).fetchall()
                self._claim(parsed, [tuple(map(str, row)) for row in rows])
                # Its canaries may be in other rows.
                self.pending.update(view.name for view in self.views.with_builds(parsed) if view.builds)

    def _note_due(self) -> None:
        """Store the keys of rows that passed a border since the rows of their view were last computed."""
        for view in self.views.ordered:
            if not view.timed or not view.filled:
                continue
            row = self.connection.execute(
                sql.SQL(
                    "update {0} as t set as_of = now.at, latest = now.at"
                    " from (select as_of, latest, {1} as at from {0} where relation = %(name)s) as now"
                    " where t.relation = %(name)s returning now.as_of, now.latest, now.at"
                ).format(self.views.table("live_views"), raw_sql(CLOCK)),
                {"name": view.name},
            ).fetchone()
            if row is None or row[0] == row[1] == row[2]:
                continue
            if view.how == "rebuilt":
                self.pending.add(view.name)
            for flip in view.flips:
                self.connection.execute(
                    self.views.due(view, flip), {"first": row[0], "last": row[1], "now": row[2]}
                )

    def _note_moment(self, views: Sequence[str]) -> None:
        """Note that rows of these views were computed as of now, which may be earlier or later than all before."""
        self.connection.execute(
            sql.SQL(
                "update {} set as_of = least(as_of, {clock}), latest = greatest(latest, {clock})"
                " where relation = any(%s)"
            ).format(self.views.table("live_views"), clock=raw_sql(CLOCK)),
            [list(views)],
        )

    def _claim_due(self) -> None:
        rows = self.connection.execute(
            sql.SQL(
                "delete from {0} where (relation, key) in"
                " (select relation, key from {0} where relation <> all(%s) limit %s) returning relation, key"
            ).format(self.views.table("live_due")),
            [[view.name for view in self.views.ordered if not view.filled], DUE_PER_STEP],
        ).fetchall()
        self.report.more = self.report.more or len(rows) == DUE_PER_STEP
        there = {view.name for view in self.views.ordered}
        for relation, key in rows:
            if relation in there:
                self._touch(relation, [tuple(key)])

    # --- through the views ---

    def _touch(self, view: str, keys: Iterable[Key]) -> None:
        self.touched.setdefault(view, set()).update(keys)

    def _claim(self, relation: str, keys: Collection[Key]) -> None:
        """Have a view and its build computed for keys."""
        for view in self.views.with_builds(relation) if keys else ():
            if view.how == "keys":
                self._touch(view.name, keys)
            else:
                self.pending.add(view.name)

    def _keep_build(self, build: View, keys: set[Key]) -> None:
        """Store the touched keys of a build, or compute them once it is filled."""
        if not build.filled:
            self._store(build, keys)
            return
        try:
            with self.connection.transaction():
                self._bring(build, keys)
        except (psycopg.DataError, psycopg.IntegrityError, psycopg.ProgrammingError):
            # What its query refuses must not stop the views in use: the run that builds it meets the error.
            self.pending.add(build.name)

    def _store(self, build: View, keys: Iterable[Key]) -> None:
        """Store touched keys of a build that is not filled yet."""
        columns = _columns(keys)
        self.connection.execute(
            sql.SQL(
                "insert into {} (relation, key) select {}, array[{}] from unnest({}) as k ({}) on conflict do nothing"
            ).format(
                self.views.table("live_due"),
                sql.Literal(build.name),
                sql.SQL(", ").join(map(sql.Identifier, columns)),
                sql.SQL(", ").join(sql.SQL("{}::text[]").format(sql.Placeholder(name)) for name in columns),
                sql.SQL(", ").join(map(sql.Identifier, columns)),
            ),
            columns,
        )

    def _bring(self, view: View, keys: set[Key]) -> None:
        told = self.connection.execute(self.views.step(view), _columns(keys)).fetchall()
        readers = self.views.readers[view.name]
        changed = 0
        for number, key in told:
            if number < 0:
                changed = int(key[0])
            elif any(part is None for part in key):
                continue
            elif readers[number].domain:
                self.outbox.setdefault(readers[number].name, set()).add(key[0])
            else:
                self._touch(readers[number].name, [tuple(key)])
        if changed and view.builds is None:
            self.report.changed[view.name] = changed
            self.logged.add(view.name)
            self.pending.update(self.views.rebuilt_by(view.name))

    def _merge(self, view: View) -> None:
        if self.logged & set(view.feeds):
            # When a maximum is removed, the new one can only be found among all rows of its key.
            lost = [tuple(key) for (key,) in self.connection.execute(self.views.merge(view)).fetchall()]
            if lost:
                self.connection.execute(self.views.reread(view), _columns(lost))

    def _remember(self) -> None:
        if pending := self.pending & set(self.views.views):
            mark_pending(self.connection, self.engine, pending)
        if builds := self.pending - set(self.views.views):
            self.connection.execute(
                sql.SQL("update {} set whole = true where built = any(%s) and not whole").format(
                    self.views.table("live_builds")
                ),
                [sorted(builds)],
            )
        if self.report.messages or self.report.changed or self.outbox:
            self.report.step = next_step(self.connection, self.engine)
        if self.outbox:
            rows = [(domain, key) for domain, keys in self.outbox.items() for key in sorted(keys)]
            self.connection.execute(
                sql.SQL(
                    "insert into {} (domain_key, entity_key, first_step, step)"
                    " select domain, key, %(step)s, %(step)s"
                    " from unnest(%(domains)s::text[], %(keys)s::text[]) as k (domain, key)"
                    " on conflict (domain_key, entity_key) do update set step = excluded.step"
                ).format(self.views.table("live_outbox")),
                {
                    "step": self.report.step,
                    "domains": [domain for domain, _ in rows],
                    "keys": [key for _, key in rows],
                },
            )
        if self.report.step is not None:
            note_step(self.connection, self.engine, self.report.step, self.report.taken)


def _columns(keys: Iterable[Key]) -> dict[str, list[str]]:
    """Return keys as the parameters of a step's statement: one list per column."""
    return {f"k{number}": list(column) for number, column in enumerate(zip(*sorted(keys), strict=True))}
