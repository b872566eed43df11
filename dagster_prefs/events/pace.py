"""A limit on how many messages are sent per second."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Pace:
    """Limits a sender to `rate` messages per second on average since its start; None means no limit.

    A batch should have at most `batch_size` messages, so that a low rate is steady.
    """

    rate: float | None
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], object] = time.sleep
    _started: float = field(init=False)

    def __post_init__(self) -> None:
        self._started = self.clock()

    def batch_size(self, most: int) -> int:
        """Return how many messages to send at a time, at most `most`: four batches a second."""
        return most if self.rate is None else max(1, min(most, int(self.rate / 4)))

    def wait(self, sent: int) -> None:
        """Wait until `sent` messages since the start are within the rate."""
        if self.rate is not None:
            self.sleep(max(0.0, sent / self.rate - (self.clock() - self._started)))
