"""The trie holds every distinct prefix once, and every sequence can be read back from it."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from vpd.packing.trie import PrefixCounter, build_trie, padded

# Few examples and no deadline: the suite shares its cores.
few = settings(max_examples=40, deadline=None)

sequence_lists = st.lists(st.lists(st.integers(0, 2), max_size=8), max_size=8)


def distinct_prefixes(sequences: list[list[int]]) -> set[tuple[int, ...]]:
    return {tuple(sequence[: i + 1]) for sequence in sequences for i in range(len(sequence))}


@few
@given(sequence_lists)
def test_each_distinct_prefix_is_one_token(sequences):
    trie = build_trie(sequences)
    assert len(trie.tokens) == len(distinct_prefixes(sequences))


@few
@given(sequence_lists, st.booleans())
def test_paths_read_the_sequences_back(sequences, share_prefixes):
    trie = build_trie(sequences, share_prefixes=share_prefixes)
    for sequence, path in zip(sequences, trie.paths, strict=True):
        assert trie.tokens[path].tolist() == sequence
        assert trie.depth[path].tolist() == list(range(len(sequence)))


@few
@given(sequence_lists, st.booleans())
def test_subtree_end_tells_ancestors(sequences, share_prefixes):
    trie = build_trie(sequences, share_prefixes=share_prefixes)
    index = np.arange(len(trie.tokens))
    told = (index[None, :] <= index[:, None]) & (index[:, None] < trie.subtree_end[None, :])
    true = np.zeros_like(told)
    for path in trie.paths:
        for depth, token in enumerate(path):
            true[token, path[: depth + 1]] = True
    np.testing.assert_array_equal(told, true)


@few
@given(sequence_lists)
def test_unshared_sequences_lie_end_to_end(sequences):
    trie = build_trie(sequences, share_prefixes=False)
    assert trie.tokens.tolist() == [token for sequence in sequences for token in sequence]


def test_children_stand_in_the_order_of_the_sequences():
    assert build_trie([[5, 9], [5, 1], [2], [5, 9, 3]]).tokens.tolist() == [5, 9, 3, 1, 2]


def test_a_chain_of_branches_deeper_than_the_call_stack():
    count = 1100
    sequences = [[1] * i + [2] for i in range(count)]
    assert len(build_trie(sequences).tokens) == 2 * count - 1


@few
@given(sequence_lists, st.booleans())
def test_the_counter_counts_as_the_trie(sequences, share_prefixes):
    counter = PrefixCounter(share_prefixes=share_prefixes)
    for i, sequence in enumerate(sequences):
        expected = len(build_trie(sequences[: i + 1], share_prefixes=share_prefixes).tokens)
        assert counter.count + counter.new_tokens(sequence) == expected
        counter.add(sequence)
        assert counter.count == expected


@few
@given(st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=6), min_size=1, max_size=5), st.integers(0, 5))
def test_a_padded_trie_is_one_with_a_sequence_more(sequences, count):
    found, expected = padded(build_trie(sequences), count), build_trie([*sequences, [0] * count])
    for name in ("tokens", "depth", "subtree_end", "segment_starts", "segment_parents"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)
    assert [path.tolist() for path in found.paths] == [path.tolist() for path in expected.paths[:-1]]
