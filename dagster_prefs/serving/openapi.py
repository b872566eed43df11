"""What the feature server answers, as an OpenAPI document made from the contract and the answers' types."""

from __future__ import annotations

import types
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from dagster_prefs.online.contract import Attribute, Contract
from dagster_prefs.serving.preferences import MAX_LIMIT, RankedItem, UserProfile
from dagster_prefs.serving.profiles import MAX_VIEWERS
from dagster_prefs.serving.wire import MAX_BUDGET_MS

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
ERRORS = {
    "400": "The request asks for something impossible.",
    "500": "Only an operator can help; the code says what with.",
    "503": "Not now: try again after Retry-After seconds.",
    "504": "There was no answer within the budget.",
}


def openapi(contract: Contract, *, profiles: bool, preferences: bool) -> Schema:
    """The OpenAPI 3.1 document of a server with these halves."""
    paths: Schema = {
        "/healthz": {"get": _operation("Whether the process is alive", Schema(type="object"), errors=())},
        "/readyz": {
            "get": _operation("Whether requests can be answered, part by part", _READY, errors=("503",))
        },
        "/metrics": {"get": _operation("Counts for Prometheus", None, errors=())},
    }
    if profiles:
        options = _read_options(contract)
        query = [_query(name, schema) for name, schema in options.items() if name != "domains"]
        query.append(
            _query("domains", {"type": "string", "description": "Names separated by commas; all by default."})
        )
        body = _object({"viewer_ids": _VIEWER_IDS, **options}, required=["viewer_ids"])
        paths |= {
            "/v1/profiles/{viewer_id}": {
                "get": _operation(
                    "One viewer's profile", _ref("Profile"), [_path("viewer_id", INTEGER), *query]
                )
            },
            "/v1/profiles": {
                "post": _operation(
                    "Profiles of many viewers, in the order asked",
                    _object({"partial": PLAIN[bool], "profiles": _array(_ref("Profile"))}),
                    body=body,
                )
            },
        }
    if preferences:
        user, budget = _path("user_id", PLAIN[str]), _query("budget_ms", _BUDGET)
        paths |= {
            "/v1/users/{user_id}/profile": {
                "get": _operation("Everything known of a user", _ref("UserProfile"), [user, budget])
            },
            "/v1/users/{user_id}/ranking": {
                "get": _operation(
                    "The best items in stock for a user, best first",
                    _ref("Ranking"),
                    [
                        user,
                        _query(
                            "limit", {"type": "integer", "minimum": 1, "maximum": MAX_LIMIT, "default": 50}
                        ),
                        _query("session", {"type": "boolean", "default": True}),
                        _query("explain", {"type": "boolean", "default": False}),
                        budget,
                    ],
                )
            },
        }
    return {
        "openapi": "3.1.0",
        "info": {"title": "Preference and engagement profiles", "version": str(contract.version)},
        "paths": paths,
        "components": {"schemas": _schemas(contract)},
    }


def schema_of(kind: Any) -> Schema:
    """The JSON schema of an answer's type: plain values, optional ones, tuples, literals and dataclasses."""
    if kind in PLAIN:
        return PLAIN[kind]
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return _nullable(schema_of(inner))
    if origin is tuple:
        return _array(schema_of(arguments[0]))
    if origin is Literal:
        return {"enum": list(arguments)}
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        return _object({field.name: schema_of(hints[field.name]) for field in fields(kind)})
    raise TypeError(f"{kind!r} has no schema")


def _schemas(contract: Contract) -> Schema:
    domains = {}
    for domain in contract.domains.values():
        values = _object({name: _attribute(found) for name, found in domain.attributes.items()})
        # A viewer of whom nothing is known has no newest event.
        values["properties"]["last_event_at"] = _nullable(values["properties"]["last_event_at"])
        domains[domain.name] = _object(
            {
                "attributes": {"anyOf": [values, {"type": "null"}]},
                "state": {"enum": ["found", "cold_start", "failed"]},
                "freshness_seconds": _nullable(PLAIN[float]),
                "max_staleness_seconds": PLAIN[float],
                "fresh": _nullable(PLAIN[bool]),
                "error": _nullable(PLAIN[str]),
            }
        )
        domains[domain.name]["description"] = domain.description
    user = schema_of(UserProfile)
    return {
        "Error": _object({"error": _object({"code": PLAIN[str], "message": PLAIN[str]})}),
        "Profile": _object(
            {
                "viewer_id": INTEGER,
                "partial": {"type": "boolean", "description": "Whether a domain did not arrive."},
                "domains": {"type": "object", "properties": domains, "additionalProperties": False},
            }
        ),
        "UserProfile": _object({**user["properties"], "known": PLAIN[bool]}),
        "Ranking": _object(
            {
                "user_id": PLAIN[str],
                "session_active": PLAIN[bool],
                "session_seconds": _nullable(DECIMAL),
                "items": _array(schema_of(RankedItem)),
            }
        ),
    }


def _attribute(attribute: Attribute) -> Schema:
    schema = {**ATTRIBUTES[attribute.type], "description": attribute.description}
    return _nullable(schema) if attribute.nullable else schema


def _read_options(contract: Contract) -> Schema:
    names = [domain.name for domain in contract.domains.values()]
    return {
        "domains": {"type": "array", "items": {"enum": names}, "description": "All by default."},
        "budget_ms": _BUDGET,
        "fallback": {"enum": ["partial", "cold_start"], "default": "partial"},
        "consistent": {"type": "boolean", "default": False},
        "max_staleness_seconds": {"type": "number", "exclusiveMinimum": 0},
    }


def _operation(
    summary: str,
    answer: Schema | None,
    parameters: Iterable[Schema] = (),
    body: Schema | None = None,
    errors: Iterable[str] = tuple(ERRORS),
) -> Schema:
    content = {"text/plain": {}} if answer is None else {"application/json": {"schema": answer}}
    made: Schema = {
        "summary": summary,
        "parameters": list(parameters),
        "responses": {"200": {"description": summary, "content": content}},
    }
    for status in errors:
        schema = _READY if answer is _READY else _ref("Error")
        made["responses"][status] = {
            "description": ERRORS[status],
            "content": {"application/json": {"schema": schema}},
        }
    if body is not None:
        made["requestBody"] = {"required": True, "content": {"application/json": {"schema": body}}}
    return made


def _object(properties: Schema, required: list[str] | None = None) -> Schema:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties) if required is None else required,
        "additionalProperties": False,
    }


def _array(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _nullable(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _path(name: str, schema: Schema) -> Schema:
    return {"name": name, "in": "path", "required": True, "schema": schema}


def _query(name: str, schema: Schema) -> Schema:
    return {"name": name, "in": "query", "schema": schema}


_BUDGET: Schema = {
    "type": "number",
    "exclusiveMinimum": 0,
    "maximum": MAX_BUDGET_MS,
    "description": "Milliseconds for the answer.",
}
_VIEWER_IDS: Schema = {
    "type": "array",
    "minItems": 1,
    "maxItems": MAX_VIEWERS,
    "items": {"anyOf": [INTEGER, {"type": "string", "pattern": "^-?[0-9]{1,19}$"}]},
}
_READY: Schema = _object(
    {"ready": PLAIN[bool], "parts": {"type": "object", "additionalProperties": PLAIN[str]}}
)
