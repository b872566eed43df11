"""Files and folders that only their owner may read: state, exports and what messages held."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, BinaryIO


def make_private_folder(folder: Path) -> None:
    """Make a folder and its missing parents with mode 0700; what exists keeps its mode.

    Raises OSError where a folder cannot be made.
    """
    missing = [part for part in (folder, *folder.parents) if not part.exists()]
    for part in reversed(missing):
        part.mkdir(mode=0o700, exist_ok=True)
    if not folder.is_dir():
        folder.mkdir()


def open_private_log(path: Path) -> BinaryIO:
    """Open a file for appending; a new one gets mode 0600. The caller closes it."""
    return open(path, "ab", opener=lambda name, flags: os.open(name, flags, 0o600))


def write_private(path: Path, content: str) -> None:
    """Replace a file in one step by one with mode 0600; a reader never sees half of it.

    Raises OSError where it cannot be written; the old file then stays.
    """
    with whole_file(path) as file:
        file.write(content.encode())


@contextmanager
def whole_file(path: Path, *, replace: bool = True) -> Iterator[IO[bytes]]:
    """A new file to write to, which takes the name `path` where the block ends well, and goes where it does not.

    It is readable by its owner only, under a name that nobody can guess, and never an existing file or the target of
    a link. With `replace` it takes the place of what `path` was, a link itself and not its target; without, it raises
    FileExistsError where there is anything by that name. Raises OSError.
    """
    # The longest name that a file may have leaves no room for more.
    part = path.with_name(f".{secrets.token_hex(16)}.part")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        file = os.fdopen(os.open(part, flags, 0o600), "wb")
        try:
            yield file
        except BaseException:
            # Closing writes what is left, and where that fails hides why the block did.
            with suppress(OSError):
                file.close()
            raise
        file.close()
        if replace:
            os.replace(part, path)
            return
        # Whoever makes this name first has it; a rename alone would take it from them.
        os.close(os.open(path, flags, 0o600))
        try:
            os.replace(part, path)
        except OSError:
            path.unlink()
            raise
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)
