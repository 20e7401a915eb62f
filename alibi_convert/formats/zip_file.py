"""Zip archives checked from end to end, because a mapped one is read unchecked."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO

from alibi_convert.errors import CheckpointError
from alibi_convert.files import open_regular

MAGIC = b"PK\x03\x04"
_END = b"PK\x05\x06"
_END_BYTES = 22  # of the record that ends an archive without a comment
_LOCAL_BYTES = 30  # of an entry's own header, before its name
_UNKNOWN = 2**32 - 1  # a size that is said elsewhere
_HAS_DESCRIPTOR = 1 << 3  # sizes and CRC follow the data
_READ_BYTES = 2**20


def check_zip(path: Path) -> dict[str, tuple[int, int]]:
    """Where the data of every entry is, (offset, size) by name, once all of it has been read.

    The archive is read by different libraries. So both headers of an entry must say the same, none
    may be compressed or encrypted, and nothing may follow the archive.

    Raises:
        CheckpointError: not a zip archive, or sizes, offsets, names or CRCs are wrong.
    """
    try:
        with open_regular(path) as file:
            found: dict[str, tuple[int, int]] = {}
            end = 0
            for entry in _entries(file):
                if entry.header_offset < end:
                    raise zipfile.BadZipFile(f"{entry.filename} overlaps what precedes it")
                start = _data_start(file, entry)
                _check_data(file, entry)
                end = start + entry.file_size
                found[entry.filename] = start, entry.file_size
    # The standard library's own errors for bad archives.
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is truncated or not a sound zip archive: {error}") from None
    return found


def _entries(file: BinaryIO) -> list[zipfile.ZipInfo]:
    size = file.seek(0, 2)
    file.seek(max(0, size - _END_BYTES))
    end = file.read()
    if not (end.startswith(_END) and end.endswith(b"\0\0")):  # and no comment
        raise zipfile.BadZipFile("it does not end as an archive does")
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    # Some readers ignore case.
    if len({entry.filename.casefold() for entry in entries}) < len(entries):
        raise zipfile.BadZipFile("two entries have one name")
    entries.sort(key=lambda entry: entry.header_offset)
    if entries and entries[0].header_offset:
        raise zipfile.BadZipFile("it does not begin with its first entry")
    return entries


def _data_start(file: BinaryIO, entry: zipfile.ZipInfo) -> int:
    """Where an entry's data starts; its own header must agree with the archive's directory."""
    file.seek(entry.header_offset)
    header = file.read(_LOCAL_BYTES)
    flags, method = _number(header, 6, 2), _number(header, 8, 2)
    crc, *sizes = (_number(header, at, 4) for at in (14, 18, 22))
    name_length, extra_length = _number(header, 26, 2), _number(header, 28, 2)
    name = file.read(name_length)
    if len(header) < _LOCAL_BYTES or header[:4] != MAGIC:
        raise zipfile.BadZipFile(f"no header where {entry.filename} should be")
    is_later = bool(flags & _HAS_DESCRIPTOR)
    agrees = (
        name.decode("utf-8", "replace") == entry.orig_filename
        and method == entry.compress_type == zipfile.ZIP_STORED
        and flags == entry.flag_bits
        and not flags & 1  # encrypted
        and entry.compress_size == entry.file_size
        and (crc == entry.CRC or (is_later and crc == 0))
        and all(size in (entry.file_size, _UNKNOWN) or (is_later and size == 0) for size in sizes)
    )
    if not agrees:
        raise zipfile.BadZipFile(f"the two headers of {entry.filename} disagree, or it is packed")
    return file.seek(extra_length, 1)


def _check_data(file: BinaryIO, entry: zipfile.ZipInfo) -> None:
    left, crc = entry.file_size, 0
    while left:
        chunk = file.read(min(left, _READ_BYTES))
        if not chunk:
            raise zipfile.BadZipFile(f"{entry.filename} is cut off")
        crc = zlib.crc32(chunk, crc)
        left -= len(chunk)
    if crc != entry.CRC:
        raise zipfile.BadZipFile(f"{entry.filename} has another CRC than the archive says")


def _number(header: bytes, start: int, length: int) -> int:
    return int.from_bytes(header[start : start + length], "little")
