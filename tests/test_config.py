"""The schema: every shipped config parses, and mistakes are told apart."""

from __future__ import annotations

from pathlib import Path

import pytest

from vpd.algorithms import SDPOSettings, VerifiedSettings, VPDSettings
from vpd.config import ConfigError, VPDConfig
from vpd.losses import DEFAULT_CHUNK_SIZE

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.toml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_config_parses(path):
    VPDConfig.load(path)


def test_losses_hold_as_many_tokens_logits_as_by_themselves():
    assert VPDConfig().model.logits_chunk_tokens == DEFAULT_CHUNK_SIZE


def test_there_are_shipped_configs():
    assert CONFIGS


def test_overrides_are_toml_or_bare_words(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text('[algorithm]\ntype = "vpd"\n')
    config = VPDConfig.load(
        path, ["algorithm.e_step_every=10", "model.name=some/model", 'feedback.sources=["environment"]']
    )
    assert isinstance(config.algorithm, VPDSettings)
    assert config.algorithm.e_step_every == 10
    assert config.model.name == "some/model"
    assert config.feedback.sources == ["environment"]


def test_a_whole_section_can_be_replaced(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text('[algorithm]\ntype = "vpd"\ndivergence = "js"\nbco_beta = 0.2\n')
    config = VPDConfig.load(path, ['algorithm={type="sdpo", alpha=0.3}'])
    assert config.algorithm.type == "sdpo"
    assert (config.algorithm.divergence, config.algorithm.alpha) == ("reverse_kl", 0.3)
    with pytest.raises(ConfigError, match="in place of all of it, got 'algorithm=sdpo'"):
        VPDConfig.load(path, ["algorithm=sdpo"])


def test_the_algorithm_is_verified_unless_named():
    assert isinstance(VPDConfig.parse({"algorithm": {"attempts_per_group": 2}}).algorithm, VerifiedSettings)
    assert isinstance(VPDConfig.parse({"algorithm": {"type": "vpd", "bco_beta": 0.2}}).algorithm, VPDSettings)
    assert isinstance(VPDConfig.parse({"algorithm": {"type": "sdpo"}}).algorithm, SDPOSettings)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optim": {"learningrate": 1}}, "Unknown setting optim.learningrate"),
        ({"algorithm": {"type": "sdpo", "e_step_every": 2}}, "Unknown setting algorithm.sdpo.e_step_every"),
        ({"feedback": {"sources": ["sibling"]}, "rollout": {"num_generations": 1}}, "num_generations to 2"),
        (
            {"rollout": {"prompts_per_step": 2}, "algorithm": {"type": "vpd", "e_minibatch_prompts": 4}},
            "e_minibatch_prompts = 4",
        ),
        ({"feedback": {"max_prompt_length": 100}}, "raise the former"),
        ({"feedback": {"templates": {"solution": "no slot"}}}, "must hold {text}"),
    ],
)
def test_mistakes_name_the_setting_and_the_mend(values, message):
    with pytest.raises(ConfigError, match=message.replace("(", r"\(").replace("{", r"\{")):
        VPDConfig.parse(values)


def test_an_override_without_a_value_is_refused(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text("")
    with pytest.raises(ConfigError, match=r"section\.key=value"):
        VPDConfig.load(path, ["algorithm"])


def test_broken_toml_is_named(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text("[model\n")
    with pytest.raises(ConfigError, match="not valid TOML"):
        VPDConfig.load(path)


def test_a_byte_order_mark_is_no_part_of_a_config(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text("[run]\nmax_steps = 3\n", encoding="utf-8-sig")
    assert VPDConfig.load(path).run.max_steps == 3
