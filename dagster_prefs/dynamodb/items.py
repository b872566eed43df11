"""Convert contract items to and from DynamoDB's typed JSON without loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

from dagster_prefs.declarations.contract import Attribute, Contract, Domain, cold_start
from dagster_prefs.errors import PrefsError, excerpt
from dagster_prefs.ids import MAX_KEY_BYTES, MAX_SORT_KEY_BYTES, Id, id_label, id_parts

# DynamoDB keeps this many significant digits of a number, and magnitudes from 1E-130 to 9.99…E+125.
NUMBER_DIGITS = 38
NUMBER_MIN_EXPONENT = -130
NUMBER_MAX_EXPONENT = 125

NULL: Mapping[str, Any] = {"NULL": True}


class ItemError(PrefsError):
    """A row cannot become an item, or an item differs from the contract."""


class ItemEncoder:
    """Encodes the rows of one domain as items. NULL becomes `{"NULL": true}`, as RisingWave's sink writes it."""

    def __init__(self, contract: Contract, domain: Domain) -> None:
        table = contract.table_of(domain)
        self.domain = domain
        self.max_bytes = table.max_item_bytes
        self._table = table
        self._attributes = [
            (name, attribute.nullable, _encoder(attribute), len(name.encode()))
            for name, attribute in domain.attributes.items()
        ]
        self._key_bytes = sum(len(name.encode()) for name in (table.partition_key.name, table.sort_key.name))

    def key(self, id_: Id) -> dict[str, Any]:
        """Return the item's key in DynamoDB's typed JSON."""
        return self._table.typed_key(self.domain.key, id_)

    def key_text(self, id_: Id) -> str:
        """Return the whole key as one text, as `online_published` stores it."""
        return self._table.key_text(id_)

    def id_of(self, item: Mapping[str, Any]) -> Id:
        """Return the id of an item or key."""
        return self._table.split_key(item)[0]

    def named(self, id_: Id | None) -> str:
        """Return entity and id, for a message."""
        return f"{self.domain.entity} {id_label(id_)}"

    def encode(self, id_: Id, values: Sequence[Any]) -> dict[str, Any]:
        """Return the item of one id; `values` are in the order of the contract's attributes.

        Raises ItemError naming id and attribute: a key that DynamoDB does not accept, NULL where the contract
        does not allow it, a number that DynamoDB cannot store exactly, or an item above the contract's
        max_item_bytes.
        """
        first = id_parts(id_)[0]
        id_bytes = _number_bytes(first) if isinstance(first, int) else len(first.encode())
        if isinstance(first, str) and not 0 < id_bytes <= MAX_KEY_BYTES:
            raise ItemError(
                f"{self.named(excerpt(first))}: its key has {id_bytes} bytes, and DynamoDB accepts 1 to {MAX_KEY_BYTES}"
            )
        sort_bytes = len(self._table.sort_text(self.domain.key, id_).encode())
        if sort_bytes > MAX_SORT_KEY_BYTES:
            raise ItemError(
                f"{self.named(excerpt(first))}: its sort key has {sort_bytes} bytes, and DynamoDB accepts "
                f"{MAX_SORT_KEY_BYTES}"
            )
        item = self.key(id_)
        size = self._key_bytes + id_bytes + sort_bytes
        for (name, nullable, encode, name_bytes), value in zip(self._attributes, values, strict=True):
            if value is None:
                if not nullable:
                    raise ItemError(f"{self.named(id_)}: {name} is NULL and the contract does not allow it")
                item[name] = NULL
                size += name_bytes + 1
                continue
            try:
                item[name], value_bytes = encode(value)
            except ValueError as error:
                raise ItemError(f"{self.named(id_)}: {name} {error}") from None
            size += name_bytes + value_bytes
        if size > self.max_bytes:
            raise ItemError(
                f"{self.named(id_)}: the item of domain {self.domain.key} has {size} bytes and the contract "
                f"allows {self.max_bytes}: shorten its lists or texts"
            )
        return item


class ItemDecoder:
    """Decodes the items of one domain to Python values: int, Decimal, float, str, lists of them, None."""

    def __init__(self, domain: Domain) -> None:
        self.domain = domain
        self._attributes = [
            (name, attribute, _decoder(attribute)) for name, attribute in domain.attributes.items()
        ]

    def decode(self, item: Mapping[str, Mapping[str, Any]]) -> tuple[list[Any], tuple[str, ...]]:
        """Return all attributes in the contract's order, and the names of those that the item lacks.

        NULL is written as NULL, so an attribute that the item lacks was unknown to the version that wrote it,
        and gets its cold-start value. Attributes that are not in the contract are ignored.

        Raises ItemError naming domain and attribute for a NULL that the contract does not allow, or a value
        of another type.
        """
        values: list[Any] = []
        unknown: tuple[str, ...] = ()
        for name, attribute, decode in self._attributes:
            typed = item.get(name)
            if typed is None:
                values.append(cold_start(name, attribute))
                unknown = (*unknown, name)
                continue
            try:
                values.append(decode(typed))
            except (KeyError, TypeError, ValueError, InvalidOperation):
                if typed.get("NULL") is not True:
                    raise self._error(name, attribute, f"it is {_shown(typed)}") from None
                if not attribute.nullable:
                    raise self._error(name, attribute, "it is NULL") from None
                values.append(None)
        return values, unknown

    def _error(self, name: str, attribute: Attribute, problem: str) -> ItemError:
        return ItemError(
            f"domain {self.domain.name}: {name} should be {attribute.type} in the table, but {problem}: "
            "check what writes the table against the contract's version"
        )


def plain(typed: Mapping[str, Any]) -> Any:
    """Return the Python value of a typed attribute of any type; equal numbers compare equal."""
    ((kind, value),) = typed.items()
    if kind == "N":
        return Decimal(value)
    if kind == "S":
        return value
    if kind == "NULL":
        return None
    if kind == "L":
        return [plain(element) for element in value]
    # Another type than any of the contract's is never equal to a row's value.
    return (kind, str(value))


def item_bytes(item: Mapping[str, Mapping[str, Any]]) -> int:
    """Return an upper bound of the request size of an item or key, in bytes."""
    return sum(len(name.encode()) + _typed_bytes(typed) for name, typed in item.items())


def _typed_bytes(typed: Mapping[str, Any]) -> int:
    ((kind, value),) = typed.items()
    if kind == "L":
        return 3 + sum(1 + _typed_bytes(element) for element in value)
    return len(value.encode()) if kind in ("N", "S") else 1


def _shown(typed: Mapping[str, Any]) -> str:
    return ", ".join(f"of DynamoDB type {kind}" for kind in typed) or "empty"


def _number_bytes(value: int | Decimal) -> int:
    digits = len(str(abs(value)).replace(".", "").strip("0"))
    return (digits + 1) // 2 + 1 + (value < 0)


# Each of these encodes values of one type, and returns them with their size in bytes. They take many values, because
# a call per element of a list would be most of the work.


def _encode_integers(values: Sequence[Any]) -> tuple[list[dict[str, Any]], int]:
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"must be a whole number, not {type(value).__name__}")
    return [{"N": str(value)} for value in values], sum(map(_number_bytes, values))


def _encode_decimals(values: Sequence[Any]) -> tuple[list[dict[str, Any]], int]:
    encoded, size = [], 0
    for value in values:
        if not isinstance(value, Decimal):
            raise ValueError(f"must be a decimal, not {type(value).__name__}")
        if not value.is_finite():
            raise ValueError(f"is {value}, which DynamoDB cannot store")
        digits = value.as_tuple().digits
        significant = len("".join(map(str, digits)).strip("0"))
        if significant > NUMBER_DIGITS:
            raise ValueError(
                f"has {significant} significant digits, and DynamoDB stores {NUMBER_DIGITS}: round it in the view"
            )
        if value and not NUMBER_MIN_EXPONENT <= value.adjusted() <= NUMBER_MAX_EXPONENT:
            raise ValueError(f"is {value}, outside DynamoDB's range of numbers")
        encoded.append({"N": format(value, "f")})
        size += (significant + 1) // 2 + 1 + (value < 0)
    return encoded, size


def _encode_floats(values: Sequence[Any]) -> tuple[list[dict[str, Any]], int]:
    for value in values:
        if not isinstance(value, float):
            raise ValueError(f"must be a float, not {type(value).__name__}")
    # The shortest text that reads back as the same float has at most 17 digits.
    return _encode_decimals([Decimal(repr(value)) for value in values])


def _encode_strings(values: Sequence[Any]) -> tuple[list[dict[str, Any]], int]:
    for value in values:
        if not isinstance(value, str):
            raise ValueError(f"must be a text, not {type(value).__name__}")
    return [{"S": value} for value in values], len("".join(values).encode())


_Encode = Callable[[Any], tuple[dict[str, Any], int]]
_Decode = Callable[[Mapping[str, Any]], Any]


def _encoder(attribute: Attribute) -> _Encode:
    encode = _ENCODERS[_element_type(attribute)]

    def encode_one(value: Any) -> tuple[dict[str, Any], int]:
        (typed,), size = encode([value])
        return typed, size

    def encode_list(value: Any) -> tuple[dict[str, Any], int]:
        if not isinstance(value, list):
            raise ValueError(f"must be a list, not {type(value).__name__}")
        if None in value and not attribute.null_elements:
            raise ValueError("contains NULL, and the contract has no null_elements for it")
        known, size = encode([element for element in value if element is not None])
        rest, nulls = iter(known), len(value) - len(known)
        elements = [NULL if element is None else next(rest) for element in value]
        return {"L": elements}, 3 + len(value) + nulls + size

    return encode_list if attribute.is_list else encode_one


def _element_type(attribute: Attribute) -> str:
    return attribute.type.removeprefix("list<").removesuffix(">")


_ENCODERS: Mapping[str, Callable[[Sequence[Any]], tuple[list[dict[str, Any]], int]]] = {
    "integer": _encode_integers,
    "decimal": _encode_decimals,
    "float": _encode_floats,
    "string": _encode_strings,
}


def _decode_integer(typed: Mapping[str, Any]) -> int:
    text = typed["N"]
    try:
        return int(text)
    except ValueError:
        # DynamoDB may write 1E+20 for a whole number.
        number = Decimal(text)
        if number != number.to_integral_value():
            raise
        return int(number)


def _decode_string(typed: Mapping[str, Any]) -> str:
    value = typed["S"]
    if not isinstance(value, str):
        raise TypeError(value)
    return value


def _decoder(attribute: Attribute) -> _Decode:
    if not attribute.is_list:
        return _DECODERS[attribute.type]
    decode = _DECODERS[_element_type(attribute)]
    if not attribute.null_elements:
        return lambda typed: [decode(element) for element in typed["L"]]
    return lambda typed: [None if element.get("NULL") is True else decode(element) for element in typed["L"]]


_DECODERS: Mapping[str, _Decode] = {
    "integer": _decode_integer,
    "decimal": lambda typed: Decimal(typed["N"]),
    "float": lambda typed: float(typed["N"]),
    "string": _decode_string,
}
