"""What the feature server answers, as an OpenAPI document made from the contract and the answers' types.

It is OpenAPI 3.0, which every generator of clients takes; some still refuse 3.1. Each type of an answer is a
component of its own name, so that a generator has a name for its class.
"""

from __future__ import annotations

import types
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from dagster_prefs.online.contract import Attribute, Contract
from dagster_prefs.serving.preferences import (
    DEFAULT_PROFILE_LIMIT,
    MAX_LIMIT,
    MAX_PROFILE_LIMIT,
    PROFILE_LISTS,
    RankedItem,
    UserProfile,
)
from dagster_prefs.serving.profiles import MAX_VIEWERS, Fallback, State
from dagster_prefs.serving.wire import DEFAULT_LIMIT, ERRORS, MAX_BUDGET_MS, VIEWER_ID

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
}
# Health and metrics are answered without a slot and without a body.
WITHOUT_SLOT = (403,)


def openapi(contract: Contract, *, profiles: bool, preferences: bool) -> Schema:
    """The OpenAPI 3.0 document of a server with these halves."""
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
    # It says the same where it says no.
    paths["/readyz"]["get"]["responses"]["503"] = _answer(ERRORS[503], _ref("Readiness"))
    if profiles:
        paths |= _profile_paths(contract)
    if preferences:
        paths |= _user_paths()
    return {
        "openapi": "3.0.3",
        "info": {"title": "Preference and engagement profiles", "version": str(contract.version)},
        "paths": paths,
        "components": {"schemas": _schemas(contract)},
    }


def _profile_paths(contract: Contract) -> Schema:
    options = _read_options(contract)
    query = [_query(name, schema) for name, schema in options.items() if name != "domains"]
    query.append(
        _query("domains", {"type": "string", "description": "Names separated by commas; all by default."})
    )
    return {
        "/v1/profiles/{viewer_id}": {
            "get": _operation(
                "getProfile", "One viewer's profile", _ref("Profile"), [_path("viewer_id", INTEGER), *query]
            )
        },
        "/v1/profiles": {
            "post": _operation(
                "getProfiles",
                "Profiles of many viewers, in the order asked",
                _ref("Profiles"),
                body=_ref("ProfilesRequest"),
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
            "description": "Entries of each list; `next` says where a longer one goes on.",
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
                "getUserProfile", "What is known of a user", _ref("UserProfile"), [user, entries, budget]
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
    """The JSON schema of an answer's type: plain values, optional ones, tuples, literals and dataclasses, which
    are added to the components.
    """
    if kind in PLAIN:
        return PLAIN[kind]
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        (inner,) = (argument for argument in arguments if argument is not type(None))
        if is_dataclass(inner) and isinstance(inner, type):
            # A reference cannot be nullable in 3.0, so the type is written out where it may be absent.
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


def _schemas(contract: Contract) -> Schema:
    found: Schema = {
        "Error": _object({"error": _ref("ErrorDetail")}),
        "ErrorDetail": _object({"code": PLAIN[str], "message": PLAIN[str]}),
        "Health": _object({"status": PLAIN[str]}),
        "Readiness": _object(
            {"ready": PLAIN[bool], "parts": {"type": "object", "additionalProperties": PLAIN[str]}}
        ),
    }
    domains = {}
    for domain in contract.domains.values():
        name = domain.name.title().replace("_", "")
        values = _object({key: _attribute(attribute) for key, attribute in domain.attributes.items()})
        # A viewer of whom nothing is known has no newest event.
        values["properties"]["last_event_at"] = _nullable(values["properties"]["last_event_at"])
        found[f"{name}Domain"] = {
            **_object(
                {
                    "attributes": _nullable(values),
                    "state": _enum(get_args(State)),
                    "freshness_seconds": _nullable(PLAIN[float]),
                    "max_staleness_seconds": PLAIN[float],
                    "fresh": _nullable(PLAIN[bool]),
                    "error": _nullable(PLAIN[str]),
                }
            ),
            "description": domain.description,
        }
        domains[domain.name] = _ref(f"{name}Domain")
    found["ProfileDomains"] = _object(domains, required=[])
    found["Profile"] = _object(
        {
            "viewer_id": INTEGER,
            "partial": {"type": "boolean", "description": "Whether a domain did not arrive."},
            "domains": _ref("ProfileDomains"),
        }
    )
    found["Profiles"] = _object({"partial": PLAIN[bool], "profiles": _array(_ref("Profile"))})
    found["ProfilesRequest"] = _object(
        {"viewer_ids": _VIEWER_IDS, **_read_options(contract)}, required=["viewer_ids"]
    )
    schema_of(UserProfile, found)
    user = found["UserProfile"]["properties"]
    found["UserProfile"] = _object({**user, "known": PLAIN[bool]})
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


def _attribute(attribute: Attribute) -> Schema:
    schema = {**ATTRIBUTES[attribute.type], "description": attribute.description}
    return _nullable(schema) if attribute.nullable else schema


def _read_options(contract: Contract) -> Schema:
    names = [domain.name for domain in contract.domains.values()]
    return {
        "domains": {"type": "array", "minItems": 1, "items": _enum(names), "description": "All by default."},
        "budget_ms": _BUDGET,
        "fallback": {**_enum(get_args(Fallback)), "default": "partial"},
        "consistent": {"type": "boolean", "default": False},
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
        # An empty list is against the specification.
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
_VIEWER_IDS: Schema = {
    "type": "array",
    "minItems": 1,
    "maxItems": MAX_VIEWERS,
    "items": {"anyOf": [INTEGER, {"type": "string", "pattern": f"^{VIEWER_ID}$"}]},
}
