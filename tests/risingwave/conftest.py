"""The oracle and the helpers of tests/dbt serve here too."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "dbt"))
