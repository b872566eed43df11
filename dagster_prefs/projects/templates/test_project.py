"""The project is complete: what is generated is current, and every served domain can be trained on."""

from pathlib import Path

from dagster_prefs.declarations.generate import check_current

PROJECT = Path(__file__).parents[1] / "dbt_project"


def test_what_is_generated_is_current() -> None:
    registry = check_current(PROJECT)
    assert registry.topics, "no topic is declared"
    assert registry.contract.domains, "no domain is served"
