"""The overheads of every row as a drawing: one line a row, one dot an arm, a bar for its interval."""

from __future__ import annotations

from collections.abc import Sequence
from xml.sax.saxutils import escape

from tests.benchmarks.measure import Interval
from tests.benchmarks.rows import Row

_COLOURS = {"peft": "#c0392b", "lora_fx": "#1f6fb2"}
_LEFT, _WIDTH, _LINE, _TOP = 290, 520, 20, 46


def overheads(rows: Sequence[Row]) -> str:
    """Return an SVG: time over the floor's, minus 1, of peft and lora_fx in every row."""
    found = [(row.setup.name, {n: row.times.over_floor(n) for n in _COLOURS}) for row in rows]
    most = max(interval.high - 1 for _, arms in found for interval in arms.values())
    step = next(s for s in (0.05, 0.1, 0.2, 0.25, 0.5, 1.0, 2.0, 5.0) if most / s <= 9 or s == 5.0)
    scale = _WIDTH / most
    height = _TOP + _LINE * len(found) + 24
    parts = [_legend(), *_grid(step, most, scale, height)]
    for number, (name, arms) in enumerate(found):
        y = _TOP + _LINE * number + _LINE // 2
        parts.append(f'<text x="{_LEFT - 10}" y="{y + 4}" text-anchor="end">{escape(name)}</text>')
        parts += [_dot(arms[n], y + shift, scale, _COLOURS[n]) for n, shift in (("peft", -3), ("lora_fx", 3))]
    body = "\n".join(parts)
    size = f'width="{_LEFT + _WIDTH + 30}" height="{height}"'
    style = 'font-family="sans-serif" font-size="11" fill="#333"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>\n{_back(height)}\n{body}\n</svg>\n'


def _back(height: int) -> str:
    return f'<rect width="{_LEFT + _WIDTH + 30}" height="{height}" fill="white"/>'


def _legend() -> str:
    parts = [
        f'<text x="{_LEFT}" y="16">overhead: time of a training step over the frozen floor, minus 1</text>'
    ]
    for number, (name, colour) in enumerate(_COLOURS.items()):
        x = 14 + 70 * number
        parts.append(
            f'<circle cx="{x}" cy="12" r="4" fill="{colour}"/><text x="{x + 8}" y="16">{name}</text>'
        )
    return "\n".join(parts)


def _grid(step: float, most: float, scale: float, height: int) -> list[str]:
    lines: list[str] = []
    for number in range(int(most / step) + 1):
        x = _LEFT + number * step * scale
        lines.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP - 6}" y2="{height - 20}" stroke="#ddd"/>')
        lines.append(f'<text x="{x:.1f}" y="{height - 6}" text-anchor="middle">{number * step:g}</text>')
    return lines


def _dot(interval: Interval, y: int, scale: float, colour: str) -> str:
    low, middle, high = (_LEFT + max(v - 1, 0) * scale for v in (interval.low, interval.value, interval.high))
    bar = f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{y}" y2="{y}" stroke="{colour}" stroke-width="2"/>'
    return f'{bar}<circle cx="{middle:.1f}" cy="{y}" r="3.5" fill="{colour}"/>'
