"""Draws a benchmark's chart as SVG: lines over sizes on logarithmic axes, or horizontal bars. Text in, text out.

The file brings its own background and colours for light and dark, so that it is readable wherever it is shown, and the
same chart always gives the same bytes. Left out: linear axes, interaction.
"""

import math
from collections.abc import Sequence
from html import escape

from measure import Chart, shown

WIDTH, HEIGHT = 520, 330
LEFT, RIGHT, TOP = 58, 18, 34
BAR, GAP, LABEL = 13, 9, 250  # pixels of a bar, between rows, and of their labels
BOUND = ", bound"  # at the end of a line's name: dashed, in the colour of the line without it
LIGHT = ("#0072b2", "#c44e00", "#00825f", "#a4508b", "#7a6000", "#5a5a5a")
DARK = ("#5cb8f0", "#ff9a52", "#3fd0a4", "#e19bcb", "#e0c030", "#b8b8b8")


def svg(chart: Chart) -> str:
    """The chart: lines where the points' x are numbers, bars where they are text. ValueError without a positive point."""
    every = [point for points in chart.lines.values() for point in points]
    if not every or any(y <= 0 or (not isinstance(x, str) and x <= 0) for x, y in every):
        raise ValueError(f"chart '{chart.title}' needs points, all positive: its axes are logarithmic")
    return bars(chart) if isinstance(every[0][0], str) else lines(chart)


def page(title: str, width: float, height: float, parts: Sequence[str]) -> str:
    """An SVG document: style, background, title and parts."""

    def colours(palette: Sequence[str]) -> str:
        return "".join(f".c{i}{{stroke:{c};fill:{c}}}" for i, c in enumerate(palette))

    style = (
        "text{font:12px system-ui,sans-serif;fill:#1f2328;stroke:none}.bg{fill:#fff}.grid{stroke:#d8dee4}"
        ".line{fill:none;stroke-width:2}.dash{fill:none;stroke-width:1.5;stroke-dasharray:5 4}.title{font-weight:600}"
        f"{colours(LIGHT)}@media(prefers-color-scheme:dark){{text{{fill:#e6edf3}}.bg{{fill:#0d1117}}"
        f".grid{{stroke:#3d444d}}{colours(DARK)}}}.line,.dash{{fill:none}}"
    )
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" role="img">'
    ground = f'<rect class="bg" width="{width:g}" height="{height:g}"/>'
    body = [f"<title>{escape(title)}</title><style>{style}</style>", ground, text(12, 20, title, "title"), *parts]
    return "\n".join([head, *body, "</svg>"]) + "\n"


def text(x: float, y: float, what: str, kind: str = "", anchor: str = "start") -> str:
    named = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{named}>{escape(what)}</text>'


def rule(x1: float, y1: float, x2: float, y2: float, kind: str = "grid") -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


# ---------------------------------------------------------------------------------------------------------------------
# Lines


def lines(chart: Chart) -> str:
    """Every line with its points; the legend below. Sizes are ticks of the x axis."""
    xs = sorted({x for points in chart.lines.values() for x, _ in points})
    ys = [y for points in chart.lines.values() for _, y in points]
    spare = max(1.15, 2 / math.sqrt(max(ys) / min(ys)))  # at least a factor of 4 is shown: flat lines look flat
    low, high = min(ys) / spare, max(ys) * spare
    entries = legend(chart)
    bottom = HEIGHT - 66

    def at(x: float, y: float) -> tuple[float, float]:
        wide = math.log(xs[-1] / xs[0]) or 1.0
        right, up = math.log(x / xs[0]) / wide, math.log(y / low) / math.log(high / low)
        return LEFT + right * (WIDTH - LEFT - RIGHT), bottom - up * (bottom - TOP - 16)

    parts = [text(12, TOP + 6, chart.y), text(WIDTH - RIGHT, bottom + 34, chart.x, anchor="end")]
    for value in ticks(low, high):
        y = at(xs[0], value)[1]
        parts += [rule(LEFT, y, WIDTH - RIGHT, y), text(LEFT - 6, y + 4, shown(value), anchor="end")]
    for x in xs:
        parts.append(text(at(x, low)[0], bottom + 17, f"{x:,g}", anchor="end" if x == xs[-1] else "middle"))
    for name, points in chart.lines.items():
        colour, dashed = entries[name]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in (at(x, y) for x, y in points))
        parts.append(f'<polyline class="c{colour} {"dash" if dashed else "line"}" points="{path}"/>')
        parts += [] if dashed else [dot(*at(x, y), colour) for x, y in points]
    return page(chart.title, WIDTH, HEIGHT, [*parts, *keys(entries)])


def legend(chart: Chart) -> dict[str, tuple[int, bool]]:
    """Line -> (colour, dashed); a bound has the colour of its line."""
    names = list(dict.fromkeys(name.removesuffix(BOUND) for name in chart.lines))
    return {n: (names.index(n.removesuffix(BOUND)) % len(LIGHT), n.endswith(BOUND)) for n in chart.lines}


def keys(entries: dict[str, tuple[int, bool]]) -> list[str]:
    """The legend in one row; one entry explains all dashed lines."""
    parts, x, y = [], 14.0, HEIGHT - 13.0
    for name, (colour, dashed) in entries.items():
        if not dashed:
            parts += [rule(x, y - 4, x + 18, y - 4, f"c{colour} line"), text(x + 23, y, name)]
            x += 38 + 6.6 * len(name)
    if any(dashed for _, dashed in entries.values()):
        parts += [rule(x, y - 4, x + 18, y - 4, "c5 dash"), text(x + 23, y, "bound")]
    return parts


def dot(x: float, y: float, colour: int) -> str:
    return f'<circle class="c{colour}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>'


def ticks(low: float, high: float) -> list[float]:
    """Powers of ten, or 1, 2 and 5 times them where there are few."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)):
        found = [float(f"{s}e{d}") for d in decades for s in steps]
        inside = [value for value in found if low <= value <= high]
        if len(inside) >= 3:
            return inside
    return inside


# ---------------------------------------------------------------------------------------------------------------------
# Bars


def bars(chart: Chart) -> str:
    """A row for each label, in it a bar for each name that has it; bars start at 0, and a ratio of 1 is marked."""
    labels = list(dict.fromkeys(str(x) for points in chart.lines.values() for x, _ in points))
    values = {name: {str(x): y for x, y in points} for name, points in chart.lines.items()}
    most = max(y for column in values.values() for y in column.values())
    top = TOP + 22.0
    parts = [text(12, TOP + 8, f"{chart.x} → {chart.y}")]
    for label in labels:
        found = [(i, column[label]) for i, column in enumerate(values.values()) if label in column]
        parts.append(text(LABEL - 8, top + BAR * len(found) / 2 + 4, short(label), anchor="end"))
        for i, value in found:
            long = value / most * (WIDTH + 60 - LABEL - 70)
            parts.append(
                f'<rect class="c{i % len(LIGHT)}" x="{LABEL}" y="{top:.1f}" width="{long:.1f}" height="{BAR - 2}"/>'
            )
            parts.append(text(LABEL + long + 6, top + BAR - 3, shown(float(value))))
            top += BAR
        top += GAP
    x = 14.0
    for i, name in enumerate(values):
        parts.append(f'<rect class="c{i % len(LIGHT)}" x="{x:.1f}" y="{top + 5:.1f}" width="12" height="10"/>')
        parts.append(text(x + 17, top + 14, name))
        x += 34 + 6.6 * len(name)
    if chart.y == "ratio" and most > 1:
        one = LABEL + (WIDTH + 60 - LABEL - 70) / most
        parts.append(rule(one, TOP + 16, one, top - GAP + 4, "c5 dash"))
    return page(chart.title, WIDTH + 60, top + 24, parts)


def short(label: str) -> str:
    """A label that fits beside the bars."""
    return label if len(label) <= 35 else label[:34] + "…"
