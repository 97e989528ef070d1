"""Small charts as inline SVG: lines, a score ladder, a timeline.

Colours are CSS values (mostly variables of the page), so that one drawing serves light and dark,
and every mark has a `<title>` that shows its numbers.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup

MAX_POINTS = 240
SMOOTH_FROM = 40


@dataclass(frozen=True)
class Line:
    """One curve."""

    name: str
    colour: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Rung:
    """One row of the ladder: a category and its (model, score, shape, colour, opacity)."""

    label: str
    marks: Sequence[tuple[str, float, str, str, float]]


@dataclass(frozen=True)
class Bar:
    """One bar of the timeline, in seconds since the start; from `begin` to `work` it waited."""

    label: str
    title: str
    colour: str
    begin: float
    work: float
    end: float
    light: bool = False
    failed: bool = False


@dataclass(frozen=True)
class Block:
    """So much of a resource, held from `begin` to `end`, in seconds since the start."""

    begin: float
    end: float
    amount: float


def _draw(width: float, height: float, label: str, parts: Iterable[Markup]) -> Markup:
    head = '<svg viewBox="0 0 {:.0f} {:.0f}" role="img" aria-label="{}">'
    return Markup(head).format(width, height, label) + Markup("").join(parts) + Markup("</svg>")


def _text(x: float, y: float, content: str, css: str = "", anchor: str = "start") -> Markup:
    tag = '<text x="{:.1f}" y="{:.1f}" class="{}" text-anchor="{}">{}</text>'
    return Markup(tag).format(x, y, css, anchor, content)


def _rule(x1: float, y1: float, x2: float, y2: float, css: str = "grid") -> Markup:
    tag = '<line x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}" class="{}"/>'
    return Markup(tag).format(x1, y1, x2, y2, css)


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers that cover [low, high]; the first and the last lie on or outside of it."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # equal, but for rounding
        pad = abs(low) * 0.1 or 0.5
        low, high = low - pad, high + pad
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def _tick_label(value: float, step: float) -> str:
    if value and (abs(value) >= 1e5 or step < 1e-4):
        return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    decimals += not math.isclose(round(step, decimals), step)
    return f"{value:,.{decimals}f}"


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MAX_POINTS points, each the mean of its neighbours."""
    size = math.ceil(len(points) / MAX_POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(g[-1][0], sum(y for _, y in g) / len(g)) for g in groups]


def _smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Centred moving mean over a twentieth of the curve."""
    half = max(1, len(points) // 40)
    windows = [points[max(0, i - half) : i + half + 1] for i in range(len(points))]
    means = [sum(y for _, y in window) / len(window) for window in windows]
    return [(x, y) for (x, _), y in zip(points, means, strict=True)]


def line_chart(
    lines: Sequence[Line], x_label: str, y_label: str, shown: tuple[float, ...] = ()
) -> Markup:
    """Curves over a common x axis that starts at 0; noisy ones get a smooth line on top.

    `shown` are values that the y axis must cover besides the curves' own.
    """
    width, height, left, right, top, bottom = 380, 230, 52, 22, 28, 40
    kept = [Line(n.name, n.colour, _thinned(n.points)) for n in lines if n.points]
    xs = [x for line in kept for x, _ in line.points]
    ys = [y for line in kept for _, y in line.points]
    x_end, y_ticks = max(xs), ticks(min([*ys, *shown]), max([*ys, *shown]))
    x_ticks = [t for t in ticks(0, x_end, 6) if t <= x_end * 1.001]
    y_low, y_span = y_ticks[0], y_ticks[-1] - y_ticks[0]

    def place(x: float, y: float) -> tuple[float, float]:
        across = left + x / x_end * (width - left - right)
        return across, top + (1 - (y - y_low) / y_span) * (height - top - bottom)

    parts = [_text(4, 14, y_label, "axis-title")]
    for tick in y_ticks:
        y = place(0, tick)[1]
        parts += [_rule(left, y, width - right, y)]
        parts += [_text(left - 6, y + 4, _tick_label(tick, y_span / (len(y_ticks) - 1)), "", "end")]
    for tick in x_ticks:
        label = _tick_label(tick, x_ticks[1] - x_ticks[0] if len(x_ticks) > 1 else 1)
        parts += [_text(place(tick, 0)[0], height - bottom + 16, label, "", "middle")]
    parts += [_text((left + width - right) / 2, height - 6, x_label, "axis-title", "middle")]
    for line in kept:
        noisy = len(line.points) >= SMOOTH_FROM
        parts += [_curve([place(*p) for p in line.points], line, 0.28 if noisy else 1.0)]
        if noisy:
            parts += [_curve([place(*p) for p in _smoothed(line.points)], line, 1.0)]
    return _draw(width, height, f"{y_label} by {x_label}", parts)


def _curve(places: Sequence[tuple[float, float]], line: Line, opacity: float) -> Markup:
    title = Markup("<title>{}: last {:.4g}</title>").format(line.name, line.points[-1][1])
    if len(places) == 1:
        dot = '<circle cx="{:.1f}" cy="{:.1f}" r="3" style="fill:{}">{}</circle>'
        return Markup(dot).format(*places[0], line.colour, title)
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    tag = '<polyline points="{}" class="curve" style="stroke:{};opacity:{}">{}</polyline>'
    return Markup(tag).format(path, line.colour, opacity, title)


SHAPES = {
    "ring": '<circle cx="{x:.1f}" cy="{y:.1f}" r="5" class="ring" style="stroke:{c}">',
    "dot": '<circle cx="{x:.1f}" cy="{y:.1f}" r="8" style="fill:{c};opacity:{o}">',
    "cross": '<path d="M{x:.1f} {y:.1f}m-5 -5l10 10m0 -10l-10 10" class="ring" style="stroke:{c}">',
    "diamond": '<path d="M{x:.1f} {y:.1f}m0 -7l7 7l-7 7l-7 -7z" class="halo" style="fill:{c}">',
}


def mark(shape: str, x: float, y: float, colour: str, opacity: float, title: str) -> Markup:
    """A score mark; `shape` is one of `SHAPES`."""
    start = Markup(SHAPES[shape]).format(x=x, y=y, c=colour, o=opacity)
    end = "circle" if shape in ("ring", "dot") else "path"
    return start + Markup("<title>{}</title></{}>").format(title, end)


def glyph(shape: str, colour: str, opacity: float = 1.0) -> Markup:
    """A mark by itself, for a legend."""
    drawn = mark(shape, 9, 9, colour, opacity, shape)
    return Markup('<svg class="glyph" viewBox="0 0 18 18" aria-hidden="true">{}</svg>').format(
        drawn
    )


def ladder(rungs: Sequence[Rung]) -> Markup:
    """One row per category on an axis from 0 to 100 %, a mark per model."""
    width, left, right, row, top = 760, 110, 24, 38, 8
    height = top + row * len(rungs) + 44
    floor = top + row * len(rungs)

    def across(score: float) -> float:
        return left + score / 100 * (width - left - right)

    parts = []
    for tick in range(0, 101, 20):
        parts += [_rule(across(tick), top, across(tick), floor)]
        parts += [_text(across(tick), floor + 18, f"{tick}", "", "middle")]
    middle = (left + width - right) / 2
    parts += [_text(middle, floor + 38, "held-out test items right, %", "axis-title", "middle")]
    for number, rung in enumerate(rungs):
        y = top + row * (number + 0.5)
        scores = [score for _, score, *_ in rung.marks]
        parts += [_text(left - 14, y + 5, rung.label, "label", "end")]
        parts += [_rule(across(min(scores)), y, across(max(scores)), y, "rail")]
        for model, score, shape, colour, opacity in rung.marks:
            parts += [mark(shape, across(score), y, colour, opacity, f"{model}: {score:.1f} %")]
    return _draw(width, height, "scores by category", parts)


def timeline(lanes: Sequence[tuple[str, Sequence[Bar]]], seconds: float) -> Markup:
    """Bars over time, a lane per owner; bars that overlap are stacked within their lane."""
    width, left, right, row, top, gap = 1000, 110, 16, 20, 8, 8
    unit, size = _unit(seconds)
    end = max(seconds / size, 1e-9)

    def across(at: float) -> float:
        return left + at / size / end * (width - left - right)

    parts, y = [], float(top)
    for name, bars in lanes:
        rows = _stacked(bars)
        parts += [_text(left - 12, y + row * len(rows) / 2 + 4, name, "label", "end")]
        for number, members in enumerate(rows):
            for bar in members:
                parts += [_bar(bar, across, y + row * number, row - 3)]
        y += row * len(rows) + gap
        parts += [_rule(left, y - gap / 2, width - right, y - gap / 2)]
    marks = [t for t in ticks(0, end, 10) if t <= end * 1.001]
    step = marks[1] - marks[0] if len(marks) > 1 else 1.0
    for tick in marks:
        parts.insert(0, _rule(across(tick * size), top, across(tick * size), y))
        parts += [_text(across(tick * size), y + 16, _tick_label(tick, step), "", "middle")]
    middle = (left + width - right) / 2
    parts += [
        _text(middle, y + 36, f"time since the start of the run, {unit}", "axis-title", "middle")
    ]
    return _draw(width, y + 44, "timeline of the run", parts)


def _unit(seconds: float) -> tuple[str, int]:
    """The unit of time for an axis of that length, and its seconds."""
    units = (("h", 3600), ("min", 60), ("s", 1))
    return next((u, s) for u, s in units if seconds >= 2 * s or s == 1)


def stacked(lanes: Sequence[tuple[str, str, Sequence[Block]]], seconds: float, what: str) -> Markup:
    """How much each lane (name, colour, blocks) holds over time, one on top of the other."""
    width, height, left, right, top, bottom = 1000, 200, 110, 16, 24, 40
    unit, size = _unit(seconds)
    moments = sorted({at for *_, blocks in lanes for b in blocks for at in (b.begin, b.end)})
    heights = [_height(lanes, at) for at in moments]
    y_ticks = ticks(0, max([*heights, 1e-9]))

    def across(at: float) -> float:
        return left + at / max(seconds, 1e-9) * (width - left - right)

    def up(amount: float) -> float:
        return height - bottom - amount / y_ticks[-1] * (height - top - bottom)

    parts = [_text(4, 14, what, "axis-title")]
    for tick in y_ticks:
        parts += [_rule(left, up(tick), width - right, up(tick))]
        parts += [_text(left - 6, up(tick) + 4, _tick_label(tick, y_ticks[1]), "", "end")]
    x_ticks = [t for t in ticks(0, seconds / size, 8) if t * size <= seconds * 1.001]
    for tick in x_ticks:
        label = _tick_label(tick, x_ticks[1] if len(x_ticks) > 1 else 1)
        parts += [_text(across(tick * size), height - bottom + 16, label, "", "middle")]
    words = f"time since the start of the run, {unit}"
    parts += [_text((left + width - right) / 2, height - 6, words, "axis-title", "middle")]
    place = 'x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"'
    tag = f'<rect {place} shape-rendering="crispEdges" style="fill:{{}}">{{}}</rect>'
    for begin, end in itertools.pairwise(moments):
        below = 0.0
        for name, colour, blocks in lanes:
            amount = sum(b.amount for b in blocks if b.begin <= begin < b.end)
            if amount:
                title = Markup("<title>{}: {:g} {}</title>").format(name, amount, what)
                box = (across(begin), up(below + amount), across(end) - across(begin))
                parts += [Markup(tag).format(*box, up(below) - up(below + amount), colour, title)]
            below += amount
    return _draw(width, height, f"{what} over time", parts)


def _height(lanes: Sequence[tuple[str, str, Sequence[Block]]], at: float) -> float:
    return sum(b.amount for *_, blocks in lanes for b in blocks if b.begin <= at < b.end)


def joined(bars: Sequence[Bar], noun: str) -> list[Bar]:
    """Bars whose work touches as one, for many short steps of the same kind."""
    groups: list[list[Bar]] = []
    for bar in sorted(bars, key=lambda bar: bar.work):
        if groups and bar.work <= max(b.end for b in groups[-1]) + 1:
            groups[-1].append(bar)
        else:
            groups.append([bar])
    ends = [max(bar.end for bar in group) for group in groups]
    return [
        replace(
            group[0],
            label=f"{len(group)} {noun}" if len(group) > 1 else group[0].label,
            title="\n".join(bar.title for bar in group),
            begin=group[0].work,
            end=end,
            failed=any(bar.failed for bar in group),
        )
        for group, end in zip(groups, ends, strict=True)
    ]


def _stacked(bars: Sequence[Bar]) -> list[list[Bar]]:
    rows: list[list[Bar]] = []
    for bar in sorted(bars, key=lambda bar: bar.begin):
        free = next((r for r in rows if r[-1].end <= bar.begin + 1e-6), None)
        if free is None:
            rows.append(free := [])
        free.append(bar)
    return rows


def _bar(bar: Bar, across: Callable[[float], float], y: float, height: float) -> Markup:
    start, work, end = across(bar.begin), across(bar.work), across(bar.end)
    css = "failed" if bar.failed else "light" if bar.light else "solid"
    body = Markup(
        '<g><title>{}</title><rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" '
        'class="wait"/><rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" rx="2" '
        'class="{}" style="fill:{}"/>'
    ).format(
        bar.title,
        start,
        y + height / 2 - 1,
        max(work - start, 0),
        2,
        work,
        y,
        max(end - work, 1.5),
        height,
        css,
        bar.colour,
    )
    if end - work > 7 * len(bar.label) + 6:
        body += _text((work + end) / 2, y + height / 2 + 4, bar.label, f"in-{css}", "middle")
    return body + Markup("</g>")
