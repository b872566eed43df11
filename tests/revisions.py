"""Alembic's revisions, read once a process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


def read_revisions_once() -> Callable[[], None]:
    """Let whatever asks for the revisions in a folder, in this process and its forks, get those read before.

    Dagster asks whenever it makes or opens a database, and has one for each run: it executed the files of all its
    revisions each time, which took longer than the run. Nobody here adds a revision. Returns what undoes it.
    """
    from alembic.script import ScriptDirectory

    original = ScriptDirectory.__dict__["from_config"]
    known: dict[tuple[tuple[str, str], ...], ScriptDirectory] = {}
    reading = threading.Lock()

    def from_config(cls: type[ScriptDirectory], config: Any) -> ScriptDirectory:
        options = tuple(sorted((config.get_section(config.config_ini_section) or {}).items()))
        with reading:
            if options not in known:
                made = original.__get__(None, cls)(config)
                # The files are read here, while nobody else can.
                made.get_heads()
                known[options] = made
            return known[options]

    ScriptDirectory.from_config = classmethod(from_config)  # type: ignore[method-assign,assignment]

    def undo() -> None:
        ScriptDirectory.from_config = original  # type: ignore[method-assign]

    return undo
