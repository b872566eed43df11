"""Labels that are made to cost memory end in a sentence that names the limit, in bounded memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dagster_prefs.textfiles import MAX_CELL_BYTES, MIB

ROWS = 60_000
# The interpreter with pyarrow, pyiceberg and DuckDB takes about 250 MB.
MEMORY = 640 * MIB

READ = """
import re, sys
from datetime import UTC, datetime
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from shipped import FEATURES
from dagster_prefs.training.labels import LabelsRefused, read_labels
try:
    print(read_labels(None, sys.argv[1], features=FEATURES, now=datetime(2026, 6, 1, tzinfo=UTC)).num_rows)
except LabelsRefused as error:
    print(error)
# Unlike ru_maxrss, this begins anew with the program.
print(1024 * int(re.search(r"VmHWM:\\s+([0-9]+)", Path("/proc/self/status").read_text())[1]))
"""


def read(path: Path) -> str:
    """What reading the labels ends with, in a process of its own whose memory must stay within bounds."""
    done = subprocess.run(
        [sys.executable, "-c", READ, path, Path(__file__).parents[1]],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    said, peak = done.stdout.strip().rsplit("\n", 1)
    assert int(peak) < MEMORY, f"{int(peak):,} bytes of memory for {path.stat().st_size:,} bytes of file"
    return said


def write(path: Path, extra: pa.Array, compression: str = "snappy") -> Path:
    times = pa.DictionaryArray.from_arrays(pa.array([0] * ROWS, pa.int8()), ["2026-03-10T00:00:00Z"])
    table = pa.table({"viewer_id": pa.repeat(1, ROWS), "label_time": times, "extra": extra})
    pq.write_table(table, path, compression=compression, dictionary_pagesize_limit=8 * MIB)
    return path


def repeated(value: object, kind: pa.DataType) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array([0] * ROWS, pa.int8()), pa.array([value], kind))


@pytest.mark.parametrize("compression", ["snappy", "zstd"])
def test_a_small_parquet_file_of_repeated_texts(tmp_path: Path, compression: str) -> None:
    path = write(tmp_path / "labels.parquet", repeated("x" * 100_000, pa.string()), compression)
    assert path.stat().st_size < 2 * MIB
    assert "takes more than 1,073,741,824 bytes in memory, the limit for labels" in read(path)


def test_a_large_cell_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "labels.parquet", repeated("x" * (MAX_CELL_BYTES + 1), pa.string()))
    assert f"has a cell of {MAX_CELL_BYTES + 1:,} bytes, and the limit is {MAX_CELL_BYTES:,}" in read(path)


def test_long_lists_of_one_value(tmp_path: Path) -> None:
    """Each list is said once in the file and has 4,000 numbers in memory."""
    lists = pa.ListArray.from_arrays(
        pa.array(range(0, 4_000 * 5_001, 4_000), pa.int32()), pa.repeat(7, 4_000 * 5_000)
    )
    path = tmp_path / "labels.parquet"
    times = pa.array(["2026-03-10T00:00:00Z"] * 5_000)
    table = pa.table({"viewer_id": pa.repeat(1, 5_000), "label_time": times, "extra": lists})
    with pq.ParquetWriter(path, table.schema) as writer:
        for _ in range(8):
            writer.write_table(table)
    assert path.stat().st_size < 2 * MIB
    assert "the limit for labels" in read(path)


@pytest.mark.parametrize("cell", ["x" * 100_000, "x"], ids=["long", "short"])
def test_csv_with_an_open_quote(tmp_path: Path, cell: str) -> None:
    path = tmp_path / "labels.csv"
    with path.open("w") as file:
        file.write(f'viewer_id,label_time,note\n1,2026-03-10T00:00:00Z,"{cell}\n')
        file.writelines(f"1,2026-03-10T00:00:00Z,{cell}\n" for _ in range(2_000))
    assert "row 1 (line 2): CSV row with a stray or unclosed quote" in read(path)
