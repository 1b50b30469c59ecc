"""A checkpoint folder read tensor by tensor: model.safetensors, or shards with or without an index. Nothing else is opened, and no pickle ever."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from slimtune.core.errors import FileError, FormatError, MismatchError
from slimtune.core.placing import base_modules
from slimtune.files.container import MAX_JSON, parse_json, read_bytes


class Checkpoint:
    """The tensors of a folder by name; each is read when it is asked for and forgotten afterwards.

    Args:
        folder: a plain checkpoint; or one .safetensors file.
        prefix: what names may carry or lack in front ("model"): checkpoints are written from inside and outside of a head.

    Raises:
        FileError: there is no such folder, or no safetensors in it.
        FormatError: a file is damaged, is a pickle, or the folder holds an adapter.
    """

    def __init__(self, folder: str | Path, prefix: str = "") -> None:
        self.folder, self.prefix = Path(folder), prefix
        self.files: dict[str, tuple[Path, tuple[int, ...]]] = {}
        for path in self._shards():
            for name, shape in self._header(path).items():
                if name in self.files:
                    where = f"{self.files[name][0].name}, {path.name}"
                    raise FormatError(f"{name!r} stands in two files", where=where, hint="remove the one that is out of date")
                self.files[name] = (path, shape)
        self.asked: set[str] = set()

    def find(self, name: str) -> str | None:
        """Return the name in the files for a parameter of the model, or None."""
        dot = f"{self.prefix}."
        tries = [name, *([dot + name, name.removeprefix(dot)] if self.prefix else [])]
        return next((t for t in tries if t in self.files), None)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Return the shape of a parameter of the model, None if the files hold none; only a header is read."""
        found = self.find(name)
        if found is None:
            return None
        self.asked.add(found)
        return self.files[found][1]

    def tensor(self, name: str) -> Tensor | None:
        """Return the tensor of a parameter of the model, None if the files hold none."""
        from safetensors import SafetensorError, safe_open

        found = self.find(name)
        if found is None:
            return None
        self.asked.add(found)
        try:
            with safe_open(self.files[found][0], framework="pt") as f:
                t: Tensor = f.get_tensor(found)
        except (SafetensorError, OSError) as error:
            raise _damaged(self.files[found][0], error) from None
        if not t.is_floating_point():
            raise MismatchError(f"{found} holds {t.dtype}, not floats", where=str(self.files[found][0]), hint="give an unquantised checkpoint")
        return t

    @property
    def left(self) -> list[str]:
        """Names that nobody has asked for."""
        return [name for name in self.files if name not in self.asked]

    def _shards(self) -> list[Path]:
        if self.folder.is_file():
            if self.folder.suffix != ".safetensors":
                raise FormatError(f"{self.folder.name} is no safetensors file", where=str(self.folder), hint="name the checkpoint's folder")
            return [self.folder]
        if not self.folder.is_dir():
            raise FileError(f"there is no folder {self.folder}", where=str(self.folder.absolute()), hint="give a local folder with model.safetensors")
        if (self.folder / "adapter_model.safetensors").is_file():
            raise FormatError("the folder holds an adapter, not a whole model", where=str(self.folder), hint="st.load reads adapters")
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            return self._indexed(index)
        found = sorted(self.folder.glob("*.safetensors"))
        if not found:
            pickles = sorted(p.name for p in self.folder.iterdir() if p.suffix in {".bin", ".pt", ".pth", ".ckpt"})
            hint = "convert it to safetensors first: model.save_pretrained(folder)" if pickles else "model.save_pretrained(folder) writes it"
            raise FileError(f"{self.folder} holds no safetensors" + (f", only {pickles[0]}" if pickles else ""), where=str(self.folder), hint=hint)
        return found

    def _indexed(self, index: Path) -> list[Path]:
        table = parse_json(read_bytes(index, MAX_JSON), index, index.name).get("weight_map")
        if not isinstance(table, dict) or not all(isinstance(v, str) and Path(v).name == v for v in table.values()):
            raise FormatError(f"{index.name} has no sound weight_map", where=str(index), hint="fetch or save it again")
        paths = [self.folder / name for name in sorted(set(table.values()))]
        gone = [p.name for p in paths if not p.is_file()]
        if gone:
            raise FileError(f"{len(gone)} shard(s) are missing: {', '.join(gone[:4])}", where=str(self.folder), hint="fetch or save it again")
        return paths

    def _header(self, path: Path) -> dict[str, tuple[int, ...]]:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as f:
                return {name: tuple(f.get_slice(name).get_shape()) for name in f.keys()}  # noqa: SIM118  (no mapping)
        except (SafetensorError, OSError) as error:
            raise _damaged(path, error) from None


class Live:
    """The same for a model in memory."""

    def __init__(self, model: nn.Module) -> None:
        self.tensors: dict[str, Tensor] = {}
        for prefix, module in base_modules(model).items():
            for table in (module._parameters, module._buffers):
                for n, t in table.items():
                    if t is not None and n not in module._non_persistent_buffers_set:
                        self.tensors[f"{prefix}.{n}" if prefix else n] = t
        self.asked: set[str] = set()

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Return the shape of a parameter or buffer, None if there is none of this name."""
        t = self.tensor(name)
        return None if t is None else tuple(t.shape)

    def tensor(self, name: str) -> Tensor | None:
        """Return a parameter or buffer, None if there is none of this name."""
        if name not in self.tensors:
            return None
        self.asked.add(name)
        return self.tensors[name].detach()

    @property
    def left(self) -> list[str]:
        """Names that nobody has asked for."""
        return [name for name in self.tensors if name not in self.asked]


def _damaged(path: Path, error: Exception) -> FormatError:
    return FormatError(f"{path.name} is not a valid safetensors file: {error}", where=str(path), hint="fetch or save it again")
