"""Online lag: whether DynamoDB holds what the rolling views hold, measured on a sample of ids."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Literal

import psycopg
from psycopg import sql

from dagster_prefs.declarations.contract import LAST_EVENT_AT, Contract, Table
from dagster_prefs.dynamodb.access import ItemAccess, StoreUnavailable
from dagster_prefs.dynamodb.items import plain
from dagster_prefs.dynamodb.publisher import KeySql
from dagster_prefs.dynamodb.store import DomainStore
from dagster_prefs.dynamodb.tables import TableReport
from dagster_prefs.freshness.levels import Unmeasurable, unreadable
from dagster_prefs.ids import Id, id_parts

if TYPE_CHECKING:
    from mypy_boto3_dynamodb import DynamoDBClient

# How many ids of a domain are compared.
SAMPLE = 64
# The key hash chooses the sample among the most recently changed ids; this is their number as a multiple of
# the sample.
CANDIDATES = 8


@dataclass(frozen=True)
class Difference:
    """One id whose item differs from its row in the view.

    `kind` is missing (no item), extra (no row) or different; `attributes` are the names that differ.
    `age_seconds` is a lower bound of the time for which the view has been ahead of the item; negative where
    the engine reports that the row became visible in the future of this machine's clock.
    """

    id: Id
    kind: Literal["missing", "extra", "different"]
    attributes: tuple[str, ...]
    age_seconds: float


@dataclass(frozen=True)
class OnlineLag:
    """The comparison of one domain's sample with DynamoDB.

    `sampled` is the number of ids compared: those of the view, and those of which DynamoDB or the publisher's
    table of published items holds an item. `view_rows` and `published_rows` are exact counts, None where they
    were not requested or no table records what was published (RisingWave's own sinks). `standing` says that
    no change since the oldest difference has arrived: the writer of the table has stopped.
    """

    domain: str
    sampled: int
    differences: tuple[Difference, ...]
    standing: bool
    view_rows: int | None
    published_rows: int | None

    def count(self, kind: str) -> int:
        """Return how many sampled ids are `missing`, `extra` or `different`."""
        return sum(difference.kind == kind for difference in self.differences)

    @property
    def missing(self) -> int:
        """Number of sampled ids with a row and no item."""
        return self.count("missing")

    @property
    def extra(self) -> int:
        """Number of sampled ids with an item and no row."""
        return self.count("extra")

    @property
    def different(self) -> int:
        """Number of sampled ids whose item has other values than their row."""
        return self.count("different")

    @property
    def attributes(self) -> tuple[str, ...]:
        """Names of the attributes that differ anywhere in the sample, sorted."""
        return tuple(sorted({name for difference in self.differences for name in difference.attributes}))

    @property
    def oldest_seconds(self) -> float:
        """Age of the oldest difference; 0 where nothing differs or all differences are from the future."""
        return max((0.0, *(difference.age_seconds for difference in self.differences)))

    @property
    def ahead_seconds(self) -> float:
        """Seconds by which the newest difference is dated in the future (its age is then unknown), else 0."""
        return -min((0.0, *(difference.age_seconds for difference in self.differences)))

    @property
    def in_step(self) -> bool:
        """Whether nothing differs, neither in the sample nor in the counts."""
        counted = self.published_rows is not None
        return not self.differences and (not counted or self.published_rows == self.view_rows)


def online_lag(
    store: DomainStore,
    *,
    sample: int = SAMPLE,
    now: datetime,
    count_rows: bool = True,
    page: Iterable[Id] | None = None,
    wait: Callable[[float], None] = time.sleep,
) -> OnlineLag:
    """Compare a sample of one domain's ids between its rolling view and DynamoDB.

    The sample consists of `sample` ids with rows, chosen by the hash of their key among the most recently
    changed ones, so that the same ids are followed through every domain and from one measurement to the next;
    as many published ids without a row; and the domain's ids on one page of the table from a position that
    moves with `now` (UTC), or in `page`, which another domain of the table has read too (`table_page`). The cost
    does not depend on the number of ids, except for `count_rows`, which reads the whole view.

    A row that changes between the two reads is no difference: an item counts as different only when it
    matches neither the view's row before nor the one after. If the engine cannot tell the age of a
    difference, the id is compared again after the domain's error threshold, for which `wait` sleeps.

    Raises Unmeasurable when the view is missing or DynamoDB rejects the request or does not answer,
    EngineUnavailable for the engine.
    """
    with store.engine.connect() as connection:
        try:
            if page is None:
                page = table_page(store, 4 * sample, now=now).get(store.domain.key, ())
            return Comparison(connection, store, now).run(sample, count_rows, page, wait)
        except psycopg.Error as error:
            raise unreadable(f"domain {store.domain.name}", error) from error
        except StoreUnavailable as error:
            raise Unmeasurable(f"domain {store.domain.name}: {error}") from None


def table_page(store: DomainStore, items: int, *, now: datetime) -> dict[str, set[Id]]:
    """Return the ids, by domain key, on one page of a domain's DynamoDB table, which others may share.

    The page has so many items, and moves with `now` (UTC). Raises StoreUnavailable.
    """
    return store.items.page(store.domain.key, items, _place(now))


@dataclass(frozen=True)
class Row:
    """One row: the contract's attributes, and the time since which it is visible (None where unknown)."""

    values: Mapping[str, Any]
    visible_since: datetime | None


class Comparison:
    """Compares one domain's rolling view with its items. `now` is UTC."""

    def __init__(self, connection: psycopg.Connection[Any], store: DomainStore, now: datetime) -> None:
        self.connection = connection
        self.engine, self.domain, self.table = store.engine, store.domain, store.table
        self.items, self.keys = store.items, store.keys
        self.key = KeySql(self.keys, None)
        self.key_columns = [sql.Identifier(key.name) for key in self.keys.columns]
        self.now = now
        self.relation = sql.Identifier(self.engine.schema, self.domain.relation)
        self.published = sql.Identifier(self.engine.schema, "online_published")

    def run(
        self, sample: int, count_rows: bool, page: Iterable[Id], wait: Callable[[float], None]
    ) -> OnlineLag:
        """Compare once, as `online_lag` describes."""
        ids: set[Id] = {*self._recent(sample), *self._left_behind(sample, everywhere=count_rows), *page}
        before = self.rows(ids)
        items = self.items.get(self.domain.key, ids)
        suspects = [id_ for id_ in ids if self.differs(before.get(id_), items.get(id_))]
        after = self.rows(suspects)
        late = [id_ for id_ in suspects if self.differs(after.get(id_), items.get(id_))]
        since = {id_: self._since(after.get(id_)) for id_ in late}
        ages = {
            id_: (self.now - moment).total_seconds() for id_, moment in since.items() if moment is not None
        }
        if ageless := [id_ for id_ in late if id_ not in ages]:
            # A difference that persists for the whole threshold is at least that old; there is no other
            # source for its age.
            patience = self.domain.freshness.error_seconds
            wait(patience)
            rows, items_now = self.rows(ageless), self.items.get(self.domain.key, ageless)
            for id_ in ageless:
                if self.differs(rows.get(id_), items_now.get(id_)):
                    ages[id_] = patience
        differences = [
            _difference(
                id_,
                after.get(id_),
                items.get(id_),
                self.differs(after.get(id_), items.get(id_)),
                age,
            )
            for id_, age in sorted(ages.items())
        ]
        arrived = [row.visible_since for id_, row in before.items() if id_ not in suspects]
        return OnlineLag(
            domain=self.domain.name,
            sampled=len(ids),
            differences=tuple(differences),
            standing=bool(differences) and _all_before(arrived, since.values()),
            view_rows=self._count() if count_rows else None,
            published_rows=self._count_published() if count_rows and self.engine.kind == "local" else None,
        )

    def _recent(self, sample: int) -> list[Id]:
        rows = self.connection.execute(
            sql.SQL(
                "select {key} from {relation} where {complete}"
                " order by last_event_at desc, {key} limit {limit}"
                # RisingWave takes no parameter here.
            ).format(
                key=self.key.columns,
                complete=self.complete,
                relation=self.relation,
                limit=sql.Literal(CANDIDATES * sample),
            )
        ).fetchall()
        return sorted(map(self.key.id_of, rows), key=key_hash)[:sample]

    @property
    def complete(self) -> sql.Composable:
        """Return the condition that no key column is NULL."""
        return sql.SQL(" and ").join(sql.SQL("{} is not null").format(column) for column in self.key_columns)

    def _left_behind(self, sample: int, everywhere: bool) -> list[Id]:
        # RisingWave's sinks keep no such memory; there, leftovers are found on the table's page only.
        if self.engine.kind != "local":
            return []
        gone = sql.SQL(
            "select {remembered} from {published} as p where not exists"
            " (select from {relation} as v where {key} = {remembered}) limit %(sample)s"
        )
        remembered = sql.SQL(
            "select entity_key from {published} where table_id = %(table)s and domain_key = %(domain)s"
        )
        parameters = {"sample": sample, "table": self.table.table_id, "domain": self.domain.key}
        published: sql.Composable = remembered.format(published=self.published)
        if not everywhere:
            # Reading one range of the key, which moves with the time, costs the same for any number of ids.
            parameters["place"] = text_between(*self._bounds(), _place(self.now) / 2**32)
            published = sql.SQL("{} and entity_key >= %(place)s order by entity_key limit {}").format(
                published, CANDIDATES * sample
            )
        rows = self.connection.execute(
            gone.format(
                published=sql.SQL("({})").format(published),
                relation=self.relation,
                key=KeySql(self.keys, "v").whole,
                remembered=self.key.remembered,
            ),
            parameters,
        ).fetchall()
        return [self.key.remembered_id(remembered) for (remembered,) in rows]

    def _bounds(self) -> tuple[str, str]:
        row = self.connection.execute(
            sql.SQL(
                "select min(entity_key), max(entity_key) from {} where table_id = %s and domain_key = %s"
            ).format(self.published),
            [self.table.table_id, self.domain.key],
        ).fetchone()
        low, high = row or (None, None)
        return low or "", high or ""

    def rows(self, ids: Iterable[Id]) -> dict[Id, Row]:
        """Return the rows of these ids, without ids that have none."""
        wanted = set(ids)
        if not wanted:
            return {}
        first = {id_parts(id_)[0] for id_ in wanted}
        names = list(self.domain.attributes)
        # A batch view only records its refresh, a streaming view the time at which each row changed.
        since = (
            sql.SQL("_rw_timestamp")
            if self.engine.kind == "risingwave"
            else sql.SQL("(select max(deployed_at) from {} where relation = {})").format(
                sql.Identifier(self.engine.schema, "deployments"), sql.Literal(self.domain.relation)
            )
        )
        rows = self.connection.execute(
            sql.SQL("select {key}, {since}, {names} from {relation} where {first} in ({wanted})").format(
                key=self.key.columns,
                first=self.key_columns[0],
                since=since,
                names=sql.SQL(", ").join(map(sql.Identifier, names)),
                relation=self.relation,
                # RisingWave reads the whole view for an array.
                wanted=sql.SQL(", ").join(map(sql.Literal, sorted(first))),
            )
        ).fetchall()
        width = len(self.key_columns)
        return {
            id_: Row(dict(zip(names, row[width + 1 :], strict=True)), row[width])
            for row in rows
            if (id_ := self.key.id_of(row[:width])) in wanted
        }

    def differs(self, row: Row | None, item: Mapping[str, Any] | None) -> tuple[str, ...]:
        """Return the names of the attributes that differ between row and item, all if one side is absent."""
        if row is None or item is None:
            return () if row is None and item is None else tuple(self.domain.attributes)
        return tuple(
            name
            for name in self.domain.attributes
            if name not in item or plain(item[name]) != _exact(row.values[name])
        )

    def _since(self, row: Row | None) -> datetime | None:
        if row is None:
            return self._last_refresh()
        if row.visible_since is None:
            return datetime.fromtimestamp(row.values[LAST_EVENT_AT] / 1000, UTC)
        return row.visible_since

    def _last_refresh(self) -> datetime | None:
        if self.engine.kind != "local":
            return None
        row = self.connection.execute(
            sql.SQL("select max(deployed_at) from {} where relation = %s").format(
                sql.Identifier(self.engine.schema, "deployments")
            ),
            [self.domain.relation],
        ).fetchone()
        found: datetime | None = row[0] if row else None
        return found

    def _count(self) -> int:
        row = self.connection.execute(sql.SQL("select count(*) from {}").format(self.relation)).fetchone()
        return int(row[0]) if row else 0

    def _count_published(self) -> int:
        row = self.connection.execute(
            sql.SQL("select count(*) from {} where table_id = %s and domain_key = %s").format(self.published),
            [self.table.table_id, self.domain.key],
        ).fetchone()
        return int(row[0]) if row else 0


def find_tables(client: DynamoDBClient, contract: Contract, prefix: str = "") -> dict[str, TableReport]:
    """Return the existing table of each entity. Unlike `provision`, creates and checks nothing.

    Raises Unmeasurable when one is missing, or DynamoDB rejects the request or does not answer.
    """
    return {entity: _find_table(client, entity, keys, prefix) for entity, keys in contract.tables.items()}


def _find_table(client: DynamoDBClient, entity: str, keys: Table, prefix: str) -> TableReport:
    name = prefix + keys.name
    try:
        table = ItemAccess(client, keys, name).describe()
    except StoreUnavailable as error:
        raise Unmeasurable(str(error)) from None
    return TableReport(
        entity=entity,
        name=name,
        table_id=str(table.get("TableId") or table["CreationDateTime"]),
        arn=str(table["TableArn"]),
        status=str(table["TableStatus"]),
        created=False,
        billing_mode=str(table.get("BillingModeSummary", {}).get("BillingMode", "PROVISIONED")),
        point_in_time_recovery=None,
        encryption=str(table.get("SSEDescription", {}).get("SSEType", "AWS_OWNED")),
        deletion_protection=bool(table.get("DeletionProtectionEnabled", False)),
    )


def _difference(
    id_: Id,
    row: Row | None,
    item: Mapping[str, Any] | None,
    attributes: tuple[str, ...],
    age: float,
) -> Difference:
    if row is None:
        return Difference(id_, "extra", (), age)
    if item is None:
        return Difference(id_, "missing", (), age)
    return Difference(id_, "different", attributes, age)


def _all_before(arrived: Iterable[datetime | None], late: Iterable[datetime | None]) -> bool:
    oldest = min((moment for moment in late if moment is not None), default=None)
    newest = max((moment for moment in arrived if moment is not None), default=None)
    return oldest is not None and (newest is None or newest < oldest)


def key_hash(id_: Id) -> str:
    """Return the hash that selects the sampled ids; it is the same everywhere and must never change."""
    return hashlib.sha256(str(id_).encode()).hexdigest()


def text_between(low: str, high: str, share: float) -> str:
    """Return a text at about the fraction `share` (0 to 1) from `low` to `high`, in code point order."""
    differ = (place for place, pair in enumerate(zip(low, high, strict=False)) if pair[0] != pair[1])
    same = low[: next(differ, min(len(low), len(high)))]
    numbers = []
    for text in (low, high):
        number = 0
        for character in text[len(same) :][:3].ljust(3, "\0"):
            number = number << 21 | ord(character)
        numbers.append(number)
    place = numbers[0] + round((numbers[1] - numbers[0]) * share)
    found = [place >> shift & 0x1FFFFF for shift in (42, 21, 0)]
    # PostgreSQL rejects NUL; UTF-8 encodes no surrogates and nothing beyond U+10FFFF.
    return same + "".join(
        chr(0xD7FF if 0xD800 <= code <= 0xDFFF else min(code, 0x10FFFF)) for code in found if code
    )


def _place(now: datetime) -> int:
    return int.from_bytes(hashlib.sha256(now.isoformat().encode()).digest()[:4], "big")


def _exact(value: Any) -> Any:
    if isinstance(value, list):
        return [_exact(element) for element in value]
    if isinstance(value, float):
        return Decimal(repr(value))
    return Decimal(value) if isinstance(value, int) else value
