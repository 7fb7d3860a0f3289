"""Histograms and curves as SVG, in the colours of the page that holds them."""

import math
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

from train_utils.check.sections import Curve

_WIDTH, _HEIGHT = 320, 150
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 8, 8, 34  # margins; texts stand in them
_BINS = 30


def histogram(name: str, series: Mapping[str, np.ndarray]) -> str:
    """How often values occur, as shares of each series; values that are not finite do not count."""
    known = {label: values[np.isfinite(values)] for label, values in series.items()}
    known = {label: values for label, values in known.items() if values.size}
    every = np.concatenate(list(known.values()))
    low, high = float(every.min()), float(every.max())
    high = high if high > low else low + (abs(low) or 1.0)
    edges = np.linspace(low, high, _BINS + 1)
    shares = {label: np.histogram(v, edges)[0] / v.size for label, v in known.items()}
    top = max(float(share.max()) for share in shares.values())
    bars = []
    for number, (label, share) in enumerate(shares.items()):
        points = _steps(share / top, number)
        bars.append(
            f'<path class="series{number}" d="{points}"><title>{escape(label)}</title></path>'
        )
    about = f"Histogram of {name}: from {_short(low)} to {_short(high)}, highest bin {top:.0%}"
    axes = _axes(_short(low), _short(high), "0", f"{top:.0%}", name)
    return _svg(about, axes + "".join(bars))


def _steps(heights: np.ndarray, number: int) -> str:
    """The outline of a histogram whose highest bin is 1; the first series is a filled area."""
    width = (_WIDTH - _LEFT - _RIGHT) / len(heights)
    base = _HEIGHT - _BOTTOM
    parts = [f"M{_LEFT},{base}"]
    for index, height in enumerate(heights):
        y = base - height * (base - _TOP)
        parts.append(f"V{y:.1f}H{_LEFT + (index + 1) * width:.1f}")
    return "".join([*parts, f"V{base}", "Z" if number == 0 else ""])


def curve(chart: Curve) -> str:
    """A curve with its smoothed copy; an upward jump is cut at the top, and so is what follows."""
    finite = [value for value in chart.smooth or chart.y if math.isfinite(value)] or [0.0]
    low, top = min(finite), max(finite[0], min(max(finite), finite[0] * 2))
    high = top if top > low else low + (abs(low) or 1.0)
    xs = [math.log10(x) for x in chart.x] if chart.log_x else list(chart.x)
    left, right = min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1

    def place(x: float, y: float) -> str:
        share = min(max((y - low) / (high - low), 0.0), 1.0) if math.isfinite(y) else 1.0
        across = _LEFT + (x - left) / (right - left) * (_WIDTH - _LEFT - _RIGHT)
        return f"{across:.1f},{_HEIGHT - _BOTTOM - share * (_HEIGHT - _BOTTOM - _TOP):.1f}"

    drawn = f'<polyline class="raw" points="{_points(place, xs, chart.y)}"/>'
    if chart.smooth:
        drawn += f'<polyline class="smooth" points="{_points(place, xs, chart.smooth)}"/>'
    for number, (label, x) in enumerate(chart.marks.items()):
        at = float(place(math.log10(x) if chart.log_x else x, low).partition(",")[0])
        before = at > _WIDTH / 2  # so that a label stays within the picture
        drawn += f'<path class="mark" d="M{at:g},{_TOP}V{_HEIGHT - _BOTTOM}"/>'
        drawn += (
            f'<text x="{at - 3 if before else at + 3:g}" y="{_TOP + 8 + 11 * number}" '
            f'text-anchor="{"end" if before else "start"}">{escape(label)}</text>'
        )
    marked = "".join(f"; {label} at {_short(x)}" for label, x in chart.marks.items())
    about = f"{chart.y_name} against {chart.x_name}{marked}"
    ends = _short(chart.x[0]), _short(chart.x[-1])
    return _svg(about, _axes(*ends, _short(low), _short(high), chart.x_name) + drawn)


def _points(place, xs: Sequence[float], ys: Sequence[float]) -> str:
    return " ".join(place(x, y) for x, y in zip(xs, ys, strict=True))


def _axes(left: str, right: str, low: str, high: str, name: str) -> str:
    base, end = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    texts = [
        (_LEFT, base + 13, "start", left),
        (end, base + 13, "end", right),
        (_LEFT - 4, base, "end", low),
        (_LEFT - 4, _TOP + 9, "end", high),
        ((_LEFT + end) / 2, _HEIGHT - 6, "middle", name),
    ]
    drawn = f'<path class="axis" d="M{_LEFT},{_TOP}V{base}H{end}"/>'
    return drawn + "".join(
        f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(text)}</text>'
        for x, y, anchor, text in texts
    )


def _svg(about: str, content: str) -> str:
    box = f"0 0 {_WIDTH} {_HEIGHT}"
    return f'<svg role="img" aria-label="{escape(about)}" viewBox="{box}">{content}</svg>'


def _short(value: float) -> str:
    return f"{value:.3g}"
