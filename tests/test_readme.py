"""The Python examples of the README and the guide run as they stand, on a tiny model."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from tiny import tokenizer
from toy import toy_model

import vpd
from vpd.config import VPDConfig
from vpd.feedback import FeedbackTexts, Group, choose_texts
from vpd.studies.study import Study, runs_of, start_of
from vpd.types import Rollout, Task, Turn, Verdict

ROOT = Path(__file__).parents[1]


def examples(document: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)


EXAMPLES = examples("README.md")
GUIDE = examples("docs/environments.md")
SMALL = {
    "model": {"autocast": "none"},
    "rollout": {"prompts_per_step": 2, "num_generations": 2, "max_completion_length": 8, "dtype": "float32"},
    "eval": {"preflight_tasks": 1, "final_tasks": 2},
    "run": {"max_steps": 1},
}


@pytest.fixture
def namespace(tmp_path, monkeypatch):
    """What the examples leave to the reader, with settings that a random two-layer model is done with at once."""
    toy_model().save_pretrained(tmp_path / "tiny")
    tokenizer().save_pretrained(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)

    def small_config(**sections):
        return VPDConfig.parse({name: {**sections.get(name, {}), **values} for name, values in SMALL.items()})

    monkeypatch.setattr(vpd, "VPDConfig", small_config, raising=False)
    rows = [{"prompt": [{"role": "user", "content": f"Say {i}."}], "answer": str(i)} for i in range(30)]
    return {"my_dataset": rows}


def run(source, namespace):
    exec(compile(source.replace("smollm2-135m-instruct", "tiny"), "README.md", "exec"), namespace)


def test_there_are_examples():
    assert (len(EXAMPLES), len(GUIDE)) == (3, 1)


def test_reward_functions(namespace):
    run(EXAMPLES[0], namespace)
    assert Path("runs/mine/report.html").exists()
    judge = namespace["ends_right"]
    assert judge([[{"content": "It is 7"}]], ["7"]) == [(1.0, "The number is right.")]
    ((reward, text),) = judge([[{"content": "It is 8"}]], ["7"])
    assert reward == 0.0
    assert "It is 8" in text


def test_an_environment_of_ones_own(namespace):
    run(EXAMPLES[1], namespace)
    trainer = namespace["trainer"]
    assert trainer.train().global_step == 1
    verdicts = [trainer.environment.judge(trainer.curriculum.stages[0][0], text) for text in ("SEVEN", "Seven", "7")]
    assert [verdict.reward for verdict in verdicts] == [1.0, 0.0, 0.0]


def test_a_feedback_source_of_ones_own(namespace):
    run(EXAMPLES[2], namespace)
    attempts = [Rollout(Task("t", []), 0, [Turn([1], [2], [0.0], False, text)], Verdict(0.0)) for text in "ab"]
    ((first, second),) = choose_texts([Group(attempts, [False, True])], [namespace["Hint"]()])
    assert first == FeedbackTexts("hint", False, feedback="Read the question twice.")
    assert second is not None
    assert second.is_success


def test_the_study_that_the_readme_shows_is_one():
    (block,) = re.findall(r"```toml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    study = Study.model_validate(tomllib.loads(block))
    assert [arm.name for arm in study.arms] == ["VPD", "GRPO"]


@pytest.mark.parametrize("path", sorted((ROOT / "configs/studies").glob("*.toml")), ids=lambda path: path.stem)
def test_every_shipped_study_has_arms_that_parse(path):
    study = Study.load(path)
    for run_of_study in [start_of(study), *(r for arm in study.arms for r in runs_of(study, arm))]:
        run_of_study.settings(study.config)


def test_the_guide_writes_an_environment_in_twenty_lines(namespace):
    lines = [line for line in GUIDE[0].partition("trainer =")[0].splitlines() if line.strip()]
    assert len(lines) <= 20
    run(GUIDE[0], namespace)
    trainer = namespace["trainer"]
    environment = trainer.environment
    for demonstration in environment.demonstrations(10):
        task = demonstration.task
        verdicts = [environment.judge(task, text) for text in (demonstration.completion, demonstration.attempt)]
        assert [verdict.reward for verdict in verdicts] == [1.0, 0.0]
        assert "letters are left" in environment.judge(task, demonstration.completion + "z").feedback
    assert trainer.train().global_step == 1


def test_every_setting_that_the_guide_shows_is_one():
    blocks = re.findall(r"```toml\n(.*?)```", (ROOT / "docs/environments.md").read_text(), re.DOTALL)
    assert len(blocks) >= 8
    for block in blocks:
        VPDConfig.parse(tomllib.loads(block))
