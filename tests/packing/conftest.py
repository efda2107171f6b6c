"""The fixtures that tests of packing share."""

import pytest

from vpd.packing.kernels import tiles


@pytest.fixture
def fine(monkeypatch):
    """Tiles of a few queries, so that these small batches have many of them, in batches of several."""
    for name, value in (("KEY_COST", 1), ("TILE_COST", 1), ("BATCH_COST", 200)):
        monkeypatch.setattr(tiles, name, value)
