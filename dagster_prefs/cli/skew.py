"""The command that compares what was served with what training says was served."""

from __future__ import annotations

from pathlib import Path

import click

from dagster_prefs.cli.root import cli, console, print_json, table_of
from dagster_prefs.cli.training import served_log_places
from dagster_prefs.settings import load_settings


@cli.command()
@click.argument("log", nargs=-1, type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output, with examples.")
def skew(log: tuple[Path, ...], as_json: bool) -> int:
    """Compare the served log with training sets.

    Every difference from what a training set says was served is classed.

    LOG are files or folders of the log, by default the folder of PREFS_SERVED_LOG. Exit code 2 if a value is wrong.
    """
    from dagster_prefs.platform import Platform
    from dagster_prefs.training.skew import CAUSES

    platform = Platform(load_settings())
    report = platform.skew(served_log_places(platform.settings, log))
    code = 2 if report.causes["wrong"] else 0
    if as_json:
        print_json(report.as_dict())
        return code
    causes = [cause for cause in CAUSES if report.causes[cause]]
    rows = [
        (
            f"{one.domain}.{one.attribute}",
            f"{one.compared:,}",
            f"{one.equal_share:.3%}",
            *(f"{one.causes[cause]:,}" for cause in causes),
        )
        for one in report.attributes.values()
    ]
    console.print(table_of("", ["attribute", "compared", "equal", *causes], rows))
    console.print(
        f"{report.rows:,} rows, {report.repeated:,} of them repeated, {report.failed:,} without values; "
        f"{report.compared:,} values compared"
    )
    for reason, number in report.refused.items():
        console.print(f"{number:,} rows cannot be answered: {reason}")
    for name, number in report.unknown.items():
        console.print(f"{number:,} rows are of {name}, which the project does not have")
    for name in sorted(report.left_out):
        console.print(f"{name} is not computed by training sets")
    if report.behind_seconds:
        told = ", ".join(f"{seconds:.3f} s ({share:.0%})" for share, seconds in report.behind_seconds.items())
        console.print(f"values that differ were behind by {told}")
    return code
