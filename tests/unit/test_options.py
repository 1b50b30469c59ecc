"""Options are read and checked by their types: in modules with and without `from __future__ import annotations` (this one has none)."""

import copy
import enum
import inspect
import json
import pickle
import types
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from torch import nn

import slimtune as st
from slimtune.core.options import problem, written
from slimtune.core.reference_names import ELSEWHERE, OPTIONS

FUTURE = "from __future__ import annotations\n"
SOURCE = """
import enum
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Optional, Union
import slimtune as st


class Way(enum.Enum):
    UP = "up"
    DOWN = "down"


@dataclass(frozen=True, kw_only=True)
class Made(st.Spec):
    n: int = 1
    x: float = 0.5
    on: bool = False
    word: str = "a"
    maybe: Optional[int] = None
    either: Union[int, str] = 1
    kind: Literal["a", "b", 3] = "a"
    names: list[str] = field(default_factory=list)
    row: tuple[int, ...] = ()
    pair: tuple[int, str] = (1, "a")
    where: Path = Path(".")
    table: dict[str, float] = field(default_factory=dict)
    inner: st.Spec = field(default_factory=st.LoRA)
    way: Way = Way.UP
    wide: "float | None" = None
    noted: Annotated[int, "a note"] = 1
    anything: Any = None
"""


def module(future: bool) -> Any:
    made = types.ModuleType(f"options_{future}")
    import sys

    sys.modules[made.__name__] = made  # where `get_type_hints` looks names up
    exec(compile((FUTURE if future else "") + SOURCE, made.__name__, "exec", dont_inherit=True), made.__dict__)
    return made


MADE = {"future": module(True), "plain": module(False)}
WRONG: list[tuple[str, Any]] = [
    ("n", "8"), ("n", True), ("n", 8.5), ("n", None), ("x", "1"), ("x", True), ("x", float("nan")), ("x", float("inf")), ("on", 1), ("on", "yes"),
    ("word", 1), ("word", None), ("maybe", "1"), ("either", 1.5), ("kind", "c"), ("kind", 3.0), ("kind", True), ("names", "a"), ("names", [1]),
    ("row", ["a"]), ("row", 3), ("row", "12"), ("pair", (1,)), ("pair", ("a", 1)), ("where", 3), ("table", [1]), ("table", {"a": "b"}),
    ("table", {1: 1.0}), ("table", {"a": float("nan")}), ("inner", 3), ("way", "left"), ("wide", float("-inf")), ("wide", "x"), ("noted", "x"),
]  # fmt: skip
READ: list[tuple[str, Any, Any]] = [
    ("x", 3, 3), ("names", ("a", "b"), ["a", "b"]), ("row", [1, 2], (1, 2)), ("row", range(3), (0, 1, 2)), ("row", {2, 1}, (1, 2)),
    ("pair", [1, "a"], (1, "a")), ("where", "a/b", Path("a/b")), ("table", {"a": 1}, {"a": 1}), ("inner", "ia3", st.IA3()),
    ("inner", st.IA3, st.IA3()), ("inner", {"method": "lora", "r": 2}, st.LoRA(r=2)), ("maybe", 3, 3), ("either", "a", "a"), ("kind", 3, 3),
    ("wide", None, None), ("wide", 2, 2),
]  # fmt: skip


@pytest.mark.parametrize("style", MADE)
@pytest.mark.parametrize(("name", "value"), WRONG, ids=lambda v: repr(v)[:20])
def test_a_value_of_another_type_is_named(style: str, name: str, value: Any) -> None:
    spec = MADE[style].Made(**{name: value})
    with pytest.raises(st.SpecError, match=f"{name} must be") as caught:
        spec.validate()
    assert name in caught.value.hint


@pytest.mark.parametrize("style", MADE)
@pytest.mark.parametrize(("name", "value", "want"), READ, ids=lambda v: repr(v)[:20])
def test_what_means_the_same_is_read(style: str, name: str, value: Any, want: Any) -> None:
    spec = MADE[style].Made(**{name: value})
    spec.validate()
    assert getattr(spec, name) == want
    assert type(getattr(spec, name)) is type(want)


@pytest.mark.parametrize("style", MADE)
def test_what_specs_are_used_for_works_with_every_type(style: str) -> None:
    made = MADE[style]
    spec = made.Made(names=["a"], table={"a": 1.0}, way="down", where="x")
    assert spec.way is made.Way.DOWN
    assert json.loads(json.dumps(spec.to_dict()))["way"] == "down"
    assert {spec: 1}[copy.deepcopy(spec)] == 1
    assert hash(replace(spec, table={"a": 2.0})) != hash(spec)


@pytest.mark.parametrize("name", st.methods())
def test_every_method_goes_through_json_and_is_a_key(name: str) -> None:
    spec = st.methods()[name]()
    again = st.Spec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert again == spec
    assert hash(again) == hash(spec)
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert list(inspect.signature(type(spec)).parameters) == [f.name for f in fields(spec)], "what help() shows"


@pytest.mark.parametrize(
    ("given", "field_name", "want"),
    [
        ({"targets": ["q_proj", "v_proj"]}, "targets", ("q_proj", "v_proj")),
        ({"targets": {"v_proj", "q_proj"}}, "targets", ("q_proj", "v_proj")),
        ({"targets": (t for t in ("a", "b"))}, "targets", ("a", "b")),
        ({"exclude": ["head"]}, "exclude", ("head",)),
        ({"exclude": None}, "exclude", ()),
        ({"train_modules": ["norm"]}, "train_modules", ("norm",)),
        ({"train_modules": None}, "train_modules", ()),
        ({"layers": [0, 1]}, "layers", "0-1"),
        ({"layers": 3}, "layers", "3"),
        ({"layers": range(4)}, "layers", "0-3"),
        ({"layers": (7, 0, 2, 3, 2)}, "layers", "0,2-3,7"),
        ({"layers": "last:2"}, "layers", "last:2"),
        ({"layers": None}, "layers", None),
    ],
)
def test_lists_numbers_and_ranges_where_others_take_them(given: dict[str, Any], field_name: str, want: Any) -> None:
    spec = st.LoRA(**given)
    spec.validate()
    assert getattr(spec, field_name) == want
    assert st.Spec.from_dict(spec.to_dict()) == spec


def test_numpy_numbers_are_numbers() -> None:
    import torch

    spec = st.LoRA(r=torch.tensor([4]).numpy()[0], alpha=torch.tensor([8.0]).numpy()[0])
    spec.validate()
    assert json.dumps(spec.to_dict())
    assert (spec.r, spec.alpha) == (4, 8.0)


def test_layers_given_as_numbers_act_there() -> None:
    from slimtune.testing import zoo

    report = st.attach(zoo.llama(), st.LoRA(targets=["q_proj"], layers=[0, 2]))
    assert [row.path.split(".")[2] for row in report.rows] == ["0", "2"]
    for wrong in (-1, [0, -1], [], [0.5], True, [True]):
        with pytest.raises(st.SpecError, match="layers must be block numbers" if wrong is not True else "layers must be"):
            st.LoRA(layers=wrong).validate()  # type: ignore[arg-type]


def test_a_union_takes_a_list_of_anything_that_is_a_spec() -> None:
    spec = st.Union(of=[st.LoRA(r=2), st.IA3, "bottleneck", {"method": "lora", "r": 3}])
    assert spec.of == (st.LoRA(r=2), st.IA3(), st.Bottleneck(), st.LoRA(r=3))
    assert st.DoRA(of="vera").of == st.VeRA()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_option_is_nan_or_infinite(value: float) -> None:
    with pytest.raises(st.SpecError, match="alpha must be a finite number"):
        st.attach(nn.Sequential(nn.Linear(4, 4)), st.LoRA(alpha=value))
    with pytest.raises(st.SpecError, match="alpha_pattern must be a finite number"):
        st.LoRA(alpha_pattern={"q": value}).validate()


def test_a_scale_of_zero_is_told() -> None:
    report = st.attach(nn.Sequential(nn.Linear(4, 4)), st.LoRA(alpha=0))
    assert any("learn nothing" in note for note in report.notes)
    assert not st.attach(nn.Sequential(nn.Linear(4, 4)), st.LoRA(alpha=1)).notes


@pytest.mark.parametrize(
    "annotation", [set, bytes, complex, nn.Module, object, "NoSuchThing", "list[nn.Module]", int | bytes, complex | None], ids=str
)
def test_a_type_that_cannot_be_checked_is_refused_where_the_method_is_registered(annotation: Any) -> None:
    def make() -> None:
        @st.register("odd_option")
        @dataclass(frozen=True, kw_only=True)
        class Odd(st.Spec):
            thing: annotation = None

    with pytest.raises(st.SpecError, match=r"cannot be (checked|read)") as caught:
        make()
    assert caught.value.where
    assert caught.value.hint
    assert "odd_option" not in st.methods()


def test_hints_can_be_typed() -> None:
    with pytest.raises(st.SpecError) as caught:
        st.LoRA(r=0, dropout=2.0, init="no").validate()
    values = caught.value.hint.split(" are the default")[0]
    eval(f"st.LoRA({values})").validate()  # the hint is Python that works


# ---- names from elsewhere --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("cls", "given", "hint"),
    [
        (st.LoRA, {"lora_alpha": 32}, "alpha=32"),
        (st.LoRA, {"lora_dropout": 0.1}, "dropout=0.1"),
        (st.LoRA, {"target_modules": ["q"]}, "targets=['q']"),
        (st.LoRA, {"modules_to_save": ["score"]}, "train_modules=['score']"),
        (st.LoRA, {"layers_to_transform": [0]}, "layers=[0]"),
        (st.LoRA, {"init_lora_weights": "pissa"}, "init='pissa'"),
        (st.LoRA, {"use_rslora": True}, "rank_stabilised=True"),
        (st.LoRA, {"use_dora": True}, "st.DoRA(of=st.LoRA(r=8))"),
        (st.LoRA, {"bias": "all"}, "st.BitFit()"),
        (st.LoRA, {"task_type": "SEQ_CLS"}, "leave it out"),
        (st.LoRA, {"rank": 4}, "r=4"),
        (st.LoRA, {"drpout": 0.1}, "dropout"),
        (st.PromptTuning, {"num_virtual_tokens": 8}, "tokens=8"),
        (st.PrefixTuning, {"num_virtual_tokens": 8}, "p=8"),
        (st.IA3, {"feedforward_modules": ["down"]}, "feedforward=['down']"),
        (st.IA3, {"lora_alpha": 1}, "closest"),
        (st.AdaLoRA, {"tinit": 1, "deltaT": 2}, "delta_t=2"),
        (st.VeRA, {"d_initial": 0.2}, "d_start=0.2"),
    ],
)
def test_names_of_the_reference_name_ours(cls: Any, given: dict[str, Any], hint: str) -> None:
    with pytest.raises(st.SpecError, match="has no option") as caught:
        cls(**given)
    assert hint in caught.value.hint


def test_every_name_that_a_hint_gives_is_an_option_of_some_method() -> None:
    options = {name for cls in st.methods().values() for name in inspect.signature(cls).parameters}
    assert {own for names in OPTIONS.values() for own in names} <= options
    assert not set(OPTIONS) & set(ELSEWHERE)


def test_options_are_given_by_name() -> None:
    with pytest.raises(st.SpecError, match="given by name"):
        st.LoRA(8)  # type: ignore[misc]


def test_types_are_written_as_one_writes_them() -> None:
    class Way(enum.Enum):
        UP = 1

    assert written(Annotated[tuple[int, ...] | None, "x"]) == "tuple[int, ...] | None"
    assert written(Literal["a"]) == "Literal['a']"
    assert written(Way) == "Way"
    assert written(dict[str, float], taken=True) == "Mapping[str, float]"
    assert problem("r", "8", int) == "r must be int, not '8'"
