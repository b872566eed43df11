"""The guides, word for word and one after another, in a project made by `prefs init` on an engine of its own."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from documented import GUIDES, ROOT, Reader
from warm import Warm

# What a command may end with besides success, as the pages say.
CODES = {"plan": {0, 2}, "drift": {0, 1}, "status": {0, 1, 2}, "training-set compare": {0, 1, 2}}
DEMO = ["--viewers", "30", "--view-events", "900", "--shop-events", "0", "--interactions", "0", "--days", "6"]
ANNA = "prefs profile --entity visitor anna"
SEVEN = "prefs profile --entity visitor visitor-000007"
WHY = "prefs why --entity visitor visitor-000007 pages.minutes_28d"
SERVED_AS_RECOMPUTED = r"served +(\S+)\n *recomputed +\1\n"
# Guide → its commands, and what they print if the guide is true.
LEADS_TO: dict[str, dict[str, str]] = {
    "add-an-attribute": {"prefs plan": "days_28d", SEVEN: r"days_28d +│ [1-9]"},
    "add-an-event-type": {ANNA: r"shares_28d +│ 1", "prefs rejected": "unknown action +│ 1"},
    "add-a-topic": {
        "prefs schema purchases": '"title": "purchases"',
        "prefs ingest purchases.jsonl --dry-run": "1",
        ANNA: r"(?s)events_28d +│ 1\b.*price_28d +│ 12\.5",
    },
    "add-a-domain": {"prefs plan": "visitor_attention_rolling", SEVEN: r"attention_views_28d +│ [1-9]"},
    "add-an-entity": {"prefs profile --entity basket anna monday": r"events_28d +│ 1"},
    "bring-your-events": {
        "prefs ingest history.csv --dry-run": "negative seconds",
    },
    "go-to-production": {
        "prefs generate --check": "every generated file matches",
        "prefs test": "every test passed",
        "prefs cost --entity visitor --entities 1000000": r"\$",
    },
    "change-a-feature": {"prefs plan": "minutes_28d", WHY: SERVED_AS_RECOMPUTED},
    "debug-a-wrong-value": {
        WHY: SERVED_AS_RECOMPUTED,
        "prefs status": "page_views",
        "prefs lineage pages.minutes_28d": "field seconds of topic page_views",
        "prefs catalog pages.minutes_28d": "minutes_28d",
    },
    "make-training-sets": {
        "prefs training-set --labels labels.csv --entity visitor --types bought=bool": "2 rows",
        "prefs training-set --labels labels.csv --entity visitor --types bought=bool --as served"
        " --output labels.served.parquet": "2 rows",
        "prefs training-set reproduce labels.training.parquet.manifest.json": "2",
        "prefs training-set compare labels.training.parquet --entity visitor": "minutes_28d",
    },
}


@pytest.fixture(scope="module")
def reader(
    tmp_path_factory: pytest.TempPathFactory, free_port: Callable[[], int], warm: Warm
) -> Iterator[Reader]:
    """Someone who has followed the quickstart."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("PREFS_", "PYTEST_"))},
        "PREFS_ENV_FILE": os.devnull,
        "PREFS_ENGINE_PORT": str(free_port()),
        "PREFS_LOCAL_AWS_PORT": str(free_port()),
    }
    found = Reader(
        tmp_path_factory.mktemp("reader"),
        environment,
        lambda words, environment, folder: warm.run(["prefs", *words], environment=environment, cwd=folder),
    )
    until = (datetime.now(UTC).date() - timedelta(days=1)).isoformat()
    for command in (
        "prefs init my-platform --example minimal",
        "cd my-platform",
        "prefs add attribute seconds_28d --column seconds",
        f"prefs demo --json --until {until} {' '.join(DEMO)}",
    ):
        found.type(command, CODES, "the quickstart")
    yield found
    found.type("prefs down --delete-state", {}, "the end")


@pytest.mark.parametrize("guide", GUIDES)
def test_a_guide_leads_where_it_says(reader: Reader, guide: str) -> None:
    printed = reader.follow(ROOT / "docs" / "guides" / f"{guide}.md", CODES)
    for command, wanted in LEADS_TO[guide].items():
        assert re.search(wanted, printed[command]), f"{guide}: {command}\n{printed[command]}"


def test_every_guide_says_where_it_leads() -> None:
    assert set(GUIDES) == set(LEADS_TO) == {path.stem for path in Path(ROOT / "docs" / "guides").glob("*.md")}
