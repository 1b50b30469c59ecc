"""`st.adapters(model)`: what a model carries, live, without a look behind the curtain."""

import pytest
import torch
from torch import nn

import slimtune as st
from slimtune.testing import zoo


def test_a_view_says_what_an_adapter_is() -> None:
    model = zoo.llama()
    spec = st.LoRA(r=2, targets=["q_proj", "v_proj"])
    report = st.attach(model, spec, name="a")
    view = st.adapters(model)["a"]
    assert (view.name, view.spec) == ("a", spec)
    assert view.modules == tuple(row.path for row in report.rows)
    assert view.count == view.trainable_count == report.trainable == sum(p.numel() for p in view.parameters())
    assert view.bytes == report.bytes
    assert (view.active, view.trainable, view.merged) == (True, True, False)
    assert {type(op).__name__ for op in view.ops.values()} == {"LoRAOp"}
    names = dict(view.named_parameters())
    assert "model.layers.0.self_attn.q_proj.weight.A" in names
    assert "'a'" in repr(view)
    assert "active" in repr(view)


def test_the_mapping_follows_the_model() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    views = st.adapters(model)
    assert (len(views), list(views), "a" in views) == (0, [], False)
    st.attach(model, st.LoRA(r=1), name="a")
    st.attach(model, st.LoRA(r=2), name="b")
    assert list(views) == ["a", "b"]
    assert [v.count for v in views.values()] == [8, 16]
    a, b = views["a"], views["b"]
    assert (a.active, b.active, a.trainable, b.trainable) == (False, True, False, True)
    with st.use(model, {"a": 0.5, "b": 0.5}):
        assert a.active
        assert b.active
    st.use(model, "a")
    assert (a.active, b.active, a.trainable, a.trainable_count, b.trainable_count) == (True, False, True, 8, 0)
    st.merge(model, "a")
    assert (a.merged, a.active, b.merged) == (True, True, False)
    st.unmerge(model)
    assert not a.merged
    st.detach(model, "a")
    assert list(views) == ["b"]
    with pytest.raises(st.NoSuchAdapter, match="'a'"):
        views["a"]
    st.detach(model, "b")
    assert not views


def test_nothing_can_be_changed_through_it() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    st.attach(model, st.LoRA(r=1), name="a")
    views = st.adapters(model)
    with pytest.raises(TypeError):
        views["b"] = views["a"]  # type: ignore[index]
    with pytest.raises(TypeError):
        views["a"].ops["x"] = 1  # type: ignore[index]
    with pytest.raises(AttributeError):
        views["a"].name = "c"  # type: ignore[misc]


def test_shared_parameters_count_once() -> None:
    model = zoo.llama()
    st.attach(model, st.PrefixTuning(p=2, hidden=4), name="p")
    view = st.adapters(model)["p"]
    params = list(view.parameters())
    assert len({id(p) for p in params}) == len(params)
    assert view.count == st.report(model, "p").trainable


def test_compiled_and_wrapped_models_show_theirs() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    st.attach(model, st.LoRA(r=1), name="a")
    assert list(st.adapters(torch.compile(model))) == ["a"]
