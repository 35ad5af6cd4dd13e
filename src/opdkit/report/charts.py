"""Turns the metrics and evaluations of a run into charts: series of points, thinned and smoothed for the screen.

Left out on purpose: colours and drawing, which report.css and charts.js own so that both themes share one source.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from opdkit.report.curves import CURVES, GROUPS, OTHER, SILENT, Curve, Kind, Line
from opdkit.report.read import RunData
from opdkit.report.results import STUDENT
from opdkit.report.text import number, percent

MAX_POINTS = 500  # points of one line; more cannot be told apart on the screen
SMOOTH_FROM = 40  # points from which a line gets a rolling mean
FURTHER = ("third", "fourth", "fifth", "soft")  # colours of the second, third, ... teacher


@dataclass(frozen=True)
class Series:
    """One line of a chart; `mean` is its rolling mean, `error` one standard error. Empty tuples: not there."""

    name: str
    colour: str
    dash: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    mean: tuple[float, ...] = ()
    error: tuple[float, ...] = ()


@dataclass(frozen=True)
class Chart:
    """One chart as the page shows it. `first` and `last` are the ends of its first line, formatted."""

    id: str
    group: str
    title: str
    unit: str
    text: str
    kind: Kind
    from_zero: bool
    stacked: bool
    series: tuple[Series, ...]
    first: str = ""
    last: str = ""


def build_charts(run: RunData) -> dict[str, list[Chart]]:
    """All charts of a run by group; a metric that the run does not have has no chart."""
    keys = sorted({key for row in run.metrics for key, value in row.items() if value is not None})
    charts: list[Chart] = []
    used = set(SILENT)
    for curve in CURVES:
        lines = _expand(curve, keys) if curve.source == "metrics" else []
        used.update(line.key for line in lines)
        series = (
            _eval_series(run, curve)
            if curve.source == "evals"
            else [_series(run, line, curve.smooth) for line in lines]
        )
        if series and not all(line.colour == "soft" for line in series):
            charts.append(_chart(curve, series, len(charts)))
    for key in keys:
        if key not in used:
            text = f"Logged by this run under the name {key}; its method's documentation says what good looks like."
            curve = Curve(OTHER, key, "", text, (Line(key, key),), from_zero=False)
            charts.append(_chart(curve, [_series(run, curve.lines[0], True)], len(charts)))
    found = {group: [chart for chart in charts if chart.group == group] for group in GROUPS}
    return {group: members for group, members in found.items() if members}


def _chart(curve: Curve, series: Sequence[Series], index: int) -> Chart:
    shown = percent if curve.kind == "share" else number
    ends = (series[0].mean or series[0].y)[0], (series[0].mean or series[0].y)[-1]
    several = len(series[0].y) > 1 and not curve.stacked
    return Chart(
        id=f"chart-{index}",
        group=curve.group,
        title=curve.title,
        unit=curve.unit,
        text=curve.text,
        kind=curve.kind,
        from_zero=curve.from_zero,
        stacked=curve.stacked,
        series=tuple(series),
        first=shown(ends[0]) if several else "",
        last="" if curve.stacked else shown(ends[1]),
    )


def _expand(curve: Curve, keys: Sequence[str]) -> list[Line]:
    """The curve's lines that the run has, and one more for every `key/NAME`; further phases for a stacked curve."""
    lines: list[Line] = []
    names: list[str] = []
    for line in curve.lines:
        if line.key in keys:
            lines.append(line)
        for key in keys:
            if key.startswith(line.key + "/") and not curve.stacked:
                name = key.removeprefix(line.key + "/")
                names += [] if name in names else [name]
                further = names.index(name) - 1
                colour = line.colour if further < 0 else FURTHER[min(further, len(FURTHER) - 1)]
                alone = sum(other.colour != "soft" for other in curve.lines) == 1
                label = name if alone else f"{line.name}, {name}"
                lines.append(replace(line, key=key, name=label, colour=colour))
    if curve.stacked and lines:
        prefix = curve.lines[0].key.partition("/")[0] + "/"
        known = {line.key for line in curve.lines} | SILENT
        extra = [key for key in keys if key.startswith(prefix) and key not in known]
        lines += [Line(key, key.removeprefix(prefix), FURTHER[1 + i % 2]) for i, key in enumerate(extra)]
    return lines


def _series(run: RunData, line: Line, smooth: bool) -> Series:
    points = [(float(row["step"] or 0), value) for row in run.metrics if (value := row.get(line.key)) is not None]
    x = thin([step for step, _ in points], MAX_POINTS)
    y = thin([float(value) for _, value in points], MAX_POINTS)
    mean = rolling_mean(y) if smooth and len(y) >= SMOOTH_FROM and line.colour != "soft" else []
    return Series(line.name, line.colour, line.dash, tuple(x), tuple(y), tuple(mean))


def _eval_series(run: RunData, curve: Curve) -> list[Series]:
    """The student's evaluations with errors and, for accuracy, a flat line for each teacher (evaluated once)."""
    student = [e for e in run.evals if e.who == STUDENT]
    if curve.lines[0].key != "accuracy":
        names = list(dict.fromkeys(name for e in student for name in e.kls))
        colours = ["student", *FURTHER, *["soft"] * len(names)]
        every = [[(float(e.step), *e.kls[name]) for e in student if name in e.kls] for name in names]
        return [_with_errors(f"to {n}" if n else curve.lines[0].name, c, p)
                for n, c, p in zip(names, colours, every, strict=False)]  # fmt: skip
    points = [(float(e.step), e.accuracy, e.accuracy_se) for e in student if e.accuracy is not None]
    if not points:
        return []
    series = [_with_errors(curve.lines[0].name, "student", points)]
    x = series[0].x
    teachers = {e.who: e.accuracy for e in run.evals if e.who != STUDENT and e.accuracy is not None}
    for i, (name, value) in enumerate(teachers.items()):
        colour = "teacher" if i == 0 else FURTHER[min(i - 1, len(FURTHER) - 1)]
        series.append(Series(name, colour, "dash", (x[0], x[-1]), (value, value)))
    return series


def _with_errors(name: str, colour: str, points: Sequence[tuple[float, float, float | None]]) -> Series:
    x, y, error = zip(*points, strict=True)
    return Series(name, colour, "solid", x, y, error=tuple(e or 0.0 for e in error))


def thin(values: Sequence[float], most: int) -> list[float]:
    """At most `most` values: the means of equal runs of neighbours (the last run may be shorter)."""
    width = -(-len(values) // most)
    if width <= 1:
        return list(values)
    runs = [values[i : i + width] for i in range(0, len(values), width)]
    return [sum(run) / len(run) for run in runs]


def rolling_mean(values: Sequence[float]) -> list[float]:
    """Mean over a window centred on each value, about a tenth of the line wide; it shrinks at both ends."""
    half = max(2, len(values) // 20)
    means = []
    for i in range(len(values)):
        # Symmetric as long as possible, so that a slope is not bent, but never so narrow that the ends are noise.
        reach = max(min(half, i, len(values) - 1 - i), half // 2)
        window = values[max(i - reach, 0) : i + reach + 1]
        means.append(sum(window) / len(window))
    return means
