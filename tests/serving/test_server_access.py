"""Who gets what from the feature server: tokens with scopes, probes without, and TLS."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest
from certificates import write_certificate
from scripted_dynamodb import answer
from scripted_dynamodb import serve as serve_script
from served import NOWHERE, Caller, profile_client, running

from dagster_prefs.access import AccessError, Entrance, Tokens, make_token
from dagster_prefs.serving import ShopClient, gate
from dagster_prefs.serving.server import make_app, serve

TOKENS = {right: make_token(right, [right]) for right in ("domains", "shop", "inspect")}
PROFILE, USER = "/v1/profiles/1?domains=watch", "/v1/users/u1/profile"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_certificate(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def caller(certificate: tuple[Path, Path]) -> Iterator[Caller]:
    """A server with TLS and a token of each scope; the shop's engine is away."""
    script, stop = serve_script(lambda request: answer({}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setattr(gate, "REFUSAL_SECONDS", 0.0)
        entries = ",".join(token.entry for _, token in TOKENS.values())
        with running(
            profile_client(script.endpoint),
            ShopClient(NOWHERE),
            catalogue_refresh_seconds=None,
            entrance=Entrance(Tokens(entries), *certificate),
            tls=ssl.create_default_context(cafile=str(certificate[0])),
        ) as made:
            yield made
    stop()


def ask(caller: Caller, path: str, secret: str | None) -> tuple[int, str]:
    """Status and code of the error, empty without one."""
    headers = {} if secret is None else {"Authorization": f"Bearer {secret}"}
    status, content, head = caller.call("GET", path, headers=headers)
    assert ("www-authenticate" in head) is (status == 401)
    return status, content["error"]["code"] if isinstance(content, dict) and "error" in content else ""


def test_each_scope_opens_its_part(caller: Caller) -> None:
    secrets = {right: secret for right, (secret, _) in TOKENS.items()}
    found = {
        right: [ask(caller, path, secret) for path in (PROFILE, USER, "/metrics", "/openapi.json")]
        for right, secret in secrets.items()
    }
    no, ok = (403, "forbidden"), (200, "")
    # 503: the request got as far as the engine.
    assert found == {
        "domains": [ok, no, no, ok],
        "shop": [no, (503, "unavailable"), no, ok],
        "inspect": [no, no, ok, ok],
    }
    _, refused, _ = caller.call("GET", USER, headers={"Authorization": f"Bearer {secrets['domains']}"})
    assert "the token 'domains' has domains, and this needs shop" in refused["error"]["message"]


def test_without_a_token_only_probes_are_answered(caller: Caller) -> None:
    for path in (PROFILE, USER, "/metrics", "/openapi.json", "/v1/unknown"):
        assert ask(caller, path, None) == (401, "unauthorized")
        assert ask(caller, path, "wrong") == (401, "unauthorized")
    assert ask(caller, "/healthz", None) == (200, "")
    assert ask(caller, "/readyz", None)[0] == 503, "it says that the engine is away"
    body = {"viewer_ids": [1]}
    assert caller.call("POST", "/v1/profiles", body)[0] == 401


def test_a_client_without_tls_gets_nothing(caller: Caller) -> None:
    with pytest.raises(ConnectionError):
        Caller(caller.port).get("/healthz")


def test_off_loopback_it_does_not_start_without_a_token() -> None:
    app = make_app([], None)
    with pytest.raises(
        AccessError, match=r"--host 0\.0\.0\.0 is not loopback.*the feature server.*`prefs token`"
    ):
        serve(app, host="0.0.0.0", port=0)
