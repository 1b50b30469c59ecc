"""st.lean / st.unlean: put the lean forms in, take them out."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from slimtune.core.mixing import generalise, specialise
from slimtune.core.state import unwrap
from slimtune.savers.attention import lean_attention, plain_attention
from slimtune.savers.head import LeanHead, LeanLoss, is_head
from slimtune.savers.heap import give_back, keep_freed
from slimtune.savers.mlp import LeanActivation, LeanGatedMLP, is_activation, recognise_gated
from slimtune.savers.norms import LeanLayerNorm, LeanRMSNorm, recognise_rms

_MIXINS = (LeanRMSNorm, LeanLayerNorm, LeanGatedMLP, LeanActivation, LeanHead, LeanLoss)


@dataclass(frozen=True)
class LeanReport:
    """What became lean: form -> number of modules; `left` -> modules that look alike but were not recognised, with the reason."""

    changed: dict[str, int] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        what = ", ".join(f"{n} x {form}" for form, n in self.changed.items()) or "nothing"
        return "\n".join([f"lean: {what}", *(f"  left alone: {line}" for line in self.left)])


def lean(model: nn.Module) -> LeanReport:
    """Give the frozen parts of a model their memory-saving forms; results stay the same to the last rounding.

    Norms, gated feed-forwards and activations are recognised by structure and proven equal, bit for bit, on random data; what is not
    recognised is left alone. Names, parameters and `isinstance` do not move. `unlean` undoes it. With a model on a CPU, the process also keeps
    the memory that it frees (`savers.heap`).

    Args:
        model: any model, before or after `attach`.
    """
    model = unwrap(model)
    changed: dict[str, int] = {}
    left: list[str] = []

    def take(module: nn.Module, mixin: type, form: str) -> None:
        specialise(module, mixin)
        changed[form] = changed.get(form, 0) + 1

    for path, module in list(model.named_modules()):
        if path.split(".")[-1] == "slim" or ".slim." in f".{path}." or any(issubclass(type(module), m) for m in _MIXINS):
            continue
        if type(module) is nn.LayerNorm:
            take(module, LeanLayerNorm, "LayerNorm")
        elif is_activation(module):
            take(module, LeanActivation, "activation")
        elif (norm := recognise_rms(module)) is not None:
            module.slim_norm = norm  # type: ignore[assignment]
            take(module, LeanRMSNorm, "RMSNorm")
        elif (mlp := recognise_gated(module)) is not None:
            module.slim_mlp = mlp  # type: ignore[assignment]
            take(module, LeanGatedMLP, "gated MLP")
    whole = [("loss head", _lean_loss(model)), ("attention", lean_attention(model))]
    if any(p.device.type == "cpu" for p in model.parameters()):
        whole.append(("heap", keep_freed()))
    for form, reason in whole:
        if reason:
            left.append(f"{form}: {reason}")
        else:
            changed[form] = 1
    return LeanReport(changed, left)


def _lean_loss(model: nn.Module) -> str:
    """Make the loss head lean; return why not, or ""."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    if not is_head(head) or not hasattr(type(model), "loss_function"):
        return "no linear output head with a transformers loss"
    from transformers.loss.loss_utils import ForCausalLMLoss

    encoder_decoder = bool(getattr(model.config, "is_encoder_decoder", False))
    if model.loss_function is not ForCausalLMLoss and not encoder_decoder:  # type: ignore[comparison-overlap]
        return "the model has a loss function of its own"
    model.slim_head = next(p for p, m in model.named_modules() if m is head)  # type: ignore[assignment]
    head.slim_pending = False  # type: ignore[union-attr]
    specialise(head, LeanHead)  # type: ignore[arg-type]
    specialise(model, LeanLoss)
    return ""


def unlean(model: nn.Module) -> None:
    """Undo `lean`."""
    model = unwrap(model)
    for module in model.modules():
        for mixin in _MIXINS:
            if issubclass(type(module), mixin):
                generalise(module, mixin)
        for name in ("slim_norm", "slim_mlp", "slim_head", "slim_pending"):
            module.__dict__.pop(name, None)
    plain_attention(model)
    give_back()
