"""Runs that are killed at random moments, and whose newest checkpoint is damaged, end as those that nobody touched.

This is a short set; ``make test-faults`` kills a hundred times.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

DRIVER = Path(__file__).with_name("driver.py")


@pytest.mark.parametrize(("ranks", "kills"), [(1, 4), (2, 2)])
def test_killed_runs_end_as_the_uninterrupted_one(ranks, kills):
    command = [sys.executable, str(DRIVER), "--kills", str(kills), "--seed", "7", "--ranks", str(ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["kills"] >= kills
    assert counts["different"] == 0
