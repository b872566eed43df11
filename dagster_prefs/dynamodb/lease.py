"""One fenced writer per domain: a lease that DynamoDB itself checks with every write.

A lock that a writer only asks for before it writes does not fence. A process that is paused after its check (a
stopped container, a frozen virtual machine) wakes up, believes what it knew, and its request overwrites what the
next holder has written since. No length of a lease helps, and neither does a lock in the engine: DynamoDB knows
nothing of it. So the lease is an item of the profile table, and every change is written by a transaction that
also replaces the lease under the condition that holder and sequence are still those that the writer knows.
DynamoDB does all of it or nothing: a writer that lost its lease cannot write any more, however late it wakes up.
The same condition keeps a writer's own requests in order, when one that timed out arrives after all, and it moves
the progress token in the same moment as the items, so that no crash can come between the two.

The price is that of transactions, two write units instead of one for each item. A `BatchWriteItem` takes no
condition, and a condition on the items would need a version in each of them and tombstones for deleted ones.

Holders are told apart by a name of their own and compare no clocks: whoever wants a lease watches its sequence, and
takes it when it has not moved for as long as its holder promised to move it.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from dagster_prefs.declarations.contract import Domain
from dagster_prefs.declarations.reserved import PREFIX
from dagster_prefs.dynamodb.access import ItemAccess, StoreUnavailable
from dagster_prefs.dynamodb.backoff import Backoff
from dagster_prefs.dynamodb.publisher import RETRYABLE
from dagster_prefs.dynamodb.store import DomainStore
from dagster_prefs.errors import PrefsError

# Reserved ids that the probe never sends events with, so that no reader ever meets a lease.
LEASE_IDS: Mapping[str, int | str] = {"N": -(2**63), "S": f"{PREFIX}publisher"}
# DynamoDB allows 100 actions in a transaction, and the lease is one of them; and 4 MB, names included.
TRANSACTION_ITEMS = 99
TRANSACTION_BYTES = 3_500_000

_BUSY = {"TransactionConflict", "ProvisionedThroughputExceeded", "ThrottlingError", "RequestLimitExceeded"}


class Fenced(PrefsError):
    """Another writer holds the lease; nothing of the rejected request was written."""


class ItemRefused(PrefsError):
    """DynamoDB rejected a write as invalid; `places` are the positions of invalid writes, empty if unknown."""

    def __init__(self, message: str, places: Sequence[int]) -> None:
        super().__init__(message)
        self.places = places


@dataclass(frozen=True)
class LeaseState:
    """The content of a domain's lease.

    `holder` is empty after a release. `label` names host and process of the last holder, and `mode` is the
    mode in which it was started. `sequence` increases with every write. `feed` identifies the subscription of
    `token` (milliseconds since 1970): every earlier change is in DynamoDB; None means that no token is
    stored. The holder must renew the lease within `lease_seconds`; `renewed_ms` is the time of the last
    renewal on its clock. `refused` counts keys that are not in DynamoDB because their row cannot become an
    item.
    """

    holder: str = ""
    label: str = ""
    mode: Literal["follow", "once"] = "follow"
    sequence: int = 0
    feed: str = ""
    token: int | None = None
    lease_seconds: float = 10.0
    renewed_ms: int = 0
    refused: int = 0


def read_lease(items: ItemAccess, domain: Domain) -> LeaseState | None:
    """Return the current lease of a domain, None if it was never followed; strongly consistent.

    Raises StoreUnavailable if DynamoDB refuses the request or does not answer, or an older version wrote the
    lease.
    """
    lease_id = LEASE_IDS[items.keys.partition_key.type]
    item = items.get(_lease_key(domain), [lease_id]).get(lease_id)
    if item is None:
        return None
    if "lease_seconds" not in item:
        raise StoreUnavailable(
            f"the lease {_lease_key(domain)} in table {items.table} was written by an older version: stop every "
            "`prefs publish --follow`, delete that item, and start again"
        )
    return LeaseState(
        holder=item["holder"]["S"],
        label=item["label"]["S"],
        mode=item["mode"]["S"],
        sequence=int(item["sequence"]["N"]),
        feed=item["feed"]["S"],
        token=int(item["token"]["N"]) if "token" in item else None,
        lease_seconds=float(item["lease_seconds"]["N"]),
        renewed_ms=int(item["renewed_ms"]["N"]),
        refused=int(item["refused"]["N"]),
    )


def _lease_key(domain: Domain) -> str:
    return f"publisher#{domain.key}"


class Lease:
    """The lease of one domain, held by one writer, and its only way to write."""

    def __init__(
        self,
        store: DomainStore,
        *,
        label: str,
        mode: Literal["follow", "once"],
        lease_seconds: float,
        max_attempts: int = 8,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.items = store.items
        self.domain = store.domain
        self.table = store.table.name
        self.client: Any = store.client
        self.max_attempts = max_attempts
        self.retries = 0
        self._mine = LeaseState(holder=uuid.uuid4().hex, label=label, mode=mode, lease_seconds=lease_seconds)
        self._clock = clock
        self._wall = wall
        self._moved_at = 0.0
        self.state = self._mine

    def acquire(self, stop: threading.Event, patience_seconds: float | None = None) -> bool:
        """Take the lease when it is free, or its holder has not renewed it in time.

        Waits while another holder is alive, at most `patience_seconds`, or without limit if None. Returns
        False if `stop` was set before. Raises Fenced, naming the holder, when the patience ends;
        StoreUnavailable.
        """
        started = seen_at = self._clock()
        seen: LeaseState | None = None
        alive = False
        while not stop.is_set():
            found = read_lease(self.items, self.domain) or LeaseState()
            if seen is None or (found.sequence, found.holder) != (seen.sequence, seen.holder):
                alive = seen is not None
                seen, seen_at = found, self._clock()
            if not found.holder or self._clock() - seen_at > found.lease_seconds:
                if self._take(found):
                    return True
                continue
            if patience_seconds is not None and alive and self._clock() - started > patience_seconds:
                raise Fenced(
                    f"domain {self.domain.name}: {found.label} already publishes it: "
                    "let it continue, or stop it and run again"
                )
            stop.wait(min(1.0, found.lease_seconds / 4))
        return False

    def _take(self, found: LeaseState) -> bool:
        after = replace(
            self._mine,
            sequence=found.sequence + 1,
            feed=found.feed,
            token=found.token,
            refused=found.refused,
        )
        try:
            self._put(after, "attribute_not_exists(#s) or #s = :seen", {":seen": {"N": str(found.sequence)}})
        except Fenced:
            return False
        self._moved(after)
        return True

    def renew(self) -> None:
        """Renew the lease once a third of its time has passed.

        Raises Fenced if another writer took it, StoreUnavailable.
        """
        if self._clock() - self._moved_at > self.state.lease_seconds / 3:
            self._advance(self.state)

    def record(self, feed: str, token: int | None, refused: int) -> None:
        """Renew the lease and store the progress token and the count of rejected keys. Raises like `renew`."""
        self._advance(replace(self.state, feed=feed, token=token, refused=refused))

    def release(self) -> None:
        """Release the lease, so that the next writer need not wait. A lost lease is left alone."""
        try:
            self._advance(replace(self.state, holder=""))
        except Fenced:
            return

    def _advance(self, state: LeaseState) -> None:
        after = replace(state, sequence=self.state.sequence + 1)
        self._put(after, *self._condition())
        self._moved(after)

    def _put(self, state: LeaseState, condition: str, values: Mapping[str, Any]) -> None:
        from botocore.exceptions import BotoCoreError, ClientError

        request = self._lease_put(state, condition, values)
        backoff = Backoff(self.max_attempts)
        while True:
            try:
                self.client.put_item(**request)
                return
            except ClientError as error:
                code, message = _answer(error)
                if code == "ConditionalCheckFailedException":
                    self._refuse_unless_mine()
                    return
                if code not in RETRYABLE | {"TransactionConflictException"} or not self._again(backoff):
                    raise self._refusal(code, message) from None
            except BotoCoreError as error:
                if not self._again(backoff):
                    raise self._unreachable(error) from None

    def write(self, requests: Sequence[Mapping[str, Any]], token: int | None, refused: int) -> None:
        """Write up to 99 puts and deletes of distinct keys, and the values of `record`, all or nothing.

        `requests` are `{"Put": {"Item": …}}` and `{"Delete": {"Key": …}}` in DynamoDB's typed JSON. Raises
        Fenced if another writer took the lease, ItemRefused if DynamoDB rejects an item as invalid, and
        StoreUnavailable if it stays throttled or unreachable. Nothing was written then, except that an
        unreachable DynamoDB may have executed the whole request; writing it again is safe.
        """
        from botocore.exceptions import BotoCoreError, ClientError

        after = replace(self.state, sequence=self.state.sequence + 1, token=token, refused=refused)
        condition, values = self._condition()
        lease = {"Put": self._lease_put(after, condition, values)}
        actions = [
            {kind: {"TableName": self.table, **arguments}}
            for request in requests
            for kind, arguments in request.items()
        ]
        # The same token for every attempt: one that was done although its answer got lost is not done twice.
        identity, backoff = uuid.uuid4().hex, Backoff(self.max_attempts)
        while True:
            try:
                self.client.transact_write_items(TransactItems=[lease, *actions], ClientRequestToken=identity)
                break
            except ClientError as error:
                code, message = _answer(error)
                reasons = [
                    (str(reason.get("Code", "None")), str(reason.get("Message", "")))
                    for reason in error.response.get("CancellationReasons", [])
                ]
                codes = {name for name, _ in reasons}
                if reasons and reasons[0][0] == "ConditionalCheckFailed":
                    self._refuse_unless_mine()
                    break
                if invalid := [place for place, (name, _) in enumerate(reasons) if name == "ValidationError"]:
                    raise ItemRefused(reasons[invalid[0]][1], [place - 1 for place in invalid]) from None
                if code == "ValidationException":
                    raise ItemRefused(message, []) from None
                busy = bool(codes & _BUSY) or code in RETRYABLE or code == "TransactionInProgressException"
                if not busy or not self._again(backoff):
                    raise self._refusal(code, "; ".join(sorted(codes - {"None"})) or message) from None
            except BotoCoreError as error:
                if not self._again(backoff):
                    raise self._unreachable(error) from None
        self._moved(after)

    def _condition(self) -> tuple[str, dict[str, Any]]:
        return "#h = :mine and #s = :seen", {
            ":mine": {"S": self._mine.holder},
            ":seen": {"N": str(self.state.sequence)},
        }

    def _lease_put(self, state: LeaseState, condition: str, values: Mapping[str, Any]) -> dict[str, Any]:
        self._stamped = replace(state, renewed_ms=round(self._wall() * 1000))
        names = {"#s": "sequence"} | ({"#h": "holder"} if "#h" in condition else {})
        return {
            "TableName": self.table,
            "Item": {
                **self.items.key(_lease_key(self.domain), LEASE_IDS[self.items.keys.partition_key.type]),
                "holder": {"S": state.holder},
                "label": {"S": state.label},
                "mode": {"S": state.mode},
                "sequence": {"N": str(state.sequence)},
                "feed": {"S": state.feed},
                **({} if state.token is None else {"token": {"N": str(state.token)}}),
                "lease_seconds": {"N": str(state.lease_seconds)},
                "renewed_ms": {"N": str(self._stamped.renewed_ms)},
                "refused": {"N": str(state.refused)},
            },
            "ConditionExpression": condition,
            "ExpressionAttributeNames": names,
            "ExpressionAttributeValues": values,
        }

    def _moved(self, state: LeaseState) -> None:
        self.state = state
        self._moved_at = self._clock()

    def _again(self, backoff: Backoff) -> bool:
        again = backoff.again()
        self.retries += again
        return again

    def _refuse_unless_mine(self) -> None:
        # An attempt whose answer got lost has moved the lease to exactly what this one wanted to write.
        if read_lease(self.items, self.domain) != self._stamped:
            raise Fenced(f"domain {self.domain.name}: another publisher has taken over")

    def _refusal(self, code: str, message: str) -> StoreUnavailable:
        return StoreUnavailable(
            f"domain {self.domain.name}: DynamoDB did not accept writes to table {self.table} ({code}): {message}"
        )

    def _unreachable(self, error: Exception) -> StoreUnavailable:
        return StoreUnavailable(
            f"domain {self.domain.name}: DynamoDB cannot be reached for table {self.table}: {error}"
        )


def _answer(error: Any) -> tuple[str, str]:
    answer = error.response.get("Error", {})
    return str(answer.get("Code", "unknown")), str(answer.get("Message", ""))
