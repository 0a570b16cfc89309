"""TensorBoard event files, written with nothing but the standard library.

A file is a sequence of records `length, masked crc of length, event, masked crc of event`, where an event is a protocol
buffer with the fields below (tensorflow/core/util/event.proto and framework/summary.proto):

    Event        1 wall_time double   2 step int64   3 file_version string   5 summary   7 session_log
    Summary      1 value (repeated)
    Value        1 tag string         2 simple_value float
    SessionLog   1 status enum (1: START, which tells TensorBoard to forget later steps of the same run)
"""

from __future__ import annotations

import os
import platform
import struct
import time
from collections.abc import Mapping
from pathlib import Path

_START = 1


def _crc_table() -> list[int]:
    """One entry per byte for CRC-32C: polynomial 0x1EDC6F41, bits reversed."""
    table = []
    for value in range(256):
        for _ in range(8):
            value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


_TABLE = _crc_table()


def crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli) of `data`.

    >>> hex(crc32c(b"123456789"))
    '0xe3069283'
    """
    crc = 0xFFFFFFFF
    for byte in data:
        crc = (crc >> 8) ^ _TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def _masked_crc(data: bytes) -> bytes:
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _bytes_field(number: int, data: bytes) -> bytes:
    return bytes([number << 3 | 2]) + _varint(len(data)) + data


def _event(step: int, field: bytes) -> bytes:
    return b"\x09" + struct.pack("<d", time.time()) + b"\x10" + _varint(step) + field


def _scalar(tag: str, value: float) -> bytes:
    return _bytes_field(1, _bytes_field(1, tag.encode()) + b"\x15" + struct.pack("<f", value))


class TensorBoardSink:
    """Writes scalars to a new event file in `directory`.

    keep_through: None for a new run; on resume the resumed step: TensorBoard then forgets what earlier files of this
    folder say about later ones.
    """

    def __init__(self, directory: str | os.PathLike[str], *, keep_through: int | None = None) -> None:
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        # The time to the nanosecond: two starts in one second must not share a file.
        name = f"events.out.tfevents.{time.time():.9f}.{platform.node() or 'host'}.{os.getpid()}"
        self._file = (folder / name).open("wb")
        self._record(_event(0, _bytes_field(3, b"brain.Event:2")))
        forget_from = 0 if keep_through is None else keep_through + 1
        self._record(_event(forget_from, _bytes_field(7, b"\x08" + _varint(_START))))
        self._file.flush()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds one event with a scalar per entry."""
        self._record(_event(step, _bytes_field(5, b"".join(_scalar(tag, value) for tag, value in values.items()))))
        self._file.flush()

    def flush(self) -> None:
        """Makes what was written durable."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _record(self, event: bytes) -> None:
        length = struct.pack("<Q", len(event))
        self._file.write(length + _masked_crc(length) + event + _masked_crc(event))
