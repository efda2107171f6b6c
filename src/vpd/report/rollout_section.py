"""The section of the page that shows sampled rollouts."""

from __future__ import annotations

from collections.abc import Sequence

from vpd.report.markup import Html, element, join
from vpd.report.run_data import RunData
from vpd.runs import RolloutRecord, TurnRecord

_STRIP_BARS = 400
_BAR_PIXELS = 14
_STRIP_HEIGHT = 40


def rollout_section(run: RunData) -> Html | None:
    """Show each sampled rollout with its reward, feedback, teacher's prompt and completion; the first one is open."""
    if not run.samples:
        return None
    successes = sum(run.is_success(record) for record in run.samples)
    steps = len({record.step for record in run.samples})
    return join(
        element("h2", "Sampled rollouts"),
        element(
            "p",
            f"{_count(len(run.samples), 'rollout')} from {_count(steps, 'step')}, spread evenly over the run and over "
            f"successes and failures; so the {_count(successes, 'success', 'successes')} among them are not the "
            "success rate of the run.",
            class_="soft",
        ),
        *(_rollout(record, run, is_open=index == 0) for index, record in enumerate(run.samples)),
    )


def _rollout(record: RolloutRecord, run: RunData, is_open: bool) -> Html:
    if record.reward is None:
        kind, reward = "ungraded", "ungraded"
    else:
        kind, reward = "success" if run.is_success(record) else "failure", f"reward {record.reward:.3g}"
    notes = [
        _count(record.token_count, "token"),
        "cut at the length limit" if record.truncated else None,
        f"{record.source} feedback" if record.source else "no feedback",
    ]
    return element(
        "details",
        element(
            "summary",
            element("span", f"Step {record.step}"),
            element("span", reward, class_=f"badge {kind}"),
            element("span", f"{record.task_id} · " + " · ".join(note for note in notes if note), class_="soft"),
            element("span", " ".join(record.completion[:300].split()), class_="peek"),
        ),
        _text("Task", record.prompt),
        *_turns(record),
        _text("Feedback of the environment", record.feedback),
        *_teacher_prompts(record),
        class_="card rollout",
        open=is_open,
    )


def _text(title: str, text: str | None) -> Html | None:
    return None if text is None else join(element("h4", title), element("pre", text or "(empty)"))


def _turns(record: RolloutRecord) -> list[Html | None]:
    """Each turn's completion with its strip; turns are numbered where there are several."""
    shown = []
    for number, turn in enumerate(record.turns, start=1):
        title = "Completion" if len(record.turns) == 1 else f"Completion of turn {number}"
        shown += [_text(title, turn.completion), _strip(turn)]
    return shown


def _teacher_prompts(record: RolloutRecord) -> list[Html | None]:
    several = len(record.turns) > 1
    return [
        _text(f"Teacher's prompt of turn {number}" if several else "Teacher's prompt", turn.teacher_prompt)
        for number, turn in enumerate(record.turns, start=1)
    ]


def _strip(record: TurnRecord) -> Html | None:
    """Draw a bar for each token: its height is the divergence, its colour shows who finds the token more likely."""
    student, teacher = record.student_log_probs, record.teacher_log_probs
    if not student or not teacher or len(student) != len(teacher):
        return None
    gaps = [theirs - own for own, theirs in zip(student, teacher, strict=True)]
    divergence = record.divergence
    heights = divergence if divergence and len(divergence) == len(gaps) else [abs(gap) for gap in gaps]
    title = "Divergence" if heights is divergence else "Log-ratio of teacher and student"
    gaps, heights = _thinned(gaps, heights)
    top = max(heights)
    bars = {"more": "", "less": ""}
    for index, (gap, height) in enumerate(zip(gaps, heights, strict=True)):
        bar = max(height / top, 0.0) * _STRIP_HEIGHT if top > 0 else 0.0
        bars["more" if gap >= 0 else "less"] += f"M{index} {_STRIP_HEIGHT}v{-bar:.1f}h.85V{_STRIP_HEIGHT}z"
    return join(
        element(
            "h4",
            f"{title} by token (highest {top:.2g} nats)",
            element("span", class_="key more"),
            "the teacher likes the token more",
            element("span", class_="key less"),
            "less than the student",
        ),
        element(
            "svg",
            *(element("path", class_=kind, d=path) for kind, path in bars.items() if path),
            class_="strip",
            viewBox=f"0 0 {len(gaps)} {_STRIP_HEIGHT}",
            preserveAspectRatio="none",
            style=f"max-width:{len(gaps) * _BAR_PIXELS}px",
            role="img",
            aria_label=f"{title} by token",
        ),
    )


def _thinned(gaps: Sequence[float], heights: Sequence[float]) -> tuple[list[float], list[float]]:
    """Keep a limited number of bars, each the highest among its neighbours, so that peaks stay visible."""
    width = -(-len(gaps) // _STRIP_BARS)
    starts = range(0, len(gaps), width)
    peaks = [max(range(start, min(start + width, len(gaps))), key=lambda i: heights[i]) for start in starts]
    return [gaps[i] for i in peaks], [heights[i] for i in peaks]


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"
