"""What counts as a success, by a threshold or within the group."""

import pytest

from vpd.feedback import successes
from vpd.types import Rollout, Task, Turn, Verdict


def rollouts(*groups):
    return [
        Rollout(
            Task(f"t{number}", []),
            number,
            [Turn([], [], [], False, "")],
            None if reward is None else Verdict(reward),
        )
        for number, group in enumerate(groups)
        for reward in group
    ]


@pytest.mark.parametrize(
    ("threshold", "groups", "expected"),
    [
        (1.0, [[0.9, 1.0, None, 2.0]], [False, True, False, True]),
        (-5.0, [[-6.0, -5.0]], [False, True]),
        # Above the mean of the group's own graded rewards; what lies on the mean has failed.
        (None, [[-3.0, -1.0, -2.0], [0.2, None, 0.4]], [False, True, False, False, False, True]),
        (None, [[1.0, 1.0], [0.0, 0.0], [5.0]], [False] * 5),
        # The mean of these equal numbers may be rounded down.
        (None, [[0.1] * 3, [1.1] * 6, [0.7] * 7], [False] * 16),
        (None, [[None, None]], [False, False]),
    ],
)
def test_successes(threshold, groups, expected):
    assert successes(rollouts(*groups), threshold) == expected
