"""What the README says is true: its commands exist, its links lead somewhere, its Python runs."""

import ast
import inspect
import os
import re
import shlex
import subprocess
from pathlib import Path

import click
import pytest
from documented import PAGES

from dagster_prefs.cli import cli
from dagster_prefs.declarations.contract import load_contract

PROJECT = Path(__file__).parents[1]
README = (PROJECT / "README.md").read_text()
DOCUMENTS = PAGES
# Folders that the text of a page may leave out of a path.
ROOTS = (PROJECT, PROJECT / "dagster_prefs", PROJECT / "dbt_project")


def commands(text: str, program: str) -> list[list[str]]:
    """Calls of a program in code blocks and in code spans, as words."""
    code = re.findall(r"```(?:ba)?sh[^\n]*\n(.*?)```", text, re.S) + re.findall(r"`([^`\n]+)`", text)
    lines = [line.split(" #")[0].strip() for block in code for line in block.splitlines()]
    return [shlex.split(line) for line in lines if re.match(rf"{program}( |$)", line) and "…" not in line]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", document.read_text()):
        if target.startswith("http"):
            continue
        page = document.parent / target if target else document
        assert page.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
            anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, f"{target}#{anchor}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_paths_of_the_repository_exist(document: Path) -> None:
    """Checks code spans that name a folder (`x/`), or a file below a folder of the repository."""
    text = re.sub(r"```.*?```", "", document.read_text(), flags=re.S)
    for path in re.findall(r"`([\w-]+/(?:[\w.-]+/)*(?:[\w.-]*\.[a-zA-Z]+)?)`", text):
        if document.parent.name == "guides" and path.startswith("dbt_project/models/"):
            continue  # of the reader's project: tests/end_to_end/test_wheel.py edits it
        if path.startswith("logs/"):
            continue  # of the data folder; a run of dbt by hand leaves a folder of this name in its project
        if any((root / path.split("/")[0]).is_dir() for root in ROOTS):
            assert any((root / path).exists() for root in ROOTS), path


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_make_targets_exist(document: Path) -> None:
    makefile = (PROJECT / "Makefile").read_text()
    for _, *targets in commands(document.read_text(), "make"):
        for target in targets:
            assert re.search(rf"^{re.escape(target)}:", makefile, re.M), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_prefs_commands_parse(document: Path) -> None:
    for _, *words in commands(document.read_text(), "prefs"):
        command: click.Command = cli
        context = click.Context(cli, info_name="prefs", **cli.context_settings)
        # A group that also works by itself takes options of its own.
        while isinstance(command, click.Group) and words and not words[0].startswith("-"):
            found = command.get_command(context, words[0])
            assert found is not None, words
            command, words = found, words[1:]
            context = click.Context(command, parent=context, **command.context_settings)
        if words:
            command.make_parser(context).parse_args(list(words))


def test_the_snippet_names_what_exists() -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.S)
    compile(snippet, "README.md", "exec")
    from dagster_prefs import serving

    for name in re.findall(r"from dagster_prefs.serving import (\w+)", snippet):
        assert hasattr(serving, name)
    (made,) = [
        node
        for node in ast.walk(ast.parse(snippet))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "ProfileClient"
    ]
    given = {str(word.arg): ast.literal_eval(word.value) for word in made.keywords}
    inspect.signature(serving.ProfileClient).bind(*map(ast.literal_eval, made.args), **given)
    assert (PROJECT / ast.literal_eval(made.args[0])).is_file()
    contract = load_contract(PROJECT / "dbt_project")
    for domain, attribute in re.findall(r"profile\.(\w+)\.(\w+)", snippet):
        assert attribute in contract.domain(domain).attributes


def test_ci_runs_the_readmes_test_command() -> None:
    assert "```bash\nmake test\n```" in README
    assert re.search(r"^make test$", (PROJECT / ".ci" / "run").read_text(), re.M)


def test_make_demo_and_make_help_say_what_they_do() -> None:
    # The suite itself runs under make, whose flags would make these calls announce their directory.
    shell = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}

    def make(*words: str) -> str:
        return subprocess.run(
            ["make", *words], cwd=PROJECT, env=shell, capture_output=True, text=True, check=True
        ).stdout

    assert make("--dry-run", "demo", "PYTHON=true").strip().endswith("prefs demo")
    listed = make("help")
    for target in ("demo", "ui", "down", "test", "clean"):
        assert re.search(rf"make {target} ", listed)
