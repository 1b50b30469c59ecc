"""What a layout is: the translation between an adapter's ops and the names, shapes and config fields of its two files."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from slimtune.core.errors import MismatchError
from slimtune.core.finite import is_finite
from slimtune.core.kind import Kind
from slimtune.core.op import Op
from slimtune.core.spec import Spec
from slimtune.core.state import Adapter
from slimtune.files.container import TensorFile

PREFIX = "base_model.model."  # the reference's wrappers: everything of the user's model stands below it
OUTSIDE = "base_model."  # what belongs to the method as a whole stands beside the user's model


@dataclass(frozen=True)
class Place:
    """Where one op of a file belongs, and what it is.

    Attributes:
        path: of the module.
        key: in the module's slot.
        port, param: of the site.
        method: registered name of the spec that builds the op.
        settings: `Op.settings()` at the time of saving.
        part: that spec's index in `Spec.parts`, None in files of others and for ops beside them.
        entrance: path of the module whose input the op reads, "" for that of its own.
    """

    path: str
    key: str
    port: str
    param: str
    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    part: int | None = None
    entrance: str = ""

    def __str__(self) -> str:
        return f"{self.path or '(the model)'}.{self.param}"


class Taker:
    """Hands out the tensors of a file by name and remembers which were asked for.

    Attributes:
        file: the file.
        missing: names that were asked for and are not there.
        left: names that nobody has asked for yet.
    """

    def __init__(self, file: TensorFile, names: dict[str, str]) -> None:
        self.file, self._names = file, names  # clean name -> name in the file
        self.left = dict.fromkeys(names)
        self.missing: list[str] = []
        self.notes: list[str] = []  # what a report says about how names and tables were read
        self._made: dict[str, Tensor] = {}  # put together from others of the file
        self.taken: dict[str, bool] = {}  # name -> whether all of it is finite

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def alias(self, name: str, as_in: str) -> None:
        """Let a tensor be known by another name (as well, where others still ask for it by the old one)."""
        self._names[name] = self._names[as_in]
        self.left.pop(as_in, None)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._made[name].shape) if name in self._made else self.file.entries[self._names[name]].shape

    def look(self, name: str) -> Tensor:
        """Return a tensor that is there, without taking it."""
        return self._made[name] if name in self._made else self.file.tensor(self._names[name])

    def add(self, name: str, tensor: Tensor) -> None:
        """Hand out a tensor that was put together from others as if it were in the file."""
        self._made[name], self._names[name] = tensor, name
        self.left[name] = None

    def take(self, name: str) -> Tensor | None:
        """Return a tensor, or note it as missing."""
        if name not in self._names:
            self.missing.append(name)
            return None
        self.left.pop(name, None)
        t = self.look(name)
        if not t.is_floating_point():
            raise MismatchError(f"{name} holds {str(t.dtype).removeprefix('torch.')}, not floats", where=str(self.file.path))
        self.taken[name] = is_finite(t)
        return t

    def not_finite(self) -> list[str]:
        """Return the tensors handed out that hold NaN or infinity."""
        return [name for name, finite in self.taken.items() if not finite]


class Codec:
    """Names the tensors of one kind of op in a file; the default serves every op: `<path>.<method>_<tensor>`."""

    def put(self, place: Place, op: Op, module: nn.Module, kind: Kind) -> dict[str, Tensor]:
        """Return name in the file -> tensor."""
        return {self.name(place, name): t for name, t in op.export(module).items()}

    def take(self, place: Place, op: Op, module: nn.Module, kind: Kind, file: Taker) -> dict[str, Tensor | None]:
        """Return name in the op -> tensor of the file (None = missing), shaped as the op wants it wherever that is possible."""
        return {name: file.take(self.name(place, name)) for name in op.expects(module)}

    def name(self, place: Place, tensor: str) -> str:
        key = "" if place.key in {"weight", "input", "output"} else f".{place.key}"
        return dotted(place.path, f"{place.method}_{tensor}{key}")


class Layout:
    """Base of every layout.

    Attributes:
        peft_type: its name in adapter_config.json.
        methods: the specs that may be written in it.
    """

    peft_type: ClassVar[str] = ""
    methods: ClassVar[tuple[str, ...]] = ()

    def problem(self, adapter: Adapter, model: nn.Module) -> str:
        """Return why this very adapter cannot be written in this layout, or ""."""
        return ""

    def config(self, adapter: Adapter, model: nn.Module) -> dict[str, Any]:
        """Return the content of adapter_config.json."""
        raise NotImplementedError

    def names(self, file: TensorFile) -> dict[str, str]:
        """Return names as the codecs know them -> names in the file."""
        return {name.removeprefix(PREFIX): name for name in file.entries}

    def stored(self, name: str) -> str:
        """Return the name in the file for a name that a codec gave: below the user's model, unless it says otherwise."""
        return name if name.startswith(OUTSIDE) else PREFIX + name

    def prepare(self, places: list[Place], model: nn.Module) -> None:
        """Look at all places before the first op is translated, where names depend on more than one of them."""

    def codec(self, method: str) -> Codec:
        """Return the codec for ops of a method."""
        return Codec()

    def discover(self, config: dict[str, Any], file: TensorFile, model: nn.Module, relax: frozenset[str]) -> tuple[Spec, list[Place], Taker]:
        """Read what a file without our metadata holds: the spec, the places of its ops, and its tensors by clean name.

        Raises:
            FormatError: it uses what slimtune cannot do, or names that make no sense.
            MismatchError: it does not fit the model.
        """
        raise NotImplementedError


def dotted(*parts: str) -> str:
    """Join the parts of a path that are not empty."""
    return ".".join(p for p in parts if p)
