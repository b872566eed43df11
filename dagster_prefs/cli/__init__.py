"""The `prefs` command. Each command parses its arguments, calls another package, and prints."""

# Importing a module registers its commands.
from dagster_prefs.cli import (
    console,
    deployment,
    events,
    freshness,
    generate,
    services,
    serving,
    training,
    values,
)
from dagster_prefs.cli.root import cli, main

__all__ = [
    "cli",
    "console",
    "deployment",
    "events",
    "freshness",
    "generate",
    "main",
    "services",
    "serving",
    "training",
    "values",
]
