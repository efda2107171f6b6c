import numpy
import pytest

from vpd.report import plots
from vpd.report.run_data import RunData

PLOTS = [
    plots.reward_and_accuracy, plots.margins, plots.divergence_and_entropy, plots.lengths, plots.gradient_norms,
    plots.activity, plots.speed, plots.phases,
]  # fmt: skip


def run_of(*entries: dict[str, object]) -> RunData:
    return RunData("run", {}, [{"event": "train", **entry} for entry in entries], None, [])


@pytest.mark.parametrize("plot", PLOTS)
def test_nothing_recorded_gives_no_figure(plot):
    assert plot(run_of()) is None
    assert plot(run_of({"step": 1}, {"step": 2, "reward": None})) is None


def test_an_empty_panel_leaves_its_place_to_the_other():
    figure = plots.divergence_and_entropy(run_of({"step": 1, "entropy": 1.0}, {"step": 2, "entropy": 0.9}))
    assert figure is not None
    plots.as_svg(figure, "salt")
    (axes,) = figure.axes
    assert axes.get_ylabel().startswith("entropy")
    assert axes.get_position().height > 0.6


def test_phases_stack_to_the_seconds_of_the_step():
    entries = [{"step": step, "seconds_rollout": 2.0, "seconds_m_step": 1.0} for step in range(1, 301)]
    figure = plots.phases(run_of(*entries, {"step": 301, "seconds_rollout": 2.0}))
    assert figure is not None
    assert len(figure.axes[0].patches) <= 2 * 60
    assert figure.axes[0].dataLim.ymax == pytest.approx(3.0)


def test_long_noisy_curves_get_a_running_mean_that_keeps_a_constant():
    figure = plots.reward_and_accuracy(run_of(*({"step": step, "reward": 0.5} for step in range(100))))
    assert figure is not None
    raw, mean = figure.axes[0].lines
    assert raw.get_alpha() is not None
    assert numpy.asarray(mean.get_xydata()).tolist() == [[step, 0.5] for step in range(100)]


def test_equal_figures_give_equal_text():
    def draw(salt: str) -> str:
        figure = plots.gradient_norms(run_of({"step": 1, "grad_norm": 0.5}))
        assert figure is not None
        return plots.as_svg(figure, salt)

    assert draw("a") == draw("a")


def test_a_single_step_stands_on_a_scale_of_whole_steps():
    figure = plots.speed(run_of({"step": 7, "tokens_per_second_rollout": 400.0}))
    assert figure is not None
    assert figure.axes[0].get_xlim() == (6, 8)
    assert all(tick == int(tick) for tick in figure.axes[0].get_xticks())
