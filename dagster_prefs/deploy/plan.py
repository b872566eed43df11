"""The plan of a deployment: how the compiled models differ from what is deployed."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from functools import cached_property
from typing import Any, Literal, cast

import psycopg
import sqlglot
from psycopg import sql
from sqlglot.errors import SqlglotError

from dagster_prefs.declarations.names import FEED_KIND, TABLE_KIND, lake_table
from dagster_prefs.engine.catalog import Catalog, CatalogObject, read_catalog
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.engine.dbt import Dbt
from dagster_prefs.engine.spreads import SPREAD_KIND
from dagster_prefs.engine.version import require_version
from dagster_prefs.errors import PrefsError
from dagster_prefs.redaction import redact_options

DEPLOYMENTS = "deployments"

# The suffix of a shadow relation, which is built next to the old one: it carries the plan's id until the swap.
SHADOW = re.compile(r"__next_([0-9a-f]{8})$")
# The names that dbt-risingwave's own zero-downtime mode leaves behind.
DBT_LEFTOVER = re.compile(r"_dbt_zero_down_tmp_")

# Records of `deployments` that are no relations.
CONTRACT_KIND = "contract"
JOURNAL_KIND = "plan"
PENDING_KIND = "pending"

Action = Literal["create", "changed", "orphaned", "refused"]
How = Literal["create", "in place", "swap", "rebuild", "drop", "kept", ""]

_CATALOG_KINDS: Mapping[str, Mapping[str, str]] = {
    "local": {"materialized_view": "materialized view", "sink": "view", TABLE_KIND: "table"},
    "risingwave": {
        "materialized_view": "materialized view",
        TABLE_KIND: "table",
        FEED_KIND: "source",
    },
}


class PlanError(PrefsError):
    """A plan cannot be made or must not be applied; the message gives reason and remedy."""


@dataclass(frozen=True)
class Model:
    """A compiled dbt model.

    `kind` is dbt's materialization; `upstream` are the models that it reads; a sink into the lake has a
    `lake_table`. `anew` asks RisingWave to build it again although nothing differs.
    """

    name: str
    kind: str
    sql: str
    indexes: str
    upstream: tuple[str, ...]
    columns: tuple[str, ...]
    domain: str | None
    lake_table: str | None
    source_checksum: str
    anew: bool = False

    @property
    def checksum(self) -> str:
        """The definition's checksum, as dbt's hooks record it (macro `definition_checksum`)."""
        return definition_checksum(self.sql, self.indexes)

    @property
    def holds_data(self) -> bool:
        """Whether it is a table of events, which no run could restore."""
        return self.kind == TABLE_KIND

    @property
    def replaces_itself(self) -> bool:
        """Whether a run of its model replaces what runs: dbt alone adds a second feed next to the old one."""
        return self.kind == FEED_KIND


@dataclass(frozen=True)
class Record:
    """A row of `deployments`: the deployed relation of this name, as the run that created it recorded it."""

    kind: str
    checksum: str | None
    definition: str | None
    state: str


@dataclass(frozen=True)
class ContractChange:
    """A difference between the deployed serving contract and the one of the models."""

    kind: Literal["additive", "breaking"]
    domain: str
    what: str


@dataclass(frozen=True)
class ContractReview:
    """All differences of the contract, and the sentence that refuses them, or none."""

    changes: tuple[ContractChange, ...] = ()
    refusal: str = ""


# Deployed fragments and dbt's manifest → the review. Passed in, because this package does not know the
# contract.
ReviewContract = Callable[[Sequence[Mapping[str, Any]], Mapping[str, Any]], ContractReview]


@dataclass(frozen=True)
class RelationPlan:
    """The action for one relation, and its dependents.

    `views` are the dependents that are rebuilt, `sinks` those that would otherwise keep reading the old
    relation; `attributes` are the contract's (domain.name) whose values come from it.
    """

    name: str
    kind: str
    action: Action
    how: How
    why: str = ""
    diff: str = ""
    add_columns: tuple[str, ...] = ()
    views: tuple[str, ...] = ()
    sinks: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()
    consumers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """The difference between models and engine, and the order of the steps that remove it.

    `relations` are those that differ, in the order of their dependencies; `closure` is what is built as
    shadow relations and swapped (RisingWave only). `stranded` maps readers to relations that they should not
    read, `leftovers` are temporary objects, `unfinished` the ids of plans whose apply was interrupted.
    """

    engine: Literal["local", "risingwave"]
    unchanged: tuple[str, ...]
    relations: tuple[RelationPlan, ...]
    closure: tuple[str, ...]
    contract: ContractReview
    stranded: Mapping[str, str]
    leftovers: tuple[str, ...]
    unfinished: tuple[str, ...]
    drop_orphans: bool
    models: Mapping[str, Model]

    def of(self, *actions: Action) -> tuple[RelationPlan, ...]:
        """Return the relations with one of these actions."""
        return tuple(relation for relation in self.relations if relation.action in actions)

    @cached_property
    def id(self) -> str:
        """Eight hex digits that identify what would be built: the same models give the same id."""
        names = self.closure or [relation.name for relation in self.of("create", "changed")]
        text = json.dumps([(name, self.models[name].checksum) for name in sorted(names)])
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    @property
    def to_drop(self) -> tuple[RelationPlan, ...]:
        """The orphans that this plan drops."""
        return tuple(relation for relation in self.of("orphaned") if relation.how == "drop")

    @property
    def refusals(self) -> tuple[str, ...]:
        """The reasons why the plan must not be applied; empty if there are none."""
        found = [f"{relation.name}: {relation.why}" for relation in self.of("refused")]
        return (*found, *([self.contract.refusal] if self.contract.refusal else []))

    @property
    def changes(self) -> bool:
        """Whether applying it would change anything."""
        return bool(
            self.of("create", "changed", "refused")
            or self.to_drop
            or self.unfinished
            or self.contract.changes
            or self.contract.refusal
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as plain values, for JSON."""
        return {
            "id": self.id,
            "engine": self.engine,
            "changes": self.changes,
            "unchanged": list(self.unchanged),
            "relations": [asdict(relation) for relation in self.relations],
            "rebuilt_and_swapped": list(self.closure),
            "contract": asdict(self.contract),
            "refusals": list(self.refusals),
            "stranded": dict(self.stranded),
            "leftovers": list(self.leftovers),
            "unfinished": list(self.unfinished),
        }

    def text(self, *, list_unchanged: bool = False) -> str:
        """Render the plan for display."""
        lines = []
        for relation in self.relations:
            how = f" ({relation.how})" if relation.how and relation.how != relation.action else ""
            lines.append(
                f"{relation.action} {relation.name}{how}{': ' + relation.why if relation.why else ''}"
            )
            for title, names in (
                ("depends on it, recreated", relation.views),
                ("sinks that would be stranded, rebuilt", relation.sinks),
                ("contract attributes", relation.attributes),
                ("consumers", relation.consumers),
            ):
                if names:
                    lines.append(f"  {title}: {', '.join(names)}")
            lines += [f"  {line}" for line in relation.diff.splitlines()]
        lines += [f"contract: {c.kind}: {c.domain}: {c.what}" for c in self.contract.changes]
        lines += [f"stranded {name}: {why}" for name, why in self.stranded.items()]
        lines += [f"left over: {name}" for name in self.leftovers]
        lines += [
            f"unfinished: plan {plan}, which `prefs apply` finishes or clears" for plan in self.unfinished
        ]
        if list_unchanged:
            lines += [f"unchanged {name}" for name in self.unchanged]
        lines += [f"refused: {why}" for why in self.refusals]
        numbers = {
            "to create": len(self.of("create")),
            "changed": len(self.of("changed")),
            "orphaned": len(self.of("orphaned")),
            "refused": len(self.of("refused")),
        }
        counts = [f"{number} {what}" for what, number in numbers.items() if number]
        lines.append(", ".join([f"{len(self.unchanged)} unchanged", *counts]))
        if not self.changes:
            lines.append("nothing to do: the deployed relations match the declarations")
        return "\n".join(lines)


def catalog_kind(engine: Literal["local", "risingwave"], materialization: str) -> str:
    """Return the kind in the engine's catalog of a relation that dbt created by this materialization."""
    return _CATALOG_KINDS[engine].get(materialization, materialization)


def feed_sink(feed: str) -> str:
    """Return the name of the sink that carries a feed's messages into the raw table."""
    return f"{feed}_feed"


def feed_to_come(feed: str) -> str:
    """Return the temporary name of the source that will replace a feed."""
    return f"{feed}_next"


def definition_checksum(definition: str, indexes: str) -> str:
    """Return MD5 of definition (without database name) and indexes (JSON), as dbt's hooks compute it."""
    return hashlib.md5(f"{definition}\n{indexes}".encode(), usedforsecurity=False).hexdigest()


def make_plan(
    engine: EngineConfiguration,
    dbt: Dbt,
    review: ReviewContract,
    *,
    drop_orphans: bool = False,
    anew: Collection[str] = (),
) -> Plan:
    """Compile the models and compare them with the engine; changes nothing.

    RisingWave builds the models `anew` again although nothing differs, with all that reads them. Raises PlanError when
    `deployments` has an unknown shape; DbtError when a model does not compile; EngineTooOld; EngineUnavailable.
    """
    with engine.connect() as connection:
        require_version(connection, engine, dbt)
        manifest = dbt.compiled_manifest()
        models = {
            name: replace(model, anew=name in anew)
            for name, model in compiled_models(manifest, engine.database).items()
        }
        catalog = read_catalog(connection, engine)
        records, fragments = read_records(connection, engine, catalog)
        plan = compare(
            engine.kind,
            models,
            {exposure["name"]: model_names(exposure) for exposure in manifest.get("exposures", {}).values()},
            records,
            catalog,
            review(fragments, manifest),
            drop_orphans=drop_orphans,
        )
        return plan if engine.kind == "local" else _refuse_forgotten(connection, engine, plan)


def deletes_by_age(connection: psycopg.Connection[Any], engine: EngineConfiguration, raw: str) -> bool:
    """Return whether RisingWave deletes the rows of a raw table by their age. Raises psycopg.Error."""
    rows = connection.execute(
        "select t.definition from rw_catalog.rw_tables t join rw_catalog.rw_schemas n on n.id = t.schema_id"
        " where n.name = %s and t.name = %s",
        (engine.schema, raw),
    ).fetchall()
    return any("retention_seconds" in definition for (definition,) in rows)


def _refuse_forgotten(connection: psycopg.Connection[Any], engine: EngineConfiguration, plan: Plan) -> Plan:
    """Refuse to make a view again from a raw table that has deleted by age what the view has read."""

    def oldest(relation: str) -> datetime | None:
        there = connection.execute(
            "select 1 from information_schema.columns where table_schema = %s and table_name = %s"
            " and column_name = 'arrived_at'",
            (engine.schema, relation),
        ).fetchall()
        # A view that somebody wrote, and that knew no arrivals so far.
        if not there:
            return None
        ((arrived,),) = connection.execute(
            sql.SQL("select min(arrived_at) from {}").format(sql.Identifier(engine.schema, relation))
        ).fetchall()
        return cast("datetime | None", arrived)

    def judged(relation: RelationPlan) -> RelationPlan:
        if relation.action != "changed" or relation.name not in plan.closure:
            return relation
        model = plan.models[relation.name]
        # A sink holds nothing that it could lack afterwards.
        keeps = "arrived_at" in model.columns and model.kind != "sink"
        for raw in model.upstream if keeps else ():
            # A raw table that is made again too gets all messages (deploy/rebuild.py).
            if (
                not plan.models[raw].holds_data
                or raw in plan.closure
                or not deletes_by_age(connection, engine, raw)
            ):
                continue
            read, left = oldest(relation.name), oldest(raw)
            if read is not None and (left is None or read < left):
                why = (
                    f"it would be made again without the messages that have left {raw} by their age: run `prefs "
                    f"rebuild {relation.name} --from-lake`, which makes it from all of them"
                )
                return RelationPlan(relation.name, relation.kind, "refused", "", why, relation.diff)
        return relation

    return replace(plan, relations=tuple(judged(relation) for relation in plan.relations))


def model_names(node: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the models on which a node of the manifest depends."""
    return tuple(id_.split(".")[-1] for id_ in node["depends_on"]["nodes"] if id_.startswith("model."))


def compiled_models(manifest: Mapping[str, Any], database: str) -> dict[str, Model]:
    """Return every model of a compiled manifest by name, parents first, without the database's name."""
    nodes = {node["name"]: node for node in manifest["nodes"].values() if node["resource_type"] == "model"}
    found: dict[str, Model] = {}

    def add(name: str) -> None:
        if name in found:
            return
        node = nodes[name]
        for parent in model_names(node):
            add(parent)
        found[name] = Model(
            name=node["alias"],
            kind=node["config"]["materialized"],
            sql=node["compiled_code"].strip().replace(f'"{database}".', ""),
            indexes=json.dumps(node["config"].get("indexes") or []),
            upstream=tuple(nodes[parent]["alias"] for parent in model_names(node)),
            columns=tuple(node["columns"]),
            domain=(node["config"]["meta"].get("domain") or {}).get("key"),
            lake_table=lake_table(node["config"]["meta"]),
            source_checksum=node["checksum"]["checksum"],
        )

    for name in nodes:
        add(name)
    return {model.name: model for model in found.values()}


def read_records(
    connection: psycopg.Connection[Any], engine: EngineConfiguration, catalog: Catalog
) -> tuple[dict[str, Record], list[Mapping[str, Any]]]:
    """Return the rows of `deployments` by relation, and the contract fragments among them, decoded."""
    if DEPLOYMENTS not in catalog.objects:
        return {}, []
    try:
        rows = connection.execute(
            sql.SQL("select relation, kind, checksum, definition, state from {}").format(
                sql.Identifier(engine.schema, DEPLOYMENTS)
            )
        ).fetchall()
    except psycopg.Error:
        raise PlanError(
            f"{engine.schema}.{DEPLOYMENTS} of database {engine.database} is not this platform's table: rename it, "
            "or choose another PREFS_ENGINE_SCHEMA or PREFS_ENGINE_DATABASE"
        ) from None
    fragments = [
        json.loads(definition)
        for name, kind, _, definition, _ in rows
        if kind == CONTRACT_KIND and not SHADOW.search(name)
    ]
    return {name: Record(*values) for name, *values in rows}, fragments


def compare(
    engine: Literal["local", "risingwave"],
    models: Mapping[str, Model],
    exposures: Mapping[str, Sequence[str]],
    records: Mapping[str, Record],
    catalog: Catalog,
    contract: ContractReview,
    *,
    drop_orphans: bool = False,
) -> Plan:
    """Compare compiled `models` (parents first) with `records` and `catalog`, and return the plan."""
    relations_of = {
        name: record
        for name, record in records.items()
        if record.kind not in (CONTRACT_KIND, JOURNAL_KIND, PENDING_KIND, SPREAD_KIND)
        and not SHADOW.search(name)
    }
    stranded = _stranded(models, relations_of, catalog) if engine == "risingwave" else {}
    found: dict[str, RelationPlan] = {}
    unchanged = []
    for model in models.values():
        broken = stranded.get(model.name, "")
        if model.kind == FEED_KIND and feed_sink(model.name) not in catalog.objects:
            broken = f"{feed_sink(model.name)}, which fills its raw table, no longer exists"
        differs = _difference(
            engine, model, relations_of.get(model.name), catalog.objects.get(model.name), broken
        )
        if differs is None:
            unchanged.append(model.name)
        else:
            found[model.name] = differs
    rebuilt = [name for name, relation in found.items() if relation.how in ("swap", "rebuild")]
    closure: tuple[str, ...] = ()
    if rebuilt:
        standing = _descendants(models, rebuilt)
        closure = tuple(
            name for name in models if name in rebuilt or (name in standing and not models[name].holds_data)
        )
    orphans = {
        name: _orphan(name, record, catalog, drop_orphans)
        for name, record in relations_of.items()
        if name not in models
    }
    # What reads a feed is its own sink, and behind that everything.
    for name in (name for name in closure if not models[name].replaces_itself):
        foreign: set[str] = set(catalog.readers([name])) - set(models) - set(orphans if drop_orphans else ())
        foreign = {reader for reader in foreign if not SHADOW.search(reader)}
        if foreign:
            diff = found[name].diff if name in found else ""
            why = _foreign_reader(sorted(foreign), orphans)
            found[name] = RelationPlan(name, models[name].kind, "refused", "", why, diff)
            unchanged = [other for other in unchanged if other != name]
    for name, relation in found.items():
        if relation.action == "changed" and relation.how != "kept":
            found[name] = _with_readers(relation, models, exposures)
    kinds = {name: one.kind for name, one in relations_of.items()} | {m.name: m.kind for m in models.values()}
    unfinished_feeds = {feed_to_come(name) for name, kind in kinds.items() if kind == FEED_KIND}
    return Plan(
        engine=engine,
        unchanged=tuple(unchanged),
        relations=(*[found[name] for name in models if name in found], *orphans.values()),
        closure=closure,
        contract=contract,
        stranded=stranded,
        leftovers=tuple(
            sorted(
                name
                for name in catalog.objects
                if SHADOW.search(name) or DBT_LEFTOVER.search(name) or name in unfinished_feeds
            )
        ),
        unfinished=tuple(
            sorted(name.split(":")[1] for name, record in records.items() if record.kind == JOURNAL_KIND)
        ),
        drop_orphans=drop_orphans,
        models=models,
    )


def _foreign_reader(readers: Sequence[str], orphans: Collection[str]) -> str:
    if ours := [reader for reader in readers if reader in orphans]:
        return (
            f"{', '.join(ours)} depends on it and has no model any more, so the old relation could not be dropped: "
            "add --drop-orphans, or restore the model"
        )
    return (
        f"{', '.join(readers)} depends on it and is not this project's, so it would keep reading the old relation: "
        "make it a model, or drop it first"
    )


def _difference(
    engine: Literal["local", "risingwave"],
    model: Model,
    record: Record | None,
    there: CatalogObject | None,
    broken: str,
) -> RelationPlan | None:
    in_place = engine == "local" or model.replaces_itself

    def differs(action: Action, how: How, why: str = "", diff: str = "", **more: Any) -> RelationPlan:
        return RelationPlan(model.name, model.kind, action, how, why, diff, **more)

    if there is None:
        return differs("create", "create")
    if model.name == DEPLOYMENTS:
        return None
    if record is None:
        return differs(
            "refused",
            "",
            "a relation of this name exists that this project did not create, and it stays as it is: rename it, "
            "or choose another PREFS_ENGINE_SCHEMA or PREFS_ENGINE_DATABASE",
        )
    kind = catalog_kind(engine, model.kind)
    diff = readable_diff(engine, model, record.definition or "")
    if there.kind != kind:
        if "table" in (there.kind, kind):
            return differs(
                "refused",
                "",
                f"it is a {there.kind} and would become a {kind}: a change never drops the rows of a table; "
                "give the new model another name",
                diff,
            )
        if engine == "risingwave" and not {there.kind, kind} & {"sink", "subscription"}:
            return differs(
                "refused",
                "",
                f"it is a {there.kind} and would become a {kind}, which RisingWave cannot swap: give the new model "
                "another name",
                diff,
            )
        return differs("changed", "in place" if in_place else "rebuild", f"{there.kind} becomes {kind}", diff)
    if record.state == "deployed" and record.checksum == model.checksum:
        if model.anew:
            return differs("changed", "swap", "it is made again from all messages")
        return differs("changed", "in place" if in_place else "rebuild", broken) if broken else None
    if record.definition is None:
        # The run was interrupted between building and recording. A table can only be the requested one.
        if model.holds_data:
            return differs("changed", "kept", "the run that created it did not record it")
        how: How = "in place" if in_place else "swap"
        return differs("changed", how, "the run that created it was interrupted")
    if model.holds_data:
        if model.anew and _same_columns(record.definition, model.sql):
            return differs("changed", "swap", "it is made again from all messages", diff)
        return _table_difference(model, record.definition, differs, diff)
    if not diff and not broken:
        # The recorded definition lacks credentials, so the checksum of a definition that may contain some
        # proves nothing.
        indexed = model.kind not in (FEED_KIND, "sink", "subscription")
        if not indexed or definition_checksum(record.definition, model.indexes) == record.checksum:
            return differs(
                "changed",
                "kept",
                "only its layout or comments differ: the new text is recorded, nothing is rebuilt",
            )
        diff = f"its indexes become {model.indexes}"
    if in_place:
        return differs("changed", "in place", broken, diff)
    return differs("changed", "rebuild" if kind in ("sink", "subscription") else "swap", broken, diff)


def _table_difference(
    model: Model, deployed: str, differs: Callable[..., RelationPlan], diff: str
) -> RelationPlan:
    added = added_columns(deployed, model.sql)
    if added is None:
        return differs(
            "refused",
            "",
            "it holds the events that arrived and is never dropped, and more than added columns has "
            "changed: keep the old columns and options, or give the new table another name",
            diff,
        )
    if not added:
        return differs(
            "changed",
            "kept",
            "only its layout or comments differ: the new text is recorded, nothing is rebuilt",
        )
    return differs("changed", "in place", f"adds {', '.join(added)}", diff, add_columns=tuple(added))


def _orphan(name: str, record: Record, catalog: Catalog, drop: bool) -> RelationPlan:
    there = catalog.objects.get(name)
    if there is None:
        why = "it has no model any more and no longer exists; --drop-orphans removes its record"
    else:
        why = "it has no model any more" + ("" if drop else "; --drop-orphans drops it")
    if there is not None and there.kind == "table":
        why += ", with its rows"
    return RelationPlan(name, record.kind, "orphaned", "drop" if drop else "", why)


def _with_readers(
    relation: RelationPlan, models: Mapping[str, Model], exposures: Mapping[str, Sequence[str]]
) -> RelationPlan:
    standing = _descendants(models, [relation.name])
    here = {relation.name, *standing}
    ordered = [name for name in models if name in standing]
    sinks = tuple(name for name in ordered if models[name].kind in ("sink", "subscription"))
    return replace(
        relation,
        views=tuple(name for name in ordered if name not in sinks),
        sinks=sinks,
        attributes=tuple(
            f"{model.domain}.{column}"
            for model in models.values()
            if model.domain and model.name in here
            for column in model.columns
        ),
        consumers=tuple(name for name, read in exposures.items() if here & set(read)),
    )


def _descendants(models: Mapping[str, Model], names: Collection[str]) -> set[str]:
    found: set[str] = set()
    for model in models.values():
        if found.union(names) & set(model.upstream):
            found.add(model.name)
    return found - set(names)


def _ancestors(models: Mapping[str, Model], name: str) -> set[str]:
    found: set[str] = set()
    for parent in models[name].upstream:
        found |= {parent, *_ancestors(models, parent)}
    return found


def _stranded(models: Mapping[str, Model], records: Mapping[str, Record], catalog: Catalog) -> dict[str, str]:
    """Map each relation to the relations that it reads contrary to its model: old objects of an unfinished swap."""
    found = {}
    for name in models:
        if name not in records or name not in catalog.objects:
            continue
        read = {one for one in catalog.reads.get(name, ()) if SHADOW.search(one) or DBT_LEFTOVER.search(one)}
        if wrong := sorted(read - _ancestors(models, name)):
            found[name] = f"it reads {', '.join(wrong)}, which was replaced by a swap"
    return found


def readable_diff(engine: Literal["local", "risingwave"], model: Model, deployed: str) -> str:
    """Return a unified diff of two definitions; queries are formatted first, so layout does not count."""
    before, after = (_formatted(engine, text) for text in (deployed, redact_options(model.sql)))
    lines = difflib.unified_diff(before, after, "deployed", "compiled", lineterm="", n=2)
    return "\n".join(lines)


def _formatted(engine: Literal["local", "risingwave"], text: str) -> list[str]:
    if re.match(r"\s*(with|select)\b", text, re.IGNORECASE):
        dialect = "postgres" if engine == "local" else "risingwave"
        try:
            return (
                sqlglot.parse_one(text, dialect=dialect)
                .sql(dialect, pretty=True, comments=False)
                .splitlines()
            )
        except SqlglotError:
            pass
    return [line.rstrip() for line in text.splitlines() if line.strip()]


def added_columns(deployed: str, compiled: str) -> list[str] | None:
    """Return the column definitions that `compiled` adds to `deployed`; None if it changes anything else.

    Both are `create table` statements. Columns may be added anywhere; everything outside the list of columns,
    and every existing definition in it, must be unchanged.
    """
    before, after = list(_table_parts(deployed)), list(_table_parts(compiled))
    added = []
    for part in after:
        if before and part == before[0]:
            before.pop(0)
        elif re.match(r"(?i)[a-z_][a-z0-9_]* [a-z]", part) and not re.match(
            r"(?i)(primary|unique|check|foreign|constraint|watermark|create)\b", part
        ):
            added.append(part)
        else:
            return None
    return None if before else added


def _same_columns(deployed: str, compiled: str) -> bool:
    """Return whether two `create table` statements differ in the table's options alone."""
    return list(_table_parts(deployed))[:-1] == list(_table_parts(compiled))[:-1]


def _table_parts(statement: str) -> Iterator[str]:
    """Yield the statement's head, each entry of its first list, and its tail, with normalized blanks."""
    depth, start, listed = 0, 0, False
    for place, char in _outside_quotes(statement):
        if char == "(" and not listed:
            depth += 1
            if depth == 1:
                yield _even(statement[start:place])
                start = place + 1
        elif not depth:
            continue
        elif (char == "," and depth == 1) or (char == ")" and depth == 1):
            yield _even(statement[start:place])
            start = place + 1
            listed = char == ")"
            depth -= listed
        elif char == ")":
            depth -= 1
    # The tail's first character distinguishes it from every column.
    yield "| " + _even(statement[start:])


def _outside_quotes(text: str) -> Iterator[tuple[int, str]]:
    quote = ""
    for place, char in enumerate(text):
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        else:
            yield place, char


def _even(text: str) -> str:
    return " ".join(re.sub(r"--[^\n]*", "", text).split())
