"""States of a run's parts come back as they were, from files that can hold no code."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from vpd.runs import RunError
from vpd.runs.random_states import random_states, set_random_states
from vpd.runs.state_files import read_state, write_state


def same(first, second):
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and first.stride() == second.stride() and torch.equal(first, second)
    if isinstance(first, dict):
        return list(first) == list(second) and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return type(first) is type(second) and all(map(same, first, second)) and len(first) == len(second)
    return type(first) is type(second) and (first == second or (first != first and second != second))


def test_numbers_texts_and_tensors_come_back_in_their_places(tmp_path):
    state = {
        0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(4, 3)},
        (1, "a"): [1, 2.5, math.nan, -math.inf, True, None, "ü\ud800"],
        "betas": (0.9, 0.1 + 0.2),
        "wide": torch.randn(4, 6).t(),
        "bf16": torch.randn(3).bfloat16(),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "none": torch.zeros(0, 3),
        "count": np.int64(7),
    }
    write_state(tmp_path, "part", state)
    assert same(read_state(tmp_path, "part"), state | {"count": 7})


def test_a_tensor_that_occurs_twice_is_kept_once_and_views_keep_their_values(tmp_path):
    weight = torch.randn(100, 10)
    state = {"embedding": weight, "head": weight, "rows": weight[:2], "column": weight[:, 0]}
    write_state(tmp_path, "model", state)
    assert (tmp_path / "model.safetensors").stat().st_size < 1.5 * weight.numel() * 4
    found = read_state(tmp_path, "model")
    assert all(torch.equal(found[name], value) for name, value in state.items())


def test_a_state_that_is_read_does_not_hang_on_its_file(tmp_path):
    write_state(tmp_path, "part", torch.ones(10))
    found = read_state(tmp_path, "part")
    (tmp_path / "part.safetensors").write_bytes(b"")
    assert torch.equal(found, torch.ones(10))


def test_what_a_checkpoint_cannot_keep_is_refused(tmp_path):
    with pytest.raises(RunError, match=r"state of the algorithm holds a function.*state_dict return numbers"):
        write_state(tmp_path, "algorithm", {"memory": [lambda: None]})


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '{"tensor": "0"}', '{"dict": 3}', '{"other": 1}', "\x80"])
def test_files_of_another_kind_are_told(tmp_path, text):
    (tmp_path / "part.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(RunError, match=r"part\.json does not hold the state"):
        read_state(tmp_path, "part")


def test_random_numbers_go_on_where_they_were(tmp_path):
    def draws():
        import random

        return [random.random(), random.gauss(0, 1), np.random.rand(), float(torch.rand(()))]

    draws()
    write_state(tmp_path, "random", random_states())
    wanted = draws()
    draws()
    set_random_states(read_state(tmp_path, "random"))
    assert draws() == wanted
