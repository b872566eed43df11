"""What a plan says, without an engine: models and records are given, the answer is read off."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pytest
from declared import PROJECT as EXAMPLE

from dagster_prefs.deploy.plan import (
    ContractChange,
    ContractReview,
    Model,
    Plan,
    Record,
    RelationPlan,
    added_columns,
    compare,
)
from dagster_prefs.engine.catalog import QUERY_SUFFIX, Catalog, CatalogObject
from dagster_prefs.redaction import redact_options

KINDS = {
    "table_with_connector": "table", "materialized_view": "materialized view", "view": "view", "sink": "sink",
    "subscription": "subscription", "kafka_feed": "source",
}  # fmt: skip


def model(
    name: str, kind: str, *upstream: str, text: str = "", domain: str | None = None, indexes: str = "[]"
) -> Model:
    return Model(
        name=name,
        kind=kind,
        sql=text or f"select a from {' join '.join(upstream)}",
        indexes=indexes,
        upstream=upstream,
        columns=("viewer_id", "minutes") if domain else (),
        domain=domain,
        lake_table=None,
        source_checksum="s",
    )


RAW = model("raw", "table_with_connector", text='create table "public"."raw" (a int, primary key (a))')
TILE = model("tile", "materialized_view", "raw")
ROLLING = model("rolling", "materialized_view", "tile", domain="engagement#watch")
PLAIN = model("plain", "view", "rolling")
SINK = model(
    "sink",
    "sink",
    "rolling",
    text="create sink sink from rolling\nwith (\n  aws.region = 'a',\n  aws.secret_access_key = 'x'\n)",
)
OTHER = model("other", "materialized_view", "raw")
PROJECT = (RAW, TILE, ROLLING, PLAIN, SINK, OTHER)


def recorded(one: Model) -> Record:
    """What dbt's hooks write for a model: MD5 over definition and indexes."""
    digest = hashlib.md5(f"{one.sql}\n{one.indexes}".encode()).hexdigest()
    return Record(one.kind, digest, redact_options(one.sql), "deployed")


def changed(one: Model, text: str = "", **other: Any) -> Model:
    return Model(**{**vars(one), "sql": text or one.sql.replace("select a", "select a + 1 as a"), **other})


def plan(
    models: Sequence[Model],
    *,
    engine: Literal["local", "risingwave"] = "risingwave",
    deployed: Sequence[Model] = PROJECT,
    records: Mapping[str, Record] | None = None,
    reads: Mapping[str, set[str]] | None = None,
    objects: Mapping[str, str] | None = None,
    contract: ContractReview | None = None,
    drop_orphans: bool = False,
) -> Plan:
    """The plan for `models` where `deployed` is deployed, with more `objects` (name → kind) and `reads`."""
    kinds = {**KINDS, "sink": "sink" if engine == "risingwave" else "view"}
    there = {one.name: kinds[one.kind] for one in deployed} | dict(objects or {})
    return compare(
        engine,
        {one.name: one for one in models},
        {"service": ["sink"], "export": ["tile"]},
        {one.name: recorded(one) for one in deployed} | dict(records or {}),
        Catalog(
            objects={
                name: CatalogObject(number, name, kind) for number, (name, kind) in enumerate(there.items())
            },
            reads={
                **{one.name: frozenset(one.upstream) for one in deployed},
                **{name: frozenset(read) for name, read in (reads or {}).items()},
            },
        ),
        contract or ContractReview(),
        drop_orphans=drop_orphans,
    )


def only(found: Plan) -> RelationPlan:
    (relation,) = found.relations
    return relation


def test_equal_models_are_nothing_to_do() -> None:
    found = plan(PROJECT)
    assert not found.changes
    assert found.unchanged == ("raw", "tile", "rolling", "plain", "sink", "other")
    assert found.text() == "6 unchanged\nnothing to do: the deployed relations match the declarations"
    assert found.text(list_unchanged=True).startswith("unchanged raw\n")


def test_an_empty_engine_is_all_to_create() -> None:
    found = plan(PROJECT, deployed=())
    assert [(relation.action, relation.how) for relation in found.relations] == [("create", "create")] * 6
    assert found.closure == ()
    assert found.changes


@pytest.mark.parametrize(("engine", "how"), [("local", "in place"), ("risingwave", "swap")])
def test_a_changed_view_names_what_stands_on_it(engine: Literal["local", "risingwave"], how: str) -> None:
    found = plan((RAW, changed(TILE), ROLLING, PLAIN, SINK, OTHER), engine=engine)
    tile = only(found)
    assert (tile.name, tile.action, tile.how) == ("tile", "changed", how)
    assert (tile.views, tile.sinks) == (("rolling", "plain"), ("sink",))
    assert tile.attributes == ("engagement#watch.viewer_id", "engagement#watch.minutes")
    assert tile.consumers == ("service", "export")
    assert "-  a\n" in tile.diff
    assert "+  a + 1 AS a" in tile.diff
    assert found.closure == (("tile", "rolling", "plain", "sink") if engine == "risingwave" else ())


def test_the_id_follows_the_models_that_are_built() -> None:
    first = plan((RAW, changed(TILE), ROLLING, PLAIN, SINK, OTHER))
    assert first.id == plan((RAW, changed(TILE), ROLLING, PLAIN, SINK, OTHER)).id
    assert (
        first.id != plan((RAW, changed(TILE, "select a + 2 as a from raw"), ROLLING, PLAIN, SINK, OTHER)).id
    )


def test_a_new_view_on_a_changed_one_is_built_beside_with_it() -> None:
    new = model("new", "materialized_view", "tile")
    apart = model("apart", "materialized_view", "raw")
    found = plan((RAW, changed(TILE), ROLLING, PLAIN, SINK, OTHER, new, apart))
    assert found.closure == ("tile", "rolling", "plain", "sink", "new")
    assert [relation.name for relation in found.of("create")] == ["new", "apart"]


def test_a_changed_sink_is_rebuilt_and_shows_no_credentials() -> None:
    text = SINK.sql.replace("region = 'a'", "region = 'b'").replace("'x'", "'hunter2'")
    sink = only(plan((RAW, TILE, ROLLING, PLAIN, changed(SINK, text), OTHER)))
    assert (sink.action, sink.how) == ("changed", "rebuild")
    assert "aws.region = 'b'" in sink.diff
    assert "hunter2" not in sink.diff


def test_layout_and_comments_alone_rebuild_nothing() -> None:
    found = plan((RAW, changed(TILE, "select\n  a -- the key\nfrom raw"), ROLLING, PLAIN, SINK, OTHER))
    assert (only(found).how, found.closure) == ("kept", ())
    assert "only its layout" in only(found).why


def test_changed_indexes_are_a_change() -> None:
    tile = only(
        plan((RAW, changed(TILE, TILE.sql, indexes='[{"columns": ["a"]}]'), ROLLING, PLAIN, SINK, OTHER))
    )
    assert (tile.how, tile.diff) == ("swap", 'its indexes become [{"columns": ["a"]}]')


def test_an_interrupted_creation_is_made_again() -> None:
    found = plan(PROJECT, records={"tile": Record("materialized_view", None, None, "creating")})
    assert (only(found).how, only(found).why) == ("swap", "the run that created it was interrupted")


def test_a_stranded_sink_is_rebuilt() -> None:
    left = "rolling_dbt_zero_down_tmp_20260101T0000"
    found = plan(PROJECT, reads={"sink": {left}}, objects={left: "materialized view"})
    assert (only(found).name, only(found).how) == ("sink", "rebuild")
    assert found.stranded == {"sink": f"it reads {left}, which was replaced by a swap"}
    assert found.leftovers == (left,)


def test_what_an_apply_left_is_reported_and_is_something_to_do() -> None:
    found = plan(
        PROJECT,
        records={
            "plan:0123abcd": Record("plan", None, "{}", "building"),
            "tile__next_0123abcd": Record("materialized_view", "c", "select", "deployed"),
        },
        objects={"tile__next_0123abcd": "materialized view"},
    )
    assert (found.relations, found.unfinished, found.leftovers) == (
        (),
        ("0123abcd",),
        ("tile__next_0123abcd",),
    )
    assert found.changes


BROKEN = ContractReview(
    (ContractChange("breaking", "engagement#watch", "gone"),), "breaking: set version to 2"
)


@pytest.mark.parametrize(
    ("models", "more", "why"),
    [
        ((RAW, changed(TILE), ROLLING, PLAIN, SINK, OTHER),
         {"reads": {"report": {"rolling"}}, "objects": {"report": "view"}},
         "rolling: report depends on it and is not"),
        ((RAW, changed(TILE), ROLLING, PLAIN, SINK), {}, ""),
        ((RAW, changed(TILE), ROLLING, PLAIN, OTHER), {},
         "rolling: sink depends on it and has no model any more"),
        ((RAW, changed(TILE, kind="view"), ROLLING, PLAIN, SINK, OTHER), {},
         "tile: it is a materialized view and would become a view"),
        ((changed(RAW, "select 1", kind="view"), TILE, ROLLING, PLAIN, SINK, OTHER), {},
         "raw: it is a table and would become a view"),
        ((changed(RAW, RAW.sql.replace("a int", "a bigint")), TILE, ROLLING, PLAIN, SINK, OTHER), {},
         "raw: it holds the events that arrived"),
        (PROJECT, {"contract": BROKEN}, "set version to 2"),
    ],
    ids=["reader of others", "orphan apart", "orphaned reader", "kind", "table to view", "column", "contract"],
)  # fmt: skip
def test_what_must_not_go_out_is_refused(models: Sequence[Model], more: dict[str, Any], why: str) -> None:
    found = plan(models, **more)
    assert why in "; ".join(found.refusals)
    assert bool(found.refusals) == bool(why)


def test_a_relation_of_others_is_refused_and_not_dropped() -> None:
    found = plan(PROJECT, deployed=PROJECT[:-1], objects={"other": "table"}, drop_orphans=True)
    assert only(found).action == "refused"
    assert "this project did not create" in found.refusals[0]
    assert found.to_drop == ()


def test_orphans_are_dropped_only_when_asked() -> None:
    models = (RAW, TILE, ROLLING, PLAIN, SINK)
    kept = plan(models)
    assert (only(kept).action, kept.to_drop, kept.changes) == ("orphaned", (), False)
    dropped = plan(models, drop_orphans=True)
    assert ([relation.name for relation in dropped.to_drop], dropped.changes) == (["other"], True)
    # One that stands on a changed relation would keep the old one from going.
    standing = (RAW, changed(TILE), ROLLING, PLAIN, OTHER)
    assert plan(standing).refusals
    assert plan(standing, drop_orphans=True).refusals == ()


FEED = model(
    "kafka_raw",
    "kafka_feed",
    "raw",
    text="""create source kafka_raw (data bytea)
with (
  topic = 'raw',
  properties.bootstrap.server = 'one:9092',
  properties.sasl.password = '${PREFS_KAFKA_SASL_PASSWORD}'
);
create sink kafka_raw_feed into raw as select data from kafka_raw""",
)
FED = (*PROJECT, FEED)
FEED_SINK = {"kafka_raw_feed": "sink"}


def fed(models: Sequence[Model], **more: Any) -> Plan:
    """The plan where `FED` is deployed, as v3.0.3 lists it: the feed is a source, and its sink has no model."""
    given = {"deployed": FED, "objects": FEED_SINK, **more}
    # The raw table counts as a reader of the sink into it (list_object_dependencies_impl).
    reads = {"kafka_raw": set[str](), "kafka_raw_feed": {"kafka_raw"}, "raw": {"kafka_raw_feed"}}
    return plan(models, **{**given, "reads": {**reads, **more.get("reads", {})}})


def test_with_kafka_a_second_plan_has_nothing_to_do() -> None:
    found = fed(FED)
    assert not found.changes, found.text()
    assert found.text().endswith("nothing to do: the deployed relations match the declarations")
    assert (found.refusals, found.leftovers) == ((), ())


def test_with_kafka_a_changed_model_leaves_the_feed_alone() -> None:
    found = fed((RAW, changed(TILE), ROLLING, PLAIN, SINK, OTHER, FEED))
    assert (only(found).name, only(found).how) == ("tile", "swap")
    assert found.closure == ("tile", "rolling", "plain", "sink")
    assert found.refusals == ()


def test_other_brokers_replace_the_feed_and_nothing_else() -> None:
    moved = changed(FEED, FEED.sql.replace("one:9092", "two:9092"))
    feed = only(found := fed((*PROJECT, moved)))
    assert (feed.name, feed.action, feed.how, feed.views, feed.sinks) == (
        "kafka_raw",
        "changed",
        "in place",
        (),
        (),
    )
    assert "-  properties.bootstrap.server = 'one:9092'" in feed.diff
    assert "+  properties.bootstrap.server = 'two:9092'" in feed.diff
    assert "PASSWORD" not in feed.diff
    assert (found.closure, found.refusals) == ((), ())


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"objects": {}}, "kafka_raw_feed, which fills its raw table, no longer exists"),
        ({"records": {"kafka_raw": Record("kafka_feed", None, None, "creating")}},
         "the run that created it was interrupted"),
        ({"records": {"kafka_raw": Record("kafka_feed", "another", recorded(FEED).definition, "deployed")}},
         "only its layout or comments differ"),
    ],
    ids=["without its sink", "interrupted", "another layout"],
)  # fmt: skip
def test_a_feed_that_is_not_whole_is_made_again_in_place(more: dict[str, Any], why: str) -> None:
    feed = only(fed(FED, **more))
    assert (feed.name, feed.action) == ("kafka_raw", "changed")
    assert why in feed.why
    assert feed.how == ("kept" if "layout" in why else "in place")


def test_what_a_feed_left_is_reported_and_an_orphaned_feed_can_go() -> None:
    left = fed(FED, objects={**FEED_SINK, "kafka_raw_next": "source", "somebodys_next": "source"})
    assert left.leftovers == ("kafka_raw_next",)
    # Kafka was unset: the feeds have no models any more.
    assert [relation.name for relation in fed(PROJECT).of("orphaned")] == ["kafka_raw"]
    assert [relation.name for relation in fed(PROJECT, drop_orphans=True).to_drop] == ["kafka_raw"]


def test_another_relation_under_a_feeds_name_is_refused() -> None:
    for kind in ("table", "materialized view"):
        found = fed(FED, objects={**FEED_SINK, "kafka_raw": kind})
        assert f"kafka_raw: it is a {kind} and would become a source" in found.refusals[0]


TABLE = """create table "public"."t" (
  a int not null,
  b numeric(10, 2) default '(,',
  primary key (a, b)
)
with (x = 1)"""


@pytest.mark.parametrize(
    ("after", "added"),
    [
        (TABLE, []),
        (TABLE.replace("\n  ", "  "), []),
        (TABLE.replace("  primary", "  c text,\n  primary"), ["c text"]),
        (TABLE.replace("  a int", "  c numeric(3, 1) default 0,\n  a int"), ["c numeric(3, 1) default 0"]),
        (TABLE.replace("a int", "a bigint"), None),
        (TABLE.replace("  a int not null,\n", ""), None),
        (TABLE.replace("(a, b)", "(a)"), None),
        (TABLE.replace("x = 1", "x = 2"), None),
        (TABLE.replace("primary key (a, b)", "primary key (a, b),\n  unique (b)"), None),
        (TABLE.replace("with (x = 1)", ""), None),
    ],
    ids=["same", "layout", "at the end", "at the start", "type", "removed", "key", "option", "constraint", "tail"],
)  # fmt: skip
def test_only_added_columns_are_an_addition(after: str, added: list[str] | None) -> None:
    assert added_columns(TABLE, after) == added


def test_python_and_dbt_name_the_query_of_a_kept_view_alike() -> None:
    """dbt runs without Python of ours, so that the suffix stands in a macro too."""
    macros = (EXAMPLE / "macros" / "engine" / "kept.sql").read_text()
    assert f'{{% macro query_suffix() -%}}\n  {{{{ return("{QUERY_SUFFIX}") }}}}\n' in macros


def test_what_is_made_again_is_swapped_with_all_that_reads_it() -> None:
    found = plan((RAW, changed(TILE, TILE.sql, anew=True), ROLLING, PLAIN, SINK, OTHER))
    tile = only(found)
    assert (tile.name, tile.action, tile.how, tile.diff) == ("tile", "changed", "swap", "")
    assert found.closure == ("tile", "rolling", "plain", "sink")
    # A table of messages is replaced too where it is asked for, and only there; its feed is not anybody's.
    feed = model("feed", "kafka_feed", "raw")
    found = plan(
        (changed(RAW, RAW.sql, anew=True), feed, TILE, ROLLING, PLAIN, SINK, OTHER),
        deployed=(*PROJECT, feed),
        reads={"feed": set(), "feed_feed": {"feed"}, "raw": {"feed_feed"}},
        objects={"feed_feed": "sink"},
    )
    assert found.refusals == ()
    assert set(found.closure) == {"raw", "feed", "tile", "rolling", "plain", "sink", "other"}
    assert "raw" not in plan((RAW, changed(TILE), ROLLING, PLAIN, SINK, OTHER)).closure
    # Its options may have changed, as its retention.
    kept = changed(RAW, f"{RAW.sql} with (retention_seconds = 7200)", anew=True)
    assert "raw" in plan((kept, TILE, ROLLING, PLAIN, SINK, OTHER)).closure
    # One that differs otherwise is judged as ever.
    text = RAW.sql.replace("primary key", "unique")
    assert plan((changed(RAW, text, anew=True), TILE, ROLLING, PLAIN, SINK, OTHER)).refusals
