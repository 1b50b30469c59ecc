"""The head of a model that classifies: new with nearly every task, so an adapter trains it in full beside itself unless it is told not to.

One rule for library, recipes and files: `train_modules="auto"`, the default of every spec, means the modules that stand beside the body of a
transformers model whose class classifies or answers from a text. Never a table of tokens, what is tied to one, or an output embedding.
transformers tells only while it loads whether a head came with the checkpoint; a head that did is trained on from where it is.
"""

from __future__ import annotations

import re
from collections import Counter

from torch import nn

from slimtune.core.fresh import fresh_modules
from slimtune.core.mixing import base_class
from slimtune.core.spec import Spec
from slimtune.core.state import Adapter

_CLASS = re.compile(r"For((Sequence|Token|Image|Audio|AudioFrame|Video)Classification|QuestionAnswering|MultipleChoice)")


def task_heads(model: nn.Module) -> tuple[str, ...]:
    """Return the paths of the modules that make up a classifier's head, () for any other model."""
    from slimtune.core.placing import base_modules, kind_at
    from slimtune.core.targets import candidates, heads

    modules = base_modules(model)
    found: dict[str, None] = {}
    for path, part in modules.items():
        if not any(_CLASS.search(cls.__name__) for cls in base_class(part).__mro__):
            continue
        get = getattr(part, "get_output_embeddings", None)
        words = get() if callable(get) else None
        beside, inner = heads(part), candidates(part)
        for name in (name for name in inner if name in beside):
            module = inner[name]
            kind = kind_at(module)
            if module is not words and "weight" in kind.ports and kind.names(module) and not kind.problem(module):
                found[f"{path}.{name}" if path else name] = None
    shared = Counter(id(p) for module in modules.values() for p in module._parameters.values() if p is not None)
    return tuple(p for p in found if all(shared[id(t)] < 2 for t in modules[p]._parameters.values() if t is not None))


def settled(spec: Spec, model: nn.Module) -> Spec:
    """Return a spec with a model's head in place of "auto", and with it whatever else the model's checkpoint lacked; a head that the spec adapts
    itself is not trained a second time."""
    heads = tuple(dict.fromkeys((*task_heads(model), *sorted(fresh_modules(model)))))
    if heads:
        adapted = {site.path for part in spec.parts() for site in part.sites(model)}
        heads = tuple(path for path in heads if path not in adapted)
    return spec.with_heads(heads) if heads else spec


def said(model: nn.Module, adapter: Adapter) -> list[str]:
    """Return what a report says about the head of a model that classifies: it trains, it came with the adapter, or it stays as it is."""
    left, full, live = [], 0, False
    held, lost = [], []
    new = fresh_modules(model)
    for path in dict.fromkeys((*task_heads(model), *sorted(new))):
        ops = [op for (p, _), op in adapter.ops.items() if p == path]
        if not any(op.method == "dense" for op in ops) and path in new:
            lost.append(f"`{path}`")
        elif not ops:
            left.append(f"`{path}`")
        elif all(op.method == "dense" for op in ops):
            held.append(f"`{path}`" + (" (new: not in the checkpoint)" if path in new else ""))
            full += sum(p.numel() for op in ops for p in op.parameters())
            live = live or any(p.requires_grad for op in ops for p in op.parameters())
    notes = []
    if held:
        one = len(held) == 1
        does = ("trains" if one else "train") if live else ("belongs to the adapter" if one else "belong to the adapter")
        notes.append(f"head{'' if one else 's'} {', '.join(held)} {does} in full: {full:,} parameters")
    if lost:
        notes.append(
            f"{', '.join(lost)} is random, since the checkpoint has no such weights, and is not in this adapter: it will fit a model that was made "
            'under the same seed only (train_modules="auto" puts it into the adapter)'
        )
    if left:
        notes.append(
            f'head{"" if len(left) == 1 else "s"} {", ".join(left)} not in this adapter: frozen as the base has it (train_modules="auto" trains it)'
        )
    return notes
