"""What the command lines of the benchmarks share: results written whole, drawn anew with `--render`, an orderly end."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.console import BenchError, say, shown

Found = dict[str, Any]
"""What results.json holds."""


def write(path: Path, text: str) -> None:
    """Write a file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".part")
    draft.write_text(text)
    draft.replace(path)


def run(
    name: str,
    options: argparse.Namespace,
    measure: Callable[[], Found],
    table: Callable[[Found], str],
    plot: Callable[[Found, Path], Iterable[Path]],
    interrupted: str,
) -> int:
    """Measure, or with ``options.render`` read what was measured, into ``options.out``; returns the exit code.

    Args:
        name: of the benchmark, before messages.
        measure: returns what results.json holds, which it writes itself as it goes.
        table: the results in Markdown.
        plot: draws them into a folder; returns the files.
        interrupted: what is left after Ctrl-C, or after SIGTERM, which acts like it.
    """
    options.out = options.out.resolve()
    signal.signal(signal.SIGTERM, _interrupt)
    results = options.out / "results.json"
    try:
        if not options.render:
            found = measure()
        elif results.is_file():
            found = json.loads(results.read_text())
        else:
            raise BenchError(f"{shown(results)} does not exist; measure first")
        text = table(found)
        write(options.out / "table.md", text)
        print(text)
        try:
            drawn = list(plot(found, options.out))
        except report.PlotError as error:
            say(f"no plots: {error}")
            drawn = []
        say(f"written: {', '.join(shown(path) for path in (results, options.out / 'table.md', *drawn))}")
    except BenchError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted, {interrupted}", file=sys.stderr)
        return 130
    return 0


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
