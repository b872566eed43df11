"""The classes of profiles and domains, created from the contract: `profile.progress.lessons_7d` works.

`prefs generate client` writes the same classes as source, for services that want editor support and type
checks. An instance of a domain's class without arguments is the cold-start profile: the values for an id
without data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, make_dataclass
from decimal import Decimal
from functools import cache
from types import MappingProxyType
from typing import Any

from dagster_prefs.declarations.contract import LAST_EVENT_AT, Attribute, AttributeType, Domain, cold_start

# The Python type of each contract type, and its spelling in source.
PYTHON_TYPES: Mapping[AttributeType, tuple[Any, str]] = MappingProxyType(
    {
        "integer": (int, "int"),
        "decimal": (Decimal, "Decimal"),
        "float": (float, "float"),
        "string": (str, "str"),
        "list<string>": (list[str], "list[str]"),
        "list<decimal>": (list[Decimal], "list[Decimal]"),
        "list<integer>": (list[int], "list[int]"),
    }
)


_WITH_NULL_ELEMENTS: Mapping[AttributeType, tuple[Any, str]] = MappingProxyType(
    {
        "list<string>": (list[str | None], "list[str | None]"),
        "list<decimal>": (list[Decimal | None], "list[Decimal | None]"),
        "list<integer>": (list[int | None], "list[int | None]"),
    }
)


def python_type(attribute: Attribute) -> tuple[Any, str]:
    """Return the Python type of an attribute's value other than None, and its spelling in source."""
    return (_WITH_NULL_ELEMENTS if attribute.null_elements else PYTHON_TYPES)[attribute.type]


def may_be_none(name: str, attribute: Attribute) -> bool:
    """Return whether a profile may hold None for the attribute; the newest event time is None at cold
    start."""
    return attribute.nullable or name == LAST_EVENT_AT


def class_name(name: str) -> str:
    """Return the class name of a domain or an entity: `progress` becomes ProgressProfile."""
    return "".join(part[:1].upper() + part[1:] for part in name.split("_")) + "Profile"


@dataclass(frozen=True, slots=True)
class DomainShape:
    """The parameters of a domain's class; equal shapes share one class."""

    key: str
    name: str
    description: str
    attributes: tuple[tuple[str, Attribute], ...]


def domain_shape(domain: Domain) -> DomainShape:
    """Return the shape of a domain's class."""
    return DomainShape(domain.key, domain.name, domain.description, tuple(domain.attributes.items()))


def domain_class(domain: Domain) -> type[Any]:
    """Return the frozen class of a domain's attributes, in the contract's order."""
    return shaped_class(domain_shape(domain))


@cache
def shaped_class(shape: DomainShape) -> type[Any]:
    """Return the frozen class of a shape. Its instances can be pickled, although it is in no module."""
    declared: list[tuple[str, Any, Any]] = []
    for attribute_name, attribute in shape.attributes:
        python, _ = python_type(attribute)
        if may_be_none(attribute_name, attribute):
            declared.append((attribute_name, python | None, field(default=None)))
        elif attribute.is_list:
            declared.append((attribute_name, python, field(default_factory=list)))
        else:
            declared.append((attribute_name, python, field(default=cold_start(attribute_name, attribute))))

    def reduced(self: Any) -> tuple[Any, ...]:
        return _unpickled, (shape, tuple(getattr(self, name) for name, _ in shape.attributes))

    made: type[Any] = make_dataclass(
        class_name(shape.name), declared, frozen=True, slots=True, namespace={"__reduce__": reduced}
    )
    made.__doc__ = f"{shape.key}: {shape.description}"
    return made


def _unpickled(shape: DomainShape, values: tuple[Any, ...]) -> Any:
    return shaped_class(shape)(*values)


def same_attributes(made: type[Any], domain: Domain) -> bool:
    """Return whether a class has the domain's attributes, in their order."""
    return [entry.name for entry in fields(made)] == list(domain.attributes)
