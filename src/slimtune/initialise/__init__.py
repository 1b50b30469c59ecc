"""How a LoRA's A and B start. Each initialiser is one function (op, site, spec) -> None that leaves the base untouched:

where A and B start away from zero, the op keeps a frozen copy of them that is subtracted, so the output is that of the base.
"""

from __future__ import annotations

from slimtune.initialise import loftq, spectral
from slimtune.initialise.free import INITS, Initialiser, init_problems, initialise, initialiser

__all__ = ["INITS", "Initialiser", "init_problems", "initialise", "initialiser", "loftq", "spectral"]
