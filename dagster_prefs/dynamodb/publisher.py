"""Write the changes of a rolling view to DynamoDB, on the engine that has no sinks of its own.

`online_published` stores what DynamoDB holds, per table id. A fingerprint is cleared *before* its item is
written, and set *after* DynamoDB accepted it. After a crash in between, the next run therefore writes that
key again, even if its values changed back, or the key left the window.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg import sql

from dagster_prefs.declarations.contract import Contract, Domain, Table
from dagster_prefs.dynamodb.backoff import Backoff
from dagster_prefs.dynamodb.items import ItemEncoder, ItemError
from dagster_prefs.dynamodb.store import DomainStore
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.engine.durations import with_unit
from dagster_prefs.errors import PrefsError
from dagster_prefs.ids import Id

if TYPE_CHECKING:
    from mypy_boto3_dynamodb import DynamoDBClient

# Of a few keys: nothing waits longer than the next attempt of the caller.
KEY_THREADS = 4
KEY_ATTEMPTS = 8
# DynamoDB's limit for one BatchWriteItem.
BATCH_ITEMS = 25
# So many marks at once change what the planner has to know about them.
MANY_ROWS = 1000
# After this many refused keys something general is wrong, and going on only repeats it.
MAX_REFUSED = 100

RETRYABLE = frozenset(
    {
        "InternalServerError",
        "LimitExceededException",
        "ProvisionedThroughputExceededException",
        "RequestLimitExceeded",
        "ServiceUnavailable",
        "Throttling",
        "ThrottlingException",
    }
)

# The engine's possible types for a column of each contract type (PostgreSQL's format_type).
COLUMN_TYPES = {
    "integer": ("bigint", "integer", "smallint"),
    "decimal": ("numeric",),
    "float": ("double precision", "real"),
    "string": ("text", "character varying"),
    "list<string>": ("text[]", "character varying[]"),
    "list<decimal>": ("numeric[]",),
    "list<integer>": ("bigint[]", "integer[]", "smallint[]"),
}


@dataclass(frozen=True)
class PublishReport:
    """The result of one publish of one domain; `upserts` and `deletes` count accepted writes."""

    domain_key: str
    table: str
    upserts: int
    deletes: int
    unchanged: int
    retries: int
    seconds: float


class PublishError(PrefsError):
    """A domain was not published, or not completely; `report` is the result so far."""

    def __init__(self, message: str, report: Any = None) -> None:
        super().__init__(message)
        self.report = report


@dataclass(frozen=True, slots=True)
class _Change:
    """One write request; a delete has no fingerprint."""

    id: Id
    request: Any
    fingerprint: str | None


@dataclass
class _Outcome:
    """The result of one batch."""

    accepted: list[_Change] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    retries: int = 0
    fatal: str | None = None


def publish_domain(
    store: DomainStore,
    *,
    threads: int = 8,
    max_attempts: int = 8,
    lock_timeout_seconds: float = 900.0,
    progress: Callable[[int], None] | None = None,
) -> PublishReport:
    """Bring DynamoDB to the state of one domain's sink view; write only the differences, deletes included.

    Only one publisher per domain is active; a second one waits up to `lock_timeout_seconds`. `progress` gets the
    number of accepted writes so far. Safe to repeat after any failure: accepted writes stay recorded.

    Raises PublishError (with `.report`) if the sink view is missing or differs from the contract, if the
    contract or DynamoDB rejects the item of a key (all others are published), and if DynamoDB stays throttled
    or unreachable after `max_attempts`; EngineUnavailable for the engine.
    """
    _check_engine(store)
    with store.engine.connect() as control, _explained(store.domain, lock_timeout_seconds):
        publication = _Publication(store, threads, max_attempts, control, progress)
        with publication.locked(lock_timeout_seconds):
            return publication.run()


def publish_keys(
    store: DomainStore,
    keys: Sequence[str],
    connection: psycopg.Connection[Any],
    *,
    lock_timeout_seconds: float = 900.0,
) -> PublishReport:
    """As `publish_domain` for these keys alone (texts, as in `online_published`), over an open connection.

    Its cost follows the number of keys, not what the view holds.
    """
    _check_engine(store)
    with _explained(store.domain, lock_timeout_seconds):
        publication = _Publication(store, KEY_THREADS, KEY_ATTEMPTS, connection, None)
        with publication.locked(lock_timeout_seconds):
            return publication.run_keys(keys)


def _check_engine(store: DomainStore) -> None:
    if store.engine.kind != "local":
        raise PublishError(
            "the publisher only works on the local engine, and RisingWave's own sinks write to DynamoDB: "
            "set PREFS_PUBLISH=sink"
        )


@contextmanager
def _explained(domain: Domain, lock_timeout_seconds: float) -> Iterator[None]:
    try:
        yield
    except psycopg.errors.LockNotAvailable:
        raise PublishError(
            f"domain {domain.name}: another publisher has held it for {lock_timeout_seconds:g} s: "
            "let it finish, or stop it, and run again"
        ) from None
    except psycopg.errors.UndefinedTable as error:
        raise PublishError(
            f"domain {domain.name}: {error.diag.message_primary}: run `dbt build` first"
        ) from None
    except psycopg.Error as error:
        reason = " ".join(str(error).split())
        raise PublishError(
            f"domain {domain.name}: the engine failed while publishing ({reason}): run again, "
            "what DynamoDB accepted is not lost"
        ) from error


def publish_lock(engine: EngineConfiguration, domain_key: str) -> str:
    """Return the name of the advisory lock that a publisher of the domain holds."""
    return f"dagster-prefs publish {engine.schema} {domain_key}"


def column_problems(columns: Mapping[str, str], contract: Contract, domain: Domain) -> list[str]:
    """Return how the columns of a relation differ from a domain's keys and attributes.

    `columns` maps names to types as the engine spells them.
    """
    table = contract.table_of(domain)
    keys = {key.name: key.contract_type for key in (*table.columns, table.sort_key)}
    expected = keys | {name: attribute.type for name, attribute in domain.attributes.items()}
    problems = [f"{name} is missing" for name in expected if name not in columns]
    known = {*expected, *domain.retired}
    problems += [f"{name} is not in the contract" for name in columns if name not in known]
    problems += [
        f"{name} is {columns[name]} and the contract says {kind}"
        for name, kind in expected.items()
        if name in columns and columns[name] not in COLUMN_TYPES[kind]
    ]
    return problems


class KeySql:
    """The key columns of one entity in PostgreSQL's SQL, for a relation with the alias `s`, if it has one.

    `columns` select an id, which `id_of` reads. `whole` is one expression of the whole key: the column
    itself, or for a composite key the text of `Table.key_text`; `text` is that text in either case.
    `remembered` is an `entity_key` of `online_published` (alias p) in the form of `whole`, and `type` is the
    SQL type of that form.
    """

    def __init__(self, table: Table, alias: str | None = "s") -> None:
        self._table = table
        self._alias = [alias] if alias else []
        columns = [sql.Identifier(*self._alias, key.name) for key in table.columns]
        self.columns: sql.Composable = sql.SQL(", ").join(columns)
        self.names = " and ".join(key.name for key in table.columns)
        self.remembered: sql.Composable
        if table.rest_keys:
            # As `encode_part` does; the character is written by its number, because psycopg reads `%` as a placeholder.
            part = sql.SQL("replace(replace({}::text, chr(37), chr(37) || '25'), '#', chr(37) || '23')")
            self.whole: sql.Composable = sql.SQL("({})").format(
                sql.SQL(" || '#' || ").join(part.format(column) for column in columns)
            )
            self.text = self.whole
            self.type = sql.SQL("text")
            self.remembered = sql.SQL("p.entity_key")
        else:
            self.whole = columns[0]
            self.text = sql.SQL("{}::text").format(columns[0])
            # On the side of what was published, so that the engine can use an index of the view.
            self.type = sql.SQL(table.partition_key.sql_type)
            self.remembered = sql.SQL("p.entity_key::{}").format(self.type)

    def id_of(self, values: Sequence[Any]) -> Id:
        """Return the id in the values of `columns`."""
        return tuple(values) if self._table.rest_keys else values[0]

    def among(self, keys: Sequence[str]) -> tuple[sql.Composed, dict[str, list[str]]]:
        """Whether a row is of one of these keys (texts), by its key columns, and the parameters of that."""
        columns = [sql.Identifier(*self._alias, key.name) for key in self._table.columns]
        parsed = [self._table.parse_key(key) for key in keys]
        ids = [id_ if isinstance(id_, tuple) else (id_,) for id_ in parsed]
        given = [
            sql.SQL("%({})s::text[]::{}[]").format(sql.SQL(f"key_{place}"), sql.SQL(key.sql_type))
            for place, key in enumerate(self._table.columns)
        ]
        # The first column alone too, because the planner has no other way from a list of pairs to an index.
        whole = sql.SQL("{} = any({})").format(columns[0], given[0])
        if len(columns) > 1:
            whole += sql.SQL(" and ({}) in (select * from unnest({}))").format(
                sql.SQL(", ").join(columns), sql.SQL(", ").join(given)
            )
        return whole, {f"key_{place}": [str(id_[place]) for id_ in ids] for place in range(len(columns))}

    def remembered_id(self, value: Any) -> Id:
        """Return the id in a value of `remembered`."""
        return self._table.parse_key(value) if self._table.rest_keys else value


class _Publication:
    """One publish of one domain."""

    def __init__(
        self,
        store: DomainStore,
        threads: int,
        max_attempts: int,
        control: psycopg.Connection[Any],
        progress: Callable[[int], None] | None,
    ) -> None:
        self.store = store
        self.domain, self.table = store.domain, store.table
        self.threads = threads
        self.max_attempts = max_attempts
        self.control = control
        self.progress = progress
        self.keys = store.keys
        self.key = KeySql(self.keys)
        self.encoder = store.encoder
        self.sink = sql.Identifier(store.domain.sink)
        self.attributes = list(store.domain.attributes)
        self.upserts = self.deletes = self.retries = 0
        self.refused: list[str] = []
        self.fatal: str | None = None

    @property
    def _parameters(self) -> dict[str, Any]:
        # Names and types are part of the fingerprint: a renamed attribute with the same values is a change.
        layout = json.dumps([[name, attribute.type] for name, attribute in self.domain.attributes.items()])
        return {"table_id": self.table.table_id, "domain_key": self.domain.key, "layout": layout}

    @contextmanager
    def locked(self, timeout_seconds: float) -> Iterator[None]:
        """Be the domain's only publisher meanwhile."""
        lock = publish_lock(self.store.engine, self.domain.key)
        self.control.execute(
            "select set_config('lock_timeout', %s, false)",
            [with_unit(timeout_seconds, "lock_timeout_seconds")],
        )
        self.control.execute("select pg_advisory_lock(hashtextextended(%s, 0))", [lock])
        try:
            yield
        finally:
            # A connection that broke has given its locks back.
            with suppress(psycopg.OperationalError):
                self.control.execute("select pg_advisory_unlock(hashtextextended(%s, 0))", [lock])

    def run(self) -> PublishReport:
        """Publish the whole view."""
        started = time.monotonic()
        self._check_columns()
        self._mark()
        with self.store.engine.connect(autocommit=False) as reading:
            reading.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
            reading.read_only = True
            total = self._count(reading)
            # Losing the last of these records in a crash of the engine only means writing them again.
            self.control.execute("set synchronous_commit to off")
            self._write(chain(self._changed(reading), self._gone(reading)))
        report = self._report(total - self.pending, started)
        self.control.execute(
            "delete from online_published where domain_key = %(domain_key)s and table_id <> %(table_id)s",
            self._parameters,
        )
        return report

    def run_keys(self, keys: Sequence[str]) -> PublishReport:
        """Publish these keys alone."""
        started = time.monotonic()
        self._check_columns()
        rows = self._read(keys)
        changed = [row[:-3] for row in rows if row[-1]]
        gone = sorted(set(keys) - {row[-3] for row in rows})
        self._write(chain(self._puts(changed), self._deletes(self._mark_gone(gone))))
        return self._report(len(keys) - self.upserts - self.deletes, started)

    def _report(self, unchanged: int, started: float) -> PublishReport:
        report = PublishReport(
            domain_key=self.domain.key,
            table=self.table.name,
            upserts=self.upserts,
            deletes=self.deletes,
            unchanged=unchanged,
            retries=self.retries,
            seconds=time.monotonic() - started,
        )
        self._raise_for_failures(report)
        return report

    def _check_columns(self) -> None:
        columns: dict[str, str] = dict(
            self.control.execute(
                "select a.attname::text, format_type(a.atttypid, null) from pg_attribute a "
                "where a.attrelid = %s::regclass and a.attnum > 0 and not a.attisdropped",
                [f'"{self.store.engine.schema}"."{self.domain.sink}"'],
            ).fetchall()
        )
        if problems := column_problems(columns, self.store.contract, self.domain):
            raise PublishError(
                f"domain {self.domain.name}: {self.domain.sink} is not as the contract says: "
                f"{'; '.join(problems)}: run `dbt build` and `prefs generate`"
            )

    def _row_fingerprint(self) -> sql.Composed:
        keys = [key.name for key in (*self.keys.columns, self.keys.sort_key)]
        columns = [*keys, *self.attributes]
        return sql.SQL("md5(%(layout)s || row({})::text)").format(
            sql.SQL(", ").join(sql.Identifier("s", column) for column in columns)
        )

    def _mark(self) -> None:
        marked = self.control.execute(
            sql.SQL(
                """
                insert into online_published as p (table_id, domain_key, entity_key, fingerprint)
                select %(table_id)s, %(domain_key)s, {text}, ''
                from {sink} as s
                left join online_published as o
                    on o.table_id = %(table_id)s
                    and o.domain_key = %(domain_key)s
                    and o.entity_key = {text}
                where {key} is not null
                    and o.fingerprint is distinct from '' and o.fingerprint is distinct from {fingerprint}
                group by {key}
                on conflict (table_id, domain_key, entity_key) do update set fingerprint = ''
                """
            ).format(
                sink=self.sink,
                key=self.key.whole,
                text=self.key.text,
                fingerprint=self._row_fingerprint(),
            ),
            self._parameters,
        ).rowcount
        if marked >= MANY_ROWS:
            # Planned as for the few marks of before, the joins below compare every mark with every row.
            self.control.execute("analyze online_published")
        self.control.execute(
            sql.SQL(
                """
                update online_published as p set fingerprint = ''
                where p.table_id = %(table_id)s and p.domain_key = %(domain_key)s and p.fingerprint <> ''
                    and not exists (select from {sink} as s where {key} = {published})
                """
            ).format(
                sink=self.sink,
                key=self.key.whole,
                published=self.key.remembered,
            ),
            self._parameters,
        )

    def _count(self, reading: psycopg.Connection[Any]) -> int:
        total, distinct, without_key, foreign, pending = reading.execute(
            sql.SQL(
                """
                select count(*), count(distinct {key}),
                    count(*) filter (where {key} is null),
                    count(*) filter (where {sort_key} is distinct from %(domain_key)s),
                    count(*) filter (where p.fingerprint = '')
                from {sink} as s
                left join online_published as p
                    on p.table_id = %(table_id)s
                    and p.domain_key = %(domain_key)s
                    and p.entity_key = {text}
                """
            ).format(
                sink=self.sink,
                key=self.key.whole,
                text=self.key.text,
                sort_key=sql.Identifier("s", self.keys.sort_key.name),
            ),
            self._parameters,
        ).fetchone() or (0, 0, 0, 0, 0)
        self._check_rows(total, distinct=distinct, foreign=foreign, without_key=without_key)
        self.pending = pending
        return int(total)

    def _check_rows(self, total: int, *, distinct: int, foreign: int, without_key: int = 0) -> None:
        if without_key:
            problem = f"{without_key} rows without {self.key.names}"
        elif foreign:
            problem = f"{foreign} rows whose {self.keys.sort_key.name} is not {self.domain.key}"
        elif distinct != total:
            problem = f"{total - distinct} {self.domain.entity}s more than once"
        else:
            return
        raise PublishError(
            f"domain {self.domain.name}: {self.domain.sink} has {problem}, but it must have one row per "
            f"{self.domain.entity} of this domain: correct {self.domain.relation}"
        )

    def _changed(self, reading: psycopg.Connection[Any]) -> Iterator[_Change]:
        statement = sql.SQL(
            """
            select {key}, {fingerprint}, {attributes}
            from {sink} as s
            join online_published as p on p.entity_key = {text}
            where p.table_id = %(table_id)s and p.domain_key = %(domain_key)s and p.fingerprint = ''
            """
        ).format(
            key=self.key.columns,
            text=self.key.text,
            fingerprint=self._row_fingerprint(),
            attributes=sql.SQL(", ").join(sql.Identifier("s", name) for name in self.attributes),
            sink=self.sink,
        )
        with reading.cursor(name="changed") as cursor:
            cursor.itersize = 2000
            cursor.execute(statement, self._parameters)
            yield from self._puts(cursor)

    def _puts(self, rows: Iterable[Sequence[Any]]) -> Iterator[_Change]:
        """The writes for rows of key columns, fingerprint and attributes."""
        width = len(self.keys.columns)
        for row in rows:
            id_, fingerprint, values = self.key.id_of(row[:width]), row[width], row[width + 1 :]
            try:
                item = self.encoder.encode(id_, values)
            except ItemError as error:
                self.refused.append(str(error))
                continue
            yield _Change(id_, {"PutRequest": {"Item": item}}, fingerprint)

    def _read(self, keys: Sequence[str]) -> list[tuple[Any, ...]]:
        """The rows of these keys: key columns, fingerprint, attributes, key text, domain, and whether it changed.

        What changed is marked in the same statement, so that it is before anything is written.
        """
        touched, parameters = self.key.among(keys)
        rows = self.control.execute(
            sql.SQL(
                """
                with touched as materialized (
                    select {columns}, {fingerprint} as prefs_fingerprint, {attributes}, {text} as prefs_key,
                        {sort_key} as prefs_domain, p.fingerprint is distinct from {fingerprint} as prefs_changed
                    from {sink} as s
                    left join online_published as p
                        on p.table_id = %(table_id)s and p.domain_key = %(domain_key)s and p.entity_key = {text}
                    where {touched}
                ), marked as (
                    insert into online_published (table_id, domain_key, entity_key, fingerprint)
                    select distinct %(table_id)s, %(domain_key)s, prefs_key, '' from touched where prefs_changed
                    on conflict (table_id, domain_key, entity_key) do update set fingerprint = ''
                )
                select * from touched
                """
            ).format(
                columns=self.key.columns,
                text=self.key.text,
                fingerprint=self._row_fingerprint(),
                attributes=sql.SQL(", ").join(sql.Identifier("s", name) for name in self.attributes),
                sort_key=sql.Identifier("s", self.keys.sort_key.name),
                sink=self.sink,
                touched=touched,
            ),
            self._parameters | parameters,
        ).fetchall()
        self._check_rows(
            len(rows),
            distinct=len({row[-3] for row in rows}),
            foreign=sum(row[-2] != self.domain.key for row in rows),
        )
        return rows

    def _mark_gone(self, keys: Sequence[str]) -> list[tuple[Any, ...]]:
        """Mark those of the keys that are published, and return them as `remembered`."""
        if not keys:
            return []
        return self.control.execute(
            sql.SQL(
                "update online_published as p set fingerprint = '' where p.table_id = %(table_id)s"
                " and p.domain_key = %(domain_key)s and p.entity_key = any(%(keys)s::text[]) returning {}"
            ).format(self.key.remembered),
            self._parameters | {"keys": list(keys)},
        ).fetchall()

    def _gone(self, reading: psycopg.Connection[Any]) -> Iterator[_Change]:
        statement = sql.SQL(
            """
            select {published} from online_published as p
            where p.table_id = %(table_id)s and p.domain_key = %(domain_key)s and p.fingerprint = ''
                and not exists (select from {sink} as s where {key} = {published})
            """
        ).format(sink=self.sink, key=self.key.whole, published=self.key.remembered)
        with reading.cursor(name="gone") as cursor:
            cursor.itersize = 2000
            cursor.execute(statement, self._parameters)
            yield from self._deletes(cursor)

    def _deletes(self, rows: Iterable[Sequence[Any]]) -> Iterator[_Change]:
        for (remembered,) in rows:
            id_ = self.key.remembered_id(remembered)
            yield _Change(id_, {"DeleteRequest": {"Key": self.encoder.key(id_)}}, None)

    def _write(self, changes: Iterator[_Change]) -> None:
        writer = BatchWriter(self.store.client, self.table.name, self.encoder, self.max_attempts)
        first = list(islice(changes, BATCH_ITEMS))
        if len(first) < BATCH_ITEMS:
            if first:
                self._collect([writer.write(first)])
            return
        changes = chain(first, changes)
        running: set[Future[_Outcome]] = set()
        with ThreadPoolExecutor(self.threads, thread_name_prefix="publish") as pool:
            while not self.fatal and len(self.refused) <= MAX_REFUSED:
                batch = list(islice(changes, BATCH_ITEMS))
                if not batch:
                    break
                running.add(pool.submit(writer.write, batch))
                if len(running) >= 2 * self.threads:
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    self._collect([future.result() for future in done])
            self._collect([future.result() for future in wait(running).done])

    def _collect(self, outcomes: Sequence[_Outcome]) -> None:
        accepted = [change for outcome in outcomes for change in outcome.accepted]
        written = [change for change in accepted if change.fingerprint is not None]
        deleted = [self.encoder.key_text(change.id) for change in accepted if change.fingerprint is None]
        if written:
            self.control.execute(
                """
                update online_published as p set fingerprint = c.fingerprint
                from unnest(%(ids)s::text[], %(fingerprints)s::text[]) as c (entity_key, fingerprint)
                where p.table_id = %(table_id)s
                    and p.domain_key = %(domain_key)s
                    and p.entity_key = c.entity_key
                """,
                self._parameters
                | {
                    "ids": [self.encoder.key_text(change.id) for change in written],
                    "fingerprints": [change.fingerprint for change in written],
                },
            )
        if deleted:
            self.control.execute(
                "delete from online_published where table_id = %(table_id)s and domain_key = %(domain_key)s "
                "and entity_key = any(%(ids)s::text[])",
                self._parameters | {"ids": deleted},
            )
        self.upserts += len(written)
        self.deletes += len(deleted)
        for outcome in outcomes:
            self.retries += outcome.retries
            self.refused += outcome.refused
            self.fatal = self.fatal or outcome.fatal
        if self.progress and accepted:
            self.progress(self.upserts + self.deletes)

    def _raise_for_failures(self, report: PublishReport) -> None:
        done = f"{report.upserts} upserts and {report.deletes} deletes were accepted and stay recorded"
        if self.fatal:
            raise PublishError(f"domain {self.domain.name}: {self.fatal}; {done}: run again", report)
        if self.refused:
            more = f" (and {len(self.refused) - 1} more)" if len(self.refused) > 1 else ""
            raise PublishError(f"domain {self.domain.name}: {self.refused[0]}{more}; {done}", report)


class BatchWriter:
    """BatchWriteItem with bounded retries of unprocessed items; thread-safe."""

    def __init__(self, client: DynamoDBClient, table: str, encoder: ItemEncoder, max_attempts: int) -> None:
        self.client = client
        self.table = table
        self.encoder = encoder
        self.max_attempts = max_attempts

    def write(self, batch: Sequence[_Change]) -> _Outcome:
        """Write up to 25 changes of distinct keys. Never raises for an answer of DynamoDB."""
        from botocore.exceptions import BotoCoreError, ClientError

        outcome = _Outcome()
        pending = {change.id: change for change in batch}
        backoff = Backoff(self.max_attempts)
        reason = ""
        while pending:
            try:
                answer: Any = self.client.batch_write_item(
                    RequestItems={self.table: [change.request for change in pending.values()]}
                )
            except ClientError as error:
                code = str(error.response.get("Error", {}).get("Code", "unknown"))
                message = str(error.response.get("Error", {}).get("Message", ""))
                if code == "ValidationException":
                    self._isolate(list(pending.values()), message, outcome)
                    return outcome
                if code == "AccessDeniedException":
                    outcome.fatal = (
                        f"DynamoDB refused to write to table {self.table}: allow dynamodb:BatchWriteItem on it "
                        f"({message})"
                    )
                    return outcome
                if code not in RETRYABLE:
                    outcome.fatal = f"DynamoDB refused to write to table {self.table} ({code}): {message}"
                    return outcome
                left = set(pending)
                reason = code
            except BotoCoreError as error:
                outcome.fatal = f"DynamoDB cannot be reached for table {self.table}: {error}"
                return outcome
            else:
                left = {
                    self._id(request) for request in answer.get("UnprocessedItems", {}).get(self.table, [])
                }
                reason = "writes stay unprocessed, as when the table is throttled"
            accepted = [change for id_, change in pending.items() if id_ not in left]
            outcome.accepted += accepted
            pending = {id_: pending[id_] for id_ in pending if id_ in left}
            if not pending:
                break
            # As long as something is accepted the table makes progress, and patience is right.
            if accepted:
                backoff.progressed()
            if not backoff.again():
                outcome.fatal = (
                    f"table {self.table} did not accept {len(pending)} writes "
                    f"after {self.max_attempts} attempts ({reason})"
                )
                break
            outcome.retries += 1
        return outcome

    def _isolate(self, changes: list[_Change], message: str, outcome: _Outcome) -> None:
        # One invalid item makes DynamoDB refuse its whole batch; halving finds it and keeps the others.
        if len(changes) == 1:
            outcome.refused.append(
                f"{self.encoder.named(changes[0].id)}: DynamoDB refused the item: {message}"
            )
            return
        middle = len(changes) // 2
        for half in (changes[:middle], changes[middle:]):
            part = self.write(half)
            outcome.accepted += part.accepted
            outcome.refused += part.refused
            outcome.retries += part.retries
            outcome.fatal = outcome.fatal or part.fatal

    def _id(self, request: Any) -> Id:
        item = request["PutRequest"]["Item"] if "PutRequest" in request else request["DeleteRequest"]["Key"]
        return self.encoder.id_of(item)
