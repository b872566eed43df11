"""Webhook alerts: one message for all measures that changed their alarm level."""

from __future__ import annotations

import hashlib
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal
from urllib.parse import urlsplit

from dagster_prefs.errors import PrefsError
from dagster_prefs.freshness.levels import Level, Measure
from dagster_prefs.pauses import Pauses

Alarm = Literal["ok", "warn", "error"]

# "unknown" alarms like "error", because an unreadable stage can hide a failure. "skipped" (not configured) and
# "catching up" (late, and measured to end soon) never alarm.
ALARMS: Mapping[Level, Alarm] = {
    "ok": "ok",
    "skipped": "ok",
    "catching up": "ok",
    "warn": "warn",
    "error": "error",
    "unknown": "error",
}
_SIGNS: Mapping[Alarm, str] = {"ok": "✅", "warn": "⚠️", "error": "🔴"}
_SEVERITY: Mapping[Alarm, int] = {"ok": 0, "warn": 1, "error": 2}

ATTEMPTS = 3
TIMEOUT_SECONDS = 5.0


class AlertError(PrefsError):
    """The webhook is misconfigured or did not accept a message."""


@dataclass(frozen=True)
class Transition:
    """A measure that changed from one alarm level to another."""

    key: str
    before: Alarm
    after: Alarm
    reason: str

    @property
    def text(self) -> str:
        """The transition as one line of text."""
        return f"{_SIGNS[self.after]} {self.key}: {self.before} → {self.after}: {self.reason}"


def transitions(before: Mapping[str, Alarm], measures: Iterable[Measure]) -> list[Transition]:
    """Return the measures whose alarm level differs from `before` (measure key → alarm level), worst first.

    A measure that is not in `before` counts as ok. Worst first, so that the most important line starts the
    message.
    """
    changed = [
        Transition(measure.key, known, ALARMS[measure.level], measure.reason)
        for measure in measures
        if (known := before.get(measure.key, "ok")) != ALARMS[measure.level]
    ]
    return sorted(changed, key=lambda one: (-_SEVERITY[one.after], one.key))


def remembered(before: Mapping[str, Alarm], told: Iterable[Transition]) -> dict[str, Alarm]:
    """Apply the delivered transitions to `before`. The next evaluation finds undelivered ones again."""
    levels = dict(before)
    for transition in told:
        levels[transition.key] = transition.after
    return {key: level for key, level in sorted(levels.items()) if level != "ok"}


def dump_levels(told: Mapping[str, Mapping[str, Alarm]]) -> str:
    """Serialize the alarm levels that each channel was told of to JSON, for a sensor's cursor.

    While all channels were told the same, the levels are stored once.
    """
    first = next(iter(told.values()), {})
    alike = all(levels == first for levels in told.values())
    return json.dumps(first if alike else told, separators=(",", ":"))


def load_levels(text: str | None, channel: str = "") -> dict[str, Alarm]:
    """Return what `dump_levels` stored for a channel.

    A missing or unreadable text, or one without the channel, means that no alarm was sent yet.
    """
    try:
        levels = json.loads(text or "{}")
    except ValueError:
        return {}
    if not isinstance(levels, dict):
        return {}
    if any(isinstance(one, dict) for one in levels.values()):
        levels = levels.get(channel) or {}
    return {str(key): level for key, level in levels.items() if level in _SEVERITY}


class Webhook:
    """A Slack-compatible webhook: posts `{"text": …}`, with a few attempts within seconds.

    The URL is a secret and appears in no message. Raises AlertError unless it is https, or http on this
    machine.
    """

    def __init__(
        self,
        url: str,
        *,
        attempts: int = ATTEMPTS,
        timeout_seconds: float = TIMEOUT_SECONDS,
        wait: Callable[[float], None] = time.sleep,
    ) -> None:
        parts = urlsplit(url)
        local = parts.hostname in ("127.0.0.1", "localhost", "::1")
        if not parts.hostname or not (parts.scheme == "https" or (parts.scheme == "http" and local)):
            raise AlertError(
                "the alert webhook must be an https URL (http only on this machine): correct "
                "PREFS_ALERT_WEBHOOK"
            )
        self._url = url
        self._host = parts.hostname
        # Names the channel in a sensor's cursor, from which nobody can tell the URL.
        self.name = hashlib.sha256(url.encode()).hexdigest()[:12]
        self._attempts = attempts
        self._timeout = timeout_seconds
        self._wait = wait

    def tell(self, changed: Sequence[Transition], *, at: datetime) -> None:
        """Send all transitions in one message. Sends nothing if there are none. `at` is UTC.

        Raises AlertError, naming the host, after the last attempt.
        """
        if changed:
            lines = [f"dagster-prefs, {at:%Y-%m-%d %H:%M:%S} UTC", *(one.text for one in changed)]
            self.send("\n".join(lines))

    def send(self, text: str) -> None:
        """Send a text. Raises AlertError, naming the host, after the last attempt."""
        # The constructor checked the URL's scheme.
        request = urllib.request.Request(  # noqa: S310
            self._url,
            data=json.dumps({"text": text}).encode(),
            headers={"Content-Type": "application/json"},
            method="POST",
        )
        reason, pauses = "", Pauses(0.5)
        for attempt in range(self._attempts):
            if attempt:
                self._wait(pauses.next())
            try:
                with urllib.request.urlopen(request, timeout=self._timeout):  # noqa: S310
                    return
            except urllib.error.HTTPError as error:
                reason = f"it answered {error.code}"
                if error.code < 500 and error.code != 429:
                    break
            except (urllib.error.URLError, OSError) as error:
                reason = str(getattr(error, "reason", error))
        raise AlertError(
            f"the alert webhook at {self._host} did not accept the message ({reason}): check "
            "PREFS_ALERT_WEBHOOK with `prefs alerts test`"
        )


def channels(urls: Sequence[str]) -> list[Webhook]:
    """Return a webhook per URL. Raises AlertError for one that is no https URL."""
    return [Webhook(url) for url in dict.fromkeys(urls)]
