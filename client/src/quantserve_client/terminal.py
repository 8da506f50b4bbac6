"""Text of models on a terminal: nothing in it may command the terminal."""

from __future__ import annotations

import sys
from typing import Final

from quantserve.text import escaped

EMOJI: Final = "\u200d\ufe0f"
"""Parts of emoji, which are not visible by themselves and harmless."""


def visible(text: str) -> str:
    """`text` with control codes written out; line ends, tabs and emoji stay."""
    return escaped(text.replace("\r\n", "\n"), "\n\t" + EMOJI)


def in_column(text: str) -> str:
    """The same with known widths: tabs become spaces, and emoji their parts."""
    without = text.translate(dict.fromkeys(map(ord, EMOJI)))
    return escaped(without.replace("\r\n", "\n").expandtabs(4), "\n")


def write(text: str) -> None:
    """Write text of a model to stdout at once."""
    sys.stdout.write(visible(text))
    sys.stdout.flush()
