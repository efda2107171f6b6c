"""Finds which packed token sees which by walking every sequence, and makes tries to test that on."""

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from vpd.packing.kernels import tiles
from vpd.packing.kernels.blocks import partition
from vpd.packing.kernels.tiles import cut_into_tiles, make_tiling
from vpd.packing.trie import Trie, build_trie

# Few examples and no deadline: the suite shares its cores.
few = settings(max_examples=40, deadline=None)

sequence_lists = st.lists(st.lists(st.integers(0, 2), max_size=12), min_size=1, max_size=8)
windows = st.one_of(st.none(), st.integers(1, 14))


def true_pairs(trie: Trie, window: int | None) -> np.ndarray:
    """[T, T] bool."""
    allowed = np.zeros((len(trie.tokens),) * 2, dtype=bool)
    for path in trie.paths:
        for depth, token in enumerate(path):
            allowed[token, path[0 if window is None else max(0, depth - window + 1) : depth + 1]] = True
    return allowed


def branching_trie(prompt=40, branches=5, branch=30):
    """Two prompts with branches of their own, which share a beginning."""
    rng = np.random.default_rng(0)
    first = rng.integers(0, 1000, prompt).tolist()
    prompts = [first, [*first[: prompt // 2], *rng.integers(0, 1000, prompt).tolist()]]
    return build_trie([[*start, *rng.integers(0, 1000, branch).tolist()] for start in prompts for _ in range(branches)])


def tiling_of(trie, window, heads=6, key_heads=3):
    """The tiles, and these in batches."""
    cut = partition(trie, window, costs=(tiles.KEY_COST, tiles.TILE_COST))
    return cut_into_tiles(cut, trie, window, heads), make_tiling(trie, window, heads, key_heads)
