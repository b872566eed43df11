"""The command that generates models and registry from a project's declarations."""

from __future__ import annotations

from pathlib import Path

import click

from dagster_prefs.cli.root import cli, say
from dagster_prefs.errors import PrefsError
from dagster_prefs.settings import load_settings


@cli.group(invoke_without_command=True)
@click.option("--check", is_flag=True, help="Write nothing; exit 1 naming the files that are out of date.")
@click.pass_context
def generate(context: click.Context, check: bool) -> None:
    """Generate models and registry from the project's YAML.

    The project is that of PREFS_PROJECT_DIR, or of the working folder.
    """
    if context.invoked_subcommand is not None:
        return
    from dagster_prefs.declarations.generate import check_current
    from dagster_prefs.declarations.registry import find_project

    project = find_project(named=load_settings().project_dir)
    if check:
        check_current(project)
        say(f"{project}: every generated file matches the declarations")
        return
    changed = generate_project(project)
    for name in changed:
        say(f"{'wrote' if (project / name).exists() else 'removed'} {name}")
    if not changed:
        say("every generated file was current")


def generate_project(project: Path) -> list[str]:
    """Generate models and registry with dbt as the compiler; return the files that changed.

    Raises PrefsError, with nothing written, for an invalid declaration and for a view whose features training
    sets cannot compute for past days.
    """
    from dagster_prefs.declarations.generate import generate_files
    from dagster_prefs.engine.dbt import compile_queries
    from dagster_prefs.training.windows import features_by_entity

    return generate_files(project, compile_queries, features_by_entity)


@generate.command("client")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--check", is_flag=True, help="Write nothing; exit 1 when the file is out of date.")
def generate_client(file: Path, check: bool) -> None:
    """Generate typed clients in a Python FILE.

    It contains the dataclasses of every entity's profiles, and clients that return them.
    """
    from dagster_prefs.serving.generate import COMMAND, render_client

    wanted = render_client(load_settings().registry().contract)
    try:
        if file.is_file() and file.read_text(encoding="utf-8") == wanted:
            say(f"{file} is up to date")
            return
        if check:
            raise PrefsError(f"{file} is out of date: run `{COMMAND} {file}`")
        file.write_text(wanted, encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise PrefsError(f"{file} cannot be written ({reason}): name another file") from None
    say(f"wrote {file}")
