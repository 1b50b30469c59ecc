"""`import slimtune` is cheap: no transformers, no accelerate, none of the extras."""

import subprocess
import sys

import pytest

HEAVY = (
    "transformers", "accelerate", "datasets", "peft", "trl", "diffusers", "bitsandbytes", "gguf", "sentencepiece", "matplotlib", "sklearn",
    "scipy", "pandas", "pyarrow", "pydantic", "typer", "rich", "jinja2", "yaml", "psutil", "PIL", "tokenizers", "huggingface_hub",
    "torchvision", "triton", "hypothesis", "pytest",
)  # fmt: skip
EVERYTHING = "import torch, slimtune; [getattr(slimtune, name) for name in slimtune.__all__]"  # names load on first use
LIST = "import sys; {0}; print(*sorted({{m.split('.')[0] for m in sys.modules}}))"


def modules_after(statement: str) -> set[str]:
    done = subprocess.run([sys.executable, "-c", LIST.format(statement)], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("statement", ["import torch, slimtune", EVERYTHING], ids=["import", "every name"])
def test_import_pulls_in_nothing_heavy(statement: str) -> None:
    torch_only, ours = modules_after("import torch"), modules_after(statement)
    assert not ours & (set(HEAVY) - torch_only), f"imported: {sorted(ours & set(HEAVY))}"
    extra = {m for m in ours - torch_only if m not in sys.stdlib_module_names and not m.startswith("_")}
    assert extra <= {"slimtune", "safetensors", "numpy"}, f"torch does not need these: {sorted(extra)}"


def test_import_loads_next_to_nothing() -> None:
    """At most 0.3 s over torch are promised (`make bench` measures them): names load on first use, so there is next to nothing to load."""
    count = "import torch, sys; before = set(sys.modules); import slimtune; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", count], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["slimtune", "slimtune.version"]


def test_import_does_not_wait_for_torch() -> None:
    """The command line answers `--help` without it."""
    assert "torch" not in modules_after("import slimtune")


def test_every_public_name_is_there() -> None:
    import slimtune

    assert all(hasattr(slimtune, name) for name in slimtune.__all__)
    assert len(slimtune.__all__) == len(set(slimtune.__all__))
    assert callable(slimtune.methods)  # the function, not the package of the same name
    assert "lora" in slimtune.methods()
