"""What another user of the machine and a foreign website reach of the embedded services: nothing."""

from __future__ import annotations

import http.client
import json
import os
import pickle
import socket
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from dagster_prefs import loopback
from dagster_prefs.local.aws import listen_aws, serve_aws
from dagster_prefs.local.services import LocalServices
from dagster_prefs.local.state import LocalServicesError
from dagster_prefs.loopback import foreign_request, is_stranger, loopback_hosts

ANOTHER_USER = 54_321
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")

SIGNED = {
    "authorization": "AWS4-HMAC-SHA256 Credential=local/20261129/eu-central-1/{service}/aws4_request, "
    "SignedHeaders=host, Signature=0",
    "content-type": "application/x-amz-json-1.0",
}


def as_another_user(action: Callable[[], Any]) -> Any:
    """Run `action` in a child process of another uid; its result, or the exception that ended it."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(ANOTHER_USER)
            os.setuid(ANOTHER_USER)
            result: Any = action()
        except BaseException as error:
            result = type(error).__name__, str(error)
        with os.fdopen(write_end, "wb") as pipe:
            pickle.dump(result, pipe)
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        found = pickle.load(pipe)
    os.waitpid(child, 0)
    return found


def ask(
    port: int, path: str = "/", *, method: str = "POST", service: str = "dynamodb", **headers: str
) -> int:
    """Send a signed request as an AWS client does; the status of the answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    given = {name: value.format(service=service) for name, value in SIGNED.items()}
    given |= {"x-amz-target": "DynamoDB_20120810.ListTables"}
    given |= {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        connection.request(method, path, b"{}", given)
        return connection.getresponse().status
    finally:
        connection.close()


@pytest.fixture(scope="module")
def aws_port() -> Iterator[int]:
    """The local AWS server as `prefs up` starts it."""
    listener = listen_aws(0)
    stop = serve_aws(listener)
    yield listener.getsockname()[1]
    stop()
    listener.close()


def test_a_program_of_this_user_reads_and_writes(aws_port: int) -> None:
    assert ask(aws_port) == 200
    assert ask(aws_port, host=f"localhost:{aws_port}") == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example"},
        {"host": "evil.example:80"},
        {"host": "127.0.0.1"},
        {"host": ""},
        {"origin": "https://evil.example"},
        {"origin": "http://127.0.0.1:1"},
        {"origin": "null"},
        {"sec_fetch_site": "cross-site"},
        {"sec_fetch_site": "same-site"},
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
def test_a_websites_request_to_the_aws_server_is_refused(
    aws_port: int, headers: dict[str, str], method: str
) -> None:
    assert ask(aws_port, method=method, **headers) == 403


@pytest.mark.parametrize("service", ["batch", "lambda", "ec2", "ssm", "secretsmanager", "execute-api"])
def test_a_service_that_the_product_does_not_use_is_not_served(aws_port: int, service: str) -> None:
    assert ask(aws_port, service=service) == 403


@pytest.mark.parametrize(
    "path", ["/moto-api/", "/moto-api/reset", "/moto-api/data.json", "/moto-api/seed?a=1"]
)
def test_nobody_can_reset_the_aws_server(aws_port: int, path: str) -> None:
    assert ask(aws_port, path) == 403
    assert ask(aws_port, "/latest/meta-data/iam/security-credentials/") == 403


def test_no_answer_lets_a_website_read_it(aws_port: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", aws_port, timeout=30)
    given = {name: value.format(service="dynamodb") for name, value in SIGNED.items()}
    connection.request("POST", "/", b"{}", given | {"x-amz-target": "DynamoDB_20120810.ListTables"})
    answer = connection.getresponse()
    assert json.loads(answer.read()) == {"TableNames": []}
    assert [name for name in answer.headers if name.lower().startswith("access-control")] == []
    connection.close()


def test_docker_is_out_of_the_services_reach(
    services: LocalServices, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_HOST", "unix:///var/run/docker.sock")
    assert [name for name in services._environment() if name.startswith("DOCKER")] == []


@AS_ROOT
def test_another_user_reaches_neither_the_aws_server_nor_the_engine_nor_the_state(
    services: LocalServices, aws_port: int
) -> None:
    # The client's library is loaded before the other user would have to read it.
    where = f"host=127.0.0.1 port={services.postgres_port} user=prefs dbname=postgres"
    with psycopg.connect(where, passfile=str(services.passfile)) as own:
        assert own.execute("select 1").fetchone() == (1,)

    kind, _ = as_another_user(lambda: ask(aws_port))
    assert kind in ("RemoteDisconnected", "ConnectionResetError", "BrokenPipeError")

    kind, text = as_another_user(lambda: psycopg.connect(where, passfile="/dev/null").close())
    assert (kind, "no password supplied" in text) == ("OperationalError", True)
    superuser = where.replace("user=prefs", "user=postgres")
    kind, text = as_another_user(lambda: psycopg.connect(superuser, password="postgres").close())
    assert (kind, "password authentication failed" in text) == ("OperationalError", True)

    def readable() -> list[str]:
        found = []
        for folder, folders, files in os.walk(services.data_dir):
            # A copy of PostgreSQL's programs, for the user that it runs as under root.
            folders[:] = [name for name in folders if not name.startswith("postgresql-")]
            for name in files:
                try:
                    (Path(folder) / name).read_bytes()
                    found.append(name)
                except OSError:
                    pass
            found += [name for name in folders if os.access(Path(folder) / name, os.R_OK | os.X_OK)]
        return found

    assert as_another_user(readable) == []
    assert list(services.data_dir.rglob("*")) != []


@pytest.fixture(params=["_asked_uid", "_listed_uid"])
def only_one_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel is asked for the connection, or only its listing of all connections is read."""
    for other in {"_asked_uid", "_listed_uid"} - {request.param}:
        monkeypatch.setattr(loopback, other, lambda client, server: None)


@pytest.mark.usefixtures("only_one_way")
def test_a_connection_whose_owner_is_gone_is_a_strangers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        accepted, address = server.accept()
        with accepted:
            assert not is_stranger(address, server.getsockname())
            # A closed socket is listed as root's: an attacker would send and hang up.
            client.close()
            assert is_stranger(address, server.getsockname())


@pytest.mark.usefixtures("only_one_way")
def test_a_client_that_uses_an_ipv6_socket_is_known() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_INET6) as client:
        client.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        client.connect(("::ffff:127.0.0.1", server.getsockname()[1]))
        accepted, address = server.accept()
        with accepted:
            assert not is_stranger(address, server.getsockname())


def test_the_platforms_role_runs_no_program(services: LocalServices) -> None:
    where = f"host=127.0.0.1 port={services.postgres_port} user=prefs dbname=postgres"
    with psycopg.connect(where, passfile=str(services.passfile), autocommit=True) as connection:
        connection.execute("create temporary table out (line text)")
        for statement in (
            "copy out from program 'id'",
            "copy out from '/etc/passwd'",
            "copy out to '/tmp/prefs-test-out'",
            "select pg_read_file('/etc/passwd')",
            "alter role prefs superuser",
            "alter system set listen_addresses = '*'",
            "create role other login",
        ):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute(statement)  # type: ignore[call-overload]
        shown = connection.execute("select rolsuper, rolcreaterole, rolreplication, rolbypassrls from pg_roles "
                                   "where rolname = current_user").fetchone()  # fmt: skip
    assert shown == (False, False, False, False)


def test_a_lost_password_file_is_made_again_with_another_password(free_port: Callable[[], int]) -> None:
    with tempfile.TemporaryDirectory(prefix="prefs-tests-") as name:
        services = LocalServices(Path(name) / "data", free_port(), free_port(), with_aws=False)
        try:
            services.up(owner_pid=os.getpid())
            first = services.passfile.read_text()
            assert stat.S_IMODE(services.passfile.stat().st_mode) == 0o600
            assert stat.S_IMODE(services.data_dir.stat().st_mode) == 0o700
            assert [
                path.name
                for path in services.data_dir.rglob("*")
                if stat.S_IMODE(path.stat().st_mode) & 0o077 and not path.is_symlink()
            ] == []
            services.down()
            services.passfile.unlink()
            services.up(owner_pid=os.getpid())
            assert services.passfile.read_text() != first
            password = services.passfile.read_text().rsplit(":", 1)[1].strip()
            logged = [path.read_text() for path in (services.data_dir / "logs").iterdir()]
            assert [text for text in logged if password in text] == []
        finally:
            services.down()
            services.delete_state()
        assert not services.passfile.exists()


def test_a_cluster_that_lets_everybody_in_is_refused_with_the_remedy(free_port: Callable[[], int]) -> None:
    with tempfile.TemporaryDirectory(prefix="prefs-tests-") as name:
        services = LocalServices(Path(name) / "data", free_port(), free_port(), with_aws=False)
        try:
            services.up(owner_pid=os.getpid())
            services.down()
            from dagster_prefs.local.postgres import Cluster

            rules = Cluster(services.data_dir).path / "pg_hba.conf"
            rules.write_text("host all all 127.0.0.1/32 trust\n")
            with pytest.raises(
                LocalServicesError, match=r"let in every user .* run `prefs down --delete-state`"
            ):
                services.up(owner_pid=os.getpid())
        finally:
            services.down()
            services.delete_state()


@pytest.mark.parametrize("user", ['quo"te', "back\\slash", "co:lon", "o'clock"])
def test_any_name_of_a_role_gets_its_password(free_port: Callable[[], int], user: str) -> None:
    with tempfile.TemporaryDirectory(prefix="prefs-tests-") as name:
        services = LocalServices(
            Path(name) / "data", free_port(), free_port(), with_aws=False, user=user, database=user
        )
        try:
            services.up(owner_pid=os.getpid())
            with psycopg.connect(
                host="127.0.0.1", port=services.postgres_port, user=user, dbname=user,
                passfile=str(services.passfile),
            ) as connection:  # fmt: skip
                assert connection.execute("select current_user").fetchone() == (user,)
        finally:
            services.down()
            services.delete_state()


def test_the_superuser_is_no_platforms_role(free_port: Callable[[], int]) -> None:
    with tempfile.TemporaryDirectory(prefix="prefs-tests-") as name:
        services = LocalServices(
            Path(name) / "data", free_port(), free_port(), with_aws=False, user="postgres"
        )
        with pytest.raises(
            LocalServicesError, match="PREFS_ENGINE_USER=postgres is the embedded engine's superuser"
        ):
            services.up(owner_pid=os.getpid())


@pytest.mark.parametrize(
    ("method", "headers", "allowed"),
    [
        ("GET", {"host": "127.0.0.1:3000"}, True),
        ("GET", {"host": "LocalHost:3000"}, True),
        ("POST", {"host": "localhost:3000", "origin": "http://localhost:3000", "sec-fetch-site": "same-origin"}, True),
        ("POST", {"host": "localhost:3000", "origin": "http://127.0.0.1:3000"}, False),
        ("GET", {}, False),
        ("GET", {"host": "localhost:3000.evil.example"}, False),
        # A link to the UI that the user follows.
        (
            "GET",
            {"host": "localhost:3000", "sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate",
             "sec-fetch-dest": "document"},
            True,
        ),
        # A form that a page submits, and a frame.
        (
            "POST",
            {"host": "localhost:3000", "sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate",
             "sec-fetch-dest": "document"},
            False,
        ),
        (
            "GET",
            {"host": "localhost:3000", "sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate",
             "sec-fetch-dest": "iframe"},
            False,
        ),
    ],
)  # fmt: skip
def test_what_a_foreign_request_is(method: str, headers: dict[str, str], allowed: bool) -> None:
    assert (foreign_request(headers, loopback_hosts(3000), method=method) is None) == allowed
