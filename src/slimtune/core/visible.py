"""Text of files and people as it may be shown: what would steer a terminal or turn the order of signs around is written out."""

from __future__ import annotations

import re

# Control characters but tab and newline; marks that change the direction of what follows; separators that end a line.
_STEERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    r"""Return a text with its steering characters written as escapes.

    Example:
        >>> visible("a\x1b[2Jb")
        'a\\x1b[2Jb'
    """
    return _STEERS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
