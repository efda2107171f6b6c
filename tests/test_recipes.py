"""The recipes of the paper: they parse, they say what the paper says, and every one of them can take a step."""

from __future__ import annotations

import json
import math
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import VOCABULARY, tokenizer
from toy import ALPHABET, ToyEnvironment
from transformers import AutoModelForCausalLM, Olmo3Config, Qwen3Config

from vpd import VPDConfig, VPDTrainer
from vpd.runs.folder import read_metrics

PAPER = Path(__file__).parents[1] / "configs" / "paper"
RECIPES = sorted(PAPER.glob("*.toml"))
OWN_STUDIES = sorted((PAPER.parent / "studies").glob("*.toml"))
STUDIES = sorted((PAPER / "compare").glob("*.toml"))

NAMES = {
    "livecodebench-qwen3-8b",
    "sciknoweval-qwen3-1.7b",
    "sciknoweval-qwen3-8b",
    "sciknoweval-olmo3-7b-instruct",
    "sciknoweval-qwen3-4b-base",
    "sciknoweval-qwen3-1.7b-self-critique",
    "sciknoweval-qwen3-8b-self-critique",
    "dapo-math-qwen3-8b",
}
ARMS = {"VPD", "SDPO", "GRPO", "Joint", "Reshaping", "Reweighting"}
ABLATIONS = {"VPD, F=1", "VPD, F=10", "VPD, fixed prior"}

SAID_OF_ALL = {
    "rollout.prompts_per_step": 32,
    "rollout.num_generations": 8,
    "rollout.max_prompt_length": 2048,
    "rollout.max_completion_length": 8192,
    "rollout.temperature": 1.0,
    "rollout.top_p": 1.0,
    "feedback.max_prompt_length": 10240,
    "algorithm.type": "vpd",
    "algorithm.truncated": "failure",
    "algorithm.e_minibatch_prompts": 32,
    "algorithm.e_step_every": 5,
    "algorithm.bco_beta": 0.1,
    "algorithm.prior": "dynamic",
    "algorithm.teacher": "live",
    "warm_start.demonstrations": 0,
    "eval.temperature": 0.6,
    "eval.top_p": 0.95,
}
SCIKNOWEVAL = {
    "data.environment": "mcq",
    "data.path": "sciknoweval-chemistry",
    "feedback.sources": ["sibling"],
    "algorithm.m_minibatch_prompts": 32,
    "algorithm.divergence": "js",
    "algorithm.alpha": 0.5,
    "algorithm.top_k": 100,
    "algorithm.correction": "tail",
    "optim.learning_rate": 1e-5,
    "optim.warmup_steps": 10,
    "eval.k": 16,
    "run.max_steps": 500,
}
NO_THINKING = {"model.chat_template_kwargs": {"enable_thinking": False}}
SAID_OF_EACH = {
    "livecodebench-qwen3-8b": NO_THINKING
    | {
        "model.name": "Qwen/Qwen3-8B",
        "data.environment": "code",
        "data.tests": "public",
        "feedback.sources": ["environment"],
        "algorithm.m_minibatch_prompts": 1,
        "algorithm.divergence": "reverse_kl",
        "algorithm.top_k": 20,
        "algorithm.correction": "tail",
        "optim.learning_rate": 1e-6,
        "optim.warmup_steps": 0,
        "eval.k": 4,
        # 30 epochs over 128 problems, 32 a batch.
        "run.max_steps": 30 * 128 // 32,
    },
    "sciknoweval-qwen3-1.7b": SCIKNOWEVAL | NO_THINKING | {"model.name": "Qwen/Qwen3-1.7B"},
    "sciknoweval-qwen3-8b": SCIKNOWEVAL | NO_THINKING | {"model.name": "Qwen/Qwen3-8B"},
    "sciknoweval-qwen3-4b-base": SCIKNOWEVAL | NO_THINKING | {"model.name": "Qwen/Qwen3-4B-Base"},
    "sciknoweval-olmo3-7b-instruct": SCIKNOWEVAL
    | {
        "model.name": "allenai/Olmo-3-7B-Instruct",
        "model.chat_template_kwargs": {},
        "optim.learning_rate": 5e-6,
    },
    "sciknoweval-qwen3-1.7b-self-critique": SCIKNOWEVAL
    | NO_THINKING
    | {"model.name": "Qwen/Qwen3-1.7B", "feedback.sources": ["critique"], "feedback.critique.endpoint": None},
    "sciknoweval-qwen3-8b-self-critique": SCIKNOWEVAL
    | NO_THINKING
    | {"model.name": "Qwen/Qwen3-8B", "feedback.sources": ["critique"], "feedback.critique.endpoint": None},
    "dapo-math-qwen3-8b": NO_THINKING
    | {
        "model.name": "Qwen/Qwen3-8B",
        "data.environment": "math",
        "data.path": "dapo-math",
        "data.final_path": "math-500",
        "feedback.sources": ["sibling"],
        "algorithm.m_minibatch_prompts": 32,
        "algorithm.divergence": "forward_kl",
        "algorithm.top_k": None,
        "optim.learning_rate": 5e-6,
        "optim.warmup_steps": 10,
        "eval.k": 4,
        "run.max_steps": 200,
    },
}
# What an arm repeats of the recipe, where its kind has the setting: a forgotten one would be the default.
SHARED = (
    "m_minibatch_prompts",
    "e_minibatch_prompts",
    "divergence",
    "alpha",
    "top_k",
    "correction",
    "loss_aggregation",
    "success_threshold",
    "truncated",
)


def study_of(name: str) -> dict[str, Any]:
    return tomllib.loads((PAPER / "compare" / f"{name}.toml").read_text(encoding="utf-8"))


def arm_settings(name: str) -> dict[str, VPDConfig]:
    """A study's arms by name, with all their settings."""
    study = study_of(name)
    config = PAPER / "compare" / study["config"]
    return {arm["name"]: VPDConfig.load(config, [*study.get("set", []), *arm.get("set", [])]) for arm in study["arms"]}


@pytest.mark.parametrize("path", OWN_STUDIES, ids=lambda path: path.stem)
def test_the_documented_studies_count_what_was_cut_off_as_a_failure(path):
    """Their figures in docs/study.md were made so, and an arm that replaces the section must say it again."""
    study = tomllib.loads(path.read_text(encoding="utf-8"))
    for arm in study["arms"]:
        arm_config = VPDConfig.load(path.parent / study["config"], [*study.get("set", []), *arm.get("set", [])])
        assert arm_config.algorithm.truncated == "failure", arm["name"]


def setting(settings: VPDConfig, path: str) -> Any:
    value: Any = settings.model_dump()
    for part in path.split("."):
        value = value[part]
    return value


def test_there_is_a_recipe_and_a_study_for_each_benchmark_and_model():
    assert {path.stem for path in RECIPES} == {path.stem for path in STUDIES} == NAMES == set(SAID_OF_EACH)


@pytest.mark.parametrize("path", [*RECIPES, *STUDIES], ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_each_says_first_that_it_was_not_run(path):
    comment = path.read_text(encoding="utf-8").partition("\n\n")[0]
    assert all(line.startswith("#") for line in comment.splitlines())
    assert "arXiv 2605.15113" in comment
    assert "Transcribed from the paper; not run by this project." in comment


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_recipe_has_the_papers_values(name):
    settings = VPDConfig.load(PAPER / f"{name}.toml")
    expected = SAID_OF_ALL | SAID_OF_EACH[name]
    assert {path: setting(settings, path) for path in expected} == expected


@pytest.mark.parametrize("name", sorted(NAMES))
def test_the_arms_of_a_study_differ_in_the_algorithm_alone(name):
    arms = arm_settings(name)
    expected = {"VPD", "SDPO"} if "self-critique" in name else ARMS
    assert set(arms) == expected | (ABLATIONS if name == "sciknoweval-qwen3-1.7b" else set())
    assert study_of(name)["config"] == f"../{name}.toml"
    recipe = VPDConfig.load(PAPER / f"{name}.toml")
    assert arms["VPD"] == recipe
    for arm in arms.values():
        assert arm.model_copy(update={"algorithm": None}) == recipe.model_copy(update={"algorithm": None})
        own = arm.algorithm.model_dump()
        common = recipe.algorithm.model_dump()
        assert {key: own[key] for key in SHARED if key in own} == {key: common[key] for key in SHARED if key in own}


@pytest.mark.parametrize("name", sorted(NAMES))
def test_the_baselines_have_the_papers_values(name):
    arms = arm_settings(name)
    average = {"teacher": "ema", "ema_rate": 0.01 if name.startswith("livecodebench") else 0.05}
    clip = {"epsilon": 0.2, "epsilon_high": 0.28, "scale_rewards": False}
    expected = {
        "SDPO": {"type": "sdpo", **average},
        "GRPO": {"type": "grpo", **clip},
        "Joint": {"type": "joint", **average, **clip},
        "Reshaping": {"type": "reshape", **clip},
        "Reweighting": {"type": "reweight", **clip, "mixing_steps": SAID_OF_EACH[name]["run.max_steps"]},
        "VPD, F=1": {"e_step_every": 1},
        "VPD, F=10": {"e_step_every": 10},
        "VPD, fixed prior": {"prior": "fixed"},
    }
    for arm, values in expected.items():
        if arm in arms:
            own = arms[arm].algorithm.model_dump()
            assert {key: own[key] for key in values} == values, arm


def test_runs_and_studies_have_folders_of_their_own():
    folders = [VPDConfig.load(path).run.output_dir for path in RECIPES]
    folders += [study_of(path.stem)["output_dir"] for path in STUDIES]
    assert len(set(folders)) == len(folders)


def tiny_model(name: str):
    """A random network of the architecture that the hub id names."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 32768,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 0,
    }
    if "Olmo-3" in name:
        config = Olmo3Config(**sizes, sliding_window=16, layer_types=["sliding_attention", "full_attention"])
    else:
        config = Qwen3Config(**sizes)
    return AutoModelForCausalLM.from_config(config)


def reduced(settings: VPDConfig, folder: Path) -> VPDConfig:
    """The same settings for one small batch; what a loss is made of stays."""
    values = settings.model_dump()
    values["data"] = None
    values["model"]["autocast"] = "none"
    values["rollout"] |= {
        "prompts_per_step": 4,
        "num_generations": 4,
        "max_completion_length": 8,
        "dtype": "float32",
        # A random network hardly ever ends a sequence by itself.
        "stop_strings": list(ALPHABET),
    }
    values["feedback"]["critique"]["max_tokens"] = 8
    for key in ("m_minibatch_prompts", "e_minibatch_prompts"):
        if key in values["algorithm"]:
            values["algorithm"][key] = min(values["algorithm"][key], 2)
    # The first batch of a warmup has the learning rate 0.
    values["optim"]["warmup_steps"] = 0
    values["eval"] |= {"final_tasks": 0, "preflight_tasks": 0, "eval_steps": 0}
    values["run"] |= {"output_dir": str(folder), "max_steps": 1, "logged_samples": 0}
    return VPDConfig.parse(values)


def distinct_steps() -> dict[str, VPDConfig]:
    """The recipes, and those of the arms whose step would differ from all before."""
    found: dict[str, VPDConfig] = {path.stem: VPDConfig.load(path) for path in RECIPES}
    arms = {f"{name}: {arm}": value for name in sorted(NAMES) for arm, value in arm_settings(name).items()}
    seen = {_kind_of_step(settings) for settings in found.values()}
    for name, settings in arms.items():
        if (kind := _kind_of_step(settings)) not in seen:
            seen.add(kind)
            found[name] = settings
    return found


def _kind_of_step(settings: VPDConfig) -> str:
    values = settings.model_dump(mode="json")
    architecture = values["model"].pop("name").partition("/")[0]
    # The first batch is an E-iteration, and of the mixing the first one's, whatever these are.
    for key in ("e_step_every", "mixing_steps"):
        values["algorithm"].pop(key, None)
    sections = ("model", "feedback", "algorithm")
    return json.dumps([architecture, *(values[name] for name in sections)], sort_keys=True)


@pytest.mark.parametrize("settings", distinct_steps().values(), ids=distinct_steps())
def test_a_step_can_be_taken(settings, tmp_path, monkeypatch):
    # Drawing the page would take longer than all of these runs.
    monkeypatch.setattr("vpd.phases.write_report", lambda folder: folder)
    trainer = VPDTrainer(
        model=tiny_model(settings.model.name),
        args=reduced(settings, tmp_path / "run"),
        environment=ToyEnvironment(),
        processing_class=tokenizer(),
    )
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}

    trainer.train()
    (metrics,) = [line for line in read_metrics(tmp_path / "run") if line["event"] == "train"]

    assert 0 < metrics["success_rate"] < 1
    assert math.isfinite(metrics["m_loss"])
    assert metrics["grad_norm"] > 0
    moved = [key for key, value in trainer.model.state_dict().items() if not torch.equal(value, before[key])]
    assert moved
    if settings.algorithm.type == "vpd":
        assert metrics["e_step"] == 1
        assert math.isfinite(metrics["e_loss"])
    if trainer.algorithm.reads_feedback:
        assert metrics["active_share"] > 0
