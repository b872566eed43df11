"""Write what changed in a rolling view to DynamoDB, on the engine that has no sinks of its own.

`online_published` remembers, per table id, what DynamoDB holds. A fingerprint is emptied *before* its item is
written and set *after* DynamoDB accepted it. So after a crash anywhere in between, the next run writes that
viewer again, even when the values went back to what they were, or the viewer left the window.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg import sql

from dagster_prefs.engine.connection import EngineConnection
from dagster_prefs.engine.durations import with_unit
from dagster_prefs.errors import PrefsError
from dagster_prefs.online.contract import Contract, Domain
from dagster_prefs.online.items import ItemEncoder, ItemError
from dagster_prefs.online.tables import TableReport

if TYPE_CHECKING:
    from mypy_boto3_dynamodb import DynamoDBClient

# DynamoDB's limit for one BatchWriteItem.
BATCH_ITEMS = 25
# After this many refused viewers something general is wrong, and going on only repeats it.
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

# What the engine may call a column of each contract type (PostgreSQL's format_type).
COLUMN_TYPES = {
    "integer": ("bigint", "integer", "smallint"),
    "decimal": ("numeric",),
    "float": ("double precision", "real"),
    "string": ("text", "character varying"),
    "list<string>": ("text[]", "character varying[]"),
    "list<decimal>": ("numeric[]",),
}


@dataclass(frozen=True)
class PublishReport:
    """What one publish did to one domain; `upserts` and `deletes` count what DynamoDB accepted."""

    domain_key: str
    table: str
    upserts: int
    deletes: int
    unchanged: int
    retries: int
    seconds: float


class PublishError(PrefsError):
    """A domain could not be published, or not completely; `report` of the publisher or changefeed says what was."""

    def __init__(self, message: str, report: Any = None) -> None:
        super().__init__(message)
        self.report = report


@dataclass(frozen=True, slots=True)
class _Change:
    """One write request; a delete has no fingerprint."""

    viewer_id: int
    request: Any
    fingerprint: str | None


@dataclass
class _Outcome:
    """What became of one batch."""

    accepted: list[_Change] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    retries: int = 0
    fatal: str | None = None


def publish_domain(
    engine: EngineConnection,
    client: DynamoDBClient,
    contract: Contract,
    domain: str,
    table: TableReport,
    *,
    threads: int = 8,
    max_attempts: int = 8,
    lock_timeout_seconds: float = 900.0,
    progress: Callable[[int], None] | None = None,
) -> PublishReport:
    """Bring DynamoDB to the state of one domain's sink view; write only what changed, and deletes.

    `domain` is a name or key of the contract; `table` is what `provision` returned. One publisher per domain
    works at a time, a second waits up to `lock_timeout_seconds`. `progress` gets the number of accepted
    writes so far. Safe to repeat after any failure: what DynamoDB accepted stays recorded.

    Raises PublishError (with `.report` of what was written) for a sink view that is missing or unlike the
    contract, a viewer whose item the contract or DynamoDB refuses (all others are still published), and a
    DynamoDB that stays throttled or unreachable after `max_attempts`; EngineUnavailable for the engine.
    """
    if engine.kind != "local":
        raise PublishError(
            "the publisher works on the local engine only; RisingWave writes DynamoDB by its own sinks: "
            "set PREFS_PUBLISH=sink"
        )
    described = contract.domain(domain)
    with engine.connect() as control:
        try:
            return _Publication(
                engine, client, contract, described, table, threads, max_attempts, control, progress
            ).run(lock_timeout_seconds)
        except psycopg.errors.LockNotAvailable:
            raise PublishError(
                f"domain {described.name}: another publisher has held it for {lock_timeout_seconds:g} s: "
                "let it finish, or stop it, and run again"
            ) from None
        except psycopg.errors.UndefinedTable as error:
            raise PublishError(
                f"domain {described.name}: {error.diag.message_primary}: run `dbt build` first"
            ) from None
        except psycopg.Error as error:
            reason = " ".join(str(error).split())
            raise PublishError(
                f"domain {described.name}: the engine failed while publishing ({reason}): run again, "
                "what DynamoDB accepted is not lost"
            ) from error


def publish_lock(engine: EngineConnection, domain_key: str) -> str:
    """The name whose advisory lock a publisher of the domain holds."""
    return f"dagster-prefs publish {engine.schema} {domain_key}"


def column_problems(columns: Mapping[str, str], contract: Contract, domain: Domain) -> list[str]:
    """How a relation's columns (name → type as the engine spells it) are unlike a domain's keys and attributes."""
    keys = {
        key.name: "integer" if key.type == "N" else "string"
        for key in (contract.table.partition_key, contract.table.sort_key)
    }
    expected = keys | {name: attribute.type for name, attribute in domain.attributes.items()}
    problems = [f"{name} is missing" for name in expected if name not in columns]
    problems += [f"{name} is not in the contract" for name in columns if name not in expected]
    problems += [
        f"{name} is {columns[name]} and the contract says {kind}"
        for name, kind in expected.items()
        if name in columns and columns[name] not in COLUMN_TYPES[kind]
    ]
    return problems


class _Publication:
    """One run over one domain."""

    def __init__(
        self,
        engine: EngineConnection,
        client: DynamoDBClient,
        contract: Contract,
        domain: Domain,
        table: TableReport,
        threads: int,
        max_attempts: int,
        control: psycopg.Connection[Any],
        progress: Callable[[int], None] | None,
    ) -> None:
        self.engine = engine
        self.client = client
        self.domain = domain
        self.table = table
        self.threads = threads
        self.max_attempts = max_attempts
        self.control = control
        self.progress = progress
        self.contract = contract
        self.keys = contract.table
        self.encoder = ItemEncoder(contract, domain)
        self.sink = sql.Identifier(domain.sink)
        self.attributes = list(domain.attributes)
        self.upserts = self.deletes = self.retries = 0
        self.refused: list[str] = []
        self.fatal: str | None = None

    @property
    def _parameters(self) -> dict[str, Any]:
        # Names and types are part of the fingerprint: a renamed attribute with the same values is a change.
        layout = json.dumps([[name, attribute.type] for name, attribute in self.domain.attributes.items()])
        return {"table_id": self.table.table_id, "domain_key": self.domain.key, "layout": layout}

    def run(self, lock_timeout_seconds: float) -> PublishReport:
        started = time.monotonic()
        self._lock(lock_timeout_seconds)
        self._check_columns()
        self._mark()
        with self.engine.connect(autocommit=False) as reading:
            reading.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
            reading.read_only = True
            total = self._count(reading)
            # Losing the last of these records in a crash of the engine only means writing them again.
            self.control.execute("set synchronous_commit to off")
            self._write(chain(self._changed(reading), self._gone(reading)))
        report = PublishReport(
            domain_key=self.domain.key,
            table=self.table.name,
            upserts=self.upserts,
            deletes=self.deletes,
            unchanged=total - self.pending,
            retries=self.retries,
            seconds=time.monotonic() - started,
        )
        self._raise_for_failures(report)
        self.control.execute(
            "delete from online_published where domain_key = %(domain_key)s and table_id <> %(table_id)s",
            self._parameters,
        )
        return report

    def _lock(self, timeout_seconds: float) -> None:
        self.control.execute(
            "select set_config('lock_timeout', %s, false)",
            [with_unit(timeout_seconds, "lock_timeout_seconds")],
        )
        self.control.execute(
            "select pg_advisory_lock(hashtextextended(%s, 0))",
            [publish_lock(self.engine, self.domain.key)],
        )

    def _check_columns(self) -> None:
        columns: dict[str, str] = dict(
            self.control.execute(
                "select a.attname::text, format_type(a.atttypid, null) from pg_attribute a "
                "where a.attrelid = %s::regclass and a.attnum > 0 and not a.attisdropped",
                [f'"{self.engine.schema}"."{self.domain.sink}"'],
            ).fetchall()
        )
        if problems := column_problems(columns, self.contract, self.domain):
            raise PublishError(
                f"domain {self.domain.name}: {self.domain.sink} is not as the contract says: "
                f"{'; '.join(problems)}: run `dbt build` and `prefs contract build`"
            )

    def _row_fingerprint(self) -> sql.Composed:
        columns = [self.keys.partition_key.name, self.keys.sort_key.name, *self.attributes]
        return sql.SQL("md5(%(layout)s || row({})::text)").format(
            sql.SQL(", ").join(sql.Identifier("s", column) for column in columns)
        )

    def _mark(self) -> None:
        self.control.execute(
            sql.SQL(
                """
                insert into online_published as p (table_id, domain_key, viewer_id, fingerprint)
                select %(table_id)s, %(domain_key)s, s.viewer_id, ''
                from {sink} as s
                left join online_published as o
                    on o.table_id = %(table_id)s
                    and o.domain_key = %(domain_key)s
                    and o.viewer_id = s.viewer_id
                where s.viewer_id is not null
                    and o.fingerprint is distinct from '' and o.fingerprint is distinct from {fingerprint}
                group by s.viewer_id
                on conflict (table_id, domain_key, viewer_id) do update set fingerprint = ''
                """
            ).format(sink=self.sink, fingerprint=self._row_fingerprint()),
            self._parameters,
        )
        self.control.execute(
            sql.SQL(
                """
                update online_published as p set fingerprint = ''
                where p.table_id = %(table_id)s and p.domain_key = %(domain_key)s and p.fingerprint <> ''
                    and not exists (select from {sink} as s where s.viewer_id = p.viewer_id)
                """
            ).format(sink=self.sink),
            self._parameters,
        )

    def _count(self, reading: psycopg.Connection[Any]) -> int:
        total, distinct, without_key, foreign, pending = reading.execute(
            sql.SQL(
                """
                select count(*), count(distinct s.viewer_id),
                    count(*) filter (where s.viewer_id is null),
                    count(*) filter (where s.domain_key is distinct from %(domain_key)s),
                    count(*) filter (where p.fingerprint = '')
                from {sink} as s
                left join online_published as p
                    on p.table_id = %(table_id)s
                    and p.domain_key = %(domain_key)s
                    and p.viewer_id = s.viewer_id
                """
            ).format(sink=self.sink),
            self._parameters,
        ).fetchone() or (0, 0, 0, 0, 0)
        if without_key:
            problem = f"{without_key} rows without viewer_id"
        elif foreign:
            problem = f"{foreign} rows whose domain_key is not {self.domain.key}"
        elif distinct != total:
            problem = f"{total - distinct} viewers more than once"
        else:
            self.pending = pending
            return int(total)
        raise PublishError(
            f"domain {self.domain.name}: {self.domain.sink} has {problem}, but it must have one row per "
            f"viewer of this domain: correct {self.domain.relation}"
        )

    def _changed(self, reading: psycopg.Connection[Any]) -> Iterator[_Change]:
        statement = sql.SQL(
            """
            select s.viewer_id, {fingerprint}, {attributes}
            from {sink} as s
            join online_published as p on p.viewer_id = s.viewer_id
            where p.table_id = %(table_id)s and p.domain_key = %(domain_key)s and p.fingerprint = ''
            """
        ).format(
            fingerprint=self._row_fingerprint(),
            attributes=sql.SQL(", ").join(sql.Identifier("s", name) for name in self.attributes),
            sink=self.sink,
        )
        with reading.cursor(name="changed") as cursor:
            cursor.itersize = 2000
            cursor.execute(statement, self._parameters)
            for viewer_id, fingerprint, *values in cursor:
                try:
                    item = self.encoder.encode(viewer_id, values)
                except ItemError as error:
                    self.refused.append(str(error))
                    continue
                yield _Change(viewer_id, {"PutRequest": {"Item": item}}, fingerprint)

    def _gone(self, reading: psycopg.Connection[Any]) -> Iterator[_Change]:
        statement = sql.SQL(
            """
            select p.viewer_id from online_published as p
            where p.table_id = %(table_id)s and p.domain_key = %(domain_key)s and p.fingerprint = ''
                and not exists (select from {sink} as s where s.viewer_id = p.viewer_id)
            """
        ).format(sink=self.sink)
        with reading.cursor(name="gone") as cursor:
            cursor.itersize = 2000
            cursor.execute(statement, self._parameters)
            for (viewer_id,) in cursor:
                yield _Change(viewer_id, {"DeleteRequest": {"Key": self.encoder.key(viewer_id)}}, None)

    def _write(self, changes: Iterator[_Change]) -> None:
        writer = BatchWriter(self.client, self.table.name, self.keys.partition_key.name, self.max_attempts)
        running: set[Future[_Outcome]] = set()
        with ThreadPoolExecutor(self.threads, thread_name_prefix="publish") as pool:
            while not self.fatal and len(self.refused) <= MAX_REFUSED:
                batch = list(islice(changes, BATCH_ITEMS))
                if not batch:
                    break
                running.add(pool.submit(writer.write, batch))
                if len(running) >= 2 * self.threads:
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    self._settle(done)
            self._settle(wait(running).done)

    def _settle(self, done: set[Future[_Outcome]]) -> None:
        outcomes = [future.result() for future in done]
        accepted = [change for outcome in outcomes for change in outcome.accepted]
        written = [change for change in accepted if change.fingerprint is not None]
        deleted = [change.viewer_id for change in accepted if change.fingerprint is None]
        if written:
            self.control.execute(
                """
                update online_published as p set fingerprint = c.fingerprint
                from unnest(%(viewers)s::bigint[], %(fingerprints)s::text[]) as c (viewer_id, fingerprint)
                where p.table_id = %(table_id)s
                    and p.domain_key = %(domain_key)s
                    and p.viewer_id = c.viewer_id
                """,
                self._parameters
                | {
                    "viewers": [change.viewer_id for change in written],
                    "fingerprints": [change.fingerprint for change in written],
                },
            )
        if deleted:
            self.control.execute(
                "delete from online_published where table_id = %(table_id)s and domain_key = %(domain_key)s "
                "and viewer_id = any(%(viewers)s::bigint[])",
                self._parameters | {"viewers": deleted},
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
            more = f" (and {len(self.refused) - 1} more viewers)" if len(self.refused) > 1 else ""
            raise PublishError(f"domain {self.domain.name}: {self.refused[0]}{more}; {done}", report)


class BatchWriter:
    """BatchWriteItem with bounded retries of what DynamoDB left unprocessed; safe for threads."""

    def __init__(self, client: DynamoDBClient, table: str, partition_key: str, max_attempts: int) -> None:
        self.client = client
        self.table = table
        self.partition_key = partition_key
        self.max_attempts = max_attempts

    def write(self, batch: Sequence[_Change]) -> _Outcome:
        """Write up to 25 changes of distinct viewers; never raises for what DynamoDB answers."""
        from botocore.exceptions import BotoCoreError, ClientError

        outcome = _Outcome()
        pending = {change.viewer_id: change for change in batch}
        attempts = 0
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
                    self._viewer(request)
                    for request in answer.get("UnprocessedItems", {}).get(self.table, [])
                }
                reason = "writes stay unprocessed, as when the table is throttled"
            accepted = [change for viewer, change in pending.items() if viewer not in left]
            outcome.accepted += accepted
            pending = {viewer: pending[viewer] for viewer in pending if viewer in left}
            if not pending:
                break
            # As long as something is accepted the table makes progress, and patience is right.
            attempts = 0 if accepted else attempts + 1
            if attempts >= self.max_attempts:
                outcome.fatal = (
                    f"table {self.table} did not accept {len(pending)} writes "
                    f"after {attempts} attempts ({reason})"
                )
                break
            outcome.retries += 1
            time.sleep(random.uniform(0, min(5.0, 0.05 * 2**attempts)))  # noqa: S311 - jitter, not a secret
        return outcome

    def _isolate(self, changes: list[_Change], message: str, outcome: _Outcome) -> None:
        # One invalid item makes DynamoDB refuse its whole batch; halving finds it and keeps the others.
        if len(changes) == 1:
            outcome.refused.append(f"viewer {changes[0].viewer_id}: DynamoDB refused the item: {message}")
            return
        middle = len(changes) // 2
        for half in (changes[:middle], changes[middle:]):
            part = self.write(half)
            outcome.accepted += part.accepted
            outcome.refused += part.refused
            outcome.retries += part.retries
            outcome.fatal = outcome.fatal or part.fatal

    def _viewer(self, request: Any) -> int:
        item = request["PutRequest"]["Item"] if "PutRequest" in request else request["DeleteRequest"]["Key"]
        return int(item[self.partition_key]["N"])
