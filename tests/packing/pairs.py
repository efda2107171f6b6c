"""Which packed token sees which, by walking every sequence."""

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from vpd.packing.trie import Trie

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
