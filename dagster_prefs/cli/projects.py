"""Commands for a project of one's own: create, test, extend and upgrade it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dagster_prefs.cli.generate import generate_project
from dagster_prefs.cli.root import cli, console, say, start_services
from dagster_prefs.errors import PrefsError
from dagster_prefs.projects import EXAMPLES
from dagster_prefs.settings import Settings, load_settings

if TYPE_CHECKING:
    from dagster_prefs.projects.add import Scaffold, Scaffolding


@cli.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--example",
    type=click.Choice(list(EXAMPLES)),
    help="What to start from; asked for on a terminal, else minimal.",
)
def init(folder: Path, example: str | None) -> None:
    """Create a project in a new FOLDER.

    `minimal` has one topic, one entity, one tile and one domain; `shop` and `engagement` are one business
    each; `full` is both.
    """
    from dagster_prefs.projects.create import create_project

    if example is None and sys.stdin.isatty():
        example = click.prompt("Start from", type=click.Choice(list(EXAMPLES)), default="minimal")
    written = create_project(folder, example or "minimal", generate_project)
    for name in [*written, "dbt_project/"]:
        say(f"wrote {folder / name}")
    say(f"next: cd {folder} && prefs demo")


@cli.command()
@click.option("--overwrite", is_flag=True, help="Discard edits of the shared macros.")
def upgrade(overwrite: bool) -> None:
    """Bring the project to this version of the package.

    Writes the shared macros and the lock, generates again, and shows the diff. If the project cannot be
    generated, nothing is changed.
    """
    from dagster_prefs.projects.upgrade import upgrade_project

    done = upgrade_project(load_settings().project, generate_project, overwrite=overwrite)
    if diff := done.changes.diff():
        say(diff)
        say(f"\n{len(done.changes.files)} files changed")
    else:
        say("every file was of this version")
    for what in done.look_at:
        say(f"look at: {what}")


@cli.command()
def test() -> None:
    """Run dbt's tests and the project's own.

    dbt's are the tests of data, contracts and units, on what is deployed; the project's are in its folder
    `tests`, for pytest. On the embedded engine, services are started and the project is deployed if nothing is.
    """
    from dagster_prefs.declarations.stale import current_registry

    settings = load_settings()
    current_registry(settings.project)
    failed = _dbt_tests(settings)
    folder = settings.home / "tests"
    if folder.is_dir() and any(folder.rglob("test_*.py")):
        failed += _python_tests(folder)
    if failed:
        raise PrefsError(f"{len(failed)} tests failed: {'; '.join(failed)}")
    console.print("every test passed")


def _dbt_tests(settings: Settings) -> list[str]:
    from dagster_prefs.platform import Platform

    start_services(settings)
    platform = Platform(settings)
    if settings.engine == "local" and not platform.is_deployed():
        console.print("  deploying what the project declares", style="dim")
        platform.apply()
    results = platform.dbt.run("test")
    console.print(f"dbt: {sum(result.ok for result in results)} of {len(results)} tests passed")
    return [f"{result.name}: {result.message}" for result in results if not result.ok]


def _python_tests(folder: Path) -> list[str]:
    if find_spec("pytest") is None:
        raise PrefsError(
            f"{folder} has tests, and pytest is not installed: install it (`uv pip install pytest`)"
        )
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", str(folder)], cwd=folder.parent, check=False)
    return [f"pytest in {folder} ended with exit code {done.returncode}"] if done.returncode else []


@cli.group()
def add() -> None:
    """Scaffold a declaration with its SQL.

    What is written is a worked example: it can be deployed as it is, and is then edited.
    """


@add.command("entity")
@click.argument("name")
@click.option("--key", "keys", multiple=True, help="A key column, column:type; several make a composite key.")
def add_entity(name: str, keys: tuple[str, ...]) -> None:
    """Declare an entity NAME, by default with the key NAME_id of type text."""
    _add(lambda project: project.entity(name, keys))


@add.command("topic")
@click.argument("name")
@click.option("--entity", help="The entity that an event describes, where the project has several.")
def add_topic(name: str, entity: str | None) -> None:
    """Declare a topic NAME."""
    _add(lambda project: project.topic(name, entity=entity))


@add.command("tile")
@click.argument("name")
@click.option("--topic", help="The topic whose events are counted, where the project has several.")
def add_tile(name: str, topic: str | None) -> None:
    """Write a daily tile NAME (usually …_1d) over a topic."""
    _add(lambda project: project.tile(name, topic=topic))


@add.command("domain")
@click.argument("name")
@click.option("--tile", help="The tile behind the attributes, where the project has several.")
def add_domain(name: str, tile: str | None) -> None:
    """Write a domain NAME (or PRODUCT#NAME) with its rolling view over a tile."""
    _add(lambda project: project.domain(name, tile=tile))


@add.command("attribute")
@click.argument("name")
@click.option("--domain", help="The domain to extend, where the project has several.")
@click.option("--column", help="The tile's column to add up; without it the tile's rows are counted.")
def add_attribute(name: str, domain: str | None, column: str | None) -> None:
    """Add an attribute NAME (usually …_28d) to a domain."""
    _add(lambda project: project.attribute(name, domain=domain, column=column))


def _add(scaffold: Callable[[Scaffolding], Scaffold]) -> None:
    from dagster_prefs.projects.add import Scaffolding

    project = Scaffolding(load_settings().project)
    done = project.add(scaffold(project), generate_project)
    for name in done.changes.files:
        say(f"wrote {project.folder / name}")
    for step in done.next_steps:
        say(f"next: {step}")
