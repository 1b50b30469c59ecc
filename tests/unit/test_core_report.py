"""Reports, errors and specs."""

import json
import pickle

import pytest
import torch
from torch import nn

import slimtune as st
from slimtune.core import errors
from slimtune.core.errors import NameInUse, SpecError, closest
from slimtune.testing import zoo as tiny


def test_report_counts() -> None:
    model = tiny.llama()
    plain = sum(p.numel() for p in model.parameters())
    report = st.attach(model, st.LoRA(r=4, targets=("q_proj", "v_proj")), name="a")
    assert len(report.rows) == 6
    assert report.trainable == 3 * (4 * (32 + 32) + 4 * (32 + 16)) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert report.total == plain + report.trainable
    assert report.bytes == 4 * report.trainable
    assert report.base_bytes == 4 * plain
    assert report.percent == pytest.approx(100 * report.trainable / report.total)
    assert report.left["Linear 99x32"] == 1
    assert report.left["Linear 32x64"] == 3
    text = str(report)
    assert "model.layers.*.self_attn.q_proj" in text
    assert "3 x" in text
    assert "not adapted" in text
    json.dumps(report.to_dict())
    second = st.attach(model, st.BitFit(), name="b")
    assert second.total == plain + second.trainable, "another adapter's parameters are not this one's"
    assert st.report(model, "a").trainable == 0
    assert st.report(model).name == "b"
    st.use(model, "a")
    assert st.report(model).name == "a"
    assert st.report(model, "a").trainable == report.trainable


def test_report_notes_experts() -> None:
    assert any("experts" in note for note in st.attach(tiny.mixtral(), st.LoRA(targets="attention")).notes)
    assert not st.attach(tiny.mixtral(), st.LoRA(targets=("attention", "experts"))).notes


def test_attach_is_all_or_nothing() -> None:
    model = tiny.llama()
    keys = [type(m) for m in model.modules()]
    with pytest.raises(SpecError) as error:
        st.attach(model, st.LoRA(r=0, dropout=1.5, init="zzz"))
    assert all(part in str(error.value) for part in ("r must be", "dropout must be", "init must be"))
    with pytest.raises(SpecError, match="needs a spec, not dict"):
        st.attach(model, {"r": 8})  # type: ignore[arg-type]
    assert [type(m) for m in model.modules()] == keys
    st.attach(model, st.LoRA(), name="a")
    with pytest.raises(NameInUse, match="'a' already"):
        st.attach(model, st.LoRA(), name="a")


@pytest.mark.parametrize(
    ("data", "what"),
    [
        ({"method": "lorra"}, "no method is called 'lorra'"),
        ({"method": "lora", "rank": 8}, "'rank' is not an option"),
        ({"method": "lora", "r": "8"}, "r must be int"),
        ({"method": "lora", "r": True}, "r must be int"),
        ({"method": "lora", "r": 8.5}, "r must be int"),
        ({"method": "lora", "targets": [1, 2]}, "targets must be"),
        ({"method": "lora", "r": 0}, "at least 1"),
        ({"r": 8}, "mapping with a 'method'"),
        ([], "mapping with a 'method'"),
        ({"method": 3}, "mapping with a 'method'"),
    ],
)
def test_specs_that_cannot_be(data: object, what: str) -> None:
    with pytest.raises(SpecError) as error:
        st.Spec.from_dict(data)  # type: ignore[arg-type]
    assert what in str(error.value)
    assert error.value.hint


def test_two_classes_cannot_share_a_name() -> None:
    with pytest.raises(SpecError, match="registered already"):

        @st.register("lora")
        class Mine(st.LoRA):
            pass

    assert st.methods()["lora"] is st.LoRA


def every_error() -> list[type[st.SlimtuneError]]:
    return [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, st.SlimtuneError)]


@pytest.mark.parametrize("cls", every_error(), ids=lambda c: c.__name__)
def test_errors_say_it_and_travel(cls: type[st.SlimtuneError]) -> None:
    extra = {"problems": ["one", "two"]} if cls is errors.RecipeError else {}
    error = cls("what happened", where="here", hint="do this", **extra)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is cls
    assert str(again) == str(error)
    assert (again.what, again.where, again.hint) == ("what happened", "here", "do this")
    assert all(part in str(error) for part in ("what happened", "here", "do this", *extra.get("problems", [])))
    assert str(cls("only this")) == "only this"


def test_errors_are_also_what_python_users_expect() -> None:
    for cls, builtin in {
        errors.SpecError: ValueError, errors.NoSuchAdapter: KeyError, errors.CapabilityError: NotImplementedError,
        errors.FileError: OSError, errors.MergeError: RuntimeError, errors.SiteError: TypeError,
    }.items():  # fmt: skip
        assert issubclass(cls, builtin)


def test_closest() -> None:
    assert closest("q_prj", ["up_proj", "q_proj", "lm_head"]).startswith("q_proj")
    assert closest("zzz", ["a", "b"]) == "a, b"
    assert closest("x", []) == ""


def test_dtype_of_parameters() -> None:
    for base, asked, want in [
        (torch.float32, None, torch.float32), (torch.float64, None, torch.float64), (torch.bfloat16, None, torch.float32),
        (torch.float16, None, torch.float32), (torch.bfloat16, torch.bfloat16, torch.bfloat16), (torch.float32, torch.float64, torch.float64),
    ]:  # fmt: skip
        model = nn.Sequential(nn.Linear(8, 8)).to(base)
        st.attach(model, st.LoRA(r=2), dtype=asked)
        assert {p.dtype for p in model.slim_state.adapters["default"].parameters()} == {want}
