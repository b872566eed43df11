"""The rules for reading an id from any input: a message, a request, a command, a label.

A text is taken literally, without surrounding blanks: `1e3` is not 1000, and 007 is not 7. A number becomes
canonical: 12345.0 and 1.2345e4 are 12345, also if the id is a text. An input that could mean another id is
invalid.
"""

from __future__ import annotations

import math
import operator
import re
import uuid
from collections.abc import Sequence
from decimal import Decimal
from typing import TYPE_CHECKING

from dagster_prefs.errors import PrefsError, excerpt

if TYPE_CHECKING:
    from dagster_prefs.declarations.registry import Key

# The characters stripped from both ends of a text.
BLANKS = " \t\r\n"
INT64 = 1 << 63
# A number as an identifier must lie within 64 bits, signed or unsigned; it may have decimals.
LEAST_NUMBER, LARGEST_NUMBER = Decimal(-INT64), Decimal(2 * INT64 - 1)
# From this number on, one float stands for several integers.
EXACT_FLOAT = 2**53

# DynamoDB's limits for a partition key and for a sort key, in UTF-8.
MAX_KEY_BYTES = 2048
MAX_SORT_KEY_BYTES = 1024

# An id of an entity with several key columns is a tuple of their values, in the order of the entity's keys.
Id = int | str | tuple[int | str, ...]
# The separator of a composite key's parts; `encode_part` escapes it within a part.
SEPARATOR = "#"

_WHOLE = re.compile(r"(-?[0-9]{1,19})([.]0+)?")
_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")


class BadId(PrefsError):
    """The input cannot be an id."""


def number_text(number: Decimal) -> str:
    """Format a finite number without exponent and redundant zeros; 0 has no sign."""
    if number == 0:
        return "0"
    text = format(number, "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


def id_text(given: object) -> str | None:
    """Return the id in a text or a number, as the typed events spell it; None if it is invalid."""
    if isinstance(given, str):
        return given.strip(BLANKS) or None
    number = _number(given)
    if number is None or not LEAST_NUMBER <= number <= LARGEST_NUMBER:
        return None
    return number_text(number)


def whole_number(text: str, bits: int) -> int | None:
    """Parse a signed integer of that many bits, also if written as 12.0; None for any other text."""
    found = _WHOLE.fullmatch(text)
    limit = 1 << (bits - 1)
    return int(found[1]) if found and -limit <= int(found[1]) < limit else None


def read_key(key: Key, given: object) -> int | str:
    """Return the id that a number, a text or a UUID means for a key column: an int for a bigint, else a text.

    A UUID becomes lower case. Raises BadId naming the column, the input and the rule.
    """
    if key.type == "uuid" and isinstance(given, uuid.UUID):
        return str(given)
    text = id_text(given)
    if key.type == "bigint":
        number = None if text is None else whole_number(text, 64)
        if number is None:
            raise BadId(f"{key.name} must be a 64-bit integer, not {excerpt(given)}")
        return number
    if key.type == "uuid":
        found = text.lower() if isinstance(given, str) and text else ""
        if not _UUID.fullmatch(found):
            raise BadId(
                f"{key.name} must be a UUID like 0190163d-8694-739b-aea5-966c26f8ad91, not {excerpt(given)}"
            )
        return found
    if text is None or "\x00" in text or not 0 < _utf8_bytes(text) <= MAX_KEY_BYTES:
        raise BadId(
            f"{key.name} must be a text of 1 to {MAX_KEY_BYTES:,} bytes without NUL, or a number of 64 bits, "
            f"not {excerpt(given)}"
        )
    return text


def read_id(keys: Sequence[Key], given: object) -> Id:
    """Return the id of an entity with these key columns: as `read_key` for one column, else a tuple of one value each.

    Raises BadId naming the columns, the input and the rule.
    """
    if len(keys) == 1:
        return read_key(keys[0], given)
    if not isinstance(given, tuple | list) or len(given) != len(keys):
        names = ", ".join(key.name for key in keys)
        raise BadId(f"an id is a tuple of {len(keys)} values ({names}), not {excerpt(given)}")
    return tuple(read_key(key, part) for key, part in zip(keys, given, strict=True))


def encode_part(part: int | str) -> str:
    """Encode one part of a composite key: `%` becomes `%25`, `#` becomes `%23`.

    The macro `key_part` of the dbt project is the same rule.
    """
    return str(part).replace("%", "%25").replace(SEPARATOR, "%23")


def decode_part(text: str) -> str:
    """Decode the output of `encode_part`."""
    return text.replace("%23", SEPARATOR).replace("%25", "%")


def join_parts(parts: Sequence[int | str]) -> str:
    """Encode the parts and join them with the separator."""
    return SEPARATOR.join(map(encode_part, parts))


def id_parts(id_: Id) -> tuple[int | str, ...]:
    """Return the values of the key columns in an id."""
    return id_ if isinstance(id_, tuple) else (id_,)


def id_label(id_: Id | None) -> str:
    """Format an id for display: the parts of a composite id are separated by commas."""
    return ", ".join(map(str, id_)) if isinstance(id_, tuple) else str(id_)


def key_text(key: Key, value: int | str) -> str:
    """Return the text of an id from `read_key`, as DynamoDB, JSON and SQL casts to text spell it."""
    return str(read_key(key, value))


def _utf8_bytes(text: str) -> int:
    """Return the length of a text in UTF-8; 0 if it cannot be encoded (half of a surrogate pair)."""
    try:
        return len(text.encode())
    except UnicodeEncodeError:
        return 0


def _number(given: object) -> Decimal | None:
    if isinstance(given, bool):
        return None
    if isinstance(given, Decimal):
        return given if given.is_finite() else None
    if isinstance(given, float):
        return Decimal(repr(given)) if math.isfinite(given) and abs(given) < EXACT_FLOAT else None
    try:
        # Accepts numpy's integers too.
        return Decimal(operator.index(given))  # type: ignore[arg-type]
    except TypeError:
        return None
