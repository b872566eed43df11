"""Connections of the feature server whose cost is bounded, whatever their clients do.

uvicorn waits without limit for the head and the body of a request, and for a client that does not read its
response, and accepts any number of connections. Here a request has a deadline from its first moment to its
last byte, and at the limit a new connection replaces the one that has waited longest for a request.
"""

from __future__ import annotations

import asyncio
import logging
import resource
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from dagster_prefs.loopback import is_stranger
from dagster_prefs.serving.wire import error_body

logger = logging.getLogger(__name__)

MAX_HEAD_BYTES = 64 * 1024
# A client that reads fewer bytes of its response than this within a deadline is disconnected.
MIN_TAKEN_BYTES = 64 * 1024
# Files other than client connections: those to the engine and to DynamoDB, and the interpreter's own.
OTHER_FILES = 256
LOG_SECONDS = 1.0

End = Literal["late", "evicted", "refused", "slow", "stranger"]
ENDS: dict[End, str] = {
    "late": "sent no whole request in time",
    "evicted": "waited for a request while the limit of connections was reached",
    "refused": "came while all others were being answered",
    "slow": "did not take their answer in time",
    "stranger": "came from another user of this machine",
}


@dataclass(frozen=True)
class ConnectionLimits:
    """The limits of a client's use of the server.

    `request_seconds`: from the opening of a connection, or the first byte of a further request on it, to the
    end of that request; also the time within which a client must read a part of its response. `connections`:
    the maximum number of open connections. `own_user_only`: over loopback, only this user and root may
    connect.
    """

    request_seconds: float = 5.0
    connections: int = 1024
    own_user_only: bool = False


@dataclass
class Connections:
    """The open connections of one server. Only its event loop accesses them."""

    limits: ConnectionLimits
    open: set[LimitedProtocol] = field(default_factory=set)
    # Connections without a complete request, the one that has waited longest first.
    waiting: dict[LimitedProtocol, None] = field(default_factory=dict)
    ended: Counter[End] = field(default_factory=Counter)
    _unsaid: Counter[End] = field(default_factory=Counter)

    def admit(self, made: LimitedProtocol) -> None:
        """Add a new connection; at the limit, close the longest waiting one, or else refuse the new one."""
        self.open.add(made)
        if len(self.open) <= self.limits.connections:
            return
        longest = next(iter(self.waiting), None)
        if longest is None:
            made.refuse(503, "busy", "all connections of this server are in use: try again, or add a server")
            self.note("refused")
        else:
            longest.give_up()
            self.note("evicted")

    def remove(self, lost: LimitedProtocol) -> None:
        """Remove a closed connection."""
        self.open.discard(lost)
        self.waiting.pop(lost, None)

    def note(self, end: End) -> None:
        """Count a connection that this server ended, and log once for all within a short time."""
        self.ended[end] += 1
        if not self._unsaid:
            asyncio.get_running_loop().call_later(LOG_SECONDS, self._log)
        self._unsaid[end] += 1

    def _log(self) -> None:
        unsaid, self._unsaid = self._unsaid, Counter()
        told = "; ".join(f"{count} {ENDS[end]}" for end, count in sorted(unsaid.items()))
        logger.warning("%d connections were ended: %s", unsaid.total(), told)


class LimitedProtocol(HttpToolsProtocol):
    """uvicorn's protocol with deadlines, a limit for the request head, and registration in `Connections`."""

    def __init__(self, *arguments: Any, connections: Connections, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._all = connections
        self._seconds = connections.limits.request_seconds
        self._deadline: asyncio.TimerHandle | None = None
        self._sending: asyncio.TimerHandle | None = None
        self._in_head = True
        self._begun = False
        self._head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if self._all.limits.own_user_only and is_stranger(
            transport.get_extra_info("peername"), transport.get_extra_info("sockname")
        ):
            self._all.note("stranger")
            transport.abort()
            return
        self._all.admit(self)
        self._follow(expecting=True)

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._deadline, self._sending):
            if timer is not None:
                timer.cancel()
        self._all.remove(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._follow(expecting=True)
        self._head_bytes += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._in_head and self._head_bytes > MAX_HEAD_BYTES:
            self.refuse(431, "too_long", f"the head of the request is longer than {MAX_HEAD_BYTES} bytes")
            return
        # uvicorn has stopped its keep-alive timer, even if the bytes do not begin a request.
        self._follow(expecting=self.timeout_keep_alive_task is None)

    def on_message_begin(self) -> None:
        self._begun = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_head = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_head, self._begun, self._head_bytes = True, False, 0
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._sending is not None:
            self._sending.cancel()
        self._watch_sending()
        self._follow(expecting=self._begun)

    def timeout_keep_alive_handler(self) -> None:
        self._watch_sending()
        super().timeout_keep_alive_handler()

    def refuse(self, status: int, code: str, message: str) -> None:
        """Respond without calling the application, and close the connection."""
        body = error_body(code, message)
        self.transport.write(
            STATUS_LINE[status]
            + b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
            + body
        )
        self.transport.close()
        self._watch_sending()

    def give_up(self) -> None:
        """Abort the connection."""
        self._all.remove(self)
        self.transport.abort()

    @property
    def _is_answering(self) -> bool:
        """Whether a complete request is being answered, or several that arrived at once."""
        cycle = self.cycle
        return bool(self.pipeline) or (
            cycle is not None and not cycle.response_complete and not cycle.more_body
        )

    def _follow(self, *, expecting: bool) -> None:
        """Update this connection's place among the waiting ones, and the deadline of an expected request."""
        if self._is_answering or self.transport.is_closing():
            self._all.waiting.pop(self, None)
            return
        self._all.waiting.setdefault(self)
        if expecting and self._deadline is None:
            self._deadline = self.loop.call_later(self._seconds, self._is_late)

    def _is_late(self) -> None:
        self._deadline = None
        if self.transport.is_closing():
            return
        self._all.note("late")
        cycle = self.cycle if not self._in_head else None
        nothing = not self._begun and self._head_bytes == 0
        if nothing or (cycle is not None and cycle.response_started):
            # No request to answer, or its response has already begun.
            self.transport.close()
            self._watch_sending()
            return
        if cycle is not None:
            cycle.disconnected = True
            cycle.message_event.set()
        self.refuse(408, "timeout", f"the request did not arrive within {self._seconds:g} s: send it at once")

    def _watch_sending(self, before: int | None = None) -> None:
        """Abort if the client reads nothing, or almost nothing, of what was written."""
        left = self.transport.get_write_buffer_size()
        self._sending = None
        if left == 0:
            return
        if before is not None and before - left < MIN_TAKEN_BYTES:
            self._all.note("slow")
            self.transport.abort()
            return
        self._sending = self.loop.call_later(self._seconds, self._watch_sending, left)


def raise_file_limit(connections: int) -> int:
    """Raise this process's limit of open files for `connections`, and return the number that it allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = connections + OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        wanted = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        if wanted < needed:
            fewer = max(1, wanted - OTHER_FILES)
            logger.warning(
                "%d connections at most instead of %d: this process may open %d files (ulimit -n)",
                fewer,
                connections,
                wanted,
            )
            return fewer
    return connections
