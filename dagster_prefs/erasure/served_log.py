"""The rows of one subject in the files of the served log."""

from __future__ import annotations

import gzip
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dagster_prefs.declarations.contract import Table
from dagster_prefs.erasure.events import Subject
from dagster_prefs.errors import PrefsError
from dagster_prefs.files import whole_file
from dagster_prefs.ids import id_parts
from dagster_prefs.served_rows import GROWING, LogUnreadable, ServedRow, log_files, read_lines


@dataclass(frozen=True)
class HeldRows:
    """The subject's rows: in files that are complete, and in those that a server still writes."""

    rows: int
    growing: int


class SubjectInServedLog:
    """The rows of one subject in a folder of the served log; `tables` are those of the entities with its first key."""

    def __init__(self, folder: Path, subject: Subject, tables: Mapping[str, Table]) -> None:
        self.folder = folder
        self._subject = subject
        self._tables = tables

    def holding(self) -> HeldRows:
        """Count the subject's rows. Raises LogUnreadable naming a file and line that is no row."""
        counts = {True: 0, False: 0}
        for file, _ in self._found():
            counts[file.suffix == GROWING] += 1
        return HeldRows(rows=counts[False], growing=counts[True])

    def rows(self) -> list[dict[str, Any]]:
        """Return the subject's rows as plain values. Raises LogUnreadable."""
        return [{name: getattr(row, name) for name in ServedRow.__slots__} for _, row in self._found()]

    def erase(self) -> None:
        """Write the complete files that hold the subject again, without its rows.

        A file is replaced as a whole. Raises LogUnreadable, and PrefsError if a file cannot be written.
        """
        for file in dict.fromkeys(file for file, _ in self._found() if file.suffix != GROWING):
            kept = b"".join(line for line, row in read_lines(file) if not self._is_mine(row))
            try:
                with whole_file(file) as replaced:
                    replaced.write(gzip.compress(kept) if file.suffix == ".gz" else kept)
            except OSError as error:
                raise PrefsError(
                    f"{file} cannot be written ({error.strerror}): free it, and erase again"
                ) from error

    def _found(self) -> Iterator[tuple[Path, ServedRow]]:
        for file in log_files(self.folder) if self.folder.is_dir() else ():
            for _, row in read_lines(file):
                if self._is_mine(row):
                    yield file, row

    def _is_mine(self, row: ServedRow) -> bool:
        table = self._tables.get(row.entity)
        if table is None:
            return False
        try:
            return id_parts(table.parse_key(row.key))[0] == self._subject.value
        except ValueError:
            # It may be the subject's.
            raise LogUnreadable(
                f"{self.folder}, row {row.row_id}: its key is none of {row.entity}: remove the row, and erase again"
            ) from None
