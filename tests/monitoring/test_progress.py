import io
import time

import pytest
from rich.console import Console

from vpd.monitoring.progress import Progress, duration

METRICS = {"step": 3, "reward": 0.421, "active_share": 0.88, "margin": None, "e_loss": float("nan")}


def plain() -> Console:
    return Console(file=io.StringIO(), force_terminal=False, width=40)


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_elsewhere_than_on_a_terminal_each_step_is_one_line():
    console = plain()
    with Progress(console) as progress:
        progress.start(30, completed=2)
        progress.step(METRICS)
        progress.step({})
        progress.message("[red] brackets stay, and long lines are not wrapped at the width of the console")
    lines = shown(console).splitlines()
    assert len(lines) == 3
    assert "s] step 3/30 reward 0.421 active 0.88 " in lines[0]
    assert "margin" not in lines[0]
    assert "step 4/30" in lines[1]
    assert "[red] brackets stay" in lines[2]


def test_on_a_terminal_the_line_is_live_fits_and_stops_twice():
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    progress = Progress(console)
    progress.start(500)
    # A step that takes no time leaves none for the others.
    time.sleep(0.05)
    speed = {"tokens_per_second_rollout": 1234.5, "tokens_per_second_train": 12345.6}
    progress.step({**METRICS, **speed, "margin": 1.25, "divergence": 0.25, "length_mean": 1000.0})
    progress.message("saved")
    progress.stop()
    progress.stop()
    text = shown(console)
    for part in ("3/500", "reward 0.421", "margin +1.25", "tok/s 1,234", "left", "saved"):
        assert part in text
    assert "…" not in text


def test_a_run_that_ends_by_the_clock_has_no_more_left_than_that():
    console = plain()
    with Progress(console) as progress:
        progress.start(10**9, max_seconds=30)
        time.sleep(0.01)
        progress.step({})
    assert "30s left" in shown(console)


def test_nothing_is_said_to_be_left_for_no_time_while_work_goes_on(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    console = plain()
    with Progress(console) as progress:
        progress.start(1000, max_seconds=30)
        # Evaluations took 40 of the 60 seconds, and do not count against the limit.
        now[0] += 60
        progress.step({"seconds": 20.0})
        now[0] += 30
        progress.step({"seconds": 10.5})
    lines = shown(console).splitlines()
    assert lines[0].endswith("30s left")
    assert lines[1].endswith("training ends soon")


def test_steps_without_a_start_are_shown():
    console = plain()
    Progress(console).step({})
    assert "step 1" in shown(console)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (59.6, "1m 00s"), (200, "3m 20s"), (3599.6, "1h 00m"), (18120, "5h 02m")]
)
def test_durations_read_well(seconds, text):
    assert duration(seconds) == text
