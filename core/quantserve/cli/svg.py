"""A line chart as an SVG file, drawn by hand so that nothing has to be installed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import floor, log2, log10

WIDTH, HEIGHT = 760, 440
LEFT, RIGHT, TOP, BOTTOM = 70, 190, 48, 52
COLOURS = ("#1f77b4", "#d95f02", "#2a9d4b", "#8e44ad", "#c0392b", "#7f6a00", "#00838f", "#555555")


@dataclass(frozen=True)
class Line:
    """One line: points (x, y, low, high) with rising x."""

    label: str
    points: Sequence[tuple[float, float, float, float]]


def chart(title: str, x_label: str, y_label: str, lines: Sequence[Line], marks: Sequence[float] = ()) -> str:
    """The SVG text of lines with their bands over a logarithmic x axis.

    Args:
        marks: values of x where a dashed line is drawn.
    """
    xs = [point[0] for line in lines for point in line.points]
    first, last = min(xs), max(max(xs), 2 * min(xs))
    top = 1.05 * max(point[1] for line in lines for point in line.points)

    def x(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * log2(value / first) / log2(last / first)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * min(value, top) / top

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="24" font-size="14" font-weight="bold">{escape(title)}</text>',
    ]
    for value in ticks(top):
        parts.append(f'<path d="M{LEFT} {y(value):.1f}H{WIDTH - RIGHT}" stroke="#e3e3e3"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{value:g}</text>')
    for value in sorted({2.0**power for power in range(64) if first <= 2**power <= last} | {first}):
        parts.append(f'<path d="M{x(value):.1f} {HEIGHT - BOTTOM}v5" stroke="#555"/>')
        parts.append(f'<text x="{x(value):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{value:g}</text>')
    for value in marks:
        parts.append(f'<path d="M{x(value):.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="#888" stroke-dasharray="4 4"/>')
    parts += _lines(lines, x, y)
    middle = (HEIGHT - BOTTOM + TOP) / 2
    parts += [
        f'<path d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}" fill="none" stroke="#555"/>',
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 12}" text-anchor="middle">{escape(x_label)}</text>',
        f'<text transform="translate(18 {middle}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>',
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _lines(lines: Sequence[Line], x: object, y: object) -> list[str]:
    assert callable(x)
    assert callable(y)
    bands, strokes = [], []
    for index, line in enumerate(lines):
        colour = COLOURS[index % len(COLOURS)]
        upper = [f"{x(at):.1f},{y(high):.1f}" for at, _, _, high in line.points]
        lower = [f"{x(at):.1f},{y(low):.1f}" for at, _, low, _ in reversed(line.points)]
        bands.append(f'<polygon points="{" ".join(upper + lower)}" fill="{colour}" opacity="0.10"/>')
        path = " ".join(f"{x(at):.1f},{y(value):.1f}" for at, value, _, _ in line.points)
        strokes.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        strokes += [f'<circle cx="{x(at):.1f}" cy="{y(v):.1f}" r="3" fill="{colour}"/>' for at, v, _, _ in line.points]
        row = TOP + 8 + 20 * index
        strokes.append(f'<path d="M{WIDTH - RIGHT + 14} {row}h22" stroke="{colour}" stroke-width="2"/>')
        strokes.append(f'<text x="{WIDTH - RIGHT + 42}" y="{row + 4}">{escape(line.label)}</text>')
    return bands + strokes


def ticks(top: float) -> list[float]:
    """Four to eight round values from 0 up to ``top``."""
    power = 10.0 ** floor(log10(top))
    step = next(power * part for part in (0.1, 0.2, 0.25, 0.5, 1.0) if top / (power * part) <= 8)
    return [step * index for index in range(int(top / step) + 1)]
