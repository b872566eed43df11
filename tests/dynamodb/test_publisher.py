"""The publisher against a real engine and a real DynamoDB interface."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError, EndpointConnectionError
from click.testing import CliRunner
from shipped import LONG, SHORT, with_computed_attributes

from dagster_prefs.cli import cli
from dagster_prefs.declarations.contract import contract_dict, parse_contract
from dagster_prefs.declarations.registry import render_registry
from dagster_prefs.dynamodb import publisher
from dagster_prefs.dynamodb.items import ItemDecoder
from dagster_prefs.dynamodb.publisher import PublishError
from dagster_prefs.dynamodb.tables import TableError, dynamodb_client
from dagster_prefs.engine.connection import EngineConfiguration


def row(
    minutes: str = "12.500000", last_event_at: int = 1_760_000_000_000
) -> tuple[Decimal, Decimal, int, int, int, int]:
    return (Decimal(minutes), Decimal("40.25"), 3, 2, 5, last_event_at)


class Faults:
    """A DynamoDB client whose writes go wrong by plan; everything else is the real client."""

    def __init__(self, client: Any, plan: Any) -> None:
        self._client = client
        self._plan = plan
        self._lock = threading.Lock()
        self.requests: list[list[Any]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def batch_write_item(self, RequestItems: dict[str, list[Any]]) -> Any:
        (requests,) = RequestItems.values()
        with self._lock:
            self.requests.append(requests)
            number = len(self.requests)
        return self._plan(self._client, number, RequestItems)


def client_error(code: str, message: str = "as planned") -> ClientError:
    return ClientError({"Error": {"Code": code, "Message": message}}, "BatchWriteItem")


def viewer(request: Any) -> int:
    part = request["PutRequest"]["Item"] if "PutRequest" in request else request["DeleteRequest"]["Key"]
    return int(part["viewer_id"]["N"])


def test_upserts_changes_and_deletes(store: Any) -> None:
    for viewer_id in range(60):
        store.put("watch", viewer_id, *row())
    first = store.publish("watch")
    assert (first.upserts, first.deletes, first.unchanged) == (60, 0, 0)
    again = store.publish("watch")
    assert (again.upserts, again.deletes, again.unchanged) == (0, 0, 60)

    store.put("watch", 7, *row("13.000000"))
    store.remove("watch", 8)
    third = store.publish("watch")
    assert (third.upserts, third.deletes, third.unchanged) == (1, 1, 58)
    items = store.items()
    assert {viewer_id for viewer_id, _ in items} == set(range(60)) - {8}
    item = items[(7, "engagement#watch")]
    assert item[f"watch_minutes_{SHORT}d"] == {"N": "13.000000"}
    assert item[f"titles_{SHORT}d"] == {"N": "3"}
    assert set(item) == {"viewer_id", "domain_key", *store.contract.domain("watch").attributes}


def test_the_planner_knows_of_many_marks(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without, each row of a view was compared with each mark: four minutes for two domains of 50,000 rows."""
    monkeypatch.setattr(publisher, "MANY_ROWS", 20)
    for viewer_id in range(30):
        store.put("watch", viewer_id, *row())
    store.publish("watch")
    ((rows,),) = store.execute("select reltuples from pg_class where oid = 'online_published'::regclass")
    assert rows == 30


def test_null_lists_and_exact_numbers_survive(store: Any) -> None:
    shares = [Decimal("0.333333"), Decimal("0.1"), Decimal("12345678901234567890.123456789012345678")]
    store.put("preferences", 1, None, [], [], None, None, 5)
    store.put("preferences", 2, "Krimi ß", ["Krimi ß", "drama", "x"], shares, Decimal("0.5"), Decimal("3"), 6)
    assert store.publish("preferences").upserts == 2
    items = store.items("preferences")
    assert items[(1, "engagement#preferences")]["favorite_genre"] == {"NULL": True}
    domain = store.contract.domain("preferences")
    first, second = (
        dict(zip(domain.attributes, ItemDecoder(domain).decode(items[(viewer, domain.key)])[0], strict=True))
        for viewer in (1, 2)
    )
    assert first == {
        "favorite_genre": None,
        "favorite_genres": [],
        "favorite_genre_shares": [],
        f"completion_rate_{LONG}d": None,
        f"minutes_per_view_{LONG}d": None,
        "last_event_at": 5,
    }
    assert second["favorite_genre_shares"] == shares


def test_domains_are_separate(store: Any) -> None:
    store.put("watch", 1, *row())
    store.put("interactions", 1, 4, 5, 6, 7)
    store.publish("watch")
    store.publish("interactions")
    store.remove("watch", 1)
    assert store.publish("watch").deletes == 1
    assert set(store.items()) == {(1, "engagement#interactions")}


def test_a_new_table_is_filled_and_old_records_are_dropped(store: Any) -> None:
    for viewer_id in range(30):
        store.put("watch", viewer_id, *row())
    store.publish("watch")
    old = store.table.table_id
    store.recreate_table()
    assert store.table.table_id != old
    assert store.publish("watch").upserts == 30
    assert len(store.items()) == 30
    assert store.execute("select distinct table_id from online_published") == [(store.table.table_id,)]


def test_unprocessed_items_are_retried(store: Any) -> None:
    for viewer_id in range(40):
        store.put("watch", viewer_id, *row())

    def refuse_most(client: Any, number: int, wanted: dict[str, list[Any]]) -> Any:
        ((table, requests),) = wanted.items()
        client.batch_write_item(RequestItems={table: requests[:3]})
        return {"UnprocessedItems": {table: requests[3:]} if requests[3:] else {}}

    faults = Faults(store.client, refuse_most)
    report = store.publish("watch", faults)
    assert report.upserts == 40
    # 25 = 8·3 + 1 and 15 = 5·3: every further request of a batch is one retry.
    assert report.retries == 8 + 4
    assert len(store.items()) == 40
    assert store.publish("watch").upserts == 0


def test_throttling_that_never_ends_is_an_error_and_what_was_accepted_stays(store: Any) -> None:
    for viewer_id in range(50):
        store.put("watch", viewer_id, *row())

    def throttle_after_one(client: Any, number: int, wanted: dict[str, list[Any]]) -> Any:
        if number == 1:
            return client.batch_write_item(RequestItems=wanted)
        raise client_error("ProvisionedThroughputExceededException")

    faults = Faults(store.client, throttle_after_one)
    with pytest.raises(PublishError, match="did not accept 25 writes after 2 attempts") as caught:
        store.publish("watch", faults, max_attempts=2, threads=1)
    assert caught.value.report.upserts == 25
    assert len(store.items()) == 25
    assert store.publish("watch").upserts == 25
    assert len(store.items()) == 50


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (client_error("AccessDeniedException"), "allow dynamodb:BatchWriteItem"),
        (client_error("ResourceNotFoundException"), "ResourceNotFoundException"),
        (EndpointConnectionError(endpoint_url="http://x"), "cannot be reached"),
    ],
)
def test_refusals_stop_at_once_and_a_rerun_completes(store: Any, error: Exception, message: str) -> None:
    store.put("watch", 1, *row())

    def refuse(client: Any, number: int, wanted: dict[str, list[Any]]) -> Any:
        raise error

    faults = Faults(store.client, refuse)
    with pytest.raises(PublishError, match=message):
        store.publish("watch", faults)
    assert len(faults.requests) == 1
    assert store.publish("watch").upserts == 1


def test_one_invalid_item_does_not_stop_its_batch(store: Any) -> None:
    for viewer_id in range(30):
        store.put("watch", viewer_id, *row())

    def refuse_13(client: Any, number: int, wanted: dict[str, list[Any]]) -> Any:
        ((_, requests),) = wanted.items()
        if 13 in map(viewer, requests):
            raise client_error("ValidationException", "Item 13 is invalid")
        return client.batch_write_item(RequestItems=wanted)

    with pytest.raises(
        PublishError, match="viewer 13: DynamoDB refused the item: Item 13 is invalid"
    ) as caught:
        store.publish("watch", Faults(store.client, refuse_13))
    assert caught.value.report.upserts == 29
    assert {viewer_id for viewer_id, _ in store.items()} == set(range(30)) - {13}


def test_too_large_and_impossible_items_are_named_and_the_others_published(store: Any) -> None:
    store.put("preferences", 1, "g" * 500_000, [], [], None, None, 5)
    store.put("preferences", 2, "drama", ["drama"], [Decimal(1)], None, None, 5)
    with pytest.raises(
        PublishError, match=r"domain preferences: viewer 1: the item .* allows 409600: .*1 upserts"
    ) as caught:
        store.publish("preferences")
    assert caught.value.report.upserts == 1
    assert set(store.items()) == {(2, "engagement#preferences")}
    store.remove("preferences", 1)
    assert store.publish("preferences").upserts == 0

    store.put("watch", 1, Decimal("0." + "7" * 39), *row()[1:])
    with pytest.raises(PublishError, match=f"viewer 1: watch_minutes_{SHORT}d has 39 significant digits"):
        store.publish("watch")
    store.put("watch", 1, None, *row()[1:])
    with pytest.raises(PublishError, match=f"viewer 1: watch_minutes_{SHORT}d is NULL"):
        store.publish("watch")
    store.put("watch", 1, Decimal("NaN"), *row()[1:])
    with pytest.raises(PublishError, match=f"viewer 1: watch_minutes_{SHORT}d is NaN"):
        store.publish("watch")


class Crash(BaseException):
    """The process dies here."""


def test_a_crash_after_the_write_heals_even_when_the_value_went_back(store: Any) -> None:
    store.put("watch", 1, *row("1"))
    store.put("watch", 2, *row("1"))
    store.publish("watch")

    def write_and_die(client: Any, number: int, wanted: dict[str, list[Any]]) -> Any:
        client.batch_write_item(RequestItems=wanted)
        raise Crash

    store.put("watch", 1, *row("2"))
    store.put("watch", 3, *row("3"))
    store.remove("watch", 2)
    with pytest.raises(Crash):
        store.publish("watch", Faults(store.client, write_and_die))
    assert {viewer_id for viewer_id, _ in store.items()} >= {1, 3}
    # Everything returns to what was published before the crash, so fingerprints alone would see no change.
    store.put("watch", 1, *row("1"))
    store.put("watch", 2, *row("1"))
    store.remove("watch", 3)
    store.publish("watch")
    items = store.items("watch")
    assert {viewer_id for viewer_id, _ in items} == {1, 2}
    assert items[(1, "engagement#watch")][f"watch_minutes_{SHORT}d"] == {"N": "1"}


def test_two_publishers_do_not_interleave(store: Any) -> None:
    for viewer_id in range(30):
        store.put("watch", viewer_id, *row())
    inside = threading.Event()
    release = threading.Event()

    def hold(client: Any, number: int, wanted: dict[str, list[Any]]) -> Any:
        inside.set()
        assert release.wait(30)
        return client.batch_write_item(RequestItems=wanted)

    reports = []
    first = threading.Thread(
        target=lambda: reports.append(store.publish("watch", Faults(store.client, hold)))
    )
    first.start()
    assert inside.wait(30)
    with pytest.raises(PublishError, match=r"another publisher has held it for 0\.05 s"):
        store.publish("watch", lock_timeout_seconds=0.05)
    # Another domain is not held up.
    assert store.publish("interactions", lock_timeout_seconds=5).upserts == 0
    second = threading.Thread(target=lambda: reports.append(store.publish("watch")))
    second.start()
    release.set()
    first.join(30)
    second.join(30)
    assert [(report.upserts, report.unchanged) for report in reports] == [(30, 0), (0, 30)]


def test_a_renamed_attribute_is_published_again(store: Any) -> None:
    store.put("watch", 1, *row())
    store.publish("watch")
    # The same values, in the same order, under another name.
    store.execute(f"alter table sink_engagement_watch rename titles_{SHORT}d to titles_seen_7d")
    content = contract_dict(store.contract)
    attributes = content["domains"]["engagement#watch"]["attributes"]
    content["domains"]["engagement#watch"]["attributes"] = {
        name.replace(f"titles_{SHORT}d", "titles_seen_7d"): attribute
        for name, attribute in attributes.items()
    }
    store.contract = parse_contract(content)
    assert store.publish("watch").upserts == 1
    (item,) = store.items().values()
    assert item["titles_seen_7d"] == {"N": "3"}
    assert f"titles_{SHORT}d" not in item


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("drop table sink_engagement_watch", "does not exist: run `dbt build` first"),
        (f"alter table sink_engagement_watch drop column titles_{SHORT}d", f"titles_{SHORT}d is missing"),
        ("alter table sink_engagement_watch add column extra int", "extra is not in the contract"),
        (
            f"alter table sink_engagement_watch alter titles_{SHORT}d type text",
            f"titles_{SHORT}d is text and the contract says integer",
        ),
        ("drop table online_published", "online_published.* does not exist"),
        (
            "insert into sink_engagement_watch select null, domain_key from sink_engagement_watch",
            "1 rows without viewer_id",
        ),
        (
            "insert into sink_engagement_watch select * from sink_engagement_watch",
            "1 viewers more than once",
        ),
        (
            "update sink_engagement_watch set domain_key = 'engagement#other'",
            "1 rows whose domain_key is not engagement#watch",
        ),
    ],
)
def test_a_sink_unlike_the_contract_is_refused(store: Any, statement: str, message: str) -> None:
    store.put("watch", 1, *row())
    store.execute(statement)
    with pytest.raises(PublishError, match=message):
        store.publish("watch")
    assert store.items() == {}


def test_an_unreachable_dynamodb_is_one_sentence(store: Any) -> None:
    store.put("watch", 1, *row())
    gone = dynamodb_client("http://127.0.0.1:1", "eu-central-1")
    with pytest.raises(PublishError, match=r"domain watch: DynamoDB cannot be reached .*: run again"):
        store.publish("watch", gone)


def test_risingwave_is_sent_to_its_sinks(store: Any) -> None:
    streaming = EngineConfiguration("127.0.0.1", 1, "dev", "root", kind="risingwave")
    store.engine = streaming
    with pytest.raises(PublishError, match="PREFS_PUBLISH=sink"):
        store.publish("watch")


def test_the_command_publishes_what_changed_and_ends(
    store: Any, dynamodb_endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    registry = tmp_path / "registry.json"
    registry.write_text(render_registry(with_computed_attributes()))
    for name, value in {
        "PREFS_PROJECT_DIR": tmp_path,
        "PREFS_ENGINE_PORT": store.engine.port,
        "PREFS_ENGINE_DATABASE": store.engine.database,
        "PREFS_ENGINE_SCHEMA": store.engine.schema,
        "PREFS_TABLE_PREFIX": store.prefix,
        "PREFS_DATA_DIR": tmp_path,
        "AWS_ENDPOINT_URL": dynamodb_endpoint,
    }.items():
        monkeypatch.setenv(name, str(value))

    def publish(*options: str) -> Any:
        return CliRunner().invoke(cli, ["publish", *options], catch_exceptions=True)

    store.put("watch", 1, *row())
    store.put("interactions", 2, 1, 2, 3, 4)
    answer = json.loads(publish("--json").output)
    assert {report["domain_key"]: (report["upserts"], report["deletes"]) for report in answer} == {
        "engagement#watch": (1, 0), "engagement#interactions": (1, 0), "engagement#preferences": (0, 0),
    }  # fmt: skip
    store.remove("watch", 1)
    assert "engagement#watch: 0 upserts, 1 deletes" in publish().output
    assert set(store.items()) == {(2, "engagement#interactions")}
    assert "have no changes to follow: run `prefs refresh`" in str(publish("--follow").exception)
    monkeypatch.setenv("PREFS_ENGINE", "risingwave")
    assert "set PREFS_PUBLISH=changefeed" in str(publish().exception)
    monkeypatch.setenv("PREFS_PUBLISH", "changefeed")
    monkeypatch.setenv("PREFS_ENGINE_PORT", "1")
    assert "engine at 127.0.0.1:1 cannot be reached" in str(publish().exception)


def test_the_table_of_another_entity_is_refused(store: Any) -> None:
    with pytest.raises(TableError, match="pass the table of the domain's entity"):
        replace(store.domain("watch"), table=replace(store.table, entity="item"))
