"""The documentation as far as no service is needed: its reference, YAML, changes, and the marks of its blocks."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from documented import GUIDES, MARKS, PAGES, ROOT, SHELL, Block, Reader, blocks
from own_projects import contents, generate

import dagster_prefs
from dagster_prefs.cli import cli
from dagster_prefs.declarations import (
    check,
    check_domains,
    check_drift,
    check_tiles,
    check_topics,
    check_views,
)
from dagster_prefs.declarations.contract import parse_contract
from dagster_prefs.declarations.generate import check_current, plan_files
from dagster_prefs.projects.create import create_project

BLOCKS = [block for page in PAGES for block in blocks(page)]


def reference() -> Any:
    """The generator of the reference, which is no module of the package."""
    specification = importlib.util.spec_from_file_location(
        "reference", ROOT / "docs" / "reference" / "generate.py"
    )
    assert specification
    assert specification.loader
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_the_reference_is_what_the_code_says() -> None:
    made = reference()
    assert list(made.stale_pages()) == [], f"run `{made.COMMAND}`"
    text = {name: page() for name, page in made.PAGES.items()}
    # Each page has what it is about.
    for name, wanted in {
        "settings.md": "| `PREFS_ENGINE_HOST` | `127.0.0.1` | Host of the engine. |",
        "cli.md": "## prefs rejected replay\n\n    prefs rejected replay [OPTIONS] [FILE]\n",
        "declarations.md": "`keep`",
        "python.md": "### ProfileClient.get_many\n",
        "http.md": "## GET /v1/profiles/{viewer_id}\n",
        "metrics.md": "| `prefs_reads_total` | counter | entity, domain, outcome |",
    }.items():
        assert wanted in text[name], name


def test_a_stale_page_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    made = reference()
    monkeypatch.setattr(made, "PAGES", {"cli.md": lambda: "# Commands of tomorrow\n"})
    monkeypatch.setattr("sys.argv", ["generate.py", "--check"])
    before = (ROOT / "docs" / "reference" / "cli.md").read_text()
    with pytest.raises(SystemExit, match="make reference"):
        made.main()
    assert capsys.readouterr().out == "out of date: docs/reference/cli.md\n"
    assert (ROOT / "docs" / "reference" / "cli.md").read_text() == before


@pytest.mark.parametrize(
    ("section", "keys"),
    [
        ("Entities", check.ENTITY_KEYS),
        ("Topics", (*check_topics.TOPIC_KEYS, *check_topics.FIELD_META)),
        ("Tiles", (*check_tiles.TILE_KEYS, *check_tiles.TILE_META)),
        ("Tiles", (*check_drift.TILE_DRIFT_KEYS, *check_drift.COLUMN_DRIFT_KEYS)),
        ("Domains", (*check_domains.DOMAIN_KEYS, *check_domains.HEAD_KEYS)),
        ("Preference views", check_views.PREFERENCE_KEYS),
        ("How a view is kept current", check_views.KEEP_KEYS),
    ],
)  # fmt: skip
def test_every_key_of_a_declaration_is_explained(section: str, keys: tuple[str, ...]) -> None:
    text = (ROOT / "docs" / "declarations.md").read_text().split(f"\n## {section}\n")[1].split("\n## ")[0]
    explained = set(re.findall(r"`([a-z_]+)", text))
    assert set(keys) - explained == set()


@pytest.mark.parametrize("block", [one for one in BLOCKS if one.language], ids=str)
def test_a_block_says_what_it_is_and_needs(block: Block) -> None:
    assert block.language in (*SHELL, "diff", "python", "sql", "yaml")
    assert block.mark in {"", *MARKS}
    if block.language == "diff":
        assert block.file, "name the file in a code span before the change"


def merge(file: Path, part: dict[str, Any]) -> None:
    """Put a part of a page into the one model of a file."""
    content = yaml.safe_load(file.read_text())
    (model,) = content["models"]
    if "config" in part:
        model["config"]["meta"]["tile"] |= part["config"]["meta"]["tile"]
    for column in part["columns"]:
        (changed,) = [one for one in model["columns"] if one["name"] == column["name"]]
        changed |= column
    file.write_text(yaml.safe_dump(content, sort_keys=False))


def test_the_declarations_of_the_pages_are_accepted(tmp_path: Path) -> None:
    """Each YAML block, in a copy of the shipped project where its page says that it belongs."""
    project = tmp_path / "dbt_project"
    shutil.copytree(ROOT / "dbt_project", project, ignore=shutil.ignore_patterns("target", "logs"))
    before = contents(project)
    found = [block for block in BLOCKS if block.language == "yaml"]
    models = project / "models" / "engagement"
    for block in found:
        if block.text.startswith("models:"):
            (name,) = [one["name"] for one in yaml.safe_load(block.text)["models"]]
            (models / f"{name}.yml").write_text("version: 2\n" + block.text)
        elif block.text.startswith("topic:"):
            # Another declaration of the topic whose model is on the page about declarations, which comes before.
            file = models / "search_events.yml"
            content = yaml.safe_load(file.read_text())
            content["models"][0]["config"]["meta"] |= yaml.safe_load(block.text)
            file.write_text(yaml.safe_dump(content, sort_keys=False))
        elif block.text.startswith("enrolment:"):
            file = project / "dbt_project.yml"
            file.write_text(file.read_text().replace("  entities:\n", f"  entities:\n    {block.text}"))
        elif "retired" in block.text:
            merge(models / "viewer_engagement_rolling.yml", {"columns": yaml.safe_load(block.text)})
        elif "drift" in block.text:
            # It begins within the model's meta.
            part = yaml.safe_load(f"config:\n  meta:\n{block.text.replace('    columns', 'columns', 1)}")
            merge(models / "viewer_watch_metrics_1d.yml", part)
        elif block.text.startswith("topic:"):
            file = models / "search_events.yml"
            content = yaml.safe_load(file.read_text())
            content["models"][0]["config"]["meta"] |= yaml.safe_load(block.text)
            file.write_text(yaml.safe_dump(content, sort_keys=False))
        elif block.text.startswith("type: dagster_prefs.PreferencePlatform"):
            dagster_prefs.PreferencePlatform.get_model_cls().model_validate(
                yaml.safe_load(block.text)["attributes"]
            )
        elif block.text.startswith("packages:"):
            # Of another dbt project, see tests/dbt/test_as_package.py.
            (package,) = yaml.safe_load(block.text)["packages"]
            assert package == {"local": "../preferences/dbt_project"}
        else:
            pytest.fail(f"{block}: say here where it belongs")
    assert len(contents(project)) > len(before)
    declared = plan_files(project).declarations
    assert "search_events" in {topic.declared.name for topic in declared.topics}
    assert declared.entities["enrolment"].key_names == ("learner_id", "course_id")
    served = parse_contract(declared.contract).domains["engagement#watch"].attributes
    assert "titles_7d" not in served
    assert served
    (tile,) = [
        tile.declared for tile in declared.tiles if tile.declared.relation == "viewer_watch_metrics_1d"
    ]
    assert tile.drift == {"rows": {"warn": 1.5, "error": 3}, "min_rows": 500}


@pytest.mark.parametrize("block", [one for one in BLOCKS if one.language == "python"], ids=str)
def test_the_python_of_the_pages_imports_what_is_there(block: Block) -> None:
    compile(block.text, str(block), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    for module, names in re.findall(r"(?m)^from (dagster_prefs\.serving[\w.]*) import (.+)$", block.text):
        for name in names.split(", "):
            assert hasattr(importlib.import_module(module), name), name


def test_the_changes_of_the_guides_are_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every edit and scaffold, one guide after another as a reader makes them; `make test-docs` runs all the rest."""
    home = tmp_path / "my-platform"
    create_project(home, "minimal", generate)
    monkeypatch.setenv("PREFS_PROJECT_DIR", str(home / "dbt_project"))
    monkeypatch.setattr("dagster_prefs.cli.projects.generate_project", generate)
    monkeypatch.setattr("dagster_prefs.cli.generate.generate_project", generate)

    def run(
        words: list[str], environment: Mapping[str, str], folder: Path
    ) -> subprocess.CompletedProcess[str]:
        if words[0] not in ("add", "generate", "schema"):
            return subprocess.CompletedProcess(words, 0, "", "")
        done = CliRunner().invoke(cli, words)
        return subprocess.CompletedProcess(words, done.exit_code, done.output, str(done.exception or ""))

    reader = Reader(home, os.environ, run)
    for name in GUIDES:
        reader.follow(ROOT / "docs" / "guides" / f"{name}.md", {})
    declared = check_current(home / "dbt_project")
    assert set(declared.contract.domains) == {"site#pages", "site#purchases", "site#attention", "site#basket"}
    assert set(declared.contract.domains["site#pages"].attributes) >= {"days_28d", "shares_28d"}
    assert "price_28d" in declared.contract.domains["site#purchases"].attributes
    assert declared.contract.domains["site#attention"].owner == "growth@example.com"
    assert {path.stem for path in (ROOT / "docs" / "guides").glob("*.md")} == set(GUIDES)


def test_the_pages_name_this_version() -> None:
    named = {
        version
        for block in BLOCKS
        for version in re.findall(r"dagster[-_]prefs-([0-9][0-9.]*[0-9])-py3", block.text)
    }
    assert named == {dagster_prefs.__version__}
