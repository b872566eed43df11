"""Tokens of the feature server and the console: what is refused, how one is found, made and rotated."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from dagster_prefs import access
from dagster_prefs.access import (
    AccessError,
    Entrance,
    Tokens,
    digest,
    find_token,
    is_loopback_address,
    make_token,
    parse_tokens,
)
from dagster_prefs.cli import cli

SECRET = "a-secret-of-some-characters"
HASH = digest(SECRET)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (f"oncall:inspect+cook:sha256:{HASH}", "scope 'cook'"),
        (f"oncall:inspect:{SECRET}", "token oncall of PREFS_TOKENS is not sha256: and 64 hex digits"),
        (f"oncall:inspect:{HASH}", "write the hash that `prefs token` prints"),
        (f"on call:inspect:sha256:{HASH}", "token 1 of PREFS_TOKENS is not name:scope+scope:sha256:"),
        (f"a:inspect:sha256:{HASH},a:shop:sha256:{HASH}", "two tokens a"),
        ("a:inspect:sha256:abc", "64 hex digits"),
        ("a:inspect", "is not name:scope+scope:sha256:"),
    ],
)
def test_a_malformed_token_is_named_and_its_secret_is_not(text: str, says: str) -> None:
    with pytest.raises(AccessError) as refused:
        parse_tokens(text)
    assert says in str(refused.value)
    assert SECRET not in str(refused.value)


def test_a_token_is_found_by_its_secret_alone() -> None:
    tokens = parse_tokens(
        f"oncall:domains+inspect:sha256:{digest('x')}, shop:send+shop:sha256:{HASH.upper()}"
    )
    assert [token.grant.name for token in tokens] == ["oncall", "shop"]
    found = find_token(tokens, SECRET)
    assert found is not None
    assert (found.grant.name, found.grant.rights) == ("shop", {"shop", "send"})
    assert found.entry == f"shop:shop+send:sha256:{HASH}"
    assert find_token(tokens, HASH) is None, "the hash itself opens nothing"
    assert find_token(tokens, "") is None
    assert HASH not in repr(tokens)


def test_every_token_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    monkeypatch.setattr(
        access.hmac, "compare_digest", lambda one, other: compared.append(one) or one == other
    )
    tokens = [make_token(f"t{n}", ["shop"]) for n in range(3)]
    found = find_token([token for _, token in tokens], tokens[0][0])
    assert found is tokens[0][1]
    assert len(compared) == 3, "a match does not end the comparison"


def test_tokens_are_rotated_without_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(access, "LOOK_SECONDS", 0.0)
    file = tmp_path / "tokens"
    runner = CliRunner()

    def made(name: str) -> str:
        answer = runner.invoke(cli, ["token", name, "--scope", "domains", "--file", str(file)])
        assert answer.exit_code == 0, answer.output
        return answer.output.splitlines()[0].split(": ")[1]

    first = made("old")
    assert file.stat().st_mode & 0o777 == 0o600
    assert first not in file.read_text()
    tokens = Tokens(f"fixed:shop:sha256:{HASH}", file)
    assert tokens

    def opens(secret: str) -> bool:
        return tokens.bearer(f"Bearer {secret}") is not None

    second = made("new")
    assert [opens(first), opens(second), opens(SECRET), opens("wrong")] == [True, True, True, False]
    old = file.read_text()
    file.write_text("# rotated\n" + old.splitlines()[1] + "\n")
    assert [opens(first), opens(second)] == [False, True]
    # Half a file is not taken for all of it.
    file.write_text("new:domains")
    assert [opens(second), opens(second)] == [True, True]
    assert caplog.text.count("the tokens before it stay valid") == 1
    file.write_text(old)
    assert opens(first)


def test_a_file_that_others_may_write_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    with pytest.raises(AccessError, match=r"PREFS_TOKENS_FILE=.* cannot be read \(No such file"):
        Tokens("", file)
    file.write_text("")
    file.chmod(0o666)
    with pytest.raises(AccessError, match=r"can be written by others.*chmod go-w"):
        Tokens("", file)
    file.chmod(0o644)
    assert Tokens("", file), "an empty file lets nobody in, rather than everybody"


def test_the_command_adds_no_second_token_of_a_name(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    runner = CliRunner()
    given = ["token", "a", "--scope", "shop", "--file", str(file)]
    assert runner.invoke(cli, given).exit_code == 0
    os.chmod(file, 0o640)
    before = file.read_text()
    again = runner.invoke(cli, given)
    assert isinstance(again.exception, AccessError)
    assert "two tokens a" in str(again.exception)
    assert (file.read_text(), file.stat().st_mode & 0o777) == (before, 0o640)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "localhost", "::1", "[::1]"])
def test_loopback_needs_no_token(host: str) -> None:
    Entrance().check(host, "it")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "prefs.example.com", ""])
def test_every_other_address_needs_one(host: str) -> None:
    assert not is_loopback_address(host)
    with pytest.raises(AccessError, match=r"is not loopback.*`prefs token`"):
        Entrance().check(host, "it")
    Entrance(Tokens(make_token("a", ["shop"])[1].entry)).check(host, "it")


def test_a_certificate_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "cert.pem").write_text("no certificate")
    for certificate in (tmp_path / "cert.pem", tmp_path / "none.pem"):
        with pytest.raises(
            AccessError, match=rf"the certificate {certificate} and the key .* cannot be used"
        ):
            Entrance(certificate=certificate, key=tmp_path / "key.pem").check("127.0.0.1", "it")
