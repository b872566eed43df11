"""The retries of what DynamoDB left unprocessed: items, keys, and transactions that met a conflict.

botocore's standard retry mode repeats single requests. These retries follow when it gives up, or when an
answer is incomplete.
"""

from __future__ import annotations

import math
import random
import time

from dagster_prefs.pauses import Pauses


class Backoff:
    """Random pauses between attempts that double each time, up to `longest_seconds`.

    `attempts` includes the first one. `deadline` is in seconds of time.monotonic(); no pause exceeds it.
    """

    def __init__(
        self,
        attempts: int,
        *,
        first_seconds: float = 0.05,
        longest_seconds: float = 5.0,
        deadline: float = math.inf,
    ) -> None:
        self._attempts = attempts
        self._first, self._longest = first_seconds, longest_seconds
        self._pauses = Pauses(first_seconds, longest_seconds)
        self._deadline = deadline
        self._failed = 0

    def again(self) -> bool:
        """Pause before another attempt; return False, without a pause, if no attempts or no time is left."""
        pause = random.uniform(0, self._pauses.next())  # noqa: S311 - jitter, not a secret
        self._failed += 1
        if self._failed >= self._attempts or time.monotonic() + pause >= self._deadline:
            return False
        time.sleep(pause)
        return True

    def progressed(self) -> None:
        """Reset the attempts, because part of the last one was accepted."""
        self._failed = -1
        self._pauses = Pauses(self._first / 2, self._longest)
