"""Strongly consistent reads of a profile table, and single conditional writes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dagster_prefs.declarations.contract import Table
from dagster_prefs.dynamodb.backoff import Backoff
from dagster_prefs.errors import PrefsError
from dagster_prefs.ids import SEPARATOR, Id

if TYPE_CHECKING:
    from mypy_boto3_dynamodb import DynamoDBClient

# DynamoDB's limit for one BatchGetItem.
BATCH_KEYS = 100
MAX_ATTEMPTS = 6


class StoreUnavailable(PrefsError):
    """DynamoDB refused a request about the profile table, or did not answer."""


class Overtaken(PrefsError):
    """An item changed between being read and being repaired."""


class ItemAccess:
    """Strongly consistent reads of one entity's table, and single conditional writes.

    `keys` is the table as the contract declares it, `table` its name with the environment's prefix.
    """

    def __init__(self, client: DynamoDBClient, keys: Table, table: str) -> None:
        self.client: Any = client
        self.keys = keys
        self.partition_key = keys.partition_key.name
        self.sort_key = keys.sort_key.name
        self.table = table

    def key(self, domain_key: str, id_: Id) -> dict[str, Any]:
        """Return the key of an item in DynamoDB's typed JSON."""
        return self.keys.typed_key(domain_key, id_)

    def get(self, domain_key: str, ids: Iterable[Id]) -> dict[Id, Mapping[str, Any]]:
        """Return the items of these ids that exist, by id, in DynamoDB's typed JSON.

        Raises StoreUnavailable if DynamoDB refuses the request, is unreachable or stays throttled.
        """
        found: dict[Id, Mapping[str, Any]] = {}
        wanted = sorted(ids)
        for start in range(0, len(wanted), BATCH_KEYS):
            chunk = wanted[start : start + BATCH_KEYS]
            keys: Sequence[Any] = [self.key(domain_key, id_) for id_ in chunk]
            asked = dict(zip(map(self._place, keys), chunk, strict=True))
            backoff = Backoff(MAX_ATTEMPTS, longest_seconds=2.0)
            while True:
                answer = self._call(
                    "batch_get_item", RequestItems={self.table: {"Keys": keys, "ConsistentRead": True}}
                )
                for item in answer.get("Responses", {}).get(self.table, []):
                    found[asked[self._place(item)]] = item
                keys = answer.get("UnprocessedKeys", {}).get(self.table, {}).get("Keys", [])
                if not keys:
                    break
                if not backoff.again():
                    raise StoreUnavailable(
                        f"table {self.table} left {len(keys)} reads unprocessed after {MAX_ATTEMPTS} attempts, "
                        "as when it is throttled: raise its read capacity or wait"
                    )
        return found

    def _place(self, item: Mapping[str, Any]) -> tuple[int | str, int | str]:
        return self.keys.partition_key.value_of(item), self.keys.sort_key.value_of(item)

    def page(self, domain_key: str, limit: int, place: int) -> dict[str, set[Id]]:
        """Return the ids of each domain among `limit` items, starting at the hash of the id `place`."""
        # A start key need not exist: DynamoDB continues from the position of its hash.
        start: Any = self.key(domain_key, place)
        items: list[Any] = []
        for options in ({"ExclusiveStartKey": start}, {}):
            answer = self._call(
                "scan",
                TableName=self.table,
                Limit=limit - len(items),
                ProjectionExpression="#p, #s",
                ExpressionAttributeNames=self._key_names(),
                **options,
            )
            items += answer["Items"]
            if len(items) >= limit:
                break
        found: dict[str, set[Id]] = {}
        for id_, domain in map(self.keys.split_key, items):
            found.setdefault(domain, set()).add(id_)
        return found

    def pages(self, domain_key: str) -> Iterator[list[Id]]:
        """Yield all ids with an item of the domain, page by page, each page sorted."""
        start: dict[str, Any] = {}
        # Behind the domain's key stands the rest of a composite one.
        prefix = f"{domain_key}{SEPARATOR}" if self.keys.rest_keys else domain_key
        condition = "begins_with(#s, :domain)" if self.keys.rest_keys else "#s = :domain"
        while True:
            answer = self._call(
                "scan",
                TableName=self.table,
                ConsistentRead=True,
                ProjectionExpression="#p, #s",
                FilterExpression=condition,
                ExpressionAttributeNames=self._key_names(),
                ExpressionAttributeValues={":domain": {"S": prefix}},
                **start,
            )
            if answer["Items"]:
                found = [
                    id_ for id_, domain in map(self.keys.split_key, answer["Items"]) if domain == domain_key
                ]
                yield sorted(found)
            if "LastEvaluatedKey" not in answer:
                return
            start = {"ExclusiveStartKey": answer["LastEvaluatedKey"]}

    def _key_names(self) -> dict[str, str]:
        return {"#p": self.partition_key, "#s": self.sort_key}

    def put(self, item: Mapping[str, Any], version: str) -> bool:
        """Write an item unless the stored one has a higher `version` attribute; return whether it was written.

        An item whose version is not a number was not written by a publisher, and is replaced.
        """
        return self._unless_overtaken(
            "put_item",
            TableName=self.table,
            Item=item,
            ConditionExpression="attribute_not_exists(#v) or not attribute_type(#v, :number) or #v <= :mine",
            ExpressionAttributeNames={"#v": version},
            ExpressionAttributeValues={":mine": item[version], ":number": {"S": "N"}},
        )

    def delete(self, key: Mapping[str, Any], version: str, seen: Mapping[str, Any] | None) -> bool:
        """Delete an item if its `version` attribute is unchanged; return whether it no longer exists."""
        condition: dict[str, Any] = {"ConditionExpression": "attribute_not_exists(#v)"}
        if seen is not None:
            condition = {
                "ConditionExpression": "attribute_not_exists(#v) or #v = :seen",
                "ExpressionAttributeValues": {":seen": seen},
            }
        return self._unless_overtaken(
            "delete_item",
            TableName=self.table,
            Key=key,
            ExpressionAttributeNames={"#v": version},
            **condition,
        )

    def _unless_overtaken(self, operation: str, **arguments: Any) -> bool:
        try:
            self._call(operation, **arguments)
        except Overtaken:
            return False
        return True

    def describe(self) -> Any:
        """Return DynamoDB's description of the table."""
        return self._call("describe_table", TableName=self.table)["Table"]

    def _call(self, operation: str, **arguments: Any) -> Any:
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            return getattr(self.client, operation)(**arguments)
        except ClientError as error:
            code = error.response.get("Error", {}).get("Code", "unknown")
            if code == "ConditionalCheckFailedException":
                raise Overtaken(f"an item of table {self.table} was changed by another writer") from None
            message = error.response.get("Error", {}).get("Message", "")
            raise StoreUnavailable(
                f"DynamoDB refused {operation} on table {self.table} ({code}): {message}: check that the "
                "table exists and that the credentials allow it"
            ) from None
        except BotoCoreError as error:
            raise StoreUnavailable(
                f"DynamoDB cannot be reached for table {self.table}: {error}: check the endpoint and region"
            ) from None
