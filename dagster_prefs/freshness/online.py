"""Whether DynamoDB holds what the rolling views hold, read from a sample that follows whole keys."""

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

from dagster_prefs.engine.connection import EngineConnection
from dagster_prefs.freshness.levels import Unmeasurable, unreadable
from dagster_prefs.online.access import ItemAccess, StoreUnavailable
from dagster_prefs.online.contract import LAST_EVENT_AT, Contract, Domain
from dagster_prefs.online.items import plain
from dagster_prefs.online.tables import TableReport

if TYPE_CHECKING:
    from mypy_boto3_dynamodb import DynamoDBClient

# Recent viewers among which the key hash chooses, as a multiple of the sample.
CANDIDATES = 8


@dataclass(frozen=True)
class Difference:
    """One viewer whose item is not as the view has it.

    `kind` is missing (no item), extra (no row) or different; `attributes` are the names that differ.
    `age_seconds` is how long the view has been ahead of the item, at least; negative where the engine says that
    the row became visible in the future of this machine's clock.
    """

    viewer_id: int
    kind: Literal["missing", "extra", "different"]
    attributes: tuple[str, ...]
    age_seconds: float


@dataclass(frozen=True)
class OnlineLag:
    """What a sample of one domain says about DynamoDB.

    `sampled` viewers were looked at: those of the view, and those of which DynamoDB or the publisher's memory
    holds an item. `view_rows` and `published_rows` are exact counts, None where they were not asked for or
    nothing remembers what was published (RisingWave's own sinks). `standing` says that nothing which changed
    since the oldest difference has arrived: whoever writes the table stands still.
    """

    domain: str
    sampled: int
    differences: tuple[Difference, ...]
    standing: bool
    view_rows: int | None
    published_rows: int | None

    def count(self, kind: str) -> int:
        """How many sampled viewers are `missing`, `extra` or `different`."""
        return sum(difference.kind == kind for difference in self.differences)

    @property
    def missing(self) -> int:
        """Sampled viewers with a row and no item."""
        return self.count("missing")

    @property
    def extra(self) -> int:
        """Sampled viewers with an item and no row."""
        return self.count("extra")

    @property
    def different(self) -> int:
        """Sampled viewers whose item has other values than their row."""
        return self.count("different")

    @property
    def attributes(self) -> tuple[str, ...]:
        """Names of the attributes that differ anywhere in the sample, sorted."""
        return tuple(sorted({name for difference in self.differences for name in difference.attributes}))

    @property
    def oldest_seconds(self) -> float:
        """Age of the oldest difference; 0 where nothing differs or all of it is from the future."""
        return max((0.0, *(difference.age_seconds for difference in self.differences)))

    @property
    def ahead_seconds(self) -> float:
        """How far in the future the newest difference is stamped, so that its age is not known; 0 where none is."""
        return -min((0.0, *(difference.age_seconds for difference in self.differences)))

    @property
    def in_step(self) -> bool:
        """Whether nothing differs, in the sample and in the counts."""
        counted = self.published_rows is not None
        return not self.differences and (not counted or self.published_rows == self.view_rows)


def online_lag(
    engine: EngineConnection,
    client: DynamoDBClient,
    contract: Contract,
    domain: Domain,
    table: TableReport,
    *,
    sample: int = 64,
    now: datetime,
    count_rows: bool = True,
    wait: Callable[[float], None] = time.sleep,
) -> OnlineLag:
    """Compare a sample of one domain's viewers between its rolling view and DynamoDB.

    The sample are `sample` viewers with rows, chosen by the hash of their key among the most recently changed
    ones, so that the same viewers are followed through every domain and from one look to the next; as many
    that were published and have no row; and one page of the table from a place that moves with `now` (UTC).
    Its cost does not depend on the number of viewers, except for `count_rows`, which reads the whole view.

    A row that changes between the two reads is no difference: an item counts as different only when it is
    neither what the view had before nor what it has after. A difference of which the engine cannot tell the
    age is looked at again after the domain's error threshold, for which `wait` pauses.

    Raises Unmeasurable when the view is missing or DynamoDB refuses or does not answer, EngineUnavailable
    for the engine.
    """
    with engine.connect() as connection:
        try:
            return Comparison(connection, engine, client, contract, domain, table, now).run(
                sample, count_rows, wait
            )
        except psycopg.Error as error:
            raise unreadable(f"domain {domain.name}", error) from error
        except StoreUnavailable as error:
            raise Unmeasurable(f"domain {domain.name}: {error}") from None


@dataclass(frozen=True)
class Row:
    """One viewer's row: the contract's attributes, and since when it is visible (None where unknown)."""

    values: Mapping[str, Any]
    visible_since: datetime | None


class Comparison:
    """One domain's rolling view and items, side by side; `now` is UTC."""

    def __init__(
        self,
        connection: psycopg.Connection[Any],
        engine: EngineConnection,
        client: DynamoDBClient,
        contract: Contract,
        domain: Domain,
        table: TableReport,
        now: datetime,
    ) -> None:
        self.connection = connection
        self.engine = engine
        self.items = ItemAccess(client, contract, table.name)
        self.domain = domain
        self.table = table
        self.now = now
        self.relation = sql.Identifier(engine.schema, domain.relation)
        self.published = sql.Identifier(engine.schema, "online_published")

    def run(self, sample: int, count_rows: bool, wait: Callable[[float], None]) -> OnlineLag:
        """One look, as `online_lag` describes it."""
        viewers = {*self._recent(sample), *self._left_behind(sample, everywhere=count_rows)}
        viewers |= self.items.page(self.domain.key, 4 * sample, _place(self.now))
        before = self.rows(viewers)
        items = self.items.get(self.domain.key, viewers)
        suspects = [viewer for viewer in viewers if self.differs(before.get(viewer), items.get(viewer))]
        after = self.rows(suspects)
        late = [viewer for viewer in suspects if self.differs(after.get(viewer), items.get(viewer))]
        since = {viewer: self._since(after.get(viewer)) for viewer in late}
        ages = {
            viewer: (self.now - moment).total_seconds()
            for viewer, moment in since.items()
            if moment is not None
        }
        if ageless := [viewer for viewer in late if viewer not in ages]:
            # Watching it for as long as the threshold is the one way to learn that it is that old.
            patience = self.domain.freshness.error_seconds
            wait(patience)
            rows, items_now = self.rows(ageless), self.items.get(self.domain.key, ageless)
            for viewer in ageless:
                if self.differs(rows.get(viewer), items_now.get(viewer)):
                    ages[viewer] = patience
        differences = [
            _difference(
                viewer,
                after.get(viewer),
                items.get(viewer),
                self.differs(after.get(viewer), items.get(viewer)),
                age,
            )
            for viewer, age in sorted(ages.items())
        ]
        arrived = [row.visible_since for viewer, row in before.items() if viewer not in suspects]
        return OnlineLag(
            domain=self.domain.name,
            sampled=len(viewers),
            differences=tuple(differences),
            standing=bool(differences) and _all_before(arrived, since.values()),
            view_rows=self._count() if count_rows else None,
            published_rows=self._count_published() if count_rows and self.engine.kind == "local" else None,
        )

    def _recent(self, sample: int) -> list[int]:
        rows = self.connection.execute(
            sql.SQL(
                "select viewer_id from {} where viewer_id is not null"
                " order by last_event_at desc, viewer_id limit {}"
                # RisingWave takes no parameter here.
            ).format(self.relation, sql.Literal(CANDIDATES * sample))
        ).fetchall()
        return sorted((viewer for (viewer,) in rows), key=key_hash)[:sample]

    def _left_behind(self, sample: int, everywhere: bool) -> list[int]:
        # RisingWave's sinks keep no such memory; there, leftovers are found through the table's page.
        if self.engine.kind != "local":
            return []
        gone = sql.SQL(
            "select p.viewer_id from {published} as p where not exists"
            " (select from {relation} as v where v.viewer_id = p.viewer_id) limit %(sample)s"
        )
        remembered = sql.SQL(
            "select viewer_id from {published} where table_id = %(table)s and domain_key = %(domain)s"
        )
        parameters = {"sample": sample, "table": self.table.table_id, "domain": self.domain.key}
        published: sql.Composable = remembered.format(published=self.published)
        if not everywhere:
            # A stretch of the key that moves with the time costs the same however many viewers there are.
            parameters["place"] = _place(self.now) % self._highest()
            published = sql.SQL("{} and viewer_id >= %(place)s order by viewer_id limit {}").format(
                published, CANDIDATES * sample
            )
        rows = self.connection.execute(
            gone.format(published=sql.SQL("({})").format(published), relation=self.relation), parameters
        ).fetchall()
        return [viewer for (viewer,) in rows]

    def _highest(self) -> int:
        row = self.connection.execute(
            sql.SQL("select max(viewer_id) from {} where table_id = %s and domain_key = %s").format(
                self.published
            ),
            [self.table.table_id, self.domain.key],
        ).fetchone()
        return max(1, row[0] or 0) if row else 1

    def rows(self, viewers: Iterable[int]) -> dict[int, Row]:
        """The rows of those of the viewers that have one."""
        wanted = sorted(viewers)
        if not wanted:
            return {}
        names = list(self.domain.attributes)
        # A batch view knows only when it was refreshed, a streaming one when each row changed.
        since = (
            sql.SQL("_rw_timestamp")
            if self.engine.kind == "risingwave"
            else sql.SQL("(select max(deployed_at) from {} where relation = {})").format(
                sql.Identifier(self.engine.schema, "deployments"), sql.Literal(self.domain.relation)
            )
        )
        rows = self.connection.execute(
            sql.SQL(
                "select viewer_id, {since}, {names} from {relation} where viewer_id in ({wanted})"
            ).format(
                since=since,
                names=sql.SQL(", ").join(map(sql.Identifier, names)),
                relation=self.relation,
                # RisingWave reads the whole view for an array.
                wanted=sql.SQL(", ").join(map(sql.Literal, wanted)),
            )
        ).fetchall()
        return {
            viewer: Row(dict(zip(names, values, strict=True)), visible_since)
            for viewer, visible_since, *values in rows
        }

    def differs(self, row: Row | None, item: Mapping[str, Any] | None) -> tuple[str, ...]:
        """Names of the attributes in which row and item differ; all of them where only one is there."""
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


def find_table(client: DynamoDBClient, contract: Contract, prefix: str = "") -> TableReport:
    """The profile table as it stands; unlike `provision` it makes and checks nothing.

    Raises Unmeasurable when there is none, or DynamoDB refuses or does not answer.
    """
    name = prefix + contract.table.name
    try:
        table = ItemAccess(client, contract, name).describe()
    except StoreUnavailable as error:
        raise Unmeasurable(str(error)) from None
    return TableReport(
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
    viewer: int,
    row: Row | None,
    item: Mapping[str, Any] | None,
    attributes: tuple[str, ...],
    age: float,
) -> Difference:
    if row is None:
        return Difference(viewer, "extra", (), age)
    if item is None:
        return Difference(viewer, "missing", (), age)
    return Difference(viewer, "different", attributes, age)


def _all_before(arrived: Iterable[datetime | None], late: Iterable[datetime | None]) -> bool:
    oldest = min((moment for moment in late if moment is not None), default=None)
    newest = max((moment for moment in arrived if moment is not None), default=None)
    return oldest is not None and (newest is None or newest < oldest)


def key_hash(viewer_id: int) -> str:
    """The hash that chooses which viewers are followed; the same everywhere and for ever."""
    return hashlib.sha256(str(viewer_id).encode()).hexdigest()


def _place(now: datetime) -> int:
    return int.from_bytes(hashlib.sha256(now.isoformat().encode()).digest()[:4], "big")


def _exact(value: Any) -> Any:
    if isinstance(value, list):
        return [_exact(element) for element in value]
    if isinstance(value, float):
        return Decimal(repr(value))
    return Decimal(value) if isinstance(value, int) else value
