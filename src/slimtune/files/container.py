"""The safetensors container, read and written by ourselves: every byte checked on the way in, the same bytes every time on the way out.

Format: 8 bytes header length N (little endian), N bytes JSON {name: {dtype, shape, data_offsets}, "__metadata__": {str: str}}, data.
Own files also carry a SHA-256 over names, metadata and data. The safetensors library writes metadata in random order, and
reads lazily through a memory map (a file cut short meanwhile kills the process), so neither is used here.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from slimtune.core.errors import FileError, FormatError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
CODES = {dtype: code for code, dtype in DTYPES.items()}
OWN, SUM = "slimtune", "slimtune_sha256"  # our two metadata keys
MARK = '"slimtune_format"'  # stands inside the value of OWN: a file of ours with a damaged key is known by it
MAX_HEADER = 64 * 2**20
MAX_JSON = 16 * 2**20
MAX_NAME = 2000


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: `start` and `end` count bytes from the end of the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class TensorFile:
    """A file in memory.

    Attributes:
        path: where it came from.
        entries: tensor name -> what the header says.
        metadata: the header's text fields.
        data: the tensor bytes.
    """

    path: Path
    entries: dict[str, Entry]
    metadata: dict[str, str]
    data: bytearray

    def tensor(self, name: str) -> Tensor:
        """Return a tensor, on the CPU, sharing the file's memory where alignment allows."""
        e = self.entries[name]
        if e.start == e.end:
            return torch.empty(e.shape, dtype=e.dtype)
        if e.start % e.dtype.itemsize:
            return torch.frombuffer(bytearray(self.data[e.start : e.end]), dtype=e.dtype).reshape(e.shape)
        return torch.frombuffer(self.data, dtype=e.dtype, count=math.prod(e.shape), offset=e.start).reshape(e.shape)


# ---- reading ----------------------------------------------------------------------------------------------------------
def read_bytes(path: Path, limit: int | None = None) -> bytearray:
    """Return the content of a regular file.

    Raises:
        FileError: it cannot be read, is too large, or is no regular file.
    """
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))  # a FIFO must not hang us
    except OSError as error:
        raise FileError(f"cannot read {path.name}: {error.strerror}", where=str(path), hint="check the path and its permissions") from None
    info = os.fstat(handle)
    if not stat.S_ISREG(info.st_mode) or (limit is not None and info.st_size > limit):
        os.close(handle)
        if not stat.S_ISREG(info.st_mode):
            raise FormatError(f"{path.name} is no regular file", where=str(path), hint="a folder with two plain files is expected")
        raise FormatError(f"{path.name} has {info.st_size:,} bytes, more than the {limit:,} allowed", where=str(path))
    with os.fdopen(handle, "rb") as f:
        try:
            return bytearray(f.read())
        except (OSError, MemoryError) as error:
            raise FileError(f"cannot read {path.name}: {error}", where=str(path)) from None


def parse_json(raw: bytes | bytearray, path: Path, what: str) -> dict[str, Any]:
    """Return a JSON object; duplicate keys, NaN and anything deeply nested are refused.

    Raises:
        FormatError: it is no such object.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) != len(pairs):
            raise ValueError("a key stands twice")
        return out

    def refuse(word: str) -> Any:
        raise ValueError(f"{word} is not JSON")

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise FormatError(f"{what} is not valid JSON: {reason}", where=str(path), hint="the file is damaged: fetch or save it again") from None
    if not isinstance(value, dict):
        raise FormatError(f"{what} is no JSON object", where=str(path), hint="the file is damaged: fetch or save it again")
    return value


def read_tensors(path: Path) -> TensorFile:
    """Read and check a safetensors file; the checksum of own files is checked by `check_sum`.

    Raises:
        FormatError: with what is wrong and where.
    """
    raw = read_bytes(path)

    def bad(reason: str, hint: str = "the file is damaged: fetch or save it again") -> FormatError:
        return FormatError(f"{path.name} is not a valid safetensors file: {reason}", where=str(path), hint=hint)

    if raw[8:9] != b"{" and (raw[:2] == b"PK" or raw[:1] == b"\x80"):
        raise bad("it is a pickle (a torch.save file), which can run any code when opened", CONVERT)
    if len(raw) < 10:
        raise bad(f"it has only {len(raw)} bytes")
    n = int.from_bytes(raw[:8], "little")
    if n > MAX_HEADER or n > len(raw) - 8:
        raise bad(f"it claims a header of {n:,} bytes in a file of {len(raw):,}")
    header = parse_json(raw[8 : 8 + n], path, f"the header of {path.name}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise bad("its metadata is no mapping of texts")
    size = len(raw) - 8 - n
    entries = {name: _entry(name, value, size, bad) for name, value in header.items()}
    at = 0
    for name, e in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if e.start != at:
            raise bad(f"there is a gap or an overlap before {name!r}")
        at = e.end
    if at != size:
        raise bad(f"its tensors take {at:,} bytes, the file holds {size:,}")
    del raw[: 8 + n]
    return TensorFile(path, entries, metadata, raw)


def _entry(name: str, value: Any, size: int, bad: Any) -> Entry:
    if not name or len(name) > MAX_NAME or not name.isprintable() or any(c in name for c in "/\\") or ".." in name:
        raise bad(f"it names a tensor {name[:60]!r}", "a tensor's name is made of module names joined by dots")
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise bad(f"the entry of {name!r} is malformed")
    code, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise bad(f"{name!r} has the unknown dtype {str(code)[:20]!r}", f"known: {', '.join(DTYPES)}")
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or len(numbers) > 16 or not all(type(i) is int and 0 <= i < 2**60 for i in numbers):
            raise bad(f"the shape or the offsets of {name!r} are malformed")
    if len(offsets) != 2 or not offsets[0] <= offsets[1] <= size:
        raise bad(f"{name!r} lies outside of the file")
    if math.prod(shape) * DTYPES[code].itemsize != offsets[1] - offsets[0]:
        raise bad(f"{name!r} of shape {shape} and dtype {code} does not take {offsets[1] - offsets[0]} bytes")
    return Entry(DTYPES[code], tuple(shape), offsets[0], offsets[1])


def own_metadata(file: TensorFile) -> dict[str, Any] | None:
    """Return what slimtune wrote into the header, None for a file of another library.

    Raises:
        FormatError: it is one of ours, but damaged.
    """
    if OWN not in file.metadata:
        if SUM in file.metadata or any(MARK in value for value in file.metadata.values()):
            raise FormatError(f"the metadata of {file.path.name} is damaged", where=str(file.path), hint="fetch or save it again")
        return None
    return parse_json(file.metadata[OWN].encode(), file.path, f"the metadata of {file.path.name}")


def check_sum(file: TensorFile) -> None:
    """Raise unless the checksum in an own file's header is that of its content.

    Raises:
        FormatError: it is not.
    """
    if file.metadata.get(SUM) != _digest(file.entries, file.metadata, [file.data]):
        raise FormatError(
            f"the checksum of {file.path.name} is wrong: some of its bytes have changed since it was saved",
            where=str(file.path),
            hint="fetch or save it again; to read it all the same: st.load(..., relax='checksum')",
        )


def _digest(entries: dict[str, Entry], metadata: dict[str, str], data: Iterable[Any]) -> str:
    text = [[k, CODES[e.dtype], list(e.shape), e.start, e.end] for k, e in sorted(entries.items())]
    rest = {k: v for k, v in metadata.items() if k != SUM}
    digest = hashlib.sha256(json.dumps([text, rest], sort_keys=True).encode())
    for part in data:
        digest.update(part)
    return digest.hexdigest()


# ---- writing ----------------------------------------------------------------------------------------------------------
def plan_entries(shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> dict[str, Entry]:
    """Return where each tensor goes: widest dtypes first (so that all are aligned), then by name."""
    at, entries = 0, {}
    for name in sorted(shapes, key=lambda k: (-shapes[k][0].itemsize, k)):
        dtype, shape = shapes[name]
        end = at + math.prod(shape) * dtype.itemsize
        entries[name] = Entry(dtype, tuple(shape), at, end)
        at = end
    return entries


def write_header(out: IO[bytes], entries: dict[str, Entry], metadata: dict[str, str]) -> None:
    """Write length and header; the tensors' bytes must follow in the order of `entries`."""
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    for name, e in entries.items():
        header[name] = {"dtype": CODES[e.dtype], "shape": list(e.shape), "data_offsets": [e.start, e.end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    out.write(len(text).to_bytes(8, "little") + text)


def raw_view(t: Tensor) -> Any:
    """Return the bytes of a contiguous CPU tensor without a copy; the tensor must outlive them."""
    size = t.numel() * t.element_size()
    return memoryview((ctypes.c_char * size).from_address(t.data_ptr())).cast("B") if size else b""


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file with its checksum, and flush it to the disk.

    Raises:
        OSError: as the system gives it.
    """
    held = {k: t.detach().to("cpu").contiguous() for k, t in tensors.items()}
    entries = plan_entries({k: (t.dtype, tuple(t.shape)) for k, t in held.items()})
    metadata = {**metadata, SUM: _digest(entries, metadata, (raw_view(held[k]) for k in entries))}
    with open(path, "wb") as f:
        write_header(f, entries, metadata)
        for name in entries:
            f.write(raw_view(held[name]))
        flush(f)


def flush(f: IO[bytes]) -> None:
    """Hand a file's bytes to the disk."""
    f.flush()
    os.fsync(f.fileno())


CONVERT = (
    """python -c "import torch, safetensors.torch as s; s.save_file({k: v.contiguous() for k, v in """
    """torch.load('adapter_model.bin', map_location='cpu', weights_only=True).items()}, 'adapter_model.safetensors', {'format': 'pt'})\""""
)

