"""Tensors that ranks share, in safetensors files: one per rank, read by any number of ranks.

rank_0.safetensors holds rank 0's rows of every sharded tensor (FSDP2 cuts along the first dimension), and what all
ranks have alike. A header says at which row each part begins and how many rows there are in all. Nothing in these files
is code: reading one that a stranger made runs none.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from opsd.errors import DataError
from opsd.files import sync_file

PLACES = "places"  # of the header's entries: {name: [first row, rows in all]}


def rank_file(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank}.safetensors"


@dataclass(frozen=True, kw_only=True)
class RankPart:
    """What one rank writes: its rows of every sharded tensor, where they lie, and what it alone has."""

    rank: int
    tensors: dict[str, Tensor]  # on the CPU
    header: dict[str, str]

    def write(self, folder: Path) -> Path:
        """Its file, forced to the disk. Raises DataError where that fails, as on a full disk."""
        path = rank_file(folder, self.rank)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(self.tensors, path, metadata=self.header)
            sync_file(path)
        except (OSError, SafetensorError) as error:
            raise DataError(f"{path}: cannot write it: {one_line(error)}") from error
        return path


def rank_part(
    tensors: Iterable[tuple[str, Tensor]],
    own: dict[str, Tensor],
    *,
    rank: int,
    num_ranks: int,
    header: dict[str, str],
    copy: bool,
) -> RankPart:
    """This rank's part of `tensors`, and `own`, which no other rank has.

    `copy`: into memory that nothing changes; else a part may be the tensor itself, to be written at once.
    """
    parts, places = dict(own), {}
    for name, tensor in tensors:
        if isinstance(tensor, DTensor):
            parts[name] = compact(tensor.to_local(), copy)
            places[name] = first_row(len(tensor), rank, num_ranks), len(tensor)
        elif rank == 0:
            parts[name] = compact(tensor, copy)
    return RankPart(rank=rank, tensors=parts, header={**header, PLACES: json.dumps(places)})


def compact(tensor: Tensor, copy: bool) -> Tensor:
    """On the CPU, in memory of its own: a shard may be a view of a padded one, which safetensors refuses."""
    here = tensor.detach().to("cpu", copy=copy).contiguous()
    return here if here.untyped_storage().nbytes() == here.nbytes else here.clone()


def first_row(num_rows: int, rank: int, num_ranks: int) -> int:
    """Where FSDP2's shard of a rank begins: as torch.chunk cuts, so the last ranks may have fewer rows, or none."""
    return min(rank * -(-num_rows // num_ranks), num_rows)


class Shards:
    """The files of all ranks as one: names, shapes, and any rows of a tensor. A context manager.

    Raises DataError, here and in its methods, where a file is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stack = ExitStack()
        self._parts: dict[str, list[tuple[int, Any]]] = {}  # by name: first row and file, in order
        self.shapes: dict[str, tuple[int, ...]] = {}  # of the whole tensors
        self.header: dict[str, str] = {}  # rank 0's
        paths = sorted(folder.glob("rank_*.safetensors"), key=lambda path: int(path.stem.partition("_")[2]))
        if not paths:
            raise DataError(f"{folder}: not a learner checkpoint (rank_0.safetensors is missing)")
        try:
            for path in paths:
                self._open(path)
        except (OSError, SafetensorError, ValueError, TypeError, KeyError, AttributeError) as error:
            self._stack.close()
            raise DataError(f"{folder}: cannot read this learner's checkpoint: {one_line(error)}") from error
        for name, shape in self.shapes.items():
            found = sum(_num_rows(file, name) for _, file in self._parts[name]) if shape else 0
            if shape and found != shape[0]:
                self._stack.close()
                raise DataError(f"{folder}: {name} has {found} of its {shape[0]} rows: is a rank's file missing?")

    def _open(self, path: Path) -> None:
        file = self._stack.enter_context(safe_open(path, framework="pt"))
        header = file.metadata() or {}
        self.header = self.header or header
        places = json.loads(header[PLACES])
        for name in file.keys():  # noqa: SIM118  (safe_open is no mapping)
            shape = tuple(file.get_slice(name).get_shape())
            first, total = places.get(name, (0, shape[0] if shape else 0))
            self._parts.setdefault(name, []).append((first, file))
            self.shapes[name] = (total, *shape[1:]) if shape else shape

    def __enter__(self) -> Shards:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def noted(self, name: str) -> Any:
        """What rank 0 wrote into the header as JSON."""
        try:
            return json.loads(self.header[name])
        except (KeyError, ValueError) as error:
            raise DataError(f"{self.folder}: rank_0.safetensors does not say its {name}") from error

    def tensor(self, name: str) -> Tensor:
        """The whole tensor."""
        shape = self.shapes.get(name)
        return self.rows(name, 0, shape[0] if shape else 0)

    def rows(self, name: str, first: int, count: int) -> Tensor:
        """Rows first .. first + count - 1; a tensor without dimensions comes whole."""
        if name not in self._parts:
            raise DataError(f"{self.folder}: {name} is missing")
        if not self.shapes[name]:
            return self._parts[name][0][1].get_tensor(name)
        found = []
        for begins, file in self._parts[name]:
            low, high = max(first, begins), min(first + count, begins + _num_rows(file, name))
            if low < high:
                found.append(file.get_slice(name)[low - begins : high - begins])
        return torch.cat(found) if found else self._parts[name][0][1].get_slice(name)[:0]


def _num_rows(file: Any, name: str) -> int:
    return file.get_slice(name).get_shape()[0]


def one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
