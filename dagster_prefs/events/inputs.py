"""The inputs of `prefs ingest`: files, folders, and objects in S3, each resolved to the files to read."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import unquote

from dagster_prefs.declarations.registry import Registry
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.events.dry_run import DryRun, dry_run_file, dry_run_table
from dagster_prefs.events.formats import EventFileError
from dagster_prefs.events.ingest import Delivery, FileOptions, ingest_file
from dagster_prefs.events.raw import Batches, IngestReport, ProgressCallback, RawStore

if TYPE_CHECKING:
    from dagster_prefs.events.columnar import Table

S3 = "s3://"
# How Hive, and Spark after it, spell a partition whose column is NULL.
_NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"


@dataclass(frozen=True)
class Input:
    """One file or table to ingest.

    `open` yields it as a local file or table. `version` identifies the content of a remote object, so that it is
    fetched only once; None for local files. `constants` are the columns in the names of its folders, such as
    `day=2026-01-31`.
    """

    name: str
    open: Callable[[], AbstractContextManager[Path | Table]]
    version: str | None = None
    constants: Mapping[str, str | None] = field(default_factory=dict)

    def label(self, options: FileOptions) -> str | None:
        """Return its path in `ingest_files`, which includes the options that decide which messages it has."""
        if self.version is None:
            return None
        chosen = [
            options.topic,
            options.mapping,
            sorted(options.renamed.items()),
            options.where,
            options.arrived_at,
        ]
        if options.until is not None:
            chosen.append(options.until.isoformat())
        digest = hashlib.sha256(json.dumps(chosen).encode()).hexdigest()
        return f"{self.name} version {self.version} options {digest[:8]}"


def ingest_input(
    connection: EngineConfiguration,
    registry: Registry,
    given: Input,
    options: FileOptions,
    *,
    batches: Batches = Batches(),  # noqa: B008
    deliver: Delivery | None = None,
) -> IngestReport:
    """Ingest one input like `ingest_file`. A complete input is not fetched again."""
    options = replace(options, label=given.label(options), constants=given.constants)
    if options.label is not None:
        with RawStore(connection) as store:
            known = store.completed(options.label)
        if known is not None:
            lines = known.lines or 0
            return IngestReport(known.source, known.topic, lines, 0, lines, 0, known.shift_seconds, 0.0)
    with _named(given) as opened:
        if isinstance(opened, Path):
            return ingest_file(connection, registry, opened, options, batches=batches, deliver=deliver)
        from dagster_prefs.events.table_ingest import ingest_table

        return ingest_table(connection, registry, opened, options, batches=batches, deliver=deliver)


def dry_run_input(
    connection: EngineConfiguration,
    registry: Registry,
    given: Input,
    options: FileOptions,
    progress: ProgressCallback | None = None,
) -> DryRun:
    """Check the messages of one input like `dry_run_file`. Writes nothing."""
    options = replace(options, constants=given.constants)
    with _named(given) as opened:
        judge: Any = dry_run_file if isinstance(opened, Path) else dry_run_table
        found: DryRun = judge(connection, registry, opened, options, progress)
        return found


@contextmanager
def _named(given: Input) -> Iterator[Path | Table]:
    """Open an input. Errors about the fetched file name the input."""
    with given.open() as opened:
        try:
            yield opened
        except EventFileError as error:
            raise EventFileError(str(error).replace(str(opened), given.name)) from error


def local_inputs(path: Path) -> Iterator[Input]:
    """Yield a file, or the files of a folder and the folders in it, ordered by their paths.

    Skips names that begin with `.` or `_`, under which engines leave markers and checksums. Raises
    EventFileError for a folder without files.
    """
    if not path.is_dir():
        yield Input(str(path), _here(path))
        return
    try:
        found = sorted(_files_in(path))
    except OSError as error:
        raise EventFileError(f"{path} cannot be read ({error.strerror}): check its permissions") from None
    if not found:
        raise EventFileError(
            f"{path} is a folder without files (names that begin with `.` or `_` are skipped)"
        )
    for inner in found:
        constants = partition_columns(inner.relative_to(path).parts[:-1])
        yield Input(str(inner), _here(inner), constants=constants)


def _here(opened: Path | Table) -> Callable[[], AbstractContextManager[Path | Table]]:
    return lambda: nullcontext(opened)


def _files_in(path: Path) -> Iterator[Path]:
    for inner in path.iterdir():
        if _is_data(inner.name):
            if inner.is_dir():
                yield from _files_in(inner)
            else:
                yield inner


def _is_data(name: str) -> bool:
    return not name.startswith((".", "_"))


def partition_columns(folders: Sequence[str]) -> dict[str, str | None]:
    """Return the columns and values of folders named `column=value`."""
    named = [folder.partition("=") for folder in folders if "=" in folder]
    return {
        unquote(column): None if value == _NULL_PARTITION else unquote(value)
        for column, _, value in named
        if column
    }


class StoredTable(Protocol):
    """A table that another part of the platform reads, with the fields of `columnar.Table`."""

    @property
    def name(self) -> str:
        """Its name in messages."""

    @property
    def file_name(self) -> str:
        """The name of its file."""

    @property
    def identity(self) -> str:
        """The identity of its content (hex)."""

    @property
    def rows(self) -> int:
        """The number of its rows."""

    @property
    def schema(self) -> Any:
        """Its Arrow schema."""

    def batches(self, first: int, columns: Sequence[str] | None) -> Iterator[tuple[int, Any, Any]]:
        """Yield its rows like `columnar.Table.batches`."""


def table_inputs(tables: Iterable[StoredTable]) -> Iterator[Input]:
    """Yield tables that another part of the platform reads, such as the files of an Iceberg table."""
    from dagster_prefs.events.columnar import Table, TableBatch

    for stored in tables:

        def batches(
            first: int, columns: Sequence[str] | None, stored: StoredTable = stored
        ) -> Iterator[TableBatch]:
            return map(TableBatch._make, stored.batches(first, columns))

        table = Table(stored.name, stored.file_name, stored.identity, stored.schema, stored.rows, batches)
        yield Input(stored.name, _here(table))


@dataclass(frozen=True)
class ObjectStore:
    """S3 at `region` and `endpoint_url`; None leaves the address to AWS's own configuration."""

    region: str
    endpoint_url: str | None

    def inputs(self, uri: str) -> Iterator[Input]:
        """Yield the object of a URI, or the objects below it, ordered by their keys.

        Raises EventFileError if there are none, or S3 refuses or does not answer.
        """
        bucket, _, prefix = uri.removeprefix(S3).partition("/")
        if not bucket:
            raise EventFileError(f"{uri} names no bucket: write s3://BUCKET/PREFIX")
        folder = prefix.rstrip("/") + "/" if prefix else ""
        with self._reading(uri):
            pages = (
                self._client()
                .get_paginator("list_objects_v2")
                .paginate(Bucket=bucket, Prefix=prefix.rstrip("/"))
            )
            found = [item for page in pages for item in page.get("Contents", [])]
        objects = [
            (item["Key"], item["ETag"].strip('"'))
            for item in found
            if item["Key"] == prefix
            or (
                item["Key"].startswith(folder)
                and not item["Key"].endswith("/")
                and all(map(_is_data, PurePosixPath(item["Key"].removeprefix(folder)).parts))
            )
        ]
        if not objects:
            raise EventFileError(
                f"{uri} has no objects (names that begin with `.` or `_` are skipped): check the prefix"
            )
        for key, version in sorted(objects):
            inner = PurePosixPath(key.removeprefix(folder)).parts[:-1] if key != prefix else ()
            yield Input(
                f"{S3}{bucket}/{key}",
                partial(self._fetched, bucket, key, version),
                version,
                partition_columns(inner),
            )

    @contextmanager
    def _fetched(self, bucket: str, key: str, version: str) -> Iterator[Path]:
        """Yield a copy of an object in a temporary folder, under its own name."""
        with tempfile.TemporaryDirectory(prefix="prefs-ingest-") as folder:
            path = Path(folder, PurePosixPath(key).name)
            with self._reading(f"{S3}{bucket}/{key}"):
                # Fetch the listed version, because its path in `ingest_files` contains that version.
                body = self._client().get_object(Bucket=bucket, Key=key, IfMatch=version)["Body"]
                with path.open("wb") as target:
                    for part in body.iter_chunks(1024 * 1024):
                        target.write(part)
            yield path

    def _client(self) -> Any:
        import boto3
        from botocore.config import Config

        # A server at a custom address has no host name per bucket.
        config = Config(
            s3={"addressing_style": "path" if self.endpoint_url else "auto"},
            retries={"mode": "standard", "total_max_attempts": 4},
        )
        return boto3.client("s3", region_name=self.region, endpoint_url=self.endpoint_url, config=config)

    @contextmanager
    def _reading(self, uri: str) -> Iterator[None]:
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            yield
        except ClientError as error:
            if error.response.get("Error", {}).get("Code") == "PreconditionFailed":
                raise EventFileError(
                    f"{uri} was replaced while it was read: let its writer finish, then ingest it again"
                ) from None
            raise _unreachable(uri, error) from None
        except BotoCoreError as error:
            raise _unreachable(uri, error) from None
        except OSError as error:
            raise EventFileError(
                f"{uri} cannot be copied to {tempfile.gettempdir()} ({error.strerror}): free space there, or set TMPDIR"
            ) from None


def _unreachable(uri: str, error: Exception) -> EventFileError:
    lines = str(error).splitlines() or [type(error).__name__]
    return EventFileError(
        f"{uri} cannot be read ({lines[0][:300]}): check the bucket, AWS_REGION, AWS_ENDPOINT_URL and the credentials"
    )
