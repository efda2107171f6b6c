"""Micro-batches keep the order and the budget, and divide no group that fits."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vpd.packing import plan_micro_batches
from vpd.packing.trie import build_trie

# Few examples and no deadline: the suite shares its cores.
few = settings(max_examples=40, deadline=None)

tokens = st.lists(st.integers(0, 2), min_size=1, max_size=8)
turns = st.lists(tokens, max_size=2)
"""A rollout's sequences in one view: one a turn, and none where it lacks the view."""
rollouts = st.lists(st.tuples(st.lists(tokens, min_size=1, max_size=2), turns), max_size=10)


def packed_tokens(views: list, share_prefixes: bool = True) -> int:
    """Of the larger view."""
    columns = [[turn[:-1] for turns in view for turn in turns] for view in zip(*views, strict=True)]
    return max(len(build_trie(column, share_prefixes=share_prefixes).tokens) for column in columns)


@few
@given(rollouts, st.integers(1, 20), st.booleans())
def test_the_order_and_the_budget_are_kept_and_batches_are_full(views, budget, share_prefixes):
    plan = plan_micro_batches(views, budget, share_prefixes=share_prefixes)
    assert [i for batch in plan for i in batch] == list(range(len(views)))
    for batch in plan:
        assert len(batch) == 1 or packed_tokens([views[i] for i in batch], share_prefixes) <= budget
    for batch, following in pairwise(plan):
        assert packed_tokens([views[i] for i in [*batch, following[0]]], share_prefixes) > budget


@few
@given(rollouts, st.integers(1, 20), st.data())
def test_a_group_that_fits_is_not_divided(views, budget, data):
    groups = sorted(data.draw(st.lists(st.integers(0, 3), min_size=len(views), max_size=len(views))))
    plan = plan_micro_batches(views, budget, groups=groups)
    assert [i for batch in plan for i in batch] == list(range(len(views)))
    for batch in plan:
        assert len(batch) == 1 or packed_tokens([views[i] for i in batch]) <= budget
    for group in set(groups):
        members = [i for i, name in enumerate(groups) if name == group]
        if packed_tokens([views[i] for i in members]) <= budget:
            assert any(set(members) <= set(batch) for batch in plan)


@few
@given(rollouts, st.integers(1, 20))
def test_views_conditioned_on_the_first_count_only_the_tokens_that_it_lacks(views, budget):
    def worst(batch):
        first = [turn[:-1] for i in batch for turn in views[i][0]]
        both = first + [turn[:-1] for i in batch for turn in views[i][1]]
        firsts = len(build_trie(first).tokens)
        return max(firsts / budget, (len(build_trie(both).tokens) - firsts) / (2 * budget))

    plan = plan_micro_batches(views, [budget, 2 * budget], conditioned=True)

    assert [i for batch in plan for i in batch] == list(range(len(views)))
    for batch in plan:
        assert len(batch) == 1 or worst(batch) <= 1
    for batch, following in pairwise(plan):
        assert worst([*batch, following[0]]) > 1


def test_a_group_that_no_longer_fits_starts_a_micro_batch():
    views = [[[[1, 2, 3, 4, 0]]], [[[5, 6, 7, 8, 0]]], [[[5, 6, 7, 9, 0]]]]
    assert plan_micro_batches(views, 8, groups=["a", "b", "b"]) == [[0], [1, 2]]
    assert plan_micro_batches(views, 8) == [[0, 1], [2]]


def test_a_group_above_the_budget_is_divided_and_a_rollout_above_it_stands_alone():
    prompt = list(range(10))
    views = [[[prompt + [50 + i] * 5]] for i in range(4)] + [[[list(range(100, 140))]]]
    # The prompt and two completions of 4 computed tokens each fit; the last rollout alone is above the budget.
    assert plan_micro_batches(views, 18, groups=[0, 0, 0, 0, 1]) == [[0, 1], [2, 3], [4]]


def test_hundreds_of_rollouts_are_planned_at_once():
    generator = np.random.default_rng(0)
    prompts = generator.integers(0, 1000, (8, 200))
    views = [[[np.concatenate([prompts[i // 32], generator.integers(0, 1000, 300)])]] for i in range(256)]
    plan = plan_micro_batches(views, 8192, groups=[i // 32 for i in range(256)])
    assert sum(map(len, plan)) == 256


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="max_tokens is 0"):
        plan_micro_batches([[[[1, 2]]]], 0)
    with pytest.raises(ValueError, match="2 budgets for 1 views"):
        plan_micro_batches([[[[1, 2]]]], [4, 4])
    with pytest.raises(ValueError, match="same number of views"):
        plan_micro_batches([[[[1, 2]]], [[[1, 2]], [[3]]]], 4)
