"""The DynamoDB tables of environments: found by their tag or exact name, and deleted."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dagster_prefs.dynamodb.tables import TableError, refusal, table_environment
from dagster_prefs.environment import Environment, environment_named

if TYPE_CHECKING:
    from mypy_boto3_dynamodb import DynamoDBClient


@dataclass(frozen=True)
class StoredTable:
    """A table of an environment. DynamoDB counts items and bytes about every six hours."""

    name: str
    environment: str
    items: int
    size_bytes: int


def environment_tables(
    client: DynamoDBClient, declared: Collection[str], only: Environment | None = None
) -> list[StoredTable]:
    """Return the tables of all environments, or of one, by name; `declared` are the names without a prefix.

    A table belongs to the environment that its tag names. One without a tag, as in DynamoDB Local, belongs to an
    environment only if its name is exactly the prefix and a declared name: `dev-anna-x` is no table of `dev`.
    Raises TableError if DynamoDB refuses.
    """
    from botocore.exceptions import BotoCoreError, ClientError

    found = []
    name = "*"
    try:
        for page in client.get_paginator("list_tables").paginate():
            for name in page["TableNames"]:
                exact = _exact_owner(name, declared)
                # Other teams' tables are not described: an account may have thousands.
                if only is None and exact is None:
                    continue
                if only is not None and not name.startswith(only.table_prefix):
                    continue
                owner = _describe(client, name, exact)
                if owner is not None and (only is None or owner.environment == only.name):
                    found.append(owner)
    except ClientError as error:
        raise TableError(refusal(name, error)) from None
    except BotoCoreError as error:
        raise TableError(
            f"DynamoDB cannot be reached: {error}: check endpoint, region and credentials"
        ) from None
    return sorted(found, key=lambda table: table.name)


def delete_table(client: DynamoDBClient, name: str) -> None:
    """Delete a table and wait until it is gone; does nothing if there is none. Raises TableError."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        client.delete_table(TableName=name)
        client.get_waiter("table_not_exists").wait(
            TableName=name, WaiterConfig={"Delay": 1, "MaxAttempts": 120}
        )
    except client.exceptions.ResourceNotFoundException:
        return
    except ClientError as error:
        raise TableError(refusal(name, error)) from None
    except BotoCoreError as error:
        raise TableError(f"table {name} is not deleted yet: {error}: run it again") from None


def _describe(client: DynamoDBClient, name: str, exact: str | None) -> StoredTable | None:
    try:
        described: Any = client.describe_table(TableName=name)["Table"]
    except client.exceptions.ResourceNotFoundException:
        # Deleted since it was listed.
        return None
    owner = table_environment(client, described["TableArn"]) or exact
    if owner is None or described["TableStatus"] == "DELETING":
        return None
    return StoredTable(
        name, owner, int(described.get("ItemCount", 0)), int(described.get("TableSizeBytes", 0))
    )


def _exact_owner(name: str, declared: Collection[str]) -> str | None:
    for one in declared:
        head = name.removesuffix(one)
        if head != name and head.endswith("-") and "_" not in head:
            owner = environment_named(head[:-1].replace("-", "_"))
            if owner is not None:
                return owner.name
    return None
