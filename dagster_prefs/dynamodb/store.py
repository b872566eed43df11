"""One domain of the serving contract with its two stores: the engine's view and the DynamoDB table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dagster_prefs.declarations.contract import Contract, Domain, Table
from dagster_prefs.dynamodb.access import ItemAccess
from dagster_prefs.dynamodb.items import ItemEncoder
from dagster_prefs.dynamodb.tables import TableError, TableReport
from dagster_prefs.engine.connection import EngineConfiguration

if TYPE_CHECKING:
    from mypy_boto3_dynamodb import DynamoDBClient


@dataclass(frozen=True)
class DomainStore:
    """The stores of one domain, for publishing, comparison and repair: its view and its items.

    `table` is the table of the domain's entity, from `provision` or `find_tables`. Raises TableError for the
    table of another entity.
    """

    engine: EngineConfiguration
    client: DynamoDBClient
    contract: Contract
    domain: Domain
    table: TableReport

    def __post_init__(self) -> None:
        if self.domain.entity != self.table.entity:
            raise TableError(
                f"domain {self.domain.name} is of entity {self.domain.entity}, and table {self.table.name} of "
                f"{self.table.entity}: pass the table of the domain's entity"
            )

    @property
    def keys(self) -> Table:
        """The key columns of the table, as the contract declares them."""
        return self.contract.table_of(self.domain)

    @property
    def items(self) -> ItemAccess:
        """Strongly consistent access to the table."""
        return ItemAccess(self.client, self.keys, self.table.name)

    @property
    def encoder(self) -> ItemEncoder:
        """The encoder of the domain's rows."""
        return ItemEncoder(self.contract, self.domain)


def domain_stores(
    engine: EngineConfiguration,
    client: DynamoDBClient,
    contract: Contract,
    tables: Mapping[str, TableReport],
    names: Iterable[str] | None = None,
) -> list[DomainStore]:
    """Return the stores of these domains (by name or key, all by default); `tables` are the tables by entity."""
    chosen = [contract.domain(name) for name in names or contract.domains]
    return [DomainStore(engine, client, contract, domain, tables[domain.entity]) for domain in chosen]
