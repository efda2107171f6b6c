import json
from pathlib import Path

import pytest

SCIKNOWEVAL = Path(__file__).parents[3] / "shared" / "data" / "sciknoweval"


@pytest.fixture
def sciknoweval():
    """Return the folder of SciKnowEval's domains, which stands beside the repository where it is installed."""
    if not SCIKNOWEVAL.is_dir():
        pytest.skip(f"SciKnowEval is not at {SCIKNOWEVAL}")
    return SCIKNOWEVAL


@pytest.fixture
def write_jsonl(tmp_path):
    def write(name, rows):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write
