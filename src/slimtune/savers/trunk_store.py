"""Where the trunk cache keeps its tensors: in memory, or in one growing file that is memory-mapped."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from slimtune.core.errors import FileError
from slimtune.version import __version__


class Store(Protocol):
    """Key -> tensor, up to a number of bytes; `put` beyond it does nothing."""

    def get(self, key: bytes) -> Tensor | None: ...
    def put(self, key: bytes, value: Tensor) -> None: ...
    def clear(self) -> None: ...
    def close(self) -> None: ...


class MemoryStore:
    """In memory, on the CPU."""

    def __init__(self, most: int) -> None:
        self.most, self.bytes = most, 0
        self._kept: dict[bytes, Tensor] = {}

    def get(self, key: bytes) -> Tensor | None:
        return self._kept.get(key)

    def put(self, key: bytes, value: Tensor) -> None:
        size = value.numel() * value.element_size()
        if key not in self._kept and self.bytes + size <= self.most:
            self._kept[key] = value.to("cpu", copy=True).contiguous()
            self.bytes += size

    def clear(self) -> None:
        self._kept.clear()
        self.bytes = 0

    def close(self) -> None:
        self.clear()

    def __str__(self) -> str:
        return f"{len(self._kept):,} examples, {self.bytes / 2**20:.0f} MiB in memory"


class DiskStore:
    """One file of raw tensors and one of JSON lines that say where each lies; what a kill cut off is forgotten.

    Args:
        folder: of this base and depth; made if missing.
        most: bytes.

    Raises:
        FileError: the folder cannot be used.
    """

    def __init__(self, folder: Path, most: int) -> None:
        self.folder, self.most = folder, most
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._data = (folder / "trunk.bin").open("a+b")
            self._index = (folder / "index.jsonl").open("a+", encoding="utf-8")
        except OSError as error:
            raise FileError(f"the trunk cache cannot be kept there: {error.strerror}", where=str(folder), hint="give another folder") from None
        self._places: dict[bytes, tuple[int, tuple[int, ...], str]] = {}
        self.bytes = self._data.seek(0, os.SEEK_END)
        self._read_index()

    def _read_index(self) -> None:
        self._index.seek(0)
        for line in self._index:
            try:
                key, start, shape, dtype, version = json.loads(line)
                place = (int(start), tuple(map(int, shape)), str(dtype))
                raw = bytes.fromhex(key)
            except (json.JSONDecodeError, ValueError, TypeError):
                continue
            if version == __version__ and start + _size(*place[1:]) <= self.bytes:
                self._places[raw] = place

    def get(self, key: bytes) -> Tensor | None:
        if key not in self._places:
            return None
        start, shape, dtype = self._places[key]
        n = _size(shape, dtype)
        flat = torch.from_file(str(self.folder / "trunk.bin"), shared=False, size=start + n, dtype=torch.uint8)
        return flat[start : start + n].view(getattr(torch, dtype)).view(shape)

    def put(self, key: bytes, value: Tensor) -> None:
        value = value.to("cpu").contiguous()
        raw = value.view(torch.uint8).numpy().tobytes()
        pad = -self.bytes % 16  # a view of another dtype must start at a multiple of its size
        if key in self._places or self.bytes + pad + len(raw) > self.most:
            return
        self._data.write(bytes(pad) + raw)
        self._data.flush()
        place = (self.bytes + pad, tuple(value.shape), str(value.dtype).removeprefix("torch."))
        self._index.write(json.dumps([key.hex(), *place, __version__]) + "\n")
        self._index.flush()
        self._places[key] = place
        self.bytes += pad + len(raw)

    def clear(self) -> None:
        self._places.clear()
        self.bytes = 0
        for file in (self._data, self._index):
            file.seek(0)
            file.truncate()

    def close(self) -> None:
        self._data.close()
        self._index.close()

    def __str__(self) -> str:
        return f"{len(self._places):,} examples, {self.bytes / 2**20:.0f} MiB in {self.folder}"


def _size(shape: tuple[int, ...], dtype: str) -> int:
    return torch.Size(shape).numel() * torch.empty(0, dtype=getattr(torch, dtype)).element_size()
