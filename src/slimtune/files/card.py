"""README.md beside an adapter: a short model card, replaced by the next save unless somebody has written their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from slimtune.core.state import Adapter

_MARK = "<!-- written by slimtune; remove this line to keep your own text -->"


def is_ours(path: Path) -> bool:
    """Tell whether a card may be replaced."""
    return _MARK in path.read_text(encoding="utf-8", errors="replace")


def card(adapter: Adapter, config: dict[str, Any], parameters: int) -> str:
    """Return the text of a card; the same adapter gives the same text.

    Args:
        parameters: how many numbers the file holds.
    """
    base, spec = config["base_model_name_or_path"], adapter.spec
    shared = not config["peft_type"].startswith("SLIMTUNE_")
    head = ["---", f"library_name: {'peft' if shared else 'slimtune'}"]
    head += [f"base_model: {base}"] if base else []
    head += ["tags:", f"- {spec.method}", "- slimtune"]
    head += ["pipeline_tag: text-generation"] if config["task_type"] == "CAUSAL_LM" else []
    options = ", ".join(f"{k}={v!r}" for k, v in spec.to_dict().items() if k != "method" and v not in (None, [], {}))
    body = [
        f"# {type(spec).__name__} adapter",
        f"{parameters:,} parameters in {len(adapter.ops)} places" + (f" of {base}." if base else "."),
        f"Recipe: `{type(spec).__name__}({options})`",
        "```python\nimport slimtune as st\nst.load(model, folder)\n```" + ("\nIt is also in the layout of the peft library." if shared else ""),
    ]
    return "\n".join([*head, "---", _MARK, "", "\n\n".join(body), ""])
