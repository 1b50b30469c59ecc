"""Putting finished ops into a model, and taking them out: all of them or none, the same way for `attach` and `load`.

The first adapter of a model also makes what the model needs once: its state, the root mixin, the check of rows against the batch,
and the switches of fast paths that would bypass ops. Costs what the new adapter costs: nothing here walks over other adapters.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.spectral_norm import SpectralNorm

from slimtune.core.carried import SavesBase
from slimtune.core.changed import Fuses, Resizes
from slimtune.core.elsewhere import blocked
from slimtune.core.errors import InvalidName, MergeError, NameInUse, SiteError
from slimtune.core.host import Slot, host, unhost
from slimtune.core.kind import Kind
from slimtune.core.mixing import generalise, specialise
from slimtune.core.op import Op
from slimtune.core.plan import Plan
from slimtune.core.reach import after_forward
from slimtune.core.site import Site
from slimtune.core.spec import Spec
from slimtune.core.state import Adapter, State
from slimtune.core.stepping import arm, unwatch, watch
from slimtune.core.still import keep_still, let_go
from slimtune.core.targets import kind_of
from slimtune.integrations.watch import watch_trainers

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_\-]*")


def check_name(name: str) -> None:
    """Raise unless `name` can name an adapter (it becomes part of module and file names).

    Raises:
        InvalidName: it is empty, too long, or holds other signs than letters, digits, "_" and "-".
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name) or len(name) > 100:
        plain = "".join(sign for sign in unicodedata.normalize("NFKD", str(name or "")) if not unicodedata.combining(sign))
        like = re.sub(r"[^A-Za-z0-9_-]+", "-", plain).strip("-")[:100] or "default"
        raise InvalidName(
            f"{name!r:.200} cannot name an adapter",
            where="it becomes part of the names of modules and files: letters, digits, _ and -, at most 100 of them",
            hint=f"name={like!r}",
        )


def check_free(model: nn.Module, name: str) -> None:
    """Raise unless an adapter of this name can be put onto the model now.

    Raises:
        InvalidName, NameInUse, MergeError, SiteError: it cannot.
    """
    check_name(name)
    for path, module in base_modules(model).items():
        if type(module).__module__.startswith("peft."):
            raise SiteError(
                "this model carries adapters of peft, whose own matrices would be adapted",
                where=f"{path or 'the model'} ({type(module).__name__})",
                hint="save them and st.load(base, folder) onto the plain base, or model.merge_and_unload() first",
            )
        if any(isinstance(p, UninitializedParameter) for p in module._parameters.values()):
            raise SiteError(
                "the weights of this lazy module do not exist yet, so they can be neither adapted nor frozen",
                where=f"{path} ({type(module).__name__})",
                hint="call the model once before, on any batch",
            )
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, SpectralNorm):  # until the first forward its weight is the one without the norm
                setattr(module, hook.name, hook.compute_weight(module, do_power_iteration=False))
    state = model.__dict__.get("slim_state")
    if state is None:
        inside = next((p for p, m in model.named_modules() if p and "slim_state" in m.__dict__), None)
        if inside is not None:
            raise SiteError(f"a part of this model carries adapters already: {inside}", hint="attach to the same object every time")
    elif name in state.adapters:
        raise NameInUse(f"an adapter is called {name!r} already", hint=f"choose another name, or st.detach(model, {name!r}) first")
    elif state.merged:
        raise MergeError("an adapter is merged into the weights now", hint="st.unmerge(model) first")


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return path -> module of the base, without looking at any adapter."""
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()

    def walk(path: str, module: nn.Module) -> None:
        if id(module) in seen:
            return
        seen.add(id(module))
        found[path] = module
        for name, child in module._modules.items():
            if child is not None and name != "slim":
                walk(f"{path}.{name}" if path else name, child)

    walk("", model)
    return found


def kind_at(module: nn.Module) -> Kind:
    """Return the kind of a module, without a search where it is hosted already."""
    slot = module._modules.get("slim")
    if isinstance(slot, Slot):
        return slot.kind
    kind = kind_of(module)
    assert kind is not None, "BlockKind fits every module"
    return kind


def install(model: nn.Module, name: str, spec: Spec, made: list[tuple[Site, str, Op]], *, trainable: bool = True) -> Adapter:
    """Put finished ops into the model as a new adapter, idle and frozen.

    Args:
        made: (site, key in the slot or "" for the usual one, op).
        trainable: whether `use` may switch its gradients on later.
    """
    state: State | None = model.__dict__.get("slim_state")
    first = state is None
    for site, _, _ in made:
        _check_module(model, state, site)
    adapter = Adapter(name, spec, trainable=trainable)
    try:
        if state is None:
            state = _root(model)
        for site, wanted, op in made:
            key = wanted or (site.param if site.port == "weight" else site.port)
            while (site.path, key) in adapter.ops:
                key += "+"
            op.train(site.module.training)
            slot = host(site.module, state, site.kind, site.path)
            slot.put(name, key, op)
            if op.entrance:
                slot.tap(model, op.entrance)
            site.kind.connect(model, site.module, site.path)
            adapter.ops[(site.path, key)] = op
    except BaseException:
        _remove(model, name, (site.module for site, _, _ in made))
        if first:
            _unroot(model)
        raise
    if first or any(isinstance(m, (nn.TransformerEncoderLayer, nn.TransformerEncoder)) for m in base_modules(model).values()):
        _switch_fast_paths(model, state)
    state.unreached |= {path for path, _ in adapter.ops}
    watch(adapter)
    arm(adapter)
    adapter.set_live(False)
    state.adapters[name] = adapter
    return adapter


def _check_module(model: nn.Module, state: State | None, site: Site) -> None:
    """Raise if ops of another model sit on a module, or if it is offloaded in a way that would lose its own."""
    slot = site.module._modules.get("slim")
    if isinstance(slot, Slot) and slot.state is not state:
        raise SiteError(
            "this module carries adapters of another model, which it is a part of as well",
            where=str(site),
            hint="attach to what both share, as a model of its own, or give this model a copy of it: copy.deepcopy",
        )
    if block := blocked(model, site.path):
        raise SiteError(
            f"accelerate brings in the weights of this {block} as a whole, by names, which leaves no room for those of an adapter",
            where=str(site),
            hint="attach first and offload then, or leave preload_module_classes out",
        )


def uninstall(model: nn.Module, state: State, adapter: Adapter) -> None:
    """Take an adapter out; with the last one gone the model has its very first classes again."""
    unwatch(adapter)
    _remove(model, adapter.name, [model.get_submodule(path) for path in dict.fromkeys(path for path, _ in adapter.ops)])
    _switch_fast_paths(model, state)
    del state.adapters[adapter.name]
    if adapter.name in state.default.names:
        state.settle(Plan.of(None))
    if not state.adapters:
        _unroot(model)


def put_to_use(model: nn.Module, adapter: Adapter) -> None:
    """Make an adapter the one in use and the only thing that trains."""
    state: State = model.__dict__["slim_state"]
    for module in base_modules(model).values():
        for p in module._parameters.values():
            if p is not None:
                p.requires_grad_(False)
    for other in state.adapters.values():
        other.set_live(other is adapter and adapter.trainable)
    state.settle(Plan.of(adapter.name))


def _root(model: nn.Module) -> State:
    from slimtune.ports.root import root

    state = State()
    state.writes_over = any(m.__dict__.get("inplace") is True for m in model.modules())
    model.slim_state = state  # type: ignore[assignment]
    root(model, state)
    model.register_forward_hook(after_forward)
    modules = base_modules(model)
    for module in modules.values():
        specialise(module, SavesBase)
        specialise(module, Resizes)
        specialise(module, Fuses)
    keep_still(modules)
    watch_trainers()
    return state


def _unroot(model: nn.Module) -> None:
    from slimtune.ports.quantised import exact_packing
    from slimtune.ports.root import unroot

    exact_packing(model, False)
    unroot(model)
    for key in [k for k, hook in model._forward_hooks.items() if hook is after_forward]:
        del model._forward_hooks[key]
    modules = base_modules(model)
    let_go(modules, model.training)
    for module in modules.values():
        generalise(module, SavesBase)
        generalise(module, Resizes)
        generalise(module, Fuses)
    model.__dict__.pop("slim_state", None)


def _remove(model: nn.Module, name: str, modules: Iterable[nn.Module]) -> None:
    for module in modules:
        slot = module._modules.get("slim")
        if isinstance(slot, Slot):
            slot.drop(name)
            slot.untap(model)
            unhost(module)


def _switch_fast_paths(model: nn.Module, state: State) -> None:
    from slimtune.ports.attention import switch_fast_path
    from slimtune.ports.quantised import exact_packing

    switch_fast_path(model, state)
    exact_packing(model, True)
