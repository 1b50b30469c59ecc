"""Every method is one file here; `slimtune.core.registry` finds them."""
