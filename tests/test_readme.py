"""The README's Python examples run as they stand, on a tiny model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tiny import tokenizer
from toy import toy_model

import vpd
from vpd.config import VPDConfig

README = (Path(__file__).parents[1] / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
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
    assert len(EXAMPLES) == 2


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
    assert trainer.train()["steps"] == 1
    verdicts = [trainer.environment.judge(trainer.train_tasks[0], text) for text in ("SEVEN", "Seven", "7")]
    assert [verdict.reward for verdict in verdicts] == [1.0, 0.0, 0.0]
