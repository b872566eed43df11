"""No password in clear: what goes to an engine that offers no TLS, or asks in the wrong way."""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psycopg2.extensions
import pytest
import yaml
from psycopg import pq
from warm import Warm

from dagster_prefs.engine.connection import EngineConfiguration, EngineUnavailable, on_this_machine
from dagster_prefs.engine.dbt import Dbt
from dagster_prefs.settings import Settings

PROJECT = Path(__file__).resolve().parents[2] / "dbt_project"
SECRET = "open-sesame-4711"
# It leads to this machine, and neither libpq nor this project takes it for loopback.
ELSEWHERE = "0.0.0.0"
SSL_REQUEST = 80877103


class FakeEngine:
    """A server that has no TLS and, where somebody talks to it in clear, asks for the password in clear."""

    def __init__(self, *, asks: bool = True) -> None:
        self.asks = asks
        self.asked_for_tls = 0
        self.startups = 0
        self.heard = b""
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                peer, _ = self._listener.accept()
            except OSError:
                return
            with peer:
                peer.settimeout(10)
                with suppress(OSError, struct.error):
                    self._talk(peer)

    def _talk(self, peer: socket.socket) -> None:
        while head := peer.recv(8, socket.MSG_WAITALL):
            length, code = struct.unpack("!ii", head)
            if code == SSL_REQUEST:
                self.asked_for_tls += 1
                peer.sendall(b"N")
                continue
            self.startups += 1
            peer.recv(length - 8, socket.MSG_WAITALL)
            method = 3 if self.asks else 0
            peer.sendall(b"R" + struct.pack("!ii", 8, method))
            while found := peer.recv(4096):
                self.heard += found
            return

    def close(self) -> None:
        self._listener.close()


@contextmanager
def fake(*, asks: bool = True) -> Iterator[FakeEngine]:
    made = FakeEngine(asks=asks)
    try:
        yield made
    finally:
        made.close()


def connection(engine: FakeEngine, host: str = ELSEWHERE, sslmode: str = "") -> EngineConfiguration:
    return EngineConfiguration(host, engine.port, "dev", "root", SECRET, sslmode, kind="risingwave")


def test_an_engine_that_has_no_tls_gets_nothing() -> None:
    with fake() as engine:
        with pytest.raises(EngineUnavailable) as caught:
            connection(engine).connect()
        assert engine.asked_for_tls == 1
        assert (engine.startups, engine.heard) == (0, b"")
    assert str(caught.value) == (
        f"the engine at 0.0.0.0:{engine.port} does not offer TLS, which PREFS_ENGINE_SSLMODE requires: give RisingWave "
        "RW_SSL_CERT and RW_SSL_KEY, or set PREFS_ENGINE_SSLMODE=disable where the network itself is trusted"
    )


def test_without_tls_in_so_many_words_the_password_is_still_not_said_in_clear() -> None:
    with fake() as engine:
        with pytest.raises(EngineUnavailable, match="asks for the password in clear text"):
            connection(engine, sslmode="disable").connect()
        assert engine.startups == 1
        assert SECRET.encode() not in engine.heard


def test_an_engine_that_does_not_ask_for_the_password_is_not_the_right_one() -> None:
    with fake(asks=False) as engine, pytest.raises(EngineUnavailable, match="does not ask for the password"):
        connection(engine, sslmode="disable").connect()


def test_on_this_machine_a_password_may_be_asked_for_in_any_way() -> None:
    """The other way round, so that the fake engine is seen to hear a password."""
    with fake() as engine:
        found = connection(engine, host="127.0.0.1")
        threading.Timer(1, engine.close).start()
        with pytest.raises(EngineUnavailable):
            found.connect()
        assert SECRET.encode() in engine.heard


@pytest.mark.parametrize("sslmode", ["", "disable"])
def test_dbt_in_this_process_says_no_password_either(
    sslmode: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    target = tmp_path_factory.getbasetemp() / "risingwave-offline"
    with fake() as engine:
        with pytest.raises(EngineUnavailable) as caught:
            Dbt(connection(engine, sslmode=sslmode), PROJECT, target).run("run", ["raw_items"])
        assert SECRET.encode() not in engine.heard
        assert (engine.startups > 0) == (sslmode == "disable")
    assert ("does not offer TLS" in str(caught.value)) == (sslmode == "")
    assert SECRET not in str(caught.value)


def test_dbt_alone_gets_no_further_than_an_engine_without_tls(tmp_path: Path, warm: Warm) -> None:
    with fake() as engine:
        done = warm.run(
            ["dbt", "debug", "--connection", "--target", "risingwave"],
            cwd=PROJECT,
            environment={
                **os.environ,
                "PREFS_ENGINE": "risingwave",
                "PREFS_ENGINE_HOST": ELSEWHERE,
                "PREFS_ENGINE_PORT": str(engine.port),
                "PREFS_ENGINE_PASSWORD": SECRET,
                "PREFS_ENGINE_SSLMODE": "prefer",
                "DBT_TARGET_PATH": str(tmp_path / "target"),
                "DBT_LOG_PATH": str(tmp_path / "logs"),
            },
        )
        assert engine.asked_for_tls
        assert (engine.startups, engine.heard) == (0, b"")
    assert "server does not support SSL" in " ".join(done.stdout.split())
    assert SECRET not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("host", "here"),
    [
        ("127.0.0.1", True), ("127.9.9.9", True), ("localhost", True), ("::1", True), ("/run/pg", True), ("@pg", True),
        ("", True), ("0.0.0.0", False), ("10.0.0.1", False), ("risingwave", False), ("localhost.example", False),
        ("127.0.0.1.nip.io", False), ("127.0.0.1,10.0.0.1", False), ("127.0.0.1,::1", True), ("fe80::1", False),
    ],
)  # fmt: skip
def test_what_is_on_this_machine(host: str, here: bool) -> None:
    assert on_this_machine(host) is here
    found = EngineConfiguration(host, 1, "d", "u", SECRET)
    assert found.parameters()["sslmode"] == ("prefer" if here else "require")
    assert (found.require_auth is None) is here


@pytest.mark.parametrize("sslmode", ["allow", "prefer"])
def test_a_mode_that_falls_back_to_clear_is_refused_off_this_machine(sslmode: str) -> None:
    with pytest.raises(EngineUnavailable, match=f"sslmode {sslmode} would send the password in clear text"):
        EngineConfiguration("db.example", 1, "d", "u", sslmode=sslmode)
    assert EngineConfiguration("127.0.0.1", 1, "d", "u", sslmode=sslmode).parameters()["sslmode"] == sslmode


def test_only_a_checked_certificate_gets_a_password_in_clear() -> None:
    found = {
        mode: EngineConfiguration("db.example", 1, "d", "u", SECRET, mode).require_auth
        for mode in ("disable", "require", "verify-ca", "verify-full")
    }
    assert found == {
        "disable": "scram-sha-256,md5",
        "require": "scram-sha-256,md5",
        "verify-ca": "scram-sha-256,md5,password",
        "verify-full": "scram-sha-256,md5,password",
    }
    assert EngineConfiguration("db.example", 1, "d", "u").require_auth is None


def test_both_drivers_know_the_parameter() -> None:
    # Since libpq 16; an older one refuses the unknown name, and nothing would connect.
    assert min(pq.version(), psycopg2.extensions.libpq_version()) >= 160_000


def test_dbts_profile_knows_the_modes_of_the_setting() -> None:
    profile = yaml.safe_load((PROJECT / "profiles.yml").read_text())
    rule = profile["dagster_prefs"]["outputs"]["risingwave"]["sslmode"]
    (modes,) = [
        kind.__args__
        for kind in Settings.model_fields["engine_sslmode"].annotation.__args__  # type: ignore[union-attr]
        if hasattr(kind, "__args__")
    ]
    assert f"in {modes!r}" in rule
