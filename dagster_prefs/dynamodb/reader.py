"""Read items by key from DynamoDB within a latency budget, with bounded retries."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from dagster_prefs.declarations.contract import Table
from dagster_prefs.dynamodb.backoff import Backoff
from dagster_prefs.dynamodb.transport import Answer, Call, ReadError, Transport
from dagster_prefs.ids import Id

Key = tuple[Id, str]
Item = dict[str, dict[str, Any]]
Found = Item | None | ReadError
# Called when an attempt ended, with the kinds of its errors.
Attempted = Callable[[Sequence[str]], None]

# DynamoDB's limit for one BatchGetItem.
BATCH_KEYS = 100
# From this many keys on, one BatchGetItem beats as many GetItems side by side.
BATCH_FROM = 3


class Attempts(Protocol):
    """Is told of the attempts of one read."""

    def attempt(self, number: int, operations: Sequence[str]) -> Attempted:
        """An attempt begins, the first has number 1: the operations of its concurrent requests."""
        ...


class ItemReader:
    """Reads items of one entity's table by (id, domain key)."""

    def __init__(
        self,
        transport: Transport,
        keys: Table,
        table: str,
        *,
        read_timeout_seconds: float,
        max_attempts: int,
        side_by_side: int,
    ) -> None:
        self._transport = transport
        self._table = table
        self._keys = keys
        self._sort = keys.sort_key.name
        self._is_number = keys.partition_key.type == "N"
        self._read_timeout = read_timeout_seconds
        self._max_attempts = max_attempts
        self._side_by_side = side_by_side
        self._partition_json = f'{{"{keys.partition_key.name}":{{"{keys.partition_key.type}":'
        self._get_head = {
            consistent: f'{{"TableName":{json.dumps(table)},"ConsistentRead":{json.dumps(consistent)},"Key":'
            for consistent in (False, True)
        }
        self._batch_head = {
            consistent: f'{{"RequestItems":{{{json.dumps(table)}:'
            f'{{"ConsistentRead":{json.dumps(consistent)},"Keys":['
            for consistent in (False, True)
        }

    def read(
        self,
        keys: Sequence[Key],
        *,
        consistent: bool,
        deadline: float,
        canaries: Sequence[Key] = (),
        told: Attempts | None = None,
        results: list[str] | None = None,
    ) -> dict[Key, Found]:
        """Return the item of each key, None if there is none, or the error of its read.

        Up to two keys are read by concurrent GetItems, more by concurrent BatchGetItems of 100 keys each.
        `canaries` are read at the same time in a separate request without retries. `deadline` is in seconds
        of time.monotonic(); a read that is incomplete by then ends with a `timeout`. `told` is told of each attempt;
        `results` gets `ok` or the kind of the first error of each.
        """
        found: dict[Key, Found] = {}
        pending = self._plan(list(dict.fromkeys(keys)), consistent)
        optional = self._plan(list(dict.fromkeys(canaries)), consistent=False)
        last: dict[Key, ReadError] = {}
        backoff = Backoff(self._max_attempts, first_seconds=0.02, longest_seconds=0.2, deadline=deadline)
        number = 0
        while True:
            number += 1
            wanted = pending + optional
            rounds = -(-len(wanted) // self._side_by_side)
            attempt_deadline = min(deadline, time.monotonic() + self._read_timeout * rounds)
            ended = None if told is None else told.attempt(number, [call.operation for call, _ in wanted])
            answers = self._transport.send([call for call, _ in wanted], attempt_deadline)
            if ended is not None:
                ended([answer.kind for answer in answers if isinstance(answer, ReadError)])
            result = "ok"
            again: list[tuple[Call, list[Key]]] = []
            for position, ((call, asked), answer) in enumerate(zip(wanted, answers, strict=True)):
                if result == "ok" and isinstance(answer, ReadError):
                    result = answer.kind
                left = self._take(call, asked, answer, found, last)
                if left and position < len(pending):
                    again.append((call, asked) if left == asked else (self._batch(left, consistent), left))
            if results is not None:
                results.append(result)
            pending, optional = again, []
            if not pending or not backoff.again():
                break
        for _, asked in pending:
            for key in asked:
                found[key] = last[key]
        return found

    def warm(self, connections: int) -> None:
        """Open connections ahead of the first read."""
        self._transport.warm(connections)

    def close(self) -> None:
        """Close the transport."""
        self._transport.close()

    def _plan(self, keys: list[Key], consistent: bool) -> list[tuple[Call, list[Key]]]:
        if len(keys) < BATCH_FROM:
            return [(self._get(key, consistent), [key]) for key in keys]
        chunks = [keys[start : start + BATCH_KEYS] for start in range(0, len(keys), BATCH_KEYS)]
        return [(self._batch(chunk, consistent), chunk) for chunk in chunks]

    def _key(self, key: Key) -> str:
        id_, domain = key
        sort = f'"{domain}"'
        if isinstance(id_, tuple):
            sort = json.dumps(self._keys.sort_text(domain, id_))
            id_ = id_[0]
        value = f'"{id_}"' if self._is_number else json.dumps(id_)
        return f'{self._partition_json}{value}}},"{self._sort}":{{"S":{sort}}}}}'

    def _get(self, key: Key, consistent: bool) -> Call:
        return Call("GetItem", f"{self._get_head[consistent]}{self._key(key)}}}".encode())

    def _batch(self, keys: Iterable[Key], consistent: bool) -> Call:
        listed = ",".join(map(self._key, keys))
        return Call("BatchGetItem", f"{self._batch_head[consistent]}{listed}]}}}}}}".encode())

    def _take(
        self,
        call: Call,
        asked: list[Key],
        answer: Answer,
        found: dict[Key, Found],
        last: dict[Key, ReadError],
    ) -> list[Key]:
        """Add the content of an answer to `found`; return the keys to request again."""
        if isinstance(answer, ReadError):
            target: dict[Key, Any] = last if answer.transient else found
            target.update(dict.fromkeys(asked, answer))
            return asked if answer.transient else []
        try:
            if call.operation == "GetItem":
                found[asked[0]] = answer.get("Item")
                return []
            items = {self._identity(item): item for item in answer["Responses"].get(self._table, [])}
            unprocessed = answer.get("UnprocessedKeys", {}).get(self._table, {}).get("Keys", [])
            left = [self._identity(key) for key in unprocessed]
        except (KeyError, TypeError, ValueError, AttributeError):
            damaged = ReadError("DynamoDB's answer does not have the form of its API: try again", "corrupt")
            last.update(dict.fromkeys(asked, damaged))
            return asked
        if left:
            throttled = ReadError("DynamoDB left keys unprocessed, as when throttled: try again", "throttled")
            last.update(dict.fromkeys(left, throttled))
        for key in asked:
            if key not in left:
                found[key] = items.get(key)
        return left

    def _identity(self, item: Item) -> Key:
        return self._keys.split_key(item)
