"""The feature server over a real socket, on the local AWS server and the embedded engine."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import openapi_spec_validator
import pytest
from declared import PROJECT
from openapi_schema_validator import OAS30Validator
from scripted_dynamodb import Reply, Request, Script, answer, failure
from scripted_dynamodb import serve as serve_script
from served import NOWHERE, REGION, Caller, profile_client, running
from shipped import LONG, SHORT
from starlette.routing import Route

from dagster_prefs.declarations.registry import load_registry
from dagster_prefs.serving import ShopClient
from dagster_prefs.serving.openapi import openapi
from dagster_prefs.serving.server import make_app

AT = 1_760_000_000_000
NOW = datetime(2026, 3, 15, 12, tzinfo=UTC)
WATCH = [Decimal("12.5"), Decimal("40.123456"), 3, 2, 5, AT]


@pytest.fixture
def caller(online: Any, shop: Any) -> Iterator[Caller]:
    """Both halves, with one viewer and one small shop."""
    online.put("watch", 42, WATCH)
    shop.insert("user_category_profile", ("u/1", "shoes", 20, 4, NOW), ("u/1", "hats", 3, 1, NOW))
    shop.insert("user_price_sensitivity", ("u/1", "budget", 3, 1, Decimal(1) / Decimal(3)))
    shop.insert(
        "user_recent_activity",
        ("u/1", "hats", 7, NOW - timedelta(hours=1), NOW, NOW - timedelta(minutes=40), NOW - timedelta(minutes=2)),
    )  # fmt: skip
    shop.insert(
        "items",
        ("a", "Boot", "shoes", "acme", Decimal("20.10"), True),
        ("b", "Cap", "hats", None, Decimal("30"), True),
        ("c", "Gone", "hats", None, Decimal("1"), False),
    )
    preferences = ShopClient(shop.engine)
    with running(profile_client(online.endpoint, online.prefix), preferences, clock=lambda: NOW) as made:
        made.ready()
        yield made


def test_one_profile_is_exact(caller: Caller) -> None:
    status, profile = caller.get("/v1/profiles/42?domains=watch")
    assert status == 200
    assert profile["viewer_id"] == 42
    assert profile["partial"] is False
    watch = profile["domains"]["watch"]
    assert watch["attributes"] == {
        f"watch_minutes_{SHORT}d": "12.5",
        f"watch_minutes_{LONG}d": "40.123456",
        f"titles_{SHORT}d": 3,
        f"completions_{LONG}d": 2,
        f"genres_watched_{LONG}d": 5,
        "last_event_at": AT,
    }
    assert (watch["state"], watch["error"]) == ("found", None)
    status, everything = caller.get("/v1/profiles/42")
    assert {name: read["state"] for name, read in everything["domains"].items()} == {
        "watch": "found", "interactions": "cold_start", "preferences": "cold_start",
    }  # fmt: skip


def test_many_profiles_in_the_order_asked(caller: Caller) -> None:
    largest = 2**63 - 1
    status, found = caller.post({"viewer_ids": [7, "42", 7, str(largest)], "domains": ["watch"]})
    assert status == 200
    assert [profile["viewer_id"] for profile in found["profiles"]] == [7, 42, largest]
    assert [profile["domains"]["watch"]["state"] for profile in found["profiles"]] == [
        "cold_start", "found", "cold_start",
    ]  # fmt: skip
    assert found["partial"] is False


def test_user_profile(caller: Caller) -> None:
    status, profile = caller.get("/v1/users/u%2F1/profile")
    assert status == 200
    assert profile["known"] is True
    assert profile["top_categories"] == ["shoes", "hats"]
    assert profile["recent_session_categories"] == ["hats"]
    assert profile["categories"][0]["last_engaged_at"] == "2026-03-15T12:00:00Z"
    assert Decimal(profile["price_tiers"][0]["conversion_rate"]) == Decimal(1) / Decimal(3)
    status, stranger = caller.get(f"/v1/users/{quote('nobody ü', safe='')}/profile")
    assert (status, stranger["known"], stranger["user_id"]) == (200, False, "nobody ü")


@pytest.mark.parametrize("ranker", ["memory", "sql"])
def test_ranking_is_that_of_the_client(caller: Caller, shop: Any, ranker: str) -> None:
    with running(
        None,
        ShopClient(shop.engine),
        clock=lambda: NOW,
        catalogue_refresh_seconds=30.0 if ranker == "memory" else None,
    ) as other:
        other.ready()
        for session in (True, False):
            expected = shop.client.rank("u/1", 5, session=session, now=NOW)
            status, found = other.get(f"/v1/users/u/1/ranking?limit=5&session={str(session).lower()}")
            assert status == 200
            assert found["session_active"] == expected.session_active
            assert [item["item_id"] for item in found["items"]] == [item.item_id for item in expected]
            assert [Decimal(item["personalization_score"]) for item in found["items"]] == [
                item.personalization_score for item in expected
            ]
        assert [item["item_id"] for item in found["items"]] == ["a", "b"]
        assert found["items"][0]["price"] == "20.10"
        status, explained = other.get("/v1/users/u/1/ranking?limit=1&explain=true")
        assert explained["items"][0]["components"].keys() == {
            "category_affinity", "brand_affinity", "conversion_rate", "session_interactions",
        }  # fmt: skip
        assert other.get("/v1/profiles/1")[0] == 404


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code", "message"),
    [
        ("GET", "/v1/profiles/twelve", None, 400, "bad_request", "64-bit integer, not 'twelve'"),
        ("GET", f"/v1/profiles/{2**63}", None, 400, "bad_request", "64-bit integer"),
        ("GET", "/v1/profiles/1?domains=wach", None, 400, "bad_request", "wach"),
        ("GET", "/v1/profiles/1?domain=watch", None, 400, "bad_request", "did you mean domains?"),
        ("GET", "/v1/profiles/1?budget_ms=1&budget_ms=2", None, 400, "bad_request", "given twice"),
        ("GET", "/v1/profiles/1?budget_ms=0", None, 400, "bad_request", "above 0"),
        ("GET", "/v1/profiles/1?budget_ms=nan", None, 400, "bad_request", "budget_ms"),
        ("GET", "/v1/profiles/1?budget_ms=soon", None, 400, "bad_request", "give a number"),
        ("GET", "/v1/profiles/1?consistent=yes", None, 400, "bad_request", "true or false"),
        ("GET", "/v1/profiles/1?fallback=guess", None, 400, "bad_request", "'partial' or 'cold_start'"),
        ("GET", "/v1/profiles/1?max_staleness_seconds=-1", None, 400, "bad_request", "above 0"),
        ("GET", "/v1/users/u1/ranking?limit=0", None, 400, "bad_request", "from 1 to"),
        ("GET", "/v1/users/u1/ranking?limit=many", None, 400, "bad_request", "whole number"),
        ("GET", "/v1/users/canary:1/ranking", None, 400, "bad_request", "canary"),
        ("GET", "/v1/users/a%00/profile", None, 400, "bad_request", "NUL"),
        ("POST", "/v1/profiles", b"{", 400, "bad_request", "not valid JSON"),
        ("POST", "/v1/profiles", [1], 400, "bad_request", "not a JSON object"),
        ("POST", "/v1/profiles", {}, 400, "bad_request", "viewer_ids must be a list: give a list of viewer_ids"),
        ("POST", "/v1/profiles", {"viewer_ids": []}, 400, "bad_request", "at least one"),
        ("POST", "/v1/profiles", {"viewer_ids": [True]}, 400, "bad_request", "64-bit integer"),
        ("POST", "/v1/profiles", {"viewer_ids": [1.5]}, 400, "bad_request", "64-bit integer"),
        ("POST", "/v1/profiles", {"viewer_ids": [1], "domains": "wach"}, 400, "bad_request", "wach"),
        ("POST", "/v1/profiles", {"viewer_ids": [1], "domains": [1]}, 400, "bad_request", "list of names"),
        ("POST", "/v1/profiles", {"viewer_ids": [1], "viewers": []}, 400, "bad_request", "viewer_ids?"),
        ("POST", "/v1/profiles", {"viewer_ids": list(range(10_001))}, 400, "bad_request", "more than 10000"),
        ("POST", "/v1/profiles", b" " * (1024 * 1024 + 1), 413, "too_large", "split the request"),
        ("GET", "/v1/profiles", None, 405, "method_not_allowed", "does not take GET"),
        ("GET", "/v2/profiles/1", None, 404, "not_found", "nothing at /v2/profiles/1"),
    ],
)  # fmt: skip
def test_bad_requests_are_one_sentence(
    bad_caller: Caller, method: str, path: str, body: Any, status: int, code: str, message: str
) -> None:
    got, content, _ = bad_caller.call(method, path, body)
    assert got == status, content
    assert content["error"]["code"] == code
    assert message in content["error"]["message"]


@pytest.fixture(scope="module")
def bad_caller() -> Iterator[Caller]:
    """A server whose clients need nothing, because no request of these tests gets as far."""
    script, stop = serve_script(lambda request: answer({}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        with running(
            profile_client(script.endpoint), ShopClient(NOWHERE), catalogue_refresh_seconds=None
        ) as made:
            yield made
    stop()


def valid(content: Any, schema: dict[str, Any], document: dict[str, Any]) -> bool:
    """Whether content is as a schema of OpenAPI 3.0 says."""
    return bool(OAS30Validator({**schema, "components": document["components"]}).is_valid(content))


def test_the_description_is_true(caller: Caller) -> None:
    """The document is valid OpenAPI, names every route, and real answers are as it says."""
    status, document = caller.get("/openapi.json")
    assert status == 200
    assert document["openapi"] == "3.0.3"
    openapi_spec_validator.validate(document)
    routes = {
        (re.sub(r":path", "", route.path), method.lower())
        for route in make_app([profile_client("http://127.0.0.1:1")], ShopClient(NOWHERE)).routes
        if isinstance(route, Route) and route.path != "/openapi.json"
        for method in (route.methods or set()) - {"HEAD"}
    }
    assert routes == {(path, method) for path, found in document["paths"].items() for method in found}
    calls: list[tuple[str, str, str, Any, str]] = [
        ("get", "/v1/profiles/{viewer_id}", "/v1/profiles/42", None, "200"),
        ("get", "/v1/profiles/{viewer_id}", "/v1/profiles/43?domains=preferences", None, "200"),
        ("get", "/v1/profiles/{viewer_id}", "/v1/profiles/x", None, "400"),
        ("post", "/v1/profiles", "/v1/profiles", {"viewer_ids": [42, "43"], "domains": ["watch"]}, "200"),
        ("get", "/v1/users/{user_id}/profile", "/v1/users/u/1/profile", None, "200"),
        ("get", "/v1/users/{user_id}/profile", "/v1/users/u/1/profile?limit=1", None, "200"),
        ("get", "/v1/users/{user_id}/categories", "/v1/users/u/1/categories?limit=1", None, "200"),
        ("get", "/v1/users/{user_id}/brands", "/v1/users/u/1/brands", None, "200"),
        ("get", "/v1/users/{user_id}/recent", "/v1/users/u/1/recent", None, "200"),
        ("get", "/v1/users/{user_id}/ranking", "/v1/users/u/1/ranking", None, "200"),
        ("get", "/v1/users/{user_id}/ranking", "/v1/users/u/1/ranking?explain=1&session=0", None, "200"),
        ("get", "/readyz", "/readyz", None, "200"),
        ("get", "/healthz", "/healthz", None, "200"),
    ]
    for method, path, called, body, expected in calls:
        got, content, _ = caller.call(method.upper(), called, body)
        assert str(got) == expected, content
        operation = document["paths"][path][method]
        schema = operation["responses"][expected]["content"]["application/json"]["schema"]
        assert valid(content, schema, document), called
        if body is not None:
            assert valid(body, operation["requestBody"]["content"]["application/json"]["schema"], document)
    # The schemas are strict enough to tell a wrong answer.
    _, content = caller.get("/v1/profiles/42")
    content["domains"]["watch"]["attributes"][f"watch_minutes_{SHORT}d"] = 12.5
    assert not valid(content, {"$ref": "#/components/schemas/Profile"}, document)


def parts_of(document: Any) -> Iterator[dict[str, Any]]:
    if isinstance(document, dict):
        yield document
        document = list(document.values())
    if isinstance(document, list):
        for value in document:
            yield from parts_of(value)


def test_generators_find_what_they_need() -> None:
    """Types beside enums, names of operations, nothing that only one version of OpenAPI knows."""
    registry = load_registry(PROJECT)
    viewer = (registry.entity("viewer"), registry.contract.domains_of("viewer"))
    document = openapi([viewer], version=1, preferences=True)
    enums = [part for part in parts_of(document) if "enum" in part]
    assert len(enums) >= 5
    assert {part.get("type") for part in enums} == {"string"}
    operations = [operation for found in document["paths"].values() for operation in found.values()]
    names = [operation["operationId"] for operation in operations]
    assert len(set(names)) == len(operations)
    assert all(re.fullmatch(r"[a-z][A-Za-z]+", name) for name in names)
    for part in parts_of(document):
        assert part.get("type") != "null"
        assert not isinstance(part.get("type"), list)
        assert isinstance(part.get("exclusiveMinimum", True), bool)
        # What stands beside a reference is ignored in 3.0, and `nullable` needs a type beside it.
        assert "$ref" not in part or set(part) == {"$ref"}
        assert "nullable" not in part or "type" in part
    used = {part["$ref"].rpartition("/")[2] for part in parts_of(document) if "$ref" in part}
    assert used == set(document["components"]["schemas"])


def beyond(schema: dict[str, Any]) -> Iterator[tuple[Any, bool]]:
    """Values at the limits of a schema, and just beyond them: value, whether it is to be taken."""
    if "maximum" in schema:
        yield schema["maximum"], True
        yield schema["maximum"] + 1, False
    if "minimum" in schema:
        yield schema["minimum"], not schema.get("exclusiveMinimum", False)
        yield schema["minimum"] - 1, False
        yield schema["minimum"] + 1, True
    if "enum" in schema:
        yield from ((value, True) for value in schema["enum"])
        yield "another", False
    if schema["type"] == "boolean":
        yield from (("true", True), ("false", True), ("maybe", False))
    if schema.get("format") == "int64":
        yield from ((2**63 - 1, True), (-(2**63), True), (2**63, False), (-(2**63) - 1, False))
    if schema["type"] in ("integer", "number"):
        # An id is read by the rule of every door, which trims a text.
        yield from (("nan", False), ("1_0", False), (" 1", schema.get("format") == "int64"))
        yield from (("\u0661", False), ("9" * 5000, False))
    if schema["type"] == "integer":
        yield "1.5", False


def test_the_limits_of_the_description_are_those_of_the_server(caller: Caller) -> None:
    """Taken from the document: what is at a limit is served, what is beyond is refused."""
    document = caller.get("/openapi.json")[1]
    tried = 0
    for path, found in document["paths"].items():
        for parameter in found.get("get", {}).get("parameters", []):
            for value, taken in beyond(parameter["schema"]):
                named = {"viewer_id": "42", "user_id": "u%2F1"}
                if parameter["in"] == "path":
                    named[parameter["name"]] = quote(str(value), safe="")
                else:
                    named["query"] = f"{parameter['name']}={quote(str(value))}"
                target = path.format(**named) + (f"?{named['query']}" if "query" in named else "")
                status, content = caller.get(target)
                # A budget of a millisecond may well be spent.
                assert status == (200 if taken else 400) or (taken and status == 504), (target[:200], content)
                tried += 1
    request = document["components"]["schemas"]["ProfilesRequest"]["properties"]
    for name, schema in request.items():
        for value, taken in beyond(schema) if "type" in schema and schema["type"] != "array" else ():
            given = {"true": True, "false": False}.get(str(value), value)
            status, content = caller.post({"viewer_ids": [42], name: given})
            assert status == (200 if taken else 400) or (taken and status == 504), (name, value, content)
            tried += 1
    most = request["viewer_ids"]["maxItems"]
    assert caller.post({"viewer_ids": [42] * most})[0] == 200
    assert caller.post({"viewer_ids": [42] * (most + 1)})[0] == 400
    assert caller.post({"viewer_ids": []})[0] == 400
    pattern = request["viewer_ids"]["items"]["anyOf"][1]["pattern"]
    for text in ("42", "-7", "+7", " 7", "7.0", "0x7", "1" * 20, ""):
        status, _ = caller.post({"viewer_ids": [text]})
        assert (status == 200) == bool(re.search(pattern, text)), text
    assert tried > 100


def test_operations(caller: Caller) -> None:
    assert caller.get("/healthz") == (200, {"status": "ok"})
    assert caller.ready() == {"ready": True, "parts": {"profiles": "ok", "preferences": "ok"}}
    caller.get("/v1/profiles/42")
    caller.get("/v1/profiles/none")
    caller.get("/nowhere")
    status, text, headers = caller.call("GET", "/metrics")
    assert status == 200
    assert headers["content-type"].startswith("text/plain; version=0.0.4")
    samples = dict(re.findall(r"^(prefs_server_[^ ]+) ([^ ]+)$", text, re.MULTILINE))
    assert samples['prefs_server_requests_total{route="/v1/profiles/{viewer_id}",status="200"}'] == "1.0"
    assert samples['prefs_server_requests_total{route="/v1/profiles/{viewer_id}",status="400"}'] == "1.0"
    assert samples['prefs_server_requests_total{route="other",status="404"}'] == "1.0"
    assert samples['prefs_server_request_seconds_bucket{le="+Inf",route="/v1/profiles/{viewer_id}"}'] == "2.0"
    assert samples["prefs_server_catalogue_items"] == "2.0"
    assert samples["prefs_server_in_flight"] == "0.0"
    # Nobody's id is in a label.
    assert "42" not in "".join(samples)


def test_a_domain_that_does_not_arrive_is_marked(script: Script) -> None:
    def behave(request: Request) -> Reply:
        key = request.body.get("Key", {}).get("domain_key", {}).get("S")
        return failure("InternalServerError", status=500) if key == "engagement#watch" else answer({})

    script.behave = behave
    with running(profile_client(script.endpoint, max_attempts=1), None) as caller:
        status, profile = caller.get("/v1/profiles/1?domains=watch,interactions")
        assert (status, profile["partial"]) == (200, True)
        assert profile["domains"]["watch"]["state"] == "failed"
        assert profile["domains"]["watch"]["attributes"] is None
        assert "InternalServerError" in profile["domains"]["watch"]["error"]
        assert profile["domains"]["interactions"]["state"] == "cold_start"
        status, profile = caller.get("/v1/profiles/1?domains=watch&fallback=cold_start")
        assert (status, profile["partial"]) == (200, True)
        assert profile["domains"]["watch"]["attributes"][f"titles_{SHORT}d"] == 0
        status, content, headers = caller.call("GET", "/v1/profiles/1?domains=watch")
        assert (status, content["error"]["code"], headers["retry-after"]) == (503, "unavailable", "1")
        assert caller.post({"viewer_ids": [1, 2], "domains": ["watch"]})[0] == 503
        assert "prefs_server_partial_profiles_total 2" in caller.get("/metrics")[1]


@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [
        ("ProvisionedThroughputExceededException", 503, "unavailable"),
        ("ExpiredTokenException", 500, "credentials"),
        ("ResourceNotFoundException", 500, "missing_table"),
    ],
)
def test_faults_of_dynamodb_have_their_status(script: Script, fault: str, status: int, code: str) -> None:
    script.behave = lambda request: failure(fault)
    with running(profile_client(script.endpoint, max_attempts=1), None) as caller:
        got, content = caller.get("/v1/profiles/1")
        assert (got, content["error"]["code"]) == (status, code)
        got, told = caller.get("/readyz")
        assert (got, told["ready"]) == (503, False)
        assert fault in told["parts"]["profiles"]
        assert caller.get("/healthz")[0] == 200


def test_the_budget_ends_a_request(script: Script) -> None:
    held = threading.Event()

    def behave(request: Request) -> Reply:
        held.wait(60)
        return answer({})

    script.behave = behave
    with running(profile_client(script.endpoint), None) as caller:
        status, content = caller.get("/v1/profiles/1?domains=watch&budget_ms=50")
        assert (status, content["error"]["code"]) == (504, "timeout")
        status, profile = caller.get("/v1/profiles/1?domains=watch&budget_ms=50&fallback=cold_start")
        assert (status, profile["partial"]) == (200, True)
        held.set()


def test_waiting_for_a_thread_counts(script: Script) -> None:
    """One thread, held by a slow read: the next one is answered within its own budget all the same."""
    held, arrived = threading.Event(), threading.Event()

    def behave(request: Request) -> Reply:
        arrived.set()
        held.wait(60)
        return answer({})

    script.behave = behave

    async def read() -> tuple[Any, ...]:
        async with profile_client(script.endpoint, threads=1) as client:
            slow = asyncio.create_task(client.get(1, ["watch"], budget_seconds=30))
            await asyncio.to_thread(arrived.wait, 30)
            late = asyncio.create_task(client.get(2, ["watch"], budget_seconds=0.01))
            await asyncio.sleep(0.05)
            held.set()
            return await slow, await late

    slow, late = asyncio.run(read())
    assert slow.cold_start
    assert late.failure is not None
    assert late.failure.kind == "timeout"
    assert [request.body["Key"]["viewer_id"] for request in script.requests if "Key" in request.body].count(
        {"N": "2"}
    ) == 0


def test_too_many_at_a_time_are_refused_at_once(script: Script) -> None:
    held, arrived = threading.Event(), threading.Event()

    def behave(request: Request) -> Reply:
        arrived.set()
        held.wait(60)
        return answer({})

    script.behave = behave
    first: list[int] = []
    with running(profile_client(script.endpoint), None, max_in_flight=1) as caller:
        thread = threading.Thread(target=lambda: first.append(caller.get("/v1/profiles/1?domains=watch")[0]))
        thread.start()
        assert arrived.wait(30)
        status, content, headers = caller.call("GET", "/v1/profiles/2")
        assert (status, content["error"]["code"], headers["retry-after"]) == (503, "busy", "1")
        assert caller.get("/healthz")[0] == 200
        held.set()
        thread.join(30)
        assert first == [200]
        assert "prefs_server_refused_total 1" in caller.get("/metrics")[1]


def test_an_engine_that_is_away_leaves_profiles_served(online: Any, shop: Any) -> None:
    away = ShopClient(replace(shop.engine, port=1))
    with running(profile_client(online.endpoint, online.prefix), away) as caller:
        assert caller.get("/v1/profiles/1")[0] == 200
        status, content = caller.get("/v1/users/u1/profile")
        assert (status, content["error"]["code"]) == (503, "unavailable")
        status, told = caller.get("/readyz")
        assert (status, told["parts"]["profiles"]) == (503, "ok")
        assert "cannot be reached" in told["parts"]["preferences"]


BRANDS = (
    "create table user_brand_profile (user_id text, brand text, brand_affinity bigint, purchase_count bigint, "
    "last_brand_interaction timestamptz)"
)
ITEMS = "create table items (item_id text, title text, category text, brand text, price numeric, in_stock boolean)"


def test_relations_that_are_missing_are_no_fault_of_the_caller(shop: Any) -> None:
    shop.execute("drop table user_brand_profile, items")
    with running(None, ShopClient(shop.engine), catalogue_refresh_seconds=0.05) as caller:
        status, content = caller.get("/v1/users/u1/profile")
        assert (status, content["error"]["code"]) == (503, "unavailable")
        assert "user_brand_profile" in content["error"]["message"]
        # It is not ready for what users are answered, whatever else may work.
        status, told = caller.get("/readyz")
        assert (status, told["parts"]["preferences"]) == (503, content["error"]["message"])
        shop.execute(BRANDS)
        status, told = caller.get("/readyz")
        assert (status, told["parts"]["preferences"]) == (
            503,
            "the catalogue is not in memory yet: wait for its first refresh",
        )
        shop.execute(ITEMS)
        # The catalogue heals by itself.
        assert caller.ready()["ready"] is True


def test_a_ranking_in_sql_is_ready_when_its_items_are(shop: Any) -> None:
    shop.execute("drop table items")
    with running(None, ShopClient(shop.engine), catalogue_refresh_seconds=None) as caller:
        assert caller.get("/v1/users/u1/profile")[0] == 200
        assert caller.get("/v1/users/u1/ranking")[0] == 503
        status, told = caller.get("/readyz")
        assert status == 503
        assert "items" in told["parts"]["preferences"]
        shop.execute(ITEMS)
        assert caller.ready()["ready"] is True


@pytest.mark.parametrize("forbidden", ["GetItem", "BatchGetItem"])
def test_either_way_of_reading_dynamodb_has_to_work(script: Script, forbidden: str) -> None:
    """A role that may use one of them only: requests for the domains that need the other are answered 500."""
    script.behave = lambda request: (
        failure("AccessDeniedException") if request.operation == forbidden else answer({"Responses": {}})
    )
    with running(profile_client(script.endpoint, max_attempts=1), None) as caller:
        found = {caller.get(f"/v1/profiles/1{query}")[0] for query in ("", "?domains=watch")}
        assert found == {200, 500}
        status, told = caller.get("/readyz")
        assert (status, told["ready"]) == (503, False)
        assert "AccessDeniedException" in told["parts"]["profiles"]


def test_a_slow_engine_ends_with_the_budget(shop: Any) -> None:
    with running(None, ShopClient(shop.engine), catalogue_refresh_seconds=None) as caller:
        caller.ready()
        with shop.engine.connect(autocommit=False) as lock:
            lock.execute("lock table user_brand_profile in access exclusive mode")
            status, content = caller.get("/v1/users/u1/profile?budget_ms=100")
            assert (status, content["error"]["code"]) == (504, "timeout")
            assert "100 ms" in content["error"]["message"]
            lock.rollback()
        assert caller.get("/v1/users/u1/profile")[0] == 200


@pytest.fixture
def start(script: Script) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """`start(option, …)`: the command, with profiles from the scripted DynamoDB."""
    made: list[subprocess.Popen[str]] = []

    def run(*options: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [str(Path(sys.executable).with_name("prefs")), "serve", "--only", "profiles", *options],
            env={
                **os.environ,
                "AWS_ENDPOINT_URL": script.endpoint,
                "AWS_REGION": REGION,
                "PYTHONUNBUFFERED": "1",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        made.append(process)
        return process

    yield run
    for process in made:
        process.kill()
        process.communicate()


def test_the_command_answers_what_it_took_before_it_ends(
    start: Callable[..., subprocess.Popen[str]], script: Script
) -> None:
    held, arrived = threading.Event(), threading.Event()

    def behave(request: Request) -> Reply:
        arrived.set()
        held.wait(60)
        return answer({})

    script.behave = behave
    process = start("--port", "0", "--budget-ms", "30000")
    assert process.stdout is not None
    url = re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())
    assert url is not None
    caller = Caller(urlsplit(url[0]).port or 0)
    answers: list[int] = []
    thread = threading.Thread(target=lambda: answers.append(caller.get("/v1/profiles/1?domains=watch")[0]))
    thread.start()
    assert arrived.wait(60)
    process.send_signal(signal.SIGTERM)
    held.set()
    thread.join(60)
    assert answers == [200]
    process.wait(60)
    assert process.stderr is not None
    assert "Traceback" not in process.stderr.read()


def test_a_taken_port_is_one_sentence(start: Callable[..., subprocess.Popen[str]], script: Script) -> None:
    taken = str(urlsplit(script.endpoint).port)
    _, said = start("--port", taken).communicate(timeout=60)
    (line,) = said.strip().splitlines()
    assert f"127.0.0.1:{taken} cannot be listened at" in line
