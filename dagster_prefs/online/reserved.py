"""The ids that are reserved for canaries: the one rule about them.

Viewer ids below 0, and user ids and event ids that start with `canary:`, belong to the freshness probe. Only the probe
sends events with them: every other message that has one is rejected. What a canary leaves behind flows through
everything like any event, and is left out of exports, training sets, rankings, and counts across subjects. A canary is
nobody's data, so that none can be labelled or erased. Its profile can be read like any other.

`dbt_project/macros/reserved.sql` is the same rule in SQL.
"""

from __future__ import annotations

from typing import LiteralString

PREFIX = "canary:"
# Whose events the probe sends; no other reserved id has events.
CANARY_VIEWER_ID = -1
CANARY_USER_ID = f"{PREFIX}prefs"

# The condition of SQL that a row is of a person.
VIEWERS_ONLY: LiteralString = "viewer_id >= 0"
USERS_ONLY: LiteralString = "not starts_with(user_id, 'canary:')"


def is_reserved_viewer(viewer_id: int) -> bool:
    """Whether a viewer id is reserved for canaries."""
    return viewer_id < 0


def is_reserved_text(identity: str) -> bool:
    """Whether a user id or an event id is reserved for canaries."""
    return identity.startswith(PREFIX)
