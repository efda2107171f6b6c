"""The curves of a run: each public function draws a matplotlib figure, or returns None where nothing was recorded."""

from __future__ import annotations

import io
import re

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from vpd.report.run_data import Entry, RunData, number, series

BLUE, ORANGE, GREEN, RED, VIOLET = "#3b82f6", "#f08c2e", "#22a06b", "#e5484d", "#9a6dd7"
GREY = "#8a8f98"
"""A grey that is readable on a white and on a dark page."""

_INK = "#010203"
"""A colour that stands for the page's text colour; the finished SVG has that colour in its place."""

SMOOTHED_FROM = 40
"""The number of points at which a noisy curve gets a running mean."""

_BARS = 60
"""The largest number of bars; in a longer run each bar is the mean of several steps."""


def reward_and_accuracy(run: RunData) -> Figure | None:
    train, evaluations = run.entries("train"), run.entries("eval")
    figure, (axes,) = _figure()
    _line(axes, train, "reward", "reward of rollouts", BLUE, noisy=True)
    if _differs(train, "success_rate", "reward"):
        _line(axes, train, "success_rate", "success rate of rollouts", GREEN, noisy=True)
    for split, color in zip(_splits(evaluations), (ORANGE, VIOLET, RED), strict=False):
        _accuracy(axes, [entry for entry in evaluations if (entry.get("split") or "held out") == split], split, color)
    return _finish(figure, "reward, accuracy")


def margins(run: RunData) -> Figure | None:
    train = run.entries("train")
    figure, (axes,) = _figure()
    for entry in train:
        step, low, high = (number(entry.get(key)) for key in ("step", "margin_before", "margin_after"))
        if step is not None and low is not None and high is not None:
            axes.plot([step, step], [low, high], color=GREEN, linewidth=1, alpha=0.6)
    _line(axes, train, "margin", "in the M-step", RED, noisy=True)
    _line(axes, train, "margin_before", "before the E-step", ORANGE)
    _line(axes, train, "margin_after", "after", GREEN)
    _line(axes, train, "margin_fresh_before", "fresh rollouts, before", ORANGE, style="--")
    _line(axes, train, "margin_fresh_after", "fresh rollouts, after", GREEN, style="--")
    _line(axes, train, "margin_after_sibling", "after, sibling feedback", BLUE, style=":")
    _line(axes, train, "margin_after_environment", "after, environment feedback", VIOLET, style=":")
    if axes.lines:
        axes.axhline(0, color=_INK, linewidth=0.8, alpha=0.5)
    return _finish(figure, "margin of implicit rewards")


def divergence_and_entropy(run: RunData) -> Figure | None:
    figure, (upper, lower) = _figure(2)
    _line(upper, run.entries("train"), "divergence", "student and teacher", BLUE, noisy=True)
    _line(lower, run.entries("train"), "entropy", "student", VIOLET, noisy=True)
    return _finish(figure, "divergence\n[nats/token]", "entropy\n[nats/token]")


def lengths(run: RunData) -> Figure | None:
    train = run.entries("train")
    figure, (upper, lower) = _figure(2)
    _line(upper, train, "length_mean", "mean", BLUE, noisy=True)
    _line(upper, train, "length_max", "longest", ORANGE)
    _line(lower, train, "truncated_share", "truncated", RED)
    _line(lower, train, "repetition", "repeated 3-grams", VIOLET)
    return _finish(figure, "completion\n[tokens]", "share", from_zero=True)


def gradient_norms(run: RunData) -> Figure | None:
    train = run.entries("train")
    figure, (axes,) = _figure()
    _line(axes, train, "grad_norm", "M-step", BLUE, noisy=True)
    _line(axes, train, "e_grad_norm", "E-step", ORANGE)
    values = series(train, "grad_norm")[1] + series(train, "e_grad_norm")[1]
    limit = number(run.setting("optim.max_grad_norm"))
    if values and limit is not None and max(values) > limit / 10:
        axes.axhline(limit, color=RED, linewidth=1, linestyle="--", label="clipped above")
    if values and min(values) > 0 and max(values) / min(values) > 30:
        axes.set_yscale("log")
    return _finish(figure, "gradient norm")


def activity(run: RunData) -> Figure | None:
    train = run.entries("train")
    figure, (axes,) = _figure()
    _line(axes, train, "active_share", "active rollouts", BLUE)
    _line(axes, train, "all_success_groups", "groups that all succeeded", GREEN)
    _line(axes, train, "all_failure_groups", "groups that all failed", RED)
    return _finish(figure, "share", from_zero=True)


def speed(run: RunData) -> Figure | None:
    figure, (axes,) = _figure()
    _line(axes, run.entries("train"), "tokens_per_second_rollout", "sampling", BLUE, noisy=True)
    _line(axes, run.entries("train"), "tokens_per_second_train", "training", ORANGE, noisy=True)
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    return _finish(figure, "tokens per second", from_zero=True)


def phases(run: RunData) -> Figure | None:
    train = [entry for entry in run.entries("train") if number(entry.get("step")) is not None]
    size = -(-len(train) // _BARS) or 1
    bins = [train[start : start + size] for start in range(0, len(train), size)]
    figure, (axes,) = _figure()
    bottom = [0.0] * len(bins)
    for key, label, color in (
        ("seconds_rollout", "rollouts", BLUE),
        ("seconds_judge", "judge", VIOLET),
        ("seconds_critique", "critiques", GREY),
        ("seconds_e_step", "E-step", ORANGE),
        ("seconds_m_step", "M-step", GREEN),
        ("seconds_sync", "weights to the sampler", RED),
    ):
        heights = [_mean([number(entry.get(key)) or 0.0 for entry in each]) for each in bins]
        if any(heights):
            middles = [_mean([entry["step"] for entry in each]) for each in bins]
            axes.bar(middles, heights, width=0.85 * size, bottom=bottom, color=color, label=label)
            bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    return _finish(figure, "seconds per step", from_zero=True)


def as_svg(figure: Figure, salt: str) -> str:
    """Write the figure as an SVG element for a page, in the page's text colour.

    Args:
        figure: The figure.
        salt: A text that is unique on the page; equal figures with equal salts give equal SVG text.
    """
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": salt, "svg.fonttype": "none"}):
        FigureCanvasSVG(figure).print_svg(buffer, metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    # Nothing refers to these ids, and each would stand on the page once for every figure.
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    return re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', "", svg, count=1)


def _figure(rows: int = 1) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(5.2, 3.1), layout="constrained")
    figure.patch.set_alpha(0)
    axes = list(figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0])
    for each in axes:
        each.patch.set_alpha(0)
        each.grid(axis="y", color=_INK, alpha=0.12, linewidth=0.8)
        each.set_axisbelow(True)
        each.spines[["top", "right"]].set_visible(False)
        each.spines[["left", "bottom"]].set_color(_INK)
        each.spines[["left", "bottom"]].set_alpha(0.4)
        each.tick_params(colors=_INK, labelsize=8, length=3)
        each.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure, axes


def _finish(figure: Figure, *labels: str, from_zero: bool = False) -> Figure | None:
    """Label the axes and remove empty ones; return None where all are empty."""
    for axes, label in zip(figure.axes, labels, strict=True):
        if not axes.has_data():
            axes.remove()
            continue
        axes.set_ylabel(label, color=_INK, fontsize=9)
        if from_zero:
            axes.set_ylim(bottom=0, top=max(axes.get_ylim()[1], 1e-3))
        legend = axes.legend(
            loc="lower left", bbox_to_anchor=(0, 1), ncols=3, fontsize=8, frameon=False, labelcolor=_INK,
            handlelength=1.4, columnspacing=1.2, borderaxespad=0.2,
        )  # fmt: skip
        legend.set_in_layout(True)
    if not figure.axes:
        return None
    if len(figure.axes) == 1:
        figure.axes[0].set_subplotspec(figure.add_gridspec(1, 1)[0])
    low, high = figure.axes[-1].dataLim.intervalx
    if high - low < 1:
        figure.axes[-1].set_xlim(low - 1, high + 1)
    figure.axes[-1].set_xlabel("step", color=_INK, fontsize=9)
    figure.axes[-1].tick_params(labelbottom=True)
    return figure


def _line(
    axes: Axes, entries: list[Entry], key: str, label: str, color: str, *, style: str = "-", noisy: bool = False
) -> None:
    steps, values = series(entries, key)
    if not steps:
        return
    if noisy and len(steps) >= SMOOTHED_FROM:
        axes.plot(steps, values, color=color, linewidth=0.8, alpha=0.35)
        values = _running_mean(values, len(values) // 20)
    marker = "o" if len(steps) <= 12 else None
    axes.plot(steps, values, color=color, linestyle=style, linewidth=1.6, marker=marker, markersize=3, label=label)


def _running_mean(values: list[float], reach: int) -> list[float]:
    """Return the mean of each value with up to ``reach`` neighbours on either side."""
    windows = (values[max(i - reach, 0) : i + reach + 1] for i in range(len(values)))
    return [_mean(window) for window in windows]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _accuracy(axes: Axes, entries: list[Entry], split: str, color: str) -> None:
    """Draw the accuracy, with its interval where one was recorded."""
    steps, values = series(entries, "accuracy")
    if not steps:
        return
    axes.plot(steps, values, color=color, marker="o", markersize=4, linewidth=1.6, label=f"accuracy, {split}")
    for entry in entries:
        step, low, high = (number(entry.get(key)) for key in ("step", "low", "high"))
        if step is not None and low is not None and high is not None:
            axes.plot([step, step], [low, high], color=color, linewidth=1, marker="_", markersize=5, alpha=0.7)


def _splits(evaluations: list[Entry]) -> list[str]:
    return list(dict.fromkeys(str(entry.get("split") or "held out") for entry in evaluations))


def _differs(entries: list[Entry], one: str, other: str) -> bool:
    return series(entries, one) != series(entries, other)
