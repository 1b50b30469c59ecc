"""A plain Trainer on two processes (torchrun, gloo): adapter-only checkpoints, resumed to the bit, the best one brought back on both."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

RUN = '''
import sys
from pathlib import Path
import torch
from transformers import LlamaConfig, LlamaForCausalLM
import slimtune as st

where = Path(sys.argv[1])
SPECS = {"lora": st.LoRA(r=2, dropout=0.2), "adalora": st.AdaLoRA(init_r=4, target_r=2, t_init=1, t_final=1, delta_t=1)}

def model(spec):
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=40)
    made = LlamaForCausalLM(LlamaConfig(**sizes))
    st.attach(made, spec)  # before the Trainer is imported
    return made

first = model(SPECS["lora"])
from transformers import Trainer, TrainerCallback, TrainingArguments

class Kill(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt

generator = torch.Generator().manual_seed(5)
rows = [{"input_ids": r, "labels": r} for r in torch.randint(3, 40, (16, 6), generator=generator)]

def run(name, folder, kill=False, resume=None, **more):
    made = model(SPECS[name])
    args = TrainingArguments(
        output_dir=str(where / folder), max_steps=4, save_steps=2, per_device_train_batch_size=2, learning_rate=5e-2, report_to="none",
        use_cpu=True, ddp_backend="gloo", disable_tqdm=True, seed=0, **more,
    )
    trainer = Trainer(model=made, args=args, train_dataset=rows, eval_dataset=rows, callbacks=[Kill()] if kill else [])
    try:
        trainer.train(resume_from_checkpoint=resume)
    except KeyboardInterrupt:
        assert kill
    torch.distributed.barrier()
    return {k: v.detach().clone() for k, v in made.state_dict().items() if ".slim." in k}, trainer

found = {}
for name in SPECS:
    found[name, "whole"], _ = run(name, f"{name}-whole")
    run(name, f"{name}-cut", kill=True)
    found[name, "again"], _ = run(name, f"{name}-cut", resume=True)
best = dict(load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=True, eval_strategy="steps", eval_steps=2)
found["best", "lora"], trainer = run("lora", "best", **best)
found["best", "loss"] = trainer.evaluate()["eval_loss"], trainer.state.best_metric
torch.save(found, where / f"found-{trainer.args.process_index}.pt")
torch.distributed.barrier()
torch.distributed.destroy_process_group()
'''


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[Any, Any]]]:
    where = tmp_path_factory.mktemp("two")
    script = where / "run.py"
    script.write_text(RUN)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([sys.executable, "-m", *launcher, str(script), str(where)], env=env, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr[-4000:]
    return where, [torch.load(where / f"found-{i}.pt", weights_only=True) for i in range(2)]


@pytest.mark.parametrize("name", ["lora", "adalora"])
def test_two_processes_resume_to_the_bit(found: tuple[Path, list[dict[Any, Any]]], name: str) -> None:
    where, (first, second) = found
    whole = first[name, "whole"]
    assert any(v.abs().sum() > 0 for k, v in whole.items() if k.endswith(".B"))
    for other in (first[name, "again"], second[name, "whole"], second[name, "again"]):
        assert whole.keys() == other.keys()
        assert all(torch.equal(value, other[key]) for key, value in whole.items())
    assert not list(where.rglob("model.safetensors")), "no base"


def test_two_processes_bring_the_best_back(found: tuple[Path, list[dict[Any, Any]]]) -> None:
    _, (first, second) = found
    loss, wanted = first["best", "loss"]
    assert loss == pytest.approx(wanted, abs=1e-6)
    assert all(torch.equal(value, second["best", "lora"][key]) for key, value in first["best", "lora"].items())
