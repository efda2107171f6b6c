"""Whatever has generate, sync and release can stand where the local engine stands."""

from __future__ import annotations

import pytest
from engines import ScriptedEngine
from tiny import tokenizer
from toy import ToyEnvironment, toy_config, toy_model, toy_trainer

from vpd.config import RolloutSettings
from vpd.evaluation import evaluate_standalone
from vpd.rollout import LocalEngine, make_engine
from vpd.runs.folder import read_metrics

CRITIQUES = {"sources": ["critique"], "critique": {"max_tokens": 7}}
LORA = {"type": "vpd", "teacher": "lora", "e_step_every": 1}
TIMINGS = ("seconds", "tokens_per_second", "peak_memory")


class ProtocolAlone:
    """An engine that has what the protocol names, and nothing else."""

    __slots__ = ("generate", "release", "sync")

    def __init__(self, engine):
        self.generate, self.sync, self.release = engine.generate, engine.sync, engine.release


def metrics(folder):
    numbers = [line for line in read_metrics(folder) if line["event"] in ("train", "eval", "gap")]
    return [
        {name: value for name, value in line.items() if not name.startswith((*TIMINGS, "train_seconds"))}
        for line in numbers
    ]


def test_a_run_asks_its_engine_for_nothing_beyond_the_protocol(tmp_path, monkeypatch):
    sections = {"algorithm": LORA, "feedback": CRITIQUES, "eval": {"preflight_tasks": 2, "margin_tasks": 2}}
    toy_trainer(tmp_path / "local", **sections).train()
    monkeypatch.setattr("vpd.setup.make_engine", lambda *args: ProtocolAlone(make_engine(*args)))
    toy_trainer(tmp_path / "protocol", **sections).train()
    assert metrics(tmp_path / "protocol") == metrics(tmp_path / "local")


def test_another_engine_trains_too(tmp_path, monkeypatch):
    engines = []

    def make(model, tokenizer, settings):
        engines.append(ScriptedEngine(tokenizer))
        return engines[-1]

    monkeypatch.setattr("vpd.setup.make_engine", make)
    toy_trainer(tmp_path / "run", eval={"preflight_tasks": 2}).train()
    lines = [line for line in read_metrics(tmp_path / "run") if line["event"] == "train"]
    assert [line["reward"] > 0 for line in lines] == [True, True]
    # The gap before and after training is sampled from the teacher, and nothing else is.
    assert [count for count, _, _, as_teacher in engines[0].calls if as_teacher] == [8, 8]


def test_an_evaluation_outside_a_run_asks_the_engine_that_is_made(tmp_path, monkeypatch):
    toy_model().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    made = []

    def make(model, tokenizer, settings):
        made.append(ScriptedEngine(tokenizer, letters="bd"))
        return made[-1]

    monkeypatch.setattr("vpd.evaluation.standalone.make_engine", make)
    monkeypatch.setattr("vpd.evaluation.standalone.make_environment", lambda settings: ToyEnvironment())
    data = {"environment": "prompts", "path": "none.jsonl", "reward_funcs": ["none:none"]}
    questions = {"k": 2, "temperature": 0.6}
    settings = toy_config(tmp_path / "run", model={"name": str(tmp_path / "model")}, data=data, eval=questions)
    evaluation = evaluate_standalone(settings, "final", 3)
    ((count, parameters, _, as_teacher),) = made[0].calls
    assert (count, parameters.num_generations, parameters.temperature, as_teacher) == (3, 2, 0.6, False)
    # Both letters have even codes, which is all that the toy asks for.
    assert (evaluation.accuracy, evaluation.n) == (1.0, 3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_engine_is_made_as_the_settings_say(dtype):
    engine = make_engine(toy_model(), tokenizer(), RolloutSettings(dtype=dtype, batch_size=3))
    assert isinstance(engine, LocalEngine)
    assert engine._batch_size == 3
    assert str(next(engine._copy.network.parameters()).dtype) == f"torch.{dtype}"
