"""The logs of processes that run on: JSON where nobody watches, text on a terminal, and no secret in either."""

from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dagster_prefs.files import keep_log_small, open_private_log
from dagster_prefs.logs import REQUEST_ID, TRACE_ID, LogFormat, LogLevel, log_format, start_logging
from dagster_prefs.settings import Settings

SECRET = "hunter2-very-secret"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    """A logger of the platform; the handlers and levels of the suite are put back."""
    root, own = logging.getLogger(), logging.getLogger("dagster_prefs")
    before = (root.handlers[:], root.level, own.level)
    yield logging.getLogger("dagster_prefs.live.follower")
    root.handlers[:], level, own_level = before
    root.setLevel(level)
    own.setLevel(own_level)


def started(
    monkeypatch: pytest.MonkeyPatch,
    form: LogFormat = "auto",
    level: LogLevel = "info",
    *,
    terminal: bool = False,
) -> io.StringIO:
    stream = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    start_logging(form, level, secrets=[SECRET, "prefs"])
    return stream


def test_a_line_is_one_json_object(logger: logging.Logger, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = started(monkeypatch)
    taken = {"topic": "a", "source": "file:x\n\x1b[31m", "partition": 0, "first_offset": 1, "last_offset": 3}
    logger.info("step %d took\n%d messages", 7, 3, extra={"step": 7, "taken": [taken], "path": Path("x")})
    token = REQUEST_ID.set("r-1"), TRACE_ID.set("0af7")
    try:
        try:
            raise ValueError("no such thing")
        except ValueError:
            logger.exception("it failed")
    finally:
        REQUEST_ID.reset(token[0])
        TRACE_ID.reset(token[1])
    logger.debug("not shown")
    logging.getLogger("somebody.else").info("not shown")
    logging.getLogger("somebody.else").warning("shown")
    raw = stream.getvalue()
    assert raw.isascii()
    assert "\x1b" not in raw
    step, fault, foreign = map(json.loads, raw.splitlines())
    assert step.pop("time").endswith("Z")
    assert step.pop("process") > 0
    assert step == {
        "level": "info",
        "logger": "dagster_prefs.live.follower",
        "message": "step 7 took\n3 messages",
        "step": 7,
        "taken": [taken],
        "path": "x",
    }
    assert (fault["request_id"], fault["trace_id"], fault["level"]) == ("r-1", "0af7", "error")
    assert fault["error"].startswith("Traceback")
    assert (foreign["logger"], foreign["level"]) == ("somebody.else", "warning")


@pytest.mark.parametrize("form", ["json", "text"])
def test_no_secret_is_in_a_line(
    logger: logging.Logger, monkeypatch: pytest.MonkeyPatch, form: LogFormat
) -> None:
    stream = started(monkeypatch, form)
    try:
        raise ValueError(f"rejected {SECRET}")
    except ValueError:
        logger.exception(
            "cannot reach https://user:pass-word@example.com with password = 'swordfish' of prefs, %s",
            SECRET,
            extra={"detail": [{"deep": f"x{SECRET}y"}]},
        )
    text = stream.getvalue()
    assert not any(secret in text for secret in (SECRET, "pass-word", "swordfish"))
    # A password that is an ordinary word would take that word out of every line.
    assert "https://***@example.com with password = '***' of prefs, ***" in text
    assert "rejected ***" in text


@pytest.mark.parametrize(
    ("form", "terminal", "is_json"),
    [("auto", True, False), ("auto", False, True), ("text", False, False), ("json", True, True)],
)
def test_people_get_text_and_programs_json(
    logger: logging.Logger,
    monkeypatch: pytest.MonkeyPatch,
    form: LogFormat,
    terminal: bool,
    is_json: bool,
) -> None:
    stream = started(monkeypatch, form, terminal=terminal)
    logger.info("a\x1b[31mb")
    (line,) = stream.getvalue().splitlines()
    if is_json:
        assert json.loads(line)["message"] == "a\x1b[31mb"
    else:
        assert line.endswith(r"Z INFO dagster_prefs.live.follower: a\x1b[31mb")


def test_the_level_is_a_setting(logger: logging.Logger, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = started(monkeypatch, level="warning")
    logger.info("not shown")
    logger.warning("shown")
    assert [json.loads(line)["message"] for line in stream.getvalue().splitlines()] == ["shown"]


@pytest.mark.parametrize(
    ("given", "form"), [(None, "auto"), ("text", "text"), ("json", "json"), ("yaml", "auto")]
)
def test_a_process_without_settings_knows_the_format(given: str | None, form: str) -> None:
    assert log_format(given) == form


def test_every_secret_setting_is_redacted(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {"engine_password": "one-secret", "alert_webhook": "https://two.example.com/x"}
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "three-secret")
    assert set(Settings(**given).secrets) == {*given.values(), "three-secret"}


def test_a_log_that_another_process_writes_stays_small(tmp_path: Path) -> None:
    path = tmp_path / "follower.log"
    with open_private_log(path) as output:
        for _ in range(3):
            output.write(b"x" * 60 + b"\n")
            output.flush()
            keep_log_small(path, 100)
        output.write(b"last\n")
    old = tmp_path / "follower.log.1"
    assert old.read_bytes() == (b"x" * 60 + b"\n") * 2
    assert path.read_bytes() == b"x" * 60 + b"\n" + b"last\n"
    assert old.stat().st_mode & 0o777 == 0o600
