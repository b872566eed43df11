"""Durations as both engines read them: never a number without a unit."""

from __future__ import annotations

import math

import psycopg

from dagster_prefs.errors import PrefsError

# Both engines keep a time-out as whole milliseconds; PostgreSQL's are 32 bits with a sign.
MAX_MILLISECONDS = 2**31 - 1


def with_unit(seconds: float, what: str) -> str:
    """Return a duration as an engine takes it, e.g. `5s` or `50ms`, rounded up to a whole millisecond.

    A bare number means milliseconds to PostgreSQL and to RisingWave since 2.8, and seconds to RisingWave before it.
    Raises PrefsError naming `what` for a duration that is not above zero, which both engines take for no limit at
    all, and for one beyond what PostgreSQL can keep.
    """
    if not (math.isfinite(seconds) and 0 < seconds * 1000 <= MAX_MILLISECONDS):
        raise PrefsError(
            f"{what} must be above 0 and at most {MAX_MILLISECONDS // 1000} seconds, got {seconds:g}"
        )
    # Rounded first, because 0.007 * 1000 is a little more than 7.
    milliseconds = max(1, math.ceil(round(seconds * 1000, 6)))
    whole, rest = divmod(milliseconds, 1000)
    return f"{milliseconds}ms" if rest else f"{whole}s"


def timed_out(error: psycopg.Error) -> bool:
    """Whether a statement ended because it took longer than `statement_timeout`."""
    # RisingWave has the code of an internal error for it.
    return isinstance(error, psycopg.errors.QueryCanceled) or "Query cancelled: timeout after" in str(error)
