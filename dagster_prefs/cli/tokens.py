"""The command that makes a token for the feature server and the console."""

from __future__ import annotations

import os
from pathlib import Path

import click

from dagster_prefs.access import RIGHTS, TOKENS, TOKENS_FILE, AccessError, Right, make_token, parse_tokens
from dagster_prefs.cli.root import cli, print_json, say
from dagster_prefs.files import whole_file


@cli.command()
@click.argument("name")
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    required=True,
    type=click.Choice(RIGHTS),
    help="What the token may do; repeat it for several.",
)
@click.option(
    "--file",
    "file",
    type=click.Path(dir_okay=False, path_type=Path),
    help=f"Append the entry to this file, for {TOKENS_FILE}.",
)
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
def token(name: str, scopes: tuple[Right, ...], file: Path | None, as_json: bool) -> None:
    """Make a token, and print it once with its hash.

    The token is for the client; the servers get the entry with its hash. To rotate one, make a second token, hand it
    out, and remove the first one's entry.
    """
    secret, made = make_token(name, scopes)
    if file is not None:
        _append(file, made.entry)
    if as_json:
        print_json({"token": secret, "entry": made.entry})
        return
    say(f"token, for the client, shown only now: {secret}")
    say(f"entry, for {TOKENS} or the file of {TOKENS_FILE}: {made.entry}")
    if file is not None:
        say(f"added to {file}")


def _append(file: Path, entry: str) -> None:
    """Add an entry to a file, which is readable by its owner only if it is new. Raises AccessError."""
    try:
        before = file.read_text(encoding="utf-8") if file.exists() else ""
        text = f"{before}{'' if not before or before.endswith(chr(10)) else chr(10)}{entry}\n"
        parse_tokens(text, str(file))
        mode = file.stat().st_mode & 0o755 if file.exists() else 0o600
        # Whole, because a server may read it at any moment.
        with whole_file(file) as written:
            os.fchmod(written.fileno(), mode)
            written.write(text.encode())
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise AccessError(f"{file} cannot be written ({reason}): name a file in a folder of yours") from None
