"""The `prefs` command. Each command parses its arguments, calls another package, and prints."""

# Importing a module registers its commands.
from dagster_prefs.cli import deployment, events, freshness, generate, projects, services, serving, training
from dagster_prefs.cli.root import cli, main

__all__ = [
    "cli",
    "deployment",
    "events",
    "freshness",
    "generate",
    "main",
    "projects",
    "services",
    "serving",
    "training",
]
