"""Profiles from DynamoDB: typed, within a latency budget, with their freshness as far as it is known."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypedDict, TypeVar, Unpack, cast
from uuid import UUID

from dagster_prefs.declarations.contract import PROFILE_NAMES, Contract, Domain
from dagster_prefs.declarations.registry import Entity, Registry, open_registry
from dagster_prefs.declarations.reserved import CANARY_AHEAD_SECONDS, canary_id
from dagster_prefs.dynamodb.items import ItemDecoder, ItemError
from dagster_prefs.dynamodb.reader import BATCH_KEYS, Attempts, Found, ItemReader, Key
from dagster_prefs.dynamodb.transport import ReadError, make_transport
from dagster_prefs.errors import PrefsError, excerpt
from dagster_prefs.ids import BadId, Id, read_id
from dagster_prefs.serving.domains import (
    DomainShape,
    class_name,
    domain_shape,
    same_attributes,
    shaped_class,
)
from dagster_prefs.serving.observing import FAILED, Observer, SimpleOutcome
from dagster_prefs.serving.served_log import ServedLog

T = TypeVar("T")

MAX_IDS = 10_000
CANARY_CACHE_SECONDS = 5.0

Fallback = Literal["partial", "cold_start"]
State = Literal["found", "cold_start", "failed"]


class ProfileError(PrefsError):
    """A profile was requested with invalid arguments, or a domain was used that was not requested."""


@dataclass(frozen=True, slots=True)
class DomainRead:
    """The outcome of reading one domain of a profile.

    `last_event_at`: newest event behind the item, epoch milliseconds. `freshness_seconds`: how far the
    pipeline was behind, by its canary, at most 5 s before the read; None if unknown: there is no canary,
    or its time is ahead of the clock. `fresh`: whether that is within `max_staleness_seconds`; None if
    unknown. `error` is set if the domain failed, whatever the fallback. `unknown` names attributes that
    the item lacks, for example because an older version of the contract wrote it; they have their
    cold-start values.
    """

    state: State
    last_event_at: int | None
    freshness_seconds: float | None
    max_staleness_seconds: float
    fresh: bool | None
    error: PrefsError | None = None
    unknown: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Profile:
    """The domains of one id, by the names of the contract.

    A domain is used as `profile.progress.lessons_7d`, and raises as `domain` does; how it was answered is in
    `profile.reads["progress"]`. The id is `profile.id`, and also has the name of the entity's
    key (`profile.learner_id`); of a composite key it is a tuple, and each part has the name of its column.
    """

    entity: ClassVar[str] = ""
    # The name of the key column; for a composite key, the names of all its columns.
    key: ClassVar[str | tuple[str, ...]] = "id"
    # Classes of the domains; those of a generated client, or made from the contract.
    classes: ClassVar[Mapping[str, type[Any]]] = {}

    id: Any
    values: Mapping[str, Any]
    reads: Mapping[str, DomainRead]

    def __getattr__(self, name: str) -> Any:
        # Only called for missing attributes, because domains are properties of the class that the client
        # creates.
        known = ", ".join(self.classes)
        raise AttributeError(f"a {self.entity or 'profile'} has no domain {excerpt(name)}: it has {known}")

    @property
    def failure(self) -> PrefsError | None:
        """The error if no domain arrived, None if at least one did."""
        return None if self.values else next(read.error for read in self.reads.values())

    @property
    def partial(self) -> bool:
        """Whether a requested domain did not arrive, even if cold-start values replace it."""
        return any(read.error is not None for read in self.reads.values())

    @property
    def cold_start(self) -> bool:
        """Whether the id has no data in any requested domain."""
        return all(read.state == "cold_start" for read in self.reads.values())

    def domain(self, name: str) -> Any:
        """Return the values of one domain.

        Raises the domain's own error if it failed, ProfileError if it was not requested.
        """
        value = self.values.get(name)
        if value is not None:
            return value
        read = self.reads.get(name)
        if read is None or read.error is None:
            raise ProfileError(f"domain {excerpt(name)} was not read: ask for it in domains=…")
        raise read.error

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON: each domain's attributes and the outcome of its read."""
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
                "unknown": list(read.unknown),
            }
        ids = {self.key: self.id} if isinstance(self.key, str) else dict(zip(self.key, self.id, strict=True))
        return {**ids, "partial": self.partial, "domains": answer}


@dataclass(frozen=True, slots=True)
class _Served:
    """The parts that the client prepared for one domain."""

    domain: Domain
    make: Callable[..., Any]
    decoder: ItemDecoder
    cold: Any


@dataclass(slots=True)
class _Asked:
    """What a read was asked for; `limits` are the seconds up to which a domain is fresh."""

    served: list[_Served]
    consistent: bool
    limits: dict[str, float]
    fallback: Fallback


def _positive(seconds: float, name: str) -> float:
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds < float("inf"):
        raise ProfileError(f"{name} must be a number of seconds above 0, not {excerpt(seconds)}")
    return float(seconds)


def _fallback(given: str) -> Fallback:
    if given not in ("partial", "cold_start"):
        raise ProfileError(f"fallback must be 'partial' or 'cold_start', not {excerpt(given)}")
    return cast(Fallback, given)


@dataclass(frozen=True, slots=True)
class ClientOptions:
    """How a client reads: its defaults, its time limits and its connections. Raises ProfileError for invalid values.

    `budget_seconds` bounds every call, retries included; `read_timeout_seconds` one attempt, of at most
    `max_attempts`. When the budget is spent, `fallback="partial"` omits what did not arrive (using it raises its
    error), `"cold_start"` puts cold-start values there; `profile.partial` is true with both. Both fallbacks also
    apply to a domain whose item violates the contract. `consistent` reads strongly, at twice the price.
    `transport="lean"` signs and sends requests on its own kept-alive connections, `pool_size` at most; `"boto3"` is
    the slower fallback, for proxies. `observer` is told of every call, e.g. `ReadCounts()`, and `log` of every answer.
    """

    budget_seconds: float = 1.0
    fallback: Fallback = "partial"
    consistent: bool = False
    connect_timeout_seconds: float = 0.5
    read_timeout_seconds: float = 0.5
    max_attempts: int = 4
    pool_size: int = 16
    transport: Literal["lean", "boto3"] = "lean"
    observer: Observer | None = None
    log: ServedLog | None = None

    def __post_init__(self) -> None:
        for name in ("budget_seconds", "connect_timeout_seconds", "read_timeout_seconds"):
            _positive(getattr(self, name), name)
        _fallback(self.fallback)


class ProfileClient:
    """Reads the profiles of one entity. Create it once and use it from many threads.

    `registry` is the project's declarations: the path of its `registry.json` or of its folder, the file's
    decoded JSON, or a Registry. `entity` may be omitted for the only, or the first, entity that has a table.

    One domain is one GetItem, two are two concurrent ones, more are one BatchGetItem. Errors that no retry resolves
    (credentials, a missing table) raise ReadError. Raises RegistryError for a registry that cannot be read,
    ProfileError for invalid arguments.
    """

    # The class of the profiles; a generated client sets its own.
    profile_class: ClassVar[type[Profile] | None] = None

    def __init__(
        self,
        registry: Registry | Mapping[str, Any] | Path | str,
        *,
        entity: str | None = None,
        endpoint_url: str | None = None,
        region: str | None = None,
        table_prefix: str = "",
        options: ClientOptions = ClientOptions(),
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.registry = open_registry(registry)
        self.contract = self.registry.contract
        generated = self.profile_class
        self.entity = served_entity(self.registry, entity or (generated.entity if generated else None))
        self._keys = self.entity.keys
        self.domains = self.contract.domains_of(self.entity.name)
        self._make = generated or _profile_class(self.entity, self.domains)
        if generated is not None:
            _check_generated(generated, self.entity, self.domains)
        self._served = {
            domain.name: _Served(domain, made := self._make.classes[domain.name], ItemDecoder(domain), made())
            for domain in self.domains
        }
        table = self.contract.tables[self.entity.name]
        self._canary = canary_id(self.registry, self.entity)
        self._all = tuple(self._served)
        self._given = {given: domain.name for domain in self.domains for given in (domain.name, domain.key)}
        self._options = options
        log = options.log
        self._log = None if log is None else log.of(table, self.domains, self.contract.version)
        self._clock = clock
        self._reader = ItemReader(
            make_transport(
                options.transport,
                endpoint_url=endpoint_url,
                region=region,
                pool_size=options.pool_size,
                connect_timeout_seconds=options.connect_timeout_seconds,
                read_timeout_seconds=options.read_timeout_seconds,
            ),
            table,
            table_prefix + table.name,
            read_timeout_seconds=options.read_timeout_seconds,
            max_attempts=options.max_attempts,
            side_by_side=options.pool_size,
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
        id_: Any,
        /,
        domains: Sequence[str] | None = None,
        *,
        consistent: bool | None = None,
        budget_seconds: float | None = None,
        max_staleness_seconds: float | None = None,
        fallback: Fallback | None = None,
        started_at: float | None = None,
    ) -> Profile:
        """Read the profile of one id; `domains` are names or keys of the contract, all by default.

        The id of an entity with a composite key is a tuple of its parts: `client.get((learner, course))`.

        `max_staleness_seconds` tightens the contract's promise for `fresh`; it never loosens it. An id
        without an item gets that domain's cold-start values. The budget runs from `started_at` (of
        time.monotonic()), for a caller who waited before this call; from now where None.

        Raises ProfileError or ContractError for invalid arguments, ReadError as described for the class.
        """
        deadline = _started(started_at) + self._checked_budget(budget_seconds, self._options.budget_seconds)
        checked = self._id(id_)
        asked = self._asked(domains, consistent, max_staleness_seconds, fallback)
        return self._read("get", [checked], asked, deadline)[checked]

    def get_many(
        self,
        ids: Iterable[Any],
        /,
        domains: Sequence[str] | None = None,
        *,
        consistent: bool | None = None,
        budget_seconds: float | None = None,
        max_staleness_seconds: float | None = None,
        fallback: Fallback | None = None,
        started_at: float | None = None,
    ) -> Mapping[Any, Profile]:
        """Read the profiles of up to 10,000 ids, in the requested order; a repeated id is read once.

        Reads chunks of 100 keys concurrently. The default budget is the client's, times the number of rounds
        that the chunks need. Otherwise like `get`.
        """
        checked = list(dict.fromkeys(map(self._id, ids)))
        if not checked:
            raise ProfileError("no ids were given: pass at least one")
        if len(checked) > MAX_IDS:
            raise ProfileError(f"{len(checked)} ids are more than {MAX_IDS} in one call: split them")
        default = self.default_budget_seconds(len(checked), domains)
        deadline = _started(started_at) + self._checked_budget(budget_seconds, default)
        asked = self._asked(domains, consistent, max_staleness_seconds, fallback)
        return self._read("get_many", checked, asked, deadline)

    def default_budget_seconds(self, ids: int, domains: Sequence[str] | None = None) -> float:
        """Return the default budget of `get_many`, in seconds."""
        keys = ids * len(domains or self._all)
        rounds = max(1, -(-keys // (BATCH_KEYS * self._options.pool_size)))
        return self._options.budget_seconds * rounds

    def _checked_budget(self, given: float | None, default: float) -> float:
        return default if given is None else _positive(given, "budget_seconds")

    def _asked(
        self,
        domains: Sequence[str] | None,
        consistent: bool | None,
        max_staleness_seconds: float | None,
        fallback: Fallback | None,
    ) -> _Asked:
        """Check the arguments of a read, and complete them by the client's options."""
        chosen = self._options.fallback if fallback is None else _fallback(fallback)
        if max_staleness_seconds is not None:
            _positive(max_staleness_seconds, "max_staleness_seconds")
        served = [self._served[name] for name in self._names(domains)]
        limits = {
            entry.domain.name: entry.domain.freshness.error_seconds
            if max_staleness_seconds is None
            else min(max_staleness_seconds, entry.domain.freshness.error_seconds)
            for entry in served
        }
        return _Asked(served, self._options.consistent if consistent is None else consistent, limits, chosen)

    def _read(self, operation: str, ids: list[Id], asked: _Asked, deadline: float) -> dict[Any, Profile]:
        log = self._log
        if log is None:
            return self._observed(operation, ids, asked, deadline)
        started = time.perf_counter()
        answer = self._observed(operation, ids, asked, deadline)
        log.note(answer.values(), seconds=time.perf_counter() - started, consistent=asked.consistent)
        return answer

    def _observed(self, operation: str, ids: list[Id], asked: _Asked, deadline: float) -> dict[Any, Profile]:
        observer = self._options.observer
        if observer is None:
            return self._found(ids, asked, deadline)
        started = time.perf_counter()
        call = observer.call(self.entity.name, operation)
        results: list[str] = []
        try:
            answer = self._found(ids, asked, deadline, call.attempts, results)
        except Exception as error:
            failed = SimpleOutcome(FAILED, error)
            reads = [{entry.domain.name: failed for entry in asked.served}] * len(ids)
            call.end(time.perf_counter() - started, results, reads, answered=False)
            raise
        call.end(time.perf_counter() - started, results, [profile.reads for profile in answer.values()])
        return answer

    def _found(
        self,
        ids: list[Id],
        asked: _Asked,
        deadline: float,
        told: Attempts | None = None,
        results: list[str] | None = None,
    ) -> dict[Any, Profile]:
        names = [entry.domain.name for entry in asked.served]
        due = self._due_canaries(names)
        found = self._reader.read(
            [(id_, entry.domain.key) for id_ in ids for entry in asked.served],
            consistent=asked.consistent,
            deadline=deadline,
            canaries=[(self._canary, self._served[name].domain.key) for name in due],
            told=told,
            results=results,
        )
        if due:
            self._note_canaries(due, found)
        return {id_: self._profile(id_, asked, found) for id_ in ids}

    def _profile(self, id_: Id, asked: _Asked, found: dict[Key, Found]) -> Profile:
        values: dict[str, Any] = {}
        reads: dict[str, DomainRead] = {}
        limits = asked.limits
        for entry in asked.served:
            name = entry.domain.name
            item = found[(id_, entry.domain.key)]
            error: PrefsError | None = None
            value: Any = None
            unknown: tuple[str, ...] = ()
            state: State = "failed"
            if item is None:
                value, state = entry.cold, "cold_start"
            elif isinstance(item, ReadError):
                if not item.transient:
                    raise item
                error = item
            else:
                try:
                    decoded, unknown = entry.decoder.decode(item)
                    value, state = entry.make(*decoded), "found"
                except ItemError as problem:
                    error = problem
            if value is None and asked.fallback == "cold_start":
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
                unknown=unknown,
            )
        return self._make(id_, values, reads)

    def _id(self, given: Any) -> Id:
        parts = (given,) if len(self._keys) == 1 else given if isinstance(given, tuple) else ()
        # In Python an id has its type, so that every key of the result is one of the requested ids.
        for key, part in zip(self._keys, parts, strict=False):
            if isinstance(part, str) == (key.type == "bigint") and not isinstance(part, UUID):
                raise ProfileError(
                    f"{key.name} must be a {'64-bit integer' if key.type == 'bigint' else 'text'}, "
                    f"not {excerpt(part)}"
                )
        try:
            return read_id(self._keys, given)
        except BadId as error:
            raise ProfileError(str(error)) from None

    def _names(self, domains: Sequence[str] | None) -> tuple[str, ...]:
        if domains is None:
            return self._all
        if isinstance(domains, str):
            raise ProfileError(
                f"domains must be a list of names, not the text {excerpt(domains)}: pass [{excerpt(domains)}]"
            )
        if not domains:
            raise ProfileError(f"domains is empty: name at least one of {', '.join(self._all)}")
        return tuple(dict.fromkeys(self._given.get(name) or self._domain_name(name) for name in domains))

    def _domain_name(self, given: str) -> str:
        found = self.contract.domain(given)
        if found.entity != self.entity.name:
            raise ProfileError(
                f"domain {found.name} is of entity {found.entity}: a {self.entity.name} has {', '.join(self._all)}"
            )
        return found.name

    def _due_canaries(self, names: Sequence[str]) -> list[str]:
        now = time.monotonic()
        with self._lock:
            due = [name for name in names if now - self._lag_read_at[name] > CANARY_CACHE_SECONDS]
            for name in due:
                self._lag_read_at[name] = now
        return due

    def _note_canaries(self, names: list[str], found: dict[Key, Found]) -> None:
        for name in names:
            entry = self._served[name]
            item = found.get((self._canary, entry.domain.key))
            lag: float | None = None
            if item is not None and not isinstance(item, ReadError):
                try:
                    last = int(item["last_event_at"]["N"])
                except (KeyError, TypeError, ValueError):
                    # A canary that cannot be read says nothing about the id's own item.
                    last = None
                if last is not None:
                    age = self._clock() - last / 1000
                    lag = max(0.0, age) if age >= -CANARY_AHEAD_SECONDS else None
            self._lag[name] = lag


class ReadOptions(TypedDict, total=False):
    """The arguments of one read that default to the client's."""

    consistent: bool | None
    budget_seconds: float | None
    max_staleness_seconds: float | None
    fallback: Fallback | None
    started_at: float | None


class AsyncProfileClient:
    """ProfileClient for asyncio: the same arguments, calls and results, awaited.

    Up to `threads` reads run at a time on threads, without blocking the event loop. Waiting for a thread
    counts towards a read's budget.
    """

    # A generated client sets its own.
    client_class: ClassVar[type[ProfileClient]] = ProfileClient

    def __init__(
        self,
        registry: Registry | Mapping[str, Any] | Path | str,
        *,
        entity: str | None = None,
        endpoint_url: str | None = None,
        region: str | None = None,
        table_prefix: str = "",
        options: ClientOptions = ClientOptions(),
        threads: int = 8,
    ) -> None:
        self._client = self.client_class(
            registry,
            entity=entity,
            endpoint_url=endpoint_url,
            region=region,
            table_prefix=table_prefix,
            options=options,
        )
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="profile-client")

    @property
    def registry(self) -> Registry:
        """The project's declarations."""
        return self._client.registry

    @property
    def contract(self) -> Contract:
        """The contract by which items are interpreted."""
        return self._client.contract

    @property
    def entity(self) -> Entity:
        """The entity of the profiles."""
        return self._client.entity

    @property
    def domains(self) -> tuple[Domain, ...]:
        """The domains of a profile."""
        return self._client.domains

    def default_budget_seconds(self, ids: int, domains: Sequence[str] | None = None) -> float:
        """Return the same as `ProfileClient.default_budget_seconds`."""
        return self._client.default_budget_seconds(ids, domains)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Wait until running reads finish, then close the connections."""
        await asyncio.get_running_loop().run_in_executor(None, self._threads.shutdown)
        self._client.close()

    async def warm(self, connections: int = 2) -> None:
        """Await `ProfileClient.warm`."""
        await self._run(partial(self._client.warm, connections))

    async def get(
        self, id_: Any, /, domains: Sequence[str] | None = None, **options: Unpack[ReadOptions]
    ) -> Profile:
        """Await `ProfileClient.get`."""
        options.setdefault("started_at", time.monotonic())
        return await self._run(partial(self._client.get, id_, domains, **options))

    async def get_many(
        self,
        ids: Iterable[Any],
        /,
        domains: Sequence[str] | None = None,
        **options: Unpack[ReadOptions],
    ) -> Mapping[Any, Profile]:
        """Await `ProfileClient.get_many`."""
        options.setdefault("started_at", time.monotonic())
        return await self._run(partial(self._client.get_many, list(ids), domains, **options))

    async def _run(self, read: Callable[[], T]) -> T:
        # With the caller's context: spans of the read belong to the span that the caller is in.
        return await asyncio.get_running_loop().run_in_executor(self._threads, copy_context().run, read)


def served_entity(registry: Registry, name: str | None) -> Entity:
    """Return the entity of that name, which must have a table, or else the first one that has a table.

    Raises ProfileError naming the entities that have one.
    """
    served = tuple(registry.contract.tables)
    if name is None:
        return registry.entity(served[0])
    if name not in served:
        raise ProfileError(f"entity {excerpt(name)} has no profiles: one of {', '.join(served)} has")
    return registry.entity(name)


def _profile_class(entity: Entity, domains: Sequence[Domain]) -> type[Profile]:
    return _made_profile_class(entity.name, profile_key(entity), tuple(map(domain_shape, domains)))


def profile_key(entity: Entity) -> str | tuple[str, ...]:
    """Return the value of `Profile.key` for an entity."""
    return entity.key.name if len(entity.keys) == 1 else entity.key_names


@cache
def _made_profile_class(
    entity: str, key: str | tuple[str, ...], shapes: tuple[DomainShape, ...]
) -> type[Profile]:
    """Return the class of an entity's profiles; cached, so that profiles of two clients compare equal."""
    domains = {shape.name: property(_reader(shape.name)) for shape in shapes}
    # A key column with such a name, e.g. `id`, has no second name in a profile.
    alias = {name: property(_part_of_id(place)) for name, place in key_places(key)}
    return type(
        class_name(entity),
        (Profile,),
        {
            "__slots__": (),
            "__doc__": f"One {entity}'s domains: {', '.join(domains)}.",
            # pickle would look for the class in a module, which does not contain it.
            "__reduce__": lambda self: (_unpickled, (entity, key, shapes, self.id, self.values, self.reads)),
            **alias,
            "entity": entity,
            "key": key,
            "classes": {shape.name: shaped_class(shape) for shape in shapes},
            **domains,
        },
    )


def key_places(key: str | tuple[str, ...]) -> list[tuple[str, int | None]]:
    """Map the key columns that a profile has as properties to their positions in a composite id."""
    places = [(key, None)] if isinstance(key, str) else [(name, place) for place, name in enumerate(key)]
    return [(name, place) for name, place in places if name not in PROFILE_NAMES]


def _part_of_id(place: int | None) -> Callable[[Profile], Any]:
    return lambda profile: profile.id if place is None else profile.id[place]


def _unpickled(
    entity: str, key: str | tuple[str, ...], shapes: tuple[DomainShape, ...], *held: Any
) -> Profile:
    return _made_profile_class(entity, key, shapes)(*held)


def _reader(domain: str) -> Callable[[Profile], Any]:
    return lambda profile: profile.domain(domain)


def _check_generated(made: type[Profile], entity: Entity, domains: Sequence[Domain]) -> None:
    """Raise ProfileError if a generated class does not match this registry."""
    names = [domain.name for domain in domains]
    if (
        (made.entity, made.key) != (entity.name, profile_key(entity))
        or list(made.classes) != names
        or not all(same_attributes(made.classes[domain.name], domain) for domain in domains)
    ):
        raise ProfileError(
            f"the class {made.__name__} was generated from another registry: "
            "run `prefs generate client` again"
        )


def _started(at: float | None) -> float:
    return time.monotonic() if at is None else at
