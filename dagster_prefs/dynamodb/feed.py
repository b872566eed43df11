"""Read the changes of one rolling view from a RisingWave subscription.

A cursor behaves as follows, as observed on a server. `SINCE t` begins with the changes of `t` itself. The
changes of one moment (one barrier) come together and have the same `rw_timestamp`, with one net change per
row; the rows of `FULL` have none. FETCH returns nothing only when everything so far has been read. A cursor
ends with its session, and when the view had no change for as long as the subscription retains changes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import psycopg
from psycopg import sql

from dagster_prefs.declarations.contract import Contract, Domain
from dagster_prefs.dynamodb.publisher import PublishError, column_problems
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.engine.durations import with_unit
from dagster_prefs.errors import PrefsError
from dagster_prefs.ids import Id, id_parts

_CURSOR = sql.Identifier("prefs_changefeed")
# An epoch is a time in milliseconds since this one, and 16 bits below it (src/common/src/util/epoch.rs).
_EPOCH_BITS, _EPOCH_START_MILLISECONDS = 16, 1_617_235_200_000


class FeedBroken(PrefsError):
    """The cursor ended, as after a restart of the engine; it can be opened again at the same position."""


class TokenExpired(PrefsError):
    """The engine no longer retains all changes since the token, so the whole view must be compared."""


@dataclass(frozen=True, slots=True)
class Change:
    """One change of the row of one key.

    `values` are in the order of the contract's attributes, None for a removed row. `timestamp` is the
    engine's time in milliseconds since 1970, None for the rows of the whole view. `renewed` tells that the
    row existed before under the same key.
    """

    id: Id | None
    domain_key: str | None
    values: Sequence[Any] | None
    timestamp: int | None
    renewed: bool = False


class SubscriptionFeed:
    """One session with one subscription cursor, as a context manager.

    Its methods raise FeedBroken if the engine fails; the caller then opens a new one.
    """

    def __init__(self, engine: EngineConfiguration, contract: Contract, domain: Domain) -> None:
        self.engine = engine
        self.contract = contract
        self.domain = domain
        self.keys = contract.table_of(domain)
        self.relation = sql.Identifier(engine.schema, domain.relation)
        self.attributes = list(domain.attributes)

    def __enter__(self) -> SubscriptionFeed:
        self._connection = self.engine.connect()
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def identity(self) -> str:
        """Return what a token belongs to: the subscription, the view that it reads and the contract's attributes.

        Raises PublishError if the subscription is missing or reads another relation than the domain's view,
        or the view differs from the contract.
        """
        name = self.domain.sink
        found = self._rows(
            sql.SQL(
                "select s.id, s.initialized_at::varchar, r.id, r.name from rw_catalog.rw_subscriptions as s"
                " join rw_catalog.rw_schemas as n on n.id = s.schema_id"
                " left join rw_catalog.rw_depend as d on d.objid = s.id"
                " left join rw_catalog.rw_relations as r on r.id = d.refobjid"
                " where n.name = {} and s.name = {}"
            ).format(sql.Literal(self.engine.schema), sql.Literal(name))
        )
        remedy = f"run `dbt run --full-refresh --select {name}` in dbt_project/ with PREFS_PUBLISH=changefeed"
        if not found:
            raise PublishError(
                f"domain {self.domain.name}: database {self.engine.database} has no subscription {name}: "
                f"{remedy.replace('--full-refresh ', '')}"
            )
        subscription, made, upstream, upstream_name = found[0]
        if upstream_name != self.domain.relation:
            raise PublishError(
                f"domain {self.domain.name}: subscription {name} reads {upstream_name} and not "
                f"{self.domain.relation}, as after a swap of the view: {remedy}"
            )
        columns = self._rows(
            sql.SQL(
                "select column_name, data_type from information_schema.columns"
                " where table_schema = {} and table_name = {}"
            ).format(sql.Literal(self.engine.schema), sql.Literal(self.domain.relation))
        )
        if problems := column_problems(dict(columns), self.contract, self.domain):
            raise PublishError(
                f"domain {self.domain.name}: {self.domain.relation} is not as the contract says: "
                f"{'; '.join(problems)}: run `dbt run` and `prefs generate`"
            )
        layout = json.dumps([[name, attribute.type] for name, attribute in self.domain.attributes.items()])
        digest = hashlib.sha256(layout.encode()).hexdigest()[:12]
        return f"{self.engine.database}.{self.engine.schema}.{name}:{subscription}:{made}:{upstream}:{digest}"

    def committed(self) -> int:
        """Return the view's last complete moment, in milliseconds since 1970. Every later FETCH includes its changes.

        now() would be wrong: it is the newest moment of all databases on the server, and a database whose
        barriers are ahead of the view's would confirm changes of the view that are still to come. FLUSH comes
        second, because RisingWave's frontend, which answers FETCH, learns of a moment later than the catalog.
        """
        found = self._rows(
            sql.SQL(
                "select (s.committed_epoch >> {}) + {} from rw_catalog.rw_hummock_snapshot as s"
                " join rw_catalog.rw_relations as r on r.id = s.table_id"
                " join rw_catalog.rw_schemas as n on n.id = r.schema_id"
                " where n.name = {} and r.name = {}"
            ).format(
                sql.Literal(_EPOCH_BITS),
                sql.Literal(_EPOCH_START_MILLISECONDS),
                sql.Literal(self.engine.schema),
                sql.Literal(self.domain.relation),
            )
        )
        if not found:
            raise FeedBroken(
                f"domain {self.domain.name}: {self.domain.relation} no longer exists: run `dbt run`"
            )
        try:
            self._connection.execute(sql.SQL("flush"), prepare=False)
        except psycopg.Error as error:
            raise self._broken(error) from None
        return int(found[0][0])

    def present(self, ids: Iterable[Id]) -> set[Id]:
        """Return those of the ids that have a row now."""
        key, wanted = self.keys.partition_key, set(ids)
        first = sorted({id_parts(id_)[0] for id_ in wanted})
        rows = self._rows(
            sql.SQL("select {columns} from {relation} where {key} = any({ids}::{type}[])").format(
                columns=sql.SQL(", ").join(sql.Identifier(one.name) for one in self.keys.columns),
                key=sql.Identifier(key.name),
                relation=self.relation,
                ids=sql.Literal(first),
                type=sql.SQL(key.sql_type),
            )
        )
        return {id_ for row in rows if (id_ := self._id(row)) in wanted}

    def _id(self, values: Sequence[Any]) -> Any:
        """Return the id in the values of the key columns; None if one of them is NULL."""
        if not self.keys.rest_keys:
            return values[0]
        return None if None in values else tuple(values)

    def open(self, since: int | None) -> None:
        """Open the cursor at the moment `since` (milliseconds since 1970), or for the whole view if it is None.

        Raises TokenExpired if the subscription no longer retains the changes since then.
        """
        place = sql.SQL("full") if since is None else sql.SQL("since {}").format(sql.Literal(since))
        statement = sql.SQL("declare {} subscription cursor for {} {}").format(
            _CURSOR, sql.Identifier(self.engine.schema, self.domain.sink), place
        )
        try:
            self._connection.execute(statement, prepare=False)
        except psycopg.Error as error:
            if since is not None and "rw_timestamp is too" in str(error):
                raise TokenExpired(
                    f"domain {self.domain.name}: the changes since {since} are no longer retained"
                ) from None
            raise self._broken(error) from None

    def fetch(self, limit: int, timeout_seconds: int = 0) -> list[Change]:
        """Return the next changes, at most `limit`. Waits up to `timeout_seconds` if there are none yet."""
        statement = sql.SQL("fetch {} from {}").format(sql.Literal(limit), _CURSOR)
        if timeout_seconds:
            patience = sql.Literal(with_unit(timeout_seconds, "timeout_seconds"))
            statement += sql.SQL(" with (timeout = {})").format(patience)
        try:
            cursor = self._connection.execute(statement, prepare=False)
            rows = cursor.fetchall()
        except psycopg.Error as error:
            if "data may have been recycled" in str(error):
                raise TokenExpired(
                    f"domain {self.domain.name}: the engine deleted changes before they were read"
                ) from None
            raise self._broken(error) from None
        names = [column.name for column in cursor.description or ()]
        places = {name: place for place, name in enumerate(names)}
        if missing := [name for name in self.attributes if rows and name not in places]:
            raise PublishError(
                f"domain {self.domain.name}: the subscription {self.domain.sink} lacks {', '.join(missing)}: "
                f"run `dbt run --full-refresh --select {self.domain.sink}` in dbt_project/"
            )
        return [self._change(row, places) for row in rows]

    def _change(self, row: Sequence[Any], places: dict[str, int]) -> Change:
        operation: Literal["Insert", "Delete", "UpdateInsert", "UpdateDelete"] = row[places["op"]]
        removed = operation in ("Delete", "UpdateDelete")
        return Change(
            id=self._id([row[places[key.name]] for key in self.keys.columns]),
            domain_key=row[places[self.keys.sort_key.name]],
            values=None if removed else [row[places[name]] for name in self.attributes],
            timestamp=row[places["rw_timestamp"]],
            renewed=operation == "UpdateInsert",
        )

    def _rows(self, statement: sql.Composed) -> list[tuple[Any, ...]]:
        try:
            return self._connection.execute(statement, prepare=False).fetchall()
        except psycopg.errors.UndefinedTable as error:
            raise PublishError(
                f"domain {self.domain.name}: {' '.join(str(error).split())}: run `dbt run` in dbt_project/"
            ) from None
        except psycopg.Error as error:
            raise self._broken(error) from None

    def _broken(self, error: psycopg.Error) -> FeedBroken:
        return FeedBroken(
            f"domain {self.domain.name}: the engine failed while its changes were read "
            f"({' '.join(str(error).split())}): check its log and run again"
        )
