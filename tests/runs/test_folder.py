import errno
import json
from pathlib import Path

import pytest

from vpd.config import ConfigError, VPDConfig
from vpd.runs import RunError, RunFolder, atomic_write_text, read_metrics
from vpd.runs.folder import changed_settings


def weights(text: str):
    def write(folder: Path) -> None:
        (folder / "weights").write_text(text)

    return write


def full_disk(folder: Path) -> None:
    (folder / "weights").write_text("half of them")
    with open("/dev/full", "w") as file:
        file.write("the rest")


def checkpoints(folder: RunFolder) -> list[str]:
    return sorted(path.name for path in (folder.path / "checkpoints").iterdir())


def test_a_folder_with_a_run_is_refused_unless_resumed(tmp_path):
    RunFolder(tmp_path / "run").write_config(VPDConfig())
    with pytest.raises(ConfigError, match=r"already holds a run.*--resume.*run\.output_dir"):
        RunFolder(tmp_path / "run")
    resumed = RunFolder(tmp_path / "run", resume=True).read_config()
    assert resumed is not None
    assert VPDConfig.parse(resumed) == VPDConfig()


def test_other_files_in_the_folder_are_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    RunFolder(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    with pytest.raises(ConfigError, match="is a file"):
        RunFolder(tmp_path / "notes.txt")


def test_metrics_are_valid_json_lines_at_once(tmp_path):
    folder = RunFolder(tmp_path)
    folder.log(1, "train", {"reward": 0.5, "e_loss": float("nan"), "grad_norm": float("inf"), "note": None})
    line = folder.metrics_path.read_text()
    assert json.loads(line) == {
        "step": 1, "event": "train", "reward": 0.5, "e_loss": None, "grad_norm": None, "note": None,
    }  # fmt: skip


def test_arrays_and_tensors_count_as_numbers(tmp_path):
    numpy, torch = pytest.importorskip("numpy"), pytest.importorskip("torch")
    folder = RunFolder(tmp_path)
    folder.log(1, "train", {"a": numpy.float32(0.5), "b": torch.tensor(2), "c": torch.tensor([1.0, 2.0])})
    assert read_metrics(tmp_path) == [{"step": 1, "event": "train", "a": 0.5, "b": 2, "c": [1.0, 2.0]}]
    with pytest.raises(TypeError, match="object has no place"):
        folder.log(1, "train", {"a": object()})


@pytest.mark.parametrize(("step", "left"), [(2, [0, 1, 2]), (0, [0]), (None, [])])
def test_rewind_forgets_what_came_after_the_step(tmp_path, step, left):
    folder = RunFolder(tmp_path)
    for of_step in range(5):
        folder.log(of_step, "train", {"reward": of_step / 5})
        if of_step:
            folder.write_rollouts(of_step, [])
    folder.write_result({"rows": []})
    with open(folder.metrics_path, "a") as file:
        file.write('{"step": 2, "event": "tr')
    folder.rewind(step)
    folder.log(9, "train", {})
    assert [entry["step"] for entry in read_metrics(tmp_path)] == [*left, 9]
    names = [path.name for path in sorted((tmp_path / "rollouts").iterdir())]
    assert names == [f"step-{of_step:06d}.parquet" for of_step in left if of_step]
    assert not folder.result_path.exists()


def test_the_newest_checkpoints_are_kept(tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.latest_checkpoint() is None
    for step in (2, 9, 10, 100):
        folder.commit_checkpoint(step, weights(str(step)), keep=2)
    assert checkpoints(folder) == ["checkpoint-10", "checkpoint-100"]
    latest = folder.latest_checkpoint()
    assert latest is not None
    assert (latest / "weights").read_text() == "100"


def test_a_new_checkpoint_stays_even_below_older_steps_and_replaces_its_own(tmp_path):
    folder = RunFolder(tmp_path)
    for step, text in ((10, "a"), (4, "b"), (4, "c")):
        folder.commit_checkpoint(step, weights(text), keep=1)
    assert checkpoints(folder) == ["checkpoint-4"]
    assert (tmp_path / "checkpoints/checkpoint-4/weights").read_text() == "c"


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), RuntimeError("os error: No space left on device")])
def test_a_full_disk_is_told_and_costs_no_earlier_checkpoint(tmp_path, error):
    def fail(folder: Path) -> None:
        (folder / "weights").write_text("half of them")
        raise error

    folder = RunFolder(tmp_path)
    folder.commit_checkpoint(1, weights("1"), keep=1)
    for write in (full_disk, fail):
        with pytest.raises(RunError, match="disk is full"):
            folder.commit_checkpoint(2, write, keep=1)
    assert checkpoints(folder) == ["checkpoint-1"]


@pytest.mark.parametrize("error", [ValueError("a bug"), KeyboardInterrupt()])
def test_an_interrupted_checkpoint_leaves_nothing_and_raises_what_happened(tmp_path, error):
    def fail(folder: Path) -> None:
        (folder / "weights").write_text("half of them")
        raise error

    folder = RunFolder(tmp_path)
    with pytest.raises(type(error)):
        folder.commit_checkpoint(1, fail, keep=1)
    assert checkpoints(folder) == []


def test_leftovers_of_a_killed_process_are_mended_on_opening(tmp_path):
    folder = RunFolder(tmp_path)
    folder.commit_checkpoint(3, weights("3"), keep=2)
    inside = tmp_path / "checkpoints"
    (inside / ".new-checkpoint-4.tmp").mkdir()
    (inside / ".new-checkpoint-4.tmp/weights").write_text("half")
    (tmp_path / ".config.json.77.tmp").write_text("half")
    (tmp_path / ".model.partial-x7/new").mkdir(parents=True)
    (tmp_path / "rollouts/.step-000004.parquet.77.tmp").write_text("half")
    # Killed between the two renames that replace a checkpoint: the old one is still whole.
    (inside / "checkpoint-3").rename(inside / ".old-checkpoint-3.tmp")
    RunFolder.open(tmp_path, resume=True).close()
    assert checkpoints(folder) == ["checkpoint-3"]
    assert list(tmp_path.rglob(".*")) == []


def test_an_atomic_write_keeps_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    atomic_write_text(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(RunError, match=r"disk is full.*config\.json"):
        atomic_write_text(path, "new")
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


def test_a_setting_that_came_with_an_upgrade_counts_as_its_default():
    now = VPDConfig.parse({"optim": {"learning_rate": 2e-5}, "algorithm": {"type": "vpd"}}).model_dump(mode="json")
    before = json.loads(json.dumps(now))
    del before["run"]["stop_on"], before["algorithm"]["e_epochs"]
    assert changed_settings(before, now) == ""
    now["algorithm"]["e_epochs"] = 2
    assert changed_settings(before, now) == "algorithm.e_epochs was 1 and is 2"
    # One that is no longer known cannot be filled up, and is told with what else differs.
    before["run"]["colour"] = "blue"
    assert "run.colour was 'blue' and is None" in changed_settings(before, now)


def test_a_broken_json_file_is_told(tmp_path):
    folder = RunFolder(tmp_path)
    folder.config_path.write_text("{")
    with pytest.raises(RunError, match=r"config\.json is not valid JSON"):
        folder.read_config()


def test_rewinding_removes_later_checkpoints_and_no_earlier_one(tmp_path):
    folder = RunFolder(tmp_path)
    for step in (1, 2, 3):
        folder.commit_checkpoint(step, weights(str(step)), keep=9)
    folder.rewind(2)
    assert checkpoints(folder) == ["checkpoint-1", "checkpoint-2"]


def test_a_checkpoint_is_named_by_any_path_to_it_and_no_other_folder_is_one(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path / "run")
    made = folder.commit_checkpoint(3, weights("3"), keep=1)
    monkeypatch.chdir(tmp_path)
    for path in (made, str(made), "run/checkpoints/../checkpoints/checkpoint-3"):
        assert folder.checkpoint_at(path) == made
    for path in ("run", "run/checkpoints/checkpoint-4", "checkpoint-3", ""):
        with pytest.raises(ConfigError, match=r"no checkpoint of the run in .*checkpoint-3\. Name one of them"):
            folder.checkpoint_at(path)


def test_only_the_best_weights_that_are_asked_for_stay(tmp_path):
    folder = RunFolder(tmp_path)
    for name in ("best-1", "best-2", "best-10", "best-friend"):
        (tmp_path / name).mkdir()
    folder.keep_best_weights([2, None, 7])
    assert sorted(path.name for path in tmp_path.glob("best-*")) == ["best-2", "best-friend"]
