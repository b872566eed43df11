"""Viewer profiles from DynamoDB: typed, within a latency budget, with what is known of their freshness."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal, Self, TypedDict, TypeVar, Unpack, cast

from dagster_prefs import ids
from dagster_prefs.errors import PrefsError, excerpt
from dagster_prefs.online.contract import Contract, Domain, load_contract
from dagster_prefs.online.items import ItemDecoder, ItemError
from dagster_prefs.online.reader import BATCH_KEYS, Found, ItemReader, Key
from dagster_prefs.online.reserved import CANARY_VIEWER_ID
from dagster_prefs.online.transport import ReadError, make_transport
from dagster_prefs.serving.domains import (
    DOMAIN_CLASSES,
    DomainProfile,
    InteractionsProfile,
    PreferencesProfile,
    WatchProfile,
)

T = TypeVar("T")

MAX_VIEWERS = 10_000
CANARY_CACHE_SECONDS = 5.0
# How far a canary may be ahead of this clock. Clocks that are kept by NTP differ by less; a canary further ahead says
# that a clock is wrong, and nothing about the pipeline.
CANARY_AHEAD_SECONDS = 5.0

Fallback = Literal["partial", "cold_start"]
State = Literal["found", "cold_start", "failed"]


class ProfileError(PrefsError):
    """A profile was asked for with impossible arguments, or a domain that was not asked for was used."""


@dataclass(frozen=True, slots=True)
class DomainRead:
    """How one domain of a profile was answered.

    `last_event_at`: newest event behind the item, epoch milliseconds. `freshness_seconds`: how far the
    pipeline was behind, by its canary, at most 5 s before the read; None is unknown: there is no canary, or
    its time is ahead of the clock. `fresh`: whether that is within `max_staleness_seconds`; None is unknown.
    `error` is set where the domain failed, whatever the fallback.
    """

    state: State
    last_event_at: int | None
    freshness_seconds: float | None
    max_staleness_seconds: float
    fresh: bool | None
    error: PrefsError | None = None


@dataclass(frozen=True, slots=True)
class Profile:
    """One viewer's domains, by the names of the contract.

    A domain is used as `profile.watch.watch_minutes_7d`; how it was answered is in `profile.reads["watch"]`.
    """

    viewer_id: int
    values: Mapping[str, DomainProfile]
    reads: Mapping[str, DomainRead]

    @property
    def watch(self) -> WatchProfile:
        """engagement#watch; raises as `domain` does."""
        return cast(WatchProfile, self.domain("watch"))

    @property
    def interactions(self) -> InteractionsProfile:
        """engagement#interactions; raises as `domain` does."""
        return cast(InteractionsProfile, self.domain("interactions"))

    @property
    def preferences(self) -> PreferencesProfile:
        """engagement#preferences; raises as `domain` does."""
        return cast(PreferencesProfile, self.domain("preferences"))

    @property
    def failure(self) -> PrefsError | None:
        """Why no domain at all arrived; None where at least one did."""
        return None if self.values else next(read.error for read in self.reads.values())

    @property
    def partial(self) -> bool:
        """Whether a domain that was asked for did not arrive; true with cold-start values in its place,
        too."""
        return any(read.error is not None for read in self.reads.values())

    @property
    def cold_start(self) -> bool:
        """Whether nothing is known of the viewer in any domain that was asked for."""
        return all(read.state == "cold_start" for read in self.reads.values())

    def domain(self, name: str) -> DomainProfile:
        """The values of one domain.

        Raises the domain's own error where it failed, ProfileError where it was not asked for.
        """
        value = self.values.get(name)
        if value is not None:
            return value
        read = self.reads.get(name)
        if read is None or read.error is None:
            raise ProfileError(f"domain {excerpt(name)} was not read: ask for it in domains=…")
        raise read.error

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON: per domain its attributes and how it was answered."""
        answer: dict[str, Any] = {}
        for name, read in self.reads.items():
            value = self.values.get(name)
            answer[name] = {
                "attributes": None if value is None else asdict(value),
                "state": read.state,
                "freshness_seconds": read.freshness_seconds,
                "max_staleness_seconds": read.max_staleness_seconds,
                "fresh": read.fresh,
                "error": None if read.error is None else str(read.error),
            }
        return {"viewer_id": self.viewer_id, "partial": self.partial, "domains": answer}


@dataclass(frozen=True, slots=True)
class _Served:
    """What the client prepared for one domain."""

    domain: Domain
    make: Callable[..., DomainProfile]
    decoder: ItemDecoder
    cold: DomainProfile


class ProfileClient:
    """Reads viewer profiles; made once, used from many threads.

    One domain is one GetItem, two are two side by side, more are one BatchGetItem. `transport="lean"` signs
    and sends requests on its own kept-alive connections; `"boto3"` is the slower fallback, for proxies.

    `budget_seconds` bounds every call, retries included; `read_timeout_seconds` one attempt. When the
    budget is spent, `fallback="partial"` leaves out what did not arrive (using it raises its error),
    `"cold_start"` puts cold-start values there; `profile.partial` is true with both. Both also serve a
    domain whose item is not as the contract says. Errors that no retry heals (credentials, a missing table)
    raise ReadError.
    """

    def __init__(
        self,
        *,
        endpoint_url: str | None = None,
        region: str | None = None,
        table_prefix: str = "",
        contract: Contract | None = None,
        transport: Literal["lean", "boto3"] = "lean",
        consistent: bool = False,
        budget_seconds: float = 1.0,
        connect_timeout_seconds: float = 0.5,
        read_timeout_seconds: float = 0.5,
        max_attempts: int = 4,
        pool_size: int = 16,
        fallback: Fallback = "partial",
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.contract = contract or load_contract()
        self._served = {
            domain.name: _Served(domain, _class_of(domain), ItemDecoder(domain), _class_of(domain)())
            for domain in self.contract.domains.values()
        }
        self._all = tuple(self._served)
        self._consistent = consistent
        self._budget = _positive(budget_seconds, "budget_seconds")
        self._fallback: Fallback = _fallback(fallback)
        self._clock = clock
        self._side_by_side = pool_size
        self._reader = ItemReader(
            make_transport(
                transport,
                endpoint_url=endpoint_url,
                region=region,
                pool_size=pool_size,
                connect_timeout_seconds=_positive(connect_timeout_seconds, "connect_timeout_seconds"),
                read_timeout_seconds=_positive(read_timeout_seconds, "read_timeout_seconds"),
            ),
            self.contract,
            table_prefix + self.contract.table.name,
            read_timeout_seconds=read_timeout_seconds,
            max_attempts=max_attempts,
            side_by_side=pool_size,
        )
        self._lock = threading.Lock()
        self._lag: dict[str, float | None] = dict.fromkeys(self._all)
        self._lag_read_at = dict.fromkeys(self._all, -CANARY_CACHE_SECONDS * 2)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._reader.close()

    def warm(self, connections: int = 2) -> None:
        """Open connections ahead of the first read."""
        self._reader.warm(connections)

    def get(
        self,
        viewer_id: int,
        domains: Sequence[str] | None = None,
        *,
        consistent: bool | None = None,
        budget_seconds: float | None = None,
        max_staleness_seconds: float | None = None,
        fallback: Fallback | None = None,
        started_at: float | None = None,
    ) -> Profile:
        """One viewer's profile; `domains` are names or keys of the contract, all by default.

        `max_staleness_seconds` tightens the contract's promise for `fresh`; it never loosens it. A viewer
        without an item gets that domain's cold-start values. The budget runs from `started_at` (of
        time.monotonic()), for a caller who waited before this call; from now where None.

        Raises ProfileError or ContractError for impossible arguments, ReadError as the class says.
        """
        deadline = _started(started_at) + self._checked_budget(budget_seconds, self._budget)
        viewer = _viewer(viewer_id)
        return self._read([viewer], domains, consistent, deadline, max_staleness_seconds, fallback)[viewer]

    def get_many(
        self,
        viewer_ids: Iterable[int],
        domains: Sequence[str] | None = None,
        *,
        consistent: bool | None = None,
        budget_seconds: float | None = None,
        max_staleness_seconds: float | None = None,
        fallback: Fallback | None = None,
        started_at: float | None = None,
    ) -> dict[int, Profile]:
        """The profiles of up to 10,000 viewers, in the order asked; a repeated id is read once.

        Read in chunks of 100 keys, side by side. The default budget is the client's, times the rounds that
        the chunks need. Otherwise as `get`.
        """
        viewers = list(dict.fromkeys(map(_viewer, viewer_ids)))
        if not viewers:
            raise ProfileError("no viewer ids were given: pass at least one")
        if len(viewers) > MAX_VIEWERS:
            raise ProfileError(f"{len(viewers)} viewers are more than {MAX_VIEWERS} in one call: split them")
        default = self.default_budget_seconds(len(viewers), domains)
        deadline = _started(started_at) + self._checked_budget(budget_seconds, default)
        return self._read(viewers, domains, consistent, deadline, max_staleness_seconds, fallback)

    def default_budget_seconds(self, viewers: int, domains: Sequence[str] | None = None) -> float:
        """Return what `get_many` takes for its budget when it is given none, in seconds."""
        keys = viewers * len(domains or self._all)
        rounds = max(1, -(-keys // (BATCH_KEYS * self._side_by_side)))
        return self._budget * rounds

    def _checked_budget(self, given: float | None, default: float) -> float:
        return default if given is None else _positive(given, "budget_seconds")

    def _read(
        self,
        viewers: list[int],
        domains: Sequence[str] | None,
        consistent: bool | None,
        deadline: float,
        max_staleness_seconds: float | None,
        fallback: Fallback | None,
    ) -> dict[int, Profile]:
        names = self._names(domains)
        chosen = self._fallback if fallback is None else _fallback(fallback)
        if max_staleness_seconds is not None:
            _positive(max_staleness_seconds, "max_staleness_seconds")
        served = [self._served[name] for name in names]
        keys = [(viewer, entry.domain.key) for viewer in viewers for entry in served]
        due = self._due_canaries(names)
        found = self._reader.read(
            keys,
            consistent=self._consistent if consistent is None else consistent,
            deadline=deadline,
            canaries=[(CANARY_VIEWER_ID, self._served[name].domain.key) for name in due],
        )
        if due:
            self._note_canaries(due, found)
        limits = {
            entry.domain.name: entry.domain.freshness.error_seconds
            if max_staleness_seconds is None
            else min(max_staleness_seconds, entry.domain.freshness.error_seconds)
            for entry in served
        }
        return {viewer: self._profile(viewer, served, found, limits, chosen) for viewer in viewers}

    def _profile(
        self,
        viewer: int,
        served: list[_Served],
        found: dict[Key, Found],
        limits: dict[str, float],
        fallback: Fallback,
    ) -> Profile:
        values: dict[str, DomainProfile] = {}
        reads: dict[str, DomainRead] = {}
        for entry in served:
            name = entry.domain.name
            item = found[(viewer, entry.domain.key)]
            error: PrefsError | None = None
            value: DomainProfile | None = None
            state: State = "failed"
            if item is None:
                value, state = entry.cold, "cold_start"
            elif isinstance(item, ReadError):
                if not item.transient:
                    raise item
                error = item
            else:
                try:
                    value, state = entry.make(**entry.decoder.decode(item)), "found"
                except ItemError as problem:
                    error = problem
            if value is None and fallback == "cold_start":
                value, state = entry.cold, "cold_start"
            if value is not None:
                values[name] = value
            lag = self._lag[name]
            reads[name] = DomainRead(
                state=state,
                last_event_at=None if value is None else value.last_event_at,
                freshness_seconds=lag,
                max_staleness_seconds=limits[name],
                fresh=None if lag is None else lag <= limits[name],
                error=error,
            )
        return Profile(viewer, values, reads)

    def _names(self, domains: Sequence[str] | None) -> tuple[str, ...]:
        if domains is None:
            return self._all
        if isinstance(domains, str):
            raise ProfileError(
                f"domains is a list of names, not the text {excerpt(domains)}: pass [{excerpt(domains)}]"
            )
        if not domains:
            raise ProfileError(f"domains is empty: name at least one of {', '.join(self._all)}")
        return tuple(dict.fromkeys(self.contract.domain(name).name for name in domains))

    def _due_canaries(self, names: tuple[str, ...]) -> list[str]:
        now = time.monotonic()
        with self._lock:
            due = [name for name in names if now - self._lag_read_at[name] > CANARY_CACHE_SECONDS]
            for name in due:
                self._lag_read_at[name] = now
        return due

    def _note_canaries(self, names: list[str], found: dict[Key, Found]) -> None:
        for name in names:
            entry = self._served[name]
            item = found.get((CANARY_VIEWER_ID, entry.domain.key))
            lag: float | None = None
            if item is not None and not isinstance(item, ReadError):
                try:
                    last = int(item["last_event_at"]["N"])
                except (KeyError, TypeError, ValueError):
                    # A canary that cannot be read says nothing about the viewer's own item.
                    last = None
                if last is not None:
                    age = self._clock() - last / 1000
                    lag = max(0.0, age) if age >= -CANARY_AHEAD_SECONDS else None
            self._lag[name] = lag


class ClientOptions(TypedDict, total=False):
    """The arguments of ProfileClient."""

    endpoint_url: str | None
    region: str | None
    table_prefix: str
    contract: Contract | None
    transport: Literal["lean", "boto3"]
    consistent: bool
    budget_seconds: float
    connect_timeout_seconds: float
    read_timeout_seconds: float
    max_attempts: int
    pool_size: int
    fallback: Fallback
    clock: Callable[[], float]


class ReadOptions(TypedDict, total=False):
    """The arguments of one read that have the client's as their default."""

    consistent: bool | None
    budget_seconds: float | None
    max_staleness_seconds: float | None
    fallback: Fallback | None
    started_at: float | None


class AsyncProfileClient:
    """ProfileClient for asyncio: the same arguments, calls and answers, awaited.

    `threads` reads run at a time, beneath; the event loop is never held up. Waiting for a thread is part of
    a read's budget.
    """

    def __init__(self, *, threads: int = 8, **options: Unpack[ClientOptions]) -> None:
        self._client = ProfileClient(**options)
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="profile-client")

    @property
    def contract(self) -> Contract:
        """The contract that answers are read by."""
        return self._client.contract

    def default_budget_seconds(self, viewers: int, domains: Sequence[str] | None = None) -> float:
        """As `ProfileClient.default_budget_seconds`."""
        return self._client.default_budget_seconds(viewers, domains)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Let running reads end, then close the connections."""
        await asyncio.get_running_loop().run_in_executor(None, self._threads.shutdown)
        self._client.close()

    async def warm(self, connections: int = 2) -> None:
        """As `ProfileClient.warm`."""
        await self._run(partial(self._client.warm, connections))

    async def get(
        self, viewer_id: int, domains: Sequence[str] | None = None, **options: Unpack[ReadOptions]
    ) -> Profile:
        """As `ProfileClient.get`."""
        options.setdefault("started_at", time.monotonic())
        return await self._run(partial(self._client.get, viewer_id, domains, **options))

    async def get_many(
        self,
        viewer_ids: Iterable[int],
        domains: Sequence[str] | None = None,
        **options: Unpack[ReadOptions],
    ) -> dict[int, Profile]:
        """As `ProfileClient.get_many`."""
        options.setdefault("started_at", time.monotonic())
        return await self._run(partial(self._client.get_many, list(viewer_ids), domains, **options))

    async def _run(self, read: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, read)


def _class_of(domain: Domain) -> type[DomainProfile]:
    made = DOMAIN_CLASSES.get(domain.name)
    if made is None:
        raise ProfileError(
            f"the contract's domain {domain.name} has no class in this version: upgrade dagster-prefs"
        )
    return made


def _started(at: float | None) -> float:
    return time.monotonic() if at is None else at


def _viewer(given: object) -> int:
    # In Python a viewer id is a number; text is refused, so that no key of an answer is another than was asked.
    if isinstance(given, str):
        raise ProfileError(f"a viewer id is a 64-bit integer, not {excerpt(given)}")
    try:
        return ids.viewer_id(given)
    except ids.BadId as error:
        raise ProfileError(str(error)) from None


def _positive(seconds: float, name: str) -> float:
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds < float("inf"):
        raise ProfileError(f"{name} must be a number of seconds above 0, not {excerpt(seconds)}")
    return float(seconds)


def _fallback(given: str) -> Fallback:
    if given not in ("partial", "cold_start"):
        raise ProfileError(f"fallback must be 'partial' or 'cold_start', not {excerpt(given)}")
    return cast(Fallback, given)
