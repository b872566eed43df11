"""An entity with a composite key, from its sink view to HTTP: provisioned, published, read, repaired, withdrawn."""

from __future__ import annotations

import json
import sys
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import quote

import openapi_spec_validator
import pytest
from declared import enrolments
from psycopg import sql
from served import running

from dagster_prefs.declarations.contract import diff_contracts, parse_contract
from dagster_prefs.declarations.registry import Registry, RegistryError, parse_registry, registry_dict
from dagster_prefs.declarations.reserved import canary_id
from dagster_prefs.dynamodb.items import ItemEncoder, ItemError
from dagster_prefs.dynamodb.lease import LEASE_IDS, Lease, read_lease
from dagster_prefs.dynamodb.publisher import KeySql, PublishError, PublishReport, publish_domain, publish_keys
from dagster_prefs.dynamodb.store import DomainStore
from dagster_prefs.dynamodb.tables import TableReport, dynamodb_client, provision
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.erasure.items import EntityItems
from dagster_prefs.freshness.online import online_lag
from dagster_prefs.freshness.reconcile import reconcile_domain
from dagster_prefs.ids import Id
from dagster_prefs.serving import AsyncProfileClient, ClientOptions, ProfileClient
from dagster_prefs.serving.generate import render_client
from dagster_prefs.serving.profiles import ProfileError

REGION = "eu-central-1"
AT = 1_760_000_000_000
KEY = "learning#course"
HARD = ("l/1 ä?#%", "c#1%23/x\"'")
# Different keys whose parts are one text where `#` were not encoded, and such that are alike otherwise.
NEAR = [HARD, ("a", "b#c"), ("a#b", "c"), ("a", "b%23c"), ("a", "b"), ("a", "c"), ("b", "a")]


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    return enrolments(tmp_path_factory.mktemp("declared"))


@dataclass
class School:
    """The sink view of the domain as a plain table, and its DynamoDB table."""

    engine: EngineConfiguration
    client: Any
    endpoint: str
    registry: Registry
    prefix: str
    table: TableReport

    def execute(self, statement: Any, parameters: Any = None) -> list[tuple[Any, ...]]:
        with self.engine.connect() as connection:
            cursor = connection.execute(statement, parameters)
            return cursor.fetchall() if cursor.description else []

    def put(self, id_: tuple[str | None, str | None], lessons: int) -> None:
        self.execute("delete from sink_learning_course where learner_id = %s and course_id = %s", id_)
        self.execute(
            "insert into sink_learning_course values (%s, %s, %s, %s, %s, %s)",
            [*id_, KEY, lessons, Decimal("1.5"), AT],
        )

    def publish(self) -> PublishReport:
        return publish_domain(self.store)

    @property
    def store(self) -> DomainStore:
        contract = self.registry.contract
        return DomainStore(self.engine, self.client, contract, contract.domain("course"), self.table)

    def held(self) -> dict[Id, int]:
        keys = self.registry.contract.tables["enrolment"]
        items = self.client.scan(TableName=self.table.name, ConsistentRead=True)["Items"]
        return {
            keys.split_key(item)[0]: int(item["course_lessons_7d"]["N"])
            for item in items
            if item["learner_id"]["S"] != LEASE_IDS["S"]
        }

    def options(self) -> dict[str, Any]:
        return {
            "entity": "enrolment",
            "endpoint_url": self.endpoint,
            "region": REGION,
            "table_prefix": self.prefix,
            "options": ClientOptions(30, read_timeout_seconds=30),
        }


@pytest.fixture
def school(database: EngineConfiguration, dynamodb_endpoint: str, registry: Registry) -> Iterator[School]:
    schema = f"composite_{uuid.uuid4().hex[:12]}"
    with database.connect() as connection:
        connection.execute(sql.SQL("create schema {}").format(sql.Identifier(schema)))
    client = dynamodb_client(dynamodb_endpoint, REGION)
    tables = provision(client, registry.contract, prefix=f"{schema}_")
    made = School(
        replace(database, schema=schema),
        client,
        dynamodb_endpoint,
        registry,
        f"{schema}_",
        tables["enrolment"],
    )
    made.execute(
        "create table online_published (table_id text, domain_key text, entity_key text, fingerprint text, "
        "primary key (table_id, domain_key, entity_key))"
    )
    made.execute("create table deployments (relation text, deployed_at timestamptz)")
    made.execute(
        "create table sink_learning_course (learner_id text, course_id text, domain_key text,"
        " course_lessons_7d bigint, course_minutes_28d numeric, last_event_at bigint)"
    )
    made.execute("create view course_progress_rolling as select * from sink_learning_course")
    yield made
    for table in tables.values():
        client.delete_table(TableName=table.name)
    with database.connect() as connection:
        connection.execute(sql.SQL("drop schema {} cascade").format(sql.Identifier(schema)))


def test_the_contract_has_all_keys(registry: Registry) -> None:
    table = registry.contract.tables["enrolment"]
    assert [(key.name, key.type) for key in table.columns] == [("learner_id", "S"), ("course_id", "S")]
    assert parse_registry(registry_dict(registry)).contract == registry.contract
    assert "rest_keys" not in registry_dict(registry)["contract"]["tables"]["learner"]
    assert list(registry.contract.domains[KEY].attributes) == [
        "course_lessons_7d", "course_minutes_28d", "last_event_at",
    ]  # fmt: skip
    content = registry_dict(registry)
    content["contract"]["tables"]["enrolment"].pop("rest_keys")
    with pytest.raises(
        RegistryError, match=r"enrolment_profiles by learner_id \(S\), and the entity says .*course_id"
    ):
        parse_registry(content)
    (change,) = diff_contracts(registry.contract, parse_contract(content["contract"]))
    assert (change.kind, change.path) == ("breaking", "tables.enrolment.rest_keys")


def test_only_given_keys_are_published(school: School) -> None:
    keys = school.registry.contract.tables["enrolment"]
    for number, id_ in enumerate(NEAR):
        school.put(id_, number)
    first, second, *_ = NEAR
    given = [keys.key_text(id_) for id_ in (first, second)]
    with school.store.engine.connect() as connection:
        report = publish_keys(school.store, given, connection)
    assert (report.upserts, report.deletes, report.unchanged) == (2, 0, 0)
    assert school.held() == {first: 0, second: 1}
    school.execute("delete from sink_learning_course where learner_id = %s and course_id = %s", first)
    school.put(second, 7)
    with school.store.engine.connect() as connection:
        report = publish_keys(school.store, given[:1], connection)
    assert (report.upserts, report.deletes) == (0, 1)
    assert school.held() == {second: 1}
    assert publish_domain(school.store).upserts == len(NEAR) - 1
    assert school.held() == {id_: 7 if id_ == second else number for number, id_ in enumerate(NEAR) if number}


def test_every_key_is_published_read_and_withdrawn(school: School) -> None:
    for number, id_ in enumerate(NEAR):
        school.put(id_, number)
    assert (school.publish().upserts, school.publish().unchanged) == (len(NEAR), len(NEAR))
    assert school.held() == {id_: number for number, id_ in enumerate(NEAR)}
    assert school.client.get_item(
        TableName=school.table.name,
        Key={"learner_id": {"S": "a"}, "domain_key": {"S": "learning#course#b%23c"}},
    )["Item"]["course_lessons_7d"] == {"N": "1"}
    with ProfileClient(school.registry, **school.options()) as client:
        assert client.get(HARD).course.course_minutes_28d == Decimal("1.5")
        many = client.get_many([*NEAR, ("a", "nothing")])
        assert [many[id_].course.course_lessons_7d for id_ in NEAR] == list(range(len(NEAR)))
        assert many[("a", "nothing")].cold_start
        found = many[HARD]
        assert (found.id, found.learner_id, found.course_id) == (HARD, *HARD)
        assert {name: found.as_dict()[name] for name in ("learner_id", "course_id")} == {
            "learner_id": HARD[0], "course_id": HARD[1],
        }  # fmt: skip
        for given, message in (
            ("a", r"an id is a tuple of 2 values \(learner_id, course_id\), not 'a'"),
            (("a",), "an id is a tuple of 2 values"),
            (("a", 7), "course_id must be a text, not 7"),
            (("a", ""), "course_id must be a text of 1 to"),
        ):
            with pytest.raises(ProfileError, match=message):
                client.get(given)

    # A key that leaves the view leaves the table, alone.
    school.execute("delete from sink_learning_course where learner_id = 'a' and course_id = 'b#c'")
    assert (school.publish().deletes, len(school.held())) == (1, len(NEAR) - 1)

    # Erasing a learner takes the whole partition, and what the publisher remembers of it.
    keys = school.registry.contract
    items = EntityItems(school.client, keys, "enrolment", school.table.name, "a", datetime.now(UTC))
    assert items.keys() == ["learning#course#b", "learning#course#b%2523c", "learning#course#c"]
    school.execute("delete from sink_learning_course where learner_id = 'a'")
    assert items.withdraw(school.engine) == 3
    assert set(school.held()) == {HARD, ("a#b", "c"), ("b", "a")}
    assert school.execute("select count(*) from online_published") == [(3,)]


def test_rows_that_cannot_become_items_are_named(school: School) -> None:
    school.put(("a", None), 1)
    with pytest.raises(PublishError, match="1 rows without learner_id and course_id"):
        school.publish()
    school.execute("delete from sink_learning_course")
    school.put(("a", "#" * 400), 1)
    school.put(("a", "b"), 1)
    with pytest.raises(
        PublishError, match="enrolment 'a': its sort key has 1216 bytes, and DynamoDB accepts 1024"
    ):
        school.publish()
    assert set(school.held()) == {("a", "b")}
    encoder = ItemEncoder(school.registry.contract, school.registry.contract.domain("course"))
    with pytest.raises(ItemError, match="sort key has 1025 bytes"):
        encoder.encode(("a", "x" * 1009), [0, Decimal(0), AT])


def test_the_comparison_finds_what_differs_and_repairs_it(school: School) -> None:
    for number, id_ in enumerate(NEAR):
        school.put(id_, number)
    school.publish()
    # What a publisher of RisingWave's changes keeps beside the items is none of them.
    lease = Lease(school.store, label="test", mode="once", lease_seconds=300)
    assert lease.acquire(threading.Event(), 0.0)
    held = read_lease(school.store.items, school.store.domain)
    assert held is not None
    assert (held.holder, held.sequence) == (lease.state.holder, lease.state.sequence)
    school.execute("update sink_learning_course set course_lessons_7d = 99 where course_id = 'b#c'")
    school.client.delete_item(TableName=school.table.name, Key=school.store.keys.typed_key(KEY, HARD))
    school.execute("delete from sink_learning_course where learner_id = 'b'")
    school.execute("insert into deployments values ('course_progress_rolling', now())")
    for count_rows in (True, False):
        lag = online_lag(school.store, now=datetime.now(UTC) + timedelta(seconds=1), count_rows=count_rows)
        assert [(one.id, one.kind) for one in lag.differences] == [
            (("a", "b#c"), "different"),
            (("b", "a"), "extra"),
            (HARD, "missing"),
        ]
    repaired = reconcile_domain(school.store, now=datetime.now(UTC))
    assert (repaired.different, repaired.missing, repaired.extra) == (1, 1, 1)
    assert school.held() == {
        id_: 99 if id_ == ("a", "b#c") else number for number, id_ in enumerate(NEAR[:-1])
    }


def test_over_http_as_the_document_says(school: School) -> None:
    for number, id_ in enumerate(NEAR):
        school.put(id_, number)
    school.put(canary_id(school.registry, school.registry.entity("enrolment")), 1)  # type: ignore[arg-type]
    school.publish()
    with running(AsyncProfileClient(school.registry, **school.options()), None) as caller:
        _, document = caller.get("/openapi.json")
        openapi_spec_validator.validate(document)
        path = "/v1/profiles/{learner_id}/{course_id}"
        names = [one["name"] for one in document["paths"][path]["get"]["parameters"]]
        assert names[:2] == ["learner_id", "course_id"]
        status, one = caller.get("/v1/profiles/" + "/".join(quote(part, safe="") for part in HARD))
        assert (status, one["learner_id"], one["course_id"]) == (200, *HARD)
        assert one["domains"]["course"]["attributes"]["course_lessons_7d"] == 0
        # How fresh it is, by the canary's own item.
        assert one["domains"]["course"]["freshness_seconds"] is not None
        asked = [{"learner_id": learner, "course_id": course} for learner, course in NEAR]
        status, many = caller.post({"keys": asked})
        assert (status, [each["course_id"] for each in many["profiles"]]) == (200, [id_[1] for id_ in NEAR])
        for path, said in (
            ("/v1/profiles/a", "a key has 2 parts, learner_id/course_id, and the path has 1"),
            ("/v1/profiles/a/b/c", "the path has 3: give each, with %2F for a slash within one"),
        ):
            status, answer = caller.get(path)
            assert status == 400
            assert said in answer["error"]["message"]
        status, answer = caller.post({"keys": [{"learner_id": "a"}]})
        assert (status, "a key is an object with learner_id, course_id" in answer["error"]["message"]) == (
            400,
            True,
        )
        assert caller.ready()["ready"]


def test_a_generated_client_knows_the_parts(school: School, monkeypatch: pytest.MonkeyPatch) -> None:
    text = render_client(school.registry.contract)
    assert "self, id_: tuple[str, str], /, domains" in text
    made = ModuleType("enrolments")
    monkeypatch.setitem(sys.modules, "enrolments", made)
    exec(compile(text, "enrolments.py", "exec"), made.__dict__)
    school.put(HARD, 3)
    school.publish()
    options = school.options()
    with made.EnrolmentClient(school.registry, **options) as client:
        found = client.get(HARD)
    assert (found.learner_id, found.course_id, found.course.course_lessons_7d) == (*HARD, 3)


def test_the_engine_and_python_write_one_key(school: School) -> None:
    table = school.registry.contract.tables["enrolment"]
    for number, id_ in enumerate(NEAR):
        school.put(id_, number)
    # As the macro `sort_key` has it for RisingWave's sink, and as the publisher compares keys.
    macros = (Path(__file__).parents[2] / "dbt_project" / "macros" / "reserved.sql").read_text()
    part = "replace(replace({{ column }}::text, '%', '%25'), '#', '%23')"
    assert part in macros
    macro = sql.SQL("domain_key || '#' || " + part.replace("{{ column }}", "course_id"))
    rows = school.execute(
        sql.SQL("select learner_id, course_id, {}, {} from sink_learning_course as s").format(
            KeySql(table).text, macro
        )
    )
    assert len(rows) == len(NEAR)
    for learner, course, whole, sort in rows:
        id_ = (learner, course)
        assert (whole, table.parse_key(whole)) == (table.key_text(id_), id_)
        assert sort == table.sort_text(KEY, id_)
        assert table.split_key(json.loads(json.dumps(table.typed_key(KEY, id_)))) == (id_, KEY)
