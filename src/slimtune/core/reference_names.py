"""Names that people know options by from other tools, and what they are called here: one table for specs, recipes and configs of the reference.

Only ever used to word a hint, and by `files.layouts.from_config`, which turns a config of the reference into a spec.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection

# Option elsewhere -> options here; a method takes the first of them that it has.
OPTIONS: dict[str, tuple[str, ...]] = {
    # where an adapter goes
    "target_modules": ("targets",), "target_module": ("targets",), "modules": ("targets",), "exclude_modules": ("exclude",),
    "modules_to_save": ("train_modules",), "layers_to_transform": ("layers",), "leave_out": ("exclude",),
    # LoRA and its kin
    "rank": ("r", "rank"), "lora_r": ("r",), "lora_rank": ("r",), "num_ranks": ("r",), "lora_alpha": ("alpha",), "scaling": ("scale", "alpha"),
    "lora_dropout": ("dropout",), "vera_dropout": ("dropout",), "encoder_dropout": ("dropout",), "use_rslora": ("rank_stabilised",),
    "rank_stabilized": ("rank_stabilised",), "lora_bias": ("up_bias",), "init_lora_weights": ("init",), "init_weights": ("init",),
    "d_initial": ("d_start",), "projection_prng_key": ("seed",),
    # AdaLoRA
    "tinit": ("t_init",), "tfinal": ("t_final",), "deltaT": ("delta_t",), "orth_reg_weight": ("orthogonality",), "total_step": ("total_steps",),
    # IA3, adapters
    "feedforward_modules": ("feedforward",), "reduction_factor": ("reduction",), "non_linearity": ("nonlinearity",), "activation": ("nonlinearity",),
    # prompts
    "num_virtual_tokens": ("tokens", "p"), "prefix_length": ("p", "tokens"), "num_tasks": ("tasks",), "prompt_tuning_init": ("init",),
    "prompt_tuning_init_text": ("init_text",), "tokenizer_name_or_path": ("tokenizer",), "encoder_reparameterization_type": ("encoder",),
    "encoder_hidden_size": ("hidden",), "prefix_projection": ("hidden",), "encoder_num_layers": ("encoder_layers",),
    "token_indices": ("tokens",),
}  # fmt: skip
# Option elsewhere -> what does the same here.
ELSEWHERE: dict[str, str] = {
    "use_dora": "a method of its own: st.DoRA(of=st.LoRA(r=8))",
    "use_qalora": "a method of its own: st.QALoRA(r=8)",
    "bias": "biases train beside a method in a union: st.Union(of=(st.LoRA(targets=...), st.BitFit(targets=...)))",
    "trainable_token_indices": "tokens train beside a method in a union: st.Union(of=(st.LoRA(), st.TrainableTokens(tokens=(1, 2))))",
    "target_parameters": 'expert weights are a target: targets=("all-linear", "experts")',
    "layers_pattern": 'a glob says it: targets="encoder.layers.*.q_proj"',
    "loftq_config": 'init="loftq", loftq_source="folder of the unquantised model"',
    "eva_config": 'init="eva", and st.attach(model, spec, data=batches)',
    "corda_config": 'init="corda", and st.attach(model, spec, data=batches)',
    "lora_ga_config": 'init="lora_ga", and st.attach(model, spec, data=batches)',
    "loraplus_lr_ratio": "of the optimizer's groups: st.param_groups(model, lr=1e-4, up_ratio=16)",
    "adapter_name": 'of the call: st.attach(model, spec, name="default")',
    "autocast_adapter_dtype": "of the call: st.attach(model, spec, dtype=torch.float32), which is the default on a half-precision base",
    "task_type": "leave it out: the model's class says it",
    "peft_type": "the class is the method: st.LoRA(), st.IA3(), ...",
    "inference_mode": "leave it out: st.load(..., trainable=True) goes on training, the default is for use",
    "fan_in_fan_out": "leave it out: the module's class says it",
    "base_model_name_or_path": "leave it out: the files tell the base by its weights",
    "revision": 'of the call: st.load(model, "user/adapter", revision="main")',
    "save_projection": "leave it out: a seed makes the matrices, here and there",
    "layer_replication": "not here: repeat the blocks of the model itself",
}

# Argument of a call elsewhere -> arguments here; a verb takes the first of them that it has.
ARGUMENTS: dict[str, tuple[str, ...]] = {
    "learning_rate": ("lr",), "loraplus_lr_ratio": ("up_ratio",), "method": ("how",), "combination_type": ("how",), "adapter_name": ("name",),
    "adapter": ("name",), "adapters": ("weights",), "path": ("folder",), "save_directory": ("folder",), "is_trainable": ("trainable",),
    "peft_config": ("spec",), "config": ("spec",), "strict": ("relax",), "svd_rank": ("r",), "torch_dtype": ("dtype",),
}  # fmt: skip
# Name elsewhere -> what to type here, of functions and classes that are no methods.
VERBS: dict[str, str] = {
    "get_peft_model": "st.attach(model, st.LoRA(r=16))", "inject_adapter_in_model": "st.attach(model, st.LoRA(r=16))",
    "add_adapter": 'st.attach(model, st.LoRA(r=16), name="b")', "PeftModel": "st.load(model, folder)", "PeftConfig": "st.Spec",
    "AutoPeftModel": "st.load(model, folder)", "from_pretrained": "st.load(model, folder)", "save_pretrained": "st.save(model, folder)",
    "set_adapter": 'st.use(model, "a")', "set_active_adapters": 'st.use(model, "a")', "disable_adapter": "with st.disabled(model):",
    "delete_adapter": 'st.detach(model, "a")', "unload": 'st.detach(model, "a")', "remove": 'st.detach(model, "a")',
    "merge_and_unload": "st.merge(model, keep=False)", "merge_adapter": 'st.merge(model, "a")', "unmerge_adapter": "st.unmerge(model)",
    "add_weighted_adapter": 'st.combine(model, {"a": 0.7, "b": 0.3}, name="c")',
    "print_trainable_parameters": "print(st.report(model))", "hotswap_adapter": 'st.detach(model, "a"), then st.load(model, folder, name="a")',
    "create_loraplus_optimizer": "torch.optim.AdamW(st.param_groups(model, lr=1e-4, up_ratio=16))",
    "prepare_model_for_kbit_training": "nothing: gradients are made to flow where something trains",
    "quantize": "st.quantise(model)", "TaskType": "nothing: the model's class says it",
}  # fmt: skip


def instead_of(name: str, names: Collection[str]) -> str:
    """Return what to type for a name that this library does not have: ours for one from elsewhere, or the closest of `names`; or ""."""
    if name in VERBS:
        return VERBS[name]
    by_case = {own.lower().replace("_", ""): own for own in names}
    bare = name.lower().replace("_", "")
    for ending in ("", "config", "model", "forcausallm"):
        if bare.endswith(ending) and (own := by_case.get(bare.removesuffix(ending))):
            return f"st.{own}"
    near = difflib.get_close_matches(bare.removesuffix("config"), by_case, n=1, cutoff=0.75)
    return f"st.{by_case[near[0]]}" if near else ""


def known_as(name: str, options: Collection[str]) -> str:
    """Return the option among `options` that people know as `name` from elsewhere, or ""."""
    return next((own for own in OPTIONS.get(name, ()) if own in options), "")
