"""The names that ``vpd`` exports."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module

import pytest

import vpd


@pytest.mark.parametrize("name", vpd.__all__)
def test_every_public_name_can_be_imported(name):
    assert getattr(vpd, name) is getattr(import_module(vpd._HOME_OF[name]), name)
    assert name in dir(vpd)


def test_there_is_a_home_for_every_public_name_and_for_no_other():
    assert sorted(vpd._HOME_OF) == sorted(vpd.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        vpd.Nonsense  # noqa: B018


def test_the_package_is_there_without_torch():
    code = "import sys, vpd; vpd.Environment, vpd.Task, vpd.ModelSettings; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
