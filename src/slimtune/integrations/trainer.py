"""transformers' Trainer, TRL's and sentence-transformers', over a model with adapters: checkpoints hold the adapters.

`teach` wraps three methods of the class Trainer once. Each looks whether the trainer's model carries adapters; if so,
the trainer gets `KeepsAdapters` in front of its own class, as a hosted module gets its mixins, so that whatever a
subclass overrides stays below it. Nothing changes for models without adapters, for peft's, and for a Trainer whose
class says `keeps_adapters = True` because it does this itself.

A checkpoint holds what st.save writes, beside it the exact tensors and counters (`train.checkpoint`), and no base:

    checkpoint-500/          adapter_config.json, adapter_model.safetensors, README.md, state.safetensors
    checkpoint-500/<name>/   the same, one folder for each adapter, where several train
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from safetensors import safe_open
from torch import nn

from slimtune.core.carried import MARK
from slimtune.core.errors import CapabilityError, FileError, SpecError
from slimtune.core.state import State, unwrap
from slimtune.core.stepping import training_with

BY_HAND = "set save_strategy='no' and write adapters yourself: st.save(model, folder)"
# What the Trainer is asked for here: method -> parameters that it must take.
EXPECTED = {
    "_save_checkpoint": ("model", "trial"),
    "save_model": ("output_dir",),
    "_save": ("output_dir", "state_dict"),
    "_load_from_checkpoint": (),
    "_load_best_model": (),
    "train": (),
}


def teach(trainer_class: Any) -> None:
    """Have every instance of transformers' Trainer, and of its subclasses, keep the adapters of its model."""
    if getattr(trainer_class, "slim_taught", False):
        return
    trainer_class.slim_taught = True
    construct, train, save_model = trainer_class.__init__, trainer_class.train, trainer_class.save_model

    @functools.wraps(construct)
    def __init__(self: Any, model: Any = None, *args: Any, **kwargs: Any) -> None:
        with quantised_base(model) if carriers(model) else contextlib.nullcontext():
            construct(self, model, *args, **kwargs)
        adopt(self, certain=self.args.save_strategy != "no")

    @functools.wraps(train)
    def train_(self: Any, *args: Any, **kwargs: Any) -> Any:
        loads = args[0] if args else kwargs.get("resume_from_checkpoint")
        adopt(self, certain=self.args.save_strategy != "no" or bool(loads))
        if getattr(self, "keeps_adapters", False) and self.args.save_strategy != "no":
            check_saving(self)
        with training_with(self):
            return train(self, *args, **kwargs)

    @functools.wraps(save_model)
    def save_model_(self: Any, *args: Any, **kwargs: Any) -> Any:
        if adopt(self, certain=True):
            return self.save_model(*args, **kwargs)  # from the top again, now that it knows
        return save_model(self, *args, **kwargs)

    trainer_class.__init__, trainer_class.train, trainer_class.save_model = __init__, train_, save_model_


def carriers(model: Any) -> list[nn.Module]:
    """Return the parts of a model (or itself) to which adapters were attached."""
    return [m for m in unwrap(model).modules() if "slim_state" in m.__dict__] if isinstance(model, nn.Module) else []


def adopt(trainer: Any, certain: bool) -> bool:
    """Put `KeepsAdapters` in front of a trainer's class if its model carries adapters; tell whether that was new.

    Args:
        certain: it will save or load, so a kind of trainer that is not known here must be refused.

    Raises:
        CapabilityError: this trainer is of such a kind.
    """
    cls = type(trainer)
    if getattr(cls, "keeps_adapters", False) or not carriers(trainer.model):
        return False
    unknown = [name for name, takes in EXPECTED.items() if not _takes(getattr(cls, name, None), takes)]
    if unknown and not certain:
        return False
    if unknown:
        raise CapabilityError(
            f"this Trainer saves and loads in a way that slimtune does not know ({', '.join(unknown)}), "
            "so its checkpoints would lose the adapter",
            where=f"{cls.__module__}.{cls.__qualname__}",
            hint=BY_HAND,
        )
    trainer.__class__ = _kept(cls)  # type: ignore[arg-type]
    return True


def _takes(method: Any, names: tuple[str, ...]) -> bool:
    if not callable(method):
        return False
    parameters = inspect.signature(method).parameters
    return set(names) <= set(parameters) or any(p.kind is p.VAR_POSITIONAL for p in parameters.values())


@functools.cache
def _kept(cls: Any) -> Any:
    about = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (KeepsAdapters, cls), about)


class KeepsAdapters:
    """Mixin of a Trainer whose model carries adapters; where they have been detached since, it does nothing."""

    keeps_adapters: ClassVar[bool] = True
    slim_in_checkpoint = False  # a checkpoint to resume from is being written, not a result
    slim_written = False  # the adapters have been written in this call of save_model

    # ---- writing ------------------------------------------------------------------------------------------------
    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        self.slim_in_checkpoint = True
        try:
            return super()._save_checkpoint(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.slim_in_checkpoint = False

    def save_model(self: Any, output_dir: str | None = None, *args: Any, **kwargs: Any) -> Any:
        self.slim_written = False
        result = super().save_model(output_dir, *args, **kwargs)  # type: ignore[misc]
        if saved(self.model) and self.args.should_save and not self.slim_written:  # it has ways of its own
            self.slim_write(output_dir or self.args.output_dir)
        return result

    def _save(self: Any, output_dir: str | None = None, state_dict: Any = None) -> Any:
        if not saved(self.model):
            return super()._save(output_dir, state_dict)  # type: ignore[misc]
        folder = Path(output_dir or self.args.output_dir)
        # Where the model has a save_pretrained, the Trainer calls it; else it writes the state dict, which is empty here.
        with _instead(self.model, "save_pretrained", lambda *args, **kwargs: self.slim_write(folder)):
            super()._save(output_dir, {})  # type: ignore[misc]
        if not self.slim_written:
            self.slim_write(folder)
        for empty in folder.glob("model.safetensors"):
            with safe_open(empty, framework="pt") as file:
                hollow = not list(file.keys())
            if hollow:
                empty.unlink()

    def slim_write(self: Any, folder: str | Path) -> None:
        """Write every adapter that trains."""
        import slimtune as st
        from slimtune.train.checkpoint import write_tensors

        check_saving(self)
        root = carriers(self.model)[0]
        for name, place in places(root, saved(self.model), Path(folder)).items():
            st.save(root, place, name=name)
            if self.slim_in_checkpoint:
                write_tensors(root, name, place)
        self.slim_written = True

    def _push_from_checkpoint(self: Any, checkpoint_folder: str) -> Any:
        """Copy the adapters to the folder that is uploaded, as the Trainer does with the files that it knows."""
        if saved(self.model) and self.is_world_process_zero():
            there, here = Path(self.args.output_dir), Path(checkpoint_folder)
            for file in [*here.glob("adapter_*"), *here.glob("*/adapter_*")]:
                target = there / file.relative_to(here)
                target.parent.mkdir(exist_ok=True)
                shutil.copy(file, target)
        return super()._push_from_checkpoint(checkpoint_folder)  # type: ignore[misc]

    def create_model_card(self: Any, *args: Any, **kwargs: Any) -> Any:
        # A card that names peft, whose format the adapter is in, makes the Trainer ask the model for peft's own card.
        with _instead(self.model, "create_or_update_model_card", lambda *args, **kwargs: None):
            return super().create_model_card(*args, **kwargs)  # type: ignore[misc]

    # ---- reading ------------------------------------------------------------------------------------------------
    def _load_from_checkpoint(self: Any, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> Any:
        if not saved(self.model):
            return super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]
        restore(self.model, Path(resume_from_checkpoint))

    def _load_best_model(self: Any) -> Any:
        if not saved(self.model):
            return super()._load_best_model()  # type: ignore[misc]
        restore(self.model, Path(self.state.best_model_checkpoint))
        if super()._load_best_model.__func__.__module__ != "transformers.trainer":  # type: ignore[misc]
            # A subclass has more to do, and calls _load_from_checkpoint for the rest.
            super()._load_best_model()  # type: ignore[misc]


# ---- what is kept, and where ----------------------------------------------------------------------------------------
def saved(model: nn.Module) -> list[str]:
    """Return the adapters that a checkpoint of this model holds: those that train, or all where nothing trains.

    Where only the base trains, beside adapters at rest, there is none: the Trainer saves the base as ever.
    """
    states: list[State] = [root.__dict__["slim_state"] for root in carriers(model)]
    adapters = [(name, adapter) for state in states for name, adapter in state.adapters.items()]
    live = [name for name, adapter in adapters if any(p.requires_grad for p in adapter.parameters())]
    return live or ([] if outside(model) else [name for name, _ in adapters])


def outside(model: nn.Module) -> list[str]:
    """Return the parameters that train and belong to no adapter."""
    return [name for name, p in unwrap(model).named_parameters() if p.requires_grad and MARK not in f".{name}"]


def check_saving(trainer: Any) -> None:
    """Raise unless the checkpoints of a trainer would hold all that it trains.

    Raises:
        SpecError: parameters of the base train as well.
        CapabilityError: adapters stand on several parts of the model, or are sharded over processes.
    """
    names, where = saved(trainer.model), type(trainer).__name__
    if not names:
        return
    if more := outside(trainer.model):
        raise SpecError(
            f"{len(more)} parameters train that belong to no adapter, so a checkpoint of adapters would lose them: {', '.join(more[:4])}",
            where=where,
            hint=f"freeze them, or make them a part of the adapter: train_modules=({more[0].rpartition('.')[0]!r},) in the spec",
        )
    if len(carriers(trainer.model)) > 1:
        raise CapabilityError("adapters were attached to several parts of this model", where=where, hint=f"attach to the whole model, or {BY_HAND}")
    zero3 = getattr(trainer, "is_deepspeed_enabled", False) and trainer.accelerator.state.deepspeed_plugin.zero_stage == 3
    if getattr(trainer, "is_fsdp_enabled", False) or zero3:
        raise CapabilityError(
            "this Trainer shards the adapter over processes (FSDP or ZeRO-3), and its checkpoints would hold pieces of it",
            where=where,
            hint="train it under DDP: adapters are small; or save_strategy='no'",
        )


def places(root: nn.Module, names: list[str], folder: Path) -> dict[str, Path]:
    """Return the folder of each adapter inside a checkpoint."""
    return {name: folder if len(names) == 1 else folder / name for name in names}


def restore(model: nn.Module, folder: Path) -> None:
    """Take over the adapters of a checkpoint, to the bit.

    Raises:
        FileError: it holds no such adapters.
    """
    from slimtune.train.checkpoint import STATE, read_tensors

    root = carriers(model)[0]
    wanted = places(root, saved(model), folder)
    missing = [name for name, place in wanted.items() if not (place / STATE).is_file()]
    if missing:
        held = sorted(str(p.parent.relative_to(folder)) for p in folder.rglob("adapter_model.safetensors"))
        raise FileError(
            f"this checkpoint does not hold what training of the adapter {', '.join(missing)} goes on from",
            where=str(folder),
            hint=f"adapters in it: {', '.join(held) or 'none'}"
            + (f"; st.load(model, {str(folder / held[0])!r}, trainable=True) starts from one, without resume_from_checkpoint" if held else ""),
        )
    for name, place in wanted.items():
        read_tensors(root, name, place, hint="attach the spec of that run (the same r, targets, ...), or start without resume_from_checkpoint")


@contextlib.contextmanager
def _instead(model: Any, name: str, function: Any) -> Iterator[None]:
    """Have a method of one model replaced in this block, where it has it at all."""
    inner = unwrap(model)
    inner.__dict__[name] = function
    try:
        yield
    finally:
        del inner.__dict__[name]


@contextlib.contextmanager
def quantised_base(model: Any) -> Iterator[None]:
    """Let a Trainer be built over a quantised base that carries adapters.

    Its constructor refuses a quantised model unless a flag says that adapters are there; the flag belongs to another library's integration,
    so it is set during the construction only.
    """
    flag = "_hf_peft_config_loaded"
    had = model.__dict__.get(flag)
    setattr(model, flag, True)
    try:
        yield
    finally:
        if had is None:
            model.__dict__.pop(flag, None)
        else:
            setattr(model, flag, had)
