"""Paths that a TOML file names are relative to the file, and those on the command line to the working directory."""

from __future__ import annotations

import pytest

from vpd.config import ConfigError, PromptData, VPDConfig
from vpd.runs.model_card import shared_settings
from vpd.studies.study import Study, runs_of, start_of

CONFIG = """
[model]
name = "{model}"
[data]
environment = "prompts"
path = "{data}"
reward_funcs = ["a:b"]
[run]
output_dir = "../runs/mine"
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder of configs, one of data and one where the command is run."""
    for name in ("configs", "data", "elsewhere"):
        (tmp_path / name).mkdir()
    (tmp_path / "data" / "rows.jsonl").write_text("{}\n")
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path


def load(project, model="HuggingFaceTB/SmolLM2-135M", data="../data/rows.jsonl", overrides=None):
    (project / "configs" / "c.toml").write_text(CONFIG.format(model=model, data=data))
    return VPDConfig.load("../configs/c.toml", overrides)


def test_paths_in_a_file_are_relative_to_it_and_names_stay(project):
    settings = load(project)
    assert isinstance(settings.data, PromptData)
    assert settings.data.path == str(project / "data" / "rows.jsonl")
    assert settings.run.output_dir == str(project / "runs" / "mine")
    assert settings.model.name == "HuggingFaceTB/SmolLM2-135M"


def test_a_models_folder_beside_the_file_is_found(project):
    (project / "configs" / "my-model").mkdir()
    assert load(project, model="my-model").model.name == str(project / "configs" / "my-model")


def test_paths_on_the_command_line_are_relative_to_the_working_directory(project):
    settings = load(project, overrides=["data.path=mine.jsonl", "run.output_dir=runs/x"])
    assert isinstance(settings.data, PromptData)
    assert (settings.data.path, settings.run.output_dir) == ("mine.jsonl", "runs/x")


def test_what_only_the_working_directory_has_is_refused_with_the_way_to_write_it(project):
    (project / "elsewhere" / "rows.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match=r"relative to that file.*write '\.\./elsewhere/rows\.jsonl'"):
        load(project, data="rows.jsonl")


def test_a_study_finds_its_config_its_data_and_its_folders_from_anywhere(project):
    load(project)
    (project / "configs" / "study.toml").write_text(
        'config = "c.toml"\noutput_dir = "../runs/study"\nseeds = [0]\nreport_dir = "../table"\n'
        'set = [\'data={environment="prompts", path="../data/rows.jsonl", reward_funcs=["a:b"]}\']\n'
        '[[arms]]\nname = "VPD"\nset = ["data.path=../data/others.jsonl"]\n'
    )
    study = Study.load(project / "configs" / "study.toml")
    start, (run,) = start_of(study), runs_of(study, study.arms[0])
    assert study.report_dir == str(project / "table")
    assert run.folder == project / "runs" / "study" / "vpd" / "seed-0"
    of_start, of_run = start.settings(study.config).data, run.settings(study.config).data
    assert isinstance(of_start, PromptData)
    assert isinstance(of_run, PromptData)
    assert (of_start.path, of_run.path) == (
        str(project / "data" / "rows.jsonl"),
        str(project / "data" / "others.jsonl"),
    )


def test_a_model_card_tells_nobody_about_the_machines_folders(project):
    text = str(shared_settings(load(project)))
    assert "rows.jsonl" in text
    assert str(project) not in text
