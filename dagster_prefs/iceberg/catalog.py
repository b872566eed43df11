"""The Iceberg catalog (SQLite next to local files, Glue, or REST), opened by one function.

Errors of the catalog and of its storage are translated into one family of exceptions: a scheduled export can
meet all of them, and each has another remedy.
"""

from __future__ import annotations

import errno
import json
import sqlite3
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from traceback import walk_tb
from typing import TYPE_CHECKING, Literal, Protocol

import pyarrow as pa
import pydantic
from pyiceberg.catalog import Catalog
from pyiceberg.exceptions import (
    CommitFailedException,
    CommitStateUnknownException,
    NamespaceAlreadyExistsError,
    NoSuchTableError,
    RESTError,
    ValidationError,
    ValidationException,
)
from pyiceberg.io import PY_IO_IMPL
from pyiceberg.table import StaticTable, Table

from dagster_prefs.errors import PrefsError
from dagster_prefs.files import catalog_file, local_folder, make_private_folder
from dagster_prefs.iceberg.file_io import CHECKED_FILE_IO, FileTruncated
from dagster_prefs.iceberg.pointers import catalog_tables
from dagster_prefs.redaction import redact_uris

if TYPE_CHECKING:
    from pyiceberg.catalog.sql import SqlCatalog

CatalogKind = Literal["sqlite", "glue", "rest"]

CATALOG_NAME = "prefs"

# The property by which a namespace of the platform is recognised; Terraform writes it too.
PLATFORM_PROPERTY = {"prefs.platform": CATALOG_NAME}

# Commits hold SQLite's lock for milliseconds; this outlasts the queue of many concurrent exports.
SQLITE_LOCK_SECONDS = 60

# Matches up to the last @ before the path, because a password may contain one.


class OfflineError(PrefsError):
    """Base class of the offline store's errors."""


class CatalogUnavailable(OfflineError):
    """The catalog, or the storage of its tables, cannot be reached or denies access."""


class CatalogCorrupted(OfflineError):
    """The catalog or a table's metadata exists but cannot be read."""


class StorageFull(OfflineError):
    """The storage has no space left; what readers see is unchanged."""


class TableMissing(OfflineError):
    """A required training table does not exist."""


def open_catalog(
    kind: CatalogKind,
    warehouse: str,
    *,
    uri: str | None = None,
    credential: str | None = None,
    region: str | None = None,
    endpoint_url: str | None = None,
) -> Catalog:
    """Open the catalog and verify that it answers.

    `warehouse` is a URI (`file:///…`, `s3://bucket/prefix`) or a local path. With `sqlite` it must be local:
    the catalog is the file `catalog.db` inside it; file and folder are created if missing. `uri` is the
    address of a REST catalog, `credential` its `client id:secret`; `region` and `endpoint_url` are AWS's
    (Glue and S3), None leaving them to AWS's own configuration chain.

    Raises CatalogUnavailable or CatalogCorrupted, with the remedy in one sentence.
    """
    where = _describe(kind, warehouse, uri)
    storage = {"warehouse": warehouse.rstrip("/"), PY_IO_IMPL: CHECKED_FILE_IO}
    if region:
        storage |= {"s3.region": region, "glue.region": region}
    if endpoint_url:
        storage |= {"s3.endpoint": endpoint_url, "glue.endpoint": endpoint_url}
    with translated(where):
        catalog: Catalog
        if kind == "sqlite":
            catalog = _open_sqlite(warehouse)
        elif kind == "glue":
            import boto3
            from botocore.config import Config
            from pyiceberg.catalog.glue import GlueCatalog

            # pyiceberg's default client would try a dead endpoint ten times.
            config = Config(retries={"mode": "standard", "total_max_attempts": 4})
            client = boto3.client("glue", region_name=region, endpoint_url=endpoint_url, config=config)
            catalog = GlueCatalog(CATALOG_NAME, client=client, **storage)
        else:
            from pyiceberg.catalog.rest import RestCatalog

            if uri is None:
                raise CatalogUnavailable("the REST catalog has no address: set PREFS_ICEBERG_URI")
            # Set explicitly: pyiceberg deprecates its default for this URL.
            tokens = f"{uri.rstrip('/')}/v1/oauth/tokens"
            secret = {"credential": credential, "oauth2-server-uri": tokens} if credential else {}
            catalog = RestCatalog(CATALOG_NAME, uri=uri, **secret, **storage)
        catalog.list_namespaces()
    return catalog


def ensure_namespace(
    catalog: Catalog, namespace: str, properties: Mapping[str, str] = PLATFORM_PROPERTY
) -> None:
    """Create the namespace unless it exists, by default as one of the platform's own. Safe in several processes."""
    with translated(f"the Iceberg namespace {namespace}"):
        if not catalog.namespace_exists(namespace):
            try:
                catalog.create_namespace(namespace, dict(properties))
            except NamespaceAlreadyExistsError:
                return
            except _of("sqlalchemy.exc", "IntegrityError"):
                return


class Tables(Protocol):
    """What loads tables by their names: any catalog, or `LocalTables`."""

    def load_table(self, identifier: str | tuple[str, ...], /) -> Table:
        """Load a table. Raises NoSuchTableError."""
        ...


class LocalTables:
    """The tables of one machine's SQLite catalog, `catalog.db`, to read: without SQLAlchemy, and nothing is created."""

    def __init__(self, catalog: Path) -> None:
        self.catalog = catalog

    def load_table(self, identifier: str | tuple[str, ...], /) -> Table:
        """Load `namespace.name` as it is now. Raises NoSuchTableError, CatalogUnavailable or CatalogCorrupted."""
        namespace, _, name = ".".join(Catalog.identifier_to_tuple(identifier)).rpartition(".")
        with translated(f"the Iceberg catalog {self.catalog}"):
            location = catalog_tables(self.catalog, namespace).get(name)
        if location is None:
            raise NoSuchTableError(f"Table does not exist: {namespace}.{name}")
        return StaticTable.from_metadata(location, {PY_IO_IMPL: CHECKED_FILE_IO})


def _open_sqlite(warehouse: str) -> SqlCatalog:
    import sqlalchemy.exc
    from pyiceberg.catalog.sql import SqlCatalog

    folder = local_folder(warehouse)
    if folder is None:
        raise CatalogUnavailable(
            f"a SQLite catalog needs a local warehouse, not {warehouse}: set PREFS_ICEBERG_WAREHOUSE to a folder, "
            "or PREFS_ICEBERG_CATALOG to glue or rest"
        )
    folder = folder.absolute()
    try:
        make_private_folder(folder)
    except OSError as error:
        raise CatalogUnavailable(
            f"the folder {folder} of the Iceberg warehouse cannot be created ({error.strerror}): "
            "set PREFS_ICEBERG_WAREHOUSE to a writable folder"
        ) from error
    address = sqlalchemy.URL.create(
        "sqlite", database=str(catalog_file(folder)), query={"timeout": str(SQLITE_LOCK_SECONDS)}
    )
    # Not percent-encoded, because pyiceberg takes the path of a location literally.
    given = {
        "uri": address.render_as_string(),
        "warehouse": f"file://{folder}",
        PY_IO_IMPL: CHECKED_FILE_IO,
    }
    try:
        return SqlCatalog(CATALOG_NAME, **given)
    except sqlalchemy.exc.OperationalError as error:
        # When two processes open a new catalog, both create its tables; the second one gets this error.
        if "already exists" not in str(error):
            raise
        return SqlCatalog(CATALOG_NAME, **given)


def _describe(kind: CatalogKind, warehouse: str, uri: str | None) -> str:
    if kind == "sqlite":
        folder = local_folder(warehouse)
        return f"the Iceberg catalog {catalog_file(folder) if folder else warehouse}"
    return (
        f"the Iceberg catalog {redact_uris(uri or '')}"
        if kind == "rest"
        else f"the Glue catalog of {warehouse}"
    )


@contextmanager
def conflicts_named() -> Iterator[None]:
    """Raise CommitFailedException for every commit inside the block that another writer's commit overtook.

    pyiceberg tells of it in three ways. Sequence numbers count the commits of all branches of a table, but it only
    checks for conflicts within one branch, and raises ValueError for a snapshot that a commit to another branch
    overtook; and where the files to replace are gone when it tries again, it raises ValidationException.
    """
    try:
        yield
    except ValidationException as error:
        raise CommitFailedException(str(error)) from error
    except ValueError as error:
        if "sequence number" not in str(error):
            raise
        raise CommitFailedException(str(error)) from error


@contextmanager
def translated(what: str) -> Iterator[None]:
    """Translate errors of catalog and storage inside the block into OfflineErrors that name `what`.

    Commit conflicts pass through, because the caller decides whether to retry.
    """
    try:
        yield
    except NoSuchTableError as error:
        raise TableMissing(
            f"{what} does not exist ({_reason(error)}): export it first; a new tile's appears with its first whole day"
        ) from error
    except CommitStateUnknownException as error:
        raise CatalogUnavailable(
            f"{what} did not answer whether a commit took place ({_reason(error)}): run it again, which is safe"
        ) from error
    except _of("sqlalchemy.exc", "DBAPIError") as error:
        raise _explain_sqlite(what, getattr(error, "orig", error)) from error
    except sqlite3.Error as error:
        raise _explain_sqlite(what, error) from error
    except (
        pydantic.ValidationError,
        ValidationError,
        json.JSONDecodeError,
        UnicodeDecodeError,
        pa.ArrowInvalid,
        FileTruncated,
    ) as error:
        raise _damaged(what, error) from error
    except RESTError as error:
        raise _unreachable(what, error) from error
    except _of("requests", "RequestException") as error:
        raise _unreachable(what, error) from error
    except _of("botocore.exceptions", "BotoCoreError", "ClientError") as error:
        raise _unreachable(what, error) from error
    except FileNotFoundError as error:
        raise CatalogCorrupted(
            f"{what} refers to a missing file ({_reason(error)}): restore it from a copy, or drop the table and "
            "export its days again"
        ) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _full(what) from error
        raise CatalogUnavailable(
            f"{what} cannot be read or written ({_reason(error)}): check the storage"
        ) from error
    except Exception as error:
        # In a damaged manifest the decoder raises what its position leads to: EOFError, ValueError,
        # SystemError, …
        if any(
            frame.f_globals["__name__"].startswith("pyiceberg.avro")
            for frame, _ in walk_tb(error.__traceback__)
        ):
            raise _damaged(what, error) from error
        raise


def _of(module: str, *names: str) -> tuple[type[Exception], ...]:
    """Return exceptions of a library that takes long to load: what is not loaded has raised none."""
    loaded = sys.modules.get(module)
    return tuple(getattr(loaded, name) for name in names) if loaded else ()


def _explain_sqlite(what: str, error: BaseException) -> OfflineError:
    text = str(error)
    if "full" in text:
        return _full(what)
    if isinstance(error, sqlite3.DatabaseError) and ("not a database" in text or "malformed" in text):
        return CatalogCorrupted(
            f"{what} is damaged ({text}): restore it from a copy, or remove it and export every day again"
        )
    return CatalogUnavailable(
        f"{what} cannot be opened or written ({text}): check its folder and permissions"
    )


def _unreachable(what: str, error: Exception) -> CatalogUnavailable:
    return CatalogUnavailable(
        f"{what} cannot be reached or refuses access ({_reason(error)}): check its address, region and credentials"
    )


def _damaged(what: str, error: Exception) -> CatalogCorrupted:
    return CatalogCorrupted(
        f"{what} cannot be read, its metadata or a file of it is damaged ({_reason(error)}): restore it from a copy, "
        "or drop the table and export its days again"
    )


def _full(what: str) -> StorageFull:
    return StorageFull(
        f"no space left while writing {what}: free some and run it again; what readers see is unchanged"
    )


def _reason(error: BaseException) -> str:
    # A client's own error may contain the whole address, with its password.
    lines = [line.strip() for line in redact_uris(str(error)).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
