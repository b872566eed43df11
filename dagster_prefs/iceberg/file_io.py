"""Read the files of Iceberg tables through pyiceberg, with a check that pyiceberg lacks.

pyiceberg's compiled Avro decoder reads beyond the end of a truncated file. It then decodes arbitrary memory of the
process: rows of an earlier manifest, or a crash.
"""

from __future__ import annotations

import io
from typing import cast

from pyiceberg.avro.decoder import StreamingBinaryDecoder
from pyiceberg.avro.file import META_SCHEMA, AvroFileHeader
from pyiceberg.avro.resolver import construct_reader
from pyiceberg.io import InputFile, InputStream
from pyiceberg.io.pyarrow import PyArrowFile, PyArrowFileIO

# As `py-io-impl` of a catalog.
CHECKED_FILE_IO = f"{__name__}.CheckedFileIO"


class FileTruncated(ValueError):
    """An Avro file does not end where its last block ends."""


class CheckedFileIO(PyArrowFileIO):
    """pyiceberg's storage; opening a truncated manifest or manifest list raises FileTruncated."""

    def new_input(self, location: str) -> PyArrowFile:
        """Return the file to read."""
        file = super().new_input(location)
        return cast(PyArrowFile, _AvroFile(file)) if location.endswith(".avro") else file


class _AvroFile(InputFile):
    def __init__(self, file: PyArrowFile) -> None:
        super().__init__(file.location)
        self._file = file

    def __len__(self) -> int:
        return len(self._file)

    def exists(self) -> bool:
        return bool(self._file.exists())

    def open(self, seekable: bool = True) -> InputStream:
        with self._file.open(seekable) as stream:
            content = stream.read()
        # Every block ends with the marker that ends the header; a file without blocks ends with the header.
        # https://avro.apache.org/docs/1.12.0/specification/#object-container-files
        try:
            header = construct_reader(META_SCHEMA, {-1: AvroFileHeader}).read(StreamingBinaryDecoder(content))
        except (EOFError, UnicodeDecodeError, ValueError) as error:
            raise FileTruncated(f"{self.location} has no complete Avro header") from error
        if not content.endswith(header.sync):
            raise FileTruncated(f"{self.location} is cut off after {len(content)} bytes")
        return io.BytesIO(content)
