"""The entry point for Dagster: the definitions of `defs/` for the settings of this process.

Importing this module builds them. Call `build_definitions` to build them for other settings.
"""

from __future__ import annotations

from dagster_prefs.defs.assembly import build_definitions
from dagster_prefs.settings import load_settings

defs = build_definitions(load_settings())
