"""A compressed trie over token sequences holds every distinct prefix once, in depth-first order.

Sequences that begin alike (rollouts of one prompt, or of many prompts under one system message) share the tokens of
their common prefixes. A run of tokens without a branch is a segment; segments are laid out parent before children, so
that every subtree is one contiguous range of packed indices.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

import numpy as np

Tokens: TypeAlias = Sequence[int] | np.ndarray


@dataclass(frozen=True)
class Trie:
    """The packed layout of a set of sequences with T distinct prefix tokens in n segments.

    Attributes:
        tokens: The token ids [T], depth-first.
        depth: The position of each token [T], from 0, in every sequence that goes through it.
        subtree_end: One past the last packed index that descends from each token's segment [T]. Token j is an ancestor
            of token i, or i itself, exactly if ``j <= i < subtree_end[j]``.
        segment_starts: The first packed index of each segment, and T at the end [n + 1].
        segment_parents: The index of each segment's parent [n]; -1 for a root.
        paths: The packed indices of each sequence's tokens, in order.
    """

    tokens: np.ndarray
    depth: np.ndarray
    subtree_end: np.ndarray
    segment_starts: np.ndarray
    segment_parents: np.ndarray
    paths: list[np.ndarray]


def build_trie(sequences: Sequence[Tokens], *, share_prefixes: bool = True) -> Trie:
    """Lay the sequences out so that each distinct prefix token occurs once.

    Children of a segment stand in the order in which the sequences first reach them. With ``share_prefixes=False`` each
    sequence becomes one segment of its own, in order, whatever it has in common with others.
    """
    arrays = [np.asarray(sequence, dtype=np.int64) for sequence in sequences]
    # Each entry is a range [low, high) of the sorted sequences that share their first `depth` tokens and hang below
    # `parent`. A stack replaces recursion, because a chain of branches may be deeper than Python's call stack.
    if share_prefixes:
        order, common_with_previous = _sorted_with_common_prefixes(arrays)
        stack = [(0, len(arrays), 0, -1)]
    else:
        order, common_with_previous = np.arange(len(arrays)), np.zeros(len(arrays), dtype=np.int64)
        stack = [(i, i + 1, 0, -1) for i in reversed(range(len(arrays)))]
    paths = [np.empty(len(array), dtype=np.int64) for array in arrays]
    pieces: list[np.ndarray] = []
    depths: list[int] = []
    parents: list[int] = []
    starts = [0]
    while stack:
        low, high, depth, parent = stack.pop()
        if low == high:
            continue
        first = arrays[order[low]]
        shared = len(first) if high - low == 1 else int(common_with_previous[low + 1 : high].min())
        if shared > depth:
            start = starts[-1]
            for member in order[low:high]:
                paths[member][depth:shared] = np.arange(start, start + shared - depth)
            pieces.append(first[depth:shared])
            depths.append(depth)
            parents.append(parent)
            starts.append(start + shared - depth)
            parent = len(parents) - 1
        if high - low > 1:
            branches = low + 1 + np.flatnonzero(common_with_previous[low + 1 : high] == shared)
            bounds = [low, *branches.tolist(), high]
            children = list(pairwise(bounds))
            children.sort(key=lambda child: order[child[0] : child[1]].min(), reverse=True)
            stack.extend((child_low, child_high, shared, parent) for child_low, child_high in children)

    lengths = np.diff(starts)
    segment_ends = _subtree_ends(np.asarray(starts[1:], dtype=np.int64), parents)
    offsets = np.arange(starts[-1]) - np.repeat(starts[:-1], lengths)
    return Trie(
        tokens=np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int64),
        depth=np.repeat(np.asarray(depths, dtype=np.int64), lengths) + offsets,
        subtree_end=np.repeat(segment_ends, lengths),
        segment_starts=np.asarray(starts, dtype=np.int64),
        segment_parents=np.asarray(parents, dtype=np.int64),
        paths=paths,
    )


def padded(trie: Trie, count: int) -> Trie:
    """Return the trie with ``count`` more tokens 0 at the end, a segment of their own that belongs to no sequence."""
    if not count:
        return trie
    end = len(trie.tokens) + count
    return Trie(
        tokens=np.append(trie.tokens, np.zeros(count, dtype=np.int64)),
        depth=np.append(trie.depth, np.arange(count)),
        subtree_end=np.append(trie.subtree_end, np.full(count, end)),
        segment_starts=np.append(trie.segment_starts, end),
        segment_parents=np.append(trie.segment_parents, -1),
        paths=trie.paths,
    )


class PrefixCounter:
    """Counts the distinct prefix tokens of a growing set of sequences without building the trie.

    The longest prefix that a sequence shares with any member of a set is the one it shares with a neighbour in
    lexicographic order, so two comparisons answer for the whole set. With ``share_prefixes=False`` every token counts.
    """

    def __init__(self, *, share_prefixes: bool = True) -> None:
        self.count = 0
        self._share_prefixes = share_prefixes
        self._members: list[bytes] = []

    def copy(self) -> PrefixCounter:
        """Return a counter of the same set that grows on its own."""
        duplicate = PrefixCounter(share_prefixes=self._share_prefixes)
        duplicate.count = self.count
        duplicate._members = list(self._members)
        return duplicate

    def new_tokens(self, sequence: Tokens) -> int:
        """Count the tokens of the sequence that the set does not hold yet."""
        if not self._share_prefixes:
            return len(sequence)
        key = _sort_key(sequence)
        place = bisect.bisect_left(self._members, key)
        known = max((_common_bytes(key, member) for member in self._members[max(0, place - 1) : place + 1]), default=0)
        return (len(key) - known) // _TOKEN_BYTES

    def add(self, sequence: Tokens) -> None:
        """Put the sequence into the set."""
        self.count += self.new_tokens(sequence)
        bisect.insort(self._members, _sort_key(sequence))


def common_prefixes(sequences: Sequence[Tokens], others: Sequence[Tokens]) -> list[tuple[int, int]]:
    """Find for each sequence the one of ``others`` with which it shares most tokens, and how many these are.

    Where there are no others the index is -1.
    """
    keys = sorted((_sort_key(other), index) for index, other in enumerate(others))
    found = []
    for sequence in sequences:
        key = _sort_key(sequence)
        place = bisect.bisect_left(keys, (key,))
        near = [(_common_bytes(key, other), index) for other, index in keys[max(0, place - 1) : place + 1]]
        length, index = max(near, default=(0, -1))
        found.append((index, length // _TOKEN_BYTES))
    return found


_TOKEN_BYTES = 4


def _sort_key(sequence: Tokens) -> bytes:
    """Return bytes whose order is the lexicographic order of the token ids: big-endian, unsigned."""
    return np.asarray(sequence, dtype=np.int64).astype(">u4").tobytes()


def _common_bytes(left: bytes, right: bytes) -> int:
    """Measure the longest common prefix of whole tokens, in bytes."""
    tokens = min(len(left), len(right)) // _TOKEN_BYTES
    differs = np.frombuffer(left, np.uint32, tokens) != np.frombuffer(right, np.uint32, tokens)
    return _TOKEN_BYTES * (int(differs.argmax()) if differs.any() else tokens)


def _sorted_with_common_prefixes(arrays: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return the lexicographic order [N], and how many tokens each sequence then shares with the one before it [N]."""
    keys = [_sort_key(array) for array in arrays]
    order = sorted(range(len(arrays)), key=keys.__getitem__)
    common = [_common_bytes(keys[left], keys[right]) // _TOKEN_BYTES for left, right in pairwise(order)]
    return np.asarray(order, dtype=np.int64), np.asarray([0, *common], dtype=np.int64)


def _subtree_ends(segment_ends: np.ndarray, parents: list[int]) -> np.ndarray:
    """Find one past the last packed index below each segment, backwards, since children come after their parents."""
    ends = segment_ends.copy()
    for segment in range(len(parents) - 1, -1, -1):
        if parents[segment] >= 0:
            ends[parents[segment]] = max(ends[parents[segment]], ends[segment])
    return ends
