"""Pictures of the claims, from nothing but the content of claims.json; SVG, legible in print."""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, ScalarFormatter

Measured = Mapping[str, Mapping[str, Any]]
MATRIX = "scores.svg"
COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#a463f2")
STYLE = {
    **{"font.size": 9, "axes.spines.top": False, "axes.spines.right": False},
    **{"svg.hashsalt": "bar_ray", "axes.grid": True, "grid.alpha": 0.3, "figure.dpi": 120},
}


def draw(found: Mapping[str, Any]) -> dict[str, bytes]:
    """File name -> SVG, of every claim that has a picture."""
    claims = {claim["number"]: claim["measured"] for claim in found["claims"]}
    scores = found["scores"]
    drawn = {MATRIX: _picture(lambda axes: matrix(axes, scores), (7, 1 + 0.17 * len(scores)))}
    for number, (name, plot) in PLOTS.items():
        if measured := claims.get(number):
            drawn[f"{number}-{name}.svg"] = _picture(partial(_swapped, plot, measured))
    return drawn


def _swapped(plot: Callable[[Axes, Measured], None], measured: Measured, axes: Axes) -> None:
    plot(axes, measured)


def _picture(plot: Callable[[Axes], None], size: tuple[float, float] = (6.5, 3.6)) -> bytes:
    with matplotlib.rc_context(STYLE):
        figure, file = Figure(figsize=size, layout="constrained"), io.BytesIO()
        plot(figure.subplots())
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def matrix(axes: Axes, scores: Mapping[str, Measured]) -> None:
    """Every model's score in every category."""
    models, categories = list(scores), list(next(iter(scores.values())))
    values = [[scores[model][c]["mean"] for c in categories] for model in models]
    axes.imshow(values, cmap="Blues", vmin=0, vmax=130, aspect="auto")
    axes.set_xticks(range(len(categories)), categories)
    axes.set_yticks(range(len(models)), models, fontsize=7)
    axes.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False, length=0)
    axes.grid(visible=False)
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=7)
    axes.set_xlabel("percent right, mean over seeds")


def points(axes: Axes, measured: Measured, unit: str = "points") -> None:
    """A dot per row with its interval; small marks are the seeds."""
    names = list(measured)
    for place, name in enumerate(names):
        each = measured[name]
        axes.plot([each["low"], each["high"]], [place, place], color=COLOURS[0], lw=2, alpha=0.6)
        axes.plot(each["by_seed"], [place] * len(each["by_seed"]), "|", color="#888", ms=7)
        axes.plot(each["mean"], place, "o", color=COLOURS[0], ms=5)
    axes.axvline(0, color="#444", lw=0.8)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel(f"{unit}; line: 95 % over test items, ticks: seeds")


def differences(axes: Axes, measured: Measured) -> None:
    points(axes, {name: each for name, each in measured.items() if " - " in name})


def curve(axes: Axes, lines: Mapping[str, Sequence[tuple[float, Mapping[str, Any]]]]) -> None:
    """Lines over a number, with the range of the seeds."""
    for colour, (label, line) in zip(COLOURS * 4, lines.items(), strict=False):
        xs = [x for x, _ in line]
        axes.plot(xs, [each["mean"] for _, each in line], "o-", color=colour, label=label, ms=4)
        lows, highs = ([f(each["by_seed"]) for _, each in line] for f in (min, max))
        axes.fill_between(xs, lows, highs, color=colour, alpha=0.15, lw=0)
    if len(lines) > 1:
        axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))


def by_number(
    measured: Measured, pattern: str, label: Callable[[re.Match], str]
) -> dict[str, list[tuple[float, Mapping[str, Any]]]]:
    """Rows whose name holds a number (group `x`), as lines."""
    lines: dict[str, list[tuple[float, Mapping[str, Any]]]] = {}
    for name, each in measured.items():
        if match := re.fullmatch(pattern, name):
            lines.setdefault(label(match), []).append((float(match["x"]), each))
    return {name: sorted(line, key=lambda pair: pair[0]) for name, line in lines.items()}


def mixing(axes: Axes, measured: Measured) -> None:
    pattern = r"(?P<expert>\w+), (?P<x>\d+)% general: (?P<category>\w+)"
    curve(axes, by_number(measured, pattern, lambda m: f"{m['expert']} expert: {m['category']}"))
    axes.set(xlabel="general data in SFT, percent of rows", ylabel="percent right", ylim=(-3, 103))


def routing(axes: Axes, measured: Measured) -> None:
    curve(axes, by_number(measured, r"router, (?P<x>\d+)% of the data - bar", lambda m: "sample"))
    axes.axhline(0, color="#444", lw=0.8)
    axes.set(xlabel="percent of the SFT data", ylabel="overall, points over the recipe's sample")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(ScalarFormatter())


def active(axes: Axes, measured: Measured) -> None:
    curve(axes, by_number(measured, r"(?P<x>\d+) experts active - bar", lambda m: "active"))
    axes.axhline(0, color="#444", lw=0.8)
    axes.set(xlabel="active experts", ylabel="overall, points over all experts active")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def cost(axes: Axes, measured: Measured) -> None:
    pattern = r"(?P<kind>.+), TFLOP, (?P<x>\d+) updates"
    curve(axes, by_number(measured, pattern, lambda m: m["kind"]))
    axes.set(xlabel="domains updated, one after the other", ylabel="training, TFLOP in all")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


PLOTS: dict[int, tuple[str, Callable[[Axes, Measured], None]]] = {
    1: ("baselines", differences),
    2: ("new-tokens", points),
    3: ("rlvr-freezing", points),
    4: ("mixing", mixing),
    5: ("averaging", points),
    8: ("router-data", routing),
    9: ("active-experts", active),
    10: ("upgrades", points),
    11: ("cost", cost),
    12: ("late-rl", points),
}
