"""What Dagster loads; it assembles `defs/` for the settings of this process and does nothing else.

Whoever has settings of their own takes `build_definitions`: to import this module is to build.
"""

from __future__ import annotations

from dagster_prefs.defs.assembly import build_definitions
from dagster_prefs.settings import load_settings

defs = build_definitions(load_settings())
