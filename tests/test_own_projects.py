"""A project of one's own: created from every example, extended by scaffolds, and brought to another version."""

from __future__ import annotations

import json
import re
import subprocess
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from own_projects import ROOT, build_source, build_wheel, contents, generate
from packaging.requirements import Requirement

import dagster_prefs
from dagster_prefs.cli import cli
from dagster_prefs.cli import projects as commands
from dagster_prefs.declarations import macros
from dagster_prefs.declarations.generate import check_current
from dagster_prefs.declarations.read import DeclarationError
from dagster_prefs.declarations.registry import find_project, load_registry
from dagster_prefs.declarations.stale import StaleRegistry, current_registry
from dagster_prefs.errors import PrefsError
from dagster_prefs.projects import EXAMPLES
from dagster_prefs.projects.add import Scaffold, Scaffolding
from dagster_prefs.projects.create import create_project
from dagster_prefs.projects.staged import ProjectRefused
from dagster_prefs.projects.upgrade import upgrade_project
from dagster_prefs.settings import load_settings

FULL = {"items", "user.events", "view_events", "content_interactions"}
TOPICS = {
    "minimal": {"page_views"},
    "shop": {"items", "user.events"},
    "engagement": {"view_events", "content_interactions"},
    "full": FULL,
}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The dbt project of a new project from the minimal example."""
    create_project(tmp_path / "my-platform", "minimal", generate)
    return tmp_path / "my-platform" / "dbt_project"


def refuse(folder: Path) -> None:
    """Take the place of a generation that fails."""
    raise PrefsError(f"{folder} cannot be generated")


# Creating


@pytest.mark.parametrize("example", EXAMPLES)
def test_every_example_becomes_a_whole_project(tmp_path: Path, example: str) -> None:
    home = tmp_path / "My-Platform"
    home.mkdir()
    written = create_project(home, example, generate)
    assert set(written) == {
        ".env.example", ".github/workflows/ci.yml", ".gitignore", "README.md", "pyproject.toml", "requirements.lock",
        "tests/test_project.py", "wheels/.gitkeep", "workspace.yaml",
    }  # fmt: skip
    assert {path.name for path in home.iterdir()} == {name.split("/")[0] for name in written} | {
        "dbt_project"
    }
    registry = check_current(home / "dbt_project")
    assert (set(registry.topics), registry.project) == (TOPICS[example], "my_platform")
    content = yaml.safe_load((home / "dbt_project" / "dbt_project.yml").read_text())
    assert (content["name"], content["profile"], list(content["models"])) == (
        "my_platform",
        "my_platform",
        ["my_platform"],
    )
    assert list(yaml.safe_load((home / "dbt_project" / "profiles.yml").read_text())) == ["my_platform"]
    listed = re.findall(
        r"# Name of topic (\S+) in Kafka\.\n#PREFS_KAFKA_TOPIC_\w+=(\S+)\n",
        (home / ".env.example").read_text(),
    )
    assert listed == [(name, name) for name in registry.topics]
    declared = tomllib.loads((home / "pyproject.toml").read_text())
    assert declared["project"]["dependencies"] == [
        f"dagster-prefs[platform,server,console]=={dagster_prefs.__version__}"
    ]
    (override,) = declared["tool"]["uv"]["override-dependencies"]
    assert override.startswith("dbt-core-experimental-parser ; sys_platform == 'never'")
    assert (home / "requirements.lock").read_bytes() == (ROOT / "requirements.lock").read_bytes()
    assert len((home / "README.md").read_text().splitlines()) <= 10
    for path in home.rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o755 if path.is_dir() else 0o644), path


def test_the_full_example_is_the_shipped_project(tmp_path: Path) -> None:
    create_project(tmp_path / "all", "full", generate)
    ours, shipped = contents(tmp_path / "all" / "dbt_project"), contents(ROOT / "dbt_project")
    for name, content in shipped.items():
        if name.startswith("models/"):
            assert ours[name].replace(b"generated from `all`", b"") == content, name
        if name.startswith("macros/"):
            assert ours[f"macros/prefs/{name.removeprefix('macros/')}"] == content


def test_the_project_that_was_created_passes_its_own_test(project: Path) -> None:
    names: dict[str, Any] = {"__file__": str(project.parent / "tests" / "test_project.py")}
    text = Path(names["__file__"]).read_text()
    exec(compile(text, names["__file__"], "exec"), names)
    names["test_what_is_generated_is_current"]()
    (project / "models" / "page_views.yml").write_text("models: []\n")
    with pytest.raises(PrefsError):
        names["test_what_is_generated_is_current"]()


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("2nd", "cannot name a dbt project"),
        ("a b", "cannot name a dbt project"),
        ("taken", "exists and is not empty"),
    ],
)
def test_a_folder_is_refused_before_anything_is_written(tmp_path: Path, name: str, why: str) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(ProjectRefused, match=why):
        create_project(tmp_path / name, "minimal", generate)
    assert contents(tmp_path) == before


def test_an_interrupted_creation_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(PrefsError, match="cannot be generated"):
        create_project(tmp_path / "new", "minimal", refuse)
    assert list(tmp_path.iterdir()) == []


# Finding


def test_the_first_folder_upwards_with_our_declarations_is_the_project(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign = project.parent / "analytics" / "dbt_project"
    foreign.mkdir(parents=True)
    (foreign / "dbt_project.yml").write_text("name: analytics\nvars: {}\n")
    monkeypatch.delenv("PREFS_PROJECT_DIR")
    monkeypatch.delenv("PREFS_DATA_DIR")
    for folder in (project.parent, project / "models", foreign):
        monkeypatch.chdir(folder)
        assert find_project() == project
        settings = load_settings()
        assert (settings.home, settings.data_dir) == (project.parent, project.parent / ".prefs")
    # The environment goes first, and a dbt project without declarations is found where there is no other.
    monkeypatch.setenv("PREFS_PROJECT_DIR", str(ROOT / "dbt_project"))
    assert load_settings().data_dir == ROOT / ".prefs"
    (project / "dbt_project.yml").unlink()
    assert find_project(foreign) == foreign


def test_settings_are_read_from_the_env_file_next_to_the_project(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project.parent / ".env").write_text("PREFS_TABLE_PREFIX=mine_\n")
    monkeypatch.delenv("PREFS_ENV_FILE")
    monkeypatch.delenv("PREFS_PROJECT_DIR")
    # Loading exports what it reads.
    monkeypatch.setenv("PREFS_TABLE_PREFIX", "")
    monkeypatch.delenv("PREFS_TABLE_PREFIX")
    monkeypatch.chdir(project / "models")
    assert load_settings().table_prefix == "mine_"


# Upgrading


def stamp(project: Path, **changed: Any) -> None:
    path = project / "macros" / "prefs" / "version.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        (
            {"version": "0.0.9"},
            r"is of dagster-prefs 0\.0\.9, older than this dagster-prefs .*: run `prefs upgrade`",
        ),
        ({"version": "12.0"}, r"is of dagster-prefs 12\.0, newer than this .*: install dagster-prefs==12\.0"),
        ({"files": {}}, r"is of another build of dagster-prefs .*: run `prefs upgrade`"),
        ({"files": None}, r"version\.json is no stamp of shared macros: restore it"),
    ],
)
def test_macros_of_another_version_are_refused_in_one_sentence(
    project: Path, changed: dict[str, Any], sentence: str
) -> None:
    stamp(project, **changed)
    before = contents(project)
    for refusing in (generate, check_current, current_registry):
        with pytest.raises(macros.MacrosMismatch, match=sentence) as refused:
            refusing(project)
        assert "\n" not in str(refused.value)
    assert contents(project) == before


def test_an_upgrade_replaces_macros_and_lock_and_shows_the_difference(project: Path) -> None:
    current = contents(project)
    folder, lock = project / "macros" / "prefs", project.parent / "requirements.lock"
    old = (folder / "windows.sql").read_text().replace("round(", "trunc(")
    (folder / "windows.sql").write_text(old)
    (folder / "gone.sql").write_text("{% macro gone() %}{% endmacro %}")
    stamp(project, version="0.0.9", files=macros._hashes(macros._contents(folder)))
    lock.write_text("click==7.0\n")
    pyproject = project.parent / "pyproject.toml"
    pyproject.write_text(pyproject.read_text().replace(f"=={dagster_prefs.__version__}", "==0.0.9"))
    done = upgrade_project(project, generate)
    assert done.version_before == "0.0.9"
    assert contents(project) == current
    assert lock.read_bytes() == (ROOT / "requirements.lock").read_bytes()
    diff = done.changes.diff()
    assert "--- a/macros/prefs/windows.sql" in diff
    assert "-  trunc(" in diff
    assert "+  round(" in diff
    assert "+++ /dev/null" in diff
    assert [what.split()[0] for what in done.look_at] == ["the", "requirements.lock", "pyproject.toml"]
    again = upgrade_project(project, generate)
    assert (again.changes.files, [what.split()[0] for what in again.look_at]) == ({}, ["pyproject.toml"])


def test_an_upgrade_discards_no_edits_unasked(project: Path) -> None:
    edited = project / "macros" / "prefs" / "scoring.sql"
    edited.write_text("{% macro mine() %}{% endmacro %}")
    with pytest.raises(
        ProjectRefused, match=r"was edited \(scoring\.sql\): move your macros to another folder"
    ):
        upgrade_project(project, generate)
    upgrade_project(project, generate, overwrite=True)
    assert edited.read_bytes() == (ROOT / "dbt_project" / "macros" / "scoring.sql").read_bytes()


def test_a_failed_upgrade_changes_nothing(project: Path) -> None:
    stamp(project, version="0.0.9")
    before = contents(project.parent)
    with pytest.raises(PrefsError, match=re.escape(f"{project} cannot be generated")):
        upgrade_project(project, refuse)
    assert contents(project.parent) == before
    stamp(project, version="99.0")
    with pytest.raises(macros.MacrosMismatch, match=r"install dagster-prefs==99\.0"):
        upgrade_project(project, generate, overwrite=True)


def test_an_upgrade_of_the_packages_own_macros_is_refused() -> None:
    with pytest.raises(ProjectRefused, match="names the package's own macros"):
        upgrade_project(ROOT / "tests" / "projects" / "courses", generate)


# Extending


# What `prefs generate` writes outside of its folders.
WRITTEN = {"registry.json", "lineage.json"}


def added(project: Path, scaffold: Callable[[Scaffolding], Scaffold]) -> set[str]:
    """Add a scaffold, and return the hand-written files that it changed."""
    scaffolding = Scaffolding(project)
    done = scaffolding.add(scaffold(scaffolding), generate)
    assert all(step for step in done.next_steps)
    # Whoever types `prefs add` is next to the dbt project, from where each named file can be opened.
    named = [name for step in done.next_steps for name in re.findall(r"\S+\.(?:sql|yml)", step)]
    assert all((project.parent / name).is_file() for name in named), named
    check_current(project)
    return {name for name in done.changes.files if "generated/" not in name and name not in WRITTEN}


def test_a_topic_with_tile_domain_and_attribute_is_scaffolded(project: Path) -> None:
    topic = added(project, lambda new: new.topic("purchases"))
    assert topic == {"models/purchases.yml"}
    tile = added(project, lambda new: new.tile("visitor_purchases_1d", topic="purchases"))
    assert tile == {"models/visitor_purchases_1d.sql", "models/visitor_purchases_1d.yml"}
    domain = added(project, lambda new: new.domain("purchases", tile="visitor_purchases_1d"))
    view = {"models/visitor_purchases_rolling.sql", "models/visitor_purchases_rolling.yml"}
    assert domain == view
    assert added(project, lambda new: new.attribute("days_28d", domain="purchases")) == view
    assert (
        added(project, lambda new: new.attribute("total_28d", domain="site#purchases", column="amount"))
        == view
    )
    served = load_registry(project).contract.domains["site#purchases"]
    assert {name: one.type for name, one in served.attributes.items()} == {
        "events_28d": "integer", "amount_28d": "decimal", "days_28d": "integer", "total_28d": "decimal",
        "last_event_at": "integer",
    }  # fmt: skip


def test_domains_of_one_entity_get_attributes_of_different_names(project: Path) -> None:
    """As the columns of a training set: over a tile that is served already, and over two tiles with one column."""
    added(project, lambda new: new.domain("attention", tile="visitor_pages_1d"))
    for topic in ("purchases", "returns"):
        added(project, lambda new, topic=topic: new.topic(topic))
        added(project, lambda new, topic=topic: new.tile(f"visitor_{topic}_1d", topic=topic))
        added(project, lambda new, topic=topic: new.domain(topic, tile=f"visitor_{topic}_1d"))
    served = [
        name
        for domain in load_registry(project).contract.domains.values()
        for name in domain.attributes
        if name != "last_event_at"
    ]
    assert len(served) == len(set(served))
    assert {"views_28d", "attention_views_28d", "events_28d", "returns_events_28d"} <= set(served)


def test_an_entity_with_a_composite_key_gets_topic_tile_and_domain(project: Path) -> None:
    before = (project / "dbt_project.yml").read_text().splitlines()
    added(project, lambda new: new.entity("basket", ["visitor_id", "basket_id:text"]))
    after = (project / "dbt_project.yml").read_text().splitlines()
    (line,) = [line for line in after if line not in before]
    assert [one for one in after if one != line] == before, "every comment is where it was"
    added(project, lambda new: new.topic("basket_changes", entity="basket"))
    added(project, lambda new: new.tile("basket_changes_1d", topic="basket_changes"))
    added(project, lambda new: new.domain("shop#basket", tile="basket_changes_1d"))
    registry = load_registry(project)
    assert registry.entity("basket").key_names == ("visitor_id", "basket_id")
    assert registry.contract.domains["shop#basket"].entity == "basket"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("vars:\n  entities: { a: { keys: { x: text } } }\n", "vars:\n  entities: { a: { keys: { x: text } }, NEW }\n"),
        (
            "vars:\n  entities:\n    a:\n      keys:\n        x: text\n\n  # of another\n  other: 1\n",
            "vars:\n  entities:\n    a:\n      keys:\n        x: text\n    NEW\n\n  # of another\n  other: 1\n",
        ),
        (
            "vars:\n  entities:\n    a: { keys: { x: text } }",
            "vars:\n  entities:\n    a: { keys: { x: text } }\n    NEW\n",
        ),
    ],
)  # fmt: skip
def test_an_entity_is_inserted_in_either_style(before: str, after: str) -> None:
    from dagster_prefs.projects.add import _with_entity

    assert _with_entity(before, "NEW: {}").replace("NEW: {}", "NEW") == after


def test_an_attribute_goes_into_a_group_in_a_cte(tmp_path: Path) -> None:
    create_project(tmp_path / "all", "engagement", generate)
    project = tmp_path / "all" / "dbt_project"
    added(project, lambda new: new.attribute("days_28d", domain="watch", column="views"))
    text = (project / "models" / "engagement" / "viewer_engagement_rolling.sql").read_text()
    first, last = text.split("short_window as (")
    assert "    coalesce(sum(views), 0)::bigint as days_28d,\n    max(last_event_at)" in first
    assert "    long_window.days_28d,\n    {{ epoch_ms(" in last
    with pytest.raises(ProjectRefused, match="is not of the form that a scaffold can extend"):
        Scaffolding(project).attribute("days_28d", domain="preferences")


@pytest.mark.parametrize(
    ("scaffold", "why"),
    [
        (lambda new: new.topic("page_views"), "page_views exists already"),
        (lambda new: new.topic("raw_page_views"), "raw_page_views exists already"),
        (lambda new: new.topic("Page"), "'Page' cannot name a topic"),
        (lambda new: new.topic("deployments"), "exists already"),
        (lambda new: new.topic("x" * 60), "too long a name"),
        (lambda new: new.topic("orders", entity="vistor"), r"no entity 'vistor' \(did you mean 'visitor'\?\)"),
        (lambda new: new.tile("t_1d", topic="pages"), "no topic 'pages'"),
        (lambda new: new.tile("visitor_pages_1d"), "exists already"),
        (lambda new: new.domain("pages"), "site#pages exists already"),
        (lambda new: new.domain("site#Pages"), "cannot name a domain"),
        (lambda new: new.attribute("views_28d"), "views_28d exists already"),
        (lambda new: new.attribute("visitor_id"), "already has the column visitor_id"),
        (lambda new: new.attribute("n_7d"), "says 7 days, and the windows of the view are of 28"),
        (lambda new: new.attribute("n_28d", column="view_date"), "has no numeric column 'view_date'"),
        (lambda new: new.attribute("n_28d", domain="nope"), "no domain 'nope'"),
        (lambda new: new.entity("visitor"), "visitor exists already"),
        (lambda new: new.entity("order", ["id:uuid4"]), "'id:uuid4' is not a key"),
        (lambda new: new.entity("order", ["visitor_id:bigint"]), "give them one type or two names"),
    ],
)  # fmt: skip
def test_what_cannot_be_added_changes_nothing(
    project: Path, scaffold: Callable[[Scaffolding], Scaffold], why: str
) -> None:
    before = contents(project.parent)
    with pytest.raises((ProjectRefused, DeclarationError), match=why):
        added(project, scaffold)
    assert contents(project.parent) == before


def test_nothing_is_added_to_a_stale_project(project: Path) -> None:
    (project / "models" / "visitor_pages_1d.sql").write_text("select 1\n")
    with pytest.raises(StaleRegistry):
        Scaffolding(project)


def test_the_scaffolds_of_the_page_pass_as_they_are(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = (ROOT / "docs" / "own-project.md").read_text().split("## Add to it\n")[1].split("\n## ")[0]
    (block,) = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)
    monkeypatch.setenv("PREFS_PROJECT_DIR", str(project))
    monkeypatch.setattr(commands, "generate_project", generate)
    for line in block.splitlines():
        done = CliRunner().invoke(cli, line.split()[1:])
        assert done.exit_code == 0, (line, done.output, done.exception)
        assert "next: " in done.output
    assert {"site#pages", "site#purchases"} == set(check_current(project).contract.domains)
    done = CliRunner().invoke(cli, ["upgrade"])
    assert done.output == "every file was of this version\n"


# Testing


def test_a_failing_test_of_the_project_fails_the_command(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project.parent / "tests" / "test_project.py").write_text("def test_it():\n    assert not 'failing'\n")
    monkeypatch.setenv("PREFS_PROJECT_DIR", str(project))
    monkeypatch.setattr(commands, "_dbt_tests", lambda settings: ["some_dbt_test: 3 rows"])
    with pytest.raises(PrefsError, match=r"2 tests failed: some_dbt_test: 3 rows; pytest in .* exit code 1"):
        commands.test.callback()


# The wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    with build_wheel(tmp_path_factory.mktemp("built")) as built:
        yield built


def metadata(wheel: zipfile.ZipFile) -> str:
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    return wheel.read(name).decode()


def test_the_wheel_has_the_package_and_what_it_ships(wheel: zipfile.ZipFile) -> None:
    found = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert f"Version: {dagster_prefs.__version__}\n" in metadata(wheel)
    package = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "dagster_prefs").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    example = {
        f"dagster_prefs/data/{path.relative_to(ROOT).as_posix()}"
        for path in (ROOT / "dbt_project").rglob("*")
        if path.is_file()
        and path.relative_to(ROOT / "dbt_project").parts[0] not in ("target", "logs", "dbt_packages")
    }
    others = {
        f"dagster_prefs/data/{name}"
        for name in (".env.example", "overrides.txt", "requirements.lock", "workspace.yaml")
    }
    assert found == package | example | others


def test_the_source_package_has_what_git_has_and_makes_the_same_wheel(
    wheel: zipfile.ZipFile, tmp_path: Path
) -> None:
    source = build_source(tmp_path)
    held = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()} - {
        "PKG-INFO"
    }
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    assert held == {name for name in listed if (ROOT / name).is_file()}
    with build_wheel(tmp_path, source) as theirs:
        assert {one.filename: one.CRC for one in wheel.infolist()} == {
            one.filename: one.CRC for one in theirs.infolist()
        }


def test_what_is_built_can_be_uploaded(wheel: zipfile.ZipFile, capsys: pytest.CaptureFixture[str]) -> None:
    """As `make dist` checks it: metadata and the README as the index shows it."""
    from twine.commands.check import check

    assert not check([str(wheel.filename)], strict=True), capsys.readouterr()


def test_the_wheel_asks_for_what_was_tested(wheel: zipfile.ZipFile) -> None:
    """The lowest versions of its ranges are those of the lowest lock, and the lock's are within them."""
    asked = [Requirement(text) for text in re.findall(r"(?m)^Requires-Dist: (.+)$", metadata(wheel))]
    assert "Requires-Python: >=3.11\n" in metadata(wheel)
    lowest, newest = (versions(ROOT / name) for name in ("infra/locks/lowest.txt", "requirements.lock"))
    for one in asked:
        for lock in (lowest, newest):
            if one.name in lock:
                assert one.specifier.contains(lock[one.name]), one
    bounds = dict(re.findall(r"(?m)^([a-z-]+)==(\S+)$", (ROOT / "infra/locks/lowest.in").read_text()))
    assert bounds == {
        one.name: limit.version
        for one in asked
        for limit in one.specifier
        if limit.operator == ">=" and one.name in bounds
    }
    page = (ROOT / "docs" / "upgrading.md").read_text()
    for package, version in bounds.items():
        (row,) = [
            line for line in page.splitlines() if re.search(rf"^\|.*\b{package}\b(?!-).*\| [0-9.]+ \| ", line)
        ]
        assert row.split("|")[2:4] == [f" {version} ", f" {newest[package]} "], package


def versions(lock: Path) -> dict[str, str]:
    """Name → version of a lock."""
    return dict(re.findall(r"(?m)^([a-z0-9-]+)==([^ ;]+)", lock.read_text()))
