"""The serving contract: what services may rely on, stored in the project's registry.

It is declared with the rolling views in dbt YAML and generated from dbt's manifest into `registry.json`;
Terraform, provisioning, publisher, reader and checks all read that file.
"""

from __future__ import annotations

import json
import keyword
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, cast, get_args

from dagster_prefs.errors import PrefsError, excerpt
from dagster_prefs.ids import SEPARATOR, Id, decode_part, id_parts, join_parts

REGISTRY = "registry.json"

AttributeType = Literal[
    "integer", "decimal", "float", "string", "list<string>", "list<decimal>", "list<integer>"
]
KeyType = Literal["N", "S"]

DOMAIN_KEY, LAST_EVENT_AT = "domain_key", "last_event_at"
# In the meta of a list's column, and in the contract: whether its elements may be NULL.
NULL_ELEMENTS = "null_elements"

SQL_TYPES: Mapping[str, AttributeType] = MappingProxyType(
    {
        "bigint": "integer",
        "int8": "integer",
        "integer": "integer",
        "int": "integer",
        "int4": "integer",
        "smallint": "integer",
        "numeric": "decimal",
        "decimal": "decimal",
        "double precision": "float",
        "float8": "float",
        "real": "float",
        "text": "string",
        "varchar": "string",
        "character varying": "string",
        "text[]": "list<string>",
        "varchar[]": "list<string>",
        "character varying[]": "list<string>",
        "numeric[]": "list<decimal>",
        "decimal[]": "list<decimal>",
        "bigint[]": "list<integer>",
        "int8[]": "list<integer>",
        "integer[]": "list<integer>",
        "int[]": "list<integer>",
    }
)

_COLD_STARTS: Mapping[AttributeType, Callable[[], Any]] = MappingProxyType(
    {
        "integer": int,
        "decimal": lambda: Decimal(0),
        "float": float,
        "string": str,
        "list<string>": list,
        "list<decimal>": list,
        "list<integer>": list,
    }
)

# DynamoDB's limit for one item.
DYNAMODB_ITEM_BYTES = 409_600

# Names of a profile's own attributes, with which `profile.<domain>` would be ambiguous.
PROFILE_NAMES = frozenset(
    {
        "as_dict",
        "classes",
        "cold_start",
        "domain",
        "entity",
        "failure",
        "id",
        "key",
        "partial",
        "reads",
        "values",
    }
)


class ContractError(PrefsError):
    """The contract is malformed, or a change to it is not allowed."""


@dataclass(frozen=True, slots=True)
class Freshness:
    """A freshness target, in seconds of staleness: when to warn, and when the target is missed."""

    warn_seconds: float
    error_seconds: float


@dataclass(frozen=True, slots=True)
class Attribute:
    """One attribute of a domain's item; `null_elements` says whether the elements of a list may be NULL."""

    type: AttributeType
    nullable: bool
    description: str
    null_elements: bool = False

    @property
    def is_list(self) -> bool:
        """Whether its value is a list."""
        return self.type.startswith("list")


@dataclass(frozen=True, slots=True)
class KeyAttribute:
    """A key attribute of a table; `type` is DynamoDB's name of the type."""

    name: str
    type: KeyType

    def typed(self, value: int | str) -> dict[str, str]:
        """Return the value in DynamoDB's typed JSON."""
        return {self.type: str(value)}

    @property
    def sql_type(self) -> str:
        """The SQL type of its column, on either engine."""
        return "bigint" if self.type == "N" else "varchar"

    @property
    def contract_type(self) -> AttributeType:
        """The type that its column would have as an attribute."""
        return "integer" if self.type == "N" else "string"

    def value_of(self, item: Mapping[str, Mapping[str, Any]]) -> int | str:
        """Return the value from an item or key in DynamoDB's typed JSON.

        Raises KeyError or ValueError if it has none.
        """
        text: str = item[self.name][self.type]
        return int(text) if self.type == "N" else text


@dataclass(frozen=True, slots=True)
class Table:
    """The DynamoDB table of one entity; `name` is without the environment's prefix.

    The partition key is the entity's first key column. `rest_keys` are the other columns of a composite key. They are
    part of the sort key: the domain's key, followed by each of them, encoded, with `#` as separator.
    """

    name: str
    partition_key: KeyAttribute
    sort_key: KeyAttribute
    max_item_bytes: int
    ttl_attribute: str | None
    rest_keys: tuple[KeyAttribute, ...] = ()

    @property
    def columns(self) -> tuple[KeyAttribute, ...]:
        """The entity's key columns, in order."""
        return (self.partition_key, *self.rest_keys)

    def sort_text(self, domain_key: str, id_: Id) -> str:
        """Return the sort key of the item of a domain and an id."""
        if isinstance(id_, tuple):
            return f"{domain_key}{SEPARATOR}{join_parts(id_[1:])}"
        return domain_key

    def typed_key(self, domain_key: str, id_: Id) -> dict[str, dict[str, str]]:
        """Return the key of the item of a domain and an id, in DynamoDB's typed JSON."""
        return {
            self.partition_key.name: self.partition_key.typed(id_parts(id_)[0]),
            self.sort_key.name: self.sort_key.typed(self.sort_text(domain_key, id_)),
        }

    def split_key(self, item: Mapping[str, Mapping[str, Any]]) -> tuple[Id, str]:
        """Return the id and the domain's key from an item or key in DynamoDB's typed JSON.

        For an item whose sort key has no encoded rest (a lease), the id is the value of the partition key. Raises
        KeyError or ValueError if the keys do not match the contract.
        """
        first, sort = self.partition_key.value_of(item), str(self.sort_key.value_of(item))
        if not self.rest_keys:
            return first, sort
        domain, *parts = sort.rsplit(SEPARATOR, len(self.rest_keys))
        if domain.count(SEPARATOR) != 1:
            return first, sort
        rest = (
            int(part) if key.type == "N" else decode_part(part)
            for key, part in zip(self.rest_keys, parts, strict=True)
        )
        return (first, *rest), domain

    def key_text(self, id_: Id) -> str:
        """Return the whole key as one text, which `parse_key` parses."""
        return join_parts(id_) if isinstance(id_, tuple) else str(id_)

    def parse_key(self, text: str) -> Id:
        """Parse the id from the output of `key_text`."""
        if not self.rest_keys:
            return int(text) if self.partition_key.type == "N" else text
        parts = zip(self.columns, text.split(SEPARATOR), strict=True)
        return tuple(int(part) if key.type == "N" else decode_part(part) for key, part in parts)


@dataclass(frozen=True, slots=True)
class Domain:
    """One item per entity's key: `key` is its sort key, `name` its attribute in Python.

    `retired` are columns of its view that are no longer in its items.
    """

    key: str
    name: str
    entity: str
    relation: str
    sink: str
    owner: str
    description: str
    freshness: Freshness
    attributes: Mapping[str, Attribute]
    retired: Mapping[str, Attribute] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class FreshnessThresholds:
    """Freshness targets outside the domains: per topic, for every view, for the export and for the canary."""

    topics: Mapping[str, Freshness]
    views: Freshness
    export: Freshness
    canary: Freshness


@dataclass(frozen=True, slots=True)
class Contract:
    """The whole serving contract.

    `tables` maps entities to tables, `domains` maps domain keys (`learning#progress`) to domains; both are
    empty in a project that serves no profiles.
    """

    version: int
    owner: str
    tables: Mapping[str, Table]
    domains: Mapping[str, Domain]
    freshness: FreshnessThresholds
    _names: Mapping[str, Domain] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        names = MappingProxyType({domain.name: domain for domain in self.domains.values()})
        object.__setattr__(self, "_names", names)

    def domain(self, name_or_key: str) -> Domain:
        """Return the domain of that key (`learning#progress`) or name (`progress`).

        Raises ContractError naming the known domains.
        """
        found = self.domains.get(name_or_key) or self._names.get(name_or_key)
        if found is None:
            known = ", ".join(self._names)
            raise ContractError(f"unknown domain {excerpt(name_or_key)}: the contract has {known}")
        return found

    def table_of(self, domain: Domain) -> Table:
        """Return the table that holds a domain's items."""
        return self.tables[domain.entity]

    def domains_of(self, entity: str) -> tuple[Domain, ...]:
        """Return the domains of one entity, in the contract's order."""
        return tuple(domain for domain in self.domains.values() if domain.entity == entity)


def cold_start(name: str, attribute: Attribute) -> Any:
    """Return an attribute's value for an id without data: None if nullable, else zero or empty.

    The newest event's time is None, too.
    """
    if attribute.nullable or name == LAST_EVENT_AT:
        return None
    return _COLD_STARTS[attribute.type]()


def load_contract(path: Path) -> Contract:
    """Read and validate the contract of a registry file, or of the registry in a project's folder.

    Raises ContractError naming the file, the position in it and the rule.
    """
    path = path if path.suffix == ".json" else path / REGISTRY
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ContractError(f"the registry {path} cannot be read ({reason}): run `prefs generate`") from None
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ContractError(f"the registry {path} is not JSON ({error}): run `prefs generate`") from None
    try:
        if not isinstance(content, dict) or "contract" not in content:
            raise ContractError("it has no contract")
        return parse_contract(content["contract"])
    except ContractError as error:
        raise ContractError(f"the registry {path} is not valid: {error}") from None


def parse_contract(content: object) -> Contract:
    """Validate the decoded JSON of a contract.

    Raises ContractError naming the first value that breaks a rule, and the rule.
    """
    root = _object(content, "the contract", {"version", "owner", "tables", "domains", "freshness"})
    version = _integer(root["version"], "version", minimum=1)
    tables = _tables(root["tables"])
    domains = {
        key: _domain(key, value, tables) for key, value in _mapping(root["domains"], "domains").items()
    }
    for entity in tables:
        if not any(domain.entity == entity for domain in domains.values()):
            raise ContractError(
                f"tables.{entity}: no domain is of entity {entity}: remove the table, or declare one"
            )
    for attribute in ("name", "relation", "sink"):
        values = [getattr(domain, attribute) for domain in domains.values()]
        twice = sorted({value for value in values if values.count(value) > 1})
        if twice:
            raise ContractError(f"domains: {attribute} {twice[0]!r} is used twice: each domain needs its own")
    place = "freshness"
    thresholds = _object(root["freshness"], place, {"topics", "views", "export", "canary"})
    freshness = FreshnessThresholds(
        topics=_thresholds(thresholds["topics"], f"{place}.topics"),
        views=_freshness(thresholds["views"], f"{place}.views"),
        export=_freshness(thresholds["export"], f"{place}.export"),
        canary=_freshness(thresholds["canary"], f"{place}.canary"),
    )
    return Contract(
        version=version,
        owner=_text(root["owner"], "owner"),
        tables=MappingProxyType(tables),
        domains=MappingProxyType(domains),
        freshness=freshness,
    )


def contract_dict(contract: Contract) -> dict[str, Any]:
    """Return the JSON form of a contract, from which `parse_contract` reads an equal one.

    Domains are in the order of their keys, attributes in the order of their declaration.
    """
    return {
        "version": contract.version,
        "owner": contract.owner,
        "tables": {
            entity: {
                "name": table.name,
                "partition_key": {"name": table.partition_key.name, "type": table.partition_key.type},
                "sort_key": {"name": table.sort_key.name, "type": table.sort_key.type},
                "max_item_bytes": table.max_item_bytes,
                "ttl_attribute": table.ttl_attribute,
            }
            | (
                {"rest_keys": [{"name": key.name, "type": key.type} for key in table.rest_keys]}
                if table.rest_keys
                else {}
            )
            for entity, table in contract.tables.items()
        },
        "domains": {
            key: {
                "name": domain.name,
                "entity": domain.entity,
                "relation": domain.relation,
                "sink": domain.sink,
                "owner": domain.owner,
                "description": domain.description,
                "freshness": _freshness_dict(domain.freshness),
                "attributes": _attributes_dict(domain.attributes),
                **({"retired": _attributes_dict(domain.retired)} if domain.retired else {}),
            }
            for key, domain in sorted(contract.domains.items())
        },
        "freshness": {
            "topics": {
                name: _freshness_dict(value) for name, value in sorted(contract.freshness.topics.items())
            },
            "views": _freshness_dict(contract.freshness.views),
            "export": _freshness_dict(contract.freshness.export),
            "canary": _freshness_dict(contract.freshness.canary),
        },
    }


def _attributes_dict(attributes: Mapping[str, Attribute]) -> dict[str, Any]:
    return {
        name: {
            "type": attribute.type,
            "nullable": attribute.nullable,
            "description": attribute.description,
            **({NULL_ELEMENTS: True} if attribute.null_elements else {}),
        }
        for name, attribute in attributes.items()
    }


def build_contract(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Build the contract from dbt's `manifest.json`.

    A model with `config.meta.domain` = {key, name, entity, sink, owner, description, freshness} is a domain,
    and its columns (data_type, description, a `not_null` test or constraint) are the attributes; `entity` may
    be omitted if there is only one table. The one exposure with `config.meta.contract` = {version, owner,
    tables, freshness} gives the rest.

    Raises ContractError naming the model or exposure, the rule and the remedy.
    """
    manifest = _resolved(manifest)
    tables: dict[str, Any] | None = None
    head: dict[str, Any] = {}
    source = ""
    for exposure in manifest.get("exposures", {}).values():
        declared = _meta(exposure).get("contract")
        if declared is None:
            continue
        if tables is not None:
            raise ContractError(
                f"exposures {source} and {exposure['name']} both declare meta.contract: keep one of them"
            )
        source = str(exposure["name"])
        head = _object(
            declared, f"exposure {source}: meta.contract", {"version", "owner", "tables", "freshness"}
        )
        tables = _mapping(head["tables"], f"exposure {source}: meta.contract.tables")
    if tables is None:
        raise ContractError(
            "the manifest has no exposure with meta.contract: declare version, owner, tables, freshness there"
        )
    keys = _tables(tables)
    tested = {
        (node.get("attached_node"), node.get("column_name"))
        for node in manifest.get("nodes", {}).values()
        if (node.get("test_metadata") or {}).get("name") == "not_null"
    }
    domains: dict[str, Any] = {}
    for unique_id, node in manifest.get("nodes", {}).items():
        declared = _meta(node).get("domain")
        if declared is None or node.get("resource_type") != "model":
            continue
        not_null = {
            name
            for name, column in node.get("columns", {}).items()
            if (unique_id, name) in tested
            or any(constraint.get("type") == "not_null" for constraint in column.get("constraints", []))
        }
        key, domain = _declared_domain(node, declared, keys, not_null)
        if key in domains:
            raise ContractError(
                f"models {domains[key]['relation']} and {domain['relation']} both declare domain {key}: "
                "rename one of them"
            )
        domains[key] = domain
    content = {
        "version": head["version"],
        "owner": head["owner"],
        "tables": tables,
        "domains": domains,
        "freshness": head["freshness"],
    }
    return contract_dict(parse_contract(content))


def _resolved(manifest: Mapping[str, Any]) -> Mapping[str, Any]:
    """Fill in the defaults of declarations in a manifest of `prefs generate`; return others unchanged.

    The generated model `deployments` has the contract's head in its meta, and each sink what it
    `publishes`.
    """
    nodes = dict(manifest.get("nodes", {}))
    heads = {
        id_: {"name": node["name"], "config": {"meta": {"contract": _meta(node)["contract"]}}}
        for id_, node in nodes.items()
        if "contract" in _meta(node)
    }
    for sink in manifest.get("nodes", {}).values():
        if published := _meta(sink).get("publishes"):
            for id_ in sink.get("depends_on", {}).get("nodes", []):
                if id_ in nodes:
                    nodes[id_] = {
                        **nodes[id_],
                        "config": {"meta": {**_meta(nodes[id_]), "domain": published}},
                    }
    return {"exposures": heads or manifest.get("exposures", {}), "nodes": nodes}


def deployed_contract(fragments: Sequence[Mapping[str, Any]]) -> Contract | None:
    """Return the contract in the engine's records, None without any.

    `fragments` are the parts of dbt's manifests that deployments recorded, one per domain. A domain that did
    not change keeps the fragment of an older version, so the highest version counts.

    Raises ContractError when the fragments contradict each other.
    """
    if not fragments:
        return None
    heads = [exposure for fragment in fragments for exposure in fragment["exposures"].values()]
    newest = max(heads, key=lambda exposure: int(_meta(exposure)["contract"]["version"]))
    nodes = {id_: node for fragment in fragments for id_, node in fragment["nodes"].items()}
    return parse_contract(build_contract({"exposures": {newest["name"]: newest}, "nodes": nodes}))


@dataclass(frozen=True, slots=True)
class Change:
    """One difference between two contracts; `path` is its position, `what` a sentence."""

    kind: Literal["additive", "breaking"]
    path: str
    what: str


def diff_contracts(old: Contract, new: Contract) -> tuple[Change, ...]:
    """Return the differences between two contracts, breaking changes first.

    Breaking is what an existing reader does not survive: another table or key, a domain or attribute that is
    gone, renamed or retyped, an attribute that may now be NULL or contain it, a weaker freshness promise. All else is
    additive, retiring too: an existing reader serves the attribute's cold-start value.
    """
    changes = [change for entity in old.tables for change in _entity_changes(entity, old, new)]
    changes.extend(
        Change("additive", f"tables.{entity}", "the table is new")
        for entity in new.tables
        if entity not in old.tables
    )
    if old.owner != new.owner:
        changes.append(Change("additive", "owner", f"{old.owner!r} becomes {new.owner!r}"))
    added = {domain.relation: domain for key, domain in new.domains.items() if key not in old.domains}
    for key, domain in old.domains.items():
        if key in new.domains:
            changes.extend(_domain_changes(domain, new.domains[key]))
            continue
        stay = (
            f"its items stay in {old.table_of(domain).name} as they were last written, and a reader of version "
            f"{old.version} serves them until they are deleted"
        )
        if renamed := added.pop(domain.relation, None):
            changes.append(
                Change(
                    "breaking",
                    key,
                    f"the domain is renamed to {renamed.key}, under which every row of {domain.relation} is written "
                    f"by the next apply; {stay}",
                )
            )
            changes.extend(_domain_changes(domain, renamed))
        else:
            changes.append(Change("breaking", key, f"the domain is removed: {stay}"))
    changes.extend(Change("additive", domain.key, "the domain is new") for domain in added.values())
    if old.freshness != new.freshness:
        changes.append(Change("additive", "freshness", "the pipeline's thresholds change"))
    return tuple(sorted(changes, key=lambda change: change.kind != "breaking"))


def check_version(old: Contract, new: Contract) -> tuple[Change, ...]:
    """Return all changes; refuse breaking ones without a higher version.

    Raises ContractError naming the breaking changes and the version to use.
    """
    changes = diff_contracts(old, new)
    if not new.domains:
        # A project that no longer serves profiles has no declaration that could state a version.
        return changes
    if new.version < old.version:
        raise ContractError(
            f"version {new.version} is lower than {old.version}: a contract's version must not decrease"
        )
    breaking = [f"{change.path}: {change.what}" for change in changes if change.kind == "breaking"]
    if breaking and new.version == old.version:
        raise ContractError(
            f"breaking change without a new version ({'; '.join(breaking)}): "
            f"set version to {old.version + 1} or undo it"
        )
    return changes


def _entity_changes(entity: str, old: Contract, new: Contract) -> Iterator[Change]:
    if entity in new.tables:
        yield from _table_changes(f"tables.{entity}", old.tables[entity], new.tables[entity])
    else:
        yield Change("breaking", f"tables.{entity}", "the table is removed")


def _table_changes(place: str, old: Table, new: Table) -> Iterator[Change]:
    if old.rest_keys != new.rest_keys:
        before_names, after_names = (
            ", ".join(f"{key.name} ({key.type})" for key in table.rest_keys) or "none" for table in (old, new)
        )
        yield Change("breaking", f"{place}.rest_keys", f"{before_names} becomes {after_names}")
    for name in ("name", "partition_key", "sort_key"):
        before, after = getattr(old, name), getattr(new, name)
        if before != after:
            shown = [
                f"{value.name} ({value.type})" if isinstance(value, KeyAttribute) else value
                for value in (before, after)
            ]
            yield Change("breaking", f"{place}.{name}", f"{shown[0]} becomes {shown[1]}")
    for name in ("max_item_bytes", "ttl_attribute"):
        if getattr(old, name) != getattr(new, name):
            yield Change("additive", f"{place}.{name}", f"{getattr(old, name)} becomes {getattr(new, name)}")


def _domain_changes(old: Domain, new: Domain) -> Iterator[Change]:
    if old.name != new.name:
        yield Change("breaking", f"{old.key}.name", f"{old.name} becomes {new.name}")
    if old.entity != new.entity:
        yield Change("breaking", f"{old.key}.entity", f"{old.entity} becomes {new.entity}")
    for place in ("relation", "sink", "owner", "description"):
        if getattr(old, place) != getattr(new, place):
            yield Change("additive", f"{old.key}.{place}", "it is changed")
    if old.freshness != new.freshness:
        weaker = new.freshness.error_seconds > old.freshness.error_seconds
        yield Change(
            "breaking" if weaker else "additive",
            f"{old.key}.freshness",
            f"error after {old.freshness.error_seconds} s becomes {new.freshness.error_seconds} s"
            if old.freshness.error_seconds != new.freshness.error_seconds
            else f"warning after {old.freshness.warn_seconds} s becomes {new.freshness.warn_seconds} s",
        )
    for name, before in old.attributes.items():
        path = f"{old.key}.{name}"
        after = new.attributes.get(name)
        if after is None and name in new.retired:
            yield Change("additive", path, _retirement(new))
            continue
        if after is None:
            yield Change("breaking", path, "the attribute is removed")
            continue
        if before.type != after.type:
            yield Change("breaking", path, f"{before.type} becomes {after.type}")
        if before.nullable != after.nullable:
            yield Change(
                "breaking" if after.nullable else "additive",
                path,
                "it may now be NULL" if after.nullable else "it can no longer be NULL",
            )
        if before.null_elements != after.null_elements:
            yield Change(
                "breaking" if after.null_elements else "additive",
                path,
                "its elements may now be NULL"
                if after.null_elements
                else "its elements can no longer be NULL",
            )
        if before.description != after.description:
            yield Change("additive", path, "the description is changed")
    for name, after in new.attributes.items():
        path = f"{old.key}.{name}"
        if (retired := old.retired.get(name)) and retired.type != after.type:
            yield Change("breaking", path, f"{retired.type}, which was retired, comes back as {after.type}")
        elif name not in old.attributes:
            what = "the attribute was retired and is served again" if retired else "the attribute is new"
            yield Change("additive", path, what)
    for name in old.retired:
        if name not in new.retired and name not in new.attributes:
            yield Change("additive", f"{old.key}.{name}", "the retired attribute is removed from its view")


def _retirement(domain: Domain) -> str:
    return (
        "the attribute is retired: items lose it when they are written next, as every item is after an apply; "
        f"{domain.relation} keeps the column and the training tables what they hold, but training sets leave it out; "
        "readers of another version serve its cold-start value and name it as unknown"
    )


def _meta(node: Mapping[str, Any]) -> Mapping[str, Any]:
    meta = node.get("config", {}).get("meta") or node.get("meta") or {}
    return cast(Mapping[str, Any], meta)


def _declared_domain(
    node: Mapping[str, Any], declared: object, tables: Mapping[str, Table], not_null: set[str]
) -> tuple[str, dict[str, Any]]:
    model = str(node["name"])
    place = f"model {model}: meta.domain"
    given = _mapping(declared, place)
    if len(tables) == 1:
        given = {"entity": next(iter(tables)), **given}
    domain = _object(given, place, {"key", "name", "entity", "sink", "owner", "description", "freshness"})
    table = _entity_table(domain["entity"], place, tables)
    attributes: dict[str, Any] = {}
    retired: dict[str, Any] = {}
    expected_keys = {key.name: key.contract_type for key in (*table.columns, table.sort_key)}
    seen_keys: set[str] = set()
    for name, column in node.get("columns", {}).items():
        sql_type = re.sub(r"\(.*?\)", "", str(column.get("data_type") or "")).strip().lower()
        contract_type = SQL_TYPES.get(sql_type)
        if contract_type is None:
            known = "bigint, numeric, double precision, text, text[], numeric[], bigint[]"
            raise ContractError(
                f"model {model}: column {name} has data_type {sql_type or 'none'}, which no contract type "
                f"corresponds to: use one of {known}"
            )
        if name in expected_keys:
            if contract_type != expected_keys[name] or name not in not_null:
                raise ContractError(
                    f"model {model}: key column {name} must be {expected_keys[name]} and have a not_null test"
                )
            seen_keys.add(name)
            continue
        (retired if _meta(column).get("retired") else attributes)[name] = {
            "type": contract_type,
            "nullable": name not in not_null,
            "description": " ".join(str(column.get("description") or "").split()),
            **({NULL_ELEMENTS: True} if _meta(column).get(NULL_ELEMENTS) else {}),
        }
    for name in expected_keys:
        if name not in seen_keys:
            raise ContractError(f"model {model}: the key column {name} is not declared in its YAML: add it")
    return str(domain["key"]), {
        "name": domain["name"],
        "entity": domain["entity"],
        "relation": node.get("alias") or model,
        "sink": domain["sink"],
        "owner": domain["owner"],
        "description": domain["description"],
        "freshness": domain["freshness"],
        "attributes": attributes,
        **({"retired": retired} if retired else {}),
    }


def _tables(value: object) -> dict[str, Table]:
    tables = {entity: _table(entity, given) for entity, given in _mapping(value, "tables").items()}
    names = [table.name for table in tables.values()]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ContractError(f"tables: name {twice[0]!r} is used twice: each entity needs a table of its own")
    return tables


def _entity_table(entity: object, place: str, tables: Mapping[str, Table]) -> Table:
    found = tables.get(entity) if isinstance(entity, str) else None
    if found is None:
        raise ContractError(
            f"{place}.entity: {excerpt(entity)} has no table: it is one of {', '.join(tables)}"
        )
    return found


def _table(entity: str, value: object) -> Table:
    place = f"tables.{entity}"
    table = _object(
        {"rest_keys": [], **_mapping(value, place)},
        place,
        {"name", "partition_key", "sort_key", "max_item_bytes", "ttl_attribute", "rest_keys"},
    )
    if not isinstance(table["rest_keys"], list):
        raise ContractError(f"{place}.rest_keys: a list of keys is needed, not {table['rest_keys']!r}")
    name = _text(table["name"], f"{place}.name")
    if not re.fullmatch(r"[A-Za-z0-9_.-]{3,255}", name):
        raise ContractError(
            f"{place}.name: {name!r} is not a DynamoDB table name (3 to 255 of A-Z a-z 0-9 _ . -)"
        )
    ttl = table["ttl_attribute"]
    if ttl is not None:
        ttl = _text(ttl, f"{place}.ttl_attribute")
    size = _integer(table["max_item_bytes"], f"{place}.max_item_bytes", minimum=1)
    if size > DYNAMODB_ITEM_BYTES:
        raise ContractError(
            f"{place}.max_item_bytes: {size} is over DynamoDB's limit of {DYNAMODB_ITEM_BYTES}"
        )
    sort_key = _key(table["sort_key"], f"{place}.sort_key")
    if sort_key.type != "S":
        raise ContractError(
            f"{place}.sort_key.type: the sort key contains the domain's key, a text: make it S"
        )
    return Table(
        name=name,
        partition_key=_key(table["partition_key"], f"{place}.partition_key"),
        sort_key=sort_key,
        max_item_bytes=size,
        ttl_attribute=ttl,
        rest_keys=tuple(_key(key, f"{place}.rest_keys") for key in table["rest_keys"]),
    )


def _key(value: object, place: str) -> KeyAttribute:
    key = _object(value, place, {"name", "type"})
    if key["type"] not in get_args(KeyType):
        raise ContractError(f"{place}.type: {key['type']!r} is not one of N, S")
    return KeyAttribute(name=_text(key["name"], f"{place}.name"), type=cast(KeyType, key["type"]))


def _domain(key: str, value: object, tables: Mapping[str, Table]) -> Domain:
    place = f"domains.{key}"
    if not re.fullmatch(r"[a-z][a-z0-9_]*#[a-z][a-z0-9_]*", key):
        raise ContractError(
            f"{place}: a domain key is <product>#<domain> in lower case, like learning#progress"
        )
    given = _mapping(value, place)
    declared_retired = given.pop("retired", {})
    domain = _object(
        given,
        place,
        {"name", "entity", "relation", "sink", "owner", "description", "freshness", "attributes"},
    )
    table = _entity_table(domain["entity"], place, tables)
    name = _text(domain["name"], f"{place}.name")
    if not _is_name(name):
        raise ContractError(f"{place}.name: {name!r} is not a Python identifier without a leading underscore")
    if name in PROFILE_NAMES or name in {key.name for key in table.columns}:
        raise ContractError(f"{place}.name: {name!r} is an attribute of every profile: choose another name")
    attributes = _attributes(domain["attributes"], f"{place}.attributes", table)
    retired = _attributes(declared_retired, f"{place}.retired", table)
    if both := sorted(attributes.keys() & retired.keys()):
        raise ContractError(
            f"{place}.retired: {both[0]} is also declared as an attribute: declare it in one of them"
        )
    last = attributes.get(LAST_EVENT_AT)
    if last is None or last.type != "integer" or last.nullable:
        raise ContractError(
            f"{place}.attributes: {LAST_EVENT_AT} (integer, not nullable, epoch milliseconds) is needed"
        )
    return Domain(
        key=key,
        name=name,
        entity=domain["entity"],
        relation=_text(domain["relation"], f"{place}.relation"),
        sink=_text(domain["sink"], f"{place}.sink"),
        owner=_text(domain["owner"], f"{place}.owner"),
        description=_text(domain["description"], f"{place}.description", empty=True),
        freshness=_freshness(domain["freshness"], f"{place}.freshness"),
        attributes=MappingProxyType(attributes),
        retired=MappingProxyType(retired),
    )


def _attributes(value: object, place: str, table: Table) -> dict[str, Attribute]:
    attributes: dict[str, Attribute] = {}
    for attribute, declared in _mapping(value, place).items():
        where = f"{place}.{attribute}"
        parts = _object(
            {NULL_ELEMENTS: False, **_mapping(declared, where)},
            where,
            {"type", "nullable", "description", NULL_ELEMENTS},
        )
        if parts["type"] not in get_args(AttributeType):
            raise ContractError(
                f"{where}.type: {parts['type']!r} is not one of {', '.join(get_args(AttributeType))}"
            )
        if not isinstance(parts["nullable"], bool):
            raise ContractError(f"{where}.nullable: {parts['nullable']!r} is not true or false")
        if not isinstance(parts[NULL_ELEMENTS], bool) or (
            parts[NULL_ELEMENTS] and not parts["type"].startswith("list")
        ):
            raise ContractError(
                f"{where}.{NULL_ELEMENTS}: {parts[NULL_ELEMENTS]!r} is not true or false, or true of something other "
                f"than a list ({parts['type']})"
            )
        if attribute in {key.name for key in (*table.columns, table.sort_key)}:
            raise ContractError(f"{where}: a key of the table cannot also be an attribute")
        if not _is_name(attribute):
            raise ContractError(
                f"{where}: an attribute's name must be a Python identifier without a leading underscore"
            )
        attributes[attribute] = Attribute(
            type=cast(AttributeType, parts["type"]),
            nullable=parts["nullable"],
            description=_text(parts["description"], f"{where}.description", empty=True),
            null_elements=parts[NULL_ELEMENTS],
        )
    return attributes


def _is_name(text: str) -> bool:
    """Return whether a typed class can have a field of this name."""
    return text.isidentifier() and not keyword.iskeyword(text) and not text.startswith("_")


def _thresholds(value: object, place: str) -> Mapping[str, Freshness]:
    return MappingProxyType(
        {name: _freshness(declared, f"{place}.{name}") for name, declared in _mapping(value, place).items()}
    )


def _freshness(value: object, place: str) -> Freshness:
    declared = _object(value, place, {"warn_seconds", "error_seconds"})
    for name, seconds in declared.items():
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or seconds <= 0:
            raise ContractError(f"{place}.{name}: {seconds!r} is not a positive number of seconds")
    if declared["warn_seconds"] > declared["error_seconds"]:
        raise ContractError(f"{place}: warn_seconds must not be above error_seconds")
    return Freshness(declared["warn_seconds"], declared["error_seconds"])


def _freshness_dict(freshness: Freshness) -> dict[str, float]:
    return {"warn_seconds": freshness.warn_seconds, "error_seconds": freshness.error_seconds}


def _mapping(value: object, place: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ContractError(f"{place}: an object is needed, not {type(value).__name__}")
    return dict(value)


def _object(value: object, place: str, names: set[str]) -> dict[str, Any]:
    found = _mapping(value, place)
    missing = sorted(names - found.keys())
    if missing:
        raise ContractError(f"{place}: {', '.join(missing)} is missing")
    unknown = sorted(found.keys() - names)
    if unknown:
        raise ContractError(f"{place}: {', '.join(unknown)} is not known; it has {', '.join(sorted(names))}")
    return found


def _text(value: object, place: str, *, empty: bool = False) -> str:
    if not isinstance(value, str) or not (value.strip() or empty):
        raise ContractError(f"{place}: a text is needed, not {value!r}")
    return value


def _integer(value: object, place: str, *, minimum: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ContractError(f"{place}: a whole number of at least {minimum} is needed, not {value!r}")
    return value
