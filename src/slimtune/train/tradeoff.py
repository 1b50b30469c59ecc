"""What the `memory:` line of a recipe costs and saves: one step of the same model with two and with four blocks, and a line through both.

Blocks are alike, so bytes grow by the same amount with each: the figure for the whole model is exact but for what is not a block. Weights are
random; bytes and operations do not depend on them. A model whose block is too large to try out in a moment is left alone.
"""

from __future__ import annotations

import copy
import gc
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from slimtune.core.mixing import base_class
from slimtune.core.targets import layer_of
from slimtune.train.checkpoint_blocks import EVERY, checkpoint_blocks
from slimtune.train.counts import remember
from slimtune.train.precision import pick_dtype

if TYPE_CHECKING:
    from slimtune.core.report import Report
    from slimtune.core.spec import Spec
    from slimtune.train.prepare import Prepared
    from slimtune.train.recipe import Recipe

MOST = 30_000_000  # parameters of a block
FEW, MORE = 2, 4
Figures = dict[str, tuple[list[float], list[float], list[float]]]  # mode -> bytes kept, peak bytes and operations, each at FEW and MORE blocks


@dataclass(frozen=True)
class Cost:
    """One step of the whole model in one mode: bytes kept for backward, peak bytes over the weights, and multiplications over those of `fast`."""

    kept: float
    peak: float
    work: float


class Operations(TorchDispatchMode):
    """Counts the floating-point operations of matrix products (torch's own counter cannot look into hand-written backward functions)."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


def measure(prepared: Prepared, recipe: Recipe, spec: Spec | None, report: Report | None) -> dict[str, Cost] | str:
    """Return mode -> cost of the recipe's largest step, or why it is not measured.

    Args:
        prepared: the model on the meta device, and the data.
        recipe: the recipe.
        spec, report: of the adapter; None when every weight trains.
    """
    config: Any = prepared.model.config
    blocks = getattr(config, "num_hidden_layers", None)
    if spec is None or report is None or not isinstance(blocks, int) or getattr(config, "is_encoder_decoder", False) or blocks < MORE:
        return "it is measured for adapters on one stack of blocks only"
    if recipe.quantize != "none":
        return "it is not measured for quantised models"
    inside: dict[str, int] = {}
    for path, p in prepared.model.named_parameters():
        at = layer_of(path)
        if at is not None and ".slim." not in path:
            inside[at[0]] = inside.get(at[0], 0) + p.numel()
    if max(inside.values(), default=0) / blocks > MOST:
        return f"a block of this model has more than {MOST:,} parameters, too many to try out in a moment"
    touched = [at[1] for row in report.rows if (at := layer_of(row.path)) is not None]
    deep = blocks - min(touched, default=0)  # blocks that the backward pass goes through
    batch = _largest(prepared, recipe)
    cls = base_class(prepared.model)

    def count() -> Figures:
        counted: Figures = {mode: ([], [], []) for mode in EVERY}
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the products are small: a second thread would mostly wait, at full load
        gc.collect()
        gc.freeze()  # what is there already need not be looked through before each step
        try:
            for depth in (FEW, MORE):
                model = _cut(cls, config, spec, depth)
                for mode, every in EVERY.items():
                    for series, value in zip(counted[mode], _step(model, batch, every), strict=True):
                        series.append(value)
        finally:
            gc.unfreeze()
            torch.set_num_threads(threads)
        return counted

    grown = {m: [_line(s, deep) for s in series] for m, series in remember(_key(cls, config, spec, batch), count).items()}
    return {m: Cost(k, p, w / grown["fast"][2]) for m, (k, p, w) in grown.items()}


def _key(cls: type, config: Any, spec: Spec, batch: dict[str, torch.Tensor]) -> list[Any]:
    """Return all that the counts depend on: the model's shape, the method, the batch's shape and which of its labels count."""
    shapes = {name: list(t.shape) for name, t in batch.items()}
    labels = batch["labels"].ne(-100).int().tolist() if "labels" in batch else []
    return [cls.__qualname__, config.to_dict(), _everywhere(spec).to_dict(), shapes, labels, str(pick_dtype("auto")), [FEW, MORE]]


def _line(values: list[float], x: int) -> float:
    return values[0] + (values[1] - values[0]) / (MORE - FEW) * (x - FEW)


def _largest(prepared: Prepared, recipe: Recipe) -> dict[str, torch.Tensor]:
    from slimtune.train.collate import Collator

    rows = prepared.data.train
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"]))[: recipe.batch_size]
    return Collator(prepared.tokenizer.pad_token_id)([rows[i] for i in order])


def _cut(cls: Any, config: Any, spec: Spec, depth: int) -> Any:
    import slimtune as st

    small = copy.deepcopy(config)
    small.num_hidden_layers = depth
    if isinstance(getattr(small, "layer_types", None), list):
        small.layer_types = small.layer_types[:depth]
    with torch.random.fork_rng(devices=[]):
        model = cls._from_config(small, dtype=pick_dtype("auto"))
        st.attach(model, _everywhere(spec), name="probe")
    st.lean(model)
    return model.train()


def _everywhere(spec: Spec) -> Spec:
    """Return a spec without its choice of layers, and those of its members."""
    from slimtune.methods.union import Union

    spec = replace(spec, layers=None)
    return replace(spec, of=tuple(_everywhere(s) for s in spec.of)) if isinstance(spec, Union) else spec


def _step(model: Any, batch: dict[str, torch.Tensor], every: int) -> tuple[float, float, float]:
    from slimtune.testing.live_bytes import LiveBytes

    checkpoint_blocks(model, every)
    extra = {} if model.config.__dict__.get("use_cache") is None else {"use_cache": False}
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.zeros_like(p)  # gradients exist before bytes are counted
    gc.collect()
    with LiveBytes() as live, Operations() as counter:
        loss = model(**batch, **extra).loss
        kept = live.now
        loss.backward()
    return float(kept), float(live.peak), float(counter.total)


def lines(found: dict[str, Cost] | str, chosen: str) -> list[str]:
    """Return the figures as lines of text, the recipe's own mode marked."""
    from slimtune.train.report import size

    if isinstance(found, str):
        return [f"memory: {chosen}; {found}"]
    out = [
        f"memory: {mode:<8} {size(int(c.kept)):>9} kept for backward, {size(int(c.peak)):>9} at most, work x {c.work:.2f}"
        + "   <- this recipe" * (mode == chosen)
        for mode, c in found.items()
    ]
    return [*out, f"        (a step with the longest rows, counted on {FEW} and {MORE} blocks)"]
