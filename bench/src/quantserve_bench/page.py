"""The report as one self-contained HTML file."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any, Final

from quantserve import __version__
from quantserve_bench import markdown
from quantserve_bench.metrics import TOTALS
from quantserve_bench.plots import FIX, Plot, can_plot
from quantserve_bench.session import Measurement

CSS: Final = """
:root { color-scheme: light; --ink: #222; --quiet: #666; --line: #ddd; --good: #00703c; --bad: #b3261e; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin: 0; }
h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; }
ul.conditions { color: var(--quiet); padding-left: 1.2rem; margin: .5rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .4rem 0; }
th, td { padding: .28rem .8rem .28rem 0; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th { font-weight: 600; border-bottom: 2px solid var(--ink); }
th.l, td.l { text-align: left; }
.scroll { overflow-x: auto; }
.worse { color: var(--bad); font-weight: 600; }
.better { color: var(--good); font-weight: 600; }
.warning { background: #fff4e0; border-left: 4px solid #e69f00; padding: .4rem .8rem; margin: .3rem 0; }
figure { margin: 1rem 0; }
figure svg { width: 100%; height: auto; max-width: 72rem; }
footer { color: var(--quiet); margin-top: 2.5rem; font-size: .85rem; }
"""


def page(measurements: Sequence[Measurement], settings: dict[str, Any], machine: str, plots: Sequence[Plot]) -> str:
    """The page.

    Args:
        measurements: at least one.
        settings: as JSON.
        machine: the machine of the client, in words.
        plots: drawn plots; without any the page has a note on matplotlib.
    """
    models = ", ".join(dict.fromkeys(m.served.id for m in measurements))
    header, rows = markdown.seed_rows(measurements)
    parts = [f"<h1>{escape(models)}</h1>", _list(markdown.conditions(measurements, settings), "conditions")]
    parts += [f'<p class="warning">{escape(line)}</p>' for line in markdown.warning_lines(measurements)]
    parts += ["<h2>Means per request</h2>", _table(header, rows, left=3 if "Load" in header else 2)]
    parts += ["<p>ITL is E2E / output tokens, TTFT included, as in RayLLM's tables.</p>"]
    if verdicts := markdown.verdict_rows(measurements):
        parts += ["<h2>Expected beside measured</h2>", _table(markdown.VERDICT_COLUMNS, verdicts, left=3)]
        notes = dict.fromkeys(note for m in measurements if (note := markdown.expected_note(m)))
        parts.append(_list(list(notes), "conditions"))
    for plot in plots:
        parts += [f"<h2>{escape(plot.title)}</h2>", f"<figure>{plot.svg}</figure>"]
    if not plots and not can_plot():
        parts.append(f'<p class="warning">{escape(FIX)}</p>')
    labels = [f"{m.served.id}, {m.load_label}" for m in measurements]
    totals = [[row[0].replace("`", ""), *row[1:]] for row in markdown.total_rows(measurements)]
    parts += ["<h2>Whole run</h2>", _table(("", *labels), totals)]
    parts += ["<h2>Every metric</h2>", _table(markdown.METRIC_COLUMNS, markdown.metric_rows(measurements), left=3)]
    defined = markdown.definitions(mark=str)
    parts += ["<h2>Definitions</h2>", _table(markdown.DEFINITION_COLUMNS, defined, left=4)]
    parts.append(_table(("Key", "Definition"), [[key, text] for key, (_, text) in TOTALS.items()], left=2))
    parts.append(f"<footer>quantserve {__version__}, client on {escape(machine)}</footer>")
    title = f"<title>{escape(models)}: benchmark</title>"
    meta = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head = f"<head>{meta}{title}<style>{CSS}</style></head>"
    return f'<!DOCTYPE html>\n<html lang="en">{head}\n<body>\n' + "\n".join(parts) + "\n</body></html>\n"


def _list(lines: Sequence[str], name: str) -> str:
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<ul class="{name}">{items}</ul>'


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    def cells(row: Sequence[str], tag: str) -> str:
        return "".join(f"<{tag}{_classes(cell, i < left)}>{escape(cell)}</{tag}>" for i, cell in enumerate(row))

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table><thead><tr>{cells(header, "th")}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _classes(cell: str, left: bool) -> str:
    names = (["l"] if left else []) + ([cell] if cell in ("worse", "better") else [])
    return f' class="{" ".join(names)}"' if names else ""
