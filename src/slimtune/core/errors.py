"""The one exception tree: every error says what happened, where, and what to type instead.

Users catch `SlimtuneError`; the command line prints it without a traceback and exits with code 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SlimtuneError(Exception):
    """Base of every error slimtune raises on purpose.

    Args:
        what: one sentence: what happened.
        where: the thing it happened to: a module path with class and shape, a file, a recipe line.
        hint: what to do or type instead.
    """

    def __init__(self, what: str, *, where: str = "", hint: str = "") -> None:
        super().__init__(what, where, hint)
        self.what, self.where, self.hint = what, where, hint

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.hint:
            lines.append(f"  hint:  {self.hint}")
        return "\n".join(lines)

    def __reduce__(self):  # type: ignore[no-untyped-def]  # keyword-only arguments need their own pickle recipe (worker processes)
        return _rebuild, (type(self), self.what, self.where, self.hint)


def _rebuild(cls: type[SlimtuneError], what: str, where: str, hint: str) -> SlimtuneError:
    return cls(what, where=where, hint=hint)


class SpecError(SlimtuneError, ValueError):
    """A method's hyper-parameters are wrong, or do not fit a site."""


class TargetError(SlimtuneError, ValueError):
    """A target pattern matches nothing, or matches modules that cannot be adapted."""


class SiteError(SlimtuneError, TypeError):
    """A module cannot carry this kind of op."""


class NameInUse(SlimtuneError, ValueError):
    """An adapter of this name exists already."""


class InvalidName(SlimtuneError, ValueError):
    """No adapter can have this name."""


class NoSuchAdapter(SlimtuneError, KeyError):
    """No adapter of this name is attached."""

    __str__ = SlimtuneError.__str__  # KeyError would print the repr of the arguments


class PlanError(SlimtuneError, ValueError):
    """A plan (which adapter acts on which rows) cannot be carried out on this input."""


class CapabilityError(SlimtuneError, NotImplementedError):
    """The method cannot do this, for a mathematical reason that the message names."""


class InternalsError(SlimtuneError, RuntimeError):
    """A library, or a model of it, behaves otherwise than slimtune assumes: what it would compute cannot be trusted."""


class MergeError(SlimtuneError, RuntimeError):
    """Merging or unmerging is not possible in the model's present state."""


class FileError(SlimtuneError, OSError):
    """An adapter file cannot be read or written."""

    __str__ = SlimtuneError.__str__


class FormatError(FileError):
    """The file is damaged, hostile, or not of a format that slimtune reads."""


class MismatchError(FileError):
    """The file is sound but does not fit: another base, other shapes, missing or unexpected tensors."""


class RecipeError(SlimtuneError, ValueError):
    """A recipe is wrong; `problems` lists every problem found, each with its own line."""

    def __init__(self, what: str, *, where: str = "", hint: str = "", problems: Iterable[str] = ()) -> None:
        super().__init__(what, where=where, hint=hint)
        self.problems = list(problems)

    def __str__(self) -> str:
        return "\n".join([super().__str__(), *(f"  - {p}" for p in self.problems)])

    def __reduce__(self):  # type: ignore[no-untyped-def]
        return _rebuild_recipe, (self.what, self.where, self.hint, self.problems)


def _rebuild_recipe(what: str, where: str, hint: str, problems: list[str]) -> RecipeError:
    return RecipeError(what, where=where, hint=hint, problems=problems)


class ReportError(SlimtuneError, AttributeError):
    """A report was taken for the model it is about, or has nothing of this name."""


class DataError(SlimtuneError, ValueError):
    """Training or evaluation data is missing, empty, or not of a known shape."""


def closest(word: str, options: Iterable[str], n: int = 3) -> str:
    """Return the `n` options most like `word`, ready to put into a hint."""
    options = list(options)
    found = difflib.get_close_matches(word, options, n=n, cutoff=0.4)
    return ", ".join(found or options[:n])
