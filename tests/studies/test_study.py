"""A study plans its runs with the right settings, and runs again only what is not finished."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from vpd.config import ConfigError
from vpd.runs import RunError, RunFolder
from vpd.studies import study as study_module
from vpd.studies.study import Study, run_study, runs_of, start_of

CONFIG = """
[data]
environment = "reasoning_gym"
dataset = "chain_sum"
[warm_start]
demonstrations = 4
[run]
max_steps = 2
"""

STUDY = """
config = "config.toml"
output_dir = "{output}"
seeds = [3, 4]
set = ["run.max_steps=7"]
[[arms]]
name = "VPD"
[[arms]]
name = "GRPO, fast"
set = ['algorithm={{type="grpo"}}', "optim.learning_rate=1e-4"]
[[arms]]
name = "cold"
set = ["model.name=base"]
"""

# This script stands in for ``python -m vpd.cli train CONFIG --resume --set ...`` and writes a run's files.
RUNNER = """
import sys
from pathlib import Path
from vpd.config import VPDConfig
from vpd.runs import RunFolder
overrides = sys.argv[sys.argv.index("--resume") + 1:]
assert set(overrides[::2]) == {"--set"}
settings = VPDConfig.load(sys.argv[sys.argv.index("train") + 1], overrides[1::2])
if settings.optim.learning_rate == 0.5:
    sys.exit("The learning rate is absurd.")
folder = RunFolder.open(settings.run.output_dir, resume=True)
folder.write_config(settings)
resumed = folder.latest_checkpoint() is not None
folder.write_result({"rows": [], "interrupted": None, "resumed": resumed})
if not resumed:
    folder.commit_checkpoint(1, lambda path: None, 1)
for name in ("model", "best-1"):
    (folder.path / name).mkdir(exist_ok=True)
"""


WAITING = """
import pathlib, sys, time
folder = sys.argv[-1].partition("=")[2].strip('"')
pathlib.Path(folder).with_suffix(".up").touch()
time.sleep(60)
"""


@pytest.fixture
def study(tmp_path, monkeypatch):
    (tmp_path / "config.toml").write_text(CONFIG)
    path = tmp_path / "study.toml"
    path.write_text(STUDY.format(output=tmp_path / "out"))
    runner = tmp_path / "runner.py"
    runner.write_text(RUNNER)
    popen = study_module.subprocess.Popen

    def run_the_stand_in(command, **options):
        assert command[1:4] == ["-m", "vpd.cli", "train"]
        return popen([sys.executable, str(runner), *command[3:]], **options)

    monkeypatch.setattr(study_module.subprocess, "Popen", run_the_stand_in)
    return Study.load(path)


def test_all_arms_begin_with_the_start_and_differ_in_what_they_set(study):
    start = start_of(study).settings(study.config)
    assert (start.run.max_steps, start.warm_start.demonstrations) == (0, 4)
    settings = [[run.settings(study.config) for run in runs_of(study, arm)] for arm in study.arms]
    model = f"{start.run.output_dir}/model"
    assert [[s.model.name for s in of_arm] for of_arm in settings] == [[model] * 2, [model] * 2, ["base"] * 2]
    assert all(s.warm_start.demonstrations == 0 and s.run.max_steps == 7 for of_arm in settings for s in of_arm)
    assert [s.run.seed for s in settings[1]] == [3, 4]
    assert settings[1][0].algorithm.type == "grpo"
    assert settings[0][0].algorithm.type == "verified"
    assert len({s.run.output_dir for of_arm in settings for s in of_arm}) == 6


def test_finished_runs_are_kept_and_interrupted_ones_go_on(study, monkeypatch):
    lines = []
    run_study(study, workers=2, say=lines.append)
    assert sum("is done" in line for line in lines) == 7
    kept, cut_off, interrupted = (runs_of(study, arm)[0] for arm in study.arms)
    shutil.rmtree(cut_off.folder)
    RunFolder(cut_off.folder).write_config(cut_off.settings(study.config))
    folder = RunFolder(interrupted.folder, resume=True)
    folder.write_result({"interrupted": 2})
    folder.commit_checkpoint(1, lambda path: None, 1)

    lines.clear()
    shared = []
    environment = study_module._environment
    monkeypatch.setattr(study_module, "_environment", lambda index, n: shared.append(n) or environment(index, n))
    run_study(study, workers=5, say=lines.append)
    assert max(shared) == 2, "what is finished takes no share of the machine"
    begun = sorted(line.split(" begins")[0] for line in lines if "begins" in line)
    assert begun == ["GRPO, fast, seed 3", "cold, seed 3"]
    results = [study_module.read_json(run.folder / "result.json") for run in (kept, cut_off, interrupted)]
    assert [result and result["resumed"] for result in results] == [False, False, True]


@pytest.mark.parametrize("kept", [True, False])
def test_a_study_that_keeps_no_models_leaves_the_figures_of_its_runs_and_the_start(study, kept):
    study.keep_models = kept
    run_study(study, say=lambda line: None)
    for run in (run for arm in study.arms for run in runs_of(study, arm)):
        assert [(run.folder / name).exists() for name in ("model", "best-1", "checkpoints/checkpoint-1")] == [kept] * 3
        assert (run.folder / "config.json").exists()
        assert run.is_finished()
    assert (start_of(study).folder / "model").exists()
    # A finished run stays finished, and loses its weights once the study says so.
    lines = []
    study.keep_models = False
    run_study(study, say=lines.append)
    assert lines == []
    assert not list(Path(study.output_dir).glob("*/seed-*/model"))


def test_a_finished_run_with_other_settings_is_not_taken_for_this_one(study):
    run_study(study, say=lambda line: None)
    study.arms[1].set[1] = "optim.learning_rate=2e-4"
    with pytest.raises(ConfigError, match=r"begun with other settings: optim.learning_rate was 0.0001 and is 0.0002"):
        run_study(study, say=lambda line: None)


def test_a_run_that_fails_stops_the_study_with_its_words(study):
    study.arms[0].set.append("optim.learning_rate=0.5")
    with pytest.raises(RunError, match=r"VPD, seed 3 ended with exit code 1: The learning rate is absurd"):
        run_study(study, say=lambda line: None)
    # The failed run is the first one and wrote nothing; no other run begins after it.
    begun = [run.name for arm in study.arms for run in runs_of(study, arm) if run.folder.exists()]
    assert begun == []


def test_a_run_that_was_begun_with_other_settings_does_not_go_on(study):
    run = runs_of(study, study.arms[0])[0]
    folder = RunFolder(run.folder)
    folder.write_config(run.settings(study.config))
    folder.commit_checkpoint(1, lambda path: None, 1)
    study.arms[0].set.append("optim.learning_rate=3e-4")
    with pytest.raises(ConfigError, match=r"was begun with other settings: optim\.learning_rate"):
        run_study(study, say=lambda line: None)


def test_runs_from_an_earlier_start_are_refused(study):
    run_study(study, say=lambda line: None)
    shutil.rmtree(start_of(study).folder)
    with pytest.raises(ConfigError, match="before the shared start was made"):
        run_study(study, say=lambda line: None)


def test_a_folder_that_holds_no_run_is_not_removed(study):
    folder = start_of(study).folder
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text("years")
    with pytest.raises(ConfigError, match="it holds no run"):
        run_study(study, say=lambda line: None)
    assert (folder / "thesis.txt").exists()


def test_two_studies_do_not_write_one_folder(study):
    with study_module._locked(Path(study.output_dir)), pytest.raises(RunError, match="being run already"):
        run_study(study, say=lambda line: None)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_handed_on_and_no_further_run_begins(study, tmp_path, number):
    (tmp_path / "runner.py").write_text(WAITING)
    timer = threading.Timer(0.1, lambda: (wait_for(tmp_path / "out" / "start.up"), os.kill(os.getpid(), number)))
    timer.start()
    begin, lines = time.monotonic(), []
    with pytest.raises(KeyboardInterrupt):
        run_study(study, say=lines.append)
    assert time.monotonic() - begin < 30
    assert [line.split(";")[0] for line in lines] == ["start begins", "start is interrupted."]


def wait_for(path):
    while not path.exists():
        time.sleep(0.05)


def test_a_study_of_the_selection_split_asks_no_final_question_and_must_ask_the_others(study):
    study.split = "selection"
    study.set.append("eval.eval_steps=0")
    with pytest.raises(ConfigError, match=r"start would never be evaluated on the selection split.*eval\.eval_steps"):
        run_study(study, say=lambda line: None)
    assert not start_of(study).folder.exists()
    study.set[-1] = "eval.eval_steps=7"
    run_study(study, say=lambda line: None)
    assert start_of(study).is_finished()
    assert start_of(study).settings(study.config).eval.final_tasks == 0


def test_each_worker_takes_one_of_the_gpus_that_it_may_use(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    monkeypatch.setattr(study_module, "gpu_count", lambda: 2)
    devices = [study_module._environment(worker, 3) for worker in range(3)]
    assert devices == [{"CUDA_VISIBLE_DEVICES": name} for name in ("4", "5", "4")]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4")
    monkeypatch.setattr(study_module, "gpu_count", lambda: 1)
    assert study_module._environment(0, 3) == {}


def test_runs_at_the_same_time_share_the_cores(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(study_module, "gpu_count", lambda: 0)
    monkeypatch.setattr(study_module, "usable_cores", lambda: 8)
    threads = [study_module._environment(0, workers).get("OMP_NUM_THREADS") for workers in (1, 2, 3, 16)]
    assert threads == [None, "4", "2", "1"]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert study_module._environment(0, 2) == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('name = "cold"', 'name = "vpd"'), "would share its folder 'vpd'"),
        (('name = "cold"', 'name = "Start"'), "would share its folder 'start'"),
        (("seeds = [3, 4]", "seeds = [3, 3]"), "names one twice"),
        (('name = "cold"', 'nam = "cold"'), "Known there: name, set"),
    ],
)
def test_mistakes_are_told(tmp_path, change, message):
    path = tmp_path / "study.toml"
    path.write_text(STUDY.format(output="out").replace(*change))
    with pytest.raises(ConfigError, match=message):
        Study.load(path)
