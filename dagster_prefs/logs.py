"""The logs of processes that run on: a JSON object a line, or lines for people on a terminal.

The fields are `time` (ISO 8601, UTC), `level`, `logger`, `message`, `process` (pid), `request_id` within a request to
the feature server, `trace_id` within a trace, `error` (a traceback), and whatever the line says in its `extra`, such as
`step`, the id of a step of the embedded engine.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Literal, get_args

from dagster_prefs.printable import printable
from dagster_prefs.redaction import redact_options, redact_uris

LogFormat = Literal["auto", "json", "text"]
LogLevel = Literal["debug", "info", "warning", "error"]

ROOT = "dagster_prefs"
# The variable of the setting, for a process that loads no settings.
LOG_FORMAT = "PREFS_LOG_FORMAT"
# Part of ordinary texts too often: to take it out would hide more than a secret.
SHORTEST_SECRET = 6

REQUEST_ID: ContextVar[str | None] = ContextVar("prefs_request_id", default=None)
TRACE_ID: ContextVar[str | None] = ContextVar("prefs_trace_id", default=None)

_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class Redaction:
    """Takes known secrets, and what looks like one, out of everything that a line says."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        self._secrets = sorted({one for one in secrets if len(one) >= SHORTEST_SECRET}, key=len, reverse=True)

    def text(self, given: str) -> str:
        """Return the text without credentials."""
        for secret in self._secrets:
            given = given.replace(secret, "***")
        return redact_uris(redact_options(given))

    def value(self, given: Any) -> Any:
        """Return a value for JSON without credentials; what JSON has no form for becomes a text."""
        if given is None or isinstance(given, bool | int | float):
            return given
        if isinstance(given, Mapping):
            return {str(key): self.value(one) for key, one in given.items()}
        if isinstance(given, list | tuple | set | frozenset):
            return [self.value(one) for one in given]
        return self.text(str(given))


class JsonFormatter(logging.Formatter):
    """One JSON object a line, in ASCII, so that no text in it can end the line or move a terminal's cursor."""

    def __init__(self, redaction: Redaction) -> None:
        super().__init__()
        self._redaction = redaction

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as JSON."""
        line: dict[str, Any] = {
            "time": _moment(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "process": record.process,
            **_context(),
            **{name: value for name, value in vars(record).items() if name not in _OWN},
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(self._redaction.value(line))


class TextFormatter(logging.Formatter):
    """A line for people: time, level, logger and message, with control characters escaped."""

    def __init__(self, redaction: Redaction) -> None:
        super().__init__()
        self._redaction = redaction

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as text."""
        where = "".join(f" [{name} {value}]" for name, value in _context().items())
        text = f"{_moment(record)} {record.levelname} {record.name}: {record.getMessage()}{where}"
        if record.exc_info:
            text += f"\n{self.formatException(record.exc_info)}"
        return printable(self._redaction.text(text))


def start_logging(form: LogFormat = "auto", level: LogLevel = "info", *, secrets: Iterable[str] = ()) -> None:
    """Write this process's log to stderr; `auto` means JSON unless stderr is a terminal.

    `level` is for this platform's own lines; other packages log warnings and errors. `secrets` are replaced wherever
    they occur. A second call replaces the first.
    """
    if form == "auto":
        form = "text" if sys.stderr.isatty() else "json"
    redaction = Redaction(secrets)
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter(redaction) if form == "json" else TextFormatter(redaction))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger(ROOT).setLevel(level.upper())


def log_format(given: str | None) -> LogFormat:
    """Return a format by its name; `auto` for any other text."""
    return given if given in get_args(LogFormat) else "auto"  # type: ignore[return-value]


def _context() -> dict[str, str]:
    found = {"request_id": REQUEST_ID.get(), "trace_id": TRACE_ID.get()}
    return {name: value for name, value in found.items() if value is not None}


def _moment(record: logging.LogRecord) -> str:
    moment = datetime.fromtimestamp(record.created, UTC)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{moment.microsecond // 1000:03d}Z"
