"""Requests that no client of ours sends, made from good ones by a fixed seed."""

from __future__ import annotations

import json
import pickle
import random
import struct
from collections.abc import Iterator

import numpy as np

from opsd.teacher.remote.frames import from_frame, to_frame

NUMBERS = (-(2**31), -1, 64, 2**31 - 1)
FLOATS = (np.nan, np.inf, -np.inf, -1.0, 0.0, 1e-45, 3e38)
TYPES = (np.float64, np.float16, np.int64, np.uint8, np.int8, np.uint32, np.bool_, np.complex64)
HEADERS = (  # of a safetensors frame
    "", "null", "[]", "3", '"a"', "{", "[" * 5000, '{"a":' * 5000, '{"a": {}}', '{"a": {"dtype": "I32"}}',
    '{"a": {"dtype": "I32", "shape": [1], "data_offsets": [0, 4]}}',
    '{"a": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}',
    '{"a": {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]}}',
    '{"a": {"dtype": "X", "shape": [1], "data_offsets": [0, 4]}}',
    '{"a": {"dtype": "I32", "shape": [-1], "data_offsets": [0, 4]}}',
    '{"a": {"dtype": "I32", "shape": [18446744073709551615, 2], "data_offsets": [0, 4]}}',
    '{"a": {"dtype": "I32", "shape": [0, 99999999999], "data_offsets": [0, 0]}}',
    '{"a": {"dtype": "I32", "shape": [1], "data_offsets": [4, 0]}}',
    '{"a": {"dtype": "I32", "shape": [1], "data_offsets": [0, 18446744073709551615]}}',
    '{"__metadata__": {"a": 3}}', '{"__metadata__": {"a": "' + "x" * 10_000 + '"}}', "\x00\xff", "9" * 5000,
)  # fmt: skip
OTHER_BODIES = (
    (b"", "application/octet-stream"),
    (b'{"prompt": [1, 2, 3]}', "application/json"),
    (json.dumps({"a": [[[[[[1]]]]]]}).encode() * 99, "application/json"),
    (b"prompt=1&response=2", "application/x-www-form-urlencoded"),
    (b"--b\r\ncontent-disposition: form-data; name=a\r\n\r\n1\r\n--b--\r\n", "multipart/form-data; boundary=b"),
    (b"<?xml version='1.0'?><!DOCTYPE a [<!ENTITY b SYSTEM 'file:///etc/passwd'>]><a>&b;</a>", "text/xml"),
    (pickle.dumps(print), "application/octet-stream"),
    (b"\x1f\x8b\x08\x00" + b"\x00" * 99, "application/gzip"),
    (b"\x00" * (1 << 20), "application/octet-stream"),
    (b"\x00" * ((1 << 20) + 1), "application/octet-stream"),
)  # fmt: skip


def bodies(frame: bytes, seed: int) -> Iterator[bytes]:
    """Over 100, from one good frame."""
    draw = random.Random(seed)
    arrays = from_frame(frame)
    for name, array in arrays.items():
        without = {other: kept for other, kept in arrays.items() if other != name}
        yield to_frame(without)
        for number in FLOATS if array.dtype == np.float32 else NUMBERS:
            filled = np.full_like(array, number)
            one = array.copy()
            one.reshape(-1)[:1] = number
            yield from (to_frame({**without, name: each}) for each in (filled, one))
        kind = TYPES[draw.randrange(len(TYPES))]
        shapes = (array[None], array.reshape(-1)[:0], np.concatenate([array.reshape(-1)] * 2), array.astype(kind))
        yield from (to_frame({**without, name: each}) for each in shapes)
    for _ in range(15):
        yield frame[: draw.randrange(len(frame))]
    for _ in range(25):
        flipped = bytearray(frame)
        for _ in range(draw.choice((1, 1, 4, 64))):
            flipped[draw.randrange(len(flipped))] ^= 1 << draw.randrange(8)
        yield bytes(flipped)
    for _ in range(5):
        yield draw.randbytes(draw.randrange(2000))


def frames_with_headers() -> Iterator[bytes]:
    for header in HEADERS:
        text = header.encode("latin-1")
        yield struct.pack("<Q", len(text)) + text + b"\x00" * 4
    for length in (0, 2**31, 2**63, 2**64 - 1):
        yield struct.pack("<Q", length) + b"{}"
