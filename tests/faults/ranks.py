"""The environment of one process of a run, as torchrun makes it."""

from __future__ import annotations


def environment_of_rank(rank: int, ranks: int, port: int) -> dict[str, str]:
    """Return the variables; none where the run has one process."""
    if ranks == 1:
        return {}
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
    }
