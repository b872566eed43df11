"""The command that shows where a column comes from and where it goes."""

from __future__ import annotations

from typing import Any

import click

from dagster_prefs.cli.root import cli, console, print_json, table_of
from dagster_prefs.settings import load_settings


@cli.command()
@click.argument("column")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
def lineage(column: str, as_json: bool) -> None:
    """Show where a COLUMN comes from and goes to.

    COLUMN is a domain's attribute (progress.lessons_7d), a relation's or training table's column
    (learner_lessons_1d.seconds), or a topic's field (lesson_events.subject).
    """
    from dagster_prefs.declarations.lineage import column_of, load_lineage, shown_kinds, walk
    from dagster_prefs.declarations.stores import stores_of

    settings = load_settings()
    registry = settings.registry()
    known = load_lineage(settings.project, registry)
    found = column_of(column, registry, known)
    fields, goes_to = known.fields(found), known.goes_to(found)
    stores = [(str(one), store) for one in (found, *sorted(goes_to)) for store in stores_of(one, registry)]
    if as_json:
        steps = [
            {"of": one.of, "name": one.name, "field": one.is_field, "how": shown_kinds(kinds)}
            for one, kinds in sorted(known.sources(found).items())
        ]
        answer: dict[str, Any] = {
            "of": found.of,
            "name": found.name,
            "field": found.is_field,
            "sources": steps,
            "fields": [
                {"topic": one.of, "field": one.name, "how": shown_kinds(kinds)}
                for one, kinds in sorted(fields.items())
            ],
            "goes_to": [
                {"of": one.of, "name": one.name, "how": shown_kinds(kinds)}
                for one, kinds in sorted(goes_to.items())
            ],
            "stores": [{"column": name} | store for name, store in stores],
        }
        print_json(answer)
        return
    console.print(f"{'field' if found.is_field else 'column'} {found}")
    for depth, one, kinds in walk(known, found):
        what = f"field {one.name} of topic {one.of}" if one.is_field else str(one)
        console.print(f"{'  ' * (depth + 1)}{what} ({shown_kinds(kinds)})")
    if fields:
        rows = [(str(one), shown_kinds(kinds)) for one, kinds in sorted(fields.items())]
        console.print(table_of("\nDepends on these fields", ["field", "how"], rows))
    if goes_to:
        rows = [(str(one), shown_kinds(kinds)) for one, kinds in sorted(goes_to.items())]
        console.print(table_of("\nIs part of", ["column", "how"], rows))
    if stores:
        rows = [(name, store["text"]) for name, store in stores]
        console.print(table_of("\nIs stored in", ["column", "store"], rows))
