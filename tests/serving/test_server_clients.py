"""Clients of the feature server that do not do their part: slow, silent, foreign, endless or huge."""

from __future__ import annotations

import http.client
import json
import logging
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from typing import Any

import pytest
from scripted_dynamodb import Reply, Request, Script, answer
from scripted_dynamodb import serve as serve_script
from served import NOWHERE, Caller, profile_client, running

from dagster_prefs.errors import excerpt
from dagster_prefs.serving import ShopClient, server
from dagster_prefs.serving.connections import ConnectionLimits, raise_file_limit
from dagster_prefs.serving.gate import MAX_TARGET_BYTES, Hosts
from dagster_prefs.serving.preferences import DEFAULT_PROFILE_LIMIT, MAX_PROFILE_LIMIT
from dagster_prefs.serving.wire import MAX_BODY_BYTES, MAX_MESSAGE_CHARACTERS

NOW = datetime(2026, 3, 15, 12, tzinfo=UTC)
POST = b"POST /v1/profiles HTTP/1.1\r\nHost: localhost\r\nContent-Length: 20\r\n\r\n"
# Long enough that a test is never the one that is late, however busy the machine is.
PATIENT = ConnectionLimits(request_seconds=600, connections=1024)


@pytest.fixture(autouse=True)
def _credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")


def nothing(request: Request) -> Reply:
    """No item of anybody."""
    return answer({"Responses": {}} if request.operation == "BatchGetItem" else {})


@pytest.fixture
def script() -> Iterator[Script]:
    made, stop = serve_script(nothing)
    yield made
    stop()


@contextmanager
def peers(port: int, count: int, said: bytes) -> Iterator[list[socket.socket]]:
    """Connections that say this much and wait."""
    with ExitStack() as stack:
        made = []
        for _ in range(count):
            peer = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=60))
            if said:
                peer.sendall(said)
            made.append(peer)
        yield made


def rest(peer: socket.socket) -> bytes:
    """What the server says until it closes; nothing where it ends the connection at once."""
    found = b""
    try:
        while part := peer.recv(65536):
            found += part
    except ConnectionResetError:
        pass
    return found


def metric(caller: Caller, name: str) -> float:
    # On a busy machine this request may itself be too late for a short deadline.
    for _ in range(100):
        status, text = caller.get("/metrics")
        if status == 200:
            break
    (line,) = [line for line in text.splitlines() if line.startswith(f"prefs_server_{name} ")]
    return float(line.rpartition(" ")[2])


def eventually(true: Callable[[], bool]) -> None:
    for _ in range(1200):
        if true():
            return
        threading.Event().wait(0.05)
    raise AssertionError("it does not come true")


def test_heads_without_their_bodies_take_no_slot(script: Script) -> None:
    with (
        running(profile_client(script.endpoint), None, max_in_flight=4, limits=PATIENT) as caller,
        peers(caller.port, 64, POST) as silent,
    ):
        eventually(lambda: metric(caller, "connections") >= 64)
        for _ in range(3):
            assert caller.get("/v1/profiles/1?domains=watch")[0] == 200
            assert caller.get("/readyz")[0] == 200
        assert metric(caller, "in_flight") == 0
        # A body that does arrive is answered.
        silent[0].sendall(b'{"viewer_ids": [   7]}'[:20])
        assert silent[0].recv(12) == b"HTTP/1.1 400"


@pytest.mark.parametrize(
    ("said", "answered"),
    [
        (b"", b""),
        (b"\r\n\r\n", b"HTTP/1.1 408 Request Timeout"),
        (b"GET /heal", b"HTTP/1.1 408 Request Timeout"),
        (b"GET /healthz HTTP/1.1\r\nHost: local", b"HTTP/1.1 408 Request Timeout"),
        (POST, b"HTTP/1.1 408 Request Timeout"),
        (POST + b'{"viewer_i', b"HTTP/1.1 408 Request Timeout"),
        (POST.replace(b"Content-Length: 20", b"Transfer-Encoding: chunked") + b"5\r\n{}", b"HTTP/1.1 408"),
        # A second request on a connection that has been of use.
        (b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n" + POST, b"HTTP/1.1 200 OK"),
    ],
)
def test_a_request_has_a_deadline_to_arrive(script: Script, said: bytes, answered: bytes) -> None:
    # The one that begins with a request in time has to be in time.
    limits = ConnectionLimits(request_seconds=3 if b"200" in answered else 0.2)
    with (
        running(profile_client(script.endpoint), None, limits=limits) as caller,
        peers(caller.port, 1, said) as (peer,),
    ):
        found = rest(peer)
        assert found.startswith(answered), found
        assert bool(found) == bool(answered)
        if b"408" in answered:
            head, _, body = found.partition(b"\r\n\r\n")
            assert b"connection: close" in head
            assert json.loads(body)["error"]["code"] == "timeout"
        if b"200" in answered:
            assert found.count(b"HTTP/1.1 408") == 1
        eventually(lambda: metric(caller, "connections") == 1)
        assert metric(caller, "connections_late_total") >= 1
        assert metric(caller, "in_flight") == 0


def test_a_trickle_does_not_move_the_deadline(script: Script) -> None:
    with (
        running(
            profile_client(script.endpoint), None, limits=ConnectionLimits(request_seconds=0.5)
        ) as caller,
        peers(caller.port, 1, POST) as (peer,),
    ):
        ended = threading.Event()

        def trickle() -> None:
            try:
                while not ended.wait(0.05):
                    peer.sendall(b"\r\n")
            except OSError:
                pass

        thread = threading.Thread(target=trickle)
        thread.start()
        try:
            # A JSON text of blanks that is twenty bytes long is refused; the deadline comes before the answer.
            assert rest(peer)[:12] in (b"HTTP/1.1 408", b"HTTP/1.1 400", b"")
        finally:
            ended.set()
            thread.join(60)
        eventually(lambda: metric(caller, "connections") == 1)


def test_connections_that_say_nothing_give_way(script: Script, caplog: pytest.LogCaptureFixture) -> None:
    """More of them than the limit: health, readiness and requests are served, and the log has one line of it."""
    limits = ConnectionLimits(request_seconds=600, connections=32)
    with (
        caplog.at_level(logging.WARNING, "dagster_prefs.serving.connections"),
        running(profile_client(script.endpoint), None, limits=limits) as caller,
        peers(caller.port, 200, b""),
    ):
        for path in ("/healthz", "/readyz", "/v1/profiles/1?domains=watch"):
            assert caller.get(path)[0] == 200
        assert metric(caller, "connections") <= 32
        assert metric(caller, "connections_evicted_total") >= 168
        eventually(lambda: bool(caplog.records))
        lines = [record.getMessage() for record in caplog.records]
        assert len(lines) < 20
        assert "waited for a request while the limit of connections was reached" in lines[0]


def test_a_connection_that_is_being_answered_never_gives_way(script: Script) -> None:
    held, arrived = threading.Event(), threading.Semaphore(0)

    def behave(request: Request) -> Reply:
        arrived.release()
        held.wait(60)
        return nothing(request)

    script.behave = behave
    limits = ConnectionLimits(request_seconds=600, connections=2)
    request = b"GET /v1/profiles/1?domains=watch HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    with (
        running(profile_client(script.endpoint), None, limits=limits) as caller,
        peers(caller.port, 2, request) as busy,
    ):
        for _ in range(2):
            assert arrived.acquire(timeout=60)
        status, content = caller.get("/healthz")
        assert (status, content["error"]["code"]) == (503, "busy")
        held.set()
        assert all(rest(peer).startswith(b"HTTP/1.1 200 OK") for peer in busy)
        assert caller.get("/healthz")[0] == 200
        assert metric(caller, "connections_refused_total") == 1


def test_an_answer_that_nobody_takes_is_given_up(script: Script) -> None:
    """Its connection would stay for ever: the answer is larger than what the kernel keeps of it."""
    limits = ConnectionLimits(request_seconds=2)
    body = json.dumps({"viewer_ids": list(range(10_000))}).encode()
    head = f"POST /v1/profiles HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with running(profile_client(script.endpoint), None, limits=limits) as caller, socket.socket() as peer:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        peer.settimeout(60)
        peer.connect(("127.0.0.1", caller.port))
        peer.sendall(head + body)
        eventually(lambda: metric(caller, "connections_slow_total") == 1)
        eventually(lambda: metric(caller, "connections") == 1)
        assert caller.get("/healthz")[0] == 200


def test_a_head_without_end_is_cut(script: Script) -> None:
    with (
        running(profile_client(script.endpoint), None, limits=PATIENT) as caller,
        peers(caller.port, 1, b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX: ") as (peer,),
    ):
        try:
            for _ in range(64):
                peer.sendall(b"x" * 65536)
        except OSError:
            pass
        eventually(lambda: metric(caller, "connections") == 1)


def test_files_for_the_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    given: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: given.append(limits))
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 4096))
    assert raise_file_limit(1024) == 1024
    assert raise_file_limit(10_000) == 4096 - 256
    assert given == [(1280, 4096), (4096, 4096)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert raise_file_limit(10_000) == 10_000
    assert len(given) == 2


@pytest.fixture(scope="module")
def named() -> Iterator[Caller]:
    """A server with a name of its own, whose stores are not asked by what is refused."""
    made, stop = serve_script(nothing)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        with running(
            profile_client(made.endpoint),
            ShopClient(NOWHERE),
            catalogue_refresh_seconds=None,
            allowed_hosts=["features.example.com"],
        ) as caller:
            yield caller
    stop()


EVERY = (
    "/healthz",
    "/readyz",
    "/metrics",
    "/openapi.json",
    "/v1/profiles/1",
    "/v1/users/u/ranking",
    "/nowhere",
)


@pytest.mark.parametrize("path", EVERY)
@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"Host": "evil.example"}, "foreign_host"),
        ({"Host": "evil.example:8080"}, "foreign_host"),
        ({"Host": "127.0.0.1.evil.example"}, "foreign_host"),
        ({"Host": "localhost.evil.example"}, "foreign_host"),
        ({"Host": "notfeatures.example.com"}, "foreign_host"),
        ({"Host": ""}, "foreign_host"),
        ({"Host": "localhost", "Origin": "https://evil.example"}, "foreign_origin"),
        ({"Host": "localhost", "Origin": "http://203.0.113.7"}, "foreign_origin"),
        ({"Host": "localhost", "Origin": "null"}, "foreign_origin"),
        ({"Host": "localhost", "Origin": "http://["}, "foreign_origin"),
        ({"Host": "localhost", "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}, "foreign_origin"),
        (
            {"Host": "localhost", "Origin": "https://evil.example", "Connection": "Upgrade",
             "Upgrade": "websocket", "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ=="},
            "foreign_origin",
        ),
    ],
)  # fmt: skip
def test_a_website_reaches_nothing(named: Caller, path: str, headers: dict[str, str], code: str) -> None:
    status, content, answered = named.call("GET", path, headers=headers)
    assert (status, content["error"]["code"]) == (403, code)
    assert not any(name.startswith("access-control") for name in answered)


def test_two_hosts_are_both_looked_at(named: Caller) -> None:
    with peers(named.port, 1, b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n") as (
        peer,
    ):
        assert peer.recv(12) in (b"HTTP/1.1 403", b"HTTP/1.1 400")


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "features.example.com"},
        {"Host": "FEATURES.example.com.:8080"},
        {"Host": "localhost:1"},
        {"Host": "127.0.0.1"},
        {"Host": "[::1]:8080"},
        {"Host": "10.1.2.3:8080"},
        {"Host": "localhost:8080", "Origin": "http://localhost:8080"},
        # A link that somebody follows shows the page to them, not to the site.
        {"Host": "localhost", "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"},
        {"Host": "localhost", "Sec-Fetch-Site": "same-origin", "Sec-Fetch-Mode": "cors"},
    ],
)
def test_its_own_names_are_answered(named: Caller, headers: dict[str, str]) -> None:
    assert named.call("GET", "/healthz", headers=headers)[:2] == (200, {"status": "ok"})


def test_names_of_a_domain() -> None:
    hosts = Hosts(["*.svc.cluster.local", "one.example"])
    assert hosts.allow("features.prefs.svc.cluster.local:80")
    assert not hosts.allow("svc.cluster.local.evil.example")
    assert not hosts.allow("evilsvc.cluster.local")
    assert Hosts(["*"]).allow("anything.example")


KEY = "k" * (1024 * 1024 - 100)
DEEP = b"[" * 400_000 + b"]" * 400_000


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/profiles", {KEY: 1}),
        ("/v1/profiles", {"viewer_ids": [KEY]}),
        ("/v1/profiles", {"viewer_ids": KEY}),
        ("/v1/profiles", {"viewer_ids": [{KEY: 1}]}),
        ("/v1/profiles", {"viewer_ids": [{str(number): 1 for number in range(60_000)}]}),
        ("/v1/profiles", {"viewer_ids": [1], "domains": KEY}),
        ("/v1/profiles", {"viewer_ids": [1], "domains": [KEY]}),
        ("/v1/profiles", {"viewer_ids": [1], "domains": list(range(100_000))}),
        ("/v1/profiles", {"viewer_ids": [1], "fallback": KEY}),
        ("/v1/profiles", {"viewer_ids": [1], "fallback": [[KEY]]}),
        ("/v1/profiles", {"viewer_ids": [1], "budget_ms": KEY}),
        ("/v1/profiles", {"viewer_ids": [1], "consistent": KEY}),
        ("/v1/profiles", {"viewer_ids": [1], "max_staleness_seconds": {KEY: KEY[:1]}}),
        ("/v1/profiles", {"viewer_ids": [1] * 300_000}),
        ("/v1/profiles", DEEP),
        ("/v1/profiles", b'{"viewer_ids": [' + b"[" * 900 + b"]" * 900 + b"]}"),
        ("/v1/profiles", b'{"viewer_ids": [' + b"9" * 1_000_000 + b"]}"),
        ("/v1/profiles", b'{"viewer_ids": [1], "budget_ms": 1e131071}'),
        ("/v1/profiles", b'{"viewer_ids": [1], "budget_ms": NaN}'),
        ("/v1/profiles", b'{"viewer_ids": ["\\ud800"]}'),
        ("/v1/profiles", b'{"viewer_ids": ["\xff"]}'),
        ("/v1/profiles/" + "9" * 16_000, None),
        ("/v1/profiles/1?fallback=" + "x" * 16_000, None),
        ("/v1/profiles/1?" + "x" * 16_000, None),
        ("/v1/profiles/1?budget_ms=" + "9" * 16_000, None),
        ("/v1/users/canary:" + "x" * 16_000 + "/ranking", None),
        ("/v1/users/u/ranking?limit=" + "9" * 16_000, None),
        ("/v1/users/u/categories?cursor=" + "x" * 16_000, None),
        ("/v1/users/u/categories?cursor=%00", None),
    ],
)  # fmt: skip
def test_what_is_huge_is_refused_in_a_few_words(named: Caller, path: str, body: Any) -> None:
    status, content = named.call("GET" if body is None else "POST", path, body)[:2]
    assert status == 400, content
    assert len(content["error"]["message"]) < 600


def test_a_path_is_not_repeated_at_length(named: Caller) -> None:
    for method, path, expected in (
        ("GET", f"/{'x' * 16_000}", 404),
        ("PUT", f"/v1/users/{'x' * 16_000}/profile", 405),
        ("GET", f"/v1/profiles/{'9' * MAX_TARGET_BYTES}", 414),
        ("POST", "/v1/profiles", 413),
    ):
        body = b" " * (MAX_BODY_BYTES + 1) if expected == 413 else None
        status, content = named.call(method, path, body)[:2]
        assert status == expected
        assert len(content["error"]["message"]) < 300


def test_a_message_is_cut_whatever_made_it() -> None:
    from dagster_prefs.serving.wire import error_body

    cut = json.loads(error_body("internal", "\udcff" + "x" * 1_000_000))["error"]["message"]
    assert len(cut) <= MAX_MESSAGE_CHARACTERS + 20
    assert all(
        len(excerpt(value)) < 300
        for value in ("x" * 10**6, [["x" * 99] * 9] * 9, {"a": "b" * 10**6}, 10**4000)
    )


def test_a_chunked_body_is_bounded_too(named: Caller) -> None:
    with peers(named.port, 1, POST.replace(b"Content-Length: 20", b"Transfer-Encoding: chunked")) as (peer,):
        chunk = b"%x\r\n%b\r\n" % (65536, b" " * 65536)
        for _ in range(17):
            peer.sendall(chunk)
        assert peer.recv(12) == b"HTTP/1.1 413"


def test_one_look_for_all_who_ask_whether_it_is_ready(script: Script) -> None:
    held, arrived = threading.Event(), threading.Event()
    looks = []

    def behave(request: Request) -> Reply:
        looks.append(request)
        arrived.set()
        held.wait(60)
        return nothing(request)

    script.behave = behave
    ask = b"GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    with (
        running(profile_client(script.endpoint, threads=64), None) as caller,
        peers(caller.port, 50, ask) as many,
    ):
        assert arrived.wait(60)
        eventually(lambda: metric(caller, "connections") == 51)
        held.set()
        assert all(rest(peer).startswith(b"HTTP/1.1 200") for peer in many)
        # One read of one domain, one of all.
        assert len([look for look in looks if look.body]) <= 4


def test_readiness_is_what_a_request_would_be_told(script: Script) -> None:
    held, arrived = threading.Event(), threading.Event()

    def behave(request: Request) -> Reply:
        if "Key" in request.body and request.body["Key"]["viewer_id"] == {"N": "1"}:
            arrived.set()
            held.wait(60)
        return nothing(request)

    script.behave = behave
    with (
        running(profile_client(script.endpoint), None, max_in_flight=1) as caller,
        peers(caller.port, 1, b"GET /v1/profiles/1?domains=watch HTTP/1.1\r\nHost: localhost\r\n\r\n") as (
            peer,
        ),
    ):
        assert arrived.wait(60)
        assert caller.get("/v1/profiles/2")[0] == 503
        status, told = caller.get("/readyz")
        assert (status, told["ready"]) == (503, False)
        assert told["parts"]["requests"] == "1 requests are being answered, and more are refused"
        held.set()
        assert peer.recv(15) == b"HTTP/1.1 200 OK"
        eventually(lambda: caller.get("/readyz")[0] == 200)


@pytest.fixture
def many(shop: Any) -> Any:
    """A user who had to do with 1,300 categories."""
    shop.insert(
        "user_category_profile", *(("u", f"c{number:04}", number // 3, 1, NOW) for number in range(1300))
    )
    shop.insert("user_brand_profile", *(("u", f"b{number}", -number, 1, NOW) for number in range(150)))
    return shop


def test_the_size_of_a_profile_is_bounded_and_the_rest_can_be_had(many: Any) -> None:
    whole = many.client.get_user_profile("u", now=NOW)
    with running(None, ShopClient(many.engine), clock=lambda: NOW, catalogue_refresh_seconds=None) as caller:
        status, profile = caller.get("/v1/users/u/profile")
        assert status == 200
        assert [len(profile[name]) for name in ("categories", "brands", "recent")] == [
            DEFAULT_PROFILE_LIMIT, DEFAULT_PROFILE_LIMIT, 0,
        ]  # fmt: skip
        assert profile["top_categories"] == list(whole.top_categories)
        assert profile["next"]["recent"] is None
        for name, key in (("categories", "category"), ("brands", "brand")):
            entries, cursor = profile[name], profile["next"][name]
            while cursor is not None:
                status, page = caller.get(f"/v1/users/u/{name}?cursor={cursor}&limit=333")
                assert status == 200, page
                assert len(page["entries"]) <= 333
                entries, cursor = entries + page["entries"], page["next"]
            assert [entry[key] for entry in entries] == [
                getattr(entry, key) for entry in getattr(whole, name)
            ]
        assert len(caller.get(f"/v1/users/u/profile?limit={MAX_PROFILE_LIMIT}")[1]["categories"]) == 1000
        # A list can be read from its start as well, and only with a cursor of its own.
        start = caller.get("/v1/users/u/brands?limit=7")[1]
        assert start["entries"] == profile["brands"][:7]
        assert caller.get(f"/v1/users/u/categories?cursor={start['next']}")[0] == 400


def test_answers_are_encoded_beside_the_loop(online: Any, many: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever may be long: the loop answers everybody else meanwhile."""
    encoded: list[str] = []
    encode = server.encode

    def noted(content: Any) -> bytes:
        encoded.append(threading.current_thread().name)
        return encode(content)

    profiles, preferences = profile_client(online.endpoint, online.prefix), ShopClient(many.engine)
    with running(profiles, preferences, clock=lambda: NOW) as caller:
        caller.ready()
        monkeypatch.setattr(server, "encode", noted)
        for path in ("profile", "ranking", "categories", "brands", "recent"):
            assert caller.get(f"/v1/users/u/{path}")[0] == 200
        assert caller.post({"viewer_ids": list(range(500)), "domains": ["watch"]})[0] == 200
    assert [name.partition("_")[0] for name in encoded] == ["preferences"] * 5 + ["encode"]


def test_the_budget_covers_the_encoding(online: Any, many: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    held = threading.Event()

    def slow(content: Any) -> bytes:
        held.wait(60)
        return b"{}"

    profiles, preferences = profile_client(online.endpoint, online.prefix), ShopClient(many.engine)
    with running(profiles, preferences, clock=lambda: NOW) as caller:
        caller.ready()
        monkeypatch.setattr(server, "encode", slow)
        try:
            for answered in (
                caller.get("/v1/users/u/profile?budget_ms=300"),
                caller.post({"viewer_ids": [1, 2], "budget_ms": 300}),
            ):
                assert (answered[0], answered[1]["error"]["code"]) == (504, "timeout")
            assert caller.get("/healthz")[0] == 200
        finally:
            held.set()


def test_a_silent_peer_does_not_hold_up_the_end(script: Script) -> None:
    """Connections with half a request end with the server, at their deadline at the latest."""
    with peers_of_a_server(script, ConnectionLimits(request_seconds=2)) as silent:
        assert all(rest(peer)[:12] in (b"HTTP/1.1 408", b"") for peer in silent)


@contextmanager
def peers_of_a_server(script: Script, limits: ConnectionLimits) -> Iterator[list[socket.socket]]:
    with ExitStack() as stack:
        with running(profile_client(script.endpoint), None, limits=limits) as caller:
            silent = stack.enter_context(peers(caller.port, 8, POST))
            eventually(lambda: metric(caller, "connections") >= 8)
        yield silent


def test_keep_alive_still_works(script: Script) -> None:
    with running(profile_client(script.endpoint), None) as caller:
        connection = http.client.HTTPConnection("127.0.0.1", caller.port, timeout=60)
        for _ in range(3):
            connection.request("POST", "/v1/profiles", b'{"viewer_ids": [1], "domains": ["watch"]}')
            got = connection.getresponse()
            assert got.status == 200
            got.read()
        connection.close()
        with peers(caller.port, 1, b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n" * 5) as (peer,):
            found = b""
            while found.count(b'{"status":"ok"}') < 5:
                found += peer.recv(4096)
        with peers(caller.port, 1, POST.replace(b"\r\n\r\n", b"\r\nExpect: 100-continue\r\n\r\n")) as (peer,):
            assert peer.recv(21) == b"HTTP/1.1 100 Continue"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_of_the_machine_is_not_answered() -> None:
    """Where `PREFS_LOCAL_USERS=own`, the default, says so."""
    app = server.make_app([], None)
    served = server.make_server(app, ConnectionLimits(own_user_only=True))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        running = threading.Thread(target=served.run, kwargs={"sockets": [listener]}, daemon=True)
        running.start()
        ask = (
            "import encodings.idna, http.client, os, sys; os.setuid(int(sys.argv[2]));"
            "c = http.client.HTTPConnection('127.0.0.1', int(sys.argv[1]), timeout=30);"
            "c.request('GET', '/healthz'); print(c.getresponse().status)"
        )
        told = {
            uid: subprocess.run(
                [sys.executable, "-c", ask, str(port), str(uid)], capture_output=True, text=True
            )
            for uid in (0, 54_321)
        }
        served.should_exit = True
        running.join(30)
    assert told[0].stdout == "200\n", told[0].stderr
    assert told[54_321].stdout == ""
    assert re.search(r"RemoteDisconnected|ConnectionResetError", told[54_321].stderr)
    assert app.state.connections.ended["stranger"] == 1
