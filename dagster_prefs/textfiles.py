"""Lines and CSV rows of foreign files, read in bounded memory.

Every limit is in bytes, because a line, a row, a cell or a gzip file may be of any size whatever the size of
the file.
"""

from __future__ import annotations

import csv
import gzip
import zlib
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, ClassVar, Literal, Self, cast

from dagster_prefs.errors import PrefsError

KIB = 1024
MIB = 1024 * KIB

# Longer than any event or label, but harmless for a process with 1 GB.
MAX_LINE_BYTES = 8 * MIB
# Prevents a stray quote from swallowing the rest of a file into one cell.
MAX_ROW_LINES = 100
MAX_ROW_BYTES = 1 * MIB
MAX_CELL_BYTES = 128 * KIB
# Blank lines are not stored, so nothing else limits their cost.
MAX_BLANK_LINES = 1_000_000
# Events compress to a tenth or a twentieth of their size; a decompression bomb to a thousandth.
MAX_EXPANSION = 100
EXPANSION_FREE_BYTES = 64 * MIB

UTF8_BOM = b"\xef\xbb\xbf"
GZIP_MAGIC = b"\x1f\x8b"
FOREIGN_MAGIC = {
    b"PK\x03\x04": "a zip archive",
    b"\x28\xb5\x2f\xfd": "zstd-compressed",
    b"BZh": "bzip2-compressed",
    b"\xfd7zXZ": "xz-compressed",
    b"PAR1": "a Parquet file",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
}

RowFault = Literal["cells", "encoding", "nul", "quotes", "size"]

# The reasons for rows that cannot be read; the typed layer's macro malformed_row_reasons has the same ones.
ROW_FAULTS: Mapping[RowFault, str] = {
    "cells": "CSV row with another number of cells than its header",
    "encoding": "CSV row that is not UTF-8",
    "nul": "CSV row with the character U+0000",
    "quotes": "CSV row with a stray or unclosed quote",
    "size": "CSV row with a cell or a length beyond the limit",
}


class LineReader:
    """The physical lines of a plain or gzip file, with their terminators, in constant memory.

    Iterating raises the class's `refusal` at damage and beyond a limit, after yielding every complete line
    before it; `bytes_read` is the position in the file on disk, for progress. A subclass sets the error class
    and its texts.
    """

    refusal: ClassVar[type[PrefsError]] = PrefsError
    formats: ClassVar[str] = "CSV in UTF-8, plain or gzip"
    again: ClassVar[str] = "read it again"

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[bytes] = path.open("rb")
        self._stream: IO[bytes] = self._file
        self._packed = False
        head = self._file.read(8)
        self._file.seek(0)
        for magic, name in FOREIGN_MAGIC.items():
            if head.startswith(magic):
                self._file.close()
                raise self.refusal(f"{path} is {name}: give {self.formats}")
        if head.startswith(GZIP_MAGIC):
            self._packed = True
            # GzipFile's own buffer returns its content before it reports damage; another buffer around it
            # would not.
            self._stream = cast(IO[bytes], gzip.GzipFile(fileobj=self._file))

    @property
    def bytes_read(self) -> int:
        """Number of bytes of the file on disk that were read so far."""
        return self._file.tell()

    def close(self) -> None:
        """Close the file."""
        self._stream.close()
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        number = blank = expanded = 0
        try:
            for number, line in enumerate(iter(partial(self._stream.readline, MAX_LINE_BYTES + 1), b""), 1):
                if len(line) > MAX_LINE_BYTES:
                    raise self.refusal(
                        f"{self.path}, line {number}: longer than {MAX_LINE_BYTES:,} bytes, the limit for a line: "
                        "put one JSON object or one CSV row on each line"
                    )
                expanded += len(line)
                if (
                    self._packed
                    and expanded > EXPANSION_FREE_BYTES
                    and expanded > MAX_EXPANSION * self._file.tell()
                ):
                    raise self.refusal(
                        f"{self.path}, line {number}: {self._file.tell():,} bytes of gzip expand to more than "
                        f"{expanded:,}, and the limit is {MAX_EXPANSION} times the size: if this is meant, unpack the "
                        "file and give the plain one"
                    )
                if line.isspace():
                    blank += 1
                    if blank > MAX_BLANK_LINES:
                        raise self.refusal(
                            f"{self.path}, line {number}: more than {MAX_BLANK_LINES:,} blank lines in a row, the "
                            "limit: remove them"
                        )
                else:
                    blank = 0
                # A byte order mark belongs to the file, not to its first line.
                yield number, line.removeprefix(UTF8_BOM) if number == 1 else line
        except EOFError:
            raise self.refusal(
                f"{self.path} is a truncated gzip file (its data ends after line {number}): "
                f"get the whole file and {self.again}"
            ) from None
        except (zlib.error, gzip.BadGzipFile) as error:
            raise self.refusal(
                f"{self.path} is a damaged gzip file (after line {number}: {error}): "
                f"get an intact copy and {self.again}"
            ) from None
        except OSError as error:
            raise self.refusal(
                f"{self.path} cannot be read after line {number} ({error.strerror}): check the disk"
            ) from None


@dataclass(frozen=True)
class CsvRow:
    """One row of a CSV file: first physical line (1-based), bytes without the last terminator, cells.

    `fault` gives the reason if there are no cells: the row is not UTF-8, contains U+0000, has a quote that is
    never closed or stands inside a cell, or a cell or the whole row is too large. A blank line is a row
    without cells and without fault.
    """

    line: int
    raw: bytes
    cells: tuple[str, ...] = ()
    fault: RowFault | None = None


class _Runaway(Exception):
    """A quoted cell spans more lines or bytes than any real one."""


def csv_rows(lines: Iterator[tuple[int, bytes]]) -> Iterator[CsvRow]:
    """Yield the rows of a CSV file in order, including the header and blank lines.

    A row with a fault ends at its first line: reading continues with the next one, so that a stray quote
    costs one row.
    """
    again: deque[tuple[int, bytes]] = deque()
    taken: list[tuple[int, bytes]] = []

    def feed() -> Iterator[str]:
        while True:
            item = again.popleft() if again else next(lines, None)
            if item is None:
                return
            taken.append(item)
            if len(taken) > MAX_ROW_LINES or sum(len(line) for _, line in taken) > MAX_ROW_BYTES:
                raise _Runaway
            yield item[1].decode("utf-8", "surrogateescape")

    while True:
        try:
            for cells in csv.reader(feed(), strict=True):
                number, raw = taken[0]
                if len(taken) > 1:
                    raw = b"".join(line for _, line in taken)
                taken.clear()
                raw = without_terminator(raw)
                if not raw.strip():
                    yield CsvRow(number, raw)
                elif fault := _fault(cells):
                    yield CsvRow(number, raw, fault=fault)
                else:
                    yield CsvRow(number, raw, tuple(cells))
            return
        except (_Runaway, csv.Error) as error:
            (number, raw), *later = taken
            again.extendleft(reversed(later))
            taken.clear()
            # The csv module has its own limit for a cell, and distinguishes this error from others only by
            # its message.
            large = not later and (
                isinstance(error, _Runaway) or "field larger than field limit" in str(error)
            )
            yield CsvRow(number, without_terminator(raw), fault="size" if large else "quotes")


def _fault(cells: list[str]) -> RowFault | None:
    for cell in cells:
        if cell.isascii():
            if len(cell) > MAX_CELL_BYTES:
                return "size"
        else:
            try:
                if len(cell.encode()) > MAX_CELL_BYTES:
                    return "size"
            except UnicodeEncodeError:
                return "encoding"
        if "\0" in cell:
            return "nul"
    return None


def without_terminator(line: bytes) -> bytes:
    """Return the line without its line feed, or carriage return and line feed."""
    return line.removesuffix(b"\n").removesuffix(b"\r")
