"""The served log: a sample of what the clients answered, written in the background.

Training on what was really served, and the proof that training values equal served ones, both need a record of what
a reader got. A client with `ClientOptions(log=ServedLog(…))` offers each answer to the log. The sample is drawn by a
hash of the id, so that the same ids are followed over time. An answer never waits: it goes to a bounded queue, which
one thread empties, and what does not fit is dropped and counted.
"""

from __future__ import annotations

import itertools
import logging
import os
import secrets
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

from dagster_prefs.addresses import is_loopback
from dagster_prefs.declarations.contract import LAST_EVENT_AT, Domain, Table
from dagster_prefs.errors import PrefsError, excerpt
from dagster_prefs.files import make_private_folder
from dagster_prefs.ids import Id
from dagster_prefs.logs import REQUEST_ID
from dagster_prefs.pauses import Pauses
from dagster_prefs.served_rows import GROWING, ServedRow
from dagster_prefs.serving.observing import error_kind

logger = logging.getLogger(__name__)

DEFAULT_SHARE = 0.01
# Answers (profiles) that may wait for the thread; a profile of three domains takes some 2 KB.
QUEUE_LIMIT = 10_000
# Rows that a sink gets at once.
BATCH_ROWS = 500
# The longest time that a row waits in the queue while the sink accepts rows.
FLUSH_SECONDS = 1.0
# Attempts of a batch, and the pauses between them; meanwhile the queue fills.
ATTEMPTS = 5
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.1, 5.0
# A log line about a sink that fails, at most so often.
COMPLAINT_SECONDS = 60.0
MAX_VARIANT_CHARACTERS = 128

# Firehose's limits for one request and one record.
FIREHOSE_RECORDS, FIREHOSE_REQUEST_BYTES, FIREHOSE_RECORD_BYTES = 500, 4_000_000, 1_000_000


class LogError(PrefsError):
    """The served log was given impossible arguments, or its sink did not accept rows."""


class Caller(NamedTuple):
    """What the caller of a read says about it: ids of a request and of an experiment's variant."""

    request_id: str | None = None
    variant: str | None = None


_NOBODY = Caller()
_CALLER: ContextVar[Caller] = ContextVar("prefs_served_log_caller", default=_NOBODY)


@contextmanager
def called(*, request_id: str | None = None, variant: str | None = None) -> Iterator[None]:
    """Log the reads of this block with the caller's request id and variant. Raises LogError for a long variant."""
    token = _CALLER.set(Caller(request_id, checked_variant(variant)))
    try:
        yield
    finally:
        _CALLER.reset(token)


def checked_variant(variant: str | None) -> str | None:
    """Return a variant as it is. Raises LogError if it is too long."""
    if variant is not None and len(variant) > MAX_VARIANT_CHARACTERS:
        raise LogError(
            f"the variant {excerpt(variant)} has {len(variant)} characters: give at most {MAX_VARIANT_CHARACTERS}"
        )
    return variant


class Answered(Protocol):
    """One profile, as serving/profiles.py answers it."""

    @property
    def id(self) -> Id: ...
    @property
    def values(self) -> Mapping[str, Any]: ...
    @property
    def reads(self) -> Mapping[str, Any]: ...
    @property
    def partial(self) -> bool: ...


class RowSink(Protocol):
    """Where rows go. Used by one thread at a time; a batch that raised is written again."""

    def write(self, rows: Sequence[ServedRow]) -> None:
        """Write all rows; return when they are safe. Raises any exception if one is not."""
        ...

    def close(self) -> None:
        """Finish what was written."""
        ...


@dataclass(frozen=True, slots=True)
class LogCounts:
    """Rows written, rows dropped (the queue was full, or the sink failed), and attempts of the sink that failed."""

    written: int
    dropped: int
    failures: int


class _Waiting(NamedTuple):
    """An answer in the queue."""

    of: BoundLog
    profile: Answered
    served_at: float
    seconds: float
    consistent: bool
    caller: Caller


class ServedLog:
    """A sample of answers, on their way to a sink. Pass it to any number of clients of one process, and close it last.

    `share` of the ids are logged, from 0 to 1. Raises LogError for another share.
    """

    def __init__(
        self,
        sink: RowSink,
        *,
        share: float = DEFAULT_SHARE,
        queue_limit: int = QUEUE_LIMIT,
        flush_seconds: float = FLUSH_SECONDS,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
            raise LogError(
                f"the share of ids that are logged must be a number from 0 to 1, not {excerpt(share)}"
            )
        self.share = share
        self.bound = int(share * 2**32)
        self.clock = clock
        self._sink = sink
        self._limit = queue_limit
        self._flush_seconds = flush_seconds
        self._queue: deque[_Waiting] = deque()
        self._lock = threading.Lock()
        self._more = threading.Condition()
        self._written = self._dropped = self._failures = 0
        self._busy = False
        self._closed = False
        self._hurry = False
        self._thread: threading.Thread | None = None
        self._complained_at = -COMPLAINT_SECONDS
        # Of this log alone: the ids of its rows differ from those of every other log.
        self._name = secrets.token_hex(8)
        self._numbers = itertools.count()

    def of(self, table: Table, domains: Collection[Domain], contract_version: int) -> BoundLog:
        """Return the log for a client of one entity's table."""
        return BoundLog(self, table, domains, contract_version)

    @property
    def counts(self) -> LogCounts:
        """The counts so far."""
        with self._lock:
            return LogCounts(self._written, self._dropped, self._failures)

    def put(self, waiting: _Waiting) -> None:
        """Queue an answer, or drop and count it if the queue is full."""
        if len(self._queue) >= self._limit or self._closed:
            self._drop(len(waiting.profile.reads))
            return
        self._queue.append(waiting)
        if self._thread is None:
            self._start()
        # Waking the thread for every answer would cost the caller more than all the rest.
        if len(self._queue) * 2 >= self._limit:
            self._wake()

    def flush(self, timeout_seconds: float = 10.0) -> bool:
        """Wait until everything that was queued is written or dropped; return whether that was within the time."""
        with self._more:
            self._hurry = True
            self._more.notify_all()
            return self._more.wait_for(lambda: not self._queue and not self._busy, timeout_seconds)

    def close(self, timeout_seconds: float = 10.0) -> None:
        """Write what is queued, for at most `timeout_seconds`, drop the rest, and close the sink."""
        self.flush(timeout_seconds)
        self._closed = True
        self._wake()
        if self._thread is not None:
            self._thread.join(timeout_seconds)
            if self._thread.is_alive():
                # The sink is for one thread at a time.
                return
        while self._queue:
            self._drop(len(self._queue.popleft().profile.reads))
        self._sink.close()

    def _wake(self) -> None:
        with self._more:
            self._hurry = True
            self._more.notify_all()

    def _drop(self, rows: int) -> None:
        with self._lock:
            self._dropped += rows

    def _start(self) -> None:
        with self._lock:
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._run, name="served-log", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        while not self._closed:
            with self._more:
                self._more.wait_for(lambda: self._hurry or self._closed, self._flush_seconds)
                self._hurry = False
                self._busy = True
            while self._queue and not self._closed:
                self._write(self._batch())
            with self._more:
                self._busy = False
                self._more.notify_all()

    def _batch(self) -> list[ServedRow]:
        rows: list[ServedRow] = []
        while self._queue and len(rows) < BATCH_ROWS:
            waiting = self._queue.popleft()
            rows += [
                waiting.of.row(waiting, name, f"{self._name}-{next(self._numbers)}")
                for name in waiting.profile.reads
            ]
        return rows

    def _write(self, rows: Sequence[ServedRow]) -> None:
        pauses = Pauses(FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS)
        for attempt in range(ATTEMPTS):
            try:
                self._sink.write(rows)
            # Whatever a sink raises must neither end this thread nor reach a reader.
            except Exception as error:
                with self._lock:
                    self._failures += 1
                self._complain(error)
                if attempt + 1 < ATTEMPTS and not self._closed:
                    time.sleep(pauses.next())
            else:
                with self._lock:
                    self._written += len(rows)
                return
        self._drop(len(rows))

    def _complain(self, error: Exception) -> None:
        now = time.monotonic()
        if now - self._complained_at >= COMPLAINT_SECONDS:
            self._complained_at = now
            # Without the rows: they name people.
            logger.warning("the served log does not accept rows (%s: %s)", type(error).__name__, error)


class BoundLog:
    """The served log for the clients of one entity."""

    __slots__ = ("_bound", "_domains", "_log", "_table", "_version", "entity")

    def __init__(
        self, log: ServedLog, table: Table, domains: Collection[Domain], contract_version: int
    ) -> None:
        self._log = log
        self._bound = log.bound
        self._table = table
        self._domains = {domain.name: domain for domain in domains}
        self._version = contract_version
        self.entity = next((domain.entity for domain in domains), "")

    def note(self, profiles: Collection[Answered], *, seconds: float, consistent: bool) -> None:
        """Offer the answers of one call; only those of sampled ids are kept."""
        key_text, bound = self._table.key_text, self._bound
        for profile in profiles:
            if zlib.crc32(key_text(profile.id).encode()) < bound:
                caller = _CALLER.get()
                if caller.request_id is None:
                    # Within the feature server every request has an id.
                    caller = Caller(REQUEST_ID.get(), caller.variant)
                self._log.put(_Waiting(self, profile, self._log.clock(), seconds, consistent, caller))

    def row(self, waiting: _Waiting, name: str, row_id: str) -> ServedRow:
        """Return the row of one domain of an answer."""
        profile, read, domain = waiting.profile, waiting.profile.reads[name], self._domains[name]
        value = profile.values.get(name)
        return ServedRow(
            row_id=row_id,
            served_at=datetime.fromtimestamp(waiting.served_at, UTC),
            read_seconds=round(waiting.seconds, 6),
            entity=self.entity,
            key=self._table.key_text(profile.id),
            domain=domain.key,
            contract_version=self._version,
            state=read.state,
            error=None if read.error is None else error_kind(read.error),
            attributes=None
            if value is None
            else {one: getattr(value, one) for one in domain.attributes if one != LAST_EVENT_AT},
            last_event_at=read.last_event_at,
            unknown=read.unknown,
            partial=profile.partial,
            consistent=waiting.consistent,
            request_id=waiting.caller.request_id,
            variant=waiting.caller.variant,
        )


class FileRows:
    """Rows as lines of JSON in files of a folder, which only their owner may read.

    A file is named `served-<time>-<process>-<number>.jsonl`. While it is written its name ends with `.open`; after
    `max_bytes` or `max_seconds` it gets its final name, and another begins. Nothing deletes old files. Raises OSError
    if the folder cannot be created.
    """

    def __init__(
        self, folder: Path, *, max_bytes: int = 64 * 1024 * 1024, max_seconds: float = 3600.0
    ) -> None:
        make_private_folder(folder)
        self._folder = folder
        self._max_bytes, self._max_seconds = max_bytes, max_seconds
        self._file: BinaryIO | None = None
        self._path = folder
        self._opened_at = 0.0
        self._number = 0

    def write(self, rows: Sequence[ServedRow]) -> None:
        """Append all rows, or none. Raises OSError."""
        file = self._opened()
        start = file.tell()
        try:
            file.write(b"".join(row.as_json() + b"\n" for row in rows))
            file.flush()
        except OSError:
            # A full disk may have taken half of a line.
            with suppress(OSError):
                file.truncate(start)
            self._finish()
            raise
        if file.tell() >= self._max_bytes:
            self._finish()

    def close(self) -> None:
        """Finish the open file."""
        self._finish()

    def _opened(self) -> BinaryIO:
        if self._file is not None and time.monotonic() - self._opened_at >= self._max_seconds:
            self._finish()
        if self._file is None:
            now = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
            self._number += 1
            name = f"served-{now}-{os.getpid()}{secrets.token_hex(4)}-{self._number}.jsonl{GROWING}"
            self._path = self._folder / name
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            self._file = os.fdopen(os.open(self._path, flags, 0o600), "wb")
            self._opened_at = time.monotonic()
        return self._file

    def _finish(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with suppress(OSError):
                file.close()
            with suppress(OSError):
                self._path.rename(self._path.with_suffix(""))


class TopicWriter(Protocol):
    """A producer that confirms deliveries, such as events/kafka.py's KafkaWriter."""

    def send(self, topic: str, value: bytes, key: bytes | None = None) -> None: ...
    def flush(self) -> None: ...


class KafkaRows:
    """Rows as messages of a Kafka topic, keyed by the id. `connect` makes a producer, a new one after each failure."""

    def __init__(self, connect: Callable[[], TopicWriter], topic: str) -> None:
        self._connect = connect
        self._topic = topic
        self._writer: TopicWriter | None = None

    def write(self, rows: Sequence[ServedRow]) -> None:
        """Send all rows and wait for their delivery. Raises what the producer raises."""
        try:
            if self._writer is None:
                self._writer = self._connect()
            for row in rows:
                self._writer.send(self._topic, row.as_json(), row.key.encode())
            self._writer.flush()
        except BaseException:
            # A producer that failed once reports that failure forever.
            self._writer = None
            raise

    def close(self) -> None:
        """Let the producer go; all rows are delivered."""
        self._writer = None


def firehose_client(endpoint_url: str | None = None, region: str | None = None) -> Any:
    """Return a Firehose client with bounded time-outs, with credentials like `dynamodb_client`'s."""
    import boto3
    from botocore.config import Config

    session: Any = boto3.Session()
    local = session.get_credentials() is None and is_loopback(endpoint_url)
    return session.client(
        "firehose",
        region_name=region,
        endpoint_url=endpoint_url,
        config=Config(
            connect_timeout=2, read_timeout=10, retries={"mode": "standard", "total_max_attempts": 4}
        ),
        **({"aws_access_key_id": "local", "aws_secret_access_key": "local"} if local else {}),
    )


class FirehoseRows:
    """Rows as records of a Firehose stream, one line of JSON each. `client` is boto3's."""

    def __init__(self, client: Any, stream: str) -> None:
        self._client = client
        self._stream = stream

    def write(self, rows: Sequence[ServedRow]) -> None:
        """Put all rows. Raises LogError if Firehose rejects some, and botocore's errors."""
        for batch in self._requests([row.as_json() + b"\n" for row in rows]):
            answer = self._client.put_record_batch(
                DeliveryStreamName=self._stream, Records=[{"Data": data} for data in batch]
            )
            if answer.get("FailedPutCount"):
                codes = sorted({one["ErrorCode"] for one in answer["RequestResponses"] if "ErrorCode" in one})
                # The whole batch is put again: rows have ids, by which readers drop the second copy.
                raise LogError(
                    f"Firehose {self._stream} rejected {answer['FailedPutCount']} of {len(batch)} rows "
                    f"({', '.join(codes)})"
                )

    def close(self) -> None:
        """Do nothing: every row was accepted."""

    def _requests(self, lines: Sequence[bytes]) -> Iterator[list[bytes]]:
        batch: list[bytes] = []
        size = 0
        for line in lines:
            if len(line) > FIREHOSE_RECORD_BYTES:
                raise LogError(f"a row has {len(line)} bytes, and Firehose takes {FIREHOSE_RECORD_BYTES}")
            if batch and (len(batch) == FIREHOSE_RECORDS or size + len(line) > FIREHOSE_REQUEST_BYTES):
                yield batch
                batch, size = [], 0
            batch.append(line)
            size += len(line)
        if batch:
            yield batch
