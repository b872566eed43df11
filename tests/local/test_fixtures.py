"""The suite's own fixtures: what other rooms rely on."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import longest
import pytest
from botocore.exceptions import ClientError

from dagster_prefs.dynamodb.tables import dynamodb_client
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.local.services import LocalServices


@pytest.mark.parametrize("round_", [1, 2])
def test_every_test_gets_an_empty_database_in_utc_and_utf8(engine: EngineConfiguration, round_: int) -> None:
    with engine.connect() as connection:
        connection.execute("create table seen (word text)")
        connection.execute("insert into seen values ('žluťoučký 🐎')")
        assert connection.execute("select word from seen").fetchall() == [("žluťoučký 🐎",)]
        shown = {
            name: connection.execute(f"show {name}").fetchone()
            for name in (
                "timezone",
                "server_encoding",
                "listen_addresses",
                "fsync",
            )
        }
        locale = connection.execute(
            "select datlocprovider::text, datlocale from pg_database where datname = current_database()"
        ).fetchone()
    assert shown == {
        "timezone": ("UTC",),
        "server_encoding": ("UTF8",),
        "listen_addresses": ("127.0.0.1",),
        # The product's own is on, as tests/local/test_services.py shows; nothing of a test outlives it.
        "fsync": ("off",),
    }
    assert locale == ("b", "C.UTF-8")


@pytest.mark.parametrize("round_", [1, 2])
def test_every_test_gets_an_empty_aws_server(aws_endpoint: str, round_: int) -> None:
    dynamodb = boto3.client("dynamodb", endpoint_url=aws_endpoint)
    assert dynamodb.list_tables()["TableNames"] == []
    dynamodb.create_table(
        TableName="seen",
        KeySchema=[{"AttributeName": "k", "KeyType": "HASH"}],
        AttributeDefinitions=[{"AttributeName": "k", "AttributeType": "S"}],
        BillingMode="PAY_PER_REQUEST",
    )
    assert dynamodb.list_tables()["TableNames"] == ["seen"]


def test_the_aws_server_gives_back_items_of_every_type(aws_endpoint: str) -> None:
    """Its answers of DynamoDB are written by us, and were the same as moto's own, several times faster."""
    dynamodb = boto3.client("dynamodb", endpoint_url=aws_endpoint)
    dynamodb.create_table(
        TableName="typed",
        KeySchema=[{"AttributeName": "k", "KeyType": "HASH"}],
        AttributeDefinitions=[{"AttributeName": "k", "AttributeType": "S"}],
        BillingMode="PAY_PER_REQUEST",
    )
    key = {"k": {"S": "žluťoučký"}}
    item: dict[str, Any] = {
        **key,
        "number": {"N": "1.50"},
        "binary": {"B": b"\x00\xff"},
        "truth": {"BOOL": False},
        "nothing": {"NULL": True},
        "map": {"M": {"S": {"S": ""}, "M": {"M": {"L": {"L": []}}}}},
        "list": {"L": [{"N": "1"}, {"M": {"n": {"NULL": True}}}]},
        "plain list": {"L": [{"N": "1"}, {"S": "ž"}, {"NULL": True}, {"BOOL": True}]},
        "list of binaries": {"L": [{"S": "1"}, {"B": b"\xff"}]},
        "texts": {"SS": ["a", "b"]},
        "numbers": {"NS": ["1", "2"]},
        "binaries": {"BS": [b"x"]},
    }
    dynamodb.put_item(TableName="typed", Item=item)
    assert dynamodb.get_item(TableName="typed", Key=key)["Item"] == item
    assert dynamodb.scan(TableName="typed")["Items"] == [item]
    batch = dynamodb.batch_get_item(RequestItems={"typed": {"Keys": [key]}})
    assert batch["Responses"]["typed"] == [item]
    found = dynamodb.query(
        TableName="typed", KeyConditionExpression="k = :k", ExpressionAttributeValues={":k": key["k"]}
    )
    assert found["Items"] == [item]
    assert dynamodb.delete_item(TableName="typed", Key=key, ReturnValues="ALL_OLD")["Attributes"] == item


def test_the_aws_server_limits_the_size_of_an_item(aws_endpoint: str) -> None:
    """It measures only items that may be too large, and the platform's client sends what botocore would."""
    dynamodb = dynamodb_client(aws_endpoint, "eu-west-1")
    dynamodb.create_table(
        TableName="limited",
        KeySchema=[{"AttributeName": "k", "KeyType": "HASH"}],
        AttributeDefinitions=[{"AttributeName": "k", "AttributeType": "S"}],
        BillingMode="PAY_PER_REQUEST",
    )

    def write(key: str, letters: int, letter: str = "x") -> None:
        item: Any = {"k": {"S": key}, "list": {"L": [{"S": letter}] * 1000}, "text": {"S": letter * letters}}
        answer = dynamodb.batch_write_item(RequestItems={"limited": [{"PutRequest": {"Item": item}}]})
        assert answer["UnprocessedItems"] == {}

    write("large", 403_000)
    write("of two bytes each", 200_000, "ž")
    with pytest.raises(ClientError, match="Item size has exceeded the maximum allowed size"):
        write("too large", 405_000)
    keys = {item["k"]["S"] for item in dynamodb.scan(TableName="limited")["Items"]}
    assert keys == {"large", "of two bytes each"}


def test_the_session_shares_both_services(services: LocalServices) -> None:
    status = services.status()
    assert status.running
    assert [(service.name, service.address) for service in status.services] == [
        ("postgres", f"127.0.0.1:{services.postgres_port}"),
        ("aws", f"http://127.0.0.1:{services.aws_port}"),
    ]


def test_the_developers_settings_and_credentials_are_out_of_reach() -> None:
    assert boto3.Session().get_credentials() is None
    assert "AWS_PROFILE" not in os.environ
    assert Path(os.environ["PREFS_DATA_DIR"]).name.startswith("state")


def test_free_ports_differ_while_they_are_held(free_port: Callable[[], int]) -> None:
    with socket.socket() as held:
        port = free_port()
        held.bind(("127.0.0.1", port))
        held.listen()
        assert free_port() != port


def test_the_files_that_start_first_and_last_exist() -> None:
    named = longest.LONGEST + longest.LAST
    assert [name for name in named if not (longest.FOLDER / name).is_file()] == []
    assert len(set(named)) == len(named)


def test_files_are_handed_out_in_that_order_around_all_others(request: pytest.FixtureRequest) -> None:
    files = list(dict.fromkeys(item.path for item in request.session.items))
    first, last = (
        [longest.FOLDER / name for name in names if longest.FOLDER / name in files]
        for names in (longest.LONGEST, longest.LAST)
    )
    assert files[: len(first)] == first
    assert files[len(files) - len(last) :] == last


def test_only_the_last_files_are_left_out_of_a_run_whose_time_is_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, last = longest.FOLDER / longest.LONGEST[0], longest.FOLDER / longest.LAST[0]
    monkeypatch.delenv(longest.UNTIL, raising=False)
    assert not longest.out_of_time(last, now=1001)
    monkeypatch.setenv(longest.UNTIL, "1000")
    assert [longest.out_of_time(last, now) for now in (999, 1001)] == [False, True]
    assert [longest.out_of_time(file, 1001) for file in (first, Path(__file__))] == [False, False]
