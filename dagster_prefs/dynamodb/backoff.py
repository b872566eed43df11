"""The one way to try again what DynamoDB left over: unprocessed items and keys, and busy transactions.

botocore's standard retry mode repeats single requests; what it gives up on, or what an answer leaves, comes here.
"""

from __future__ import annotations

import math
import random
import time


class Backoff:
    """Pauses between attempts: random, up to twice as long each time, never longer than `longest_seconds`.

    `attempts` counts the first one; `deadline` is on the clock of time.monotonic(), and no pause reaches it.
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
        self._deadline = deadline
        self._failed = 0

    def again(self) -> bool:
        """Pause before another attempt; False, without a pause, once attempts or time are used up."""
        most = min(self._longest, self._first * 2**self._failed)
        pause = random.uniform(0, most)  # noqa: S311 - jitter, not a secret
        self._failed += 1
        if self._failed >= self._attempts or time.monotonic() + pause >= self._deadline:
            return False
        time.sleep(pause)
        return True

    def progressed(self) -> None:
        """Part of the last attempt was accepted: all attempts are left."""
        self._failed = -1
