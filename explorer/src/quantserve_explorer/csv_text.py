"""Votes as CSV that a spreadsheet can open without running anything."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Final

from quantserve_explorer.ballot import Vote

COLUMNS: Final = ("time", "winner", "winner_method", "models", "methods", "blind", "prompt")
_FORMULA: Final = ("=", "+", "-", "@", "\t", "\r", "\n", "|", "%")


def cells(vote: Vote) -> list[str]:
    """The cells of one row."""
    method = "" if vote.winner is None else vote.methods[vote.models.index(vote.winner)]
    return [
        datetime.fromtimestamp(vote.time, UTC).isoformat(timespec="seconds"),
        vote.winner or "",
        method,
        " ".join(vote.models),
        " ".join(vote.methods),
        str(vote.blind).lower(),
        vote.prompt or "",
    ]


def rows(lines: Iterable[Sequence[str]]) -> bytes:
    """Rows as CSV, UTF-8; a cell that a spreadsheet would take for a formula begins with ``'``."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows([_plain(cell) for cell in line] for line in lines)
    return text.getvalue().encode()


def _plain(cell: str) -> str:
    return f"'{cell}" if cell.lstrip(" \u00a0\ufeff").startswith(_FORMULA) else cell
