"""What a model carries, to look at: `st.adapters(model)`, a live mapping name -> view. Nothing here changes the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType

from torch import nn

from slimtune.core.op import Op
from slimtune.core.spec import Spec
from slimtune.core.state import Adapter, State, state_of, unwrap


class AdapterView:
    """One adapter of a model, as it is at the moment.

    Example:
        >>> import slimtune as st, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> report = st.attach(model, st.LoRA(r=2), name="a")
        >>> view = st.adapters(model)["a"]
        >>> view.modules, view.count, view.active, view.trainable
        (('0',), 32, True, True)
    """

    def __init__(self, state: State, adapter: Adapter) -> None:
        self._state, self._adapter = state, adapter

    @property
    def name(self) -> str:
        """Its name on this model."""
        return self._adapter.name

    @property
    def spec(self) -> Spec:
        """The recipe it was built from, with what "auto" meant on this model."""
        return self._adapter.spec

    @property
    def modules(self) -> tuple[str, ...]:
        """The paths of the modules that it acts on, in the order of the model."""
        return tuple(dict.fromkeys(path for path, _ in self._adapter.ops))

    @property
    def ops(self) -> Mapping[tuple[str, str], Op]:
        """(module path, key) -> op; the key is a weight's name or a port, with a "+" for each further op there."""
        return MappingProxyType(self._adapter.ops)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield its parameters, each once, whether they train or not."""
        for _, p in self.named_parameters():
            yield p

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield (module path, key and name, joined by dots; parameter), each parameter once."""
        seen: set[int] = set()
        for (path, key), op in self._adapter.ops.items():
            for name, p in op.named_parameters():
                if id(p) not in seen:
                    seen.add(id(p))
                    yield ".".join(part for part in (path, key, name) if part), p

    @property
    def count(self) -> int:
        """The number of its parameters."""
        return sum(p.numel() for p in self.parameters())

    @property
    def trainable_count(self) -> int:
        """The number of its parameters that train now."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    @property
    def bytes(self) -> int:
        """The size of its tensors, buffers included."""
        own = {id(t): t for op in self._adapter.ops.values() for t in (*op.parameters(), *op.buffers())}
        return sum(t.numel() * t.element_size() for t in own.values())

    @property
    def active(self) -> bool:
        """Whether it acts on some row, here and now: by `use`, by the `with` block this is asked in, or merged."""
        return self.merged or self.name in self._state.current().names

    @property
    def merged(self) -> bool:
        """Whether it is in the weights now."""
        plan = self._state.merged_plan
        return bool(self._state.merged) and plan is not None and self.name in plan.names

    @property
    def trainable(self) -> bool:
        """Whether any of its parameters trains now."""
        return any(p.requires_grad for p in self.parameters())

    def __repr__(self) -> str:
        what = [w for w in ("active", "trainable", "merged") if getattr(self, w)]
        return f"<adapter {self.name!r}: {self.spec}, {self.count:,} parameters in {len(self.modules)} modules{''.join(f', {w}' for w in what)}>"


class Adapters(Mapping[str, AdapterView]):
    """The adapters of a model by name; it follows what is attached and detached later."""

    def __init__(self, model: nn.Module) -> None:
        self._model = unwrap(model)

    def _state(self) -> State | None:
        return self._model.__dict__.get("slim_state")

    def __getitem__(self, name: str) -> AdapterView:
        state = state_of(self._model)
        return AdapterView(state, state.adapter(name))

    def __contains__(self, name: object) -> bool:
        state = self._state()
        return state is not None and name in state.adapters

    def __iter__(self) -> Iterator[str]:
        state = self._state()
        return iter(list(state.adapters) if state is not None else ())

    def __len__(self) -> int:
        state = self._state()
        return len(state.adapters) if state is not None else 0

    def __repr__(self) -> str:
        return "{" + ", ".join(f"{name!r}: {view!r}" for name, view in self.items()) + "}"


def adapters(model: nn.Module) -> Adapters:
    """Return what a model carries: a live, read-only mapping from the name of each adapter to a view of it.

    Args:
        model: any model; one without adapters gives an empty mapping.

    Raises:
        NoSuchAdapter: on `st.adapters(model)[name]`, with the names there are.

    Example:
        >>> import slimtune as st, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> report = st.attach(model, st.LoRA(r=2), name="a")
        >>> [(name, view.count, view.bytes) for name, view in st.adapters(model).items()]
        [('a', 32, 128)]
    """
    return Adapters(model)
