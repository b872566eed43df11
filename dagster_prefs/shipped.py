"""Find what the package brings besides its code: the example project with the shared macros, lock and settings."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def shipped(name: str) -> Path:
    """Return a file or folder that the package brings.

    The build puts it into the wheel's folder `data`; in a checkout it is in its own place there.
    """
    inside = PACKAGE / "data" / name
    return inside if inside.exists() else PACKAGE.parent / name
