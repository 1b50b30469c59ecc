"""slimtune adapts large frozen models by training a sliver of their parameters.

    import slimtune as st
    report = st.attach(model, st.LoRA(r=16), name="support")
    ...train...
    st.save(model, "out/support", name="support")
"""

from slimtune.algebra.merge import merge, unmerge
from slimtune.core import registry
from slimtune.core.attach import attach, detach, disabled, keep_plan, param_groups, report, trainable, use
from slimtune.core.errors import SlimtuneError
from slimtune.core.spec import Spec
from slimtune.files.adapter import load, save
from slimtune.methods.bitfit import BitFit
from slimtune.methods.bottleneck import Bottleneck
from slimtune.methods.dense import Dense
from slimtune.methods.lora import LoRA
from slimtune.savers import lean, unlean
from slimtune.version import __version__

methods, register = registry.methods, registry.register  # bound last: importing the package slimtune.methods takes the name

__all__ = [
    "BitFit",
    "Bottleneck",
    "Dense",
    "LoRA",
    "SlimtuneError",
    "Spec",
    "__version__",
    "attach",
    "detach",
    "disabled",
    "keep_plan",
    "lean",
    "load",
    "merge",
    "methods",
    "param_groups",
    "register",
    "report",
    "save",
    "trainable",
    "unlean",
    "unmerge",
    "use",
]
