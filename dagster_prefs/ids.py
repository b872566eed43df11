"""How an id is read, by whatever door it comes: a message, a request, a command, a label.

A text is taken as it stands, trimmed: `1e3` is not 1000, and 007 is not 7. A number is made canonical: 12345.0 and
1.2345e4 are 12345, also where the id is a text. Whatever could be another id than was meant is none.
"""

from __future__ import annotations

import math
import operator
import re
from decimal import Decimal

from dagster_prefs.errors import PrefsError, excerpt

# What is cut off around a text.
BLANKS = " \t\r\n"
INT64 = 1 << 63
# A number that names something must be a whole or broken one within 64 bits, signed or not.
LEAST_NUMBER, LARGEST_NUMBER = Decimal(-INT64), Decimal(2 * INT64 - 1)
# From here on a float stands for several whole numbers.
EXACT_FLOAT = 2**53

_WHOLE = re.compile(r"(-?[0-9]{1,19})([.]0+)?")


class BadId(PrefsError):
    """What was given cannot be an id."""


def number_text(number: Decimal) -> str:
    """A finite number without exponent and without needless zeros; 0 has no sign."""
    if number == 0:
        return "0"
    text = format(number, "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


def id_text(given: object) -> str | None:
    """The id that a text or a number means, as the typed events spell it; None where it means none."""
    if isinstance(given, str):
        return given.strip(BLANKS) or None
    number = _number(given)
    if number is None or not LEAST_NUMBER <= number <= LARGEST_NUMBER:
        return None
    return number_text(number)


def whole_number(text: str, bits: int) -> int | None:
    """A signed whole number of that many bits, also one written as 12.0; None for any other text."""
    found = _WHOLE.fullmatch(text)
    limit = 1 << (bits - 1)
    return int(found[1]) if found and -limit <= int(found[1]) < limit else None


def viewer_id(given: object) -> int:
    """The viewer that a number or a text means: a whole number of 64 bits. Raises BadId."""
    text = id_text(given)
    viewer = None if text is None else whole_number(text, 64)
    if viewer is None:
        raise BadId(f"a viewer id is a 64-bit integer, not {excerpt(given)}")
    return viewer


def user_id(given: object) -> str:
    """The shop user that a text or a number means. Raises BadId."""
    text = id_text(given)
    if text is None or "\x00" in text:
        raise BadId(
            f"a user id is a text of at least one character without NUL, or a number of 64 bits, not {excerpt(given)}"
        )
    return text


def _number(given: object) -> Decimal | None:
    if isinstance(given, bool):
        return None
    if isinstance(given, Decimal):
        return given if given.is_finite() else None
    if isinstance(given, float):
        return Decimal(repr(given)) if math.isfinite(given) and abs(given) < EXACT_FLOAT else None
    try:
        # numpy's integers too.
        return Decimal(operator.index(given))  # type: ignore[arg-type]
    except TypeError:
        return None
