"""Files and folders that only their owner may read: state, exports and contents of messages."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, BinaryIO
from urllib.parse import unquote, urlsplit

# A log of the embedded services larger than this is set aside.
LOG_LIMIT_BYTES = 10_000_000


def make_private_folder(folder: Path) -> None:
    """Create a folder and its missing parents with mode 0700; existing ones keep their mode.

    Raises OSError if a folder cannot be created.
    """
    missing = [part for part in (folder, *folder.parents) if not part.exists()]
    for part in reversed(missing):
        part.mkdir(mode=0o700, exist_ok=True)
    if not folder.is_dir():
        folder.mkdir()


def local_folder(address: str) -> Path | None:
    """Return the folder that a path or a file URI names, None for another URI."""
    parsed = urlsplit(address)
    if parsed.scheme == "file":
        return Path(unquote(parsed.path))
    return None if parsed.scheme else Path(address)


def catalog_file(warehouse: Path) -> Path:
    """Return the path of the SQLite catalog of a warehouse folder."""
    return warehouse / "catalog.db"


def open_private_log(path: Path) -> BinaryIO:
    """Open a file for appending; a new one gets mode 0600. The caller closes it."""
    return open(path, "ab", opener=lambda name, flags: os.open(name, flags, 0o600))


def keep_log_small(path: Path, max_bytes: int = LOG_LIMIT_BYTES) -> None:
    """Move what a log beyond `max_bytes` holds to `<name>.log.1`, while another process goes on appending to it.

    That process keeps its file, which is copied and emptied: a line that it writes in between is lost. Raises OSError
    if the log cannot be read or written, and where there is none.
    """
    if path.stat().st_size <= max_bytes:
        return
    with open(path, "rb+") as log, whole_file(path.with_suffix(".log.1")) as old:
        shutil.copyfileobj(log, old)
        log.truncate(0)


def write_private(path: Path, content: str) -> None:
    """Replace a file atomically with one of mode 0600, so that readers never see half of it.

    Raises OSError if it cannot be written; the old file then stays.
    """
    with whole_file(path) as file:
        file.write(content.encode())


@contextmanager
def whole_file(path: Path, *, replace: bool = True) -> Iterator[IO[bytes]]:
    """Open a new file that is renamed to `path` when the block succeeds, and deleted when it fails.

    Until then it has a random name, is readable by its owner only, and is never an existing file or the
    target of a link. With `replace` it replaces an existing `path` (a link itself, not its target); without,
    it raises FileExistsError if the name exists. Raises OSError.
    """
    # The temporary name does not extend the final one, which may already have the maximum length.
    part = path.with_name(f".{secrets.token_hex(16)}.part")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        file = os.fdopen(os.open(part, flags, 0o600), "wb")
        try:
            yield file
        except BaseException:
            # Closing flushes the rest; an error of that would hide the block's own error.
            with suppress(OSError):
                file.close()
            raise
        file.close()
        if replace:
            os.replace(part, path)
            return
        # Created exclusively first: a rename alone would replace a file that another process created under
        # this name.
        os.close(os.open(path, flags, 0o600))
        try:
            os.replace(part, path)
        except OSError:
            path.unlink()
            raise
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)
