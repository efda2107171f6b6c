"""A study's table holds the numbers that are known by construction."""

from __future__ import annotations

import json

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from vpd.runs import RunError, RunFolder
from vpd.studies.comparison import compare, learning_curves, margin_curves, table_of, write_comparison
from vpd.studies.study import Study, runs_of


def make_study(tmp_path, outcomes, seeds=(0, 1), selection=(), start=None, margins=None):
    """Write a finished study.

    ``outcomes[arm][seed]`` lists the questions' scores, ``start`` lists those of the shared start, and
    ``margins[arm][seed]`` lists the margins by step, with None where there is none.
    """
    arms = [{"name": name} for name in outcomes]
    study = Study(config="none.toml", output_dir=str(tmp_path), seeds=list(seeds), arms=arms)  # pyright: ignore
    if start is not None:
        named = {f"q{i}": score for i, score in enumerate(start)}
        for name, scores in (("base model", dict.fromkeys(named, 0.0)), ("after warm start", named)):
            RunFolder(tmp_path / "start", resume=True).log(
                0, "eval", {"split": "final", "name": name, "outcomes": scores}
            )
    for arm in study.arms:
        by_seed = margins[arm.name] if margins else [[0.1, 0.2, 0.3]] * len(seeds)
        for run, scores, arrivals in zip(runs_of(study, arm), outcomes[arm.name], by_seed, strict=True):
            folder = RunFolder(run.folder)
            for step, arrival in enumerate(arrivals, start=1):
                margin = {"margin": 9.0, **({} if arrival is None else {"margin_on_arrival": arrival})}
                folder.log(step, "train", {"success_rate": 0.2 * step, "tokens_rollout": 10, **margin})
            for step in selection:
                folder.log(step, "eval", {"split": "selection", "accuracy": 0.3, "outcomes": {"s0": step / 10}})
            named = {f"q{i}": score for i, score in enumerate(scores)}
            folder.log(3, "eval", {"split": "final", "accuracy": 0.0, "outcomes": named})
            folder.write_result({"rows": [], "steps": len(arrivals), "train_seconds": 6.0, "interrupted": None})
    return study


def test_differences_are_paired_by_seed_and_question(tmp_path):
    # Seeds and questions differ widely, but B is always half a point better, so that the difference has no spread.
    first = [[0.0, 0.5, 0.0, 0.5], [0.5, 0.5, 0.5, 0.0]]
    ahead = [[score + 0.5 for score in seed] for seed in first]
    comparison = compare(make_study(tmp_path, {"A": first, "B": ahead}))
    mean, low, high = comparison.arms[0].accuracy
    assert mean == pytest.approx(0.3125)
    assert low < 0.25
    assert high > 0.4
    assert comparison.arms[0].difference is None
    assert comparison.arms[1].difference == pytest.approx((0.5, 0.5, 0.5))
    assert "+50.0 (+50.0 to +50.0)" in table_of(comparison)


def test_the_gain_is_on_the_start_as_the_arms_begin_with_it(tmp_path):
    study = make_study(tmp_path, {"A": [[0.5, 1.0], [0.5, 1.0]]}, start=[0.0, 0.5])
    assert compare(study).arms[0].gain == pytest.approx((0.5, 0.5, 0.5))
    assert "| +50.0 (+50.0 to +50.0) |  | 0.30 (0.30 to 0.30) | 2 |" in table_of(compare(study))
    other = make_study(tmp_path / "other", {"A": [[0.5, 1.0], [0.5, 1.0]]}, start=[0.0])
    assert compare(other).arms[0].gain is None


def test_curves_and_tokens_are_read_from_the_metrics(tmp_path):
    comparison = compare(make_study(tmp_path, {"A": [[1.0], [0.0]]}))
    assert dict(comparison.arms[0].runs[0].margin) == pytest.approx({1: 0.1, 2: 0.2, 3: 0.3})
    assert comparison.arms[0].runs[0].tokens_rollout == 30


def test_the_margin_at_the_end_is_that_of_the_last_quarter_by_seed(tmp_path):
    early = [9.0] * 6
    # A batch without a success or without a failure has no margin.
    margins = {
        "A": [[*early, 1.0, 3.0], [*early, None, 4.0]],
        "no teacher": [[None] * 8] * 2,
        "silent at last": [[*early, 1.0, 1.0], [*early, None, None]],
    }
    comparison = compare(make_study(tmp_path, {arm: [[1.0], [0.0]] for arm in margins}, margins=margins))
    first, *others = (arm.margin for arm in comparison.arms)
    assert first == pytest.approx((3.0, 2.0, 4.0))
    assert others == [None, None]
    assert "| 3.00 (2.00 to 4.00) | 2 |" in table_of(comparison)
    single = make_study(tmp_path / "one", {"A": [[1.0]]}, seeds=(0,), margins={"A": [[0.0, 2.5]]})
    assert "| 2.50 | 1 |" in table_of(compare(single))


def test_questions_that_some_run_could_not_grade_are_left_out_and_other_questions_refused(tmp_path):
    many = [1.0] * 40
    comparison = compare(make_study(tmp_path / "one", {"A": [many, many], "B": [many, [1.0] * 39]}))
    assert (comparison.questions, comparison.left_out) == (39, 1)
    assert "1 that were not graded in every run" in table_of(comparison)
    with pytest.raises(RunError, match="Only 1 of 2 questions"):
        compare(make_study(tmp_path / "other", {"A": [[1.0], [0.0]], "B": [[1.0, 1.0], [0.0, 0.0]]}))


def test_a_study_may_compare_on_the_selection_split(tmp_path):
    study = make_study(tmp_path, {"A": [[1.0], [0.0]]}, selection=(2, 3))
    study.split = "selection"
    comparison = compare(study)
    assert comparison.arms[0].accuracy[0] == pytest.approx(0.3)
    assert "1 questions of the selection split" in table_of(comparison)
    assert "eval.final_tasks=0" in runs_of(study, study.arms[0])[0].overrides
    with pytest.raises(RunError, match=r"no evaluation on the selection split: set eval.eval_steps"):
        compare(make_study(tmp_path / "none", {"A": [[1.0], [0.0]]}).model_copy(update={"split": "selection"}))


def test_a_figure_has_one_legend_and_shows_single_points(tmp_path):
    figure = learning_curves(compare(make_study(tmp_path, {"A": [[1.0], [0.0]], "B": [[1.0], [1.0]]}, selection=(3,))))
    assert figure is not None
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["A", "B"]
    assert all(axes.get_legend() is None for axes in figure.axes)
    assert [line.get_marker() for line in figure.axes[1].get_lines()] == ["o", "o"]


def test_thirty_arms_are_told_apart_and_all_named(tmp_path):
    figure = margin_curves(compare(make_study(tmp_path, {f"arm {i}": [[1.0]] for i in range(30)}, seeds=(0,))))
    assert figure is not None
    FigureCanvasAgg(figure).draw()
    lines = figure.axes[0].get_lines()
    assert len({(line.get_color(), str(line._dash_pattern)) for line in lines}) == 30
    extent = figure.legends[0].get_window_extent()
    assert extent.y0 >= 0
    assert extent.y1 <= figure.bbox.height


def test_what_was_not_graded_is_null(tmp_path):
    many = [1.0] * 40
    write_comparison(make_study(tmp_path, {"A": [many], "B": [[1.0] * 39]}, seeds=(0,)))
    numbers = json.loads((tmp_path / "comparison.json").read_text())
    missing = numbers["question_ids"].index("q39")
    assert [arm["runs"][0]["outcomes"][missing] for arm in numbers["arms"]] == [1.0, None]


def test_studies_that_share_runs_have_tables_of_their_own(tmp_path):
    study = make_study(tmp_path, {"A": [[1.0], [0.0]], "B": [[1.0], [1.0]]})
    whole = write_comparison(study)
    part = study.model_copy(update={"arms": study.arms[:1], "report_dir": str(tmp_path / "of" / "A")})
    assert write_comparison(part) == (tmp_path / "of" / "A" / "table.md").read_text() != whole
    assert (tmp_path / "table.md").read_text() == whole


def test_everything_is_written(tmp_path):
    table = write_comparison(make_study(tmp_path, {"A": [[1.0], [0.0]], "B": [[1.0], [1.0]]}, selection=(2, 3)))
    assert (tmp_path / "table.md").read_text() == table
    assert {path.name for path in tmp_path.glob("*.*g")} == {"learning.png", "learning.svg", "margin.png", "margin.svg"}
    numbers = json.loads((tmp_path / "comparison.json").read_text())
    assert [run["seed"] for run in numbers["arms"][1]["runs"]] == [0, 1]
    assert numbers["question_ids"] == ["q0"]
    assert numbers["arms"][0]["runs"][0]["outcomes"] == [1.0]
