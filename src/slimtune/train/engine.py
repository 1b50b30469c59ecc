"""`train`: from a recipe to a working adapter, a run folder and a report."""

from __future__ import annotations

import atexit
import contextlib
import math
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerState, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

import slimtune as st
from slimtune.core.errors import DataError, RecipeError
from slimtune.train.callbacks import MetricsCallback, MetricsFile, ProgressCallback
from slimtune.train.checkpoint import PROGRESS, peak_bytes
from slimtune.train.checkpoint_blocks import EVERY, checkpoint_blocks
from slimtune.train.collate import LengthGroupedSampler
from slimtune.train.environment import environment
from slimtune.train.evaluate import Evaluation
from slimtune.train.full_disk import told_if_full
from slimtune.train.job import Job, load_job
from slimtune.train.outcome import Learnt, describe, outcome, summary
from slimtune.train.quiet import quiet
from slimtune.train.recipe import Recipe
from slimtune.train.report import duration, write_report
from slimtune.train.runs import RunFolder, folder_bytes, read_json, run_alone, write_json, write_text
from slimtune.train.stopping import StopOnSignal, Stopped
from slimtune.train.tables import token_counts
from slimtune.train.trainer import SlimTrainer

BEFORE = "before.json"
DATA = "data.json"  # split -> SHA-256 of its rows
Say = Callable[[str], None]


@dataclass(frozen=True)
class RunResult:
    """A finished run.

    Attributes:
        folder: the run folder.
        job: the live model, tokenizer and data.
        results: what results.json holds.
        main: false on the other processes of a distributed run.
        before, after: figures on held-out rows without and with what was learnt; None without such rows.
    """

    folder: RunFolder
    job: Job
    results: dict[str, Any]
    main: bool
    before: Evaluation | None
    after: Evaluation | None


def train(recipe: Recipe, resume: bool = False, say: Say | None = None) -> RunResult:
    """Run a recipe.

    Args:
        recipe: a validated recipe.
        resume: continue the run in its folder from the newest complete checkpoint.
        say: receives lines of progress; default: standard error.

    Raises:
        SlimtuneError: the recipe, data or model is at fault; a run that had no checkpoint yet leaves no folder behind.
        Stopped: Ctrl-C; everything is saved.
    """
    from accelerate import PartialState

    processes = PartialState(cpu=_on_cpu())  # without cpu=, a launch on a machine with no GPU counts as one process each
    say = say if say is not None else _to_stderr
    say = say if processes.is_main_process else _to_nobody
    out = Path(str(recipe.out))
    existed = out.exists()
    made = [parent for parent in (out, *out.parents) if not parent.exists()]
    try:
        with run_alone(out, resume) if processes.is_main_process else contextlib.nullcontext(RunFolder(out)) as folder:
            processes.wait_for_everyone()
            with told_if_full(out), quiet():
                result = _train(recipe, folder, resume, say, processes.is_main_process)
        if processes.num_processes > 1:
            processes.wait_for_everyone()  # the main process writes longest; the others stay, so that none ends under its neighbours
            atexit.unregister(_leave_together)
            atexit.register(_leave_together)
        return result
    except Stopped:
        raise
    except BaseException:
        if processes.is_main_process and not existed and RunFolder(out).latest_checkpoint() is None:
            shutil.rmtree(out, ignore_errors=True)  # nothing half-written
            for parent in made[1:]:
                with contextlib.suppress(OSError):  # somebody put something there meanwhile
                    parent.rmdir()
        raise


def _leave_together() -> None:
    """Close the process group before the interpreter goes: its threads would otherwise abort a process that has done its work."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _train(recipe: Recipe, folder: RunFolder, resume: bool, say: Say, main: bool) -> RunResult:
    checkpoint = folder.latest_checkpoint() if resume else None
    if resume and folder.recipe.is_file():
        _same_recipe(recipe, folder)
    set_seed(recipe.seed)  # a classifier's new head is random
    job = load_job(recipe, say=say)
    same_data(folder, job.bundle.digests, resume)
    if main:
        write_text(folder.recipe, recipe.dump())
        write_json(folder.path / DATA, job.bundle.digests)
        write_json(folder.environment, environment())
    spec = job.spec()
    if spec is not None:
        spec.sites(job.model)  # a dead target is told before anything heavy is done
    held_out = job.held_out()
    before = _before(job, folder, held_out, say, main)

    trunk = None
    set_seed(recipe.seed)
    if spec is None:
        for p in job.model.parameters():
            p.requires_grad_(True)
        job.model.float()  # steps smaller than bfloat16 can hold would be lost; the products stay in the recipe's dtype
        counts: dict[str, Any] = {"trainable": job.parameters, "percent": 100.0, "modules": "every weight"}
    else:
        data = job.first_batches() if any(part.wants_data() for part in spec.parts()) else None
        report = st.attach(job.model, spec, name=str(recipe.name), data=data)
        say(str(report))
        counts = {"trainable": report.trainable, "percent": report.percent, "modules": describe(report)}
        say(str(st.lean(job.model)))
        if recipe.cache_trunk:
            trunk = st.cache_trunk(job.model, folder=recipe.cache_trunk_folder)
            say(str(trunk))
    if every := (1 if recipe.gradient_checkpointing else EVERY[recipe.memory]):
        checkpoint_blocks(job.model, every)

    trainer = _trainer(job, folder, checkpoint, main)
    if checkpoint is not None:
        say(f"resuming after {checkpoint.name}")
    _run_steps(trainer, checkpoint)
    if trainer.state.global_step < trainer.state.max_steps:
        raise Stopped(f"stopped and saved after step {trainer.state.global_step} of {trainer.state.max_steps} in {folder.path}")
    seconds, peak_bytes_so_far = trainer.seconds, peak_bytes()

    if spec is None:
        job.model.to(job.dtype)  # measured as it is saved
    else:
        if trunk is not None:
            say(f"{trunk}, {trunk.hits:,} of {trunk.hits + trunk.misses:,} looked up")
            trunk.close()
        st.unlean(job.model)  # what is measured and used from here on is the model as it was loaded
        final = st.report(job.model, str(recipe.name))
        if final.ranks():  # they changed while it trained
            say(str(final))
            counts |= {"trainable": final.trainable, "percent": final.percent, "ranks": final.ranks()}
    after = _measure(job, held_out, say, "after training") if held_out else None
    if main:
        _save_result(job, folder, spec is not None)
    target = folder.adapter if spec is not None else folder.model
    learnt = Learnt(
        steps=trainer.state.global_step,
        seconds=seconds,
        tokens=trainer.tokens_everywhere(),
        peak_bytes=peak_bytes_so_far,
        bytes=folder_bytes(target) if main else 0,
        folder=target.name,
        **counts,
    )
    results = outcome(job, spec, learnt, held_out if main else [], before, after)
    if main:
        write_json(folder.results, results)
        write_json(folder.summary, summary(results))
        write_report(folder)
    return RunResult(folder, job, results, main, before, after)


# ---- parts --------------------------------------------------------------------------------------------------------------
def _run_steps(trainer: SlimTrainer, checkpoint: Path | None) -> None:
    if checkpoint is not None:
        saved = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        if saved.global_step >= saved.max_steps:  # killed after the last step: the Trainer would make one more
            trainer.restore(checkpoint)
            trainer.state = saved
            return
    stop = StopOnSignal(trainer)
    trainer.add_callback(stop)
    progress = next(c for c in trainer.callback_handler.callbacks if isinstance(c, ProgressCallback))
    try:
        with stop.listening():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        progress.close()


def _trainer(job: Job, folder: RunFolder, checkpoint: Path | None, main: bool) -> SlimTrainer:
    recipe = job.recipe
    processes = max(1, torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1)
    rows = job.train_rows
    batches = math.ceil(len(rows) / (recipe.batch_size * processes))
    steps = math.ceil(batches / recipe.accumulate)  # of one epoch
    mixed = recipe.method == "full" and job.dtype == torch.bfloat16
    args = TrainingArguments(
        output_dir=str(folder.checkpoints),
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.accumulate,
        num_train_epochs=recipe.epochs if recipe.max_steps is None else 1.0,
        max_steps=recipe.max_steps if recipe.max_steps is not None else -1,
        learning_rate=float(recipe.lr or 5e-4),
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(recipe.schedule, recipe.schedule),
        warmup_steps=recipe.warmup,
        max_grad_norm=recipe.clip,
        seed=recipe.seed,
        bf16=mixed,
        use_cpu=_on_cpu(),
        logging_strategy="steps",
        logging_steps=recipe.log_every,
        logging_first_step=True,
        eval_strategy="steps" if job.valid_rows else "no",
        eval_steps=recipe.eval_every or steps,
        save_strategy="steps",
        save_steps=recipe.save_every or steps,
        disable_tqdm=True,
        report_to="none",
        remove_unused_columns=False,
        average_tokens_across_devices=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    # The order is cut into whole optimiser steps, so it does not depend on how a step is split over processes and micro-batches.
    lengths = token_counts(rows) if recipe.group_by_length else [1] * len(rows)
    order = LengthGroupedSampler(lengths, recipe.batch_size * recipe.accumulate * processes, recipe.seed)
    step = int(read_json(checkpoint / PROGRESS)["step"]) if checkpoint else 0
    callbacks: list[TrainerCallback] = [ProgressCallback()]
    if main:
        callbacks.append(MetricsCallback(MetricsFile(folder.metrics, keep_to=step)))
    adapter = None if recipe.method == "full" else str(recipe.name)
    trainer = SlimTrainer(
        job.model,
        args,
        adapter=adapter,
        folder=folder,
        rows=rows,
        collate=job.collate,
        task=job.task,
        order=order,
        lr=float(recipe.lr or 5e-4),
        up_ratio=recipe.up_ratio,
        weight_decay=recipe.weight_decay,
        keep=2,
        measure=(lambda: job.evaluate(job.valid_rows)) if job.valid_rows else None,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _same_recipe(recipe: Recipe, folder: RunFolder) -> None:
    from slimtune.train.load_recipe import load_recipe

    earlier = load_recipe(folder.recipe)
    free = {"out", "name", "log_every", "save_every"}  # what cannot change the result
    new, old = {**recipe.model_dump(), **recipe.options}, {**earlier.model_dump(), **earlier.options}
    changed = [f"{k}: {old.get(k)!r} in the run, {new.get(k)!r} now" for k in sorted({*new, *old} - free) if new.get(k) != old.get(k)]
    if changed:
        raise RecipeError(
            "the recipe is not the one this run was started with",
            where=str(folder.path),
            problems=changed,
            hint=f"resume with: slimtune train {folder.recipe} --resume",
        )


def same_data(folder: RunFolder, digests: dict[str, str], resume: bool) -> None:
    """Check that a run which goes on has the rows that it began with.

    Raises:
        DataError: it has others.
    """
    kept = folder.path / DATA
    if not resume or not kept.is_file():  # 0.1.0 wrote none
        return
    earlier = read_json(kept)
    changed = [split for split in sorted({*earlier, *digests}) if earlier.get(split) != digests.get(split)]
    if changed:
        raise DataError(
            f"the rows have changed since this run began: {', '.join(changed)}",
            where=str(folder.path),
            hint="put the earlier files back to resume, or train on the new ones in a new folder: out=FOLDER without --resume",
        )


def _before(job: Job, folder: RunFolder, held_out: Sequence[Any], say: Say, main: bool) -> Evaluation | None:
    if not held_out:
        return None
    kept = folder.path / BEFORE
    if kept.is_file():
        return Evaluation(**read_json(kept))
    before = _measure(job, held_out, say, "before training")
    if main:
        write_json(kept, asdict(before))
    return before


def _measure(job: Job, rows: Sequence[Any], say: Say, when: str) -> Evaluation:
    began = time.perf_counter()
    found = job.evaluate(rows, show=f"measuring {when}")
    text = ", ".join(f"{k} {v:.4f}" for k, v in found.figures().items())
    say(f"{when}: {text} ({len(rows):,} held-out examples, {duration(time.perf_counter() - began)})")
    return found


def _save_result(job: Job, folder: RunFolder, adapter: bool) -> None:
    if adapter:
        st.save(job.model, folder.adapter, name=str(job.recipe.name))
        if job.new is not None:
            job.tokenizer.save_pretrained(folder.tokenizer)  # for those who load the adapter without the run
        return
    work = folder.model.with_name(f".{folder.model.name}.tmp")
    shutil.rmtree(work, ignore_errors=True)
    job.model.save_pretrained(work)
    job.tokenizer.save_pretrained(work)
    work.replace(folder.model)


def _on_cpu() -> bool:
    return not torch.cuda.is_available() and not torch.backends.mps.is_available()


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _to_nobody(line: str) -> None:
    return None
