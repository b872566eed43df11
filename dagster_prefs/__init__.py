"""Real-time preference and engagement profiles on RisingWave, dbt, DynamoDB, Iceberg and Dagster."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dagster_prefs.component import PreferencePlatform as PreferencePlatform
    from dagster_prefs.component import preference_platform as preference_platform

# The version of the package; the build reads it from here, and a project's shared macros are stamped with it.
__version__ = "0.2.0"

# Loaded on first use, because a service imports this package without Dagster.
_OF_DAGSTER = ("PreferencePlatform", "preference_platform")


def __getattr__(name: str) -> Any:
    """Load what needs Dagster. Raises ImportError without it."""
    if name not in _OF_DAGSTER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from dagster_prefs import component
    except ModuleNotFoundError as error:
        raise ImportError(
            f"dagster_prefs.{name} needs Dagster: install dagster-prefs[platform] ({error})"
        ) from error
    return getattr(component, name)


def __dir__() -> list[str]:
    """List what Dagster's registry of components looks for, too."""
    return sorted({*globals(), *_OF_DAGSTER})
