"""Arrays as bytes: one safetensors frame, which says what it holds and never runs code when it is read.

Ids are int32, log-probabilities float32. A list of sequences is one array of all tokens and one of their lengths.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

MEDIA_TYPE = "application/vnd.safetensors"
PROTOCOL = 3  # what /info says and the frames of wire.py hold; client and server must agree


class WireError(ValueError):
    """Bytes that are no frame, or a frame without what it must hold."""


def to_frame(arrays: dict[str, np.ndarray]) -> bytes:
    return save({name: np.asarray(array, order="C") for name, array in arrays.items()})  # `save` ignores strides


def from_frame(body: bytes) -> dict[str, np.ndarray]:
    try:
        return load(body)
    except SafetensorError as error:
        raise WireError(f"not a safetensors frame: {error}") from error
    except KeyError as error:
        raise WireError(f"a safetensors frame with an array of type {error}, expected I32 and F32") from error


def expect(name: str, arrays: dict[str, np.ndarray], dtype: type, num_dims: int) -> np.ndarray:
    array = arrays.get(name)
    if array is None or array.dtype != dtype or array.ndim != num_dims:
        got = "nothing" if array is None else f"{array.dtype} with {array.ndim}"
        raise WireError(f"{name} must be {np.dtype(dtype).name} with {num_dims} dimensions, got {got}")
    return array


def number(name: str, arrays: dict[str, np.ndarray]) -> int:
    return int(expect(name, arrays, np.int32, 0))


def pack_sequences(name: str, sequences: Iterable[np.ndarray]) -> dict[str, np.ndarray]:
    parts = [np.asarray(ids, np.int32) for ids in sequences]
    return {f"{name}_ids": np.concatenate(parts), f"{name}_lengths": np.array([len(ids) for ids in parts], np.int32)}


def unpack_sequences(name: str, arrays: dict[str, np.ndarray]) -> list[np.ndarray]:
    ids = expect(f"{name}_ids", arrays, np.int32, 1)
    lengths = expect(f"{name}_lengths", arrays, np.int32, 1).astype(np.int64)
    if len(lengths) == 0 or lengths.min() < 1 or lengths.sum() != len(ids):
        raise WireError(f"{name}_lengths must each be at least 1 and sum to the {len(ids)} {name}_ids")
    return np.split(ids, np.cumsum(lengths)[:-1])
