"""Durations with an explicit unit, as both engines read them."""

from __future__ import annotations

import math

import psycopg

from dagster_prefs.errors import PrefsError

# Both engines store a time-out as whole milliseconds; PostgreSQL's are signed 32-bit integers.
MAX_MILLISECONDS = 2**31 - 1


def with_unit(seconds: float, what: str) -> str:
    """Return a duration with its unit, e.g. `5s` or `50ms`, rounded up to a whole millisecond.

    PostgreSQL and RisingWave since 2.8 read a bare number as milliseconds, earlier RisingWave versions as seconds.
    Raises PrefsError naming `what` for a duration beyond PostgreSQL's range, and for one that is not above zero, which
    both engines treat as no limit.
    """
    if not (math.isfinite(seconds) and 0 < seconds * 1000 <= MAX_MILLISECONDS):
        raise PrefsError(
            f"{what} must be above 0 and at most {MAX_MILLISECONDS // 1000} seconds, got {seconds:g}"
        )
    # Rounded before the ceiling, because 0.007 * 1000 is slightly more than 7.
    milliseconds = max(1, math.ceil(round(seconds * 1000, 6)))
    whole, rest = divmod(milliseconds, 1000)
    return f"{milliseconds}ms" if rest else f"{whole}s"


def timed_out(error: psycopg.Error) -> bool:
    """Return whether a statement ended because it exceeded `statement_timeout`."""
    # RisingWave reports this with the code of an internal error.
    return isinstance(error, psycopg.errors.QueryCanceled) or "Query cancelled: timeout after" in str(error)
