"""What docs/security.md says is so: its commands work, its ports and files are those of the code."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from warm import Warm

from dagster_prefs.local.aws import SERVICES
from dagster_prefs.local.services import LocalServices
from dagster_prefs.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "security.md").read_text()
TELL = "import json, os, sys; print(json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]))"


def test_plain_dbt_reaches_the_engine_by_the_password_file(
    services: LocalServices, tmp_path: Path, warm: Warm
) -> None:
    (block,) = re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL)
    assert "$PWD/.prefs/pgpass" in block
    assert "dbt build" in block
    # The connection is what the document promises; a whole build is tested elsewhere.
    script = block.replace("$PWD/.prefs", str(services.data_dir)).replace(
        "dbt build", "dbt debug --connection"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PGPASSFILE"}
    environment |= {
        "PREFS_ENGINE_PORT": str(services.postgres_port),
        "PREFS_ENGINE_DATABASE": "postgres",
        "DBT_TARGET_PATH": str(tmp_path / "target"),
        "DBT_LOG_PATH": str(tmp_path / "logs"),
    }
    # What the shell finds as dbt tells how it was called; so it is called in a process that has imported it.
    stand_in = tmp_path / "bin" / "dbt"
    stand_in.parent.mkdir()
    stand_in.write_text(f"#!{sys.executable}\n{TELL}")
    stand_in.chmod(0o755)

    def run(script: str) -> subprocess.CompletedProcess[str]:
        path = f"{stand_in.parent}{os.pathsep}{os.environ['PATH']}"
        called = subprocess.run(
            ["sh", "-ec", script], cwd=ROOT, env=environment | {"PATH": path}, capture_output=True, text=True
        )
        assert called.returncode == 0, called.stderr
        words, folder, variables = json.loads(called.stdout)
        return warm.run(["dbt", *words], environment=variables, cwd=Path(folder))

    done = run(script)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Connection test: [OK connection ok]" in done.stdout
    without = run(script.replace(str(services.data_dir), str(tmp_path)))
    assert without.returncode != 0
    assert "no password supplied" in without.stdout


def test_ports_and_services_are_those_of_the_code() -> None:
    defaults = Settings.model_fields
    assert f"| {defaults['local_aws_port'].default}, `PREFS_LOCAL_AWS_PORT`" in TEXT
    assert f"| {Settings.model_construct(engine='local', engine_port=None).port}, `PREFS_ENGINE_PORT`" in TEXT
    named = {"dynamodb", "s3", "glue", "iam", "kms", "sts", "cloudwatch"}
    (row,) = [line for line in TEXT.splitlines() if "the local AWS server:" in line]
    assert all(name in row.lower() for name in named)
    assert named <= SERVICES
