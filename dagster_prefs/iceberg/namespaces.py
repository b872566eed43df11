"""The Iceberg namespaces of environments: their size, and their removal with every file."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from pyiceberg.catalog import Catalog
from pyiceberg.exceptions import NoSuchNamespaceError, NoSuchTableError

from dagster_prefs.files import local_folder
from dagster_prefs.iceberg.catalog import PLATFORM_PROPERTY, OfflineError, translated


class NamespaceInUse(OfflineError):
    """A namespace of this name belongs to somebody else."""


@dataclass(frozen=True)
class NamespaceSize:
    """A namespace: its tables, and the files and bytes of their current snapshots."""

    name: str
    tables: tuple[str, ...]
    files: int
    size_bytes: int


def platform_namespaces(catalog: Catalog) -> list[str]:
    """Return the names of the namespaces that the platform made. Raises OfflineError."""
    with translated("the Iceberg catalog"):
        names = [".".join(name) for name in catalog.list_namespaces()]
        return sorted(name for name in names if _is_ours(catalog, name))


def namespace_size(catalog: Catalog, name: str) -> NamespaceSize | None:
    """Return the size of a namespace, None if there is none. Raises OfflineError."""
    tables, files, size = [], 0, 0
    with translated(f"the Iceberg namespace {name}"):
        if not catalog.namespace_exists(name):
            return None
        for identifier in _tables(catalog, name):
            try:
                snapshot = catalog.load_table(identifier).current_snapshot()
            except NoSuchTableError:
                # Dropped since it was listed.
                continue
            tables.append(identifier[-1])
            summary = snapshot.summary if snapshot is not None else None
            if summary is not None:
                files += int(summary["total-data-files"] or 0)
                size += int(summary["total-files-size"] or 0)
    return NamespaceSize(name, tuple(sorted(tables)), files, size)


def require_ours(catalog: Catalog, name: str) -> None:
    """Raise NamespaceInUse if a namespace of this name exists that the platform did not make; another OfflineError."""
    with translated(f"the Iceberg namespace {name}"):
        if catalog.namespace_exists(name) and not _is_ours(catalog, name):
            raise NamespaceInUse(
                f"the Iceberg namespace {name} was not made by this platform, and stays: choose another name for the "
                "environment, or drop it in the catalog"
            )


def drop_namespace(catalog: Catalog, name: str, warehouse: str, *, keep_empty: bool = False) -> bool:
    """Drop a namespace with its tables and their files. Returns False if there is none. Safe to repeat.

    With `keep_empty` the namespace itself stays. In a local `warehouse` its folder is deleted, which removes the files
    of no snapshot too. Raises OfflineError, as `require_ours` does.
    """
    with translated(f"the Iceberg namespace {name}"):
        require_ours(catalog, name)
        if not catalog.namespace_exists(name):
            return False
        for identifier in _tables(catalog, name):
            try:
                catalog.purge_table(identifier)
            except NoSuchTableError:
                continue
        if not keep_empty:
            with suppress(NoSuchNamespaceError):
                catalog.drop_namespace(name)
        folder = local_folder(warehouse)
        if folder is not None and (folder / name).is_dir():
            shutil.rmtree(folder / name)
    return True


def _is_ours(catalog: Catalog, name: str) -> bool:
    try:
        found = catalog.load_namespace_properties(name)
    except NoSuchNamespaceError:
        return False
    return PLATFORM_PROPERTY.items() <= found.items()


def _tables(catalog: Catalog, name: str) -> Sequence[tuple[str, ...]]:
    try:
        return list(catalog.list_tables(name))
    except NoSuchNamespaceError:
        return ()
