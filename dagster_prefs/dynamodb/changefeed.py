"""Follow the changes of the rolling views on RisingWave and write them to DynamoDB, without a licensed sink.

Delivery is at least once, and the final state is the same: after a crash, the next writer reads again from
the progress token. The token is stored in DynamoDB next to the items and moves in the same transaction
(`lease.py`). It is the moment of the newest written change, and reading begins *with* that moment, so it does
not matter how much of the moment was written before the crash. Without a token that the engine can still
serve, the whole view is compared with the table, and items without a row are deleted.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from dagster_prefs.dynamodb.access import StoreUnavailable
from dagster_prefs.dynamodb.feed import Change, FeedBroken, SubscriptionFeed, TokenExpired
from dagster_prefs.dynamodb.items import ItemError, item_bytes, plain
from dagster_prefs.dynamodb.lease import (
    TRANSACTION_BYTES,
    TRANSACTION_ITEMS,
    Fenced,
    ItemRefused,
    Lease,
)
from dagster_prefs.dynamodb.publisher import MAX_REFUSED, PublishError
from dagster_prefs.dynamodb.store import DomainStore
from dagster_prefs.engine.connection import EngineUnavailable
from dagster_prefs.errors import PrefsError
from dagster_prefs.ids import Id
from dagster_prefs.pauses import Pauses

Mode = Literal["follow", "once"]

# Rows of one FETCH, which is also how many changes are coalesced and held in memory.
PAGE = 1000
# How long FETCH waits for a change; an order to stop is heard after this at the latest.
FETCH_SECONDS = 1
# After this long without a change the token is advanced, so that a quiet view never outlives the retention.
QUIET_SECONDS = 15.0
FIRST_PAUSE_SECONDS, MAX_PAUSE_SECONDS = 1.0, 30.0


@dataclass(frozen=True)
class ChangefeedReport:
    """The result of one publisher for one domain; `upserts` and `deletes` count accepted writes.

    `unchanged` counts the items that were equal when the whole view was compared, which happened `resyncs`
    times. `token` is the engine's time (milliseconds since 1970) up to which every change is published, None
    if unknown.
    """

    domain_key: str
    table: str
    upserts: int
    deletes: int
    unchanged: int
    resyncs: int
    retries: int
    refused: int
    token: int | None
    seconds: float


def process_label() -> str:
    """Return host and process id, by which other publishers name this one."""
    return f"{socket.gethostname()}:{os.getpid()}"


def publish_changes(
    stores: Sequence[DomainStore],
    *,
    mode: Mode,
    stop: threading.Event,
    label: str,
    lease_seconds: float = 10.0,
    full: bool = False,
    notify: Callable[[str], None] = lambda message: None,
) -> list[ChangefeedReport]:
    """Publish the changes of these domains concurrently, each to its entity's table.

    `once` ends when everything that the engine had committed at the start is in DynamoDB. `follow` continues
    until `stop` is set. It waits as a stand-by while another publisher holds a domain, takes over when that
    one has not renewed its lease for `lease_seconds`, and reconnects when the engine or DynamoDB was
    unavailable; `notify` gets a message about each of these. `full` compares the whole view first, whatever
    was published. `label` names this process to other publishers.

    Idempotent, and safe to kill at any point and to run twice. Raises PublishError (with `.report`) for the
    first domain that cannot be published: a missing subscription, a view that differs from the contract, or
    keys whose row cannot become an item (all others are published); with `once` also if another publisher is
    active, or a service does not answer.
    """
    if any(store.engine.kind != "risingwave" for store in stores):
        raise PublishError(
            "the changefeed reads RisingWave's subscriptions; on the local engine set PREFS_PUBLISH=publisher"
        )
    publishers = [_Publisher(store, mode, stop, label, lease_seconds, full, notify) for store in stores]
    with ThreadPoolExecutor(len(publishers), thread_name_prefix="changefeed") as pool:
        running = [pool.submit(publisher.run) for publisher in publishers]
        try:
            finished, _ = wait(running, return_when=FIRST_EXCEPTION)
            if mode == "follow" and any(future.exception() for future in finished):
                # A process that continues without one of its domains would look healthy from outside.
                stop.set()
        except BaseException:
            stop.set()
            raise
    return [future.result() for future in running]


class PublishedElsewhere(PublishError):
    """Another publisher holds the domain's lease and is alive."""


class _Stopped(Exception):
    """`stop` was set while the whole view was compared."""


@dataclass(frozen=True, slots=True)
class _Write:
    id: Id
    request: Mapping[str, Any]
    size: int


class _Publisher:
    """The publisher of one domain in one process."""

    def __init__(
        self,
        store: DomainStore,
        mode: Mode,
        stop: threading.Event,
        label: str,
        lease_seconds: float,
        full: bool,
        notify: Callable[[str], None],
    ) -> None:
        self.store = store
        self.domain, self.table = store.domain, store.table
        self.mode = mode
        self.stop = stop
        self.full = full
        self.notify = notify
        self.encoder, self.items = store.encoder, store.items
        self.lease = Lease(store, label=label, mode=mode, lease_seconds=lease_seconds)
        self.upserts = self.deletes = self.unchanged = self.resyncs = 0
        self.refused: dict[Id | None, str] = {}
        self.sessions = 0
        self._drop_unwritten()

    def run(self) -> ChangefeedReport:
        started = time.monotonic()
        while not self.stop.is_set():
            try:
                if not self.lease.acquire(self.stop, 0.0 if self.mode == "once" else None):
                    break
                try:
                    self._hold()
                finally:
                    self._give_back()
                break
            except Fenced as error:
                if self.mode == "once":
                    raise PublishedElsewhere(str(error), self._report(started)) from None
                self.notify(f"{error}: waiting as stand-by")
            except StoreUnavailable as error:
                # A stand-by outlasts a DynamoDB that is away, as the holder does; one that just started says so.
                if self.mode == "once" or not self.sessions:
                    raise PublishError(str(error), self._report(started)) from error
                self.notify(str(error))
                self.stop.wait(MAX_PAUSE_SECONDS)
            except PrefsError as error:
                raise PublishError(str(error), self._report(started)) from error
        report = self._report(started)
        if self.refused and self.mode == "once":
            raise PublishError(self._refusals(), report)
        return report

    def _report(self, started: float) -> ChangefeedReport:
        return ChangefeedReport(
            domain_key=self.domain.key,
            table=self.table.name,
            upserts=self.upserts,
            deletes=self.deletes,
            unchanged=self.unchanged,
            resyncs=self.resyncs,
            retries=self.lease.retries,
            refused=len(self.refused),
            token=self.lease.state.token,
            seconds=time.monotonic() - started,
        )

    def _give_back(self) -> None:
        try:
            self.lease.release()
        except StoreUnavailable as error:
            # Nothing is lost: the next writer only has to wait until the promise has run out.
            self.notify(f"{error}: the lease was not released")

    def _hold(self) -> None:
        """Publish changes for as long as this process holds the lease.

        Reconnects to the engine when a connection ends.
        """
        pauses = Pauses(FIRST_PAUSE_SECONDS, MAX_PAUSE_SECONDS)
        while not self.stop.is_set():
            sessions = self.sessions
            try:
                with SubscriptionFeed(self.store.engine, self.store.contract, self.domain) as feed:
                    self._session(feed)
                return
            except _Stopped:
                return
            except TokenExpired as error:
                self.notify(f"{error}: reading the whole view again")
                self.full = True
            except (FeedBroken, EngineUnavailable, StoreUnavailable, PublishError) as error:
                # An error before the first success, or too many rejected keys, is not temporary.
                if self.mode == "once" or not self.sessions or len(self.refused) > MAX_REFUSED:
                    raise
                if self.sessions > sessions:
                    pauses.reset()
                else:
                    pause = pauses.next()
                    self.notify(f"{error}; retrying in {pause:g} s")
                    self._pause(pause)

    def _pause(self, seconds: float) -> None:
        ends = time.monotonic() + seconds
        while not self.stop.is_set() and time.monotonic() < ends:
            # DynamoDB may be what we wait for; whether the lease is still ours shows when it is back.
            with suppress(StoreUnavailable):
                self.lease.renew()
            self.stop.wait(min(1.0, max(0.0, ends - time.monotonic())))

    def _drop_unwritten(self) -> None:
        # Changes that were read but not written are read again from the token.
        self.moment: int | None = None
        self.kept: set[Id] = set()
        self.removed: set[Id] = set()
        self.pending: dict[Id, _Write] = {}
        self.pending_bytes = 0

    def _session(self, feed: SubscriptionFeed) -> None:
        self._drop_unwritten()
        identity = feed.identity()
        state = self.lease.state
        # Rows that were refused may be correct by now, and no change would tell.
        if self.full or state.feed != identity or state.token is None or (state.refused and not self.refused):
            first = self._resync(feed, identity)
            self.full = False
        else:
            feed.open(state.token)
            first = []
        self.sessions += 1
        self._apply(first)
        self._follow(feed)

    def _follow(self, feed: SubscriptionFeed) -> None:
        goal = feed.committed() if self.mode == "once" else None
        quiet: tuple[float, int] | None = None
        while not self.stop.is_set():
            self.lease.renew()
            changes = feed.fetch(PAGE, FETCH_SECONDS)
            if changes:
                quiet = None
                self._apply(changes)
                if goal is not None and self.moment is not None and self.moment > goal:
                    return
                continue
            self._end_of_moment()
            self._flush(self.moment)
            # Changes up to a committed moment would have come with a FETCH after it, and there were none.
            if goal is not None:
                self.lease.record(self.lease.state.feed, goal, len(self.refused))
                return
            if quiet is None:
                quiet = (time.monotonic(), feed.committed())
            elif time.monotonic() - quiet[0] >= QUIET_SECONDS:
                self.lease.record(self.lease.state.feed, quiet[1], len(self.refused))
                quiet = (time.monotonic(), feed.committed())

    def _apply(self, changes: Sequence[Change]) -> None:
        for change in changes:
            if change.timestamp != self.moment and change.timestamp is not None:
                self._end_of_moment()
                self.moment = change.timestamp
                self.kept.clear()
            id_ = change.id
            if id_ is None or change.domain_key != self.domain.key:
                self._refuse(id_, self._stray(change))
            elif change.values is None:
                # Within a moment only the net effect counts: where the row of an id moves to another key of the
                # view, its removal may come after its return, and a removal acted on at once would delete the item.
                if id_ not in self.kept:
                    self.removed.add(id_)
                    self._drop(id_)
            else:
                self.removed.discard(id_)
                if not change.renewed:
                    self.kept.add(id_)
                if (item := self._item(id_, change.values)) is not None:
                    self._add(id_, {"Put": {"Item": item}}, item)
        self._flush(self.moment)

    def _end_of_moment(self) -> None:
        removed, self.removed = self.removed, set()
        for id_ in removed:
            self._remove(id_)

    def _item(self, id_: Id, values: Sequence[Any]) -> dict[str, Any] | None:
        try:
            return self.encoder.encode(id_, values)
        except ItemError as error:
            self._refuse(id_, str(error))
            return None

    def _remove(self, id_: Id) -> None:
        key = self.encoder.key(id_)
        self._add(id_, {"Delete": {"Key": key}}, key)

    def _drop(self, id_: Id) -> None:
        if (write := self.pending.pop(id_, None)) is not None:
            self.pending_bytes -= write.size

    def _add(self, id_: Id, request: Mapping[str, Any], item: Mapping[str, Any]) -> None:
        self._drop(id_)
        write = _Write(id_, request, item_bytes(item))
        self.pending_bytes += write.size
        self.pending[id_] = write
        if len(self.pending) >= PAGE or self.pending_bytes > TRANSACTION_BYTES:
            self._flush(None)

    def _flush(self, moment: int | None) -> None:
        """Write the pending changes. `moment` becomes the token once all are written; None keeps the token."""
        batches = list(_batches(self.pending.values()))
        self.pending = {}
        self.pending_bytes = 0
        for place, batch in enumerate(batches, 1):
            last = place == len(batches) and moment is not None
            self._commit(batch, moment if last else self.lease.state.token)

    def _commit(self, batch: list[_Write], token: int | None) -> None:
        try:
            self.lease.write([write.request for write in batch], token, len(self.refused))
        except ItemRefused as error:
            if len(batch) > 1 and not error.places:
                # DynamoDB did not say which; halving finds it and keeps the others.
                middle = len(batch) // 2
                self._commit(batch[:middle], self.lease.state.token)
                self._commit(batch[middle:], token)
                return
            invalid = set(error.places) or {0}
            for place in invalid:
                id_ = batch[place].id
                self._refuse(id_, f"{self.encoder.named(id_)}: DynamoDB refused the item: {error}")
            if rest := [write for place, write in enumerate(batch) if place not in invalid]:
                self._commit(rest, token)
            return
        for write in batch:
            self.refused.pop(write.id, None)
            if "Put" in write.request:
                self.upserts += 1
            else:
                self.deletes += 1

    def _refuse(self, id_: Id | None, message: str) -> None:
        if id_ not in self.refused:
            self.notify(f"domain {self.domain.name}: {message}")
        self.refused[id_] = message
        if len(self.refused) > MAX_REFUSED:
            raise PublishError(self._refusals())

    def _stray(self, change: Change) -> str:
        """Say why a row of the view belongs to no item of the domain."""
        if change.id is None:
            return f"a row has NULL in its key ({', '.join(key.name for key in self.store.keys.columns)})"
        return f"{self.encoder.named(change.id)}: the row's {self.store.keys.sort_key.name} is {change.domain_key}"

    def _refusals(self) -> str:
        first = next(iter(self.refused.values()))
        more = f" (and {len(self.refused) - 1} more)" if len(self.refused) > 1 else ""
        return f"domain {self.domain.name}: {first}{more}: correct {self.domain.relation}; all others are published"

    def _resync(self, feed: SubscriptionFeed, identity: str) -> list[Change]:
        """Compare the whole view with the table and write the differences; return the changes read beyond it."""
        # A crash from here on must not leave a token that vouches for items which were not looked at.
        self.lease.record(identity, None, len(self.refused))
        start = feed.committed()
        feed.open(None)
        self.resyncs += 1
        self.notify(f"domain {self.domain.name}: comparing the whole view with table {self.table.name}")
        beyond: list[Change] = []
        more = True
        while more and not beyond:
            self._go_on()
            # Without patience: nothing means that the view has been read, and until it has, a crash costs all of it.
            changes = feed.fetch(PAGE)
            rows = [change for change in changes if change.timestamp is None]
            self._write_different(rows)
            beyond = changes[len(rows) :]
            more = bool(changes)
        for ids in self.items.pages(self.domain.key):
            for place in range(0, len(ids), PAGE):
                self._go_on()
                looked_at = ids[place : place + PAGE]
                # An id whose row comes back after this look is written by the change that brings it.
                for id_ in set(looked_at) - feed.present(looked_at):
                    self._remove(id_)
                self._flush(None)
        self.lease.record(identity, start, len(self.refused))
        return beyond

    def _go_on(self) -> None:
        if self.stop.is_set():
            raise _Stopped
        self.lease.renew()

    def _write_different(self, rows: Sequence[Change]) -> None:
        items: dict[Id, dict[str, Any]] = {}
        for row in rows:
            if row.id is None or row.domain_key != self.domain.key or row.values is None:
                self._refuse(row.id, self._stray(row))
            elif (item := self._item(row.id, row.values)) is not None:
                items[row.id] = item
        there = self.items.get(self.domain.key, items)
        for id_, item in items.items():
            if id_ in there and _plain_item(there[id_]) == _plain_item(item):
                self.unchanged += 1
                self.refused.pop(id_, None)
            else:
                self._add(id_, {"Put": {"Item": item}}, item)
        self._flush(None)


def _plain_item(item: Mapping[str, Any]) -> dict[str, Any]:
    return {name: plain(typed) for name, typed in item.items()}


def _batches(writes: Iterable[_Write]) -> Iterator[list[_Write]]:
    batch: list[_Write] = []
    size = 0
    for write in writes:
        if batch and (len(batch) == TRANSACTION_ITEMS or size + write.size > TRANSACTION_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(write)
        size += write.size
    if batch:
        yield batch
