"""The page of a run: it shows the settings, the results, the curves, and rollouts that the model wrote."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

from vpd.monitoring.progress import duration
from vpd.report import plots
from vpd.report.markup import Html, element, join
from vpd.report.rollout_section import rollout_section
from vpd.report.run_data import Entry, RunData, load_run, number
from vpd.runs import atomic_write_text

SAMPLES = 20

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
"""The page's security policy: even if markup slipped through, the browser would run no script and load nothing."""

_CURVES = (
    ("Reward and accuracy", plots.reward_and_accuracy, "Accuracy on held-out questions with its 95% interval."),
    (
        "Teacher's margin",
        plots.margins,
        "Mean implicit reward of successes minus that of failures. The E-step should raise it, on fresh rollouts too.",
    ),
    (
        "Divergence and entropy",
        plots.divergence_and_entropy,
        "A divergence near zero leaves nothing to distil; an entropy that falls to zero is a collapse.",
    ),
    ("Length and truncation", plots.lengths, "A runaway length or repetition is the usual first sign of a collapse."),
    ("Gradient norm", plots.gradient_norms, "The norm before clipping."),
    (
        "Rollouts that teach",
        plots.activity,
        "A rollout is active where it has feedback; a group is one prompt's rollouts.",
    ),
    ("Speed", plots.speed, "Tokens sampled and tokens trained on, each divided by the time of its own phase."),
    ("Time by phase", plots.phases, "The seconds of a step by phase; in long runs, the mean over neighbouring steps."),
)


def write_report(folder: str | Path) -> Path:
    """Write ``report.html`` from the files of a run's folder, and return its path; the run need not have finished.

    The page is self-contained: it has no script, and loads nothing from anywhere.

    Raises:
        RunError: The folder holds no run, or one of its files is broken.
    """
    run = load_run(Path(folder), SAMPLES)
    path = Path(folder) / "report.html"
    atomic_write_text(path, _page(run))
    return path


def _page(run: RunData) -> str:
    title = f"VPD run {run.name}"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        element("style", Html(files("vpd.report").joinpath("page.css").read_text(encoding="utf-8"))),
    )
    body = element(
        "body",
        _header(run),
        _results(run),
        _gaps(run),
        _warnings(run),
        _curves(run),
        rollout_section(run),
        _settings(run),
    )
    return "<!doctype html>\n" + element("html", head, body, lang="en") + "\n"


def _header(run: RunData) -> Html:
    result = run.result or {}
    train = run.entries("train")
    done = max((int(step) for entry in train if (step := number(entry.get("step"))) is not None), default=0)
    total = number(run.setting("run.max_steps"))
    what = (
        result.get("algorithm") or run.setting("algorithm.type"),
        result.get("model") or run.setting("model.name"),
        result.get("environment") or _environment(run),
    )
    seconds = number(result.get("seconds_total"))
    if seconds is None:
        seconds = _sum(train, "seconds")
    memory = max((value for entry in train if (value := number(entry.get("peak_memory_gb"))) is not None), default=None)
    tokens = _sum(train, "tokens_rollout")
    facts = {
        "steps": f"{done} of {total:.0f}" if total is not None else str(done),
        "time": duration(seconds) if seconds else None,
        "tokens sampled": f"{tokens:,.0f}" if tokens else None,
        "prompts a step": run.setting("rollout.prompts_per_step"),
        "rollouts a prompt": run.setting("rollout.num_generations"),
        "learning rate": run.setting("optim.learning_rate"),
        "peak memory": f"{memory:.1f} GB" if memory else None,
        "seed": run.setting("run.seed"),
    }
    return join(
        element("p", "Variational Policy Distillation · run", class_="soft"),
        element("h1", run.name),
        element("p", " · ".join(str(part) for part in what if part)),
        element(
            "dl",
            *(
                element("div", element("dt", label), element("dd", str(value)))
                for label, value in facts.items()
                if value is not None
            ),
            class_="facts",
        ),
        None
        if run.result is not None
        else element("p", "There is no final result: the run is still going or was interrupted.", class_="card note"),
    )


def _results(run: RunData) -> Html | None:
    rows = [row for row in (run.result or {}).get("rows") or [] if isinstance(row, dict)]
    if not rows:
        return None
    cells = [
        element(
            "tr",
            element("td", str(row.get("name") or "")),
            element("td", percent(row.get("accuracy")), class_="number"),
            element("td", interval(row), class_="number"),
            element("td", _interval_bar(row)),
            element("td", f"{n:,.0f}" if (n := number(row.get("n"))) is not None else "", class_="number"),
            element("td", duration(s) if (s := number(row.get("seconds"))) is not None else "", class_="number"),
        )
        for row in rows
    ]
    heads = (
        ("", ""),
        ("accuracy", "number"),
        ("95% interval", "number"),
        ("0 to 100%", ""),
        ("n", "number"),
        ("time", "number"),
    )
    head = element("tr", *(element("th", text, class_=kind) for text, kind in heads))
    table = element("table", element("thead", head), element("tbody", *cells))
    return join(element("h2", "Result"), element("div", table, class_="card scroll"))


def _interval_bar(row: Entry) -> Html | None:
    """Draw the accuracy as a dot on a line from 0 to 100%, and its interval as a bar."""
    accuracy, low, high = (number(row.get(key)) for key in ("accuracy", "low", "high"))
    if accuracy is None:
        return None
    parts = [element("line", x1="0%", x2="100%", y1="9", y2="9", stroke="currentColor", stroke_opacity="0.2")]
    if low is not None and high is not None:
        parts.append(
            element("line", x1=f"{low:.2%}", x2=f"{high:.2%}", y1="9", y2="9", stroke="var(--blue)", stroke_width="4")
        )
    parts.append(element("circle", cx=f"{accuracy:.2%}", cy="9", r="5", fill="var(--blue)"))
    return element("svg", *parts, class_="interval", role="img", aria_label=percent(accuracy))


def _gaps(run: RunData) -> Html | None:
    entries = run.entries("gap")
    if not entries:
        return None
    paragraphs = []
    for entry in entries:
        gap = number(entry.get("gap"))
        step = entry.get("step")
        paragraphs.append(
            element(
                "p",
                f"{f'After step {step}' if step else 'Before training'} the student answers "
                f"{percent(entry.get('student_accuracy'))} of the questions; the same network with feedback in its "
                f"prompt, the teacher, {percent(entry.get('teacher_accuracy'))}: a gap of "
                f"{'unknown size' if gap is None else f'{100 * gap:+.1f} points'}{_bounds(entry)}.",
                class_="card",
            )
        )
    advice = "A teacher that is no better has nothing to teach; a warm start mends that."
    return join(element("h2", "The gap between teacher and student"), *paragraphs, element("p", advice))


def _warnings(run: RunData) -> Html | None:
    by_name: dict[str, list[Entry]] = {}
    for entry in run.entries("warning"):
        by_name.setdefault(str(entry.get("name") or "unnamed"), []).append(entry)
    if not by_name:
        return None
    rows = (
        element(
            "tr",
            element("td", element("b", name)),
            element("td", _steps(entries)),
            element("td", str(entries[-1].get("text") or "")),
        )
        for name, entries in by_name.items()
    )
    head = element("tr", *(element("th", text) for text in ("warning", "at step", "latest text")))
    return join(
        element("h2", "Warnings"),
        element("div", element("table", element("thead", head), element("tbody", *rows)), class_="card scroll"),
    )


def _curves(run: RunData) -> Html:
    cards = []
    for index, (title, plot, caption) in enumerate(_CURVES):
        figure = plot(run)
        if figure is not None:
            drawing = element("div", Html(plots.as_svg(figure, salt=f"curve-{index}")), role="img", aria_label=title)
            cards.append(
                element("section", element("h3", title), element("p", caption, class_="soft"), drawing, class_="card")
            )
    body = (
        element("div", *cards, class_="curves")
        if cards
        else element("p", "No step has been recorded yet.", class_="card")
    )
    smoothed = len(run.entries("train")) >= plots.SMOOTHED_FROM
    note = element("p", "Where a curve has a thin and a thick line, the thick one is the running mean.", class_="soft")
    return join(element("h2", "Curves"), note if smoothed else None, body)


def _settings(run: RunData) -> Html | None:
    if not run.config:
        return None
    rows = (
        element("tr", element("td", key), element("td", "none" if value is None else str(value)))
        for key, value in _flat(run.config)
    )
    table = element("table", element("tbody", *rows), class_="settings")
    return join(
        element("h2", "Settings"),
        element(
            "details",
            element("summary", "Every setting of the run"),
            element("div", table, class_="scroll"),
            class_="card",
        ),
    )


def _flat(values: Entry, prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in values.items():
        if isinstance(value, dict) and value:
            pairs += _flat(value, f"{prefix}{key}.")
        else:
            pairs.append((f"{prefix}{key}", value))
    return pairs


def _environment(run: RunData) -> str | None:
    parts = (run.setting(f"data.{key}") for key in ("environment", "dataset", "path"))
    return " ".join(str(part) for part in parts if part) or None


def _sum(entries: list[Entry], key: str) -> float:
    return sum(number(entry.get(key)) or 0.0 for entry in entries)


def _steps(entries: list[Entry]) -> str:
    steps = list(dict.fromkeys(str(entry.get("step", "?")) for entry in entries))
    return ", ".join(steps) if len(steps) <= 6 else f"{', '.join(steps[:5])}, … {steps[-1]} ({len(steps)} in all)"


def percent(share: Any) -> str:
    """Write a share for people: 0.4213 becomes ``42.1%``, and anything but a number ``unknown``."""
    value = number(share)
    return "unknown" if value is None else f"{100 * value:.1f}%"


def interval(row: Entry) -> str:
    """Write the bounds of a share, such as ``36.0 to 48.2%``; without bounds the text is empty."""
    low, high = number(row.get("low")), number(row.get("high"))
    return "" if low is None or high is None else f"{100 * low:.1f} to {100 * high:.1f}%"


def _bounds(entry: Entry) -> str:
    low, high = number(entry.get("low")), number(entry.get("high"))
    return "" if low is None or high is None else f" (95% interval {100 * low:+.1f} to {100 * high:+.1f})"
