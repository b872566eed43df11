"""Provisioning against a real DynamoDB interface."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from botocore.exceptions import ClientError

from dagster_prefs.addresses import is_loopback
from dagster_prefs.declarations.contract import Contract, contract_dict, parse_contract
from dagster_prefs.dynamodb.tables import TableError, TableReport, dynamodb_client, provision


@pytest.fixture
def client(dynamodb_endpoint: str) -> Any:
    return dynamodb_client(dynamodb_endpoint, "eu-central-1")


@pytest.fixture
def prefix(client: Any) -> Iterator[str]:
    prefix = f"{uuid.uuid4().hex[:12]}_"
    yield prefix
    if f"{prefix}viewer_profiles" in client.list_tables()["TableNames"]:
        client.update_table(TableName=f"{prefix}viewer_profiles", DeletionProtectionEnabled=False)
        client.delete_table(TableName=f"{prefix}viewer_profiles")


def test_a_missing_table_is_made_once(client: Any, contract: Contract, prefix: str) -> None:
    first = provision(client, contract, prefix=prefix)["viewer"]
    assert first.created
    assert (first.name, first.status, first.billing_mode) == (
        f"{prefix}viewer_profiles",
        "ACTIVE",
        "PAY_PER_REQUEST",
    )
    again = provision(client, contract, prefix=prefix)["viewer"]
    assert not again.created
    assert again.table_id == first.table_id
    client.delete_table(TableName=first.name)
    assert provision(client, contract, prefix=prefix)["viewer"].table_id != first.table_id


def test_two_at_once_make_one_table(client: Any, contract: Contract, prefix: str) -> None:
    barrier = threading.Barrier(4)
    reports: list[TableReport] = []

    def run() -> None:
        barrier.wait()
        reports.append(provision(client, contract, prefix=prefix)["viewer"])

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({report.table_id for report in reports}) == 1
    assert len(reports) == 4


def test_foreign_keys_are_refused_and_the_table_left_alone(
    client: Any, contract: Contract, prefix: str
) -> None:
    name = f"{prefix}viewer_profiles"
    client.create_table(
        TableName=name,
        KeySchema=[{"AttributeName": "viewer_id", "KeyType": "HASH"}],
        AttributeDefinitions=[{"AttributeName": "viewer_id", "AttributeType": "S"}],
        BillingMode="PAY_PER_REQUEST",
    )
    before = client.describe_table(TableName=name)["Table"]
    with pytest.raises(TableError) as caught:
        provision(client, contract, prefix=prefix)
    text = str(caught.value)
    assert "its partition key is viewer_id (S) and should be viewer_id (N)" in text
    assert "its sort key is none and should be domain_key (S)" in text
    assert "PREFS_TABLE_PREFIX" in text
    assert client.describe_table(TableName=name)["Table"] == before


def test_verify_makes_nothing_and_lists_what_terraform_would_have_set(
    client: Any, contract: Contract, prefix: str
) -> None:
    name = f"{prefix}viewer_profiles"
    with pytest.raises(TableError, match=f"table {name} is missing: apply the Terraform module"):
        provision(client, contract, prefix=prefix, mode="verify")
    assert name not in client.list_tables()["TableNames"]

    provision(client, contract, prefix=prefix)
    with pytest.raises(TableError) as caught:
        provision(client, contract, prefix=prefix, mode="verify")
    assert "point-in-time recovery is off" in str(caught.value)
    assert "deletion protection is off" in str(caught.value)
    assert "encryption with a KMS key is off" in str(caught.value)

    client.delete_table(TableName=name)
    client.create_table(
        TableName=name,
        KeySchema=[
            {"AttributeName": "viewer_id", "KeyType": "HASH"},
            {"AttributeName": "domain_key", "KeyType": "RANGE"},
        ],
        AttributeDefinitions=[
            {"AttributeName": "viewer_id", "AttributeType": "N"},
            {"AttributeName": "domain_key", "AttributeType": "S"},
        ],
        BillingMode="PAY_PER_REQUEST",
        SSESpecification={"Enabled": True, "SSEType": "KMS"},
        DeletionProtectionEnabled=True,
    )
    client.update_continuous_backups(
        TableName=name, PointInTimeRecoverySpecification={"PointInTimeRecoveryEnabled": True}
    )
    # As a table restored from a backup is: everything but its tags comes back.
    with pytest.raises(TableError) as caught:
        provision(client, contract, prefix=prefix, mode="verify")
    assert str(caught.value) == (
        f"table {name} is not as the contract says: it has no tag prefs:contract-version; set it (terraform "
        "apply does)"
    )
    tag(client, name, str(contract.version))
    report = provision(client, contract, prefix=prefix, mode="verify")["viewer"]
    assert (report.created, report.point_in_time_recovery, report.deletion_protection) == (False, True, True)


def tag(client: Any, table: str, version: str) -> None:
    arn = client.describe_table(TableName=table)["Table"]["TableArn"]
    client.tag_resource(ResourceArn=arn, Tags=[{"Key": "prefs:contract-version", "Value": version}])


def version_of(client: Any, table: str) -> str:
    arn = client.describe_table(TableName=table)["Table"]["TableArn"]
    tags = client.list_tags_of_resource(ResourceArn=arn)["Tags"]
    # The local AWS server keeps former values too; the last one is in force.
    return [str(entry["Value"]) for entry in tags if entry["Key"] == "prefs:contract-version"][-1]


def test_a_contract_newer_than_the_table_is_refused(client: Any, contract: Contract, prefix: str) -> None:
    newer = replace(contract, version=contract.version + 1)
    name = provision(client, contract, prefix=prefix)["viewer"].name
    with pytest.raises(TableError) as caught:
        provision(client, newer, prefix=prefix, mode="verify")
    assert (
        f"it was deployed for version {contract.version} of the contract and this code has version "
        f"{newer.version}, a contract newer than the deployed table; terraform apply"
    ) in str(caught.value)
    tag(client, name, "next")
    with pytest.raises(TableError, match="it has the malformed value 'next' of the tag prefs:contract-ver"):
        provision(client, newer, prefix=prefix, mode="verify")
    assert version_of(client, name) == "next"


def test_create_raises_the_tables_version_and_never_lowers_it(
    client: Any, contract: Contract, prefix: str
) -> None:
    newer = replace(contract, version=contract.version + 1)
    name = provision(client, contract, prefix=prefix)["viewer"].name
    assert version_of(client, name) == str(contract.version)
    provision(client, newer, prefix=prefix)
    assert version_of(client, name) == str(newer.version)
    provision(client, contract, prefix=prefix)
    assert version_of(client, name) == str(newer.version)
    # Code of the older contract goes on while the newer is rolled out, or after a roll back.
    with pytest.raises(TableError) as caught:
        provision(client, contract, prefix=prefix, mode="verify")
    assert "contract" not in str(caught.value).partition("as the contract says: ")[2]


def test_the_time_to_live_is_the_contracts(client: Any, contract: Contract, prefix: str) -> None:
    content = contract_dict(contract)
    content["tables"]["viewer"]["ttl_attribute"] = "expires_at"
    expiring = parse_contract(content)
    name = provision(client, expiring, prefix=prefix)["viewer"].name
    ttl = client.describe_time_to_live(TableName=name)["TimeToLiveDescription"]
    assert (ttl["TimeToLiveStatus"], ttl["AttributeName"]) == ("ENABLED", "expires_at")
    assert not provision(client, expiring, prefix=prefix)["viewer"].created
    with pytest.raises(TableError, match="its time to live is on expires_at and should be on none"):
        provision(client, contract, prefix=prefix)

    class Publisher:
        """A role that may not see the time to live."""

        def __getattr__(self, name: str) -> Any:
            return getattr(client, name)

        def describe_time_to_live(self, TableName: str) -> Any:
            raise ClientError({"Error": {"Code": "AccessDeniedException"}}, "DescribeTimeToLive")

    blind: Any = Publisher()
    assert not provision(blind, contract, prefix=prefix)["viewer"].created
    with pytest.raises(TableError, match="allow dynamodb:DescribeTimeToLive"):
        provision(blind, expiring, prefix=prefix)


def test_a_table_that_never_becomes_active_is_named(client: Any, contract: Contract, prefix: str) -> None:
    provision(client, contract, prefix=prefix)

    class Slow:
        exceptions = client.exceptions

        def describe_table(self, TableName: str) -> Any:
            answer = client.describe_table(TableName=TableName)
            answer["Table"]["TableStatus"] = "DELETING"
            return answer

    with pytest.raises(TableError, match=r"is DELETING and did not become ACTIVE within 0 s"):
        provision(Slow(), contract, prefix=prefix, timeout_seconds=0)  # type: ignore[arg-type]


def test_an_endpoint_that_is_away_is_one_sentence(contract: Contract) -> None:
    with pytest.raises(TableError, match=r"cannot be reached: .*: check endpoint, region and credentials"):
        provision(dynamodb_client("http://127.0.0.1:1", "eu-central-1"), contract)


def test_local_credentials_only_for_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    local = dynamodb_client("http://localhost:1", "eu-central-1")
    assert local._request_signer._credentials.access_key == "local"  # type: ignore[attr-defined]
    remote = dynamodb_client(None, "eu-central-1")
    assert remote._request_signer._credentials is None  # type: ignore[attr-defined]
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "mine")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    own = dynamodb_client("http://localhost:1", "eu-central-1")
    assert own._request_signer._credentials.access_key == "mine"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("endpoint", "loopback"),
    [
        (None, False),
        ("http://127.0.0.1:8000", True),
        ("http://localhost:8000", True),
        ("http://[::1]:8000", True),
        ("https://dynamodb.eu-central-1.amazonaws.com", False),
    ],
)
def test_loopback(endpoint: str | None, loopback: bool) -> None:
    assert is_loopback(endpoint) is loopback
