"""Each permission that provisioning and publishing need, taken away: the one sentence names it.

The local AWS server evaluates IAM policies here, so the refusals are its own; only their spelling is changed to
DynamoDB's, because it spells them as the older services do.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Iterator
from typing import Any
from urllib.request import Request, urlopen

import boto3
import pytest

from dagster_prefs.declarations.contract import Contract, contract_dict, parse_contract
from dagster_prefs.dynamodb.tables import dynamodb_client, provision
from dagster_prefs.errors import PrefsError
from tests.dynamodb.conftest import Store

VERIFIES = {"DescribeTable", "DescribeContinuousBackups", "DescribeTimeToLive", "ListTagsOfResource"}
CREATES = {"DescribeTable", "DescribeTimeToLive", "ListTagsOfResource", "TagResource"}
PREFIX = "permissions_"


@pytest.fixture
def expiring(contract: Contract) -> Contract:
    """The contract with a time to live, whose verification needs every permission there is."""
    content = contract_dict(contract)
    content["tables"]["viewer"]["ttl_attribute"] = "expires_at"
    return parse_contract(content)


def enforce(endpoint: str, *, on: bool) -> None:
    """Whether the server asks for a policy that allows a request; off, it allows everything."""
    request = Request(
        f"{endpoint}/moto-api/reset-auth",
        data=b"0" if on else b"inf",
        headers={"Content-Type": "text/plain"},
    )
    with urlopen(request, timeout=30) as answer:
        assert answer.status == 200


def spell_as_dynamodb(response_dict: dict[str, Any], **_: object) -> None:
    """Turn a refusal in XML into the JSON that DynamoDB would send."""
    refusal = re.search(rb"<Code>(\w+)</Code><Message>(.*?)</Message>", response_dict["body"])
    if response_dict["status_code"] == 403 and refusal:
        kinds = {
            b"AccessDenied": "AccessDeniedException",
            b"InvalidClientTokenId": "UnrecognizedClientException",
        }
        content = {
            "__type": f"com.amazon.coral.service#{kinds[refusal[1]]}",
            "message": refusal[2].decode(),
        }
        response_dict.update(body=json.dumps(content).encode(), status_code=400)


def client_of(endpoint: str) -> Any:
    """A client with the credentials of the environment, to which the server speaks like DynamoDB."""
    client = dynamodb_client(endpoint, "eu-central-1")
    client.meta.events.register("before-parse.dynamodb", spell_as_dynamodb)
    return client


@pytest.fixture
def client_without(dynamodb_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """A function (missing, all permissions) → client of a user with all of them but the missing one."""
    options: Any = {
        "endpoint_url": dynamodb_endpoint, "region_name": "eu-central-1",
        "aws_access_key_id": "admin", "aws_secret_access_key": "admin",
    }  # fmt: skip
    iam = boto3.client("iam", **options)
    user = f"user_{uuid.uuid4().hex}"
    iam.create_user(UserName=user)
    key = iam.create_access_key(UserName=user)["AccessKey"]
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])

    def make(missing: str | None, permissions: set[str]) -> Any:
        enforce(dynamodb_endpoint, on=False)
        allowed = sorted(f"dynamodb:{name}" for name in permissions - {missing})
        statement = {"Effect": "Allow", "Action": allowed, "Resource": "*"}
        document = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
        iam.put_user_policy(UserName=user, PolicyName="own", PolicyDocument=document)
        enforce(dynamodb_endpoint, on=True)
        return client_of(dynamodb_endpoint)

    try:
        yield make
    finally:
        enforce(dynamodb_endpoint, on=False)
        iam.delete_user_policy(UserName=user, PolicyName="own")
        iam.delete_access_key(UserName=user, AccessKeyId=key["AccessKeyId"])
        iam.delete_user(UserName=user)
        admin = boto3.client("dynamodb", **options)
        for name in admin.list_tables()["TableNames"]:
            if name.startswith(PREFIX):
                admin.delete_table(TableName=name)


def test_verification_names_each(
    client_without: Callable[..., Any], dynamodb_endpoint: str, expiring: Contract
) -> None:
    provision(dynamodb_client(dynamodb_endpoint, "eu-central-1"), expiring, prefix=PREFIX)
    told = {}
    for missing in sorted(VERIFIES):
        with pytest.raises(PrefsError) as caught:
            provision(client_without(missing, VERIFIES), expiring, prefix=PREFIX, mode="verify")
        told[missing] = str(caught.value)
    assert [missing for missing in told if f"allow dynamodb:{missing}" not in told[missing]] == []
    # Each is told alone: what is allowed is not complained about.
    assert [text.count("allow dynamodb:") for text in told.values()] == [1] * len(VERIFIES)


def test_creation_names_each(client_without: Callable[..., Any], expiring: Contract) -> None:
    prefix = f"{PREFIX}{uuid.uuid4().hex[:8]}_"
    for missing in ("DescribeTable", "CreateTable"):
        with pytest.raises(PrefsError, match=f"allow dynamodb:{missing} on it"):
            provision(client_without(missing, CREATES | {"CreateTable"}), expiring, prefix=prefix)
    needed = CREATES | {"CreateTable", "UpdateTimeToLive"}
    assert provision(client_without(None, needed), expiring, prefix=prefix)["viewer"].created


def test_publishing_names_each(store: Store, client_without: Callable[..., Any]) -> None:
    store.put("interactions", 1, 2, 3, 4, 1_700_000_000_000)
    refused = client_without("BatchWriteItem", {"BatchWriteItem", "PutItem"})
    with pytest.raises(PrefsError, match=r"allow dynamodb:BatchWriteItem on it \(.*; 0 upserts .* run again"):
        store.publish("interactions", refused)
    allowed = client_without(None, {"BatchWriteItem", "PutItem"})
    assert store.publish("interactions", allowed).upserts == 1


def test_credentials_that_aws_does_not_know(
    client_without: Callable[..., Any],
    contract: Contract,
    monkeypatch: pytest.MonkeyPatch,
    dynamodb_endpoint: str,
) -> None:
    client_without(None, VERIFIES)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIANOBODY")
    with pytest.raises(PrefsError, match=r"does not accept the AWS credentials .* renew or correct them"):
        provision(client_of(dynamodb_endpoint), contract, prefix=PREFIX)
