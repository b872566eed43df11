"""The typed layer's rules for reading one field of a message, in Python.

`dbt_project/macros/messages.sql` contains the same rules in SQL, and a test compares the two on random
messages. The project's registry holds the declarations of the fields.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import ROUND_HALF_UP, Context, Decimal
from functools import cached_property
from typing import Any, Literal

from dagster_prefs.declarations.registry import FieldDeclaration
from dagster_prefs.ids import BLANKS, id_text, number_text, whole_number

TimeFault = Literal["bad", "implausible"]

# The number of digits that both engines store exactly.
DIGITS = 28

_EXACT = Context(prec=400, rounding=ROUND_HALF_UP)
_DECIMAL = re.compile(r"-?[0-9]{1,28}([.][0-9]+)?|-?[0-9]{1,28}([.][0-9]{1,255})?[eE][+-]?[0-9]{1,3}")
_NUMBER = re.compile(r"-?[0-9]{1,28}([.][0-9]+)?")
_JSON_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)([.][0-9]+)?([eE][+-]?[0-9]{1,4})?")
_HEXADECIMAL = re.compile(r"[0-9]+[eE][0-9]+")
_TOO_FINE = re.compile(r"([.][0-9]{6})[0-9]+")
_ISO = re.compile(
    r"([0-9]{4}-[01][0-9]-[0-3][0-9][T ](?:[01][0-9]|2[0-3]):[0-5][0-9](?::[0-5][0-9](?:[.][0-9]{1,6})?)?)"
    r"(?: ?(Z|UTC|[+-](?:0[0-9]|1[0-5])(?::?[0-5][0-9])?))?",
    re.IGNORECASE | re.ASCII,
)
_BOOLEANS = frozenset({"true", "1", "false", "0"})
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# Units of a number per second (seconds to nanoseconds); the number's magnitude determines its unit.
_PER_SECOND = (1, 10**3, 10**6, 10**9)


@dataclass(frozen=True)
class Years:
    """The years in UTC, `first` to `last`, that are plausible for an event, and the parser of times."""

    first: int
    last: int

    @cached_property
    def _bounds(self) -> tuple[datetime, datetime]:
        """The first plausible moment, and the one after the last."""
        return datetime(self.first, 1, 1, tzinfo=UTC), datetime(self.last + 1, 1, 1, tzinfo=UTC)

    @cached_property
    def _seconds(self) -> tuple[int, int]:
        first, end = ((moment - _EPOCH) // timedelta(seconds=1) for moment in self._bounds)
        return first, end

    def parse(self, text: str) -> datetime | None:
        """Parse a message's time to UTC as the typed layer does. Returns None if invalid or implausible.

        ISO 8601 with `T` or blank, with `Z`, an offset, ` UTC` or nothing (UTC), letters in any case; or a
        number since 1970, whose magnitude determines whether it counts seconds, milliseconds, microseconds or
        nanoseconds. Digits beyond microseconds are cut off.
        """
        found = self._read(text)
        return found if isinstance(found, datetime) else None

    def fault(self, text: str) -> TimeFault | None:
        """Return `bad` if a text is no time, `implausible` if no event can have it, else None."""
        found = self._read(text)
        return None if isinstance(found, datetime) else found

    def shift(self, text: str, seconds: int) -> str | None:
        """Shift a time by whole seconds: text becomes ISO 8601 with `Z`, a number keeps its unit.

        Returns None if it is unreadable before or after the shift.
        """
        moment = self.parse(text)
        if moment is None:
            return None
        if not _NUMBER.fullmatch(text):
            try:
                moved = (moment + timedelta(seconds=seconds)).replace(tzinfo=None).isoformat() + "Z"
            except OverflowError:
                return None
        else:
            unit = self._unit_of(Decimal(text))
            if unit is None:
                return None
            moved = format(_EXACT.add(Decimal(text), Decimal(seconds) * unit), "f")
            if self._unit_of(Decimal(moved)) != unit:
                return None
        return moved if self.parse(moved) is not None else None

    def _read(self, text: str) -> datetime | TimeFault:
        text = _TOO_FINE.sub(r"\1", text, count=1)
        if _NUMBER.fullmatch(text):
            number = Decimal(text[:60])
            unit = self._unit_of(number)
            if unit is None:
                return "implausible"
            return _EPOCH + timedelta(microseconds=int(_EXACT.divide(_EXACT.multiply(number, 10**6), unit)))
        found = _ISO.fullmatch(text)
        if not found:
            return "bad"
        if not self.first - 1 <= int(text[:4]) <= self.last + 1:
            return "implausible"
        moment, zone = found[1].upper(), (found[2] or "Z").upper()
        try:
            at = datetime.fromisoformat(moment + ("Z" if zone == "UTC" else zone)).astimezone(UTC)
        except ValueError:
            return "bad"
        first, end = self._bounds
        return at if first <= at < end else "implausible"

    def _unit_of(self, number: Decimal) -> int | None:
        """Return the number of the number's units per second, None if it is no time in these years."""
        first, end = self._seconds
        return next((unit for unit in _PER_SECOND if first * unit <= number < end * unit), None)


def field_text(field: FieldDeclaration, value: Any) -> str | None:
    """Return a JSON value (numbers as Decimal) as the text to parse; None if empty or of a wrong type."""
    if isinstance(value, bool):
        return str(value).lower() if field.type == "boolean" else None
    if isinstance(value, str):
        return value.strip(BLANKS) or None
    if not isinstance(value, Decimal):
        return None
    if field.type in ("decimal", "timestamptz"):
        return number_text(value) if abs(value) < 10**DIGITS else None
    return id_text(value)


def field_fault(field: FieldDeclaration, text: str, years: Years) -> str | None:
    """Return the reason why the typed layer rejects this text in this field, None if it accepts it."""
    if field.accepted:
        return None if text in field.accepted else f"unknown {field.name}"
    if field.type == "text":
        size, limit = len(text.encode()), field.max_bytes
        return None if limit is None or size <= limit else too_many_bytes(field.name, size, limit)
    if field.type == "timestamptz":
        wrong = years.fault(text)
        return f"bad {field.name}" if wrong == "bad" else "implausible time" if wrong else None
    if field.type == "boolean":
        return None if text.lower() in _BOOLEANS else f"bad {field.name}"
    number: Decimal | int | None
    if field.type == "decimal":
        number = read_decimal(text, field.scale or 0)
    else:
        number = whole_number(text, 64 if field.type == "bigint" else 32)
    return f"bad {field.name}" if number is None else _out_of_range(field, number)


def _out_of_range(field: FieldDeclaration, number: Decimal | int) -> str | None:
    if field.minimum is None:
        return None
    if field.maximum is None:
        return f"negative {field.name}" if number < field.minimum else None
    inside = field.minimum <= number <= field.maximum
    return None if inside else f"{field.name} outside {field.minimum}..{field.maximum}"


def cell_text(cell: str) -> str:
    """Normalize a cell of a CSV file that is read as text.

    A number becomes canonical as in JSON, because tools that store a column of whole numbers with gaps as
    floats turn 12345 into 12345.0. Digits, `e` and digits alone stay unchanged, because a hexadecimal
    identifier may look like that.
    """
    number = cell.strip(BLANKS)
    if not _JSON_NUMBER.fullmatch(number) or _HEXADECIMAL.fullmatch(number):
        return cell
    return id_text(Decimal(number)) or cell


def too_many_bytes(what: str, size: int, limit: int) -> str:
    """Return the reason for rejecting something that is longer than allowed."""
    return f"{what} has {size} bytes, at most {limit}"


def read_decimal(text: str, scale: int) -> Decimal | None:
    """Parse a number and round it to `scale` places, half away from zero.

    Returns None if it is no number or has more than 28 digits.
    """
    if not _DECIMAL.fullmatch(text):
        return None
    # Further digits cannot change the rounded value.
    number = Decimal(text[:60] if _NUMBER.fullmatch(text) else text)
    if abs(number) >= 10 ** (DIGITS - scale):
        return None
    return number.quantize(Decimal(1).scaleb(-scale), context=_EXACT)
