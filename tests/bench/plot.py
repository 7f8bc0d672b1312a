"""The plot: CPU per token as stacked bars, an SVG written by hand. Its greys and colours read on white and on black."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

Bar = tuple[str, float, float]
"""Variant, CPU of Envoy and of the server in us per token."""

Group = tuple[str, Sequence[Bar]]
"""A case and its bars."""

_WIDTH, _HEIGHT = 860, 400
_LEFT, _TOP, _BOTTOM = 64, 64, 60  # px around the bars, for axis, legend and names
_BAR, _GAP = 46, 14
_ENVOY, _SERVER, _INK = "#4493f8", "#e0823d", "#727a84"
_TICKS = 6  # at most, above zero


def svg(groups: Sequence[Group]) -> str:
    """The whole picture."""
    highest = max((envoy + server for _, bars in groups for _, envoy, server in bars), default=1.0)
    step = _step(highest * 1.08)
    scale = (_HEIGHT - _TOP - _BOTTOM) / (highest * 1.08)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'font-family="system-ui, sans-serif" font-size="13" fill="{_INK}">\n'
        "<title>CPU time per streamed token, by accounting lane</title>"
    )
    parts = [head, *_legend(), *_axis(step, highest * 1.08, scale)]
    room = (_WIDTH - _LEFT) / max(1, len(groups))
    for number, (name, bars) in enumerate(groups):
        parts += _group(name, bars, _LEFT + room * number, room, scale)
    return "\n".join([*parts, "</svg>\n"])


def _step(highest: float) -> float:
    """Between two lines of the grid: 1, 2 or 5 times a power of ten."""
    steps = (base * 10.0**power for power in range(-2, 6) for base in (1, 2, 5))
    return next(step for step in steps if highest / step <= _TICKS)


def _legend() -> Iterator[str]:
    yield _text(_LEFT, 20, "CPU time per streamed token, microseconds", weight=600, anchor="start")
    for x, colour, name in ((_LEFT, _ENVOY, "Envoy"), (_LEFT + 84, _SERVER, "ext_proc server")):
        yield f'<rect x="{x}" y="32" width="12" height="12" rx="2" fill="{colour}"/>'
        yield _text(x + 18, 43, name, anchor="start")


def _axis(step: float, highest: float, scale: float) -> Iterator[str]:
    for number in range(int(highest / step) + 1):
        y = _HEIGHT - _BOTTOM - number * step * scale
        strength = 0.8 if number == 0 else 0.25
        yield (
            f'<line x1="{_LEFT}" x2="{_WIDTH - 8}" y1="{y:.1f}" y2="{y:.1f}" stroke="{_INK}" '
            f'stroke-opacity="{strength}"/>'
        )
        yield _text(_LEFT - 8, y + 4, f"{number * step:g}", anchor="end")
    middle = (_HEIGHT - _BOTTOM + _TOP) / 2
    yield f'<g transform="translate(16 {middle:.0f}) rotate(-90)">{_text(0, 0, "microseconds per token")}</g>'


def _group(name: str, bars: Sequence[Bar], left: float, room: float, scale: float) -> Iterator[str]:
    ground = _HEIGHT - _BOTTOM
    x = left + (room - len(bars) * (_BAR + _GAP) + _GAP) / 2
    for variant, envoy, server in bars:
        top = ground - (envoy + server) * scale
        yield _rect(x, ground - envoy * scale, envoy * scale, _ENVOY)
        if server > 0:
            yield _rect(x, top, server * scale, _SERVER)
        yield _text(x + _BAR / 2, top - 6, f"{envoy + server:.0f}", weight=600)
        yield _text(x + _BAR / 2, ground + 18, variant)
        x += _BAR + _GAP
    yield _text(left + room / 2, ground + 42, name, weight=600)


def _rect(x: float, y: float, height: float, colour: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{_BAR}" height="{height:.1f}" fill="{colour}"/>'


def _text(x: float, y: float, text: str, *, weight: int = 400, anchor: str = "middle") -> str:
    content = escape(text, quote=False)
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}">{content}</text>'
