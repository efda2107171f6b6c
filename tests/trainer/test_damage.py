"""Damage to what a resume reads is seen, named and passed over, and nothing that is planted there ever runs."""

from __future__ import annotations

import io
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from toy import toy_trainer

from vpd.runs import RunError, read_metrics
from vpd.runs.folder import TRAINER_STATE
from vpd.runs.manifest import MANIFEST, checked_manifest, write_manifest

TIMINGS = ("seconds", "train_seconds", "tokens_per_second", "peak_memory")
SETTINGS = {
    "algorithm": {"type": "sdpo"},  # It has a running average, whose weights are kept too.
    "eval": {"eval_steps": 1, "load_best_model_at_end": True, "preflight_tasks": 0, "final_tasks": 2},
    "run": {"max_steps": 3, "save_steps": 1, "save_total_limit": 3},
}


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


DAMAGES = {"flipped": flipped, "cut": lambda data: data[:-1], "emptied": lambda data: b"", "removed": None}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run with three checkpoints, and its weights."""
    folder = tmp_path_factory.mktemp("finished")
    trainer = toy_trainer(folder / "run", **SETTINGS)
    trainer.train()
    return folder / "run", {name: value.clone() for name, value in trainer.model.state_dict().items()}


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the run, and a trainer that may resume it."""
    shutil.copytree(finished[0], tmp_path / "run")
    return tmp_path / "run", toy_trainer(tmp_path / "run", **SETTINGS)


def opened(trainer):
    try:
        return trainer.checkpoints.open(True)
    finally:
        trainer.checkpoints.close()


def train_lines(folder):
    return [
        {name: value for name, value in line.items() if not name.startswith(TIMINGS)}
        for line in read_metrics(folder)
        if line["event"] in ("train", "eval")
    ]


def files_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_checkpoint_with_any_damaged_file_is_named_and_passed_over(copied, damage):
    folder, trainer = copied
    newest = folder / "checkpoints" / "checkpoint-3"
    names = files_in(newest)
    assert {"model.safetensors", "optimizer.safetensors", "random.json", "weights_average.safetensors"} <= set(names)
    for name in names:
        path, change = newest / name, DAMAGES[damage]
        sound = path.read_bytes()
        if change is None:
            path.unlink()
        else:
            path.write_bytes(change(sound))
        found = opened(trainer)
        assert found.checkpoint == folder / "checkpoints" / "checkpoint-2", name
        assert str(newest) in found.damaged[0]
        # A bit of the manifest may stand in another file's checksum.
        assert Path(name).name in found.damaged[0] or name == MANIFEST
        path.write_bytes(sound)
    assert opened(trainer).checkpoint == newest
    assert not opened(trainer).damaged


def test_every_bit_of_a_manifest_counts(finished, tmp_path):
    from vpd.runs.manifest import DamageError

    shutil.copytree(finished[0] / "checkpoints" / "checkpoint-3", tmp_path / "checkpoint-3")
    path = tmp_path / "checkpoint-3" / MANIFEST
    sound = path.read_bytes()
    facts = checked_manifest(path.parent)
    for place in range(0, len(sound), 7):
        path.write_bytes(sound[:place] + bytes([sound[place] ^ 1 << place % 7]) + sound[place + 1 :])
        try:
            found = checked_manifest(path.parent)
        except DamageError:
            continue
        # What differs stands outside the list of files: the step, and the mark of the metrics.
        assert found != facts
        assert found["files"] == facts["files"]


def test_an_optimizer_of_another_step_is_seen(copied):
    folder, trainer = copied
    checkpoints = folder / "checkpoints"
    shutil.copy(checkpoints / "checkpoint-2/optimizer.safetensors", checkpoints / "checkpoint-3/optimizer.safetensors")
    assert "optimizer.safetensors is damaged" in opened(trainer).damaged[0]
    shutil.rmtree(checkpoints / "checkpoint-3")
    shutil.copytree(checkpoints / "checkpoint-2", checkpoints / "checkpoint-3")
    assert "is of another step" in opened(trainer).damaged[0]


def test_damaged_best_weights_are_those_of_a_damaged_checkpoint(copied):
    folder, trainer = copied
    best = folder / f"best-{trainer_state(folder, 3)['best_global_step']}"
    for path in folder.glob("best-*/model.safetensors"):
        path.write_bytes(flipped(path.read_bytes()))
    with pytest.raises(RunError, match=rf"of its best weights in {best.name}, model.safetensors is damaged.*is sound"):
        opened(trainer)
    trainer.run_state.best_step = int(best.name[5:])
    with pytest.raises(RunError, match=r"cannot be loaded: model\.safetensors is damaged.*load_best_model_at_end"):
        trainer.checkpoints.load_best()


def trainer_state(folder, step):
    import json

    return json.loads((folder / "checkpoints" / f"checkpoint-{step}" / TRAINER_STATE).read_text())


def test_a_run_without_a_sound_checkpoint_is_refused_with_a_sentence(copied):
    folder, trainer = copied
    for path in folder.glob("checkpoints/*/model.safetensors"):
        path.write_bytes(b"")
    with pytest.raises(RunError, match=r"checkpoint-3 cannot.*checkpoint-1 cannot.*No checkpoint of this run is sound"):
        opened(trainer)
    with pytest.raises(RunError, match=r"checkpoint-2 cannot be gone on from: model\.safetensors has 0 bytes"):
        trainer.train(resume_from_checkpoint=folder / "checkpoints" / "checkpoint-2")
    assert len(list(folder.glob("checkpoints/checkpoint-*"))) == 3
    assert not (folder / "run.lock").exists()


def test_a_run_that_passes_over_a_damaged_checkpoint_equals_the_uninterrupted_one(finished, copied):
    folder, trainer = copied
    path = folder / "checkpoints/checkpoint-3/optimizer.safetensors"
    path.write_bytes(flipped(path.read_bytes()))
    trainer.train(resume_from_checkpoint=True)
    assert train_lines(folder) == train_lines(finished[0])
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, finished[1][name]), name
    (warning,) = [line for line in read_metrics(folder) if line.get("name") == "damaged_files"]
    assert "checkpoint-3" in warning["text"]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "config.json", "result.json", "report.html", "rollouts/step-000001.parquet"]
)
def test_damage_beside_the_checkpoints_is_named_or_without_effect(finished, copied, name, damage):
    folder, trainer = copied
    path, change = folder / name, DAMAGES[damage]
    if change is None:
        path.unlink()
    else:
        path.write_bytes(change(path.read_bytes()))
    if name != "result.json":
        # The run was killed before it ended.
        (folder / "result.json").unlink()
    result = trainer.train(resume_from_checkpoint=True)
    assert result.global_step == 3
    for key, value in trainer.model.state_dict().items():
        assert torch.equal(value, finished[1][key]), key
    warned = [line["text"] for line in read_metrics(folder) if line["event"] == "warning"]
    assert train_lines(folder) == train_lines(finished[0]) or any(name in text for text in warned)


class Payload:
    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return os.mkdir, (str(self.place),)


def payloads(place):
    """The payload as the kinds of files that loaders unpickle: plain, and torch's archive."""
    archive = io.BytesIO()
    torch.save(Payload(place), archive)
    return {"pickle": pickle.dumps(Payload(place)), "torch": archive.getvalue()}


@pytest.mark.parametrize("kind", ["pickle", "torch"])
def test_nothing_that_is_planted_in_a_run_runs(copied, tmp_path, kind):
    folder, trainer = copied
    planted = tmp_path / "it ran"
    payload = payloads(planted)[kind]
    newest, best = folder / "checkpoints/checkpoint-3", folder / f"best-{trainer_state(folder, 3)['best_global_step']}"
    # What accelerate and transformers would unpickle.
    others = ["custom_checkpoint_0.pkl", "optimizer.bin", "scheduler.bin", "random_states_0.pkl", "pytorch_model.bin"]
    for folder_of in (newest, best):
        for name in [*files_in(folder_of), *others]:
            path = folder_of / name
            sound = path.read_bytes() if path.exists() else None
            facts = checked_manifest(folder_of)
            path.write_bytes(payload)
            del facts["files"]
            if name != MANIFEST:
                # Whoever plants something makes the manifest fit.
                write_manifest(folder_of, facts)
            try:
                found = opened(trainer)
                # No resume reads the model that stands in a checkpoint for others.
                assert found.damaged or name in others or name.startswith("model/") or folder_of is best
                trainer.checkpoints.load_best()
            except RunError:
                pass
            assert not planted.exists(), name
            path.unlink() if sound is None else path.write_bytes(sound)
            write_manifest(folder_of, facts)
    # The control: this is what one careless load would have done.
    torch.load(io.BytesIO(payload), weights_only=False) if kind == "torch" else pickle.loads(payload)
    assert planted.exists()


def test_planted_files_beside_the_checkpoints_do_not_run(copied, tmp_path):
    folder, trainer = copied
    planted = tmp_path / "it ran"
    shutil.rmtree(folder / "checkpoints/checkpoint-3")
    for path in [*folder.glob("*.json*"), *folder.glob("*.html"), *folder.glob("rollouts/*"), *folder.glob("model/*")]:
        path.write_bytes(payloads(planted)["torch"])
    trainer.train(resume_from_checkpoint=True)
    assert not planted.exists()
