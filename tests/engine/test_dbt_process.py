"""dbt's process: it ends with ours, an interrupt ends the invocation, and this process's environment stays."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.engine.dbt import Dbt, DbtError, DbtProcess

# In the place of dbt, which takes seconds to import: it prints, waits where it is told to, and says how it ended.
STAND_IN = """
import os, sys, time
from types import SimpleNamespace as Value

class dbtRunner:
    def __init__(self, manifest=None, callbacks=()):
        self.callbacks = callbacks

    def to_dict(self, **options):
        return {"nodes": {}}

    def invoke(self, arguments):
        print("dbt prints this")
        if "parse" in arguments:
            return Value(exception=None, result=Value(nodes={}, writable_manifest=lambda: self))
        result = Value(status="success", message=os.environ.get("TOLD", ""), execution_time=0.5, failures=0)
        event = Value(node_info=Value(unique_id="model.p.first"), run_result=result)
        try:
            for callback in self.callbacks:
                callback(Value(info=Value(name="NodeFinished"), data=event))
            time.sleep(600 if "wait" in arguments else 0)
        except KeyboardInterrupt as interrupt:
            open(os.environ["ENDED"], "w").write("sessions ended")
            return Value(exception=interrupt, result=None)
        result.node = Value(unique_id="model.p.first", compiled_code="select 1")
        return Value(exception=None, result=Value(results=[result]))
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    module = tmp_path / "path" / "dbt" / "cli" / "main.py"
    module.parent.mkdir(parents=True)
    for package in (module.parent.parent, module.parent):
        (package / "__init__.py").touch()
    module.write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "path"))
    return tmp_path


def request(*arguments: str, **environment: str) -> dict[str, Any]:
    return {
        "before": [],
        "arguments": list(arguments),
        "after": [],
        "aliases": {},
        "manifest": None,
        "environment": {**os.environ, **environment},
    }


def test_one_process_serves_every_invocation_in_the_environment_of_each(stand_in: Path) -> None:
    process = DbtProcess()
    before = dict(os.environ)
    told: list[tuple[Any, dict[str, str]]] = []

    def heard(node: Mapping[str, Any]) -> None:
        told.append((node["message"], dict(os.environ)))

    answer = process.ask(request("run", TOLD="first"), heard)
    pids = [child.pid for child in psutil.Process().children()]
    process.ask(request("run"), heard)
    assert [child.pid for child in psutil.Process().children()] == pids
    process.end()
    assert told == [("first", before), ("", before)]
    assert [one["unique_id"] for one in answer["results"]] == ["model.p.first"]
    assert dict(os.environ) == before


def test_an_interrupt_ends_the_invocation_and_the_next_one_runs(stand_in: Path) -> None:
    process, ended = DbtProcess(), stand_in / "ended"
    # A script ignores interrupts for what it starts in the background, and so do the processes of that.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process.ask(request("run"), lambda _: None)
    finally:
        signal.signal(signal.SIGINT, before)

    def interrupted(_: Mapping[str, Any]) -> None:
        # Where Ctrl-C finds this process while dbt works.
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        process.ask(request("wait", ENDED=str(ended)), interrupted)
    assert ended.read_text() == "sessions ended"
    assert "results" in process.ask(request("run"), lambda _: None)
    process.end()


def test_a_process_that_is_killed_says_so_and_the_next_invocation_runs(stand_in: Path) -> None:
    process = DbtProcess()
    children = {child.pid for child in psutil.Process().children()}

    def kill(_: Mapping[str, Any]) -> None:
        for child in psutil.Process().children():
            if child.pid not in children:
                child.kill()

    with pytest.raises(DbtError, match=r"ended in the middle of `dbt wait` \(exit code -9\): run it again"):
        process.ask(request("wait"), kill)
    assert "results" in process.ask(request("run"), lambda _: None)
    process.end()


@pytest.mark.parametrize("command", ["wait", "run"], ids=["busy", "idle"])
def test_it_ends_with_the_process_that_started_it(stand_in: Path, command: str) -> None:
    program = (
        "import json, os, sys, psutil, time\n"
        "from dagster_prefs.engine.dbt import DbtProcess\n"
        "def heard(_): print(psutil.Process().children()[0].pid, flush=True)\n"
        "DbtProcess().ask(json.loads(sys.argv[1]), heard)\n"
        "time.sleep(600)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, json.dumps(request(command))], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        try:
            child = psutil.Process(int(parent.stdout.readline()))
            assert child.is_running()
        finally:
            parent.send_signal(signal.SIGKILL)
    psutil.wait_procs([child], timeout=60)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_secrets_are_in_no_argument(stand_in: Path) -> None:
    before = dict(os.environ)
    secret = "hunter2-of-the-engine"
    engine = EngineConfiguration("engine.example", 1, "dev", "root", secret, kind="risingwave")
    seen: list[tuple[str, list[str], dict[str, str]]] = []

    def heard(_: Any) -> None:
        for child in psutil.Process().children(recursive=True):
            # A child of another test may be ending.
            with suppress(psutil.NoSuchProcess):
                seen.append((child.name(), child.cmdline(), dict(os.environ)))

    process = DbtProcess()
    dbt = Dbt(engine, stand_in, stand_in / "target", process=process)
    (result,) = dbt.run("run", on_result=heard)
    process.end()
    assert result.ok
    assert json.loads(dbt.manifest_path.read_text()) == {"nodes": {}}
    assert seen
    assert secret not in str(seen)
    assert {json.dumps(environment) for _, _, environment in seen} == {json.dumps(before)}
