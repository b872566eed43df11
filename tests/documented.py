"""The documentation's code blocks: found, told apart by what they need, and run as a reader would."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "infra" / "terraform" / "README.md",
    ROOT / "dagster_prefs" / "console" / "runbook.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
# In the order of the site, in which one stands on the other.
GUIDES = (
    "add-an-attribute", "add-an-event-type", "add-a-topic", "add-a-domain", "add-an-entity", "bring-your-events",
    "go-to-production", "change-a-feature", "debug-a-wrong-value", "make-training-sets",
)  # fmt: skip
# What a block may need that no test has; it stands behind the language.
MARKS = {"needs-aws", "needs-docker", "needs-kafka", "needs-network", "needs-project", "needs-risingwave"}
SHELL = ("bash", "sh")

_FENCE = re.compile(r"^( *)```([^\n`]*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_PATH = re.compile(r"`([\w./-]+/[\w.-]+\.\w+)`")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page; `file` is the last path that the text before it names."""

    page: Path
    line: int
    language: str
    mark: str
    text: str
    file: str

    @property
    def commands(self) -> list[str]:
        """The lines of a shell block, without comments."""
        lines = (line.split(" #")[0].strip() for line in self.text.splitlines())
        return [line for line in lines if line and not line.startswith("#")]

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """Return every fenced block of a page, in order. Directives of Sphinx (`{toctree}`) are none."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        indent, information, body = match.groups()
        language, _, mark = information.strip().partition(" ")
        if language.startswith("{"):
            continue
        before = text[: match.start()]
        files = _PATH.findall(re.sub(_FENCE, "", before))
        dedented = "".join(line.removeprefix(indent) for line in body.splitlines(keepends=True))
        found.append(
            Block(page, before.count("\n") + 1, language, mark, dedented, files[-1] if files else "")
        )
    return found


def edit(project: Path, block: Block) -> None:
    """Make the change that a diff shows in the file named before it; its lines must be there once."""
    path = project / block.file
    before = "".join(line[1:] for line in block.text.splitlines(keepends=True) if line[0] in " -")
    after = "".join(line[1:] for line in block.text.splitlines(keepends=True) if line[0] in " +")
    text = path.read_text(encoding="utf-8")
    assert text.count(before) == 1, f"{block}: {path} has {text.count(before)} times\n{before}\n{text}"
    path.write_text(text.replace(before, after), encoding="utf-8")


@dataclass
class Reader:
    """Someone who types what a page says, in one folder and one shell.

    `run` runs `prefs` with these words, in this environment and folder.
    """

    folder: Path
    environment: Mapping[str, str]
    run: Callable[[list[str], Mapping[str, str], Path], subprocess.CompletedProcess[str]]

    def follow(self, page: Path, codes: Mapping[str, set[int]]) -> dict[str, str]:
        """Make every edit and type every command of a page; return command → what the last one like it printed.

        A command must exit with 0, or with one of its `codes` by its first words.
        """
        printed: dict[str, str] = {}
        # Each page is read in a shell of its own.
        kept = self.environment
        try:
            for block in blocks(page):
                if block.mark:
                    assert block.mark in MARKS, f"{block}: unknown mark {block.mark!r}"
                elif block.language == "diff":
                    edit(self.folder, block)
                elif block.language in SHELL:
                    for command in block.commands:
                        printed[command] = self.type(command, codes, str(block))
        finally:
            self.environment = kept
        return printed

    def type(self, command: str, codes: Mapping[str, set[int]], place: str) -> str:
        """Type one line; return what it printed."""
        line, _, target = command.partition(" > ") if command.startswith("prefs ") else (command, "", "")
        words = shlex.split(line)
        if words[0] == "cd":
            self.folder = self.folder / words[1]
            return ""
        if words[0] == "export":
            given = (word.split("=", 1) for word in words[1:])
            self.environment = {
                **self.environment,
                **dict(given),
            }
            return ""
        if words[0] == "prefs":
            done = self.run(words[1:], self.environment, self.folder)
        else:
            done = subprocess.run(
                ["sh", "-ec", command], cwd=self.folder, env=dict(self.environment), capture_output=True, text=True
            )  # fmt: skip
        allowed = next((code for start, code in codes.items() if line.startswith(f"prefs {start}")), {0})
        assert done.returncode in allowed, f"{place}: {command}: {done.stdout}\n{done.stderr}"
        if target:
            (self.folder / target).write_text(done.stdout)
        return done.stdout
