"""The script for TRL and the same script with VPD: both run, few lines differ, and the page shows both."""

from __future__ import annotations

import difflib
import warnings
from pathlib import Path

import pytest
from tiny import tokenizer
from toy import toy_model

ROOT = Path(__file__).parents[1]
SCRIPTS = {name: (ROOT / "examples" / "trl" / f"{name}.py").read_text() for name in ("grpo", "with_vpd")}


def code(name):
    return SCRIPTS[name].partition('"""\n\n')[2]


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.filterwarnings("ignore")  # TRL and transformers deprecate some of their own names.
def test_the_scripts_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = tokenizer(pad_token="<|endoftext|>")
    toy_model().save_pretrained("tiny")
    made.save_pretrained("tiny")
    text = SCRIPTS[name].replace("HuggingFaceTB/SmolLM2-135M-Instruct", "tiny").replace("max_steps=20", "max_steps=1")
    text = text.replace("bf16=False", "bf16=False, use_cpu=True, report_to='none'")
    values: dict = {"__name__": "script"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(text, name, "exec"), values)
    assert values["trainer"].state.global_step == 1


def test_at_most_five_lines_change():
    changes = list(difflib.ndiff(code("grpo").splitlines(), code("with_vpd").splitlines()))
    assert sum(line.startswith("+ ") and bool(line[2:].strip()) for line in changes) <= 5


def test_the_page_shows_both():
    page = (ROOT / "docs" / "trl.md").read_text()
    assert all(f"```python\n{code(name)}```" in page for name in SCRIPTS)
