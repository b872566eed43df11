"""A project of one's own: create it from an example, extend it with scaffolds, upgrade it with the package."""

from __future__ import annotations

from collections.abc import Mapping

# Example → the folders of the shipped project's models that are left out; None is an example of its own.
EXAMPLES: Mapping[str, tuple[str, ...] | None] = {
    "minimal": None,
    "shop": ("engagement",),
    "engagement": ("shop",),
    "full": (),
}
