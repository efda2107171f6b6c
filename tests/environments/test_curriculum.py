"""The order of tasks, and the stages of a curriculum."""

from __future__ import annotations

from vpd.environments.curriculum import Curriculum
from vpd.types import Task


def curriculum(*sizes, prompts=2, seed=0):
    stages = [[Task(f"{stage}-{i}", []) for i in range(size)] for stage, size in enumerate(sizes)]
    return Curriculum(stages, prompts, next_stage_at=0.8, seed=seed)


def ids(made, steps):
    return [task.id for step in steps for task in made.tasks_of_step(step)]


def test_every_epoch_has_each_task_once_in_an_order_of_its_own():
    order = ids(curriculum(6), range(1, 7))
    assert sorted(order[:6]) == sorted(order[6:]) == [f"0-{i}" for i in range(6)]
    assert order[:6] != order[6:]
    assert order != ids(curriculum(6, seed=1), range(1, 7))


def test_the_order_of_a_seed_stays_from_version_to_version():
    assert ids(curriculum(5, prompts=3), [1, 2, 3]) == ["0-0", "0-4", "0-3", "0-1", "0-2", "0-4", "0-3", "0-0", "0-2"]


def test_a_batch_larger_than_the_stage_goes_on_into_the_next_epoch():
    (batch,) = [curriculum(2, prompts=5).tasks_of_step(1)]
    assert [sorted(task.id for task in part) for part in (batch[:2], batch[2:4])] == [["0-0", "0-1"]] * 2


def test_a_stage_begins_when_enough_succeed_and_its_epochs_from_there():
    made = curriculum(4, 4)
    assert not made.advance(1, 0.79)
    assert not made.advance(1, None)
    assert made.advance(2, 0.8)
    assert (made.stage, made.stage_start) == (1, 2)
    assert sorted(ids(made, [3, 4])) == ["1-0", "1-1", "1-2", "1-3"]
    # The last stage is never left.
    assert not made.advance(3, 1.0)


def test_a_saved_place_is_gone_on_from():
    made = curriculum(4, 4)
    made.advance(2, 1.0)
    again = curriculum(4, 4)
    again.load_state_dict(made.state_dict())
    assert ids(again, [3, 4, 5]) == ids(made, [3, 4, 5])
