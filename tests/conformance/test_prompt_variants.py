"""Options of the methods with virtual tokens pass the suite on whole models, as their defaults do."""

import pytest
from compiled import run_compiled

import slimtune as st
from slimtune.testing import Check, checks
from slimtune.testing.cases import case

VARIANTS = {
    "LSTM": (st.PTuning(tokens=3, encoder="lstm", hidden=5), ("Llama",)),
    "ranks": (st.MultitaskPromptTuning(tokens=3, r=2, init="vocab"), ("BERT",)),
    "text": (st.PromptTuning(tokens=3, init="text", init_text=(3, 4)), ("Llama",)),
    "both stacks": (st.PromptTuning(tokens=3, decoder=True), ("T5",)),
    "both stacks, tasks": (st.MultitaskPromptTuning(tokens=3, decoder=True), ("T5",)),
}
ALL = [
    Check(label, c.subject, c.name, c.run) for label, (spec, places) in VARIANTS.items() for c in checks(spec, cases=[case(p) for p in places])
]


@pytest.mark.parametrize("check", ALL, ids=str)
def test_variant(check: Check) -> None:
    check()


@pytest.mark.slow
@pytest.mark.parametrize("where", ["Llama", "BERT", "T5"])
@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning", "multitask_prompt_tuning"])
def test_virtual_tokens_compile(method: str, where: str) -> None:
    run_compiled(checks(method, cases=[case(where)], compile_all=True))
