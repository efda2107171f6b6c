"""A card is written beside a trained model, and both are uploaded to the hub."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import RepositoryNotFoundError
from peft import LoraConfig
from tiny import tokenizer
from toy import ToyEnvironment, toy_config, toy_model, toy_trainer
from transformers import TrainerCallback

from vpd import VPDConfig, VPDTrainer
from vpd.policy.gguf import SMOLLM2
from vpd.runs import hub
from vpd.runs.model_card import BaseModel, base_model_of, write_model_card

ROWS = [
    {"name": "base model", "accuracy": 0.25, "low": 0.2, "high": 0.305, "n": 300, "seconds": 1.0},
    {"name": "after VPD", "accuracy": 0.8533, "low": 0.809, "high": 0.889, "n": 300, "seconds": 1.0},
]


def card(tmp_path, base=None, rows=(), **sections):
    config = VPDConfig.parse(sections)
    write_model_card(tmp_path, config, base or BaseModel(None), rows, steps=46)
    return config, ModelCard.load(tmp_path / "README.md")


def named(name, **config):
    return SimpleNamespace(name_or_path=name, config=SimpleNamespace(**config))


def test_a_card_tells_the_base_model_its_licence_and_the_results(tmp_path):
    base = BaseModel("owner/small", "owner/small", {"license": "other", "license_name": "gentle"})
    _, found = card(tmp_path, base, ROWS, algorithm={"type": "sdpo"})
    metadata = found.data.to_dict()
    assert metadata.pop("tags") == ["vpd", "variational-policy-distillation", "reinforcement-learning", "sdpo"]
    assert metadata == {
        "base_model": "owner/small",
        "license": "other",
        "license_name": "gentle",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
    }
    assert "# small, trained with SDPO" in found.text
    assert "[owner/small](https://huggingface.co/owner/small)" in found.text
    assert "`sdpo` in a run of 46 rollout batches" in found.text
    assert "| after VPD | 85.3% | 80.9% to 88.9% | 300 |" in found.text
    assert "one completion a question, greedy" in found.text


def test_what_is_not_known_is_left_out(tmp_path):
    _, found = card(tmp_path)
    assert {"base_model", "license"}.isdisjoint(found.data.to_dict())
    assert "a network that was made in Python" in found.text
    assert "Results" not in found.text


@pytest.mark.parametrize(
    "sections",
    [
        {"algorithm": {"type": "sdpo"}, "data": {"environment": "prompts", "path": "p", "reward_funcs": ["m:f"]}},
        {"algorithm": {"type": "vpd", "e_step_every": 10}, "run": {"output_dir": "runs/secret", "max_steps": 7}},
        {"eval": {"k": 4, "temperature": 0.6}, "model": {"lora": {"r": 4}}},
    ],
)
def test_the_settings_in_a_card_are_those_of_the_run(tmp_path, sections):
    config, found = card(tmp_path, rows=ROWS, **sections)
    (block,) = re.findall(r"```json\n(.*?)```", found.text, re.DOTALL)
    config.run.output_dir = VPDConfig().run.output_dir
    assert VPDConfig.parse(json.loads(block)) == config
    assert "secret" not in found.text
    assert ("the mean of 4 completions a question, temperature 0.6" in found.text) == (config.eval.k == 4)


def test_an_adapter_is_one_of_peft(tmp_path):
    trainer = toy_trainer(
        tmp_path / "run", peft_config=LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear")
    )
    trainer.save_model()
    found = ModelCard.load(tmp_path / "run" / "model" / "README.md")
    assert found.data.library_name == "peft"
    assert "This is an adapter of" in found.text


def test_the_base_model_is_known_by_its_name_its_config_and_its_card(tmp_path):
    assert base_model_of(named("")) == BaseModel(None)
    assert base_model_of(named("owner/small")) == BaseModel("owner/small", "owner/small")
    assert base_model_of(named("owner/small", license="mit")).license == {"license": "mit"}
    short = base_model_of(named(SMOLLM2))
    assert (short.hub_id, short.license) == ("HuggingFaceTB/SmolLM2-135M-Instruct", {"license": "apache-2.0"})
    folder = str(tmp_path)
    assert base_model_of(named(folder)) == BaseModel(folder)
    data = ModelCardData(base_model="owner/small", license="other", license_name="gentle", license_link="LICENSE")
    (tmp_path / "README.md").write_text(f"---\n{data.to_yaml()}\n---\n# Mine\n")
    # The link is to a file that does not come along.
    known = {"license": "other", "license_name": "gentle"}
    assert base_model_of(named(folder)) == BaseModel(folder, "owner/small", known)


class FakeHub:
    """Stands for HfApi: keeps the calls, and what was uploaded."""

    licensed = True

    def __init__(self):
        self.calls, self.files, self.tokens = [], {}, set()

    def __call__(self, token=None):
        self.tokens.add(token)
        return self

    def model_info(self, repo_id):
        self.calls.append(("model_info", repo_id))
        if not self.licensed:
            response = SimpleNamespace(headers={}, request=None, status_code=404)
            raise RepositoryNotFoundError("gone", response=response)
        return SimpleNamespace(card_data=ModelCardData(license="apache-2.0"))

    def create_repo(self, repo_id, **settings):
        self.calls.append(("create_repo", repo_id, settings))
        return SimpleNamespace(repo_id=f"me/{repo_id}")

    def create_branch(self, repo_id, **settings):
        self.calls.append(("create_branch", repo_id, settings))

    def upload_folder(self, repo_id, folder_path, **settings):
        self.calls.append(("upload_folder", repo_id, settings))
        self.files = {path.name: path.read_bytes() for path in folder_path.iterdir()}
        return "the commit"


@pytest.fixture
def fake_hub(monkeypatch):
    fake = FakeHub()
    monkeypatch.setattr(hub, "HfApi", fake)
    return fake


def trainer_of_hub_model(folder):
    model = toy_model()
    model.config._name_or_path = model.name_or_path = "owner/small"
    return VPDTrainer(model, toy_config(folder), ToyEnvironment(), processing_class=tokenizer())


def test_a_model_is_pushed_with_its_card(tmp_path, fake_hub):
    pushes = []

    class Pushed(TrainerCallback):
        def on_push_begin(self, args, state, control, **kwargs):
            pushes.append(state.global_step)

    trainer = trainer_of_hub_model(tmp_path)
    trainer.add_callback(Pushed())
    assert trainer.push_to_hub("mine", private=True, token="secret", commit_message="First") == "the commit"
    upload = {"commit_message": "First", "revision": None, "create_pr": False}
    assert fake_hub.calls == [
        ("model_info", "owner/small"),
        ("create_repo", "mine", {"private": True, "exist_ok": True}),
        ("upload_folder", "me/mine", upload),
    ]
    assert fake_hub.tokens == {"secret"}
    assert pushes == [0]
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(fake_hub.files)
    found = ModelCard(fake_hub.files["README.md"].decode())
    assert (found.data.base_model, found.data.license) == ("owner/small", "apache-2.0")
    assert b"secret" not in b"".join(fake_hub.files.values())


def test_a_push_goes_to_a_branch_or_into_a_pull_request(tmp_path, fake_hub):
    fake_hub.licensed = False
    trainer = trainer_of_hub_model(tmp_path)
    trainer.push_to_hub("mine", revision="try")
    trainer.push_to_hub("mine", create_pr=True)
    assert fake_hub.tokens == {None}
    assert ("create_branch", "me/mine", {"branch": "try", "exist_ok": True}) in fake_hub.calls
    uploads = [settings for name, *_, settings in fake_hub.calls if name == "upload_folder"]
    assert [(upload["revision"], upload["create_pr"]) for upload in uploads] == [("try", False), (None, True)]
    # A base model whose card cannot be read does not stand in the way.
    assert ModelCard(fake_hub.files["README.md"].decode()).data.license is None
