"""What each environment made in the stores that several share, what its storage costs, and its removal."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from decimal import ROUND_HALF_UP, Decimal
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import psycopg

from dagster_prefs.dynamodb.environments import StoredTable, delete_table, environment_tables
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.engine.schemas import SchemaSize, drop_schema, platform_schemas
from dagster_prefs.environment import NAMESPACE_SUFFIX, Environment, environment_named
from dagster_prefs.errors import PrefsError
from dagster_prefs.events.groups import consumer_groups, delete_groups
from dagster_prefs.iceberg.namespaces import (
    NamespaceSize,
    drop_namespace,
    namespace_size,
    platform_namespaces,
    require_ours,
)
from dagster_prefs.live.presence import FollowedElsewhere, is_followed, read_follower
from dagster_prefs.platform import Platform
from dagster_prefs.settings import Settings
from dagster_prefs.tools.cost import GIB, Prices

T = TypeVar("T")

# The stores, as they are named to people.
ENGINE, DYNAMODB, ICEBERG, KAFKA = "engine", "DynamoDB", "Iceberg", "Kafka"


@dataclass(frozen=True)
class Holdings:
    """What one environment made. `state_bytes` are those of its folder on this machine."""

    environment: Environment
    schema: SchemaSize | None = None
    tables: tuple[StoredTable, ...] = ()
    namespace: NamespaceSize | None = None
    groups: tuple[str, ...] = ()
    state_bytes: int = 0

    @property
    def is_empty(self) -> bool:
        """Whether nothing of it is left."""
        return not (self.schema or self.tables or self.namespace or self.groups or self.state_bytes)

    @property
    def items(self) -> int:
        """The items of its tables, as DynamoDB last counted them."""
        return sum(table.items for table in self.tables)

    @property
    def table_bytes(self) -> int:
        """The bytes of its tables, as DynamoDB last counted them."""
        return sum(table.size_bytes for table in self.tables)

    def dollars_a_month(self, prices: Prices) -> Decimal:
        """Return what its storage costs a month, in US dollars, without the engine, requests and backups."""
        lake = 0 if self.namespace is None else self.namespace.size_bytes
        dollars = (self.table_bytes * prices.table_gib_month + lake * prices.lake_gib_month) / GIB
        return dollars.quantize(Decimal("0.01"), rounding=ROUND_HALF_UP)

    def as_dict(self, prices: Prices) -> dict[str, Any]:
        """Return it as data."""
        named = self.environment
        return {
            "environment": named.name,
            "schema": self.schema and asdict(self.schema),
            "tables": [asdict(table) for table in self.tables],
            "namespace": self.namespace and asdict(self.namespace),
            "consumer_groups": list(self.groups),
            "state_bytes": self.state_bytes,
            "terraform_workspace": named.workspace,
            "dagster_tags": named.dagster_tags,
            "dollars_a_month": str(self.dollars_a_month(prices)),
        }


@dataclass(frozen=True)
class Found:
    """The environments by name, and the stores that could not be read, with the reason of each."""

    environments: Mapping[str, Holdings]
    unread: Mapping[str, str] = field(default_factory=dict)


class Environments:
    """The environments that share the stores of these settings, whichever of them the settings name."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._platform = Platform(settings)

    def find(self, only: Environment | None = None) -> Found:
        """Return what every environment made, or `only` one. A store that cannot be read hides no other."""
        unread: dict[str, str] = {}

        def read(store: str, look: Callable[[], T]) -> T | None:
            try:
                return look()
            except (PrefsError, psycopg.Error) as error:
                unread[store] = " ".join(str(error).split())
                return None

        schemas = read(ENGINE, self._schemas) or {}
        tables = read(DYNAMODB, partial(self._tables, only)) or {}
        sizes = read(ICEBERG, partial(self._namespaces, only)) or {}
        groups = read(KAFKA, partial(consumer_groups, self._platform.kafka)) or []
        known = {only.name} if only else {*schemas, *tables, *sizes, *_folders(self._settings)}
        found = {}
        for name in sorted(known):
            named = Environment(name)
            found[name] = Holdings(
                named,
                schemas.get(name),
                tuple(tables.get(name, ())),
                sizes.get(name),
                tuple(group for group in groups if named.owns_group(group)),
                _folder_bytes(self._settings.of_environment(name).state_dir),
            )
        return Found(found, unread)

    def drop(
        self,
        named: Environment,
        say: Callable[[str], None] = lambda line: None,
        *,
        patience_seconds: float = 0.0,
    ) -> None:
        """Remove all that an environment made; `say` receives a line for each part. Safe to repeat.

        A follower that was told to stop has `patience_seconds` to let go of the engine.

        Tables that Terraform owns stay. Nothing of another environment is touched: a part is removed by its exact name,
        and a table by the tag that names its environment. Raises FollowedElsewhere while a follower runs, and
        SchemaInUse or NamespaceInUse for what others made or read, before anything is dropped; and the errors of each
        store.
        """
        settings = self._settings.of_environment(named.name)
        platform = Platform(settings)
        if settings.engine == "local":
            self._require_unfollowed(platform.engine, named, patience_seconds)
        client, catalog = platform.dynamodb(), platform.catalog()
        require_ours(catalog, named.namespace)
        tables = self._tables(named).get(named.name, [])
        # Before the tables, because sinks in it write to them.
        with platform.engine.connect() as connection:
            if drop_schema(connection, platform.engine):
                say(f"dropped schema {named.schema}")
        terraformed = settings.provisioning == "verify"
        if tables and terraformed:
            say(
                f"left {', '.join(table.name for table in tables)}: Terraform owns them; run "
                f"`terraform workspace select {named.workspace}` and `terraform destroy`"
            )
        else:
            for table in tables:
                delete_table(client, table.name)
                say(f"deleted table {table.name} ({table.items:,} items)")
        if drop_namespace(catalog, named.namespace, settings.warehouse, keep_empty=terraformed):
            say(f"dropped the tables of Iceberg namespace {named.namespace} and their files")
        for group in delete_groups(platform.kafka, named.owns_group):
            say(f"deleted consumer group {group}")
        if settings.state_dir.is_dir():
            shutil.rmtree(settings.state_dir)
            say(f"deleted {settings.state_dir}")

    def _require_unfollowed(
        self, engine: EngineConfiguration, named: Environment, patience_seconds: float
    ) -> None:
        deadline = time.monotonic() + patience_seconds
        with engine.connect() as connection:
            while is_followed(engine, connection):
                if time.monotonic() >= deadline:
                    break
                time.sleep(0.05)
            else:
                return
            state = None
            with suppress(psycopg.Error):
                state = read_follower(connection, engine)
        raise FollowedElsewhere(
            f"{state.process if state else 'a process'} follows environment {named.name}: stop it, then run it again"
        )

    def _schemas(self) -> dict[str, SchemaSize]:
        engine = self._platform.engine
        with engine.connect() as connection:
            found = platform_schemas(connection, engine)
        return {schema.name: schema for schema in found if environment_named(schema.name)}

    def _tables(self, only: Environment | None) -> dict[str, list[StoredTable]]:
        declared = [table.name for table in self._platform.contract.tables.values()]
        found: dict[str, list[StoredTable]] = {}
        for table in environment_tables(self._platform.dynamodb(), declared, only):
            if environment_named(table.environment):
                found.setdefault(table.environment, []).append(table)
        return found

    def _namespaces(self, only: Environment | None) -> dict[str, NamespaceSize]:
        catalog = self._platform.catalog()
        found = {}
        for name in platform_namespaces(catalog):
            head = name.removesuffix(NAMESPACE_SUFFIX)
            owner = environment_named(head) if head != name else None
            if owner is None or (only is not None and owner != only):
                continue
            size = namespace_size(catalog, name)
            if size is not None:
                found[owner.name] = size
        return found


def _folders(settings: Settings) -> list[str]:
    folder = settings.data_dir / "environments"
    names = [path.name for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    return [name for name in names if environment_named(name)]


def _folder_bytes(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0
