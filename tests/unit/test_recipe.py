"""Recipes: defaults, overrides, all problems at once with their lines, round trip, schema."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small import jsonl, reviews

from slimtune.core.errors import RecipeError
from slimtune.train.load_recipe import load_recipe
from slimtune.train.method_options import build_spec, recipe_schema
from slimtune.train.recipe import Recipe
from slimtune.train.yaml_text import dump_value, parse_flat, parse_override


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    jsonl(tmp_path / "rows.jsonl", reviews())
    return tmp_path


def write(folder: Path, text: str = "", name: str = "r.yaml") -> Path:
    path = folder / name
    path.write_text("model: org/model\ndata: rows.jsonl\n" + text)
    return path


def problems(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return caught.value.problems


def test_two_lines_are_a_recipe(folder: Path) -> None:
    recipe = load_recipe(write(folder))
    assert (recipe.method, recipe.lr, recipe.epochs, recipe.name) == ("lora", 5e-4, 3.0, "r")
    assert recipe.data == str(folder / "rows.jsonl")
    assert recipe.out == str(folder / "runs/r")


def test_full_has_its_own_learning_rate(folder: Path) -> None:
    recipe = load_recipe(write(folder, "method: full\n"))
    assert recipe.lr == 2e-5
    assert build_spec(recipe, "causal_lm") is None


def test_options_of_the_method_become_its_spec(folder: Path) -> None:
    recipe = load_recipe(write(folder, "r: 4\nalpha: 16\ntargets: [q_proj, v_proj]\n"), ["layers=last:2"])
    spec = build_spec(recipe, "causal_lm")
    assert spec is not None
    assert spec.to_dict() | {"r": 4, "alpha": 16, "targets": ["q_proj", "v_proj"], "layers": "last:2"} == spec.to_dict()


def test_a_classifier_trains_its_head_unless_told_otherwise(folder: Path) -> None:
    spec = build_spec(load_recipe(write(folder)), "classification")
    assert spec is not None
    assert spec.train_modules == "auto"  # decided where it is attached: see test_task_head
    other = build_spec(load_recipe(write(folder, "train_modules: score\n")), "classification")
    assert other is not None
    assert other.train_modules == "score"


def test_the_prefix_names_an_option_too(folder: Path) -> None:
    assert load_recipe(write(folder, "method_r: 3\n")).options == {"r": 3}


def test_a_recipe_may_name_a_union(folder: Path) -> None:
    text = (
        "method: union\nof:\n  - method: lora\n    r: 4\n    targets: [q_proj, v_proj]\n  - {method: gated, of: {method: ia3}}\n"
        "  - bottleneck\nlayers: last:2\n"
    )
    recipe = load_recipe(write(folder, text))
    spec = build_spec(recipe, "causal_lm")
    assert str(spec) == "Union(layers='last:2', of=(LoRA(targets=('q_proj', 'v_proj'), r=4), Gated(of=IA3()), Bottleneck()))"
    again = load_recipe(write(folder, recipe.dump().split("# --- method ---")[1].split("# --- data ---")[0], "again.yaml"))
    assert build_spec(again, "causal_lm") == spec
    head = build_spec(recipe, "classification")
    assert head is not None
    assert [part.method for part in head.with_heads(("score",)).parts()] == ["lora", "dense", "gated", "bottleneck"]
    mam = build_spec(load_recipe(write(folder, "method: mam\n")), "causal_lm")
    assert mam is not None
    assert [part.method for part in mam.parts()] == ["prefix_tuning", "parallel"]


def test_problems_inside_a_union_have_its_line(folder: Path) -> None:
    text = "method: union\nof:\n  - {method: lora, r: 0}\n  - {method: lorra}\n"
    (only,) = problems(write(folder, text))
    assert only.startswith("line 4: of: ")
    assert "r must be at least 1" in only
    (only,) = problems(write(folder, "method: union\nof: [{method: lora, rank: 3}]\n"))
    assert "'rank' is not an option of lora" in only
    (only,) = problems(write(folder, "method: union\nof: []\n"))
    assert "is empty" in only
    (only,) = problems(write(folder, "method: union\nof: [3]\n"))
    assert only.startswith("line 4: of must be tuple[Spec, ...]")
    (only,) = problems(write(folder, "method: dora\nof: {method: lora, r: x}\n"))
    assert only.startswith("line 4: of: ")


def test_overrides_win_and_an_empty_one_means_the_default(folder: Path) -> None:
    recipe = load_recipe(write(folder, "lr: 1e-3\nr: 4\nbatch_size: 2\n"), ["lr=2e-4", "r=", "batch_size="])
    assert (recipe.lr, recipe.options, recipe.batch_size) == (2e-4, {}, 8)


def test_an_override_of_a_text_needs_no_quotes(folder: Path) -> None:
    recipe = load_recipe(write(folder), ["prompt_template=Review: {text} =", "name=7"])
    assert recipe.prompt_template == "Review: {text} ="
    assert recipe.name == "7"


def test_paths_start_from_the_recipe_and_those_of_overrides_from_here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = folder / "here"
    here.mkdir()
    jsonl(here / "mine.jsonl", reviews())
    monkeypatch.chdir(here)
    recipe = load_recipe(write(folder, "out: there\n"), ["data=mine.jsonl", "test_file=mine.jsonl"])
    assert (recipe.data, recipe.test_file, recipe.out) == (str(here / "mine.jsonl"), str(here / "mine.jsonl"), str(folder / "there"))


def test_every_problem_is_told_at_once_in_the_order_of_the_lines(folder: Path) -> None:
    path = folder / "bad.yaml"
    path.write_text("model: ./nope\nlearning_rate: 1\nbatch_size: -1\nepochs: true\ndtype: bf16\nr: 0.5\ndata: gone.jsonl\nlr: 1\nlr: 2\n")
    found = problems(path, "seed=x", "nonsense")
    expected = [
        ("line 1", "there is no file or folder"), ("line 2", "did you mean `lr`"), ("line 3", "at least 1"), ("line 4", "a number"),
        ("line 5", "bfloat16"), ("line 6", "r must be int"), ("line 7", "rows.jsonl"), ("line 9", "twice"),
        ("override", "key=value"), ("override seed", "a number"),
    ]  # fmt: skip
    assert len(found) == len(expected), found
    for line, (start, part) in zip(found, expected, strict=True):
        assert line.startswith(start)
        assert part in line


def test_an_unknown_key_gets_the_nearest_name(folder: Path) -> None:
    assert problems(write(folder, "bach_size: 3\n")) == ["line 3: unknown key `bach_size`; did you mean `batch_size`?"]
    assert problems(write(folder, "alhpa: 3\n")) == ["line 3: unknown key `alhpa`; did you mean `alpha`?"]
    assert problems(write(folder, "output_dir: x\n")) == ["line 3: unknown key `output_dir`; did you mean `out`?"]


def test_an_option_of_another_method_says_whose_it_is(folder: Path) -> None:
    (found,) = problems(write(folder, "method: bitfit\nalpha: 3\n"))
    assert "is an option of" in found
    assert " lora" in found
    assert "bitfit does not take it" in found


def test_values_a_method_refuses_carry_their_line(folder: Path) -> None:
    assert problems(write(folder, "seed: 1\nr: 0\ninit: nonsense\n"))[0].startswith("line 4: r ")


def test_the_dump_reads_back_the_same(folder: Path) -> None:
    text = 'r: 3\nmethod: lora\ntargets: ["q_proj"]\nmax_steps: 5\nprompt_template: "a: {text}\\n\\n#\'"\nlr: 1e-30\nname: on\n'
    recipe = load_recipe(write(folder, text))
    again = folder / "again.yaml"
    again.write_text(recipe.dump())
    assert load_recipe(again) == recipe
    for section in ("model", "method", "data", "train", "output"):
        assert f"# --- {section} ---" in recipe.dump()


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.text(), st.integers(), st.floats(allow_nan=False), st.booleans(), st.none(), st.lists(st.text(max_size=9), max_size=4)))
def test_any_value_survives_yaml(value: object) -> None:
    try:
        text = dump_value(value)
        entries, wrong = parse_flat(f"key: {text}\n")
    except UnicodeEncodeError:
        return  # lone surrogates are no text
    if wrong:  # control characters cannot stand in YAML at all: an error, but never another value
        assert "not valid YAML" in wrong[0]
        return
    assert entries["key"].value == value


def test_scalars_are_what_people_mean() -> None:
    entries, _ = parse_flat("a: 1e-3\nb: no\nc: 007\nd: 12:30\ne: True\nf:\n")
    assert [e.value for e in entries.values()] == [1e-3, "no", 7, "12:30", True, None]
    assert parse_override("a=[1, x]")[1].value == [1, "x"]  # type: ignore[union-attr]


def test_yaml_cannot_make_objects() -> None:
    entries, wrong = parse_flat("a: !!python/object/apply:os.system [true]\n")
    assert not entries
    assert "not valid YAML" in wrong[0]


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=200))
def test_no_text_crashes_the_parser(text: str) -> None:
    parse_flat(text)
    parse_override(text)


def test_the_schema_names_every_key_and_option() -> None:
    schema = recipe_schema()
    assert set(Recipe.model_fields) - {"options"} <= set(schema["properties"])
    assert {"r", "targets", "alpha"} <= set(schema["properties"])
    assert schema["additionalProperties"] is False
    json.dumps(schema)


def test_unreadable_recipes_say_so(tmp_path: Path) -> None:
    (tmp_path / "near.yaml").write_text("")
    with pytest.raises(RecipeError, match=r"near\.yaml"):
        load_recipe(tmp_path / "neer.yaml")
    with pytest.raises(RecipeError, match="folder"):
        load_recipe(tmp_path)
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="UTF-8"):
        load_recipe(tmp_path / "b.yaml")
    assert "empty" in problems(tmp_path / "near.yaml")[0]
