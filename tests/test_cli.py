"""The real command, on a tiny model in a folder."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from tiny import tokenizer
from toy import ALPHABET, toy_model

import vpd as vpd_package
from vpd.cli import _result_table

CONFIG = """
[model]
name = "{model}"
autocast = "none"
[data]
environment = "prompts"
path = "{data}"
reward_funcs = ["toy_rewards:ends_even"]
selection_size = 4
final_size = 4
[rollout]
prompts_per_step = 2
num_generations = 4
max_completion_length = 8
dtype = "float32"
stop_strings = {stops}
[algorithm]
type = "vpd"
e_step_every = 1
[eval]
preflight_tasks = 2
[run]
output_dir = "{output}"
max_steps = 2
"""


@pytest.fixture
def workspace(tmp_path):
    model = tmp_path / "tiny-model"
    toy_model().save_pretrained(model)
    tokenizer().save_pretrained(model)
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"Number {i}."}) + "\n" for i in range(20)))
    (tmp_path / "toy_rewards.py").write_text(
        "def ends_even(completions, **kwargs):\n"
        "    ends = [c if isinstance(c, str) else c[0]['content'] for c in completions]\n"
        "    return [(float(bool(e) and ord(e[-1]) % 2 == 0), f'It ends with {e[-1:]}.') for e in ends]\n"
    )
    stops = json.dumps(list(ALPHABET))
    config = CONFIG.format(model=model, data=data, output=tmp_path / "run", stops=stops)
    (tmp_path / "config.toml").write_text(config)
    return tmp_path


SOURCES = str(Path(vpd_package.__file__).parents[1])


def vpd(workspace, *arguments):
    # -P leaves the working directory out of the path, as it is for the installed command.
    return subprocess.run(
        [sys.executable, "-P", "-m", "vpd.cli", *arguments],
        cwd=workspace,
        env={**os.environ, "PYTHONPATH": SOURCES, "COLUMNS": "200", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_train_evaluate_report(workspace):
    trained = vpd(workspace, "train", "config.toml")
    assert trained.returncode == 0, trained.stderr
    assert "after VPD" in trained.stdout
    assert "report.html" in trained.stdout
    page = (workspace / "run" / "report.html").read_text()
    assert "after VPD" in page

    evaluated = vpd(workspace, "eval", "run/model", "--env", "config.toml", "--k", "2")
    assert evaluated.returncode == 0, evaluated.stderr
    assert "run/model" in evaluated.stdout
    (saved,) = (workspace / "evaluations").glob("model-final-*.json")
    assert len(json.loads(saved.read_text())["outcomes"]) == 4

    numbers = vpd(workspace, "eval", "run/model", "--env", "config.toml", "--json", "--save", "x/found.json")
    found = json.loads(numbers.stdout)
    assert (found["n"], found["saved"], found["split"]) == (4, "x/found.json", "final")
    assert json.loads((workspace / "x" / "found.json").read_text())["accuracy"] == found["accuracy"]

    again = vpd(workspace, "train", "config.toml")
    assert again.returncode == 2
    assert "--resume" in again.stderr


def test_dry_run_shows_both_prompts_and_trains_nothing(workspace):
    shown = vpd(workspace, "train", "config.toml", "--dry-run")
    assert shown.returncode == 0, shown.stderr
    assert "student's prompt" in shown.stdout
    assert "Correctly solve the original question." in shown.stdout
    assert not (workspace / "run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--set", "algorithm.e_stp=1"], "e_stp"),
        (["--set", "rollout.top_p=3"], "rollout.top_p"),
        (["--set", "algorithm.m_minibatch_prompts=3"], "prompts_per_step = 2"),
        (["--set", "rollout.max_prompt_length=3"], "rollout.max_prompt_length = 3"),
        (["--set", "model.name=no/such-folder/at-all"], "no/such-folder/at-all"),
        (["--set", "data.path=missing.jsonl"], "missing.jsonl"),
        (["--set", "data.path=broken.jsonl"], "broken.jsonl"),
        (["--set", "data.path=empty.jsonl"], "empty.jsonl"),
        (["--set", "data.reward_funcs=['toy_rewards:nothing']"], "nothing"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_2(workspace, change, message):
    (workspace / "broken.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    (workspace / "empty.jsonl").write_text("")
    result = vpd(workspace, "train", "config.toml", *change)
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (workspace / "run" / "model").exists()
    if "broken" in message:
        assert "2" in result.stderr


def test_names_are_not_cut():
    console = Console(file=io.StringIO(), width=60)
    name = "a-model-with-a-name-that-is-longer-than-a-terminal-is-wide-by-far"
    console.print(_result_table([{"name": name, "accuracy": 0.5, "low": 0.4, "high": 0.6, "n": 9, "seconds": 1.0}]))
    assert isinstance(console.file, io.StringIO)
    lines = [line.split("│")[1].strip() for line in console.file.getvalue().splitlines() if line.startswith("│")]
    assert "".join(lines) == name


def test_init_writes_a_config_that_trains_and_settings_are_told(workspace):
    given = ("path=prompts.jsonl", "reward_funcs=toy_rewards:ends_even", "selection_size=4", "final_size=4")
    made = vpd(workspace, "init", "mine.toml", *(part for value in given for part in ("--data", value)))
    assert made.returncode == 0, made.stderr
    shown = vpd(workspace, "train", "mine.toml", "--dry-run", "--set", "model.name=tiny-model")
    assert "student's prompt" in shown.stdout, shown.stderr
    again = vpd(workspace, "init", "mine.toml")
    assert (again.returncode, "mine.toml already" in again.stderr) == (2, True)
    missing = vpd(workspace, "init", "other.toml", "--env", "mcq")
    assert (missing.returncode, "--data path=VALUE" in missing.stderr) == (2, True)
    assert "max_steps: int = 100" in vpd(workspace, "settings", "run").stdout
    assert vpd(workspace, "--version").stdout.startswith("vpd 0.")


def test_a_missing_config_is_named(workspace):
    result = vpd(workspace, "train", "nowhere.toml")
    assert result.returncode == 2
    assert "nowhere.toml" in result.stderr


STUDY = """
config = "config.toml"
output_dir = "study"
seeds = [0, 1]
[[arms]]
name = "VPD"
[[arms]]
name = "GRPO"
set = ['algorithm={type="grpo"}']
"""


def test_compare_runs_all_arms_and_sets_them_side_by_side(workspace):
    (workspace / "study.toml").write_text(STUDY)
    compared = vpd(workspace, "compare", "study.toml")
    assert compared.returncode == 0, compared.stderr + compared.stdout
    assert "| GRPO |" in compared.stdout
    assert {path.name for path in (workspace / "study").glob("*.png")} == {"learning.png", "margin.png"}
    assert len(list((workspace / "study").glob("*/*/report.html"))) == 4
