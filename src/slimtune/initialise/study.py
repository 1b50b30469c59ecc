"""Looking at a few batches of the user's data, for the initialisers that start from them.

The model runs as it is, in eval mode and without any adapter; hooks on the sites see inputs and, with `backward`, the gradients of
outputs. Afterwards, and after an error too, everything is as before: hooks, training modes, gradients and what asks for them, the random state.
"""

from __future__ import annotations

import itertools
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from slimtune.core.errors import DataError, SlimtuneError
from slimtune.core.fold import first_tensor, replace_first
from slimtune.core.kind import split_input
from slimtune.core.site import Site
from slimtune.initialise.free import initialiser

if TYPE_CHECKING:
    from slimtune.methods.lora import LoRAOp

Found: TypeAlias = "dict[tuple[str, str], tuple[Tensor, Tensor | None]]"  # (path, param) -> (A, B or None for zero)
Study: TypeAlias = "Callable[[nn.Module, list[Site], Iterable[Any], Any], Found]"
See: TypeAlias = "Callable[[int, Tensor, Tensor | None], None]"  # (number of the site, its input, gradient of its output)
STUDIES: dict[str, Study] = {}


def study(name: str, check: Callable[[Site, Any], list[str]] | None = None) -> Callable[[Study], Study]:
    """Register what `LoRA(init=name)` finds out from data before the ops are built.

    Args:
        name: of the initialiser.
        check: (site, spec) -> what else stops it from working at a site; all of them work on linear layers only.
    """

    def problems(site: Site, spec: Any) -> list[str]:
        if site.kind.name != "linear":
            return [f"init={name!r} looks at the inputs of linear layers, which {site.kind.noun} is not: use another init, or exclude="]
        return check(site, spec) if check is not None else []

    def start(op: LoRAOp, site: Site, spec: Any) -> None:
        A, B = site.shared["study"][site.path, site.param]
        op.start_from(A, torch.zeros_like(op.B) if B is None else B, frozen=B is not None)

    def wrap(fn: Study) -> Study:
        STUDIES[name] = fn
        initialiser(name, check=problems)(start)
        return fn

    return wrap


def look(model: nn.Module, sites: list[Site], data: Iterable[Any], spec: Any, see: See, *, labels: bool = False, backward: bool = False) -> None:
    """Run the batches and show `see` every input [n, a] of every site, padding left out, as float32.

    Args:
        data: batches: mappings (called with keywords), tuples or lists (with positions), or tensors. At most `spec.init_batches` are taken.
        labels: leave out the tokens without a label as well.
        backward: show inputs with the gradient [n, b] of the output, padding included (its gradient is what the loss makes it).

    Raises:
        DataError: there are no batches, the model does not take them, they reach no site, or they give no loss to go backward from.
    """
    batches = list(itertools.islice(iter(data), spec.init_batches))
    if not batches:
        raise DataError(f"init={spec.init!r} was given no batches", hint="st.attach(model, spec, data=[batch, ...])")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    seen: set[int] = set()
    masks = Masks(model)
    same: tuple[Any, int, Tensor] | None = None  # the last input, its version and its rows: q, k and v read one tensor and see one object

    def noted(i: int, x: Tensor, g: Tensor | None) -> None:
        nonlocal same
        seen.add(i)
        if same is None or same[0]() is not x or same[1] != x._version:
            same = (weakref.ref(x), x._version, _rows(x, None if backward else masks.of(sites[i].module, x)))
        see(i, same[2], None if g is None else g.reshape(-1, g.shape[-1]).float())

    with _as_it_was(model), ExitStack() as hooks:
        masks.watch(hooks)
        for i, site in enumerate(sites):
            hook = _backward_hook(i, noted) if backward else _forward_hook(i, noted)
            handle = site.module.register_forward_hook(hook, with_kwargs=True)
            hooks.callback(handle.remove)
        for batch in bar(batches, f"init {spec.init}", "batch"):
            batch = _moved(batch, device)
            masks.read(batch, labels)
            with torch.set_grad_enabled(backward):
                out = _call(model, batch)
                if backward:
                    torch.autograd.backward(_loss(out, spec))
    missed = [str(s) for i, s in enumerate(sites) if i not in seen]
    if missed:
        raise DataError(
            f"these batches reach {len(sites) - len(missed)} of {len(sites)} modules; init={spec.init!r} can say nothing of the others",
            where=missed[0],
            hint="give batches that use the whole model, or leave these modules out with exclude=",
        )


# ---- hooks ------------------------------------------------------------------------------------------------------------
def _forward_hook(i: int, noted: See) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        noted(i, split_input(args, kwargs)[0], None)

    return hook


def _backward_hook(i: int, noted: See) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        x = split_input(args, kwargs)[0]
        y = first_tensor(out)
        if not y.requires_grad:  # everything is frozen, so the way backward begins at the first site
            y = y.detach().requires_grad_()
        y.register_hook(lambda g: noted(i, x, g))  # type: ignore[no-untyped-call]
        return replace_first(out, y)

    return hook


# ---- batches ----------------------------------------------------------------------------------------------------------
def _moved(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {k: _moved(v, device) for k, v in batch.items()}
    if isinstance(batch, (tuple, list)):
        return type(batch)(_moved(v, device) for v in batch) if not hasattr(batch, "_fields") else tuple(_moved(v, device) for v in batch)
    return batch


def _call(model: nn.Module, batch: Any) -> Any:
    try:
        if isinstance(batch, dict):
            return model(**batch)
        return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)
    except SlimtuneError:
        raise
    except (TypeError, ValueError, LookupError, RuntimeError) as error:
        how = f"mapping with {', '.join(map(str, batch))}" if isinstance(batch, dict) else type(batch).__name__
        raise DataError(
            f"the model does not take this batch: {error}",
            where=f"a {how}",
            hint="data= takes batches as the model takes them: mappings (keywords), tuples (positions) or tensors",
        ) from error


def _loss(out: Any, spec: Any) -> Tensor:
    loss = out.get("loss") if isinstance(out, Mapping) else out
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        raise DataError(
            f"init={spec.init!r} goes backward from a loss, and the model gave none for this batch",
            hint="put labels= into the batches, or wrap the model so that it returns its loss",
        )
    if not loss.requires_grad:
        raise DataError("the loss of this batch does not depend on any of the modules", hint="name other modules with targets=")
    return loss


class Masks:
    """Which tokens of the current batch count: one mask [rows, tokens] or, in an encoder-decoder, one for each side."""

    def __init__(self, model: nn.Module) -> None:
        config: Any = model.__dict__.get("config")
        self.encoder: Any = model.get_encoder() if getattr(config, "is_encoder_decoder", False) else None  # type: ignore[operator]
        self.within = set() if self.encoder is None else set(self.encoder.modules())
        self.states: Tensor | None = None  # what the encoder has made of this batch: cross-attention reads it
        self.main: Tensor | None = None
        self.target: Tensor | None = None

    def watch(self, hooks: ExitStack) -> None:
        """See what the encoder makes, for as long as `hooks` is open."""

        def made(module: nn.Module, args: Any, out: Any) -> None:
            self.states = first_tensor(out)

        if self.encoder is not None:
            hooks.callback(self.encoder.register_forward_hook(made).remove)

    def read(self, batch: Any, labels: bool) -> None:
        """Take the masks of a batch; with `labels`, tokens without a label do not count."""
        self.main = self.target = self.states = None
        if not isinstance(batch, dict):
            return
        mask, target, ids = (batch.get(k) for k in ("attention_mask", "labels", "input_ids"))
        self.main = mask.bool() if mask is not None and mask.dim() == 2 else None
        if self.encoder is not None:
            own = batch.get("decoder_attention_mask")
            if own is not None and own.dim() == 2:
                self.target = own.bool()
            if target is not None and target.dim() == 2 and (self.target is None or labels):
                supervised = target != -100  # padding has no label, and in an encoder-decoder everything else has one
                self.target = supervised if self.target is None else self.target & supervised
        elif labels and target is not None and ids is not None and target.shape == ids.shape:
            self.main = target != -100 if self.main is None else self.main & (target != -100)

    def of(self, module: nn.Module, x: Tensor) -> Tensor | None:
        """Return the mask of a module's input x, None for all."""
        if self.encoder is None or module in self.within or (self.states is not None and x.data_ptr() == self.states.data_ptr()):
            return self.main
        return self.target


def _rows(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return the inputs that count as rows [n, a] in float32."""
    x = x.detach()
    flat = x.reshape(-1, x.shape[-1])
    if mask is not None and flat.shape[0] == mask.numel() and x.shape[:-1] in (mask.shape, (mask.numel(),)):
        flat = flat[mask.reshape(-1)]
    return flat.float()


# ---- leaving things as they were ----------------------------------------------------------------------------------------
@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Run the block in eval mode, with everything frozen and no adapter acting."""
    from slimtune.core.attach import disabled

    modes = {m: m.training for m in model.modules()}
    asked = [p for p in model.parameters() if p.requires_grad]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), ExitStack() as bare:
        if "slim_state" in model.__dict__:
            bare.enter_context(disabled(model))
        try:
            model.eval()
            for p in asked:
                p.requires_grad_(False)
            yield
        finally:
            for m, mode in modes.items():
                m.training = mode
            for p in asked:
                p.requires_grad_(True)


def bar(items: list[Any], title: str, noun: str) -> Iterator[Any]:
    """Yield the items with a progress bar on standard error, where that is a terminal; `noun` is what one of them is."""
    shown = sys.stderr.isatty()
    try:
        for i, item in enumerate(items):
            if shown:
                done = "#" * (30 * i // len(items))
                sys.stderr.write(f"\r{title} [{done:<30}] {noun} {i + 1} of {len(items)}")
                sys.stderr.flush()
            yield item
    finally:
        if shown:
            sys.stderr.write("\r\033[K")


def directions(site: Site, spec: Any, times: int = 1) -> list[str]:
    """Return a problem if a site's weight has fewer than `times` r directions."""
    r = times * spec.rank(site)
    if r > min(site.a, site.b):
        return [f"init={spec.init!r} takes {r} directions of a weight of {site.b}x{site.a}: lower r or use rank_pattern="]
    return []


__all__ = ["STUDIES", "Found", "bar", "directions", "look", "study"]
