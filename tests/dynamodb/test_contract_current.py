"""The checked-in contract is what dbt's YAML declares."""

from __future__ import annotations

from pathlib import Path

from dagster_prefs.declarations.contract import build_contract, contract_dict, load_contract
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.engine.dbt import Dbt

PROJECT = Path(__file__).parents[2] / "dbt_project"


def test_the_checked_in_contract_is_current(tmp_path: Path) -> None:
    # Parsing needs no engine, so this one is never reached.
    nowhere = EngineConfiguration("127.0.0.1", 1, "prefs", "prefs")
    manifest = Dbt(nowhere, PROJECT, tmp_path / "target").manifest()
    assert build_contract(manifest) == contract_dict(load_contract(PROJECT)), (
        "out of date: run `prefs generate`"
    )
