"""Bank: the low-rank pairs of one site side by side in memory, so that a batch which mixes adapters finds each of them by a number.

Adapters enter at the first mixed batch that runs without gradients, all that are resident at the site, and leave when they are detached. Their
parameters are not copied into the bank: they live there. A parameter stays the same object with a storage of its own, which happens to lie
within the bank's memory, so whatever writes into it, an optimizer or `p.data.mul_()`, is seen without a check, and whatever saves, copies or
shares it sees one ordinary tensor. Whether a parameter still lies where it was put is asked at each forward, by its address: `p.data = ...`,
`setattr`, `model.to(...)` move it, and it enters again.

Only a parameter whose memory nobody else refers to may move, since an alias (a state dict kept by somebody, the flat buffer of a sharded
optimizer) would be cut off from it. Others are read where they are: `Place.room` is None. So is everything on devices other than CPUs, where
captured graphs hold addresses. The place of an adapter that left is given to another one when nothing refers to its memory any more.

Memory: that of the parameters, plus address space for those to come, which an operating system backs once it is written to.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.dlpack import from_dlpack, to_dlpack  # type: ignore[attr-defined]

from slimtune.core.op import Op, changes

if TYPE_CHECKING:
    from slimtune.core.host import Slot
    from slimtune.kernels.mixed import Mixture

_LOCK = threading.Lock()
_OFTEN = 100  # moves after which a pair stays where it is: somebody, such as a site that shares the parameter, wants it elsewhere


def _references(t: Tensor) -> int:
    return torch._C._storage_Use_Count(t.untyped_storage()._cdata)  # type: ignore[no-any-return]


_ALONE = _references(torch.empty(1))  # as torch counts it for a tensor that nothing else shares its memory with


class Room:
    """Pairs of equal shape: A [places, r, a] and B [places, b, r]."""

    def __init__(self, A: Tensor, B: Tensor, places: int) -> None:
        self.A = torch.empty(places, *A.shape, dtype=A.dtype)
        self.B = torch.empty(places, *B.shape, dtype=B.dtype)
        self.down, self.up = self.A.flatten(0, 1).t(), self.B.flatten(0, 1).t()  # [a, places r], [r, places b]: what the products read
        self.places, self.r, self.b = places, A.shape[0], B.shape[0]
        self.sampled = A.dtype in (torch.float32, torch.float64)  # torch's sampled product takes no others
        self._tenants: list[tuple[StorageWeakRef, StorageWeakRef]] = []

    def number(self) -> int | None:
        """Return the number of a place that nothing refers to, or None."""
        if len(self._tenants) < len(self.A):
            return len(self._tenants)
        return next((i for i, refs in enumerate(self._tenants) if all(ref.expired() for ref in refs)), None)

    def move(self, A: Tensor, B: Tensor, number: int) -> list[Tensor]:
        """Have two parameters live at a place; return what they lived in before."""
        before, refs = [A.data, B.data], []
        for p, room in ((A, self.A), (B, self.B)):
            room[number].copy_(p)
            p.data = from_dlpack(to_dlpack(room[number]))  # a storage of its own over the same memory
            refs.append(StorageWeakRef(p.untyped_storage()))
        self._tenants[number : number + 1] = [(refs[0], refs[1])]
        return before


@dataclass(slots=True)
class Place:
    """Where the pair of one op lies.

    Attributes:
        down, up: names of A and B among the op's parameters.
        at: their addresses when they entered.
        shape: of A.
        scale: s.
        room, number: where they live; None: read them where they are.
        moves: how often they have entered.
    """

    op: Op
    down: str
    up: str
    at: tuple[int, int]
    shape: torch.Size
    scale: float
    room: Room | None
    number: int
    moves: int

    def pair(self) -> tuple[Tensor, Tensor]:
        return self.op._parameters[self.down], self.op._parameters[self.up]  # type: ignore[return-value]


_Read: TypeAlias = "tuple[Op, str, str, nn.Parameter, nn.Parameter, float]"


class Bank:
    """The pairs of one site, by adapter."""

    def __init__(self, slot: Slot) -> None:
        self._slot = slot
        self._places: dict[str, Place] = {}
        self._rooms: dict[Any, Room] = {}
        self._sure: dict[str, tuple[dict[str, Any], str, str, int, int, int]] = {}  # of those whose ops have not changed since: what to compare
        self._seen = changes()
        self._old: tuple[int, list[Tensor]] = (0, [])

    def find(self, mixture: Mixture) -> Sequence[Place | None] | None:
        """Return the places of adapters (None: it has nothing at this site), or None if one of them is more than a low-rank pair."""
        if self._old[1] and self._old[0] == threading.get_ident():
            self._old = (0, [])
        if self._seen != changes():
            self._sure.clear()
            self._seen = changes()
        try:
            for held, down, up, a, b, size in mixture.pick(self._sure):  # for each adapter at each site of each forward
                A = held[down]
                if A.data_ptr() != a or held[up].data_ptr() != b or A.numel() != size:
                    return self._search(mixture.names)
            return mixture.pick(self._places)
        except (KeyError, AttributeError):  # not asked yet, gone, None
            return self._search(mixture.names)

    def _search(self, names: list[str]) -> list[Place | None] | None:
        found: list[Place | None] = []
        for name in names:
            place = self._enter(name) if name in self._slot._modules else None
            if place is None and name in self._slot._modules:
                return None
            found.append(place)
        return found

    def leave(self, name: str) -> None:
        """Forget an adapter."""
        self._places.pop(name, None)
        self._sure.pop(name, None)

    # ---- entering -----------------------------------------------------------------------------------------------
    def _enter(self, name: str) -> Place | None:
        """Return where the pair of an adapter lies, after it has moved in if it had to; None: its ops here are more than that."""
        with _LOCK, torch.inference_mode(False), torch.no_grad():  # what is made here outlives an inference mode
            now = changes()
            read = self._read(name)
            if read is None:
                self.leave(name)
                return None
            op, down, up, A, B, scale = read
            old = self._places.get(name)
            mine = old is not None and old.op is op and (old.down, old.up) == (down, up)
            if old is not None and mine and self._lies(name) and (old.room is not None or not (_movable(A) and _movable(B))):
                old.scale = scale
            elif old is not None and mine and old.moves >= _OFTEN:
                self._note(name, read, None, 0, _OFTEN)
            else:
                room, number = self._house(A, B)
                self._note(name, read, room, number, old.moves + 1 if old is not None and mine else 1)
            place = self._places[name]
            if now == changes() and (place.room is not None or A.device.type != "cpu"):  # others are asked again: their memory may be free to move
                self._sure[name] = (op._parameters, down, up, *place.at, A.numel())
            return place

    def _note(self, name: str, read: _Read, room: Room | None, number: int, moves: int = 1) -> None:
        op, down, up, A, B, scale = read
        self._places[name] = Place(op, down, up, (A.data_ptr(), B.data_ptr()), A.shape, scale, room, number, moves)

    def _lies(self, name: str) -> bool:
        place = self._places[name]
        A, B = place.pair()
        return (A.data_ptr(), B.data_ptr()) == place.at and A.shape == place.shape

    def _read(self, name: str) -> _Read | None:
        """Return the pair of an adapter whose only op here is exactly that now, made of two parameters."""
        ops = self._slot.ops(name)
        if len(ops) != 1 or not hasattr(type(ops[0]), "low_rank"):
            return None
        op: Any = ops[0]
        pair = op.low_rank()
        if pair is None or pair[3]:
            return None
        names = [next((n for n, p in op._parameters.items() if p is t), None) for t in pair[:2]]
        return None if None in names else (op, *names, *pair[:3])

    def _house(self, A: nn.Parameter, B: nn.Parameter) -> tuple[Room | None, int]:
        """Find a place for a pair, in a larger room for all if need be, and move it there if that disturbs nobody."""
        if not (_movable(A) and _movable(B) and A.dtype == B.dtype):
            return None, 0
        key = (A.shape, B.shape, A.dtype)
        room = self._rooms.get(key)
        number = None if room is None else room.number()
        if room is None or number is None:
            return self._build(key, A, B)
        self._keep(room.move(A, B, number))
        return room, number

    def _build(self, key: Any, A: nn.Parameter, B: nn.Parameter) -> tuple[Room, int]:
        """Build a room for every pair of this shape at the site and half as many more."""
        everyone = [(name, read) for name in list(self._slot._modules) if (read := self._read(name)) is not None and read[3] is not A]
        alike = [(name, read) for name, read in everyone if (read[3].shape, read[4].shape, read[3].dtype, read[4].dtype) == (*key, key[2])]
        room = Room(A, B, max(8, (len(alike) + 1) * 3 // 2))
        self._keep(room.move(A, B, 0))
        for name, read in alike:
            if _movable(read[3]) and _movable(read[4]):
                number = room.number()
                assert number is not None, "it was built for all of them"
                self._keep(room.move(read[3], read[4], number))
                self._note(name, read, room, number)
        self._rooms[key] = room
        return room, 0

    def _keep(self, old: list[Tensor]) -> None:
        """Keep memory that another thread may be reading just now, until this thread comes by again: one forward later."""
        if threading.active_count() > 1:
            self._old = (threading.get_ident(), [*self._old[1], *old])


def _movable(p: nn.Parameter) -> bool:
    """Tell whether a parameter is an ordinary tensor in memory that nothing else refers to."""
    if type(p) is not nn.Parameter or type(p.data) is not Tensor or p.device.type != "cpu" or p.layout != torch.strided:
        return False
    if p.is_inference() or not p.is_contiguous() or p.is_shared() or not p.dtype.is_floating_point or not p.numel():
        return False
    return p.untyped_storage().nbytes() == p.numel() * p.element_size() and _references(p) <= _ALONE
