"""`add_tokens:` of a recipe: new tokens for its tokenizer and model, whose rows are trained beside whatever the method trains.

They are added right after loading, before any text is tokenised, and the same way each time: a run that is opened again has the same numbers
and the same rows to start from, and its adapter holds what these rows became.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from slimtune.core.errors import RecipeError

if TYPE_CHECKING:
    from slimtune.core.spec import Spec
    from slimtune.methods.trainable_tokens import TrainableTokens
    from slimtune.train.recipe import Recipe


def token_list_problem(tokens: list[str]) -> str:
    """Return what is wrong with a list of new tokens, or nothing."""
    if any(not t.strip() for t in tokens):
        return "a token must not be empty"
    twice = [t for t in dict.fromkeys(tokens) if tokens.count(t) > 1]
    return f"named twice: {', '.join(map(repr, twice))}" if twice else ""


def extend_tokenizer(recipe: Recipe, tokenizer: Any) -> None:
    """Add a recipe's new tokens to a tokenizer.

    Raises:
        RecipeError: it has some of them.
    """
    known = set(tokenizer.get_vocab())
    if there := [t for t in recipe.add_tokens if t in known]:
        raise RecipeError(
            f"add_tokens: the tokenizer has {', '.join(map(repr, there))} already",
            where=recipe.model,
            hint="leave it out, or train its row: method: trainable_tokens with `tokens: [its number]`",
        )
    if recipe.add_tokens:
        tokenizer.add_tokens(list(recipe.add_tokens))


def extend(recipe: Recipe, model: Any, tokenizer: Any) -> TrainableTokens | None:
    """Add a recipe's new tokens to a model and its tokenizer, and return what trains their rows; None if there are none.

    Raises:
        RecipeError: the tokenizer has some of them.
        SiteError: the model's table cannot grow.
    """
    from slimtune.train.vocabulary import add_tokens

    if not recipe.add_tokens:
        return None
    extend_tokenizer(recipe, tokenizer)
    return add_tokens(model, tokenizer, recipe.add_tokens)


def beside(spec: Spec, new: TrainableTokens) -> Spec:
    """Return a spec that trains new rows as well: the same one if it trains rows, else a union."""
    from slimtune.methods.trainable_tokens import TrainableTokens
    from slimtune.methods.union import Union

    if isinstance(spec, TrainableTokens) and not spec.targets:
        own, added = set(spec.tokens or ()), set(new.tokens or ())
        return replace(spec, tokens=tuple(sorted(own | added)), head="train" if "train" in (spec.head, new.head) else "tied")
    return Union(of=(spec, new))
