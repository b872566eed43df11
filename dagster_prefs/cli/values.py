"""Commands that show whether values are sensible: statistics and drift."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

import click

from dagster_prefs.cli.root import cli, console, print_json, table_of
from dagster_prefs.errors import PrefsError
from dagster_prefs.settings import load_settings

if TYPE_CHECKING:
    from dagster_prefs.values.statistics import Statistics


@cli.command()
@click.argument("relation", required=False)
@click.option("--collect", is_flag=True, help="First describe the complete days that are new or changed.")
@click.option(
    "--days", type=click.IntRange(1, 400), help="With --collect: how many days back; by default 35."
)
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
def statistics(relation: str | None, collect: bool, days: int | None, as_json: bool) -> None:
    """Show what the values of every attribute are like.

    Of the newest complete day of each tile, and of each rolling view when it was last described.
    """
    from dagster_prefs.platform import Platform

    if days is not None and not collect:
        raise click.UsageError("--days says how far --collect reaches back: add --collect")
    platform = Platform(load_settings())
    if collect:
        described = platform.collect_statistics(now=datetime.now(UTC), days=days)
        if not as_json:
            console.print(f"{len(described):,} days of tiles and views described")
    found = platform.statistics()
    if relation is not None and relation not in found:
        raise PrefsError(
            f"there are no statistics of {relation}: there are some of {', '.join(found) or 'nothing'}; "
            "`prefs statistics --collect` describes what is new"
        )
    chosen = {name: one for name, one in found.items() if relation in (None, name)}
    if as_json:
        print_json(
            {
                name: {attribute: one.as_dict() for attribute, one in attributes.items()}
                for name, attributes in chosen.items()
            }
        )
        return
    if not chosen:
        console.print("there are no statistics yet: run `prefs statistics --collect`")
    for name, attributes in chosen.items():
        first = next(iter(attributes.values()))
        console.print(
            table_of(
                f"{name}, {first.day}, {first.rows:,} rows",
                ["attribute", "missing", "distinct", "least", "median", "greatest", "mean", "most frequent"],
                [_line(one) for one in attributes.values()],
            )
        )
        console.print()


def _line(one: Statistics) -> tuple[object, ...]:
    return (
        one.attribute,
        f"{one.null_share:.1%}",
        f"{one.distinct:,}",
        _number(one, one.minimum),
        _number(one, one.quantiles_by_share.get(0.5)),
        _number(one, one.maximum),
        _number(one, one.mean),
        ", ".join(f"{value} {rows / max(1, one.known):.0%}" for value, rows in one.values[:3]) or None,
    )


def _number(one: Statistics, value: float | None) -> object:
    if value is None or one.kind != "time":
        return None if value is None else f"{value:g}"
    return datetime.fromtimestamp(value, UTC)


@cli.command()
@click.option("--day", type=click.DateTime(["%Y-%m-%d"]), help="The UTC day; by default each tile's newest.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
def drift(day: datetime | None, as_json: bool) -> int:
    """Compare a day's values with earlier days of its weekday.

    Exit code 0 for ok and learning, 1 for warnings, 2 for errors.
    """
    from dagster_prefs.platform import Platform
    from dagster_prefs.values.drift import EXIT_CODES, worst

    causes = Platform(load_settings()).drift(day.date() if day else None)
    level = worst(cause.level for cause in causes)
    if as_json:
        print_json({"level": level, "causes": [cause.as_dict() for cause in causes]})
        return EXIT_CODES[level]
    if not causes:
        console.print("there are no statistics to compare: run `prefs statistics --collect`")
    for cause in causes:
        console.print(f"{cause.name}: {cause.level}: {cause.reason}")
        rows = [
            (
                one.relation,
                finding.attribute or "(rows)",
                finding.level,
                None if finding.psi is None else f"{finding.psi:.3f}",
                None if finding.ks is None else f"{finding.ks:.3f}",
                finding.what or None,
            )
            for one in cause.days
            for finding in one.findings
        ]
        console.print(table_of("", ["tile", "attribute", "level", "PSI", "KS", "what"], rows))
        console.print()
    return EXIT_CODES[level]
