"""Use the installed library where only torch and safetensors are: what `pip install slimtune` promises."""

import importlib.metadata
import sys
import tempfile

ALLOWED = {"slimtune", "safetensors", "torch", "numpy"}
packages = {d.metadata["Name"].lower() for d in importlib.metadata.distributions()}
assert not packages & {"transformers", "accelerate", "datasets", "peft", "pydantic", "rich", "typer"}, f"this place is not empty: {sorted(packages)}"

import torch  # noqa: E402

before = set(sys.modules)

import slimtune as st  # noqa: E402

for name in st.__all__:
    getattr(st, name)
extra = {m.split(".")[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names) - ALLOWED
assert not {m for m in extra if not m.startswith("_")}, f"slimtune imported {sorted(extra)}"

model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
again = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
again.load_state_dict(model.state_dict())
st.attach(model, st.LoRA(r=2))
x = torch.randn(4, 8)
before_training = model(x)
optimizer = torch.optim.SGD(st.param_groups(model, lr=0.1))
for _ in range(3):
    model(x).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
assert not torch.equal(model(x), before_training)
with tempfile.TemporaryDirectory() as folder:
    st.save(model, folder)
    st.load(again, folder)
assert torch.equal(model(x), again(x))
trained = model(x)
st.merge(model)
torch.testing.assert_close(model(x), trained)
print(f"[wheel] import, attach, train, save, load and merge beside {', '.join(sorted(packages & ALLOWED))} only; {len(st.__all__)} public names")
