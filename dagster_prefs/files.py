"""Files and folders that only their owner may read: state, exports and what messages held."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import BinaryIO


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
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(content)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
