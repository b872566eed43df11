"""Tokens, sessions and rights: who gets which page off loopback."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from dagster_prefs.access import EVERYTHING, Right, Tokens, digest
from dagster_prefs.console import access
from dagster_prefs.console.access import GRANT, Sessions, TokenGate

SECRET = "a-secret-of-more-than-24-characters"
OTHER = "another-secret-of-enough-characters"
ENTRY = f"oncall:inspect:sha256:{digest(SECRET)}"


def test_a_session_ends_by_itself_and_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    sessions = Sessions(lambda: now)
    first, second = sessions.open(EVERYTHING), sessions.open(EVERYTHING)
    assert sessions.grant(first) is EVERYTHING
    sessions.close(first)
    assert sessions.grant(first) is None
    now = access.SESSION_SECONDS + 1
    assert sessions.grant(second) is None
    monkeypatch.setattr(access, "MOST_SESSIONS", 2)
    held = [sessions.open(EVERYTHING) for _ in range(3)]
    assert [sessions.grant(one) is not None for one in held] == [False, True, True]


class Asked:
    """A gate in front of an app that tells which grant it sees."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tokens: str) -> None:
        # Nobody guesses here.
        monkeypatch.setattr(access, "REFUSAL_SECONDS", 0.0)

        async def app(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] == "websocket":
                await send({"type": "websocket.accept"})
                return
            await access._answer(send, 200, f"seen by {scope['state'][GRANT].name or 'anybody'}")

        def needed(path: str) -> Right | None:
            return "shop" if path == "/shop" else "inspect" if path == "/pipeline" else None

        self.gate = TokenGate(app, tokens=Tokens(tokens), needed=needed)

    def __call__(
        self, path: str, *, method: str = "GET", body: bytes = b"", kind: str = "http", **headers: str
    ) -> tuple[int | str, str, dict[str, str]]:
        """Status or kind of the first answer, body and headers of a request."""
        told: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Any) -> None:
            told.append(message)

        where, _, query = path.partition("?")
        scope = {
            "type": kind,
            "path": where,
            "method": method,
            "query_string": query.encode(),
            "headers": [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()],
        }
        asyncio.run(self.gate(scope, receive, send))
        if kind == "websocket":
            return told[0]["type"], "", {}
        head = {name.decode(): value.decode() for name, value in told[0]["headers"]}
        return told[0]["status"], told[1]["body"].decode(), head


def test_without_tokens_everybody_behind_the_guard_may_do_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Asked(monkeypatch, "")("/shop")[:2] == (200, "seen by anybody")


def test_a_bearer_sees_what_its_scopes_are_for(monkeypatch: pytest.MonkeyPatch) -> None:
    ask = Asked(monkeypatch, ENTRY)
    bearer = {"authorization": f"Bearer {SECRET}"}
    assert ask("/pipeline", **bearer)[:2] == (200, "seen by oncall")
    status, text, _ = ask("/shop", **bearer)
    assert status == 403
    assert "the token 'oncall' has inspect, and this needs shop" in text
    status, text, head = ask("/pipeline")
    assert (status, head["www-authenticate"]) == (401, "Bearer")
    assert "Authorization: Bearer TOKEN" in text
    assert ask("/pipeline", authorization=f"Bearer {OTHER}")[0] == 401
    assert ask("/pipeline", authorization=f"Basic {SECRET}")[0] == 401
    assert ask("/_nicegui_ws/socket.io", kind="websocket")[0] == "websocket.close"
    assert ask("/_nicegui_ws/socket.io", kind="websocket", **bearer)[0] == "websocket.accept"
    assert ask("/healthz")[:2] == (200, "ok\n")


def test_a_browser_signs_in_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ask = Asked(monkeypatch, ENTRY)
    status, _, head = ask("/pipeline", accept="text/html")
    assert (status, head["location"]) == (303, "/sign-in?next=/pipeline")
    assert '<input type="password" name="token"' in ask("/sign-in?next=/pipeline")[1]
    status, text, head = ask("/sign-in", method="POST", body=f"token={OTHER}".encode())
    assert status == 401
    assert "unknown token: use one whose hash PREFS_TOKENS has" in text
    assert "set-cookie" not in head
    status, _, head = ask("/sign-in?next=/pipeline", method="POST", body=f"token={SECRET}".encode())
    assert (status, head["location"]) == (303, "/pipeline")
    assert "HttpOnly; SameSite=Lax" in head["set-cookie"]
    assert "Secure" not in head["set-cookie"]
    assert SECRET not in head["set-cookie"]
    cookie = head["set-cookie"].partition(";")[0]
    assert ask("/pipeline", cookie=f"x=1; {cookie}")[:2] == (200, "seen by oncall")
    assert ask("/_nicegui_ws/socket.io", kind="websocket", cookie=cookie)[0] == "websocket.accept"
    assert ask("/sign-out", cookie=cookie)[2]["location"] == "/sign-in"
    assert ask("/pipeline", cookie=cookie)[0] == 401
    over_tls = ask("/sign-in", method="POST", body=f"token={SECRET}".encode(), origin="https://prefs.example")
    assert "; Secure" in over_tls[2]["set-cookie"]


@pytest.mark.parametrize("target", ["//evil.example", "https://evil.example", "/\\evil.example", "/a\nb"])
def test_nobody_is_sent_elsewhere_after_signing_in(monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    from urllib.parse import quote

    ask = Asked(monkeypatch, ENTRY)
    signed = ask(f"/sign-in?next={quote(target)}", method="POST", body=f"token={SECRET}".encode())
    assert signed[2]["location"] == "/"
