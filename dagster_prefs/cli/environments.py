"""Commands for the environments that share an engine, a Kafka and an AWS account."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from dagster_prefs.cli.root import cli, console, print_json, say, services_of, table_of
from dagster_prefs.environment import Environment
from dagster_prefs.errors import PrefsError
from dagster_prefs.settings import load_settings

if TYPE_CHECKING:
    from dagster_prefs.tools.environments import Found, Holdings

MIB = 1024 * 1024
# The engine notices some moments later that the process of a follower has ended.
PATIENCE_SECONDS = 10.0


@cli.group()
def environment() -> None:
    """Show and remove the environments of PREFS_ENVIRONMENT."""


@environment.command("list")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
def list_environments(as_json: bool) -> None:
    """Show what each environment made, and what its storage costs.

    The dollars a month are AWS's list prices for DynamoDB's and Iceberg's storage; requests and the engine are extra.
    """
    from dagster_prefs.tools.cost import Prices
    from dagster_prefs.tools.environments import Environments

    settings, prices = load_settings(), Prices()
    found = Environments(settings).find()
    if as_json:
        print_json(
            {
                "environments": [one.as_dict(prices) for one in found.environments.values()],
                "unread": dict(found.unread),
            }
        )
        return
    for name, one in found.environments.items():
        mark = " (this one)" if name == settings.environment else ""
        console.print(
            table_of(
                f"{name}{mark}: ${one.dollars_a_month(prices)} a month", ["part", "name", "size"], parts(one)
            )
        )
        console.print()
    if not found.environments:
        console.print("there is no environment: PREFS_ENVIRONMENT=dev_you and `prefs apply` make one")
    _tell_unread(found)


@environment.command()
@click.argument("name")
@click.option("--yes", is_flag=True, help="Ask nothing; refused for production.")
def drop(name: str, yes: bool) -> None:
    """Remove all that an environment made: schema, tables, training tables, consumer groups, local state.

    Asks for the name first, and for production twice. Tables that Terraform owns stay. Safe to run again.
    """
    from dagster_prefs.tools.cost import Prices
    from dagster_prefs.tools.environments import Environments

    settings = load_settings()
    # Only checked here: the name is one before any store is asked.
    named = settings.of_environment(name).named
    if named is None:
        raise PrefsError("an environment has a name: give it")
    if yes and named.is_production:
        raise PrefsError(
            f"--yes is refused for {name}, which is production: run it in a terminal and confirm twice"
        )
    environments = Environments(settings)
    found = environments.find(named)
    if found.unread:
        _tell_unread(found)
        raise PrefsError(
            f"what {name} made cannot be shown as long as a store cannot be read: correct it, then run it again"
        )
    one = found.environments[name]
    if one.is_empty:
        console.print(f"nothing of environment {name} is left")
        return
    console.print(
        table_of(f"{name}: ${one.dollars_a_month(Prices())} a month", ["part", "name", "size"], parts(one))
    )
    if not yes:
        _confirm(named, one)
    if settings.engine == "local":
        services_of(settings).unfollow(name)
    environments.drop(named, say, patience_seconds=PATIENCE_SECONDS)
    console.print(f"nothing of environment {name} is left, except what the lines above say")


def parts(one: Holdings) -> list[tuple[str, str, str]]:
    """Return the rows of a table of what an environment made: part, name and size."""
    named = one.environment
    rows = []
    if one.schema is not None:
        size = f"{one.schema.relations:,} relations, {_mib(one.schema.size_bytes)}"
        rows.append(("engine's schema", named.schema, size))
    rows += [
        ("DynamoDB table", table.name, f"{table.items:,} items, {_mib(table.size_bytes)}")
        for table in one.tables
    ]
    if one.namespace is not None:
        lake = one.namespace
        size = f"{len(lake.tables):,} tables, {lake.files:,} files, {_mib(lake.size_bytes)}"
        rows.append(("Iceberg namespace", lake.name, size))
    rows += [("consumer group", group, "") for group in one.groups]
    if one.state_bytes:
        rows.append(("local state", f"environments/{named.name}", _mib(one.state_bytes)))
    rows.append(("Terraform workspace", named.workspace, ""))
    return rows


def _confirm(named: Environment, one: Holdings) -> None:
    _asked(named, f"All of this is deleted, with {one.items:,} items. Type the environment's name to go on")
    if named.is_production:
        _asked(
            named,
            "This is production: its services lose every profile now, and nothing brings it back but a backup. "
            "Type the name again",
        )


def _asked(named: Environment, question: str) -> None:
    if click.prompt(question, prompt_suffix=": ") != named.name:
        raise PrefsError(f"that is not {named.name}: nothing was dropped")


def _tell_unread(found: Found) -> None:
    for store, reason in found.unread.items():
        say(f"{store} could not be read: {reason}", stderr=True)


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / MIB:,.1f} MiB"
