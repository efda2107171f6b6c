"""The comparison of a study's arms: a table with intervals and paired differences, and curves with bands."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vpd.evaluation import crossed_interval
from vpd.report.plots import BLUE, GREEN, GREY, ORANGE, RED, VIOLET
from vpd.report.run_data import Entry, number, series
from vpd.runs.files import RunError, atomic_write_text
from vpd.runs.folder import read_json, read_metrics
from vpd.studies.study import START, Study, runs_of

_COLORS = (BLUE, ORANGE, GREEN, RED, VIOLET, GREY)
_STYLES = ("-", "--", ":", "-.", (0, (1, 3)), (0, (6, 3)))

_LEGEND_LINE = 0.18
"""The height of one line of the legend, in inches."""

_SMOOTHED_OVER = 5
"""The number of neighbouring batches over which a curve is averaged."""

_END = 0.25
"""The share of an arm's batches, the last ones, over which its margin at the end is averaged."""

_LINE_FROM = 5
"""The number of points at which a line needs no markers; a single point without a marker would be invisible."""

_MOST_LEFT_OUT = 0.05
"""The largest share of the questions that may be ungraded in some run."""

Curve = list[tuple[float, float]]
"""Pairs of a step and a value."""


@dataclass(frozen=True)
class RunResult:
    """The numbers of one finished run.

    Attributes:
        seed: The run's seed.
        outcomes: The share of successes for each question of the study's split.
        steps: How many rollout batches it trained on.
        train_seconds: How long training took, a warm start included.
        tokens_rollout: How many tokens were sampled in training.
        tokens_computed: How many tokens went through training passes.
        success_rate: The success rate of the rollouts, by step.
        selection: The accuracy on the selection split, by step, where it was measured.
        margin: The metric ``margin_on_arrival``, by step.
    """

    seed: int
    outcomes: dict[str, float]
    steps: int
    train_seconds: float
    tokens_rollout: int
    tokens_computed: int
    success_rate: Curve
    selection: Curve
    margin: Curve


@dataclass(frozen=True)
class ArmResult:
    """The numbers of an arm over its runs.

    Each of the triples is a value with the bounds of its 95% interval; accuracies and their differences are shares.

    Attributes:
        name: The arm's name.
        runs: The arm's runs, one for each seed.
        accuracy: The mean accuracy over seeds and questions.
        gain: The accuracy minus that of the shared start on the same questions; None where the start has not answered
            them all.
        difference: The accuracy minus the first arm's, on the same seeds and questions; None for the first arm.
        margin: The margin on fresh rollouts, as the mean over the last quarter of the batches and over seeds; its
            interval is over seeds, and with one seed the three values are equal. None where some run has no margin
            there, for example without a teacher.
    """

    name: str
    runs: list[RunResult]
    accuracy: tuple[float, float, float]
    gain: tuple[float, float, float] | None
    difference: tuple[float, float, float] | None
    margin: tuple[float, float, float] | None


@dataclass(frozen=True)
class Comparison:
    """The numbers of a finished study.

    Attributes:
        start: The rows of the shared start's table.
        arms: The arms in their order.
        questions: How many questions of the split were graded in every run.
        left_out: How many questions were not, and are left out.
        split: The split that is compared, ``final`` or ``selection``.
    """

    start: list[Entry]
    arms: list[ArmResult]
    questions: int
    left_out: int
    split: str


def compare(study: Study) -> Comparison:
    """Read the runs of a finished study and compare its arms.

    Raises:
        RunError: A run has no evaluation on the split, or the arms' questions differ too much: more than a twentieth of
            all questions would have to be left out.
    """
    start = read_json(Path(study.output_dir) / START / "result.json") or {}
    runs = [
        [_read(run.folder, seed, study.split) for run, seed in zip(runs_of(study, arm), study.seeds, strict=True)]
        for arm in study.arms
    ]
    asked = set[str]().union(*(run.outcomes for arm_runs in runs for run in arm_runs))
    questions = sorted(asked.intersection(*(run.outcomes for arm_runs in runs for run in arm_runs)))
    left_out = len(asked) - len(questions)
    if not questions or left_out > _MOST_LEFT_OUT * len(asked):
        raise RunError(
            f"Only {len(questions)} of {len(asked)} questions were graded in every run of the study in "
            f"{study.output_dir}, so that its arms cannot be compared: do they have the same data settings?"
        )
    scores = [[[run.outcomes[question] for question in questions] for run in arm_runs] for arm_runs in runs]
    of_start = _outcomes(Path(study.output_dir) / START, study.split)
    before = [of_start[question] for question in questions] if of_start.keys() >= set(questions) else None
    arms = []
    for arm, arm_runs, values in zip(study.arms, runs, scores, strict=True):
        gain = None if before is None else _difference(values, [before] * len(values))
        difference = None if values is scores[0] else _difference(values, scores[0])
        arms.append(ArmResult(arm.name, arm_runs, _mean(values), gain, difference, _margin_at_end(arm_runs)))
    return Comparison(start.get("rows", []), arms, len(questions), left_out, study.split)


def write_comparison(study: Study) -> str:
    """Write ``comparison.json``, ``table.md``, and ``learning`` and ``margin`` as PNG and SVG; return the table."""
    comparison, folder = compare(study), report_folder(study)
    folder.mkdir(parents=True, exist_ok=True)
    table = table_of(comparison)
    atomic_write_text(folder / "comparison.json", _json(comparison) + "\n")
    atomic_write_text(folder / "table.md", table)
    figures = {"learning": learning_curves(comparison), "margin": margin_curves(comparison)}
    for name, figure in figures.items():
        if figure is not None:
            FigureCanvasAgg(figure).print_figure(folder / f"{name}.png", dpi=150)
            FigureCanvasSVG(figure).print_figure(folder / f"{name}.svg", metadata={"Date": None})
    return table


def report_folder(study: Study) -> Path:
    """Return the folder that :func:`write_comparison` writes to."""
    return Path(study.report_dir or study.output_dir)


def table_of(comparison: Comparison) -> str:
    """Write the comparison as a Markdown table, with a note on its intervals and columns."""
    first = comparison.arms[0].name
    lines = [
        f"| | accuracy (95% interval) | gain on the start | difference from {first} | margin at the end | seeds "
        "| steps | training s | rollout tokens | training tokens |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in comparison.start:
        lines.append(f"| {row['name']} | {_percent(row.get('accuracy'))} | | | | | | | | |")
    for arm in comparison.arms:
        mean, low, high = arm.accuracy
        columns = (
            [run.steps for run in arm.runs],
            [run.train_seconds for run in arm.runs],
            [run.tokens_rollout for run in arm.runs],
            [run.tokens_computed for run in arm.runs],
        )
        means = " | ".join(f"{statistics.fmean(column):,.0f}" for column in columns)
        accuracy = f"{mean:.1%} ({low:.1%} to {high:.1%})"
        margin = "{:.2f} ({:.2f} to {:.2f})" if len(arm.runs) > 1 else "{:.2f}"
        margin = "" if arm.margin is None else margin.format(*arm.margin)
        columns = (arm.name, accuracy, _points_of(arm.gain), _points_of(arm.difference), margin, len(arm.runs), means)
        lines.append(f"| {' | '.join(map(str, columns))} |")
    lines.append("")
    lines.append(
        f"{comparison.questions} questions of the {comparison.split} split"
        + (f" ({comparison.left_out} that were not graded in every run are left out)" if comparison.left_out else "")
        + "; intervals resample seeds and questions"
        + (", here questions alone" if len(comparison.arms[0].runs) == 1 else "")
        + "; the margin is that of the teacher's implicit rewards (at each arm's bco_beta), successes less failures, "
        "on rollouts that no update has seen, mean of the last quarter of the batches, its interval over seeds; steps, "
        "seconds and tokens are means over seeds."
    )
    return "\n".join(lines) + "\n"


def _json(comparison: Comparison) -> str:
    """Write all numbers as JSON.

    The questions' ids are listed once; each run's outcomes are in the same order, with null where it was not graded.
    """
    values = asdict(comparison)
    runs = [run for arm in values["arms"] for run in arm["runs"]]
    names = sorted(set[str]().union(*(run["outcomes"] for run in runs)))
    for run in runs:
        run["outcomes"] = [run["outcomes"].get(name) for name in names]
    return json.dumps({**values, "question_ids": names}, allow_nan=False)


def learning_curves(comparison: Comparison) -> Figure | None:
    """Draw the success rate of the rollouts, and the accuracy on the selection split where it was measured."""
    return _curves(
        comparison,
        {"success rate of rollouts": "success_rate", "accuracy, selection split": "selection"},
    )


def margin_curves(comparison: Comparison) -> Figure | None:
    """Draw the margin of implicit rewards on fresh rollouts."""
    return _curves(comparison, {"margin on fresh rollouts": "margin"})


def _read(folder: Path, seed: int, split: str) -> RunResult:
    result, metrics = read_json(folder / "result.json"), read_metrics(folder)
    outcomes = _outcomes(folder, split)
    if result is None or not outcomes:
        remedy = "eval.final_tasks above 0" if split == "final" else "eval.eval_steps"
        raise RunError(f"The run in {folder} has no evaluation on the {split} split: set {remedy}.")
    train = [entry for entry in metrics if entry.get("event") == "train"]
    # An arm may have a warm start of its own, which trains before the first step.
    supervised = sum(number(entry.get("seconds")) or 0.0 for entry in metrics if entry.get("event") == "warm_start")
    return RunResult(
        seed=seed,
        outcomes=outcomes,
        steps=result["steps"],
        train_seconds=result["train_seconds"] + supervised,
        tokens_rollout=sum(int(number(entry.get("tokens_rollout")) or 0) for entry in train),
        tokens_computed=sum(int(number(entry.get("tokens_computed")) or 0) for entry in train),
        success_rate=_points(train, "success_rate"),
        selection=_points(_evaluations(metrics, "selection"), "accuracy"),
        margin=_points(train, "margin_on_arrival"),
    )


def _evaluations(metrics: Sequence[Entry], split: str) -> list[Entry]:
    return [entry for entry in metrics if entry.get("event") == "eval" and entry.get("split") == split]


def _outcomes(folder: Path, split: str) -> dict[str, float]:
    """Return the outcomes of the last evaluation on a split, by question; they are empty where there was none."""
    found = _evaluations(read_metrics(folder), split)
    return found[-1]["outcomes"] if found else {}


def _points(entries: Sequence[Entry], key: str) -> Curve:
    return list(zip(*series(entries, key), strict=True))


def _points_of(difference: tuple[float, float, float] | None) -> str:
    """Write a difference in percentage points, with its interval."""
    if difference is None:
        return ""
    value, low, high = (100 * part for part in difference)
    return f"{value:+.1f} ({low:+.1f} to {high:+.1f})"


def _percent(value: Any) -> str:
    found = number(value)
    return "" if found is None else f"{found:.1%}"


def _difference(values: Sequence[Sequence[float]], others: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """Return the mean of ``values`` minus ``others``, paired by seed and question, with its interval."""
    return _mean(
        [
            [own - other for own, other in zip(mine, theirs, strict=True)]
            for mine, theirs in zip(values, others, strict=True)
        ]
    )


def _mean(values: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    return (statistics.fmean(value for row in values for value in row), *crossed_interval(values))


def _margin_at_end(runs: Sequence[RunResult]) -> tuple[float, float, float] | None:
    ends = [[value for step, value in run.margin if step > (1 - _END) * run.steps] for run in runs]
    if not all(ends):
        return None
    return _mean([[statistics.fmean(end)] for end in ends])


def _curves(comparison: Comparison, panels: dict[str, str]) -> Figure | None:
    """Draw one panel for each label with data.

    A line shows an arm's mean over seeds, and a band reaches from its lowest to its highest seed.
    """
    shown = {
        label: name for label, name in panels.items() if any(getattr(r, name) for a in comparison.arms for r in a.runs)
    }
    if not shown:
        return None
    # The more arms, the paler the bands: many strong bands would hide the lines.
    strength = min(0.15, 0.45 / len(comparison.arms))
    height = max(3.4 * len(shown), _LEGEND_LINE * len(comparison.arms) + 0.4)
    figure = Figure(figsize=(8.6, height), layout="constrained")
    for row, (label, name) in enumerate(shown.items()):
        axes = figure.add_subplot(len(shown), 1, row + 1)
        for index, arm in enumerate(comparison.arms):
            style = _STYLES[index // len(_COLORS) % len(_STYLES)]
            curves = [getattr(run, name) for run in arm.runs]
            _band(axes, arm.name, curves, _COLORS[index % len(_COLORS)], style, strength)
        axes.set_xlabel("rollout batch")
        axes.set_ylabel(label)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.2)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    # One legend stands beside all panels, because a study may have more arms than a panel has room for.
    handles = {str(line.get_label()): line for axes in reversed(figure.axes) for line in axes.get_lines()}
    names = [arm.name for arm in comparison.arms if arm.name in handles]
    figure.legend([handles[name] for name in names], names, loc="outside right upper", frameon=False, fontsize=8)
    return figure


def _band(axes: Axes, name: str, curves: Sequence[Curve], color: str, style: Any, strength: float) -> None:
    smooth = [dict(_smoothed(curve)) for curve in curves]
    steps = sorted(set.union(set(), *smooth))
    values = [[curve[step] for curve in smooth if step in curve] for step in steps]
    if not steps:
        return
    marker = "o" if len(steps) < _LINE_FROM else None
    means = [statistics.fmean(each) for each in values]
    axes.plot(steps, means, color=color, linestyle=style, marker=marker, label=name)
    axes.fill_between(
        steps, [min(each) for each in values], [max(each) for each in values], color=color, alpha=strength, linewidth=0
    )


def _smoothed(curve: Curve) -> Curve:
    """Average each value with the ones right before it, because single batches are noisy."""
    if len(curve) < 4 * _SMOOTHED_OVER:
        return curve
    values = [value for _, value in curve]
    return [
        (step, math.fsum(values[max(0, i + 1 - _SMOOTHED_OVER) : i + 1]) / min(i + 1, _SMOOTHED_OVER))
        for i, (step, _) in enumerate(curve)
    ]
