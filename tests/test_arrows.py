"""The dependency arrows of the design hold, read from the imports themselves."""

import ast
import sys
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "dagster_prefs"
ROOMS = (
    "declarations",
    "engine",
    "events",
    "deploy",
    "live",
    "dynamodb",
    "iceberg",
    "training",
    "values",
    "serving",
    "freshness",
    "erasure",
    "local",
    "defs",
    "console",
    "tools",
    "projects",
)

# A room may import itself, errors, environment, files, ids, addresses and pauses, and these rooms or modules.
ALLOWED = {
    "errors": set(),
    "environment": set(),
    "addresses": set(),
    "access": {"loopback"},
    "loopback": set(),
    "files": set(),
    "ids": set(),
    "pauses": set(),
    "printable": set(),
    "redaction": set(),
    # The format that the clients write and the training package reads.
    "served_rows": {"declarations"},
    "logs": {"printable", "redaction"},
    "textfiles": set(),
    # Which project is meant is a setting, and loads what it declares.
    "settings": {"declarations", "access"},
    "shipped": set(),
    "declarations": {"shipped"},
    # What it generates with is given to it.
    "projects": {"declarations", "settings", "shipped"},
    "engine": {"declarations", "redaction"},
    "dynamodb": {"declarations", "engine"},
    "events": {"declarations", "engine", "textfiles"},
    "iceberg": {"declarations", "engine", "redaction"},
    "deploy": {"declarations", "engine", "events", "dynamodb", "redaction"},
    "live": {"declarations", "engine", "events", "dynamodb"},
    "training": {"declarations", "engine", "dynamodb", "iceberg", "served_rows", "textfiles", "values"},
    "values": {"declarations", "engine", "iceberg"},
    "serving": {"declarations", "engine", "dynamodb", "access", "loopback", "logs", "served_rows"},
    "freshness": {
        "declarations",
        "engine",
        "dynamodb",
        "serving",
        "events",
        "iceberg",
        "training",
        "values",
        "live",
    },
    "erasure": {
        "declarations",
        "engine",
        "dynamodb",
        "events",
        "iceberg",
        "served_rows",
        "training",
        "values",
    },
    "local": {"declarations", "engine", "loopback", "logs"},
    "open_lineage": {"declarations"},
    "platform": set(ROOMS) - {"defs", "console", "tools", "projects"}
    | {"settings", "open_lineage", "served_rows"},
    "console": set(ROOMS) - {"defs", "tools"} | {"settings", "access", "loopback", "platform", "printable"},
    # On RisingWave the demo publishes with Dagster's job, as `prefs refresh` does.
    "tools": set(ROOMS) - {"console"} | {"platform", "settings", "runs"},
    "defs": set(ROOMS) - {"console"} | {"settings", "loopback", "platform"},
    "definitions": {"defs", "settings"},
    "component": {"defs", "settings"},
    "runs": {"defs", "settings"},
    "__main__": {"cli"},
    "cli": set(ROOMS) | {"access", "platform", "settings", "runs", "printable", "logs", "shipped"},
}
# Outside packages that only some places may import.
RESERVED = {
    "dagster": {"defs", "runs", "component"},
    "dagster_dbt": {"defs"},
    "dbt": {"engine"},
    "click": {"cli"},
    "starlette": {"serving", "defs", "console"},
    "uvicorn": {"serving", "defs", "console"},
    "fastapi": {"console"},
    "nicegui": {"console"},
    "pyiceberg": {"iceberg", "training", "values", "defs", "erasure", "freshness"},
    "moto": {"local"},
    "prometheus_client": {"freshness", "serving"},
    "opentelemetry": {"serving"},
    "pydantic_settings": {"settings"},
    "openlineage": {"open_lineage"},
}
MOST_PARAMETERS = 7


@cache
def parsed(path: Path) -> ast.Module:
    """Return the syntax tree of a file."""
    return ast.parse(path.read_text())


@cache
def imports() -> list[tuple[str, str, str]]:
    """(place, imported module, file and line) of every import, lazy ones and those for types included."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        inside = path.relative_to(PACKAGE)
        place = inside.parts[0].removesuffix(".py")
        if place == "__init__":
            continue
        tree = parsed(path)
        typing_only = {
            id(child)
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            for child in ast.walk(node)
        }
        for node in ast.walk(tree):
            if id(node) in typing_only:
                continue
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [(place, name, f"{inside}:{node.lineno}") for name in names]
    return found


def test_rooms_import_only_what_their_arrows_allow() -> None:
    wrong = []
    for place, name, where in imports():
        parts = name.split(".")
        if parts[0] != "dagster_prefs" or len(parts) < 2:
            continue
        target = parts[1]
        if target not in ALLOWED:
            continue
        if (
            target not in (place, "errors", "environment", "files", "ids", "addresses", "pauses")
            and target not in ALLOWED[place]
        ):
            wrong.append(f"{where}: {place} may not import {target}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", sorted(RESERVED))
def test_outside_packages_stay_in_their_rooms(package: str) -> None:
    wrong = [
        where
        for place, name, where in imports()
        if name.split(".")[0] == package and place not in RESERVED[package]
    ]
    assert not wrong, "\n".join(wrong)


def test_nothing_comes_from_inside_dagster() -> None:
    """Its underscored modules change in every release."""
    places = {
        where.partition(":")[0]
        for _, name, where in imports()
        if name.startswith(("dagster._", "dagster_dbt._", "dagster_webserver._"))
    }
    assert not places


def test_every_place_has_arrows() -> None:
    places = {
        path.name.removesuffix(".py") for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()
    }
    assert places - {"__init__", "__pycache__"} <= set(ALLOWED)


def test_no_test_imports_from_another_test_file() -> None:
    """A change of one test must not fail another; what several need lies in a module of its own."""
    wrong = [
        f"{path.name}:{node.lineno}: {node.module}"
        for path in sorted(Path(__file__).parent.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[-1].startswith("test_")
    ]
    assert not wrong, "\n".join(wrong)


def test_no_benchmark_is_named_like_a_module_of_python() -> None:
    """The folder of a program comes first on its path: all benchmarks would import that one."""
    names = {file.stem for file in (PACKAGE.parent / "benchmarks").glob("*.py")}
    assert "live" in names
    assert names & sys.stdlib_module_names == set()


def test_no_signature_has_more_than_seven_parameters() -> None:
    """What travels together is one value. click passes a command each of its options by name: those are left out."""
    found = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(parsed(path)):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if any(ast.unparse(one).startswith("click.option") for one in node.decorator_list):
                continue
            given = node.args
            parameters = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
            names = {one.arg for one in parameters if one is not None} - {"self", "cls"}
            if len(names) > MOST_PARAMETERS:
                found.add(f"{path.relative_to(PACKAGE).as_posix()}:{node.name}")
    assert not found


def test_no_module_changes_this_process_environment() -> None:
    """Settings reach dbt as the environment of a child process; `.env` is read once, before anything runs."""
    changing = ("update", "setdefault", "pop", "popitem", "clear", "putenv", "unsetenv")
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        inside = path.relative_to(PACKAGE).as_posix()
        for node in ast.walk(parsed(path)):
            match node:
                case ast.Attribute(value=ast.Attribute(attr="environ") | ast.Name(id="os" | "environ")):
                    changed = node.attr in changing
                case ast.Subscript(value=ast.Attribute(attr="environ") | ast.Name(id="environ")):
                    changed = not isinstance(node.ctx, ast.Load)
                case _:
                    changed = False
            if changed and inside not in ("settings.py", "engine/dbt_child.py"):
                wrong.append(f"{inside}:{node.lineno}")
    assert not wrong, "\n".join(wrong)
