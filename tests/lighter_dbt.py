"""dbt without what it makes for each statement and nobody reads, which is a third of the CPU that a run takes."""

from __future__ import annotations

import functools
from typing import Any

import parsedatetime
from dbt.adapters.sql import connections
from dbt_common.events.base_types import EventLevel
from dbt_common.events.event_manager_client import get_event_manager

_OF_EACH_STATEMENT = ("ConnectionUsed", "SQLQuery", "SQLQueryStatus")


def lighten_dbt() -> None:
    """Leave out dbt's debug events of statements where no log takes them, in this process and its forks.

    dbt builds and copies each of them whether a log of level debug is open or not. The calendar by which it guesses
    dates in the rows of a result is made once, and not for each result.
    """
    for name in _OF_EACH_STATEMENT:
        setattr(connections, name, _unless_unread(getattr(connections, name)))
    fire = connections.fire_event
    connections.fire_event = lambda event: None if event is None else fire(event)
    parsedatetime.Constants = functools.lru_cache(parsedatetime.Constants)


def _unless_unread(kind: Any) -> Any:
    def made(**given: Any) -> Any:
        loggers = get_event_manager().loggers
        return kind(**given) if any(logger.level is EventLevel.DEBUG for logger in loggers) else None

    return made
