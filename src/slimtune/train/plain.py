"""Text of others (data, keys, templates, a model's words) made safe to show: nothing in it moves the cursor or turns the line around."""

from __future__ import annotations


def plain(text: object) -> str:
    """Return a text on one line, with control and direction characters written out: \\x1b, \\n, \\u202e."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def plain_lines(text: object) -> str:
    """Return a text with its line breaks and tabs, and all other control and direction characters written out."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in str(text))
