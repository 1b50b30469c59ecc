"""`import slimtune` is cheap: no transformers, no accelerate, none of the extras."""

import subprocess
import sys

HEAVY = (
    "transformers", "accelerate", "datasets", "peft", "trl", "diffusers", "bitsandbytes", "gguf", "sentencepiece", "matplotlib", "sklearn",
    "scipy", "pandas", "pyarrow", "pydantic", "typer", "rich", "jinja2", "yaml", "psutil", "PIL", "tokenizers", "huggingface_hub",
    "torchvision", "triton", "hypothesis", "pytest",
)  # fmt: skip
LIST = "import sys; import {0}; print(*sorted({{m.split('.')[0] for m in sys.modules}}))"


def modules_after(statement: str) -> set[str]:
    done = subprocess.run([sys.executable, "-c", LIST.format(statement)], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def milliseconds(statement: str) -> dict[str, float]:
    """Return the time spent in each module while importing, its own share only (-X importtime)."""
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", f"import {statement}"], capture_output=True, text=True, check=True)
    own = {}
    for line in done.stderr.splitlines():
        parts = line.removeprefix("import time:").split("|")
        if line.startswith("import time:") and parts[0].strip().isdigit():
            own[parts[2].strip()] = int(parts[0]) / 1000
    return own


def test_import_pulls_in_nothing_heavy() -> None:
    torch_only, ours = modules_after("torch"), modules_after("torch, slimtune")
    assert not ours & (set(HEAVY) - torch_only), f"imported: {sorted(ours & set(HEAVY))}"
    extra = {m for m in ours - torch_only if m not in sys.stdlib_module_names and not m.startswith("_")}
    assert extra <= {"slimtune", "safetensors", "numpy"}, f"torch does not need these: {sorted(extra)}"


def test_print_what_the_import_costs(capsys) -> None:  # type: ignore[no-untyped-def]
    torch_only, ours = milliseconds("torch"), milliseconds("torch, slimtune")
    added = {m: t for m, t in ours.items() if m not in torch_only}
    with capsys.disabled():
        print(f"\nimport torch {sum(torch_only.values()):.0f} ms; slimtune adds {sum(added.values()):.0f} ms", end=" ")
    assert any(m.startswith("slimtune") for m in added)


def test_every_public_name_is_there() -> None:
    import slimtune

    assert all(hasattr(slimtune, name) for name in slimtune.__all__)
    assert len(slimtune.__all__) == len(set(slimtune.__all__))
    assert callable(slimtune.methods)  # the function, not the package of the same name
    assert "lora" in slimtune.methods()
