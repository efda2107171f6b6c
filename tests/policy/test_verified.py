"""What a run saves comes back as what it trained: adapters, tokenizers, resized and tied embeddings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from peft import AutoPeftModelForCausalLM, LoHaConfig, LoraConfig, PromptTuningConfig, get_peft_model

from vpd.config import ConfigError
from vpd.policy.load import load_policy, load_weights, save_policy
from vpd.policy.verified import UnverifiedError, save_verified

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    "ignore:Model has `tie_word_embeddings=True`:UserWarning",
    "ignore:Model with `tie_word_embeddings=True`:UserWarning",
)

TOKENS = torch.arange(12)[None]


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


@pytest.fixture
def base_folder(tmp_path: Path) -> str:
    save_policy(tiny.llama(), tiny.tokenizer(), tmp_path / "base")
    return str(tmp_path / "base")


def lora(name: str, **options):
    """A policy with an adapter that does something."""
    loaded = load_policy(name)
    config = LoraConfig(**{"target_modules": "all-linear", "init_lora_weights": False, "r": 4} | options)
    return get_peft_model(loaded.model, config), loaded.tokenizer


def same(found, expected):
    torch.testing.assert_close(logits(found), logits(expected), atol=1e-4, rtol=0)


def test_an_adapter_on_an_adapters_result_keeps_the_first_stage(tmp_path: Path, base_folder: str) -> None:
    first, tokenizer = lora(base_folder)
    save_verified(first, tokenizer, tmp_path / "first")
    second, tokenizer = lora(str(tmp_path / "first"))
    save_verified(second, tokenizer, tmp_path / "second")
    assert not (tmp_path / "second" / "base").exists()
    same(load_policy(str(tmp_path / "second")).model, second)


def test_plain_peft_loads_a_result_whose_base_it_could_not_find(tmp_path: Path, base_folder: str) -> None:
    first, tokenizer = lora(base_folder)
    save_verified(first, tokenizer, tmp_path / "first", keep_base=True)
    assert not (tmp_path / "first" / "base").exists()
    same(AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "first")), first)
    second, tokenizer = lora(str(tmp_path / "first"))
    save_verified(second, tokenizer, tmp_path / "second", keep_base=True)
    shutil.rmtree(tmp_path / "first")
    same(AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "second")), second)
    shutil.move(tmp_path / "second", tmp_path / "moved")
    same(load_policy(str(tmp_path / "moved")).model, second)


def test_a_base_that_has_no_name_is_saved_with_its_adapter(tmp_path: Path) -> None:
    policy = get_peft_model(tiny.llama(), LoraConfig(target_modules="all-linear", init_lora_weights=False))
    save_verified(policy, tiny.tokenizer(), tmp_path / "model")
    same(load_policy(str(tmp_path / "model")).model, policy)


@pytest.mark.parametrize("options", [{}, {"trainable_token_indices": [3, 5]}, {"target_modules": ["embed_tokens"]}])
def test_a_base_that_was_changed_in_memory_is_saved_with_its_adapter(
    tmp_path: Path, base_folder: str, options: dict
) -> None:
    policy, tokenizer = lora(base_folder, **options)
    with torch.no_grad():
        policy.get_base_model().model.layers[0].mlp.down_proj.weight.mul_(9)
    save_verified(policy, tokenizer, tmp_path / "model")
    same(load_policy(str(tmp_path / "model")).model, policy)


def test_an_adapter_brings_the_tokenizer_and_the_template_of_its_run(tmp_path: Path, base_folder: str) -> None:
    policy, tokenizer = lora(base_folder)
    tokenizer.chat_template = tiny.CHAT_TEMPLATE.replace("assistant", "helper")
    save_verified(policy, tokenizer, tmp_path / "model")
    assert load_policy(str(tmp_path / "model")).tokenizer.chat_template == tokenizer.chat_template


@pytest.mark.parametrize("trained", [False, True])
def test_resized_embeddings_come_back(tmp_path: Path, base_folder: str, trained: bool) -> None:
    loaded = load_policy(base_folder)
    loaded.tokenizer.add_tokens(["<new>", "<newer>"])
    loaded.model.resize_token_embeddings(len(loaded.tokenizer))
    options = {"modules_to_save": ["embed_tokens"]} if trained else {}
    policy = get_peft_model(loaded.model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False, **options))
    save_verified(policy, loaded.tokenizer, tmp_path / "model")
    found = load_policy(str(tmp_path / "model"))
    assert len(found.tokenizer) == len(tiny.VOCABULARY) + 2 == found.model.get_input_embeddings().num_embeddings
    same(found.model, policy)


def test_an_adapter_under_another_name_is_the_one_that_is_saved(tmp_path: Path, base_folder: str) -> None:
    policy, tokenizer = lora(base_folder)
    policy.add_adapter("mine", LoraConfig(target_modules="all-linear", init_lora_weights=False))
    policy.set_adapter("mine")
    save_verified(policy, tokenizer, tmp_path / "model")
    assert (tmp_path / "model" / "adapter_config.json").is_file()
    same(load_policy(str(tmp_path / "model")).model, policy)
    expected = logits(policy)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if ".mine." in name:
                parameter.zero_()
    load_weights(policy, tmp_path / "model")
    torch.testing.assert_close(logits(policy), expected)


def test_an_adapter_in_a_folder_of_its_name_is_read_and_several_are_refused(tmp_path: Path, base_folder: str) -> None:
    loaded = load_policy(base_folder)
    config = LoraConfig(target_modules="all-linear", init_lora_weights=False)
    policy = get_peft_model(loaded.model, config, adapter_name="mine")
    policy.save_pretrained(tmp_path / "peft", save_embedding_layers=False)
    same(load_policy(str(tmp_path / "peft")).model, policy)
    policy.add_adapter("other", config)
    policy.save_pretrained(tmp_path / "peft", save_embedding_layers=False)
    with pytest.raises(ConfigError, match=r"several adapters \(mine, other\)"):
        load_policy(str(tmp_path / "peft"))


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]},
        {"target_modules": "all-linear", "use_dora": True},
    ],
)
def test_targets_that_are_tied_come_back_merged_once(tmp_path: Path, base_folder: str, options: dict) -> None:
    policy, tokenizer = lora(base_folder, **options)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    save_verified(policy, tokenizer, tmp_path / "model")
    found = load_policy(str(tmp_path / "model"))
    same(found.model, policy)
    save_verified(found.model, found.tokenizer, tmp_path / "merged")
    same(load_policy(str(tmp_path / "merged")).model, policy)


def test_other_kinds_of_adapters_come_back_or_are_refused(tmp_path: Path, base_folder: str) -> None:
    loaded = load_policy(base_folder)
    policy = get_peft_model(loaded.model, LoHaConfig(target_modules=["q_proj"], init_weights=False))
    save_verified(policy, loaded.tokenizer, tmp_path / "loha")
    same(load_policy(str(tmp_path / "loha")).model, policy)
    prompt = get_peft_model(
        load_policy(base_folder).model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    prompt.save_pretrained(tmp_path / "prompt", save_embedding_layers=False)
    with pytest.raises(ConfigError, match="PROMPT_TUNING put virtual tokens before"):
        load_policy(str(tmp_path / "prompt"))


def test_a_model_that_comes_back_otherwise_is_not_called_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other_weights(model, tokenizer, folder, **options):
        with torch.no_grad():
            next(model.parameters()).mul_(1.1)
        save_policy(model, tokenizer, folder, **options)
        with torch.no_grad():
            next(model.parameters()).div_(1.1)

    monkeypatch.setattr("vpd.policy.verified.save_policy", other_weights)
    with pytest.raises(UnverifiedError, match=r"not the one that was trained: their logits differ .*run\.verify_saved"):
        save_verified(tiny.llama(), tiny.tokenizer(), tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model-unverified"]


def test_an_adapter_names_the_base_that_it_was_put_on(tmp_path: Path, base_folder: str) -> None:
    policy, tokenizer = lora(base_folder)
    save_verified(policy, tokenizer, tmp_path / "model", keep_base=True)
    assert (
        json.loads((tmp_path / "model" / "adapter_config.json").read_text())["base_model_name_or_path"] == base_folder
    )


def test_a_comparison_without_room_on_the_device_is_made_on_the_cpu(monkeypatch):
    import torch

    from vpd.policy import verified

    asked = []

    def logits(model):
        asked.append(model)
        if len(asked) == 1:
            raise torch.OutOfMemoryError("out of memory")
        return torch.ones(2)

    monkeypatch.setattr(verified, "_logits", logits)
    found = verified._logits_where_there_is_room(torch.nn.Linear(1, 1), torch.device("cpu"))  # pyright: ignore
    assert found.tolist() == [1.0, 1.0]
    assert len(asked) == 2
