"""The `prefs` command. Each command parses its arguments, calls another package, and prints."""

# Importing a module registers its commands.
from dagster_prefs.cli import (
    catalog,
    console,
    deployment,
    environments,
    events,
    freshness,
    generate,
    lineage,
    projects,
    services,
    serving,
    skew,
    tokens,
    training,
    values,
)
from dagster_prefs.cli.root import cli, main

__all__ = [
    "catalog",
    "cli",
    "console",
    "deployment",
    "environments",
    "events",
    "freshness",
    "generate",
    "lineage",
    "main",
    "projects",
    "services",
    "serving",
    "skew",
    "tokens",
    "training",
    "values",
]
