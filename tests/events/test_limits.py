"""Files that are made to cost memory or time: each ends in a sentence that names the limit, in bounded memory."""

from __future__ import annotations

import gzip
import subprocess
import sys
from collections.abc import Iterable
from itertools import chain, repeat
from pathlib import Path

import pytest

from dagster_prefs.textfiles import MAX_LINE_BYTES, MAX_ROW_BYTES, MIB

VIEW = b'{"event_id":"a","viewer_id":1,"watched_at":1}\n'
# The interpreter with what is imported takes about 70 MB.
MEMORY = 256 * MIB

READ = """
import re, sys
from pathlib import Path
from dagster_prefs.errors import PrefsError
from dagster_prefs.events.formats import LineReader, detect, read_records
from dagster_prefs.events.ingest import Tally, batches_of
from dagster_prefs.settings import load_settings
path = Path(sys.argv[1])
try:
    found = detect(path, load_settings().registry(), sys.argv[2])
    with LineReader(path) as reader:
        stored = 0
        for batch, damage in batches_of(reader, found, 0, 10_000, tally := Tally()):
            stored += len(batch)
            if damage:
                raise damage
    print(f"{stored} stored, {tally.malformed} malformed")
except PrefsError as error:
    print(error)
# Unlike ru_maxrss, this begins anew with the program.
print(1024 * int(re.search(r"VmHWM:\\s+([0-9]+)", Path("/proc/self/status").read_text())[1]))
"""


def read(path: Path, topic: str) -> str:
    """What reading the file ends with, in a process of its own whose memory must stay within bounds."""
    done = subprocess.run(
        [sys.executable, "-c", READ, path, topic], capture_output=True, text=True, check=True, timeout=300
    )
    said, peak = done.stdout.strip().rsplit("\n", 1)
    assert int(peak) < MEMORY, f"{int(peak):,} bytes of memory for {path.stat().st_size:,} bytes of file"
    return said


def packed(path: Path, parts: Iterable[bytes]) -> Path:
    with gzip.open(path, "wb") as file:
        for part in parts:
            file.write(part)
    return path


def test_a_gzip_of_long_lines(tmp_path: Path) -> None:
    line = b'{"x":"' + b"a" * MAX_LINE_BYTES + b'"}\n'
    path = packed(tmp_path / "long.jsonl.gz", repeat(line, 12))
    assert f"line 1: longer than {MAX_LINE_BYTES:,} bytes, the limit" in read(path, "view_events")


def test_a_gzip_of_lines_within_the_limit_that_expands_beyond_reason(tmp_path: Path) -> None:
    line = b'{"x":"' + b"a" * (MAX_LINE_BYTES - 9) + b'"}\n'
    assert len(line) == MAX_LINE_BYTES
    path = packed(tmp_path / "long.jsonl.gz", repeat(line, 12))
    said = read(path, "view_events")
    assert "expand to more than" in said
    assert "the limit is 100 times the size" in said
    assert "give the plain one" in said


def test_lines_within_the_limit_are_read_in_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    with path.open("wb") as file:
        for _ in range(20):
            file.write(b'{"x":"' + b"a" * (MAX_LINE_BYTES - 9) + b'"}\n')
    assert read(path, "view_events") == "20 stored, 0 malformed"


@pytest.mark.parametrize(
    ("row", "rows", "malformed"),
    [
        (b"1,good\n", 150, 1),
        (b"x" * (MAX_ROW_BYTES - 3) + b",y\n", 150, 151),
        (b"," * (MAX_LINE_BYTES - 1) + b"\n", 20, 21),
    ],
    ids=["short rows", "long cells", "many cells"],
)
def test_a_csv_with_an_open_quote(tmp_path: Path, row: bytes, rows: int, malformed: int) -> None:
    path = tmp_path / "items.csv"
    with path.open("wb") as file:
        file.write(b'item_id,title\n0,"open\n')
        for _ in range(rows):
            file.write(row)
    assert read(path, "items") == f"{rows + 1} stored, {malformed} malformed"


@pytest.mark.parametrize("ahead", [b"", VIEW], ids=["only", "after an event"])
def test_blank_lines_without_end(tmp_path: Path, ahead: bytes) -> None:
    path = packed(tmp_path / "blank.jsonl.gz", chain([ahead], repeat(b"\n" * MIB, 20)))
    said = read(path, "view_events")
    assert "more than 1,000,000 blank lines in a row, the limit: remove them" in said
