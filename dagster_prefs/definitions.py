"""What Dagster loads: `defs/` assembled for the settings of the environment."""

from __future__ import annotations

from dagster_prefs.defs.assembly import build_definitions
from dagster_prefs.settings import load_settings

defs = build_definitions(load_settings())
