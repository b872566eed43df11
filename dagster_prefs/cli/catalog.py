"""The command that shows what a project declares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from dagster_prefs.cli.root import cli, console, print_json, say, table_of
from dagster_prefs.engine.connection import EngineConfiguration, EngineUnavailable
from dagster_prefs.errors import PrefsError
from dagster_prefs.settings import Settings, load_settings

if TYPE_CHECKING:
    from dagster_prefs.serving.feature_catalog import Entry


@cli.command()
@click.argument("name", required=False)
@click.option("--search", "words", default="", help="Only entries that have all of these words.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
def catalog(name: str | None, words: str, as_json: bool) -> None:
    """Show what the project declares, or one part in full.

    Every entity, topic, domain and attribute: meaning, type, owner, examples, origin, and how to read it. Examples need
    the engine, and are never personal. The share of NULLs is that of `prefs statistics` where it has described them.
    """
    from dagster_prefs.serving.feature_catalog import load_catalog

    settings = load_settings()
    found = load_catalog(settings.project, settings.registry())
    entries: Sequence[Entry] = [found.entry(name)] if name else found.search(words)
    if not name and not as_json:
        rows = [(one.kind, one.name, one.type, one.owner, one.meaning) for one in entries]
        console.print(table_of("", ["kind", "name", "type", "owner", "meaning"], rows))
        return
    entries = with_statistics(settings, with_examples(settings, entries))
    if as_json:
        print_json([one.as_dict() for one in entries])
        return
    for one in entries:
        show(one)


def with_examples(settings: Settings, entries: Sequence[Entry]) -> Sequence[Entry]:
    """Return entries with examples from the engine; as they are, with a line on stderr, if it does not answer."""
    import psycopg

    from dagster_prefs.serving.feature_catalog import sampled

    engine = EngineConfiguration.of(settings)
    try:
        with engine.connect() as connection:
            return sampled(connection, engine, settings.registry(), entries)
    except (EngineUnavailable, psycopg.Error) as error:
        say(f"without examples: {' '.join(str(error).split())}", stderr=True)
        return entries


def with_statistics(settings: Settings, entries: Sequence[Entry]) -> Sequence[Entry]:
    """Return entries with the statistics of their columns; as they are, with a line on stderr, if none can be read."""
    from dagster_prefs.platform import Platform
    from dagster_prefs.serving.feature_catalog import described, has_statistics

    # To read the table loads Iceberg's libraries, which takes longer than all else.
    if not any(has_statistics(settings.registry(), entry) for entry in entries):
        return entries
    try:
        return described(entries, Platform(settings).statistics())
    except PrefsError as error:
        say(f"without statistics: {error}", stderr=True)
        return entries


def show(entry: Entry) -> None:
    """Print one entry in full."""
    console.print(f"{entry.kind} {entry.name}: {entry.meaning}")
    for label, fact in entry.facts.items():
        console.print(f"  {label}: {fact}")
    for depth, column, how in entry.made_from:
        console.print(f"{'  ' * (depth + 1)}from {column} ({how})")
    for one in entry.goes_to:
        console.print(f"  goes to {one}")
    for way, text in entry.read.items():
        console.print(f"  {way}: {text}")
