"""Small, exact token operations: special tokens around a text, splitting at a boundary, shortening.

A prompt and its completion must be split where generation will split them: the prompt's tokens must be those of the prompt
alone. Where joint tokenisation would merge characters across the boundary, the parts are tokenised one by one instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from slimtune.core.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE = -100  # torch's cross-entropy leaves out labels of this value


class Encoder:
    """A tokenizer with the few operations that building examples needs.

    Attributes:
        prefix, suffix: ids of the special tokens that the tokenizer puts before and after a text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        plain = self.plain(["a"])[0]
        whole = list(tokenizer("a", add_special_tokens=True)["input_ids"])
        at = next((i for i in range(len(whole) - len(plain) + 1) if whole[i : i + len(plain)] == plain), None)
        self.prefix: list[int] = [] if at is None else whole[:at]
        self.suffix: list[int] = [] if at is None else whole[at + len(plain) :]

    def plain(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, without special tokens around it."""
        if not texts:
            return []
        return [list(ids) for ids in self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]]

    def begin(self, ids: list[int]) -> list[int]:
        """Return the ids with the special tokens in front that a text starts with, unless it brings them itself ("<s>[INST] ...")."""
        return ids if ids[: len(self.prefix)] == self.prefix else self.prefix + ids

    def finish(self, ids: list[int]) -> list[int]:
        """Return the ids with the end-of-text token behind them, unless they end with it already."""
        end = self.tokenizer.eos_token_id
        return ids if end is None or ids[-1:] == [end] else [*ids, end]

    def parts(self, segments: Sequence[str]) -> list[list[int]]:
        """Return the ids of each consecutive piece of one text, such that every beginning of it is tokenised as if alone.

        Raises:
            DataError: this tokenizer cannot split the text there without changing it.
        """
        ends, text = [], ""
        for segment in segments:
            text += segment
            ends.append(len(text))
        starts = self.plain([text[:end] for end in ends])
        whole = starts[-1]
        if all(whole[: len(ids)] == ids for ids in starts):
            return [ids[len(before) :] for before, ids in zip([[], *starts[:-1]], starts, strict=True)]
        # Characters on both sides of a boundary make one token together: "\n" and "\n" in the vocabulary of most models.
        pieces = self.plain(segments)
        if self._text([i for ids in pieces for i in ids]) == self._text(whole):
            return pieces
        raise DataError(
            "this tokenizer joins the end of a prompt and the start of its answer into one token",
            where=repr(text[-80:]),
            hint="end the prompt with a line break, or start the completion with a space",
        )

    def shorten(self, text: str, length: int, keep: str) -> str:
        """Return a text cut to about `length` tokens.

        Args:
            text: the text.
            length: tokens to keep.
            keep: "head" its start, "tail" its end, "ends" both, with the middle left out.
        """
        if length <= 0:
            return ""
        if keep == "ends":
            half = max((length - 3) // 2, 1)  # three tokens for the sign that something is missing
            return f"{self.shorten(text, half, 'head')} ... {self.shorten(text, half, 'tail')}"
        if not self.tokenizer.is_fast:
            ids = self.plain([text])[0]
            return self._text(ids[:length] if keep == "head" else ids[-length:])
        offsets = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
        if len(offsets) <= length:
            return text
        return text[: offsets[length - 1][1]] if keep == "head" else text[offsets[-length][0] :]

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
