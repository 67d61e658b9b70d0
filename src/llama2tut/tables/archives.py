"""Files that hold others: what is in a .gz, and the data files in a .7z."""

import gzip
import io
import zlib
from pathlib import PurePosixPath
from typing import Any, BinaryIO

from llama2tut.errors import DataError, reason
from llama2tut.tables.reading import READERS, kind
from llama2tut.tables.table import ARCHIVE_LIMIT

GZ_LIMIT = 4 * 2**30  # bytes that a .gz may unpack to
_MOST_MEMBERS = 1_000  # of a .7z
_CHUNK = 2**20  # bytes
_READ_FROM_THEIR_ENDS = (".parquet", ".xlsx")  # which a .gz cannot be


def unzipped(label: str, file: BinaryIO) -> BinaryIO:
    """The contents of a `.gz`, all of which was seen to unpack, or of any other file.

    Raises:
        DataError: damaged, or larger than `GZ_LIMIT`.
    """
    if not label.lower().endswith(".gz"):
        return file
    unpacked: Any = gzip.GzipFile(fileobj=file)
    size = 0
    try:
        while size <= GZ_LIMIT and (chunk := unpacked.read(_CHUNK)):
            size += len(chunk)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{label}: not a readable .gz file ({reason(error)}); download it again") from None
    if size > GZ_LIMIT:
        raise DataError(f"{label}: unpacks to more than {GZ_LIMIT // 2**30} GiB; unpack it yourself")
    unpacked.seek(0)
    return io.BytesIO(unpacked.read()) if kind(label) in _READ_FROM_THEIR_ENDS else unpacked


def unpack(label: str, data: bytes) -> dict[str, bytes]:
    """The data files of a 7z archive, by their path in it; nothing is written to disk.

    Raises:
        DataError: not a 7z archive, damaged, encrypted, larger than `ARCHIVE_LIMIT`, or with a path that leaves it.
    """
    import py7zr
    from py7zr.io import BytesIOFactory

    factory: Any = BytesIOFactory(ARCHIVE_LIMIT)
    try:
        with py7zr.SevenZipFile(io.BytesIO(data)) as archive:
            members = archive.list()
            if len(members) > _MOST_MEMBERS:  # which take minutes, whatever is in them
                raise DataError(f"{label}: {len(members):,} files, {_MOST_MEMBERS:,} at most; unpack it yourself")
            for name in (member.filename.replace("\\", "/") for member in members):
                if ".." in name.split("/") or name.startswith("/") or name[1:2] == ":":
                    raise DataError(f"{label}: its member {name!r} leaves the archive; use an archive that you trust")
            # py7zr unpacks no more than the header declares, so the declared sizes bound the memory.
            if sum(member.uncompressed for member in members) > ARCHIVE_LIMIT:
                raise DataError(f"{label}: unpacks to more than {ARCHIVE_LIMIT // 2**20} MiB; unpack it yourself")
            names = [member.filename for member in members if kind(member.filename) in READERS
                     and not PurePosixPath(member.filename).name.startswith(".")]
            archive.extract(targets=names, factory=factory)
            return {name: factory.get(name).read() for name in names}
    except DataError:
        raise
    except Exception as error:  # a damaged archive surfaces as whatever its decoder raises, struct.error to LZMAError
        raise DataError(f"{label}: not a readable 7z archive ({reason(error)}); download it again") from error
