"""The picture of the bench of prefixes: what engines found in their caches, and how the first token's time grows with the load."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape

Point = tuple[float, float]
"""Requests a second, seconds."""

_WIDTH, _HEIGHT = 860, 400
_TOP, _GROUND = 84, 344  # px: highest and lowest of both panels
_BARS, _BAR, _STEP = 56, 30, 46  # where the bars begin, how wide, how far apart
_LEFT, _RIGHT = 380, 836  # of the curves
_INK = "#727a84"
_COLOURS = ("#727a84", "#e0823d", "#a371f7", "#3fb950", "#4493f8")
_SECONDS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


def svg(
    hits: Mapping[str, float],
    curves: Mapping[str, Sequence[Point]],
    dots: Mapping[str, Sequence[Point]],
    rate: float,
) -> str:
    """The whole picture.

    Args:
        hits: share of the prompt tokens found in caches, by policy, at `rate` requests a second.
        curves: 95th percentile of the time to the first token by policy, on the virtual fleet.
        dots: the same as measured through Envoy.
        rate: see `hits`.
    """
    colours = dict(zip(hits, _COLOURS, strict=True))
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'font-family="system-ui, sans-serif" font-size="13" fill="{_INK}">\n'
        "<title>Hit rate and time to the first token, by policy</title>"
    )
    return "\n".join(
        [
            head,
            *_legend(colours),
            *_bars(hits, colours, rate),
            *_axes(_most(curves, dots)),
            *_lines(curves, dots, colours),
            "</svg>\n",
        ]
    )


def _legend(colours: Mapping[str, str]) -> Iterator[str]:
    x = 24.0
    for name, colour in colours.items():
        yield f'<rect x="{x:.0f}" y="10" width="12" height="12" rx="2" fill="{colour}"/>'
        yield _text(x + 18, 21, name, anchor="start")
        x += 36 + 7.0 * len(name)


def _bars(hits: Mapping[str, float], colours: Mapping[str, str], rate: float) -> Iterator[str]:
    yield _text(24, 54, f"Prompt tokens cached, {rate:g} requests/s", weight=600, anchor="start")
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = _GROUND - share * (_GROUND - _TOP)
        yield _line(_BARS - 8, y, _BARS + len(hits) * _STEP, y, 0.8 if share == 0 else 0.25)
        yield _text(_BARS - 12, y + 4, f"{share:.0%}", anchor="end")
    for number, (name, share) in enumerate(hits.items()):
        height = share * (_GROUND - _TOP)
        x, y = _BARS + number * _STEP, _GROUND - height
        yield f'<rect x="{x}" y="{y:.1f}" width="{_BAR}" height="{height:.1f}" fill="{colours[name]}"/>'
        yield _text(x + _BAR / 2, y - 6, f"{share:.0%}", weight=600)


def _axes(most: float) -> Iterator[str]:
    title = "Seconds to the first token, p95"
    yield _text(_LEFT - 34, 54, title, weight=600, anchor="start")
    yield _text(_RIGHT, _GROUND + 40, "lines: simulated, dots: through Envoy", anchor="end")
    for seconds in _SECONDS:
        y = _y(seconds)
        yield _line(_LEFT, y, _RIGHT, y, 0.8 if seconds == _SECONDS[0] else 0.25)
        yield _text(_LEFT - 6, y + 4, f"{seconds:g}", anchor="end")
    for rate in range(0, int(most) + 1, 16):
        yield _text(_x(rate, most), _GROUND + 18, str(rate))
    yield _text(_LEFT, _GROUND + 40, "requests/s", anchor="start")


def _lines(
    curves: Mapping[str, Sequence[Point]], dots: Mapping[str, Sequence[Point]], colours: Mapping[str, str]
) -> Iterator[str]:
    most = _most(curves, dots)
    for name, points in curves.items():
        path = " ".join(f"{_x(rate, most):.1f},{_y(seconds):.1f}" for rate, seconds in points)
        yield f'<polyline points="{path}" fill="none" stroke="{colours[name]}" stroke-width="2"/>'
    for name, points in dots.items():
        for rate, seconds in points:
            at = f'cx="{_x(rate, most):.1f}" cy="{_y(seconds):.1f}"'
            yield f'<circle {at} r="5" fill="{colours[name]}"/>'


def _most(*several: Mapping[str, Sequence[Point]]) -> float:
    return max((rate for each in several for points in each.values() for rate, _ in points), default=1.0)


def _x(rate: float, most: float) -> float:
    return _LEFT + (_RIGHT - _LEFT) * rate / most


def _y(seconds: float) -> float:
    """On a scale of logarithms; beyond it, its end."""
    low, high = math.log(_SECONDS[0]), math.log(_SECONDS[-1])
    share = (math.log(max(seconds, 1e-3)) - low) / (high - low)
    return _GROUND - min(1.0, max(0.0, share)) * (_GROUND - _TOP)


def _line(x1: float, y1: float, x2: float, y2: float, strength: float) -> str:
    ends = f'x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="{_INK}" stroke-opacity="{strength}"/>'


def _text(x: float, y: float, text: str, *, weight: int = 400, anchor: str = "middle") -> str:
    content = escape(text, quote=False)
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}">{content}</text>'
