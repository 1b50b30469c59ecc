"""Calls of the public verbs that Python itself would refuse: the error shows the call to type, with what was given in it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

from slimtune.core.errors import SpecError, closest
from slimtune.core.reference_names import ARGUMENTS

P = ParamSpec("P")
R = TypeVar("R")


def shows(example: str | Callable[[tuple[Any, ...], dict[str, Any]], str]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Have a call that does not fit a verb's signature raise a SpecError with the call to type.

    Args:
        example: that call; or a function of what was given, which returns it.
    """

    def around(verb: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(verb)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return verb(*args, **kwargs)
            except TypeError:
                wrong = _misfit(verb, args, kwargs)
                if not wrong:
                    raise  # of something inside
            name = getattr(verb, "__name__", "")
            typed = example if isinstance(example, str) else example(args, kwargs)
            parameters = inspect.signature(verb).parameters
            unknown = [key for key in kwargs if key not in parameters]
            known = [f"{key}= is called {own}= here" for key in unknown if (own := _own(key, list(parameters)))]
            raise SpecError(f"{name}: {wrong}", where=f"st.{name}(...)", hint="; ".join([typed, *known])) from None

        return call

    return around


def _misfit(verb: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    try:
        inspect.signature(verb).bind(*args, **kwargs)
    except TypeError as error:
        return str(error)
    return ""


def _own(key: str, parameters: list[str]) -> str:
    return next((own for own in ARGUMENTS.get(key, ()) if own in parameters), "") or next(
        (own for own in closest(key, parameters, n=1).split(", ") if own[:3] == key[:3]), ""
    )


def combining(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Return the call of `combine` that was meant by lists of names and of weights."""
    names, weights = (*args[1:3], None, None)[:2]
    names, weights = names or kwargs.get("adapters"), weights or kwargs.get("weights")
    if isinstance(names, Mapping):
        named = dict(names)
    elif isinstance(names, (list, tuple)):
        shares = weights if isinstance(weights, (list, tuple)) and len(weights) == len(names) else [1.0] * len(names)
        named = dict(zip(names, shares, strict=True))
    else:
        named = {"a": 0.7, "b": 0.3}
    new = args[3] if len(args) > 3 else kwargs.get("name", kwargs.get("adapter_name", "mix"))
    how = kwargs.get("how", kwargs.get("method", kwargs.get("combination_type")))
    return f"st.combine(model, {named!r}, name={new!r}{f', how={how!r}' if how is not None else ''})"
