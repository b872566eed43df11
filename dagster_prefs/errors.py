"""The base class of errors whose messages are written for users."""

from __future__ import annotations

import reprlib
from typing import Any


class PrefsError(Exception):
    """Base class of expected failures: one sentence that names the input, the rule and the remedy.

    The `prefs` command prints it without a traceback and exits with `exit_code`.
    """

    exit_code = 1


class _Excerpt(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 100
        self.maxlong = 40
        self.maxlevel = 1
        self.maxlist = self.maxtuple = 3

    def repr_dict(self, given: dict[Any, Any], level: int) -> str:
        # The standard implementation would sort all keys first.
        return "{…}" if given else "{}"


_EXCERPT = _Excerpt()


def excerpt(value: Any) -> str:
    """Return the repr of an input for a message, cut to some hundred characters at any size or depth."""
    return _EXCERPT.repr(value)
