"""What must not be shown of a text: the credentials in it."""

from __future__ import annotations

import re

_OPTIONS = re.compile(r"(?i)((?:secret|password|access[._]key|token|jaas)[a-z._]*\s*=\s*)'[^']*'")
_USERINFO = re.compile(r"(\b[A-Za-z][A-Za-z0-9+.-]*://)[^/\s]*@")


def redact_options(text: str) -> str:
    """Remove the values of options that hold credentials (`password = '…'`), as the engine's record does."""
    return _OPTIONS.sub(r"\1'***'", text)


def redact_uris(text: str) -> str:
    """Remove the user and password of every URI in a text."""
    return _USERINFO.sub(r"\1***@", text)
