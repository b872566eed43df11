"""The OpenAPI document of the feature server, built from the registry and the types of its responses.

The version is OpenAPI 3.0, which every client generator supports; some do not support 3.1. Each response type
is a component with its own name, so that generators can name its class.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Sequence
from dataclasses import fields, is_dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from dagster_prefs.declarations.contract import Attribute, Domain
from dagster_prefs.declarations.registry import Entity, Key
from dagster_prefs.ids import MAX_KEY_BYTES
from dagster_prefs.serving.domains import class_name, may_be_none
from dagster_prefs.serving.preferences import (
    DEFAULT_PROFILE_LIMIT,
    MAX_LIMIT,
    MAX_PROFILE_LIMIT,
    PROFILE_LISTS,
    RankedItem,
    ShopUserProfile,
)
from dagster_prefs.serving.profiles import MAX_IDS, Fallback, State
from dagster_prefs.serving.served_log import MAX_VARIANT_CHARACTERS
from dagster_prefs.serving.wire import DEFAULT_LIMIT, ERRORS, MAX_BUDGET_MS, NUMBER_ID, ids_name

Schema = dict[str, Any]

INTEGER: Schema = {"type": "integer", "format": "int64"}
DECIMAL: Schema = {"type": "string", "pattern": r"^-?[0-9]+(\.[0-9]+)?$", "description": "An exact decimal."}
TIME: Schema = {"type": "string", "format": "date-time"}
PLAIN: dict[Any, Schema] = {
    str: {"type": "string"},
    bool: {"type": "boolean"},
    int: INTEGER,
    float: {"type": "number"},
    Decimal: DECIMAL,
    datetime: TIME,
}
ATTRIBUTES: dict[str, Schema] = {
    "integer": INTEGER,
    "decimal": DECIMAL,
    "float": {"type": "number"},
    "string": {"type": "string"},
    "list<string>": {"type": "array", "items": {"type": "string"}},
    "list<decimal>": {"type": "array", "items": DECIMAL},
    "list<integer>": {"type": "array", "items": INTEGER},
}
# Health and metrics requests take no slot and have no body.
WITHOUT_SLOT = (403,)


Served = tuple[Entity, Sequence[Domain]]


def profiles_path(entity: str) -> str:
    """Return the path of an entity's profiles; that of the first entity has no name."""
    return f"/v1/{entity}/profiles" if entity else "/v1/profiles"


def openapi(served: Sequence[Served], *, version: int, preferences: bool) -> Schema:
    """Return the OpenAPI 3.0 document for a server of these entities' domains, in the order of serving."""
    paths: Schema = {
        "/healthz": {
            "get": _operation(
                "getHealth", "Whether the process is alive", _ref("Health"), errors=WITHOUT_SLOT
            )
        },
        "/readyz": {
            "get": _operation(
                "getReadiness",
                "Whether requests can be answered, part by part",
                _ref("Readiness"),
                errors=WITHOUT_SLOT,
            )
        },
        "/metrics": {"get": _operation("getMetrics", "Counts for Prometheus", None, errors=WITHOUT_SLOT)},
    }
    # A 503 has the same body as a 200.
    paths["/readyz"]["get"]["responses"]["503"] = _answer(ERRORS[503], _ref("Readiness"))
    schemas = _common_schemas()
    for position, (entity, domains) in enumerate(served):
        # The schemas of the first entity have no prefix, like its path.
        name = class_name(entity.name).removesuffix("Profile") if position else ""
        if name == "User":
            # The prefix User is taken by the shop's users.
            name = "UserEntity"
        paths |= _profile_paths(entity, domains, name, profiles_path(entity.name if position else ""))
        schemas |= _profile_schemas(entity, domains, name)
    if preferences:
        paths |= _user_paths()
        schemas |= _user_schemas()
    return {
        "openapi": "3.0.3",
        "info": {"title": "Preference and engagement profiles", "version": str(version)},
        "paths": paths,
        "components": {"schemas": schemas},
    }


def _profile_paths(entity: Entity, domains: Sequence[Domain], name: str, path: str) -> Schema:
    options = _read_options(domains)
    query = [_query(name, schema) for name, schema in options.items() if name != "domains"]
    query.append(
        _query("domains", {"type": "string", "description": "Names separated by commas; all by default."})
    )
    return {
        "/".join([path, *(f"{{{name}}}" for name in entity.key_names)]): {
            "get": _operation(
                f"get{name}Profile",
                f"The profile of one {entity.name}",
                _ref(f"{name}Profile"),
                [*(_path(key.name, _id(key)) for key in entity.keys), *query],
            )
        },
        path: {
            "post": _operation(
                f"get{name}Profiles",
                f"Profiles of many of entity {entity.name}, in the order asked",
                _ref(f"{name}Profiles"),
                body=_ref(f"{name}ProfilesRequest"),
            )
        },
    }


def _user_paths() -> Schema:
    user = _path("user_id", {"type": "string", "minLength": 1})
    budget = _query("budget_ms", _BUDGET)
    entries = _query(
        "limit",
        {
            **_limit(MAX_PROFILE_LIMIT, DEFAULT_PROFILE_LIMIT),
            "description": "Entries of each list; `next` has the cursor of the following ones.",
        },
    )
    cursor = _query(
        "cursor",
        {"type": "string", "description": "`next` of the profile or the page before; else the start."},
    )
    ranking = [
        user,
        _query("limit", _limit(MAX_LIMIT, DEFAULT_LIMIT)),
        _query("session", {"type": "boolean", "default": True}),
        _query("explain", {"type": "boolean", "default": False}),
        budget,
    ]
    return {
        "/v1/users/{user_id}/profile": {
            "get": _operation(
                "getUserProfile",
                "A user's preference profile",
                _ref("ShopUserProfile"),
                [user, entries, budget],
            )
        },
        "/v1/users/{user_id}/ranking": {
            "get": _operation(
                "getUserRanking", "The best items in stock for a user, best first", _ref("Ranking"), ranking
            )
        },
        **{
            f"/v1/users/{{user_id}}/{name}": {
                "get": _operation(
                    f"getUser{name.title()}",
                    f"A page of the list {name} of a user's profile",
                    _ref(f"{name.title()}Page"),
                    [user, cursor, entries, budget],
                )
            }
            for name in PROFILE_LISTS
        },
    }


def schema_of(kind: Any, components: Schema) -> Schema:
    """Return the JSON schema of a response type, adding its dataclasses to the components.

    Supports plain values, optional ones, tuples, literals and dataclasses.
    """
    if kind in PLAIN:
        return PLAIN[kind]
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        (inner,) = (argument for argument in arguments if argument is not type(None))
        if is_dataclass(inner) and isinstance(inner, type):
            # A reference cannot be nullable in OpenAPI 3.0, so a nullable type is written inline.
            return _nullable(_properties(inner, components))
        return _nullable(schema_of(inner, components))
    if origin is tuple:
        return _array(schema_of(arguments[0], components))
    if origin is Literal and all(isinstance(value, str) for value in arguments):
        return _enum(arguments)
    if is_dataclass(kind) and isinstance(kind, type):
        components[kind.__name__] = _properties(kind, components)
        return _ref(kind.__name__)
    raise TypeError(f"{kind!r} has no schema")


def _properties(kind: type, components: Schema) -> Schema:
    hints = get_type_hints(kind)
    return _object({field.name: schema_of(hints[field.name], components) for field in fields(kind)})


def _common_schemas() -> Schema:
    return {
        "Error": _object({"error": _ref("ErrorDetail")}),
        "ErrorDetail": _object({"code": PLAIN[str], "message": PLAIN[str]}),
        "Health": _object({"status": PLAIN[str]}),
        "Readiness": _object(
            {"ready": PLAIN[bool], "parts": {"type": "object", "additionalProperties": PLAIN[str]}}
        ),
    }


def _profile_schemas(entity: Entity, domains: Sequence[Domain], name: str) -> Schema:
    """Return the schemas of one entity's profiles; the names of domains are unique across the contract."""
    found: Schema = {}
    references = {}
    for domain in domains:
        schema = class_name(domain.name).removesuffix("Profile") + "Domain"
        found[schema] = _domain(domain)
        references[domain.name] = _ref(schema)
    found[f"{name}ProfileDomains"] = _object(references, required=[])
    found[f"{name}Profile"] = _object(
        {
            **{key.name: _id(key) for key in entity.keys},
            "partial": {"type": "boolean", "description": "Whether a domain did not arrive."},
            "domains": _ref(f"{name}ProfileDomains"),
        }
    )
    found[f"{name}Profiles"] = _object({"partial": PLAIN[bool], "profiles": _array(_ref(f"{name}Profile"))})
    # A number may come as text, for languages that cannot hold 64 bits.
    number = {"anyOf": [INTEGER, {"type": "string", "pattern": f"^{NUMBER_ID}$"}]}
    given = {key.name: number if key.type == "bigint" else _id(key) for key in entity.keys}
    one = _object(given) if len(given) > 1 else given[entity.key.name]
    ids = {**_array(one), "minItems": 1, "maxItems": MAX_IDS}
    listed = ids_name(entity.keys)
    found[f"{name}ProfilesRequest"] = _object({listed: ids, **_read_options(domains)}, required=[listed])
    return found


def _domain(domain: Domain) -> Schema:
    values = _object({name: _attribute(name, attribute) for name, attribute in domain.attributes.items()})
    return {
        **_object(
            {
                "attributes": _nullable(values),
                "state": _enum(get_args(State)),
                "freshness_seconds": _nullable(PLAIN[float]),
                "max_staleness_seconds": PLAIN[float],
                "fresh": _nullable(PLAIN[bool]),
                "error": _nullable(PLAIN[str]),
                "unknown": {
                    **_array(PLAIN[str]),
                    "description": "Attributes that the item lacks; they have their cold-start values.",
                },
            }
        ),
        "description": domain.description,
    }


def _id(key: Key) -> Schema:
    if key.type == "bigint":
        return INTEGER
    if key.type == "uuid":
        return {"type": "string", "format": "uuid"}
    return {"type": "string", "minLength": 1, "maxLength": MAX_KEY_BYTES}


def _user_schemas() -> Schema:
    found: Schema = {}
    schema_of(ShopUserProfile, found)
    user = found["ShopUserProfile"]["properties"]
    found["ShopUserProfile"] = _object({**user, "known": PLAIN[bool]})
    for name in PROFILE_LISTS:
        found[f"{name.title()}Page"] = _object(
            {"user_id": PLAIN[str], "entries": user[name], "next": _nullable(PLAIN[str])}
        )
    found["Ranking"] = _object(
        {
            "user_id": PLAIN[str],
            "items": _array(schema_of(RankedItem, found)),
            "session_active": PLAIN[bool],
            "session_seconds": _nullable(DECIMAL),
        }
    )
    return found


def _attribute(name: str, attribute: Attribute) -> Schema:
    schema = {**ATTRIBUTES[attribute.type], "description": attribute.description}
    if attribute.null_elements:
        schema["items"] = _nullable(schema["items"])
    return _nullable(schema) if may_be_none(name, attribute) else schema


def _read_options(domains: Sequence[Domain]) -> Schema:
    names = [domain.name for domain in domains]
    return {
        "domains": {"type": "array", "minItems": 1, "items": _enum(names), "description": "All by default."},
        "budget_ms": _BUDGET,
        "fallback": {**_enum(get_args(Fallback)), "default": "partial"},
        "consistent": {"type": "boolean", "default": False},
        "variant": {
            **PLAIN[str],
            "maxLength": MAX_VARIANT_CHARACTERS,
            "description": "Variant of an experiment, for the served log.",
        },
        "max_staleness_seconds": _ABOVE_ZERO,
    }


def _operation(
    name: str,
    summary: str,
    answer: Schema | None,
    parameters: Iterable[Schema] = (),
    body: Schema | None = None,
    errors: Iterable[int] = tuple(ERRORS),
) -> Schema:
    made: Schema = {
        "operationId": name,
        "summary": summary,
        "parameters": list(parameters),
        "responses": {
            "200": _answer(summary, answer),
            **{str(status): _answer(ERRORS[status], _ref("Error")) for status in errors},
        },
    }
    if body is not None:
        made["requestBody"] = {"required": True, "content": {"application/json": {"schema": body}}}
    return made


def _answer(description: str, schema: Schema | None) -> Schema:
    content = (
        {"text/plain": {"schema": PLAIN[str]}} if schema is None else {"application/json": {"schema": schema}}
    )
    return {"description": description, "content": content}


def _object(properties: Schema, required: list[str] | None = None) -> Schema:
    needed = list(properties) if required is None else required
    return {
        "type": "object",
        "properties": properties,
        # The specification forbids an empty list.
        **({"required": needed} if needed else {}),
        "additionalProperties": False,
    }


def _array(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _enum(values: Iterable[str]) -> Schema:
    return {"type": "string", "enum": list(values)}


def _limit(most: int, default: int) -> Schema:
    return {"type": "integer", "minimum": 1, "maximum": most, "default": default}


def _nullable(schema: Schema) -> Schema:
    return {**schema, "nullable": True}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _path(name: str, schema: Schema) -> Schema:
    return {"name": name, "in": "path", "required": True, "schema": schema}


def _query(name: str, schema: Schema) -> Schema:
    return {"name": name, "in": "query", "schema": schema}


_ABOVE_ZERO: Schema = {"type": "number", "minimum": 0, "exclusiveMinimum": True}
_BUDGET: Schema = {
    **_ABOVE_ZERO,
    "maximum": MAX_BUDGET_MS,
    "description": "Milliseconds for the answer.",
}
