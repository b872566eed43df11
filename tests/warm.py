"""Commands in processes of their own that need not import anything: forks of one that has imported it all.

Importing dbt and Dagster, and what dbt makes at its first parse, cost several seconds of CPU in each process that a
test starts. One server a run has done so; whatever is started here is a fork of it with its own arguments,
environment, working folder, streams and session, which is killed, waited for and judged like any other process. Where
the start of the interpreter or of the installed script is what is tested, `subprocess` is the right way.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import pkgutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import IO, Any, NoReturn, cast

from filelock import FileLock

from dagster_prefs.engine import dbt as engine_dbt
from dagster_prefs.engine import dbt_child
from dagster_prefs.engine.dbt import DbtProcess

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = {"prefs": "dagster_prefs.cli:main", "dbt": "dbt.cli.main:cli", "dagster": "dagster._cli:main"}
DBT_CHILD = "dagster_prefs.engine.dbt_child:main"
_REQUEST_BYTES = 1 << 20
# Kept, because they outlive who started them.
_servers: list[subprocess.Popen[bytes]] = []


class _Fork:
    """A fork of the server, as far as it can be waited for and killed."""

    def __init__(self, connection: socket.socket, command: Sequence[str]) -> None:
        self.args = list(command)
        self.returncode: int | None = None
        self._told = connection.makefile("r")
        connection.close()
        self.pid = int(self._told.readline())
        self._ended = threading.Thread(target=self._hear, daemon=True)
        self._ended.start()

    def _hear(self) -> None:
        self.returncode = int(self._told.readline())
        self._told.close()

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end. Raises subprocess.TimeoutExpired after so many seconds."""
        self._ended.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return self.returncode

    def poll(self) -> int | None:
        """The exit code, None while it runs."""
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Ask it to end."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it."""
        self.send_signal(signal.SIGKILL)


class _WarmDbtProcess(_Fork):
    """A process that runs dbt; what `DbtProcess` uses of `subprocess.Popen`."""

    def __init__(self, connection: socket.socket, stdin: IO[bytes], stdout: IO[bytes]) -> None:
        super().__init__(connection, ["dbt_child"])
        self.stdin, self.stdout = stdin, stdout


class WarmProcess(_Fork):
    """A started command; what tests use of `subprocess.Popen`, in text mode."""

    def __init__(
        self, connection: socket.socket, command: Sequence[str], stdout: IO[str], stderr: IO[str] | None
    ) -> None:
        super().__init__(connection, command)
        self.stdout, self.stderr = stdout, stderr

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Read both streams to their ends, and wait. Raises subprocess.TimeoutExpired after so many seconds."""
        read = ["", ""]

        def keep(number: int, stream: IO[str]) -> None:
            with stream:
                read[number] = stream.read()

        streams = [stream for stream in (self.stdout, self.stderr) if stream is not None]
        readers = [
            threading.Thread(target=keep, args=(number, stream), daemon=True)
            for number, stream in enumerate(streams)
        ]
        for reader in readers:
            reader.start()
        end = None if timeout is None else time.monotonic() + timeout
        for reader in readers:
            reader.join(None if end is None else max(0, end - time.monotonic()))
            if reader.is_alive():
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
        self.wait(None if end is None else max(0, end - time.monotonic()))
        return read[0], read[1]


class Warm:
    """A server of warm processes; `folder` is one that all processes of the run share.

    The first to start a command starts the server, which ends with the folder or with its owner. `without` is a
    package that shall not be importable, as where it is not installed; `package` a folder with another package of
    ours than the checkout's.
    """

    def __init__(self, folder: Path, owner_pid: int, without: str = "", package: Path | None = None) -> None:
        self._folder, self._owner, self._without, self._package = folder, owner_pid, without, package
        kind = f"-without-{without}" if without else "-of-another-package" if package else ""
        self._address = folder / f"warm{kind}.sock"

    def start(
        self,
        command: Sequence[str],
        *,
        environment: Mapping[str, str],
        cwd: Path = ROOT,
        merge: bool = False,
    ) -> WarmProcess:
        """Start `prefs …`, `dbt …` or `dagster …` in a session of its own; with `merge` its stderr goes into stdout."""
        self._ensure_server()
        read_out, write_out = os.pipe()
        read_err, write_err = (None, write_out) if merge else os.pipe()
        try:
            connection = _ask(
                self._address, COMMANDS[command[0]], command, environment, str(cwd), [write_out, write_err]
            )
        finally:
            for end in {write_out, write_err}:
                os.close(end)
        return WarmProcess(
            connection, command, os.fdopen(read_out), None if read_err is None else os.fdopen(read_err)
        )

    def run(
        self,
        command: Sequence[str],
        *,
        environment: Mapping[str, str],
        cwd: Path = ROOT,
        timeout: float | None = 300,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end; it is killed with what it started after so many seconds."""
        process = self.start(command, environment=environment, cwd=cwd)
        try:
            out, err = process.communicate(timeout)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
        return subprocess.CompletedProcess(list(command), process.wait(), out, err)

    def dbt(self) -> DbtProcess:
        """What runs dbt for this process: a fork as well, started at the first request."""
        return _WarmDbt(self._address, self._ensure_server)

    def _ensure_server(self) -> None:
        with FileLock(f"{self._address}.lock"):
            if self._address.exists():
                return
            log = self._address.with_suffix(".log")
            with log.open("wb") as output:
                server = subprocess.Popen(
                    [sys.executable, "-P", __file__, str(self._address), str(self._owner), self._without],
                    cwd=ROOT,
                    env=None if self._package is None else {**os.environ, "PYTHONPATH": str(self._package)},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                )
            _servers.append(server)
            while not self._address.exists():
                assert server.poll() is None, log.read_text()
                time.sleep(0.05)


class _NotInstalled(MetaPathFinder):
    """Every import of a package of this name, or whose name starts so, ends as where it is not installed."""

    def __init__(self, package: str) -> None:
        self._package = package

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.split(".")[0].startswith(self._package) and not name.startswith("dagster_prefs"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def _import_everything(without: str, parsed_store: Path) -> None:
    """Import the package, dbt and what they stand on, and let dbt make what it makes at its first parse.

    From then on dbt shares what it parses, here and in the forks, through the store.
    """
    # As in conftest.py; the forks keep it.
    gc.set_threshold(20_000, 10, 10)
    if without:
        sys.meta_path.insert(0, _NotInstalled(without))
    import dagster_prefs

    for module in pkgutil.walk_packages(dagster_prefs.__path__, "dagster_prefs."):
        # The latter is Dagster's entry, which loads the project of the environment that it is imported in.
        if module.name in ("dagster_prefs.__main__", "dagster_prefs.definitions"):
            continue
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            if not without or not str(error.name).startswith(without):
                raise
    _never_wait_for_the_disk()
    import dbt.adapters.postgres
    import dbt.adapters.risingwave
    import dbt.cli.main  # noqa: F401
    from dbt_common.tests import enable_test_caching

    # Parsing macros is half of what parsing a project costs, and their text is mostly the same for every test: dbt
    # keeps what it has parsed by its text, as for tests of its own.
    enable_test_caching()
    _of_tests("lighter_dbt").lighten_dbt()

    from dagster_prefs.engine.connection import EngineConfiguration
    from dagster_prefs.engine.dbt import Dbt

    parsed_store.mkdir(exist_ok=True)
    _of_tests("parsed").share_parsed(parsed_store)
    nowhere = EngineConfiguration("127.0.0.1", 1, "nowhere", "nobody")
    kept = dict(os.environ)
    with tempfile.TemporaryDirectory() as target:
        # The static parser is written in Rust and keeps threads, without which a fork of it would wait for ever.
        environment = {"DBT_STATIC_PARSER": "false"}
        parsing = Dbt(nowhere, ROOT / "dbt_project", Path(target), environment)
        parsing._process = _Here()
        parsing.manifest()
    os.environ.clear()
    os.environ.update(kept)


def _never_wait_for_the_disk() -> None:
    """What commands keep here outlives no run: neither Dagster's SQLite nor services that they start sync it.

    A command of a demo waited for the disk for longer than it worked.
    """
    from dagster_prefs.local.services import LocalServices

    _of_tests("unsynced").never_sync_sqlite()
    _of_tests("revisions").read_revisions_once()
    started = LocalServices.__init__

    def disposable(services: LocalServices, *given: Any, **named: Any) -> None:
        started(services, *given, **{"disposable": True, **named})

    LocalServices.__init__ = disposable  # type: ignore[method-assign]


def _of_tests(name: str) -> Any:
    """Import a module that lies beside this one; the commands that are started here do not see such."""
    sys.path.insert(0, str(Path(__file__).parent))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)


class _Here(DbtProcess):
    """dbt in this very process, as its own would run it."""

    def ask(self, request: Mapping[str, Any], heard: Callable[[Mapping[str, Any]], None]) -> dict[str, Any]:
        answers: list[Mapping[str, Any]] = []
        dbt_child.invoke(request, answers.append)
        return dict(answers[-1])


class _WarmDbt(DbtProcess):
    """The process that runs dbt for a warm command or for the tests: another fork, which need not import dbt either."""

    def __init__(self, address: Path, ensure_server: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self.address, self._ensure_server = address, ensure_server

    def _running(self) -> Any:
        if self._process is None or self._process.poll() is not None:
            self._ensure_server()
            read_in, write_in = os.pipe()
            read_out, write_out = os.pipe()
            try:
                connection = _ask(
                    self.address,
                    DBT_CHILD,
                    ["dbt_child"],
                    dict(os.environ),
                    os.getcwd(),
                    [write_out, 2, read_in],
                )
            finally:
                os.close(read_in)
                os.close(write_out)
            self._process = cast(
                "subprocess.Popen[bytes]",
                _WarmDbtProcess(connection, os.fdopen(write_in, "wb"), os.fdopen(read_out, "rb")),
            )
        return self._process


def _ask(
    address: Path,
    call: str,
    argv: Sequence[str],
    environment: Mapping[str, str],
    cwd: str,
    streams: Sequence[int],
) -> socket.socket:
    """Ask the server for a fork that makes this call, with these streams as its output, error and perhaps input."""
    request = {"call": call, "argv": list(argv), "environment": dict(environment), "cwd": cwd}
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.connect(str(address))
    socket.send_fds(connection, [json.dumps(request).encode()], list(streams))
    return connection


def _serve(address: Path, owner: int, without: str) -> dict[str, Any] | None:
    """Fork for each request, until the owner or the folder is gone. Returns the request only in a fork."""
    _import_everything(without, address.with_name("parsed"))
    # A fork that looked for garbage in what it has from here would copy all of it first.
    gc.collect()
    gc.freeze()
    # A thread would be missing in the forks, with whatever it holds.
    assert threading.active_count() == 1, threading.enumerate()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        unready = address.with_suffix(".new")
        listener.bind(str(unready))
        listener.listen()
        listener.settimeout(1)
        unready.rename(address)
        while address.exists() and _runs(owner):
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            with contextlib.suppress(TimeoutError):
                connection, _ = listener.accept()
                with connection:
                    message, streams, _, _ = socket.recv_fds(connection, _REQUEST_BYTES, 3)
                    if os.fork() == 0:
                        listener.close()
                        return _watched(connection, json.loads(message), streams)
                    for stream in streams:
                        os.close(stream)
    return None


def _watched(connection: socket.socket, request: dict[str, Any], streams: list[int]) -> dict[str, Any]:
    """Fork the command; this process waits for it and tells its id and how it ended."""
    pid = os.fork()
    if pid:
        for stream in streams:
            os.close(stream)
        connection.send(f"{pid}\n".encode())
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        connection.send(f"{code}\n".encode())
        os._exit(0)
    connection.close()
    os.setsid()
    for number, stream in zip((1, 2, 0), streams, strict=False):
        os.dup2(stream, number)
        os.close(stream)
    return request


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _main(address: str, owner: str, without: str) -> None:
    request = _serve(Path(address), int(owner), without)
    if request is None:
        return
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv = request["argv"]
    engine_dbt._SHARED = _WarmDbt(Path(address))
    atexit.register(engine_dbt._SHARED.end)
    module, function = request["call"].split(":")
    try:
        sys.exit(getattr(importlib.import_module(module), function)())
    except SystemExit as ended:
        _end(ended.code)
    except BaseException:
        traceback.print_exc()
        _end(1)


def _end(code: object) -> NoReturn:
    """End a fork as the interpreter would, but leave its memory alone: to take it apart is to copy it all first."""
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code or 0)


if __name__ == "__main__":
    _main(*sys.argv[1:])
