"""The dependency arrows of the design hold, read from the imports themselves."""

import ast
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "dagster_prefs"
ROOMS = ("declarations", "engine", "events", "online", "offline", "serving", "freshness", "local", "defs")

# A room may import itself, the errors, private files, how ids and addresses are read, and these rooms or modules.
ALLOWED = {
    "errors": set(),
    "addresses": set(),
    "loopback": set(),
    "files": set(),
    "ids": set(),
    "printable": set(),
    "textfiles": set(),
    # Which project is meant is a setting, and loads what it declares.
    "settings": {"declarations"},
    "declarations": set(),
    "engine": {"declarations", "settings"},
    "online": {"declarations", "engine"},
    "events": {"declarations", "engine", "online", "settings", "textfiles"},
    "offline": {"declarations", "engine", "online", "serving", "settings", "textfiles"},
    "serving": {"declarations", "engine", "online", "loopback"},
    "freshness": {"declarations", "engine", "online", "serving", "events", "offline", "settings"},
    "local": {"declarations", "engine", "online", "settings", "loopback"},
    "erasure": {"declarations", "engine", "online", "offline", "events", "settings"},
    "cost": {"declarations", "online", "offline"},
    "platform": {"declarations", "engine", "events", "freshness", "offline", "online", "settings"},
    "defs": set(ROOMS) | {"settings", "loopback", "platform"},
    "definitions": {"declarations", "defs", "platform", "settings"},
    "runs": {"defs", "definitions", "settings"},
    "demo": set(ROOMS) | {"platform", "settings", "runs"},
    "__main__": {"cli"},
    "cli": set(ROOMS) | {"platform", "settings", "runs", "demo", "erasure", "cost", "printable"},
}
# Outside packages that only some places may import.
RESERVED = {
    "dagster": {"defs", "definitions", "runs"},
    "dagster_dbt": {"defs"},
    "dbt": {"engine"},
    "click": {"cli"},
    "starlette": {"serving", "defs"},
    "uvicorn": {"serving", "defs"},
    "pyiceberg": {"offline", "defs", "erasure", "freshness"},
    "moto": {"local"},
    "pydantic_settings": {"settings"},
}


@cache
def imports() -> list[tuple[str, str, str]]:
    """(place, imported module, file and line) of every import, lazy ones and those for types included."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        inside = path.relative_to(PACKAGE)
        place = inside.parts[0].removesuffix(".py")
        if place == "__init__":
            continue
        tree = ast.parse(path.read_text())
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
        if target not in (place, "errors", "files", "ids", "addresses") and target not in ALLOWED[place]:
            wrong.append(f"{where}: {place} may not import {target}")
    assert wrong == []


@pytest.mark.parametrize("package", sorted(RESERVED))
def test_outside_packages_stay_in_their_rooms(package: str) -> None:
    wrong = [
        where
        for place, name, where in imports()
        if name.split(".")[0] == package and place not in RESERVED[package]
    ]
    assert wrong == []


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
    assert wrong == []
