"""Changed projects in dbt itself: a new topic, one business alone, and a key of another type on the embedded engine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlglot
from project_copies import EXAMPLE, FOREIGN, Copy
from sqlglot import exp

from dagster_prefs.declarations.contract import deployed_contract
from dagster_prefs.declarations.generate import generate_files
from dagster_prefs.declarations.lineage import ROWS, Column, Lineage
from dagster_prefs.declarations.registry import load_registry
from dagster_prefs.declarations.trace import DIALECT, trace_all
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.engine.dbt import Dbt, DbtError, compile_queries

pytestmark = pytest.mark.slow

NOWHERE = {
    kind: EngineConfiguration("127.0.0.1", 1, "any", "any", schema="public", kind=kind)  # type: ignore[arg-type]
    for kind in ("local", "risingwave")
}


def compiled(project: Path, target: Path, engine: str) -> dict[str, str]:
    """Model → its SQL, as this engine would get it with everything switched on; no engine is asked."""
    environment = {
        "PREFS_KAFKA_BOOTSTRAP": "kafka:9092",
        "PREFS_EXPORT": "sink",
        "PREFS_ICEBERG_WAREHOUSE": "s3://lake",
    }
    manifest = Dbt(NOWHERE[engine], project, target / engine, environment).compiled_manifest()
    # Compiling a project's tests takes longer than its models, and nothing reads them.
    assert {node["resource_type"] for node in manifest["nodes"].values() if node.get("compiled")} == {"model"}
    return {
        node["name"]: node["compiled_code"]
        for node in manifest["nodes"].values()
        if node["resource_type"] == "model"
    }


SEARCH = {
    "models/engagement/search_events.yml": """\
models:
  - name: search_events
    description: A viewer searched the catalogue.
    config:
      meta:
        topic: { kafka_topic: search_events, identity: event_id, entity: viewer, time: searched_at }
    columns:
      - { name: event_id, data_type: text, description: Identity of the event. }
      - { name: viewer_id, data_type: bigint, description: Who searched. }
      - { name: query, data_type: text, description: Typed., config: { meta: { optional: true, max_bytes: 1024 } } }
      - { name: results, data_type: int, description: How many were found., config: { meta: { min: 0 } } }
      - { name: searched_at, data_type: timestamptz, description: When. }
""",
    "models/engagement/viewer_searches_1d.sql": """\
select
  viewer_id,
  {{ utc_date("searched_at") }} as search_date,
  count(*) as searches,
  count(*) filter (where results = 0) as fruitless,
  max(searched_at) as last_event_at
from {{ ref("search_events") }}
group by viewer_id, {{ utc_date("searched_at") }}
""",
    "models/engagement/viewer_searches_1d.yml": """\
models:
  - name: viewer_searches_1d
    description: Searches of a viewer and UTC day.
    config:
      indexes: [{ columns: [viewer_id, search_date], unique: true }]
      meta: { tile: { entity: viewer, day: search_date } }
    columns:
      - { name: viewer_id, data_type: bigint, description: The viewer. }
      - { name: search_date, data_type: date, description: UTC day. }
      - { name: searches, data_type: bigint, description: Searches. }
      - { name: fruitless, data_type: bigint, description: Searches that found nothing. }
      - { name: last_event_at, data_type: timestamptz, description: Newest event. }
""",
    "models/engagement/viewer_search_rolling.sql": """\
select
  viewer_id,
  {{ domain_key() }} as domain_key,
  sum(fruitless)::bigint as fruitless_searches,
  count(*) as active_days,
  {{ epoch_ms("max(last_event_at)") }} as last_event_at
from {{ ref("viewer_searches_1d") }}
where {{ within_window("search_date", "viewer_id", var("windows").long) }}
group by viewer_id
""",
    "models/engagement/viewer_search_rolling.yml": """\
models:
  - name: viewer_search_rolling
    description: What a viewer searched in vain.
    config:
      indexes: [{ columns: [viewer_id], unique: true }]
      meta: { domain: { key: "engagement#search", owner: search@example.com } }
    columns:
      - { name: viewer_id, data_type: bigint, description: The viewer., data_tests: [not_null] }
      - { name: domain_key, data_type: text, description: The domain., data_tests: [not_null] }
      - { name: fruitless_searches, data_type: bigint, description: Searches without results., data_tests: [not_null] }
      - { name: active_days, data_type: bigint, description: Days., config: { meta: { retired: true } } }
      - { name: last_event_at, data_type: bigint, description: Newest event., data_tests: [not_null] }
""",
}


def test_a_topic_with_a_tile_and_a_domain_is_five_files(
    copy_of: Callable[[Path], Copy], tmp_path: Path
) -> None:
    copy = copy_of(EXAMPLE)
    for path, text in SEARCH.items():
        copy.write(path, text)
    changed = generate_files(copy.folder, compile_queries)
    assert {
        f"models/generated/{name}.sql"
        for name in (
            "events/raw_search_events", "events/kafka_search_events", "events/search_events_parsed",
            "events/search_events",
            "events/rejected_events", "operations/ingest_progress", "operations/tile_fingerprints",
            "sinks/sink_engagement_search", "sinks/sink_training_searches",
        )
    } <= set(changed)  # fmt: skip
    registry = load_registry(copy.folder)
    domain = registry.contract.domains["engagement#search"]
    assert (domain.name, domain.entity, domain.sink, domain.owner) == (
        "search", "viewer", "sink_engagement_search", "search@example.com",
    )  # fmt: skip
    assert domain.attributes["fruitless_searches"].type == "integer"
    assert registry.contract.freshness.topics["search_events"].error_seconds == 5
    assert registry.tiles["viewer_searches_1d"].metric == ("searches", "fruitless")
    assert (
        f"interval '{registry.variables['windows']['long'] + 1} days'"
        in registry.queries["viewer_search_rolling"]
    )
    fields = registry.topics["search_events"].by_name
    assert (fields["event_id"].max_bytes, fields["query"].max_bytes, fields["results"].minimum) == (
        256,
        1024,
        0,
    )
    for engine in NOWHERE:
        sql = compiled(copy.folder, tmp_path, engine)
        assert "'missing results'" in sql["search_events_parsed"]
        assert "'negative results'" in sql["search_events_parsed"]
        assert "'engagement#search'::text as domain_key" in sql["viewer_search_rolling"]
        assert "'viewer_searches_1d' as tile" in sql["tile_fingerprints"]
    # Of the last engine, RisingWave.
    assert "table = 'viewer_profiles'" in sql["sink_engagement_search"]
    items = "as select viewer_id, domain_key, fruitless_searches, last_event_at from"
    assert items in sql["sink_engagement_search"]
    assert "primary_key = 'viewer_id,search_date'" in sql["sink_training_searches"]


@pytest.mark.parametrize(
    ("removed", "topics", "domains"),
    [
        ("engagement", {"user.events", "items"}, set()),
        (
            "shop",
            {"view_events", "content_interactions"},
            set(load_registry(EXAMPLE).contract.domains),
        ),
    ],
)
def test_either_business_goes_by_removing_its_folder(
    copy_of: Callable[[Path], Copy], tmp_path: Path, removed: str, topics: set[str], domains: set[str]
) -> None:
    copy = copy_of(EXAMPLE)
    shutil.rmtree(copy.folder / "models" / removed)
    generate_files(copy.folder, copy.compiled if domains else compile_queries)
    registry = load_registry(copy.folder)
    assert set(registry.topics) == topics
    assert set(registry.contract.domains) == domains
    assert set(registry.contract.freshness.topics) == topics - {"items"}
    sql = compiled(copy.folder, tmp_path, "local")
    assert {f"raw_{topic.relation}" for topic in registry.topics.values()} < set(sql)
    assert ("tile_fingerprints" in sql) == bool(domains)


@pytest.mark.parametrize("engine", list(NOWHERE))
def test_the_foreign_project_compiles(tmp_path: Path, engine: str) -> None:
    sql = compiled(FOREIGN, tmp_path, engine)
    assert "learner_id not like 'canary:%'" in sql["tile_fingerprints"]
    assert "learner_id = 'canary:prefs'" in sql["lesson_events_parsed"]
    assert "subject_kind = 'learner'" in sql["lesson_events"]
    check_the_step_from_fields_to_columns(sql)


def check_the_step_from_fields_to_columns(sql: dict[str, str]) -> None:
    """That each column of a typed event is the field of its name, which lineage takes from the declaration."""
    registry = load_registry(FOREIGN)
    topic = registry.topics["lesson_events"]
    tree = sqlglot.parse_one(sql[topic.parsed], dialect=DIALECT)
    place = ["source", "source_partition", "source_offset", "kafka_timestamp", "arrived_at", "data", "j"]
    fields = sqlglot.parse_one("select * from message", dialect=DIALECT)
    next(cte for cte in tree.find_all(exp.CTE) if cte.alias == "messages").set("this", fields)

    def field(node: exp.Expr) -> exp.Expr:
        json = (exp.JSONExtract, exp.JSONExtractScalar, exp.JSONBExtract, exp.JSONBExtractScalar)
        if isinstance(node, json) and isinstance(node.this, exp.Column) and node.this.name == "j":
            return exp.column(str(next(node.expression.find_all(exp.Literal, exp.JSONPathKey)).this))
        return node

    # Where texts are made of the fields; what is rejected is judged later, of the same document.
    texts = next(cte for cte in tree.find_all(exp.CTE) if cte.alias == "texts")
    texts.set("this", texts.this.transform(field))
    queries = {"parsed": tree.sql(DIALECT)}
    queries["typed"] = sql[topic.relation].replace(topic.parsed, "parsed")
    traced = trace_all(queries, {"message": [*place, *topic.by_name]}, {})
    assert [one.untraced for one in traced.values()] == ["", ""]
    lineage = Lineage(registry.topics, registry.entities, traced)
    for name in topic.by_name:
        read = lineage.sources(Column("parsed", name))
        assert {one.name for one, kinds in read.items() if kinds - ROWS} == {name}
        read = lineage.sources(Column("typed", name))
        assert {one for one, kinds in read.items() if kinds - ROWS} == {Column("parsed", name)}
        # What the lineage says of a field's part in every row, besides validity, place and erasures.
        declared = lineage.sources(Column(topic.relation, name))
        rows = {one.name for one, kinds in read.items() if kinds & ROWS and one.of == "parsed"}
        assert {one.name for one, kinds in declared.items() if kinds & ROWS} == rows - {"reason", *place}


def test_a_spread_of_text_keys_goes_by_their_hash(tmp_path: Path) -> None:
    dbt = Dbt(NOWHERE["local"], FOREIGN, tmp_path, {"PREFS_EXPIRY_SPREAD_SECONDS": "3600"})
    sql = dbt.compiled(["learner_progress_rolling"])["learner_progress_rolling"]
    assert "md5(learner_id)" in sql
    assert "% 3600 * interval '1 second'" in sql


LEARNER = "0f8fad5b-d9cb-469f-a165-70867728950e"


def event(number: int, **changes: Any) -> bytes:
    body = {
        "event_id": f"e{number}", "learner_id": LEARNER, "event_type": "started", "subject": "sums", "seconds": 60,
        "happened_at": "2026-03-15T10:00:00Z",
    }  # fmt: skip
    return json.dumps(body | changes).encode()


def test_a_uuid_is_one_word_and_runs(courses_copy: Copy, engine: EngineConfiguration) -> None:
    courses_copy.change("dbt_project.yml", "learner_id: text", "learner_id: uuid")
    generate_files(courses_copy.folder, courses_copy.compiled)
    dbt = Dbt(engine, courses_copy.folder, courses_copy.folder / "target")
    assert all(result.ok for result in dbt.run("run"))
    # An attribute that is retired stays in the view, which is not made again, and leaves the recorded contract.
    minutes = "description: Minutes spent in the 28-day window., data_tests: [not_null]"
    courses_copy.change(
        "models/learner_progress_rolling.yml", minutes, f"{minutes}, config: {{ meta: {{ retired: true }} }}"
    )
    generate_files(courses_copy.folder, courses_copy.compiled)
    messages = [
        event(1),
        event(2, learner_id=LEARNER.upper(), event_type="finished"),
        event(3, learner_id="somebody"),
        event(4, learner_id="00000000-0000-0000-0000-000000000000"),
        event(5, event_type="slept"),
        event(6, learner_id="9f8fad5b-d9cb-469f-a165-70867728950e"),
    ]
    with engine.connect() as connection:
        for offset, body in enumerate(messages):
            connection.execute("insert into raw_lesson_events values ('file:a', 0, %s, %s)", [offset, body])
        connection.execute(
            "insert into erased_subjects values ('learner', '9f8fad5b-d9cb-469f-a165-70867728950e', '2026-04-01Z')"
        )
        connection.execute(f"alter database {engine.database} set prefs.clock = '2026-03-16T12:00:00Z'")
        connection.execute("update raw_lesson_events set arrived_at = '2026-03-15T10:00:01Z'")
    assert all(result.ok for result in dbt.run("run"))
    with engine.connect() as connection:

        def rows(query: str) -> list[tuple[Any, ...]]:
            return connection.execute(query).fetchall()  # type: ignore[arg-type]

        assert rows("select event_id, learner_id from lesson_events order by 1") == [
            ("e1", LEARNER),
            ("e2", LEARNER),
        ]
        assert rows('select "offset", reason from rejected_events order by 1') == [
            (2, "bad learner_id"), (3, "reserved learner_id"), (4, "unknown event_type"),
        ]  # fmt: skip
        assert rows(
            "select learner_id, domain_key, lessons_7d, favorite_subjects from learner_progress_rolling"
        ) == [(LEARNER, "learning#progress", 1, ["sums"])]
        assert rows("select tile, row_count, metric_total::int from tile_fingerprints") == [
            ("learner_lessons_1d", 1, 120)
        ]
        assert rows("select minutes_28d is not null from learner_progress_rolling") == [(True,)]
        (record,) = rows("select definition from deployments where kind = 'contract'")
    # What the engine records of the contract is what the registry says, with all that the YAML leaves out.
    contract = load_registry(courses_copy.folder).contract
    assert deployed_contract([json.loads(record[0])]) == contract
    assert list(contract.domains["learning#progress"].retired) == ["minutes_28d"]

    # dbt by itself refuses what was not generated from: a model's SQL, its YAML, and a variable of the command line.
    courses_copy.change(
        "models/learner_lessons_1d.sql", "coalesce(sum(seconds), 0)", "coalesce(sum(seconds), 1)"
    )
    courses_copy.change(
        "models/lesson_events.yml", "optional: true, min: 0", "optional: true, min: 0, max: 9"
    )
    message = (
        r"the project is not what registry\.json was generated from: models/learner_lessons_1d\.sql \(changed\), "
        r"models/lesson_events\.yml \(changed\), the variable windows \(changed\): undo it, or run `prefs generate`"
    )
    with pytest.raises(DbtError, match=message):
        dbt.run("run", arguments=["--vars", "{windows: {short: 7, long: 29}}"])


def test_dbt_refuses_a_window_of_no_days_that_only_compiling_shows(courses_copy: Copy) -> None:
    courses_copy.change(
        "models/learner_progress_rolling.sql", 'var("windows").short', 'var("windows").short - 7'
    )
    message = (
        r"within_window\(.*, 0\) in learner_progress_rolling: "
        "the days of a window must be a whole number of at least 1"
    )
    with pytest.raises(DbtError, match=message):
        compile_queries(courses_copy.folder, ["learner_progress_rolling"])
