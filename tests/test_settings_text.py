"""What settings are told about themselves, and the config that one begins with."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest

from vpd.config import ConfigError, RunSettings, VPDConfig
from vpd.config.describe import described, sections
from vpd.config.starter import needed_settings, starter_config


def test_every_setting_has_a_type_a_default_and_a_text():
    for section, settings in described().items():
        for setting in settings:
            assert setting.type, (section, setting)
            assert setting.default, (section, setting)
            assert setting.text, (section, setting)


def test_a_section_is_described_as_the_schema_has_it():
    found = {setting.name: setting for setting in described("run")["run"]}
    assert (found["max_steps"].type, found["max_steps"].default) == ("int", "100")
    assert found["max_steps"].text == "The number of steps; each is one rollout batch."
    assert found["max_seconds"].default == "none"
    assert {"model.lora.r", "algorithm.grpo.beta", "data.prompts.reward_funcs"} <= {
        f"{section}.{setting.name}" for section, settings in described().items() for setting in settings
    }
    assert set(described("data")) == {name for name in sections() if name.startswith("data.")}


def test_an_unknown_section_is_told_with_the_nearest_and_all_others():
    with pytest.raises(ConfigError, match=r"no section rollouts. Did you mean rollout\? There are: model"):
        described("rollouts")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: VPDConfig(run={"max_step": 3}),
            r"Unknown setting run.max_step .*mean max_steps\? Known there: .*seed",
        ),  # pyright: ignore
        (lambda: RunSettings(max_step=3), r"Unknown setting max_step .*Did you mean max_steps\?"),  # pyright: ignore
        (lambda: VPDConfig(run={"max_steps": -1}), r"run.max_steps: Input should be .* \(got -1\)"),  # pyright: ignore
        (lambda: VPDConfig(model={"dtype": "bfloat"}), r"Did you mean bfloat16\?"),  # pyright: ignore
        (lambda: VPDConfig(algorithm={"type": "grop"}), r"no algorithm 'grop'. Did you mean grpo\?"),  # pyright: ignore
        (lambda: VPDConfig(data={"environment": "promts"}), r"data.environment = 'promts' .*Did you mean prompts\?"),  # pyright: ignore
        (lambda: VPDConfig(data={"path": "x"}), r"The setting data.environment is missing"),  # pyright: ignore
    ],
)
def test_mistakes_in_python_are_sentences_too(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize("name", [name for name in sections() if name.startswith("data.")])
def test_a_starter_config_parses_and_explains_each_setting(name):
    environment = name.removeprefix("data.")
    values: dict[str, Any] = {
        setting.name: {"model": "judge"} if setting.type == "section" else "module:name"
        for setting in needed_settings(environment)
    }
    if environment == "prompts":
        values["reward_funcs"] = ["rewards:short"]
    text = starter_config(environment, values, "some/model", "runs/x")
    settings = VPDConfig.parse(tomllib.loads(text))
    assert (settings.model.name, settings.run.output_dir) == ("some/model", "runs/x")
    lines = text.splitlines()
    for line in lines:
        assert len(line) <= 120
    # Each setting is preceded by the comment that explains it.
    assert all(
        lines[index - 1].startswith("# ") for index, line in enumerate(lines) if " = " in line and line[0] != "#"
    )
