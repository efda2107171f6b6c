"""flex_attention with the trie's mask gives what the blocks give. On the CPU it has no backward pass to test, and its
definition in plain operations runs instead of the compiled kernel.
"""

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from pairs import few, sequence_lists, true_pairs, windows
from tiny_models import attention_configs, build, grouped_sequences
from torch.utils._python_dispatch import TorchDispatchMode

from vpd.config import ConfigError, ModelSettings
from vpd.packing import IMPLEMENTATIONS, enable_packed_attention, hidden_states, pack
from vpd.packing.kernels import flex
from vpd.packing.trie import build_trie
from vpd.policy.module import PolicyModule
from vpd.policy.prepare import make_module, may_share_prefixes, prepare_policy

CONFIGS = attention_configs()
CPU = torch.device("cpu")

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def attended_pairs(trie, window):
    """[T, T] bool: where equal scores and values that name their tokens let something through."""
    count = len(trie.tokens)
    scores = torch.zeros(1, count, 16)
    mask = flex.make_block_mask(trie, window, CPU)
    return (flex.attend(scores, scores, torch.eye(count)[None], mask, None)[0] > 0).numpy()


@few
@given(sequence_lists.filter(any), windows)
def test_each_token_sees_its_ancestors_within_the_window(sequences, window):
    trie = build_trie(sequences)
    np.testing.assert_array_equal(attended_pairs(trie, window), true_pairs(trie, window))


@pytest.mark.parametrize("window", [None, 40, 200])
def test_blocks_of_pairs_are_left_out_or_taken_whole_only_where_that_is_right(window):
    draw = random.Random(0)
    prompts = [[draw.randrange(9) for _ in range(300)] for _ in range(2)]
    sequences = [prompt + [draw.randrange(9) for _ in range(90)] for prompt in prompts for _ in range(3)]
    trie = build_trie(sequences)
    count, size = len(trie.tokens), flex.BLOCK_SIZE
    mask = flex.make_block_mask(trie, window, CPU)

    assert mask.kv_num_blocks.shape[-1] * size == mask.seq_lengths[0] >= count
    padded = np.eye(mask.seq_lengths[0], dtype=bool)
    padded[:count, :count] = true_pairs(trie, window)
    for row in range(mask.kv_num_blocks.shape[-1]):
        listed = [
            mask.kv_indices[0, 0, row, : int(mask.kv_num_blocks[0, 0, row])].tolist(),
            mask.full_kv_indices[0, 0, row, : int(mask.full_kv_num_blocks[0, 0, row])].tolist(),
        ]
        for column in range(mask.kv_num_blocks.shape[-1]):
            pairs = padded[row * size : (row + 1) * size, column * size : (column + 1) * size]
            assert (column in listed[1]) == pairs.all()
            assert (column in listed[0]) == (pairs.any() and not pairs.all())
    assert mask.sparsity() > 40, "most blocks of two prompts with three completions each are empty"


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_hidden_states_equal_those_of_separate_sequences(name):
    sequences, starts = grouped_sequences()
    model = build(CONFIGS[name])
    separate = hidden_states(model.model, pack(sequences, starts, share_prefixes=False))
    separate = separate[pack(sequences, starts, share_prefixes=False).predictor]

    enable_packed_attention(model, "flex")
    batch = pack(sequences, starts)
    packed = hidden_states(model.model, batch)[batch.predictor]

    assert (packed - separate).abs().max() <= 1e-5 * separate.abs().max()
    assert set(batch.layout.prepared(flex.Prepared)._masks), "flex_attention was not asked"


def test_the_mask_is_made_without_a_tensor_of_all_pairs():
    trie = build_trie([list(range(40 * flex.BLOCK_SIZE))])
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            largest = max(largest, result.numel() if isinstance(result, torch.Tensor) else 0)
            return result

    with Watch():
        flex.make_block_mask(trie, 300, CPU)

    assert 0 < largest <= flex.BLOCK_SIZE * len(trie.tokens)


def test_autocast_may_leave_queries_and_keys_wider_than_values():
    trie = build_trie([[3, 4, 5, 6], [3, 4, 7]])
    mask = flex.make_block_mask(trie, None, CPU)
    query, key, value = torch.randn(3, 2, len(trie.tokens), 16, generator=torch.Generator().manual_seed(0))

    output = flex.attend(query, key, value.bfloat16(), mask, None)

    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), flex.attend(query, key, value, mask, None), rtol=0.05, atol=0.05)


@torch.no_grad()
def test_bfloat16_autocast_stays_near_the_blocks():
    model = build(CONFIGS["llama"])
    found = []
    for kernel in ("blocks", "flex"):
        enable_packed_attention(model, kernel)
        with torch.autocast("cpu", torch.bfloat16):
            found.append(hidden_states(model.model, pack(*grouped_sequences())))
    assert (found[1] - found[0]).abs().max() <= 0.03 * found[0].abs().max()


def test_dropout_is_refused():
    model = build(CONFIGS["llama"])
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    enable_packed_attention(model.train(), "flex")
    with pytest.raises(ValueError, match="no dropout"):
        hidden_states(model.model, pack(*grouped_sequences()))


@torch.no_grad()
def test_keys_of_another_pass_are_refused():
    sequences, starts = grouped_sequences()
    model = build(CONFIGS["llama"])
    enable_packed_attention(model, "flex")
    first = pack(sequences, starts, keeps_keys=True)
    hidden_states(model.model, first)
    with pytest.raises(ValueError, match="does not reuse keys"):
        hidden_states(model.model, pack([[*x[:-1], 7, *x[-1:]] for x in sequences], starts, conditioned_on=first))
    assert not list(first.layout.give_away())
    assert [PolicyModule(model, kernel=kernel).can_reuse_keys for kernel in ("blocks", "flex")] == [True, False]


def test_the_kernel_that_was_chosen_is_the_one_that_is_tried_before_training():
    model = build(CONFIGS["llama"])
    assert may_share_prefixes(model, "flex")
    assert model.config._attn_implementation == IMPLEMENTATIONS["flex"]
    assert PolicyModule(model, kernel="flex").model.config._attn_implementation == IMPLEMENTATIONS["flex"]


def test_flex_is_refused_where_there_is_no_gpu_to_train_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="packed_attention"):
        prepare_policy(build(CONFIGS["llama"]), None, ModelSettings(packed_attention="flex"))


def test_the_default_kernel_gives_way_where_attention_weights_are_dropped(monkeypatch):
    monkeypatch.setattr("vpd.policy.prepare.training_device", lambda: torch.device("cuda"))
    for dropout, kernel in ((0.0, "flex"), (0.1, "blocks")):
        model = build(CONFIGS["llama"])
        model.config.attention_dropout = dropout
        assert make_module(model, ModelSettings()).kernel == kernel
