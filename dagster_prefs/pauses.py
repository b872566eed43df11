"""The durations between attempts: each twice the one before, up to a limit."""

import math


class Pauses:
    """Durations in seconds that double from `first_seconds` up to `longest_seconds`.

    Nothing sleeps here: the caller knows what may interrupt its wait.
    """

    def __init__(self, first_seconds: float, longest_seconds: float = math.inf) -> None:
        self._first, self._longest = first_seconds, longest_seconds
        self._next = first_seconds

    def next(self) -> float:
        """Return the next duration, in seconds."""
        pause = self._next
        self._next = min(2 * pause, self._longest)
        return pause

    def reset(self) -> None:
        """Start again from the first duration, because an attempt succeeded."""
        self._next = self._first
