"""What a recommendation service pays for importing the client, and what it must not need."""

from __future__ import annotations

import subprocess
import sys

import pytest

IMPORTS = {
    "dagster_prefs.serving": "import dagster_prefs.serving",
    "ProfileClient": "from dagster_prefs.serving import ProfileClient, ReadCounts",
    "ShopClient": "from dagster_prefs.serving import ShopClient, CatalogueRanker",
}


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("name", IMPORTS)
def test_platform_packages_are_not_imported(name: str) -> None:
    loaded = run(f"import sys\n{IMPORTS[name]}\nprint(*sys.modules)").split()
    tops = {module.partition(".")[0] for module in loaded}
    assert tops.isdisjoint(
        {"dagster", "dbt", "pydantic", "pydantic_settings", "pyiceberg", "pyarrow", "duckdb"}
        | {"opentelemetry", "prometheus_client"}
    )
    # botocore comes with the first client, psycopg with the ranking: nobody pays for what is not used.
    assert "botocore" not in tops
    if name != "ShopClient":
        assert "psycopg" not in tops


@pytest.mark.parametrize("name", ["dagster_prefs.serving", "ProfileClient"])
def test_importing_is_quick(name: str) -> None:
    # Processor time of the quickest of five, so that a busy machine does not decide.
    code = f"import time\nbefore = time.process_time()\n{IMPORTS[name]}\nprint(time.process_time() - before)"
    assert min(float(run(code)) for _ in range(5)) <= 0.45
