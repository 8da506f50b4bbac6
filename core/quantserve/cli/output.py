"""Tables and findings for people, JSON for machines."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

import click
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.markup import escape
from rich.padding import Padding
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from quantserve.errors import UsageError
from quantserve.finding import Finding, Severity
from quantserve.target import Target, gib
from quantserve.text import escaped, to_json

COLOURS = {Severity.ERROR: "red", Severity.WARNING: "yellow", Severity.INFO: "cyan"}
OFFENDERS_SHOWN = 9  # eight, and how many more there are, as the checks name them
WIDTH_WITHOUT_TERMINAL = 120
WIDEST = 1_000
LONGEST_WORD = 16
"""Characters of a word that a narrow column keeps whole."""


class _Console(Console):
    """A console whose text cannot command the terminal, whatever names are in it; colours are rich's own."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Rich's segments, escaped."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=escaped(segment.text, "\n"))


def console(*, stderr: bool = False) -> Console:
    """A console that keeps a readable width when the output is a pipe or a file."""
    return _Console(stderr=stderr, width=_width(sys.stderr if stderr else sys.stdout), highlight=False)


def _width(stream: TextIO) -> int:
    """Columns of the output: ``COLUMNS``, else the terminal's, else 120; a terminal without a size has 0."""
    columns = os.environ.get("COLUMNS", "")
    width = int(columns) if columns.isdecimal() and len(columns) < 9 else 0
    if not width and stream.isatty():
        with suppress(OSError, ValueError):
            width = os.get_terminal_size(stream.fileno()).columns
    return min(width, WIDEST) or WIDTH_WITHOUT_TERMINAL


def must_be_writable(path: Path) -> None:
    """Before long work: refuse a file that cannot be made.

    Raises:
        UsageError: it is a folder, or its folder does not exist or cannot be written into.
    """
    folder = path.absolute().parent
    if path.is_dir():
        raise UsageError(f"cannot write {path}: it is a folder\n  fix: name a file in it")
    if not folder.is_dir():
        raise UsageError(f"cannot write {path}: {folder} is no folder\n  fix: make it first, or name another file")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise UsageError(f"cannot write {path}: permission denied\n  fix: name another file")


def write_file(path: Path, text: str) -> None:
    """Write a file.

    Raises:
        UsageError: it cannot be written.
    """
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}\n  fix: name another file") from None


def print_json(value: object) -> None:
    """Write JSON to stdout."""
    click.echo(to_json(value, indent=2))


class _Table(Table):
    """A table that becomes a block of lines for each row where it cannot be read: the output is too narrow.

    Args:
        cells: header and rows.
        narrowest: columns of the output that it needs.
    """

    def __init__(self, cells: Sequence[Sequence[str]], narrowest: int, **style: Any) -> None:
        super().__init__(**style)
        self._cells, self._narrowest = cells, narrowest

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if options.max_width >= self._narrowest:
            yield from super().__rich_console__(console, options)
            return
        if self.title:
            yield Text.from_markup(str(self.title), style="bold")
        header, *rows = self._cells
        for first, *others in rows:
            yield Text.from_markup(first, style="bold", overflow="fold")
            lines = Table.grid(padding=(0, 2, 0, 0), pad_edge=False)
            lines.add_column(style="dim", overflow="fold")
            lines.add_column(overflow="fold")
            for name, cell in zip(header[1:], others, strict=True):
                lines.add_row(name, cell)
            yield Padding(lines, (0, 0, 0, 2), expand=False)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], wrap: Sequence[str] = ()) -> Table:
    """A table whose cells may hold rich markup (escape what comes from outside).

    Where the output is too narrow the columns of `wrap` give way, all of them when it is empty, as far as their words
    stay whole. Where that is not enough, each row is a block of lines.
    """
    cells = [columns, *(list(row) for row in rows)]
    widths = []
    for column, *values in zip(*cells, strict=True):
        texts = [Text.from_markup(value).plain for value in (column, *values)]
        words = [word for text in texts for word in text.split()]
        least = min(LONGEST_WORD, max(map(cell_len, words), default=0))
        whole = max(cell_len(line) for text in texts for line in text.splitlines() or [""])
        widths.append(whole if wrap and column not in wrap else least)
    style = {"title": title, "title_justify": "left", "title_style": "bold", "header_style": "bold"}
    result = _Table(cells, sum(widths) + 3 * len(columns) + 1, **style)
    for column, width in zip(columns, widths, strict=True):
        result.add_column(column, overflow="fold", no_wrap=bool(wrap) and column not in wrap, min_width=width)
    for row in cells[1:]:
        result.add_row(*row)
    return result


def print_findings(out: Console, findings: Iterable[Finding]) -> None:
    """Print each finding with its offenders and its fix, what refuses the model first."""
    for finding in sorted(findings, key=lambda finding: list(Severity).index(finding.severity)):
        colour = COLOURS[finding.severity]
        out.print(
            f"  [{colour}]{finding.severity.value:7}[/] [bold]{escape(finding.code)}[/] "
            f"[dim]({escape(finding.source)})[/] {escape(finding.message)}"
        )
        for offender in finding.offenders[:OFFENDERS_SHOWN]:
            out.print(f"            - {escape(offender)}", soft_wrap=True)
        if len(finding.offenders) > OFFENDERS_SHOWN:
            out.print(f"            ... and {len(finding.offenders) - OFFENDERS_SHOWN} more")
        if finding.fix:
            out.print(f"          [green]fix[/] {escape(finding.fix)}")


def kv_cache(memory: Mapping[str, Any]) -> str:
    """What the KV cache of a memory estimate (as JSON) holds: sequences of full length, or tokens."""
    if not memory["kv_bytes_per_token"]:
        return "unknown"
    if not memory["max_model_len"]:
        return f"{memory['kv_tokens']:,} tokens"
    sequences = memory["sequences"]
    count = f"{sequences:.1f}" if sequences < 10 else f"{int(sequences):,}"
    return f"{count} x {memory['max_model_len']:,} tokens"


def target_label(target: Target) -> str:
    """A target for a heading: its name, device type and memory."""
    device = "" if target.device == target.name else f" {target.device}"
    return f"{target} ({gib(target.memory_bytes)}{device})"
