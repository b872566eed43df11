"""The oracle and the helpers of tests/dbt serve here too; a server that the product refuses proves nothing."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "dbt"))


@pytest.fixture(autouse=True, scope="session")
def _new_enough() -> None:
    from risingwave_server import refuse_old_server

    if url := os.environ.get("PREFS_RISINGWAVE_URL"):
        refuse_old_server(url)
