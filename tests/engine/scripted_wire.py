"""A server that speaks the Postgres wire and answers as RisingWave does, for what cannot run without one.

It holds no relation: reads are empty but for what `answers` says, and every other statement is done and remembered.
`statement_timeout` is read as v3.0.3 reads it (src/common/src/session_config/statement_timeout.rs), and a read takes
`read_milliseconds`, so that a session with a shorter time-out ends as there.
"""

from __future__ import annotations

import re
import socket
import struct
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from dagster_prefs.engine.connection import EngineConfiguration

SSL_REQUEST, CANCEL_REQUEST = 80877103, 80877102
UNITS = {"ms": 1, "s": 1000, "min": 60_000, "h": 3_600_000, "d": 86_400_000}
TEXT, BOOLEAN, BIGINT = 25, 16, 20


def timeout_milliseconds(given: str) -> int:
    """What v3.0.3 makes of a `statement_timeout`; raises ValueError where it refuses one."""
    found = re.fullmatch(r"\s*(\d+)\s*([a-z]*)\s*", given)
    if found is None or (found[2] or "ms") not in UNITS:
        raise ValueError(f'invalid time unit: "{given}"')
    return int(found[1]) * UNITS[found[2] or "ms"]


class RisingWaveWire:
    """The server; a context manager. `statements` is all that was asked, over every session, in its order."""

    def __init__(self, version: str, answers: Mapping[str, Sequence[tuple[Any, ...]]] | None = None) -> None:
        self.version = version
        # Regular expression → rows.
        self.answers = dict(answers or {})
        # Regular expression → what the server says of such a statement instead.
        self.refusals: dict[str, str] = {}
        self.read_milliseconds = 0
        self.statements: list[str] = []
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.engine = EngineConfiguration(
            "127.0.0.1", self._socket.getsockname()[1], "dev", "root", kind="risingwave", sslmode="disable"
        )

    def __enter__(self) -> RisingWaveWire:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    @property
    def changes(self) -> list[str]:
        """The statements that would have changed something."""
        return [
            text
            for text in self.statements
            if not re.match(r"(?i)(select|with|set|show|begin|commit|rollback)\b", text)
        ]

    def _accept(self) -> None:
        while True:
            try:
                accepted, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=_Session(self, accepted).run, daemon=True).start()


class _Session:
    def __init__(self, server: RisingWaveWire, accepted: socket.socket) -> None:
        self.server, self.socket = server, accepted
        self.timeout_ms = 0
        self.prepared: dict[bytes, str] = {}
        self.bound = ""

    def run(self) -> None:
        try:
            if self._greet():
                while self._one_message():
                    pass
        except (OSError, EOFError):
            pass
        finally:
            self.socket.close()

    def _greet(self) -> bool:
        while True:
            (length,) = struct.unpack("!i", self._read(4))
            body = self._read(length - 4)
            (code,) = struct.unpack("!i", body[:4])
            if code == CANCEL_REQUEST:
                return False
            if code != SSL_REQUEST:
                break
            self.socket.sendall(b"N")
        greeting = _message(b"R", struct.pack("!i", 0))
        for name, value in {
            "server_version": "13.14.0",
            "client_encoding": "UTF8",
            "standard_conforming_strings": "on",
            "integer_datetimes": "on",
            "DateStyle": "ISO, MDY",
            "TimeZone": "UTC",
        }.items():
            greeting += _message(b"S", name.encode() + b"\0" + value.encode() + b"\0")
        self.socket.sendall(greeting + _message(b"K", struct.pack("!ii", 1, 1)) + _message(b"Z", b"I"))
        return True

    def _one_message(self) -> bool:
        kind = self._read(1)
        (length,) = struct.unpack("!i", self._read(4))
        body = self._read(length - 4)
        if kind == b"X":
            return False
        if kind == b"Q":
            self.socket.sendall(
                self._answer(body.rstrip(b"\0").decode(), described=True) + _message(b"Z", b"I")
            )
        elif kind == b"P":
            name, text, _ = body.split(b"\0", 2)
            self.prepared[name] = text.decode()
            self.socket.sendall(_message(b"1", b""))
        elif kind == b"B":
            _, name, _ = body.split(b"\0", 2)
            self.bound = self.prepared[name]
            self.socket.sendall(_message(b"2", b""))
        elif kind == b"D":
            rows = self._rows(self.bound)
            self.socket.sendall(_message(b"n", b"") if rows is None else _description(rows))
        elif kind == b"E":
            self.socket.sendall(self._answer(self.bound, described=False))
        elif kind == b"C":
            self.socket.sendall(_message(b"3", b""))
        elif kind == b"S":
            self.socket.sendall(_message(b"Z", b"I"))
        return True

    def _rows(self, text: str) -> Sequence[tuple[Any, ...]] | None:
        """The rows of a read, None for a statement that has none."""
        if text == "select version()":
            return [(f"PostgreSQL 13.14.0-RisingWave-{self.server.version} (abc)",)]
        for pattern, rows in self.server.answers.items():
            if re.search(pattern, text):
                return rows
        return [] if re.match(r"(?i)(select|show|with)\b", text) else None

    def _answer(self, given: str, *, described: bool) -> bytes:
        # dbt puts a comment before each statement.
        text = re.sub(r"^\s*(/\*.*?\*/\s*)*", "", given, flags=re.DOTALL).strip().rstrip(";")
        self.server.statements.append(text)
        if found := re.match(r"(?i)set statement_timeout\s*(?:to|=)\s*'?([^']*)'?$", text):
            try:
                self.timeout_ms = timeout_milliseconds(found[1])
            except ValueError as error:
                return _error(
                    f"Failed to run the query\n\nCaused by:\n  Failed to get/set session config: {error}"
                )
        for pattern, message in self.server.refusals.items():
            if re.search(pattern, text):
                return _error(message)
        rows = self._rows(text)
        if rows is None:
            return _message(b"C", text.split(" ")[0].upper().encode() + b"\0")
        if 0 < self.timeout_ms < self.server.read_milliseconds:
            return _error(f"Query cancelled: timeout after {self.timeout_ms // 1000} seconds")
        answer = _description(rows) if described else b""
        for row in rows:
            values = [b"" if value is None else _text(value) for value in row]
            packed = b"".join(
                struct.pack("!i", -1 if value is None else len(shown)) + shown
                for value, shown in zip(row, values, strict=True)
            )
            answer += _message(b"D", struct.pack("!h", len(row)) + packed)
        return answer + _message(b"C", b"SELECT %d\0" % len(rows))

    def _read(self, count: int) -> bytes:
        found = b""
        while len(found) < count:
            part = self.socket.recv(count - len(found))
            if not part:
                raise EOFError
            found += part
        return found


def _text(value: Any) -> bytes:
    return (("t" if value else "f") if isinstance(value, bool) else str(value)).encode()


def _description(rows: Sequence[tuple[Any, ...]]) -> bytes:
    first = rows[0] if rows else ("",)
    fields = b""
    for place, value in enumerate(first):
        type_ = BOOLEAN if isinstance(value, bool) else BIGINT if isinstance(value, int) else TEXT
        fields += b"column%d\0" % place + struct.pack("!ihihih", 0, 0, type_, -1, -1, 0)
    return _message(b"T", struct.pack("!h", len(first)) + fields)


def _error(message: str) -> bytes:
    # RisingWave has one code for nearly everything.
    fields = b"SERROR\0CXX000\0M" + message.encode() + b"\0\0"
    return _message(b"E", fields)


def _message(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack("!i", len(body) + 4) + body
