"""One key's items: erased from DynamoDB, whichever process wrote them, and from the publisher's records."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any

import psycopg

from dagster_prefs.declarations.contract import LAST_EVENT_AT, Contract
from dagster_prefs.dynamodb.publisher import PublishError, publish_lock
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.engine.durations import with_unit
from dagster_prefs.ids import encode_part

if TYPE_CHECKING:
    from mypy_boto3_dynamodb import DynamoDBClient

POLL_SECONDS = 0.5


class EntityItems:
    """The items of one id of an entity whose newest event is not after `until` (UTC), in its table.

    For a composite key, the id is that of the first column, and the items are those of its whole partition. An item
    without a newest event counts too. Every method raises PublishError if DynamoDB rejects the request or cannot be
    reached.
    """

    def __init__(
        self,
        client: DynamoDBClient,
        contract: Contract,
        entity: str,
        table: str,
        id_: int | str,
        until: datetime,
    ) -> None:
        self._client = client
        self._domains = contract.domains_of(entity)
        # Also erases records of domains that the contract no longer has.
        self._others = [domain.key for domain in contract.domains.values() if domain.entity != entity]
        self._keys = contract.tables[entity]
        self._table = table
        self._id = id_
        self._until_ms = int(until.timestamp() * 1000)

    def keys(self) -> list[str]:
        """Return the sort keys of the id's items, in or outside the contract; a consistent read."""
        sort = self._keys.sort_key.name
        return sorted(item[sort]["S"] for item in self._query({"#sort": sort, "#last": LAST_EVENT_AT}))

    def read(self) -> list[dict[str, Any]]:
        """Return the id's items with all attributes, by sort key; a consistent read."""
        from boto3.dynamodb.types import TypeDeserializer

        plain, sort = TypeDeserializer().deserialize, self._keys.sort_key.name
        items = [{name: plain(value) for name, value in item.items()} for item in self._query({})]
        return sorted(items, key=lambda item: str(item[sort]))

    def _query(self, named: Mapping[str, str]) -> Iterator[dict[str, Any]]:
        """Yield the items with these attributes (placeholder → name), or with all if none is named."""
        partition = self._keys.partition_key
        projection: Any = {"ProjectionExpression": ", ".join(named)} if named else {}
        with self._translated("dynamodb:Query"):
            pages = self._client.get_paginator("query").paginate(
                TableName=self._table,
                KeyConditionExpression="#id = :id",
                ExpressionAttributeNames={"#id": partition.name, **named},
                ExpressionAttributeValues={":id": partition.typed(self._id)},
                ConsistentRead=True,
                **projection,
            )
            for page in pages:
                for item in page["Items"]:
                    newest = item.get(LAST_EVENT_AT, {}).get("N")
                    if newest is None or int(float(newest)) <= self._until_ms:
                        yield item

    def withdraw(
        self, engine: EngineConfiguration, *, lock_timeout_seconds: float = 900.0, sink_seconds: float = 60.0
    ) -> int:
        """Delete the items and their records in `online_published`. Returns the number of deleted items.

        The views must no longer contain the id. On the embedded engine no publisher runs meanwhile; on
        RisingWave the sinks get `sink_seconds` to delete the items themselves, because an item that a sink
        has still to write would reappear.
        """
        if engine.kind == "local":
            return self._withdraw_published(engine, lock_timeout_seconds)
        deadline = time.monotonic() + sink_seconds
        there = len(self.keys())
        while self.keys() and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        self._delete(self.keys())
        return there

    def _withdraw_published(self, engine: EngineConfiguration, lock_timeout_seconds: float) -> int:
        with engine.connect() as control:
            control.execute(
                "select set_config('lock_timeout', %s, false)",
                [with_unit(lock_timeout_seconds, "lock_timeout_seconds")],
            )
            try:
                for domain in sorted(self._domains, key=lambda domain: domain.key):
                    control.execute(
                        "select pg_advisory_lock(hashtextextended(%s, 0))", [publish_lock(engine, domain.key)]
                    )
            except psycopg.errors.LockNotAvailable:
                raise PublishError(
                    f"another publisher has held its domain for {lock_timeout_seconds:g} s: "
                    "let it finish, or stop it, and run again"
                ) from None
            keys = self.keys()
            # Emptied before the item goes: after a crash in between the publisher does not take it for written.
            composite = bool(self._keys.rest_keys)
            mine = [encode_part(self._id) if composite else str(self._id), self._others]
            first = "split_part(entity_key, '#', 1)" if composite else "entity_key"
            where = f"where {first} = %s and domain_key <> all(%s::text[])"
            control.execute(f"update online_published set fingerprint = '' {where}".encode(), mine)
            self._delete(keys)
            control.execute(f"delete from online_published {where}".encode(), mine)
        return len(keys)

    def _delete(self, keys: list[str]) -> None:
        partition, sort = self._keys.partition_key, self._keys.sort_key
        with self._translated("dynamodb:DeleteItem"):
            for key in keys:
                self._client.delete_item(
                    TableName=self._table,
                    Key={partition.name: partition.typed(self._id), sort.name: sort.typed(key)},
                )

    @contextmanager
    def _translated(self, permission: str) -> Iterator[None]:
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            yield
        except ClientError as error:
            answer: Any = error.response.get("Error", {})
            if answer.get("Code") == "ResourceNotFoundException":
                raise PublishError(
                    f"table {self._table} does not exist here, so its items cannot be erased: check "
                    "PREFS_TABLE_PREFIX and AWS_REGION, or create the table with `prefs refresh`"
                ) from None
            raise PublishError(
                f"DynamoDB refused to work on table {self._table} ({answer.get('Code')}: {answer.get('Message')}):"
                f" allow {permission} on it, and run again"
            ) from None
        except BotoCoreError as error:
            raise PublishError(
                f"DynamoDB cannot be reached for table {self._table}: {error}: check endpoint, region and "
                "credentials, and run again"
            ) from None
