"""The report of an evaluation: tables, JSON, Markdown and a plot."""

from __future__ import annotations

import importlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import gmtime, strftime
from typing import Any, Final

from rich.console import Console
from rich.markup import escape

from quantserve import __version__
from quantserve.cli.output import table
from quantserve.errors import UsageError
from quantserve_bench import markdown
from quantserve_bench.plots import COLOURS, STYLE, can_plot, written
from quantserve_client.intervals import Share, mcnemar, paired, wilson
from quantserve_client.judge import Comparison
from quantserve_client.options import Generation
from quantserve_client.questions import Question
from quantserve_client.scoring import RULES

ACCURACY: Final = ("model", "accuracy", "95 % interval", "right", "answered", "not answered")
PAIRS: Final = ("difference", "accuracy", "95 % interval", "only first right", "only second right", "p (McNemar)")
JUDGED: Final = ("first", "second", "win rate of the first", "95 % interval", "won", "lost", "tied", "contradicting",
                 "unclear")  # fmt: skip
SHOWN: Final = 300
"""Characters of an answer in the Markdown."""


@dataclass(frozen=True)
class Score:
    """A model's answers.

    Attributes:
        model: id.
        right: id of each answered question with a reference -> whether the answer agrees with it.
        texts: id of each answered question -> the answer.
    """

    model: str
    right: Mapping[str, bool]
    texts: Mapping[str, str]

    @property
    def accuracy(self) -> Share:
        """Right answers of those with a reference."""
        return wilson(sum(self.right.values()), len(self.right))


@dataclass(frozen=True)
class Report:
    """All results.

    Attributes:
        source: file of the questions.
        questions: in order.
        fingerprint: hash of the questions.
        generation: parameters.
        scores: by model.
        judge: model that compared; None without one.
        comparisons: of each pair of models.
    """

    source: str
    questions: Sequence[Question]
    fingerprint: str
    generation: Generation
    scores: Sequence[Score]
    judge: str | None
    comparisons: Sequence[Comparison]

    @property
    def unanswered(self) -> int:
        """Questions without an answer, of all models together, and comparisons that lack one."""
        missing = sum(len(self.questions) - len(score.texts) for score in self.scores)
        return missing + sum(one.unanswered for one in self.comparisons)

    @property
    def has_references(self) -> bool:
        """Whether an accuracy can be told."""
        return any(question.references for question in self.questions)

    def pairs(self) -> list[dict[str, Any]]:
        """Differences in accuracy to the first model, over the questions that both answered."""
        made = []
        first = self.scores[0]
        for other in self.scores[1:] if self.has_references else ():
            both = [key for key in first.right if key in other.right]
            only_first = sum(first.right[key] and not other.right[key] for key in both)
            only_other = sum(other.right[key] and not first.right[key] for key in both)
            made.append(
                {
                    "first": other.model,
                    "second": first.model,
                    "questions": len(both),
                    "only_first": only_other,
                    "only_second": only_first,
                    "difference": _share(paired(only_other, only_first, len(both))),
                    "p": mcnemar(only_other, only_first),
                }
            )
        return made

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        used = dict.fromkeys(question.match for question in self.questions if question.references)
        return {
            "quantserve": __version__,
            "made": strftime("%Y-%m-%dT%H:%M:%SZ", gmtime()),
            "questions": {"source": self.source, "count": len(self.questions), "fingerprint": self.fingerprint},
            "generation": {name: value for name, value in vars(self.generation).items() if value is not None},
            "match": {name: RULES[name] for name in used},
            "models": [
                {
                    "model": score.model,
                    "accuracy": _share(score.accuracy) if self.has_references else None,
                    "right": sum(score.right.values()),
                    "scored": len(score.right),
                    "unanswered": len(self.questions) - len(score.texts),
                    "categories": self._categories(score),
                }
                for score in self.scores
            ],
            "pairs": self.pairs(),
            "judge": self.judge,
            "comparisons": [one.to_json() for one in self.comparisons],
            "answers": [
                {
                    "id": question.id,
                    "prompt": question.prompt,
                    "references": list(question.references),
                    "match": question.match if question.references else None,
                    "models": {
                        score.model: {"text": score.texts[question.id], "right": score.right.get(question.id)}
                        for score in self.scores
                        if question.id in score.texts
                    },
                }
                for question in self.questions
            ],
        }

    def _categories(self, score: Score) -> dict[str, Any]:
        made = {}
        for category in dict.fromkeys(question.category for question in self.questions if question.category):
            own = [
                score.right[question.id]
                for question in self.questions
                if question.category == category and question.id in score.right
            ]
            made[category] = _share(wilson(sum(own), len(own)))
        return made


def accuracy_rows(report: Report) -> list[list[str]]:
    """A row for each model."""
    return [
        [
            score.model,
            _percent(score.accuracy.value),
            _interval(score.accuracy),
            str(sum(score.right.values())),
            str(len(score.texts)),
            str(len(report.questions) - len(score.texts)),
        ]
        for score in report.scores
    ]


def pair_rows(report: Report) -> list[list[str]]:
    """A row for each model but the first."""
    return [
        [
            f"{one['first']} - {one['second']}",
            _percent(one["difference"]["value"], sign=True),
            _interval(Share(**one["difference"]), sign=True),
            str(one["only_first"]),
            str(one["only_second"]),
            f"{one['p']:.3f}",
        ]
        for one in report.pairs()
    ]


def judged_rows(report: Report) -> list[list[str]]:
    """A row for each pair of models."""
    return [
        [
            one.first,
            one.second,
            _percent(one.rate.value),
            _interval(one.rate),
            *map(str, (one.wins, one.losses, one.ties, one.contradictions, one.unclear)),
        ]
        for one in report.comparisons
    ]


def show(report: Report, out: Console) -> None:
    """Print the tables."""
    for title, columns, rows in _tables(report):
        cells = [[escape(cell) for cell in row] for row in rows]
        out.print(table(escape(title), columns, cells, wrap=columns[:2] if columns is JUDGED else columns[:1]))
    for line in _remarks(report):
        out.print(f"  [dim]{escape(line)}[/]", soft_wrap=True)


def write(report: Report, folder: Path) -> None:
    """Write ``results.json``, ``report.md`` and, with matplotlib, a plot.

    Raises:
        UsageError: they cannot be written.
    """
    try:
        _put(folder / "results.json", (json.dumps(report.to_json(), indent=2, ensure_ascii=True) + "\n").encode())
        drawn = _draw(report)
        for name, data in drawn.items():
            _put(folder / name, data)
        _put(folder / "report.md", _markdown(report, "evaluate.svg" in drawn).encode(errors="backslashreplace"))
    except OSError as error:
        raise UsageError(
            f"{error.filename or folder}: cannot be written: {error.strerror}\n  fix: give another --out"
        ) from None


def _put(path: Path, data: bytes) -> None:
    number, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(number, "wb") as file:
            file.write(data)
        os.chmod(draft, 0o644)
        os.replace(draft, path)
    except OSError:
        os.unlink(draft)
        raise


def _tables(report: Report) -> list[tuple[str, tuple[str, ...], list[list[str]]]]:
    tables: list[tuple[str, tuple[str, ...], list[list[str]]]] = []
    count = len(report.questions)
    if report.has_references:
        tables.append((f"Accuracy on {count} questions of {report.source}", ACCURACY, accuracy_rows(report)))
        if rows := pair_rows(report):
            tables.append(("Difference, over the questions that both answered", PAIRS, rows))
    if report.comparisons:
        tables.append((f"Compared by {report.judge} on {count} questions, in both orders", JUDGED, judged_rows(report)))
    return tables


def _remarks(report: Report) -> list[str]:
    lines = []
    if report.has_references:
        lines.append("intervals: Wilson; differences: Bonett and Price for paired answers; p: exact McNemar test")
    for one in report.comparisons:
        if one.first_place.value is not None:
            said = f"{one.first}, {one.second}: {_percent(one.first_place.value)} of the decided verdicts"
            lines.append(
                f"{said} chose the answer that was shown first ({_interval(one.first_place)}; 50 % is no bias)"
            )
    if report.comparisons:
        lines.append("win rate: won + half of tied, over all clear comparisons; unclear verdicts are not counted")
    return lines


def _markdown(report: Report, plot: bool) -> str:
    how = ", ".join(f"{name} {value}" for name, value in vars(report.generation).items() if value is not None)
    parts = ["# Evaluation", "", f"quantserve {__version__}; questions {report.fingerprint}; {how}.", ""]
    for title, columns, rows in _tables(report):
        parts += [f"## {title}", "", markdown.table(columns, [[_cell(cell) for cell in row] for row in rows]), ""]
    parts += [f"- {line}" for line in _remarks(report)]
    parts += [f"- {name}: {RULES[name]}" for name in dict.fromkeys(q.match for q in report.questions if q.references)]
    parts += ["", *(["![accuracy and win rates](evaluate.svg)", ""] if plot else [])]
    if report.has_references:
        parts += ["## Wrong answers", ""]
        for question in report.questions:
            wrong = [score for score in report.scores if score.right.get(question.id) is False]
            if wrong:
                parts += [
                    f"**{_cell(question.id)}** {_cell(question.prompt)} (right: {_cell(question.references[0])})",
                    "",
                ]
                parts += [f"- {_cell(score.model)}: {_cell(score.texts[question.id])}" for score in wrong]
                parts.append("")
    return "\n".join(parts)


def _cell(text: str) -> str:
    """Text of a model in one line of Markdown, without its own marks."""
    one = " ".join(text.split())
    one = one if len(one) <= SHOWN else f"{one[:SHOWN]} ..."
    return "".join(f"\\{mark}" if mark in "\\`*_{}[]<>#|!" else mark for mark in one if mark.isprintable())


def _draw(report: Report) -> dict[str, bytes]:
    """File name -> picture; empty without matplotlib."""
    shares = [(score.model, score.accuracy) for score in report.scores] if report.has_references else []
    rates = [(f"{one.first}\nover {one.second}", one.rate) for one in report.comparisons]
    panels = [(title, found) for title, found in (("Accuracy", shares), ("Win rate", rates)) if found]
    if not panels or not can_plot():
        return {}
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "quantserve-evaluate"}):
        pyplot = importlib.import_module("matplotlib.pyplot")
        height = 1.1 + 0.42 * max(len(found) for _, found in panels)
        figure, axes = pyplot.subplots(
            1, len(panels), figsize=(4.2 * len(panels), height), layout="constrained", squeeze=False
        )
        for axis, (title, found) in zip(axes[0], panels, strict=True):
            _bars(axis, title, found)
        plot = written(figure, "Accuracy and win rates", "evaluate")
    return {"evaluate.svg": plot.svg.encode(), "evaluate.png": plot.png}


def _bars(axis: Any, title: str, found: Sequence[tuple[str, Share]]) -> None:
    for place, (_, share) in enumerate(found):
        if share.value is not None and share.low is not None and share.high is not None:
            colour = COLOURS[place % len(COLOURS)]
            axis.plot([100 * share.low, 100 * share.high], [place, place], color=colour, linewidth=2.2)
            axis.plot([100 * share.value], [place], "o", color=colour, markersize=7)
    axis.set_yticks(range(len(found)), [name for name, _ in found])
    axis.set_ylim(len(found) - 0.5, -0.5)
    axis.set_xlim(-2, 102)  # a point at the end is seen whole
    axis.grid(axis="y", visible=False)
    axis.set_title(title)
    axis.set_xlabel("%, with 95 % interval")
    if title == "Win rate":
        axis.axvline(50, color="#8a8a8a", linewidth=0.8, linestyle=(0, (3, 3)))


def _share(share: Share) -> dict[str, float | None]:
    return share._asdict()


def _percent(value: float | None, sign: bool = False) -> str:
    return markdown.DASH if value is None else f"{100 * value:{'+' if sign else ''}.1f} %"


def _interval(share: Share, sign: bool = False) -> str:
    if share.low is None or share.high is None:
        return markdown.DASH
    plus = "+" if sign else ""
    return f"{100 * share.low:{plus}.1f} to {100 * share.high:{plus}.1f} %"
