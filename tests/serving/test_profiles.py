"""Both transports against a real DynamoDB interface and against one that goes wrong by script."""

from __future__ import annotations

import asyncio
import copy
import json
import pickle
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import fields
from decimal import Decimal
from pathlib import Path
from typing import Any, get_args, get_type_hints
from uuid import UUID

import pytest
from certificates import write_certificate
from declared import COURSES, PROJECT, two_entities
from scripted_dynamodb import Request, Script, answer, failure, http, serve
from shipped import LONG, SHORT, with_computed_attributes

from dagster_prefs.declarations.contract import ContractError, contract_dict, load_contract, parse_contract
from dagster_prefs.declarations.registry import RegistryError, load_registry, parse_registry, registry_dict
from dagster_prefs.dynamodb.items import ItemEncoder, ItemError
from dagster_prefs.dynamodb.transport import ReadError
from dagster_prefs.errors import PrefsError
from dagster_prefs.serving import AsyncProfileClient, ClientOptions, ProfileClient
from dagster_prefs.serving.domains import domain_class
from dagster_prefs.serving.generate import render_client
from dagster_prefs.serving.profiles import ProfileError

REGION = "eu-central-1"
AT = 1_760_000_000_000
WATCH = [Decimal("12.5"), Decimal("40.123456"), 3, 2, 5, AT]
PREFERENCES = ["drama", ["drama", "news"], [Decimal("0.75"), Decimal("0.25")], None, Decimal("9.1"), AT]
TRANSPORTS = ["lean", "boto3"]
MINUTES, TITLES = f"watch_minutes_{SHORT}d", f"titles_{SHORT}d"
SERVED = with_computed_attributes()
CONTRACT = SERVED.contract
WatchProfile, InteractionsProfile, PreferencesProfile = (
    domain_class(CONTRACT.domain(name)) for name in ("watch", "interactions", "preferences")
)


@pytest.fixture(params=TRANSPORTS)
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def script() -> Iterator[Script]:
    made, stop = serve(lambda request: answer({}))
    yield made
    stop()


def scripted(script: Script, transport: str, **options: Any) -> ProfileClient:
    given = ClientOptions(
        **{"budget_seconds": 20, "read_timeout_seconds": 10, "transport": transport, **options}
    )
    return ProfileClient(SERVED, endpoint_url=script.endpoint, region=REGION, options=given)


def item(name: str, viewer_id: int, values: list[Any]) -> dict[str, Any]:
    return ItemEncoder(CONTRACT, CONTRACT.domain(name)).encode(viewer_id, values)


def wanted_viewer(request: Request) -> int:
    return int(request.body["Key"]["viewer_id"]["N"])


def viewers_only(behave: Callable[[Request], bytes | None]) -> Callable[[Request], bytes | None]:
    """Answer canaries with nothing, everything else by `behave`."""

    def split(request: Request) -> bytes | None:
        if request.operation == "GetItem" and wanted_viewer(request) < 0:
            return answer({})
        return behave(request)

    return split


def viewer_requests(script: Script) -> list[Request]:
    return [
        request
        for request in script.requests
        if request.operation != "GetItem" or wanted_viewer(request) >= 0
    ]


def test_typed_classes_are_the_contract() -> None:
    python = {
        "integer": int,
        "decimal": Decimal,
        "float": float,
        "string": str,
        "list<string>": list[str],
        "list<decimal>": list[Decimal],
        "list<integer>": list[int],
    }
    with_null = {"list<string>": list[str | None], "list<decimal>": list[Decimal | None]}
    for domain in [*CONTRACT.domains.values(), *load_contract(COURSES).domains.values()]:
        made = domain_class(domain)
        assert made is domain_class(domain)
        assert made.__name__ == f"{domain.name.title()}Profile"
        assert [entry.name for entry in fields(made)] == list(domain.attributes)
        for name, hint in get_type_hints(made).items():
            attribute = domain.attributes[name]
            # Only a cold start has no last event; the contract's items always have one.
            nullable = attribute.nullable or name == "last_event_at"
            expected = (with_null if attribute.null_elements else python)[attribute.type]
            assert hint == (expected | None if nullable else expected), name
            assert not nullable or type(None) in get_args(hint)


def test_a_profile_survives_pickle_and_copy(online: Any, transport: str) -> None:
    online.put("watch", 7, WATCH)
    with online.reader(transport) as client:
        profile = client.get(7)
    for again in (pickle.loads(pickle.dumps(profile)), copy.deepcopy(profile)):
        assert again == profile
        assert type(again) is type(profile)
        assert getattr(again.watch, f"watch_minutes_{LONG}d") == Decimal("40.123456")


def test_a_key_column_may_be_called_as_the_profile_calls_it() -> None:
    text = (COURSES / "registry.json").read_text().replace("learner_id", "id")
    registry = parse_registry(json.loads(text))
    with ProfileClient(registry, endpoint_url="http://127.0.0.1:9", region="eu-central-1") as client:
        assert client.get("ana", fallback="cold_start").id == "ana"
    written = render_client(registry.contract)
    assert "def id(" not in written
    compile(written, "client.py", "exec")


def test_all_domains_of_a_viewer(online: Any, transport: str) -> None:
    online.put("watch", 7, WATCH)
    online.put("preferences", 7, PREFERENCES)
    with online.reader(transport) as client:
        profile = client.get(7)
    assert profile.watch == WatchProfile(Decimal("12.5"), Decimal("40.123456"), 3, 2, 5, AT)
    assert isinstance(getattr(profile.watch, TITLES), int)
    assert profile.preferences == PreferencesProfile(*PREFERENCES)
    assert profile.interactions == InteractionsProfile()
    assert {name: read.state for name, read in profile.reads.items()} == {
        "watch": "found",
        "interactions": "cold_start",
        "preferences": "found",
    }
    assert not profile.partial
    assert not profile.cold_start
    assert profile.reads["watch"].last_event_at == AT
    assert json.loads(json.dumps(profile.as_dict(), default=str))["domains"]["watch"]["state"] == "found"


@pytest.mark.parametrize(
    ("domains", "operations"),
    [
        (["watch"], ["GetItem"]),
        (["watch", "engagement#preferences", "watch"], ["GetItem"] * 2),
        (None, ["BatchGetItem"]),
    ],
)
def test_the_request_fits_the_number_of_domains(
    script: Script, transport: str, domains: list[str] | None, operations: list[str]
) -> None:
    script.behave = viewers_only(
        lambda request: answer({"Responses": {}} if request.operation == "BatchGetItem" else {})
    )
    with scripted(script, transport) as client:
        client._lag_read_at = dict.fromkeys(client._lag_read_at, float("inf"))
        profile = client.get(1, domains)
    assert profile.cold_start
    assert [request.operation for request in script.requests] == operations


def test_an_unknown_viewer_is_a_typed_cold_start(online: Any, transport: str) -> None:
    with online.reader(transport) as client:
        profile = client.get(404)
    assert profile.cold_start
    assert not profile.partial
    assert getattr(profile.watch, MINUTES) == 0
    assert profile.preferences.favorite_genres == []
    assert profile.watch.last_event_at is None


def test_many_viewers_in_chunks(online: Any, transport: str) -> None:
    for viewer in range(0, 120, 3):
        online.put("watch", viewer, [Decimal(viewer), *WATCH[1:]])
    with online.reader(transport) as client:
        profiles = client.get_many([*range(119, -1, -1), 5], ["watch"])
    assert list(profiles) == list(range(119, -1, -1))
    for viewer, profile in profiles.items():
        assert getattr(profile.watch, MINUTES) == (viewer if viewer % 3 == 0 else 0)
        assert profile.reads["watch"].state == ("found" if viewer % 3 == 0 else "cold_start")


def test_strong_consistency_is_passed_on(script: Script, transport: str) -> None:
    with scripted(script, transport, consistent=True) as client:
        client.get(1, ["watch"])
        client.get(2, ["watch"], consistent=False)
    consistent = {
        wanted_viewer(request): request.body["ConsistentRead"] for request in viewer_requests(script)
    }
    assert consistent == {1: True, 2: False}


def test_freshness_comes_from_the_canary_and_is_cached(online: Any, transport: str) -> None:
    online.put("watch", 1, WATCH)
    online.put("watch", -1, [*WATCH[:-1], AT])
    with online.reader(transport, clock=lambda: AT / 1000 + 4.5) as client:
        first = client.get(1, ["watch", "interactions"])
        online.put("watch", -1, [*WATCH[:-1], AT + 4_000])
        second = client.get(1, ["watch"], max_staleness_seconds=2)
        # Cached figures are 5 s old at most; make these older.
        client._lag_read_at = dict.fromkeys(client._lag_read_at, float("-inf"))
        third = client.get(1, ["watch"], max_staleness_seconds=60)
    read = first.reads["watch"]
    assert (read.freshness_seconds, read.max_staleness_seconds, read.fresh) == (pytest.approx(4.5), 5, True)
    unknown = first.reads["interactions"]
    assert (unknown.freshness_seconds, unknown.fresh) == (None, None)
    assert (second.reads["watch"].freshness_seconds, second.reads["watch"].fresh) == (
        pytest.approx(4.5),
        False,
    )
    assert (third.reads["watch"].freshness_seconds, third.reads["watch"].max_staleness_seconds) == (
        pytest.approx(0.5),
        5,
    )


def test_a_canary_that_is_ahead_or_long_past_is_not_fresh(online: Any, transport: str) -> None:
    online.put("watch", 1, WATCH)
    online.put("watch", -1, [*WATCH[:-1], AT])
    read = {}
    for ahead in (4, 6, 3_600, -86_400 * 20):
        with online.reader(transport, clock=lambda ahead=ahead: AT / 1000 - ahead) as client:
            found = client.get(1, ["watch"], max_staleness_seconds=1).reads["watch"]
            read[ahead] = (found.freshness_seconds, found.fresh)
    # Clocks differ by some seconds. What is further ahead says nothing; what is long past is as old as it is.
    assert read == {4: (0.0, True), 6: (None, None), 3_600: (None, None), -86_400 * 20: (86_400 * 20, False)}


def test_a_canary_that_does_not_answer_holds_nobody_up(script: Script, transport: str) -> None:
    def behave(request: Request) -> bytes:
        if wanted_viewer(request) < 0:
            return failure("ThrottlingException")
        return answer({"Item": item("watch", 1, WATCH)})

    script.behave = behave
    with scripted(script, transport) as client:
        profile = client.get(1, ["watch"])
    assert getattr(profile.watch, TITLES) == 3
    assert not profile.partial
    assert profile.reads["watch"].freshness_seconds is None
    assert len(script.requests) == 2


TRANSIENT: dict[str, bytes | None] = {
    "throttling": failure("ProvisionedThroughputExceededException"),
    "throttled by HTTP": http(429, b"slow down"),
    "5xx": failure("InternalServerError", status=500),
    "5xx without JSON": http(503, b"<html>"),
    "CRC mismatch": http(200, b'{"Item":{}}', checksum=1),
    "truncated body": http(200, b'{"Item":', length=4000, head="Connection: close\r\n"),
    "not JSON": http(200, b"{"),
    "closed without an answer": None,
}


@pytest.mark.parametrize("fault", TRANSIENT)
def test_transient_faults_are_retried(script: Script, transport: str, fault: str) -> None:
    def behave(request: Request) -> bytes | None:
        if len(viewer_requests(script)) <= 2:
            return TRANSIENT[fault]
        return answer({"Item": item("watch", 1, WATCH)})

    script.behave = viewers_only(behave)
    with scripted(script, transport) as client:
        profile = client.get(1, ["watch"])
    assert getattr(profile.watch, MINUTES) == Decimal("12.5")
    assert len(viewer_requests(script)) == 3


@pytest.mark.parametrize("fault", TRANSIENT)
def test_faults_that_stay_leave_the_domain_out(script: Script, transport: str, fault: str) -> None:
    def behave(request: Request) -> bytes | None:
        if request.body["Key"]["domain_key"]["S"] == "engagement#watch":
            return TRANSIENT[fault]
        return answer({"Item": item("interactions", 1, [1, 2, 3, AT])})

    script.behave = viewers_only(behave)
    with scripted(script, transport, max_attempts=2) as client:
        profile = client.get(1, ["watch", "interactions"])
        assert profile.partial
        assert getattr(profile.interactions, f"likes_{LONG}d") == 1
        assert profile.reads["watch"].state == "failed"
        with pytest.raises(ReadError, match="DynamoDB"):
            _ = getattr(profile.watch, TITLES)
        covered = client.get(1, ["watch", "interactions"], fallback="cold_start")
    assert covered.partial
    assert covered.watch == WatchProfile()
    assert isinstance(covered.reads["watch"].error, ReadError)


@pytest.mark.parametrize(
    ("reply", "kind", "message"),
    [
        (failure("ExpiredTokenException"), "credentials", "check the AWS credentials"),
        (failure("UnrecognizedClientException"), "credentials", "check the AWS credentials"),
        (failure("AccessDeniedException"), "credentials", "check the AWS credentials"),
        (failure("ResourceNotFoundException", "no such table"), "missing_table", "no such table.*provision"),
        (failure("ValidationException", "bad key"), "refused", "ValidationException.*bad key"),
    ],
)
def test_errors_that_no_retry_heals_are_raised_at_once(
    script: Script, transport: str, reply: bytes, kind: str, message: str
) -> None:
    script.behave = lambda request: reply
    with (
        scripted(script, transport, fallback="cold_start") as client,
        pytest.raises(ReadError, match=message) as caught,
    ):
        client.get(1, ["watch"])
    assert caught.value.kind == kind
    assert len(viewer_requests(script)) == 1


def test_a_spent_budget_returns_what_arrived(script: Script, transport: str) -> None:
    release = threading.Event()

    def behave(request: Request) -> bytes:
        if request.body["Key"]["domain_key"]["S"] == "engagement#watch":
            release.wait(30)
        return answer({"Item": item("interactions", 1, [1, 2, 3, AT])})

    script.behave = viewers_only(behave)
    with scripted(script, transport) as client:
        profile = client.get(1, ["watch", "interactions"], budget_seconds=2)
        release.set()
    assert profile.partial
    assert getattr(profile.interactions, f"shares_{LONG}d") == 2
    error = profile.reads["watch"].error
    assert isinstance(error, ReadError)
    assert error.kind == "timeout"


def test_unprocessed_keys_are_asked_for_again(script: Script, transport: str) -> None:
    def behave(request: Request) -> bytes:
        ((table, wanted),) = request.body["RequestItems"].items()
        taken, left = wanted["Keys"][:40], wanted["Keys"][40:]
        items = [item("watch", int(key["viewer_id"]["N"]), WATCH) for key in taken]
        return answer(
            {"Responses": {table: items}, "UnprocessedKeys": {table: {"Keys": left}} if left else {}}
        )

    script.behave = viewers_only(behave)
    with scripted(script, transport) as client:
        profiles = client.get_many(range(100), ["watch"])
    assert {profile.reads["watch"].state for profile in profiles.values()} == {"found"}
    asked = [
        len(next(iter(request.body["RequestItems"].values()))["Keys"]) for request in viewer_requests(script)
    ]
    assert asked == [100, 60, 20]


def test_connections_are_kept_and_replaced_when_the_server_closed_them(script: Script) -> None:
    reply = answer({"Item": item("watch", 1, WATCH)})
    closing = reply.replace(b"Content-Length", b"Connection: close\r\nContent-Length", 1)
    with scripted(script, "lean") as client:
        client._lag_read_at = dict.fromkeys(client._lag_read_at, float("inf"))
        script.behave = lambda request: reply
        for _ in range(5):
            client.get(1, ["watch"])
        assert script.connections == 1
        # The next request on this connection is swallowed, as when the server closes it while it is idle.
        script.behave = lambda request: None if request.on_connection > 1 else reply
        assert getattr(client.get(1, ["watch"]).watch, TITLES) == 3
        assert script.connections == 2
        script.behave = lambda request: closing
        assert getattr(client.get(1, ["watch"]).watch, TITLES) == 3
        assert getattr(client.get(1, ["watch"]).watch, TITLES) == 3
        assert script.connections == 3


def test_many_threads_get_their_own_answers(script: Script, transport: str) -> None:
    def behave(request: Request) -> bytes:
        viewer = wanted_viewer(request)
        if request.body["Key"]["domain_key"]["S"] == "engagement#watch":
            return answer({"Item": item("watch", viewer, [Decimal(viewer), *WATCH[1:]])})
        return answer({"Item": item("interactions", viewer, [viewer, 0, 0, AT])})

    script.behave = viewers_only(behave)
    wrong: list[int] = []

    def read(client: ProfileClient, caller: int) -> None:
        for viewer in range(caller * 100, caller * 100 + 30):
            profile = client.get(viewer, ["watch", "interactions"])
            if (
                getattr(profile.watch, MINUTES) != viewer
                or getattr(profile.interactions, f"likes_{LONG}d") != viewer
            ):
                wrong.append(viewer)

    with scripted(script, transport) as client:
        threads = [threading.Thread(target=read, args=(client, caller)) for caller in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []
    assert len(viewer_requests(script)) == 8 * 30 * 2
    assert script.connections <= 16 + 8


def test_ten_thousand_viewers_in_one_call(script: Script) -> None:
    def behave(request: Request) -> bytes:
        ((table, wanted),) = request.body["RequestItems"].items()
        viewers = [int(key["viewer_id"]["N"]) for key in wanted["Keys"]]
        found = [item("interactions", viewer, [viewer, 0, 0, AT]) for viewer in viewers if viewer % 100 == 7]
        return answer({"Responses": {table: found}, "UnprocessedKeys": {}})

    script.behave = viewers_only(behave)
    with scripted(script, "lean") as client:
        profiles = client.get_many(range(10_000), ["interactions"])
    assert len(profiles) == 10_000
    assert {viewer for viewer, profile in profiles.items() if not profile.cold_start} == set(
        range(7, 10_000, 100)
    )
    assert getattr(profiles[9_907].interactions, f"likes_{LONG}d") == 9_907
    sizes = [
        len(request.body["RequestItems"]["viewer_profiles"]["Keys"]) for request in viewer_requests(script)
    ]
    assert sizes == [100] * 100


def test_chunked_answers_and_answers_without_length(script: Script) -> None:
    body = json.dumps({"Item": item("watch", 1, WATCH)}).encode()
    chunks = b"".join(
        f"{len(part):x};note\r\n".encode() + part + b"\r\n" for part in (body[:7], body[7:100], body[100:])
    )
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"
    open_ended = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + body
    with scripted(script, "lean") as client:
        for reply in (chunked, open_ended):
            script.behave = lambda request, reply=reply: reply  # type: ignore[misc]
            assert getattr(client.get(1, ["watch"]).watch, TITLES) == 3


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """A certificate for this machine and its key, as files."""
    return write_certificate(tmp_path)


def test_over_tls(certificate: tuple[Path, Path], transport: str, monkeypatch: pytest.MonkeyPatch) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*certificate)
    release = threading.Event()

    def behave(request: Request) -> bytes:
        if request.operation == "BatchGetItem":
            # Larger than one record of TLS.
            return answer(
                {"Responses": {"viewer_profiles": [item("watch", 1, WATCH)]}, "filler": "x" * 100_000}
            )
        if wanted_viewer(request) == 2 and request.body["Key"]["domain_key"]["S"] == "engagement#watch":
            release.wait(30)
        return answer({"Item": item("interactions", wanted_viewer(request), [1, 2, 3, AT])})

    script, stop = serve(viewers_only(behave), context)
    try:
        with scripted(script, transport) as untrusting:
            profile = untrusting.get(1, ["interactions"], budget_seconds=5)
        assert "cannot be reached" in str(profile.reads["interactions"].error)
        assert script.requests == []
        monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate[0]))
        with scripted(script, transport) as client:
            client.warm()
            assert getattr(client.get(1).watch, TITLES) == 3
            late = client.get(2, ["watch", "interactions"], budget_seconds=3)
            release.set()
            assert late.partial
            assert getattr(late.interactions, f"shares_{LONG}d") == 2
            assert getattr(client.get(1).watch, TITLES) == 3
    finally:
        release.set()
        stop()


def test_signatures_are_botocores(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    from botocore.auth import SigV4Auth
    from botocore.awsrequest import AWSRequest
    from botocore.credentials import Credentials

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret/with+signs")
    for token in (None, "a/token=="):
        if token:
            monkeypatch.setenv("AWS_SESSION_TOKEN", token)
        else:
            monkeypatch.delenv("AWS_SESSION_TOKEN", raising=False)
        with scripted(script, "lean") as client:
            client.get(1)
            client.get(2**63 - 1, ["engagement#preferences"])
        credentials = Credentials("AKIDEXAMPLE", "secret/with+signs", token)

        for request in script.requests:
            sent = {
                name: value
                for name, value in request.headers.items()
                if name not in ("authorization", "content-length")
            }
            same = AWSRequest(
                "POST",
                script.endpoint + "/",
                headers=sent,
                data=json.dumps(request.body, separators=(",", ":")),
            )
            same.context["timestamp"] = sent["x-amz-date"]
            signer = SigV4Auth(credentials, "dynamodb", REGION)
            canonical = signer.canonical_request(same)
            signature = signer.signature(signer.string_to_sign(same, canonical), same)
            assert request.headers["authorization"].endswith(f"Signature={signature}")
            assert ("x-amz-security-token" in sent) == (token is not None)
        script.requests.clear()


def test_an_attribute_of_another_type_fails_its_domain_only(online: Any, transport: str) -> None:
    online.put("watch", 1, WATCH, **{TITLES: {"S": "many"}})
    online.put("interactions", 1, [1, 2, 3, AT])
    online.put("preferences", 1, PREFERENCES, favorite_genres={"NULL": True})
    with online.reader(transport) as client:
        profile = client.get(1)
        covered = client.get(1, fallback="cold_start")
    assert getattr(profile.interactions, f"likes_{LONG}d") == 1
    with pytest.raises(
        ItemError, match=rf"domain watch: titles_{SHORT}d should be integer .* of DynamoDB type S"
    ):
        _ = profile.watch
    with pytest.raises(ItemError, match=r"domain preferences: favorite_genres .* it is NULL"):
        _ = profile.preferences
    assert profile.partial
    assert covered.partial
    assert covered.watch == WatchProfile()


@pytest.mark.parametrize("extra", [{"later": {"S": "x"}}])
def test_attributes_of_a_later_contract_are_ignored(
    online: Any, transport: str, extra: dict[str, Any]
) -> None:
    online.put("watch", 1, WATCH, **extra)
    with online.reader(transport) as client:
        assert client.get(1, ["watch"]).watch == WatchProfile(*WATCH)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda client: client.get(1, ["wach"]), "unknown domain 'wach'"),
        (lambda client: client.get(1, []), "domains is empty"),
        (lambda client: client.get(1, "watch"), "domains must be a list of names"),
        (lambda client: client.get("1"), "viewer_id must be a 64-bit integer, not '1'"),
        (lambda client: client.get(True), "viewer_id must be a 64-bit integer"),
        (lambda client: client.get(2**63), "viewer_id must be a 64-bit integer"),
        (lambda client: client.get_many([]), "no ids were given"),
        (lambda client: client.get_many(range(10_001)), "10001 ids are more than 10000"),
        (lambda client: client.get(1, budget_seconds=0), "budget_seconds must be"),
        (lambda client: client.get(1, max_staleness_seconds=-1), "max_staleness_seconds must be"),
        (lambda client: client.get(1, fallback="none"), "fallback must be 'partial' or 'cold_start'"),
    ],
)
def test_impossible_arguments_are_named(script: Script, call: Any, message: str) -> None:
    with scripted(script, "lean") as client, pytest.raises((ProfileError, ContractError), match=message):
        call(client)
    assert script.requests == []


def test_a_domain_that_was_not_asked_for_says_so(script: Script) -> None:
    with scripted(script, "lean") as client:
        profile = client.get(1, ["watch"])
    with pytest.raises(ProfileError, match="domain 'interactions' was not read"):
        _ = profile.interactions


def test_an_endpoint_that_is_away(transport: str) -> None:
    client = ProfileClient(
        SERVED,
        endpoint_url="http://127.0.0.1:1",
        region=REGION,
        options=ClientOptions(transport=transport, max_attempts=2),  # type: ignore[arg-type]
    )
    with client:
        profile = client.get(1, ["watch"], fallback="cold_start")
    assert profile.partial
    assert "cannot be reached" in str(profile.reads["watch"].error)


def test_missing_credentials_are_named(
    script: Script, transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr("dagster_prefs.dynamodb.transport.is_loopback", lambda endpoint: False)
    with (
        scripted(script, transport) as client,
        pytest.raises(ReadError, match="no AWS credentials were found"),
    ):
        client.get(1)
    assert script.requests == []


@pytest.mark.parametrize("endpoint", ["localhost:8000", "ftp://host", "http://"])
def test_an_endpoint_that_is_no_url_is_named(endpoint: str, transport: str) -> None:
    with pytest.raises(PrefsError, match="endpoint"):
        ProfileClient(
            SERVED, endpoint_url=endpoint, region=REGION, options=ClientOptions(transport=transport)
        )  # type: ignore[arg-type]


def test_asyncio(online: Any, transport: str) -> None:
    online.put("watch", 1, WATCH)

    async def read() -> tuple[Any, ...]:
        async with AsyncProfileClient(
            SERVED,
            endpoint_url=online.endpoint,
            region=REGION,
            table_prefix=online.prefix,
            options=ClientOptions(30, read_timeout_seconds=30, transport=transport),  # type: ignore[arg-type]
        ) as client:
            await client.warm()
            many = client.get_many([1, 2], ["watch"])
            return await asyncio.gather(client.get(1), client.get(2, ["watch"]), many)

    one, two, many = asyncio.run(read())
    assert getattr(one.watch, TITLES) == 3
    assert two.cold_start
    assert {viewer: profile.cold_start for viewer, profile in many.items()} == {1: False, 2: True}


def test_a_registry_is_a_path_a_dict_or_itself() -> None:
    registry = load_registry(PROJECT)
    given = [PROJECT, str(PROJECT), PROJECT / "registry.json", registry_dict(registry), registry]
    for one in given:
        with ProfileClient(one, endpoint_url="http://127.0.0.1:1", region=REGION) as client:
            assert client.contract == registry.contract
            assert client.entity.name == "viewer"
            assert client.domains == registry.contract.domains_of("viewer")


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (None, RegistryError, "a registry is needed, not None: pass the path of the project's registry.json"),
        ("/nowhere", RegistryError, "/nowhere/registry.json is missing: run `prefs generate`"),
        ({}, RegistryError, "it has format None, and this version reads 1"),
    ],
)
def test_a_service_without_a_registry_is_told(given: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ProfileClient(given, endpoint_url="http://127.0.0.1:1", region=REGION)


def test_an_entity_without_profiles_is_named() -> None:
    for name in ("shop_user", "nobody"):
        with pytest.raises(ProfileError, match=f"entity '{name}' has no profiles: one of viewer has"):
            ProfileClient(PROJECT, entity=name, endpoint_url="http://127.0.0.1:1", region=REGION)


def test_a_name_that_is_no_domain_is_named(script: Script) -> None:
    with scripted(script, "lean") as client:
        profile = client.get(1, ["watch"])
    assert (profile.id, profile.viewer_id, profile.entity) == (1, 1, "viewer")
    with pytest.raises(
        AttributeError, match="a viewer has no domain 'wach': it has interactions, preferences, watch"
    ):
        _ = profile.wach


def test_a_domain_of_another_entity_is_not_read(script: Script) -> None:
    with (
        ProfileClient(two_entities(), endpoint_url=script.endpoint, region=REGION) as client,
        pytest.raises(
            ProfileError, match="domain trend is of entity item: a viewer has interactions, preferences"
        ),
    ):
        client.get(1, ["trend"])
    with ProfileClient(two_entities(), entity="item", endpoint_url=script.endpoint, region=REGION) as items:
        found = items.get("shoe/1")
    assert found.trend == domain_class(items.contract.domain("trend"))()
    assert found.as_dict()["item_id"] == "shoe/1"
    assert {(request.body["TableName"], *request.body["Key"]["item_id"]) for request in script.requests} == {
        ("item_profiles", "S")
    }


def test_a_uuid_is_one_id_however_it_is_written(script: Script) -> None:
    text = "0190163d-8694-739b-aea5-966c26f8ad91"
    with ProfileClient(
        two_entities("uuid"), entity="item", endpoint_url=script.endpoint, region=REGION
    ) as items:
        found = items.get_many([text.upper(), UUID(text), text])
        for wrong in ("shoe", 7, text + "0"):
            with pytest.raises(ProfileError, match=r"item_id must be a (UUID|text)"):
                items.get(wrong)
    assert list(found) == [text]
    assert found[text].id == text
    # The canary of such an entity is the nil UUID.
    asked = {request.body["Key"]["item_id"]["S"] for request in script.requests}
    assert asked == {text, "00000000-0000-0000-0000-000000000000"}


def test_an_attribute_that_the_item_lacks_is_served_cold_and_named(online: Any, transport: str) -> None:
    online.put("watch", 1, WATCH)
    key = {"viewer_id": {"N": "1"}, "domain_key": {"S": "engagement#watch"}}
    online.client.update_item(
        TableName=online.table.name,
        Key=key,
        UpdateExpression=f"REMOVE {TITLES}, {MINUTES}",
    )
    with online.reader(transport) as client:
        profile = client.get(1, ["watch"])
    assert profile.watch == WatchProfile(Decimal(0), Decimal("40.123456"), 0, 2, 5, AT)
    assert profile.reads["watch"].state == "found"
    assert profile.reads["watch"].unknown == (MINUTES, TITLES)
    assert profile.as_dict()["domains"]["watch"]["unknown"] == [MINUTES, TITLES]
    assert not profile.partial


def test_a_further_domain_of_the_contract_is_a_further_class(script: Script) -> None:
    declared = registry_dict(load_registry(PROJECT))
    content = contract_dict(CONTRACT)
    more = {**content["domains"]["engagement#watch"], "name": "more", "relation": "r", "sink": "s"}
    content["domains"]["engagement#more"] = more
    declared["contract"] = contract_dict(parse_contract(content))
    with ProfileClient(declared, endpoint_url=script.endpoint, region=REGION) as client:
        assert getattr(client.get(1, ["more"]).more, TITLES) == 0
