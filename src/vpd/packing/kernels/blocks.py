"""Cuts the attention of a packed trie into blocks.

A block's queries are a contiguous range of packed tokens. Its keys are that range and the ancestors of its first
token: since a subtree is contiguous, an ancestor of any later token of the range that stands before the range is an
ancestor of the first token too. Small branches are put together in one block under a mask; each large one is a block of
its own. Tokens whose keys and values are known from another pass are keys only.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from vpd.packing.trie import Trie

# The cost of a block in units of one query-key pair is keys * (queries + KEY_COST) + CALL_COST. Merging branches
# computes pairs that the mask throws away, and saves calls and further copies of their ancestors' keys. Gathering a key
# and its gradient costs as much as KEY_COST queries of it (measured on a CPU in float32 and bfloat16, forward and
# backward).
KEY_COST = 96
CALL_COST = 4096

# The most elements of one block's mask, and so of the scores that a kernel without tiling would hold.
MAX_BLOCK_ELEMENTS = 2**24

# How many queries of a longer segment one block holds. Blocks without a branch share one mask of this many rows.
CHAIN_ROWS = 512


@dataclass(frozen=True)
class Block:
    """Queries that attend to the same ranges of keys, under a mask.

    Attributes:
        start: The first query, as an index of packed tokens.
        stop: One past the last query.
        key_ranges: The ranges of packed tokens that are the keys, ascending; the last one ends at ``stop``.
        is_chain: Whether no branch is among the queries, so that a pair's distance alone says whether it is allowed.
        is_causal: Whether it is a chain that starts at a root and fits its window, so that the kernel's causal flag
            says which pairs are allowed.
    """

    start: int
    stop: int
    key_ranges: tuple[tuple[int, int], ...]
    is_chain: bool
    is_causal: bool

    @property
    def query_count(self) -> int:
        return self.stop - self.start

    @property
    def key_count(self) -> int:
        return sum(stop - start for start, stop in self.key_ranges)


def partition(
    trie: Trie,
    window: int | None = None,
    max_elements: int = MAX_BLOCK_ELEMENTS,
    known: np.ndarray | None = None,
    costs: tuple[int, int] | None = None,
) -> list[Block]:
    """The cheapest cut of the packed tokens into blocks, by dynamic programming over the places where a cut may be.

    Args:
        trie: The packed tokens.
        window: How many positions back a token sees, itself included; None for all.
        max_elements: The most query-key pairs of a block that needs a mask. A single query is never divided, so a
            block may exceed it only where one token's keys alone do.
        known: The tokens that no block computes, [T] bool, with all their ancestors; None for none.
        costs: What a key and a block cost, in the place of ``KEY_COST`` and ``CALL_COST``.
    """
    token_count = len(trie.tokens)
    if token_count == 0:
        return []
    known = np.zeros(token_count, dtype=bool) if known is None else known
    cuts = _cut_places(trie, window, max_elements, known)
    known_before = np.concatenate([[0], np.cumsum(known)])[cuts]
    key_cost, call_cost = (KEY_COST, CALL_COST) if costs is None else costs
    starts = cuts[:-1]
    depth = trie.depth[starts]
    best_cost = np.full(len(cuts), np.inf)
    best_cost[0] = 0.0
    best_cut = np.zeros(len(cuts), dtype=np.int64)
    for i in range(1, len(cuts)):
        queries = cuts[i] - starts[:i]
        least_depth = np.minimum.accumulate(depth[:i][::-1])[::-1]
        ancestors = depth[:i] - _first_visible_depth(least_depth, window)
        keys = ancestors + queries
        elements = (queries * keys).astype(np.float64)
        causal = (depth[:i] == 0) & (trie.depth[cuts[i] - 1] == queries - 1)
        if window is not None:
            causal &= queries <= window
        too_large = (elements > max_elements) & ~causal
        # The last candidate is one step of the cut places, which cannot be divided further.
        too_large[-1] = False
        cost = np.where(causal, elements / 2, elements) + key_cost * keys + call_cost
        cost[too_large] = np.inf
        known_queries = known_before[i] - known_before[:i]
        cost[known_queries > 0] = np.inf
        cost[known_queries == queries] = 0.0
        total = best_cost[:i] + cost
        best_cut[i] = int(total.argmin())
        best_cost[i] = total[best_cut[i]]

    chosen = [len(cuts) - 1]
    while chosen[-1] > 0:
        chosen.append(int(best_cut[chosen[-1]]))
    bounds = [int(cuts[i]) for i in reversed(chosen)]
    return [_block(trie, start, stop, window) for start, stop in pairwise(bounds) if not known[start]]


def allowed_pairs(trie: Trie, queries: np.ndarray, keys: np.ndarray, window: int | None) -> np.ndarray:
    """Whether each packed query sees each packed key (itself, or an ancestor within the window), as [Q, K] bool."""
    query, key = queries[:, None], keys[None, :]
    allowed = (key <= query) & (query < trie.subtree_end[key])
    if window is not None:
        allowed &= trie.depth[query] - trie.depth[key] < window
    return allowed


def _first_visible_depth(depth: np.ndarray, window: int | None) -> np.ndarray:
    return np.zeros_like(depth) if window is None else np.maximum(depth - window + 1, 0)


def _cut_places(trie: Trie, window: int | None, max_elements: int, known: np.ndarray) -> np.ndarray:
    """Where a cut may be: at the bounds of segments, at the end of known tokens, and within a segment every
    ``CHAIN_ROWS`` tokens, or fewer where ``max_elements`` requires it."""
    places = [0]
    for start, stop in zip(trie.segment_starts[:-1].tolist(), trie.segment_starts[1:].tolist(), strict=True):
        place = start + int(known[start:stop].sum())
        if place > start:
            places.append(place)
        while place < stop:
            depth = int(trie.depth[place])
            ancestors = depth if window is None else min(depth, window - 1)
            # The largest q with q * (ancestors + q) <= max_elements.
            largest = int((np.sqrt(ancestors**2 + 4.0 * max_elements) - ancestors) / 2)
            place = min(stop, place + max(1, min(CHAIN_ROWS, largest)))
            places.append(place)
    return np.asarray(places, dtype=np.int64)


def _block(trie: Trie, start: int, stop: int, window: int | None) -> Block:
    first_depth = int(trie.depth[start])
    is_chain = int(trie.depth[stop - 1]) - first_depth == stop - start - 1
    visible = int(_first_visible_depth(trie.depth[start:stop].min(), window))
    ranges = [(start, stop)]
    segment = int(np.searchsorted(trie.segment_starts, start, side="right")) - 1
    end = start
    while segment >= 0:
        begin = int(trie.segment_starts[segment])
        begin += max(0, visible - int(trie.depth[begin])) if begin < end else 0
        if begin < end:
            if end == ranges[-1][0]:
                ranges[-1] = (begin, ranges[-1][1])
            else:
                ranges.append((begin, end))
        segment = int(trie.segment_parents[segment])
        end = int(trie.segment_starts[segment + 1])
    return Block(
        start=start,
        stop=stop,
        key_ranges=tuple(reversed(ranges)),
        is_chain=is_chain,
        is_causal=is_chain and first_depth == 0 and (window is None or stop - start <= window),
    )
