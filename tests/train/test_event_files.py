"""Event files, decoded by code that shares nothing with the writer."""

from __future__ import annotations

import struct

import pytest

from jaxlm.train.tensorboard import TensorBoardSink, crc32c


def bitwise_crc32c(data: bytes) -> int:
    """By the definition: polynomial division one bit at a time."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 * (crc & 1))
    return crc ^ 0xFFFFFFFF


def unmask(masked: int) -> int:
    rotated = (masked - 0xA282EAD8) % 2**32
    return (rotated >> 17 | rotated << 15) % 2**32


def records(content: bytes):
    while content:
        (size,) = struct.unpack("<Q", content[:8])
        (size_crc,) = struct.unpack("<I", content[8:12])
        payload = content[12 : 12 + size]
        (payload_crc,) = struct.unpack("<I", content[12 + size : 16 + size])
        assert unmask(size_crc) == bitwise_crc32c(content[:8])
        assert unmask(payload_crc) == bitwise_crc32c(payload)
        yield payload
        content = content[16 + size :]


def fields(message: bytes) -> dict[int, list]:
    """Protocol buffer wire format: number -> values (int, float or bytes)."""
    found: dict[int, list] = {}
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(message):
        number, kind = divmod(varint(), 8)
        if kind == 0:
            value = varint()
        elif kind == 2:
            size = varint()
            value, at = message[at : at + size], at + size
        else:
            width, code = {1: (8, "<d"), 5: (4, "<f")}[kind]
            (value,), at = struct.unpack(code, message[at : at + width]), at + width
        found.setdefault(number, []).append(value)
    return found


def scalars(path) -> list[tuple[int, dict[str, float]]]:
    found = []
    for event in map(fields, records(path.read_bytes())):
        for summary in event.get(5, []):
            values = [fields(value) for value in fields(summary)[1]]
            found.append((event[2][0], {v[1][0].decode(): v[2][0] for v in values}))
    return found


def test_crc():
    for data in (b"", b"123456789", bytes(range(256)) * 3):
        assert crc32c(data) == bitwise_crc32c(data)
    assert crc32c(b"123456789") == 0xE3069283  # the check value of the CRC catalogue


def write(folder):
    sink = TensorBoardSink(folder)
    sink.write(3, {"train/loss": 2.5, "train/größe": -1e-3})
    sink.write(300_000_000, {"eval/loss": float("inf")})
    sink.flush()
    sink.close()
    return next(folder.glob("events.out.tfevents.*"))


def test_an_independent_decoder_reads_it(tmp_path):
    path = write(tmp_path / "tb")
    first = fields(next(records(path.read_bytes())))
    assert first[3] == [b"brain.Event:2"]
    assert 1.6e9 < first[1][0] < 1e10
    assert scalars(path) == [
        (3, {"train/loss": 2.5, "train/größe": struct.unpack("<f", struct.pack("<f", -1e-3))[0]}),
        (300_000_000, {"eval/loss": float("inf")}),
    ]


def test_a_resumed_run_forgets_later_steps(tmp_path):
    sink = TensorBoardSink(tmp_path, keep_through=20)
    sink.close()
    log = [event for event in map(fields, records(next(tmp_path.iterdir()).read_bytes())) if 7 in event]
    assert [(event[2], fields(event[7][0])) for event in log] == [([21], {1: [1]})]


def test_two_starts_have_two_files(tmp_path):
    for _ in range(3):
        TensorBoardSink(tmp_path).close()
    assert len(list(tmp_path.iterdir())) == 3


def test_tensorboard_itself_reads_it(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    write(tmp_path)
    events = accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(3, 2.5)]
