"""Shows answers while they stream: side by side on a terminal, one below the other in a pipe, or as JSON lines."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Final, Protocol, Self

import click
from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from quantserve.text import to_json
from quantserve_bench.result import Result
from quantserve_client.figures import as_json, line
from quantserve_client.terminal import in_column, visible

NARROWEST: Final = 32
"""Columns of a terminal that an answer needs."""
REFRESH_HZ: Final = 8
FRAME: Final = 4
"""Columns of the terminal that the frame of an answer takes."""


class Display(Protocol):
    """Shows the answers to one prompt; a context manager."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    def show(self, number: int, text: str) -> None:
        """A model's answer goes on."""

    def end(self, number: int, result: Result) -> None:
        """A model's answer has ended, or failed."""


class _Quiet:
    """A display that needs no start and no end."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class JsonLines(_Quiet):
    """An object per answer, as it ends."""

    def __init__(self, models: Sequence[str], prompt: str) -> None:
        self._models = models
        self._prompt = prompt

    def show(self, number: int, text: str) -> None:
        """Nothing is shown before the end."""

    def end(self, number: int, result: Result) -> None:
        """Write the object."""
        click.echo(to_json(as_json(self._models[number], self._prompt, result)))


class Blocks(_Quiet):
    """One answer below the other; the first streams, the next ones follow when it has ended.

    Args:
        models: ids.
        prompt: shown above the answers unless it is empty.
    """

    def __init__(self, models: Sequence[str], prompt: str = "") -> None:
        self._models = models
        self._prompt = prompt
        self._current = 0
        self._held = [""] * len(models)
        self._ended = [False] * len(models)
        self._begun = False
        self._last = "\n"

    def show(self, number: int, text: str) -> None:
        """Write the text of the current answer, and keep that of the others."""
        self._held[number] += text
        if number == self._current:
            self._flush()

    def end(self, number: int, result: Result) -> None:
        """Go on with the next answer."""
        self._ended[number] = True
        if not result.events and result.ok:
            self._held[number] += result.text  # of a server that does not stream
        while self._current < len(self._models) and self._ended[self._current]:
            self._flush()
            if self._last != "\n":
                self._write("\n")
            self._current += 1
            self._begun = False
        if self._current < len(self._models):
            self._flush()

    def _flush(self) -> None:
        text, self._held[self._current] = self._held[self._current], ""
        if not self._begun and (text or self._ended[self._current]):
            self._begun = True
            if self._prompt and not self._current:
                self._write(f"> {visible(self._prompt)}\n")
            if len(self._models) > 1:
                self._write(f"== {visible(self._models[self._current])}\n")
        self._write(visible(text))

    def _write(self, text: str) -> None:
        if text:
            self._last = text[-1]
            sys.stdout.write(text)
            sys.stdout.flush()


class Columns:
    """Answers side by side while they stream; whole when all have ended.

    Args:
        out: a terminal.
        models: ids.
        prompt: shown above the answers unless it is empty.
    """

    def __init__(self, out: Console, models: Sequence[str], prompt: str = "") -> None:
        self._out = out
        self._models = models
        self._prompt = prompt
        self._texts = [""] * len(models)
        self._results: list[Result | None] = [None] * len(models)
        self._per_row = max(1, min(len(models), out.width // NARROWEST))
        self._live = Live(
            console=out,
            get_renderable=self._screen,
            refresh_per_second=REFRESH_HZ,
            transient=True,
            redirect_stdout=False,
        )

    def __enter__(self) -> Self:
        if self._prompt:
            self._out.print(f"[bold]> {escape(in_column(self._prompt))}[/]", soft_wrap=True)
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()
        self._out.print(self._grid(None))

    def show(self, number: int, text: str) -> None:
        """Add text to a column; the screen is drawn several times a second."""
        self._texts[number] += text

    def end(self, number: int, result: Result) -> None:
        """Show the figures of the answer."""
        self._results[number] = result
        if result.ok and not result.events:
            self._texts[number] = result.text

    def _screen(self) -> RenderableType:
        rows = -(-len(self._models) // self._per_row)
        return self._grid(max(1, (self._out.height - 1) // rows - 3))

    def _grid(self, height: int | None) -> RenderableType:
        parts = [self._panel(number, height) for number in range(len(self._models))]
        grids = []
        for start in range(0, len(parts), self._per_row):
            row = parts[start : start + self._per_row]
            grid = Table.grid(expand=True)
            for _ in range(self._per_row):
                grid.add_column(ratio=1)
            grid.add_row(*row, *[""] * (self._per_row - len(row)))
            grids.append(grid)
        return Group(*grids)

    def _panel(self, number: int, height: int | None) -> Panel:
        result = self._results[number]
        text = in_column(self._texts[number])
        if height is not None:
            text = "\n".join(_last_lines(text, self._out.width // self._per_row - FRAME, max(1, height - 2)))
        if result is None:
            border, below = "cyan", "..."
        elif result.failure:
            border, below = "red", f"failed: {result.failure.code}"
        else:
            border, below = "green", line(result)
        title = f"[bold]{escape(in_column(self._models[number]))}[/]"
        body = Group(Text(text, overflow="fold"), Text(below, style="dim"))
        return Panel(body, title=title, border_style=border, height=None if height is None else height + 2)


def _last_lines(text: str, width: int, height: int) -> list[str]:
    """The last lines of a text in a column; long lines are cut here, or a part of the end would be out of sight."""
    wrapped: list[str] = []
    for one in reversed(text[-width * height * 2 :].split("\n")):
        pieces, rest = [], one
        while cell_len(rest) > width:
            cut = len(rest[:width])
            while cell_len(rest[:cut]) > width:
                cut -= 1
            space = rest.rfind(" ", 1, cut + 1)
            cut = space if space > 0 else cut
            pieces.append(rest[:cut])
            rest = rest[cut:].removeprefix(" ")
        wrapped = [*pieces, rest, *wrapped]
        if len(wrapped) >= height:
            break
    return wrapped[-height:]
