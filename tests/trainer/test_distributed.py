"""Two gloo processes on the same recorded rollouts give the losses and weights of one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).parent.parent / "distributed_worker.py"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run(folder: Path, processes: int, scenario: str, algorithm: dict) -> dict:
    folder.mkdir()
    port = str(free_port())
    workers = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(folder), scenario, json.dumps(algorithm)],
            env={
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(processes),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "OMP_NUM_THREADS": "1",
                "ACCELERATE_USE_CPU": "true",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(processes)
    ]
    outputs = [worker.communicate(timeout=300)[0] for worker in workers]
    assert all(worker.returncode == 0 for worker in workers), "\n".join(outputs)
    return torch.load(folder / "result.pt")


@pytest.mark.parametrize("scenario", ["all_active", "one_rank_idle"])
def test_two_processes_equal_one(tmp_path, scenario):
    one, two = (run(tmp_path / str(count), count, scenario, {"type": "vpd", "e_step_every": 2}) for count in (1, 2))
    assert one["metrics"]["e_step"] == two["metrics"]["e_step"] == 1
    for name in ("e_loss", "m_loss", "reward_shift", "margin_before", "margin_after", "divergence", "active_share"):
        assert two["metrics"][name] == pytest.approx(one["metrics"][name], rel=1e-3), name
    assert_same_weights(one, two)


@pytest.mark.parametrize(
    ("scenario", "algorithm"),
    [
        ("one_rank_untaught", {"type": "joint", "divergence": "js"}),
        ("one_rank_idle", {"type": "reshape"}),
        ("all_active", {"type": "opsa"}),
        ("one_rank_untaught", {"type": "sdpo", "divergence": "sampled"}),
    ],
)
def test_two_processes_equal_one_with_the_other_algorithms(tmp_path, scenario, algorithm):
    one, two = (run(tmp_path / str(count), count, scenario, algorithm) for count in (1, 2))
    assert two["metrics"]["m_loss"] == pytest.approx(one["metrics"]["m_loss"], rel=1e-3, abs=1e-7)
    assert two["metrics"]["grad_norm"] == pytest.approx(one["metrics"]["grad_norm"], rel=1e-3)
    assert_same_weights(one, two)


def assert_same_weights(one, two):
    changed = 0
    for name, weight in one["weights"].items():
        # Gradients add up in another order; Adam's first steps turn their rounding into at most this.
        torch.testing.assert_close(two["weights"][name], weight, rtol=1e-3, atol=2e-5)
        changed += not torch.equal(weight, one["before"][name])
    assert changed == len(one["weights"])
