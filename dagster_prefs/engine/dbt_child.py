"""Run dbt in a process of its own, whose environment is set for each invocation.

Started by `engine.dbt` as `python -m dagster_prefs.engine.dbt_child`. It reads requests as JSON lines from its input
and answers in JSON lines on its output: {"node": …} for each node that finishes, then {"results": […]} or {"error": …}.
It serves one request after the other, so that dbt is imported once. It ends with the process that started it, even in
the middle of an invocation.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Send = Callable[[Mapping[str, Any]], None]


class _Parent:
    """The process at the other end of the input; when it ends, this process ends too."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._busy = self._gone = False
        threading.Thread(target=self._watch, daemon=True).start()

    def begin(self) -> bool:
        """Return whether an invocation may begin; from then on, the parent's end interrupts it."""
        with self._lock:
            self._busy = not self._gone
            return self._busy

    def finish(self) -> None:
        """Note that the invocation has ended."""
        with self._lock:
            self._busy = False

    def _watch(self) -> None:
        # Only hang-ups are reported, so that requests stay in the pipe for the main thread.
        hang_up = select.poll()
        hang_up.register(sys.stdin.fileno(), 0)
        hang_up.poll()
        with self._lock:
            self._gone = True
            if self._busy:
                os._exit(1)


def invoke(request: Mapping[str, Any], send: Send) -> None:
    """Run dbt once with the parameters of `request`, and send the results. Raises dbt's error if it cannot run."""
    # libpq and the adapters read these variables at each connection.
    os.environ.clear()
    os.environ.update(request["environment"])
    from dbt.cli.main import dbtRunner

    def on_event(event: Any) -> None:
        if event.info.name == "NodeFinished":
            result = event.data.run_result
            send(
                {
                    "node": {
                        "unique_id": event.data.node_info.unique_id,
                        "status": str(result.status),
                        "message": result.message,
                        "seconds": result.execution_time,
                        "failures": None,
                    }
                }
            )

    def run(arguments: Sequence[str], **options: Any) -> Any:
        outcome = dbtRunner(**options).invoke([*request["before"], *arguments, *request["after"]])
        if outcome.exception is not None:
            raise outcome.exception
        return outcome.result

    command = request["arguments"]
    # By default dbt writes its artifacts after parsing and again at the end, which is a third of the duration of a run.
    variables = command[command.index("--vars") :][:2] if "--vars" in command else []
    manifest = run(["parse", "--no-write-json", *variables])
    _rename(manifest, request["aliases"])
    kept = request["manifest"]
    # The messages of a run's nodes are explained with the manifest before the run ends; only a compilation adds to it.
    if kept is not None and command[0] != "compile":
        _write(manifest, kept)
    outcome = manifest
    if command[0] != "parse":
        outcome = run([*command, "--no-write-json"], manifest=manifest, callbacks=[on_event])
    if kept is not None and command[0] == "compile":
        _write(manifest, kept)
    send(
        {
            "results": [
                {
                    # Results of `run-operation` have no node.
                    "unique_id": getattr(result, "node", result).unique_id,
                    "status": str(result.status),
                    "message": result.message or "",
                    "seconds": float(result.execution_time),
                    "failures": result.failures,
                    "compiled": result.node.compiled_code if command[0] == "compile" else None,
                }
                for result in getattr(outcome, "results", [])
            ]
        }
    )


def _rename(manifest: Any, aliases: Mapping[str, str]) -> None:
    for node in manifest.nodes.values():
        if node.resource_type == "model" and node.name in aliases:
            alias = aliases[node.name]
            node.relation_name = node.relation_name.replace(f'"{node.alias}"', f'"{alias}"')
            node.alias = alias


def _write(manifest: Any, path: str) -> None:
    """Write the manifest like dbt, with the SQL compiled so far, and replace it atomically."""
    from dbt_common.utils.encoding import JSONEncoder

    artifact = manifest.writable_manifest().to_dict(omit_none=False, context={"artifact": True})
    os.makedirs(os.path.dirname(path), exist_ok=True)
    unfinished = f"{path}.new"
    with open(unfinished, "w", encoding="utf-8") as file:
        # Unlike `json.dump`, which dbt calls, `json.dumps` encodes in C.
        file.write(json.dumps(artifact, cls=JSONEncoder))
    os.replace(unfinished, path)


def main() -> None:
    """Serve requests until the input ends."""
    # Started in the background of a script, this process would ignore interrupts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Output of dbt or an adapter must not be mixed with the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sending = threading.Lock()

    def send(answer: Mapping[str, Any]) -> None:
        # dbt reports nodes from several threads.
        with sending:
            answers.write(json.dumps(answer) + "\n")
            answers.flush()

    parent = _Parent()
    for line in sys.stdin.buffer:
        if not parent.begin():
            return
        try:
            invoke(json.loads(line), send)
        except Exception as error:
            send({"error": str(error)})
        parent.finish()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        # The parent interrupted the invocation, and dbt has ended its sessions.
        sys.exit(130)
