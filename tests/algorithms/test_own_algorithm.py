"""The algorithm in docs/algorithms.md works exactly as it is shown there, by its path and by a name."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from toy import toy_trainer

import vpd
from vpd import ConfigError
from vpd.config import algorithm as registry
from vpd.runs.folder import read_metrics

DOCUMENT = Path(__file__).parents[2] / "docs" / "algorithms.md"


@pytest.fixture
def own_file(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(# shortest_success\.py\n.*?)```", DOCUMENT.read_text(), flags=re.S)
    assert len(code.splitlines()) <= 60
    (tmp_path / "shortest_success.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_ALGORITHMS", dict(registry._ALGORITHMS))
    yield
    sys.modules.pop("shortest_success", None)


def trained(folder, kind):
    toy_trainer(folder, algorithm={"type": kind, "max_tokens": 12}, run={"max_steps": 3}).train()
    return [line for line in read_metrics(folder) if line["event"] == "train"]


def test_a_class_is_found_by_its_path_and_by_the_name_it_was_given(tmp_path, own_file):
    by_path = trained(tmp_path / "path", "shortest_success:ShortestSuccess")
    assert any(line["imitated"] > 0 for line in by_path)
    import shortest_success

    vpd.register_algorithm("shortest", shortest_success.ShortestSuccess)
    by_name = trained(tmp_path / "name", "shortest")
    assert [line.get("m_loss") for line in by_name] == [line.get("m_loss") for line in by_path]


def test_its_settings_are_checked_as_any_others(own_file):
    with pytest.raises(ConfigError, match=r"Unknown setting algorithm.*max_token.*Known there: .*max_tokens"):
        vpd.VPDConfig.parse({"algorithm": {"type": "shortest_success:ShortestSuccess", "max_token": 3}})


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("shortest", "there is no algorithm 'shortest'. There are verified, vpd,"),
        ("no_such_module:Algorithm", "the algorithm 'no_such_module:Algorithm' cannot be imported: No module named"),
        ("shortest_success:Longest", "cannot be imported: module 'shortest_success' has no attribute 'Longest'"),
        ("os:system", "'os:system' is no class with a settings_class: give a subclass of vpd.Algorithm"),
        ("vpd.algorithms.base:Algorithm", "is no class with a settings_class"),
        (".a:b", "the algorithm '.a:b' cannot be imported"),
        (3, "algorithm.type is 3: give a name, one of verified, vpd"),
        (["vpd"], "algorithm.type is .'vpd'.: give a name"),
    ],
)
def test_what_cannot_be_found_is_refused_with_a_sentence(own_file, kind, message):
    with pytest.raises(ConfigError, match=message):
        vpd.VPDConfig.parse({"algorithm": {"type": kind}})


def test_a_name_is_given_once(own_file):
    import shortest_success

    with pytest.raises(ConfigError, match="There is an algorithm 'vpd' already"):
        vpd.register_algorithm("vpd", shortest_success.ShortestSuccess)
    own = shortest_success.ShortestSuccess
    vpd.register_algorithm("shortest", own)
    vpd.register_algorithm("shortest", type(own.__name__, (own,), {"__module__": own.__module__}))
    with pytest.raises(ConfigError, match="There is an algorithm 'shortest' already"):
        vpd.register_algorithm("shortest", type("Another", (own,), {"__module__": own.__module__}))
