"""A project with other events and a text key, from its sink view to HTTP: provisioned, published, read, withdrawn."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import threading
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import quote

import openapi_spec_validator
import pytest
from declared import COURSES, two_entities
from openapi_schema_validator import OAS30Validator
from psycopg import sql
from shipped import SHORT

from dagster_prefs.cli import cli
from dagster_prefs.declarations.registry import Registry, parse_registry, registry_dict
from dagster_prefs.dynamodb.items import ItemEncoder
from dagster_prefs.dynamodb.lease import LEASE_IDS
from dagster_prefs.dynamodb.publisher import PublishError, PublishReport, publish_domain
from dagster_prefs.dynamodb.store import DomainStore
from dagster_prefs.dynamodb.tables import TableReport, dynamodb_client, provision
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.erasure.items import EntityItems
from dagster_prefs.freshness.online import online_lag, text_between
from dagster_prefs.freshness.reconcile import reconcile_domain
from dagster_prefs.serving import AsyncProfileClient, ClientOptions, ProfileClient
from dagster_prefs.serving.connections import ConnectionLimits
from dagster_prefs.serving.generate import render_client
from dagster_prefs.serving.profiles import ProfileError
from dagster_prefs.serving.server import make_app, make_server

ROOT = Path(__file__).resolve().parents[2]
REGION = "eu-central-1"
AT = 1_760_000_000_000
LEARNER = "l/1 ä?#"
KEY = "learning#progress"


@dataclass
class School:
    """The sink view of the project's one domain as a plain table, and its DynamoDB table."""

    engine: EngineConfiguration
    client: Any
    endpoint: str
    registry: Registry
    prefix: str
    tables: dict[str, TableReport]

    @property
    def table(self) -> TableReport:
        return self.tables["learner"]

    def execute(self, statement: Any, parameters: Any = None) -> list[tuple[Any, ...]]:
        with self.engine.connect() as connection:
            cursor = connection.execute(statement, parameters)
            return cursor.fetchall() if cursor.description else []

    def put(
        self, learner: str | None, lessons: int, minutes: str, subjects: list[str] | None, at: int = AT
    ) -> None:
        self.execute("delete from sink_learning_progress where learner_id = %s", [learner])
        self.execute(
            "insert into sink_learning_progress values (%s, %s, %s, %s, %s, %s)",
            [learner, KEY, lessons, Decimal(minutes), subjects, at],
        )

    def publish(self) -> PublishReport:
        return publish_domain(self.store)

    @property
    def store(self) -> DomainStore:
        contract = self.registry.contract
        return DomainStore(self.engine, self.client, contract, contract.domain("progress"), self.table)

    def learners(self) -> list[str]:
        items = self.client.scan(TableName=self.table.name, ConsistentRead=True)["Items"]
        return sorted(item["learner_id"]["S"] for item in items)

    def options(self) -> dict[str, Any]:
        return {
            "endpoint_url": self.endpoint,
            "region": REGION,
            "table_prefix": self.prefix,
            "options": ClientOptions(30, read_timeout_seconds=30),
        }

    def reader(self, **more: Any) -> ProfileClient:
        return ProfileClient(self.registry, **self.options(), **more)


@pytest.fixture
def school(database: EngineConfiguration, dynamodb_endpoint: str, courses: Registry) -> Iterator[School]:
    schema = f"courses_{uuid.uuid4().hex[:12]}"
    with database.connect() as connection:
        connection.execute(sql.SQL("create schema {}").format(sql.Identifier(schema)))
    client = dynamodb_client(dynamodb_endpoint, REGION)
    tables = provision(client, courses.contract, prefix=f"{schema}_")
    made = School(replace(database, schema=schema), client, dynamodb_endpoint, courses, f"{schema}_", tables)
    made.execute(
        "create table online_published (table_id text, domain_key text, entity_key text, fingerprint text, "
        "primary key (table_id, domain_key, entity_key))"
    )
    made.execute("create table deployments (relation text, deployed_at timestamptz)")
    made.execute(
        "create table sink_learning_progress (learner_id text, domain_key text, lessons_7d bigint,"
        " minutes_28d numeric, favorite_subjects text[], last_event_at bigint)"
    )
    made.execute("create view learner_progress_rolling as select * from sink_learning_progress")
    yield made
    client.delete_table(TableName=made.table.name)
    with database.connect() as connection:
        connection.execute(sql.SQL("drop schema {} cascade").format(sql.Identifier(schema)))


def test_provisioning_makes_the_entitys_table(school: School) -> None:
    assert list(school.tables) == ["learner"]
    assert (school.table.entity, school.table.name) == ("learner", f"{school.prefix}learner_profiles")
    described = school.client.describe_table(TableName=school.table.name)["Table"]
    assert {
        entry["AttributeName"]: entry["AttributeType"] for entry in described["AttributeDefinitions"]
    } == {
        "learner_id": "S",
        "domain_key": "S",
    }


def test_what_is_published_is_read_and_withdrawn(school: School) -> None:
    school.put(LEARNER, 3, "12.500000", ["sql", "go"])
    school.put("l2", 0, "0", None)
    assert (school.publish().upserts, school.publish().unchanged) == (2, 2)
    with school.reader() as client:
        found = client.get(LEARNER)
        many = client.get_many([LEARNER, "l2", "l3"])
    assert (found.id, found.learner_id) == (LEARNER, LEARNER)
    assert (found.progress.lessons_7d, found.progress.minutes_28d) == (3, Decimal("12.5"))
    assert found.progress.favorite_subjects == ["sql", "go"]
    assert found.as_dict()["learner_id"] == LEARNER
    assert [profile.reads["progress"].state for profile in many.values()] == ["found", "found", "cold_start"]
    assert many["l2"].progress.favorite_subjects is None

    school.execute("delete from sink_learning_progress where learner_id = 'l2'")
    school.put(LEARNER, 4, "12.5", ["sql", "go"])
    report = school.publish()
    assert (report.upserts, report.deletes, school.learners()) == (1, 1, [LEARNER])

    items = EntityItems(
        school.client, school.registry.contract, "learner", school.table.name, LEARNER, datetime.now(UTC)
    )
    assert items.keys() == [KEY]
    school.execute("delete from sink_learning_progress")
    assert items.withdraw(school.engine) == 1
    assert school.learners() == []
    assert school.execute("select count(*) from online_published") == [(0,)]


def test_rows_without_a_key_and_keys_that_are_too_long_are_named(school: School) -> None:
    school.put(None, 1, "1", None)
    with pytest.raises(PublishError, match="1 rows without learner_id"):
        school.publish()
    school.execute("delete from sink_learning_progress")
    school.put("x" * 2049, 1, "1", None)
    school.put("l1", 1, "1", None)
    with pytest.raises(PublishError, match="its key has 2049 bytes, and DynamoDB accepts 1 to 2048"):
        school.publish()
    assert school.learners() == ["l1"]


def test_the_comparison_finds_what_differs_and_repairs_it(school: School) -> None:
    for number in range(5):
        school.put(f"l{number}", number, "1", None)
    school.publish()
    school.execute("update sink_learning_progress set lessons_7d = 9 where learner_id = 'l1'")
    key = {"learner_id": {"S": "l2"}, "domain_key": {"S": KEY}}
    school.client.delete_item(TableName=school.table.name, Key=key)
    school.execute("delete from sink_learning_progress where learner_id = 'l3'")
    school.execute("insert into deployments values ('learner_progress_rolling', now())")
    for count_rows in (True, False):
        lag = online_lag(school.store, now=datetime.now(UTC) + timedelta(seconds=1), count_rows=count_rows)
        assert [(one.id, one.kind) for one in lag.differences] == [
            ("l1", "different"),
            ("l2", "missing"),
            ("l3", "extra"),
        ]
    repaired = reconcile_domain(school.store, now=datetime.now(UTC))
    assert (repaired.different, repaired.missing, repaired.extra) == (1, 1, 1)
    assert school.learners() == ["l0", "l1", "l2", "l4"]


@pytest.mark.parametrize(
    ("low", "high"),
    [("", ""), ("a", "b"), ("u-0001", "u-9999"), ("\u0001", "\U0010ffff"), ("-1", "99"), ("x", "x")],
)
def test_a_place_between_two_keys(low: str, high: str) -> None:
    places = [text_between(low, high, share) for share in (0.0, 0.3, 0.5, 0.9)]
    assert places == sorted(places)
    for place in places:
        # Three characters after what both have in common say enough.
        assert low[: len(place)] <= place <= high
        assert "\0" not in place
        place.encode()


def test_ids_of_another_type_are_named(school: School) -> None:
    with school.reader() as client:
        for given, message in (
            (7, "learner_id must be a text, not 7"),
            ("", "learner_id must be a text of 1 to 2,048 bytes without NUL"),
            ("x" * 2049, "learner_id must be a text of 1 to 2,048 bytes"),
        ):
            with pytest.raises(ProfileError, match=message):
                client.get(given)


def test_a_lease_lies_where_no_learner_is(school: School, courses: Registry) -> None:
    from dagster_prefs.declarations.reserved import is_reserved
    from dagster_prefs.dynamodb.lease import Lease

    lease = Lease(school.store, label="test", mode="once", lease_seconds=300)
    assert lease.acquire(threading.Event(), 0.0)
    lease.release()
    assert school.learners() == [LEASE_IDS["S"]]
    assert is_reserved(courses.entity("learner").key, LEASE_IDS["S"])


@pytest.fixture
def url(school: School) -> Iterator[str]:
    with serving([AsyncProfileClient(school.registry, **school.options())]) as found:
        yield found


@contextmanager
def serving(clients: list[AsyncProfileClient]) -> Iterator[str]:
    app = make_app(clients, None)
    server = make_server(app, ConnectionLimits())
    server.config.port = 0
    thread = threading.Thread(target=server.run)
    thread.start()
    started = threading.Event()
    while not server.started:
        started.wait(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(30)


def call(url: str, body: Any = None) -> tuple[int, Any]:
    sent = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, sent), timeout=60) as answer:
            return answer.status, json.load(answer)
    except HTTPError as error:
        return error.code, json.load(error)


def test_over_http_as_the_document_says(school: School, url: str) -> None:
    school.put(LEARNER, 3, "12.5", ["sql"])
    school.publish()
    status, document = call(f"{url}/openapi.json")
    assert status == 200
    openapi_spec_validator.validate(document)
    assert set(document["paths"]) == {
        "/healthz", "/readyz", "/metrics", "/v1/profiles", "/v1/profiles/{learner_id}",
    }  # fmt: skip
    # The viewers of the example are nowhere in it.
    assert "viewer" not in json.dumps(document)
    parameter = document["paths"]["/v1/profiles/{learner_id}"]["get"]["parameters"][0]
    assert parameter["schema"] == {"type": "string", "minLength": 1, "maxLength": 2048}

    status, one = call(f"{url}/v1/profiles/{quote(LEARNER, safe='')}")
    assert (status, one["learner_id"]) == (200, LEARNER)
    assert one["domains"]["progress"]["attributes"]["minutes_28d"] == "12.5"
    assert valid(document, "Profile", one) == []
    status, many = call(f"{url}/v1/profiles", {"learner_ids": [LEARNER, "l2"]})
    assert [profile["learner_id"] for profile in many["profiles"]] == [LEARNER, "l2"]
    assert valid(document, "Profiles", many) == []
    assert call(f"{url}/v1/profiles", {"viewer_ids": [1]})[1]["error"]["message"].startswith(
        "unknown key 'viewer_ids'"
    )
    assert call(f"{url}/v1/profiles/{'x' * 2049}")[0] == 400
    assert call(f"{url}/readyz") == (200, {"ready": True, "parts": {"profiles": "ok"}})


def test_two_entities_are_served_side_by_side(dynamodb_endpoint: str) -> None:
    registry = parse_registry(two_entities())
    prefix = f"two_{uuid.uuid4().hex[:12]}_"
    client = dynamodb_client(dynamodb_endpoint, REGION)
    tables = provision(client, registry.contract, prefix=prefix)
    assert {entity: table.name for entity, table in tables.items()} == {
        "viewer": f"{prefix}viewer_profiles",
        "item": f"{prefix}item_profiles",
    }
    for name, id_, titles in (("watch", 7, 3), ("trend", "a/b", 4)):
        domain = registry.contract.domain(name)
        values = [Decimal("1"), Decimal("2"), titles, 0, 0, AT]
        item = ItemEncoder(registry.contract, domain).encode(id_, values)
        client.put_item(TableName=tables[domain.entity].name, Item=item)
    options: dict[str, Any] = {
        "endpoint_url": dynamodb_endpoint,
        "region": REGION,
        "table_prefix": prefix,
        "options": ClientOptions(30, read_timeout_seconds=30),
    }
    clients = [AsyncProfileClient(registry, entity=entity, **options) for entity in registry.contract.tables]
    try:
        with serving(clients) as url:
            document = call(f"{url}/openapi.json")[1]
            openapi_spec_validator.validate(document)
            viewer = call(f"{url}/v1/profiles/7?domains=watch")[1]
            item = call(f"{url}/v1/item/profiles/a%2Fb")[1]
            many = call(f"{url}/v1/item/profiles", {"item_ids": ["a/b", "c"]})[1]
            ready = call(f"{url}/readyz")[1]
            for viewer_id in range(3):
                damaged = {
                    "viewer_id": {"N": str(viewer_id)},
                    "domain_key": {"S": "engagement#watch"},
                    f"titles_{SHORT}d": {"S": "many"},
                }
                client.put_item(TableName=tables["viewer"].name, Item=damaged)
            # All domains together are answered, and one of them alone is not.
            statuses = [call(f"{url}/v1/profiles/{viewer_id}")[0] for viewer_id in range(3)]
            statuses.append(call(f"{url}/v1/profiles/0?domains=watch")[0])
            not_ready = call(f"{url}/readyz")
    finally:
        for table in tables.values():
            client.delete_table(TableName=table.name)
    assert (viewer["viewer_id"], viewer["domains"]["watch"]["attributes"][f"titles_{SHORT}d"]) == (7, 3)
    assert (item["item_id"], item["domains"]["trend"]["attributes"][f"titles_{SHORT}d"]) == ("a/b", 4)
    assert [profile["item_id"] for profile in many["profiles"]] == ["a/b", "c"]
    assert ready["parts"] == {"profiles": "ok", "item profiles": "ok"}
    assert valid(document, "Profile", viewer) == []
    assert valid(document, "ItemProfile", item) == []
    assert valid(document, "ItemProfiles", many) == []
    assert statuses == [200, 200, 200, 500]
    assert not_ready[0] == 503
    assert f"domain watch: titles_{SHORT}d should be integer" in not_ready[1]["parts"]["profiles"]
    assert not_ready[1]["parts"]["item profiles"] == "ok"


def test_readiness_is_not_green_while_profiles_answer_500(school: School, url: str) -> None:
    for number in range(3):
        school.put(f"l{number}", number, "1", None)
    school.publish()
    assert call(f"{url}/readyz")[0] == 200

    def retype(kind: str, value: str) -> None:
        for number in range(3):
            school.client.update_item(
                TableName=school.table.name,
                Key={"learner_id": {"S": f"l{number}"}, "domain_key": {"S": KEY}},
                UpdateExpression="SET lessons_7d = :value",
                ExpressionAttributeValues={":value": {kind: value}},
            )

    retype("S", "many")
    # One damaged item is one learner's; three in a row are everybody's.
    statuses = []
    for number in range(3):
        assert call(f"{url}/v1/profiles/l{number}")[0] == 500
        statuses.append(call(f"{url}/readyz")[0])
    assert statuses == [200, 200, 503]
    assert "lessons_7d should be integer" in call(f"{url}/readyz")[1]["parts"]["profiles"]
    retype("N", "1")
    assert call(f"{url}/readyz")[0] == 200
    assert call(f"{url}/v1/profiles/l0")[0] == 200


def valid(document: Any, schema: str, answer: Any) -> list[str]:
    reference = {"$ref": f"#/components/schemas/{schema}", "components": document["components"]}
    return [error.message for error in OAS30Validator(reference).iter_errors(answer)]


def test_a_generated_client_is_typed_and_answers_with_its_classes(
    school: School, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from click.testing import CliRunner

    file = tmp_path / "learners.py"
    monkeypatch.setenv("PREFS_PROJECT_DIR", str(COURSES))
    for said in ("wrote", "is up to date"):
        result = CliRunner().invoke(cli, ["generate", "client", str(file)])
        assert said in result.output, result.output
    assert file.read_text() == render_client(school.registry.contract)
    spec = importlib.util.spec_from_file_location("learners", file)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "learners", made)
    spec.loader.exec_module(made)

    school.put("l1", 3, "12.5", ["sql"])
    school.publish()
    with made.LearnerClient(school.registry, **school.options()) as client:
        found = client.get("l1")
    assert type(found) is made.LearnerProfile
    assert found.learner_id == "l1"
    assert found.progress == made.ProgressProfile(3, Decimal("12.5"), ["sql"], AT)

    use = tmp_path / "use.py"
    use.write_text(
        "from decimal import Decimal\n"
        "from learners import AsyncLearnerClient, LearnerClient\n\n"
        "def right(client: LearnerClient) -> Decimal:\n"
        "    return client.get('l1').progress.minutes_28d\n\n"
        "async def awaited(client: AsyncLearnerClient) -> int:\n"
        "    return (await client.get_many(['l1']))['l1'].progress.lessons_7d\n\n"
        "def wrong(client: LearnerClient) -> str:\n"
        "    return client.get(1).progress.lessons_7d\n"
    )
    # Types of others than the classes that it derives from say nothing of it, and take half a minute to read.
    options = tmp_path / "mypy.ini"
    options.write_text(
        "[mypy]\nstrict = true\nfollow_imports = skip\nignore_missing_imports = true\n"
        "[mypy-learners,use]\nfollow_imports = normal\n"
        "[mypy-dagster_prefs,dagster_prefs.serving,dagster_prefs.serving.*]\nfollow_imports = silent\n"
    )
    cache = tmp_path / "types"
    checked = subprocess.run(
        [
            sys.executable,
            "-m",
            "mypy",
            f"--config-file={options}",
            f"--cache-dir={cache}",
            str(file),
            str(use),
        ],
        cwd=ROOT,
        env={"MYPYPATH": str(tmp_path), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    errors = [line for line in checked.stdout.splitlines() if ": error:" in line]
    assert [line.partition(" error: ")[0].rpartition("/")[2] for line in errors] == [
        "use.py:11:",
        "use.py:11:",
    ], checked.stdout + checked.stderr
    formatted = subprocess.run(
        [sys.executable, "-m", "ruff", "format", "--check", "--isolated", "--line-length", "120", str(file)],
        capture_output=True,
        text=True,
    )
    assert formatted.returncode == 0, formatted.stdout

    changed = registry_dict(school.registry)
    attributes = changed["contract"]["domains"][KEY]["attributes"]
    attributes["lessons_1d"] = attributes.pop("lessons_7d")
    with pytest.raises(
        ProfileError, match=r"was generated from another registry.*: run `prefs generate client` again"
    ):
        made.LearnerClient(changed, **school.options())
