"""How a LoRA's A and B start. Each initialiser is one function (op, site, spec) -> None that leaves the base untouched:

where A and B start away from zero, the op keeps a frozen copy of them that is subtracted, so the output is that of the base.
Those that look at the user's data first are in `STUDIES`: (model, sites, batches, spec) -> A and B of every site.
"""

from __future__ import annotations

from slimtune.initialise import corda, eva, loftq, lora_ga, spectral
from slimtune.initialise.free import INITS, Initialiser, init_problems, initialise, initialiser
from slimtune.initialise.study import STUDIES, study

__all__ = [
    "INITS", "STUDIES", "Initialiser", "corda", "eva", "init_problems", "initialise", "initialiser", "loftq", "lora_ga", "spectral", "study",
]  # fmt: skip
