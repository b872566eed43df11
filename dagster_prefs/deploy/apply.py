"""Apply a plan: build shadow relations, swap them in, drop the old ones last. It may be interrupted at any moment."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import psycopg
from filelock import FileLock, Timeout
from psycopg import sql

from dagster_prefs.declarations.names import FEED_KIND, QUERY_SUFFIX, TABLE_KIND
from dagster_prefs.deploy.plan import (
    CONTRACT_KIND,
    DEPLOYMENTS,
    JOURNAL_KIND,
    PENDING_KIND,
    Plan,
    PlanError,
    ReviewContract,
    feed_sink,
    feed_to_come,
    make_plan,
    read_records,
)
from dagster_prefs.deploy.rebuild import NO_REBUILD, Rebuild, Successor, bridge, bridge_of, count_missing
from dagster_prefs.engine.catalog import Catalog, read_catalog
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.engine.dbt import Dbt
from dagster_prefs.engine.explain import engine_words
from dagster_prefs.engine.lock import lock_deployment
from dagster_prefs.engine.spreads import SPREAD_KIND
from dagster_prefs.engine.version import require_version
from dagster_prefs.errors import PrefsError
from dagster_prefs.files import make_private_folder
from dagster_prefs.redaction import redact_options

BUILDING, GOING_LIVE = "building", "going live"
# These have no readers inside the engine: instead of a swap, the old one is dropped and the new one renamed.
_WRITERS = ("sink", "subscription")
_POLL_SECONDS = 0.5


class ApplyError(PrefsError):
    """A plan could not be applied completely; the message says which relations still serve, and the remedy."""


class OnlineStore(Protocol):
    """The stores behind the sinks, which this package does not depend on."""

    def prepare(self) -> None:
        """Create or verify the tables, before a sink into one is created."""

    def reconcile(self, relation: str) -> str:
        """Make the items of a rolling view's domain equal to its rows; delete those without a row. Return a summary."""


@dataclass(frozen=True)
class _Journal:
    """The intended steps of an apply, stored in the engine until it is complete."""

    id: str
    state: str
    closure: tuple[tuple[str, str], ...]
    reconcile: tuple[str, ...]
    drop: tuple[str, ...]

    @property
    def suffix(self) -> str:
        return f"__next_{self.id}"

    def shadow(self, name: str) -> str:
        return name + self.suffix


def apply_plan(
    engine: EngineConfiguration,
    dbt: Dbt,
    review: ReviewContract,
    online: OnlineStore,
    *,
    drop_orphans: bool = False,
    on_step: Callable[[str], None] = lambda step: None,
    rebuild: Rebuild = NO_REBUILD,
) -> Plan:
    """Change the engine to match the models, and return the plan that was applied.

    On RisingWave the models of `rebuild` are made again, with all that reads them. Finishes or reverts first what an
    interrupted apply left. Calls `on_step` before each step; an error that it raises stops the apply there, as a crash
    would. Safe to repeat at any time: the next call continues where this one ended, and changes nothing if nothing
    differs.

    Raises PlanError, before any change, when the plan must not be applied or another apply runs from the same
    state folder; EngineTooOld likewise; ApplyError when a step failed; DbtError; EngineUnavailable; what
    `online` raises.
    """
    make_private_folder(dbt.target_dir)
    lock = FileLock(dbt.target_dir / "apply.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise PlanError(
            "another `prefs apply` is running with the same PREFS_DATA_DIR: wait until it is done"
        ) from None
    step = "look at what is deployed"

    def told(next_step: str) -> None:
        nonlocal step
        step = next_step
        on_step(next_step)

    try:
        with engine.connect() as connection:
            require_version(connection, engine, dbt)
            return _Apply(connection, engine, dbt, online, told, rebuild).run(
                partial(make_plan, engine, dbt, review, drop_orphans=drop_orphans, anew=rebuild.models)
            )
    except psycopg.Error as error:
        raise ApplyError(
            f"the engine at {engine.host}:{engine.port} refused a statement of the step “{step}”: remove the cause "
            f"and run `prefs apply` again, which continues from there. It says: {engine_words(str(error))}"
        ) from error
    finally:
        lock.release()


class _Apply:
    """One apply over one connection."""

    def __init__(
        self,
        connection: psycopg.Connection[Any],
        engine: EngineConfiguration,
        dbt: Dbt,
        online: OnlineStore,
        on_step: Callable[[str], None],
        rebuild: Rebuild,
    ) -> None:
        self.connection = connection
        self.engine = engine
        self.dbt = dbt
        self.online = online
        self.on_step = on_step
        self.rebuild = rebuild
        self.streaming = engine.kind == "risingwave"

    def run(self, plan_now: Callable[[], Plan]) -> Plan:
        for journal in self._journals():
            if journal.state == GOING_LIVE:
                self._go_live(journal)
        self._drop_dead_builds()
        plan = plan_now()
        if plan.refusals:
            raise PlanError("; ".join(plan.refusals))
        other = [
            relation.name
            for relation in plan.of("create", "changed")
            if relation.how != "kept" and relation.name not in plan.closure
        ]
        if self.rebuild.models and other:
            raise PlanError(
                f"{', '.join(other)} differs from the models too, and a rebuild changes nothing else: run `prefs "
                "apply` first"
            )
        for journal in self._journals():
            if journal.id != plan.id:
                self._abandon(journal)
        if feeds := [name for name, model in plan.models.items() if model.kind == FEED_KIND]:
            self._drop_all([feed_to_come(name) for name in feeds], "the unfinished source")
        if plan.changes:
            self._carry_out(plan)
        return plan

    # --- the whole way ---

    def _carry_out(self, plan: Plan) -> None:
        models = plan.models
        differing = {relation.name for relation in plan.of("create", "changed")}
        journal = _Journal(
            id=plan.id,
            state=BUILDING,
            closure=tuple((name, models[name].kind) for name in plan.closure),
            reconcile=tuple(
                name
                for name in models
                if models[name].domain
                and (name in plan.closure if self.streaming else self._affects(plan, differing, name))
            ),
            # A feed's sink has no record of its own, and must be dropped before the feed.
            drop=tuple(
                name
                for relation in plan.to_drop
                for name in (
                    [feed_sink(relation.name), relation.name]
                    if relation.kind == FEED_KIND
                    else [relation.name]
                )
            ),
        )
        self._write(journal)
        if not self.streaming:
            self._drop_orphans(journal)
        for relation in plan.of("changed"):
            if relation.add_columns:
                self.on_step(f"add columns to {relation.name}")
                self._add_columns(relation.name, relation.add_columns)
            if relation.add_columns or relation.how == "kept":
                self._record(plan, relation.name)
        kept = {relation.name for relation in plan.of("changed") if relation.how == "kept"}
        # A feed replaces itself, when its raw table has been swapped.
        shadows = {name: journal.shadow(name) for name in plan.closure if models[name].kind != FEED_KIND}
        raw = [name for name in shadows if models[name].holds_data]
        sinks = [name for name in plan.closure if models[name].kind in _WRITERS]
        if any(models[name].kind == "sink" for name in (*differing, *plan.closure)) or journal.reconcile:
            self.on_step("prepare the online store")
            self.online.prepare()
        in_place = [
            name
            for name in models
            if name not in plan.closure
            and ((name in differing and name not in kept) or (models[name].domain and plan.contract.changes))
        ]
        if shadows:
            self._drop_unrecorded(journal)
        for name in raw:
            self._succeed(journal, name, shadows)
        first = [*in_place, *(name for name in shadows if name not in sinks and name not in raw)]
        if not self.streaming and plan.of("changed"):
            self._announce(plan)
        if first:
            self.on_step(f"build {', '.join(first)}")
            self._build(first, shadows)
        for name in raw:
            self._refuse_missing(journal, name)
        if shadows:
            try:
                if into_lake := [name for name in sinks if models[name].lake_table]:
                    self._drop_lake_sinks(journal, into_lake)
                if sinks:
                    self.on_step(f"build {', '.join(sinks)} as shadow relations")
                    self._build(sinks, shadows)
                self._wait_until_created(journal)
            except (Exception, KeyboardInterrupt) as error:
                self._withdraw_sinks(journal, error)
                raise
        if shadows:
            self.on_step("go live")
            self._go_live(self._write(replace(journal, state=GOING_LIVE)))
            return
        self._reconcile(journal)
        if self.streaming:
            self._drop_orphans(journal)
        self._end(journal)

    def _affects(self, plan: Plan, differing: set[str], domain: str) -> bool:
        return domain in differing or any(
            domain in relation.views for relation in plan.of("changed") if relation.how != "kept"
        )

    def _build(self, names: Sequence[str], shadows: dict[str, str]) -> None:
        failed = [result for result in self.dbt.run("run", names, aliases=shadows) if not result.ok]
        if failed:
            causes = [result for result in failed if result.status != "skipped"] or failed
            what = "; ".join(f"{result.name}: {result.message}" for result in causes)
            raise ApplyError(
                f"{what}. What ran before still serves: correct the model or the cause, then run `prefs apply` again"
            )

    def _go_live(self, journal: _Journal) -> None:
        """Run every step from the first swap to the last drop; each first checks whether it is done."""
        for name, kind in journal.closure:
            if kind not in (*_WRITERS, FEED_KIND):
                self._take_over(journal, name, drop=False)
        # Only for sinks into DynamoDB: a new subscription has written nothing yet, and the live one still reads the
        # view that was swapped away. Beside subscriptions, sinks lead into the lake.
        kinds = {kind for _, kind in journal.closure}
        if "sink" in kinds and "subscription" not in kinds:
            self._reconcile(journal)
        for name, kind in journal.closure:
            if kind in _WRITERS:
                self._take_over(journal, name, drop=True)
        self.on_step("record what is deployed")
        self._promote_records(journal)
        # Reconciles the items that the old sinks wrote until they were dropped.
        self._reconcile(journal)
        self._drop_orphans(journal)
        self._feed_successors(journal)
        for name, _ in reversed(journal.closure):
            self._drop(journal.shadow(name), "the old relation")
        self._promote_indexes(journal)
        self._end(journal)

    # --- steps ---

    def _take_over(self, journal: _Journal, name: str, *, drop: bool) -> None:
        objects = self._catalog().objects
        new, old = objects.get(journal.shadow(name)), objects.get(name)
        if new is None or (old is not None and old.id > new.id):
            return
        if old is not None and (drop or old.kind in _WRITERS):
            self._drop(name, f"the old {old.kind}")
            old = None
        kind = sql.SQL(new.kind)
        if old is not None:
            self.on_step(f"swap {name}")
            self._execute("alter {} {} swap with {}", kind, self._at(name), self._at(new.name))
        else:
            self.on_step(f"name the new {name}")
            self._execute("alter {} {} rename to {}", kind, self._at(new.name), sql.Identifier(name))

    def _succeed(self, journal: _Journal, raw: str, shadows: dict[str, str]) -> None:
        """Build the successor of a raw table, with all messages of the lake and of the old one; it follows this."""
        successor = self._successor(raw)
        self.on_step(f"build the successor of {raw}")
        self._build([raw], shadows)
        # The lake first: of a message that an erasure redacted there, the old table may still have the bytes.
        self._restore(successor, shadows[raw])
        self._execute("{}", bridge(self.engine, raw, shadows[raw], journal.shadow(bridge_of(raw))))
        self._wait_until_created(journal)
        parsed = successor.topic.parsed
        if parsed in self._catalog().objects and self._missing(successor, shadows[raw]):
            # What was exported and deleted between the two.
            self._restore(successor, shadows[raw])
            self._refuse_lost(self._missing(successor, shadows[raw]), raw)

    def _successor(self, raw: str) -> Successor:
        found = self.rebuild.successor(raw)
        if found is None:
            raise ApplyError(f"{raw} has no messages elsewhere: run `prefs rebuild` with --from-lake")
        return found

    def _restore(self, successor: Successor, relation: str) -> None:
        self.on_step(f"restore the messages of {successor.topic.name} from the lake")
        messages = successor.restore(relation)
        self._execute("flush")
        self.on_step(f"{successor.topic.name}: {messages:,} messages read from the lake")

    def _missing(self, successor: Successor, relation: str) -> int:
        return count_missing(self.connection, self.engine, successor.topic.parsed, relation)

    def _refuse_missing(self, journal: _Journal, raw: str) -> None:
        """Refuse views that lack messages, because the successor deleted them before they were read."""
        successor = self._successor(raw)
        parsed, there = successor.topic.parsed, self._catalog().objects
        self._wait_until_created(journal)
        if parsed in there and journal.shadow(parsed) in there:
            self._refuse_lost(self._missing(successor, journal.shadow(parsed)), raw)

    def _refuse_lost(self, missing: int, raw: str) -> None:
        if missing:
            raise ApplyError(
                f"{missing:,} messages that the views have counted are neither in the lake nor in {raw} any more, so "
                "that views made again would lack them. What ran before still serves: run `prefs export events` more "
                "often than PREFS_RAW_RETENTION_SECONDS, and keep that longer than a rebuild takes; `prefs apply` "
                "removes what this rebuild has built"
            )

    def _feed_successors(self, journal: _Journal) -> None:
        """Have the feeds write into the raw tables that were swapped in, and drop the sinks that led into these."""
        raw = [name for name, kind in journal.closure if kind == TABLE_KIND]
        feeds = [name for name, kind in journal.closure if kind == FEED_KIND]
        if raw and feeds:
            self.on_step(f"make {', '.join(feeds)} again")
            failed = [
                result for result in self.dbt.run("run", feeds, arguments=["--full-refresh"]) if not result.ok
            ]
            if failed:
                raise ApplyError(
                    f"{'; '.join(f'{one.name}: {one.message}' for one in failed)}. The new views serve, and get what "
                    "arrives over the old feed: correct the cause, then run `prefs apply` again"
                )
        for name in raw:
            # What has not passed yet passes before the sink is dropped.
            self._execute("flush")
            self._drop(journal.shadow(bridge_of(name)), "the sink from the old raw table")

    def _drop_lake_sinks(self, journal: _Journal, names: Sequence[str]) -> None:
        # Items are overwritten, but rows of a table in the lake are appended: a new sink next to the old one, or after
        # an interrupted apply, would write each row a second time. No reader is served from these tables meanwhile.
        for name in names:
            self._drop(name, "the old sink")
            self._drop(journal.shadow(name), "the unfinished sink")
        self.on_step("prepare the tables in the lake")
        self.online.prepare()

    def _reconcile(self, journal: _Journal) -> None:
        for relation in journal.reconcile:
            self.on_step(f"reconcile {relation} with the online store")
            self.on_step(self.online.reconcile(relation))

    def _withdraw_sinks(self, journal: _Journal, cause: BaseException) -> None:
        # Two sinks of one domain overwrite each other: the new ones are dropped, and their items are reconciled.
        try:
            for name, kind in journal.closure:
                if kind in _WRITERS:
                    self._drop(journal.shadow(name), "the unfinished sink")
            self._reconcile(journal)
        except (PrefsError, psycopg.Error) as error:
            raise ApplyError(
                f"{cause}; the sinks built so far could not be dropped either ({error}): run `prefs apply` again"
            ) from cause

    def _abandon(self, journal: _Journal) -> None:
        """Remove the shadow relations that an apply of other models built and never swapped in."""
        if self.streaming:
            self._wait_until_created(journal)
            left = [name for name in self._catalog().objects if name.endswith(journal.suffix)]
            self._drop_all(left, "the unfinished relation")
        self._reconcile(journal)
        self._end(journal)

    def _drop_unrecorded(self, journal: _Journal) -> None:
        # The apply was interrupted between building and recording these, so they may be incomplete and are
        # built again.
        self._wait_until_created(journal)
        catalog = self._catalog()
        records, _ = read_records(self.connection, self.engine, catalog)
        unrecorded = [
            name
            for name in map(journal.shadow, dict(journal.closure))
            if name in catalog.objects and (name not in records or records[name].state != "deployed")
        ]
        self._drop_all([*unrecorded, *catalog.readers(unrecorded)], "the unfinished relation")

    def _drop_orphans(self, journal: _Journal) -> None:
        if journal.drop:
            with self._one_change():
                self._drop_all(journal.drop, "the orphaned relation")
                for name in journal.drop:
                    self._delete_record(name)

    def _drop_dead_builds(self) -> None:
        """Drop what killed runs of dbt left of changed views (macros/engine/builds.sql)."""
        if "live_builds" in self._catalog().objects:
            with self._one_change():
                self._execute("select {}()", self._at("prefs_drop_dead_builds"))

    def _drop_all(self, names: Sequence[str], what: str) -> None:
        """Drop relations, readers before the relations that they read."""
        catalog = self._catalog()
        left = set(names)
        while left:
            free = sorted(name for name in left if not catalog.readers([name]) & left)
            for name in free:
                self._drop(name, what)
            left -= set(free)

    def _drop(self, name: str, what: str) -> None:
        there = self._catalog().objects.get(name)
        if there is None:
            return
        self.on_step(f"drop {what} {name}")
        try:
            if there.kind == "materialized view" and not self.streaming:
                self._execute("drop view {}; drop table {}", self._at(name + QUERY_SUFFIX), self._at(name))
            else:
                self._execute("drop {} {}", sql.SQL(there.kind), self._at(name))
        except psycopg.Error as error:
            raise ApplyError(
                f"{what} {name} cannot be dropped ({engine_words(str(error))}): drop what depends on it if it is "
                "not this project's, then run `prefs apply` again"
            ) from error

    def _add_columns(self, name: str, columns: Sequence[str]) -> None:
        there = {
            column
            for (column,) in self.connection.execute(
                "select column_name from information_schema.columns where table_schema = %s and table_name = %s",
                (self.engine.schema, name),
            )
        }
        with self._one_change():
            for column in columns:
                if column.split()[0].strip('"') not in there:
                    # The column definition comes from the model's own SQL, which dbt would run unchanged as
                    # well.
                    self._execute("alter table {} add column {}", self._at(name), sql.SQL(column))

    @contextmanager
    def _one_change(self) -> Iterator[None]:
        """Open a transaction that holds the lock of dbt's runs, on engines with transactions."""
        if self.streaming:
            yield
            return
        with self.connection.transaction():
            lock_deployment(self.connection, self.engine)
            yield

    def _wait_until_created(self, journal: _Journal) -> None:
        """Wait until all jobs are created: a job outlives its session, and cannot be read or dropped before."""
        if not self.streaming:
            return
        self.connection.execute("flush")
        told = False
        while waiting := self.connection.execute(
            "select j.name from rw_catalog.rw_streaming_jobs as j"
            " join rw_catalog.rw_databases as d on d.id = j.database_id"
            " where d.name = %s and j.status <> 'CREATED' and strpos(j.name, %s) > 0",
            (self.engine.database, journal.suffix),
        ).fetchall():
            if not told:
                self.on_step(f"wait until {', '.join(sorted(name for (name,) in waiting))} is created")
                told = True
            time.sleep(_POLL_SECONDS)

    # --- the record in the engine ---

    def _journals(self) -> list[_Journal]:
        records, _ = read_records(self.connection, self.engine, self._catalog())
        found = []
        for name, record in sorted(records.items()):
            if record.kind == JOURNAL_KIND:
                kept = json.loads(record.definition or "{}")
                found.append(
                    _Journal(
                        id=name.split(":")[1],
                        state=record.state,
                        closure=tuple((one, kind) for one, kind in kept["closure"]),
                        reconcile=tuple(kept["settle"]),
                        drop=tuple(kept["drop"]),
                    )
                )
        return found

    def _write(self, journal: _Journal) -> _Journal:
        if DEPLOYMENTS not in self._catalog().objects:
            # The database is empty: dbt creates everything, and the next apply sees what is missing.
            return journal
        # The keys are those of earlier versions, so that an apply that one of them began can be finished.
        kept = {"closure": journal.closure, "settle": journal.reconcile, "drop": journal.drop}
        values = (f"plan:{journal.id}", JOURNAL_KIND, json.dumps(kept), journal.state, "prefs apply")
        conflict = (
            sql.SQL("")
            if self.streaming
            else sql.SQL(
                " on conflict (relation) do update set state = excluded.state, definition = excluded.definition"
            )
        )
        self._execute(
            "insert into {} (relation, kind, definition, state, deployed_at, invocation_id)"
            " values (%s, %s, %s, %s, now(), %s){}",
            self._records,
            conflict,
            values=values,
        )
        return journal

    def _announce(self, plan: Plan) -> None:
        """Store the new definitions, also those of dependents, where the materializations look them up."""
        self._execute("delete from {} where kind = %s", self._records, values=(PENDING_KIND,))
        changed = [relation for relation in plan.of("changed") if relation.how != "kept"]
        for name in {
            one for relation in changed for one in (relation.name, *relation.views, *relation.sinks)
        }:
            if not plan.models[name].holds_data:
                self._execute(
                    "insert into {} (relation, kind, definition, state) values (%s, %s, %s, %s)",
                    self._records,
                    values=(f"pending:{name}", PENDING_KIND, plan.models[name].sql, BUILDING),
                )

    def _record(self, plan: Plan, name: str) -> None:
        model = plan.models[name]
        self._execute(
            "update {} set checksum = %s, source_checksum = %s, definition = %s, state = 'deployed',"
            " deployed_at = now() where relation = %s",
            self._records,
            values=(model.checksum, model.source_checksum, redact_options(model.sql), name),
        )

    def _promote_records(self, journal: _Journal) -> None:
        # One statement, so that after a crash either all records are old or all are new.
        columns = "kind, checksum, source_checksum, definition, state, invocation_id"
        # A spread is in force from the swap on.
        self._execute(
            f"insert into {{}} (relation, {columns}, deployed_at) select replace(relation, %s, ''), {columns},"
            " case when kind = %s then now() else deployed_at end from {} where right(relation, %s) = %s",
            self._records,
            self._records,
            values=(journal.suffix, SPREAD_KIND, len(journal.suffix), journal.suffix),
        )

    def _promote_indexes(self, journal: _Journal) -> None:
        rows = self.connection.execute(
            "select i.name from rw_catalog.rw_indexes i join rw_catalog.rw_schemas n on n.id = i.schema_id"
            " where n.name = %s and strpos(i.name, %s) > 0",
            (self.engine.schema, journal.suffix),
        ).fetchall()
        for (name,) in rows:
            to = sql.Identifier(name.replace(journal.suffix, ""))
            self._execute("alter index {} rename to {}", self._at(name), to)

    def _end(self, journal: _Journal) -> None:
        if DEPLOYMENTS not in self._catalog().objects:
            return
        self._execute(
            "delete from {} where right(relation, %s) = %s",
            self._records,
            values=(len(journal.suffix), journal.suffix),
        )
        self._execute(
            "delete from {} where relation = %s or kind = %s",
            self._records,
            values=(f"plan:{journal.id}", PENDING_KIND),
        )

    def _delete_record(self, name: str) -> None:
        self._execute(
            "delete from {} where relation in (%s, %s)",
            self._records,
            values=(name, f"{CONTRACT_KIND}:{name}"),
        )

    # --- the engine ---

    @property
    def _records(self) -> sql.Identifier:
        return self._at(DEPLOYMENTS)

    def _catalog(self) -> Catalog:
        return read_catalog(self.connection, self.engine)

    def _at(self, name: str) -> sql.Identifier:
        return sql.Identifier(self.engine.schema, name)

    def _execute(self, statement: str, *parts: sql.Composable, values: Sequence[Any] | None = None) -> None:
        self.connection.execute(sql.SQL(statement).format(*parts), values)
