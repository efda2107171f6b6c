import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpd.config import ConfigError
from vpd.environments.splits import cut_splits, question_key
from vpd.types import Task


def make_tasks(name: str, questions: list[int]) -> list[Task]:
    return [
        Task(f"{name}/{i}", [{"role": "user", "content": f"{question} ?" + " " * i}])
        for i, question in enumerate(questions)
    ]


def key(task: Task) -> str:
    return question_key(task.prompt[-1]["content"])


def cut(train, test=None, selection_size=2, final_size=None, seed=0):
    return cut_splits(
        make_tasks("train", train),
        None if test is None else make_tasks("test", test),
        key=key,
        selection_size=selection_size,
        final_size=0 if test is None and final_size is None else final_size,
        seed=seed,
        origin="the data",
    )


@given(
    train=st.lists(st.integers(0, 30), min_size=5, max_size=60),
    test=st.none() | st.lists(st.integers(0, 30), min_size=1, max_size=20),
    selection_size=st.integers(0, 6),
    final_size=st.integers(0, 6),
    seed=st.integers(0, 2**32),
)
def test_no_question_stands_in_two_splits_and_none_twice(train, test, selection_size, final_size, seed):
    try:
        splits = cut(train, test, selection_size, final_size, seed)
    except ConfigError:
        pool = set(train) - set(test or [])
        assert len(pool) <= selection_size + (0 if test else final_size)
        return
    keys = [key(task) for tasks in splits.values() for task in tasks]
    assert len(keys) == len(set(keys))
    assert len(splits["selection"]) == selection_size
    assert splits["train"]
    assert not {key(task) for task in splits["train"] + splits["selection"]} & {f"{q} ?" for q in test or []}
    assert splits == cut(train, test, selection_size, final_size, seed)


def test_the_test_set_stays_whole_and_in_order():
    splits = cut(list(range(20)), [3, 99, 4])
    assert [key(task) for task in splits["final"]] == ["3 ?", "99 ?", "4 ?"]
    assert len(splits["train"]) == 20 - 2 - 2


def test_another_seed_selects_other_questions():
    assert cut(list(range(50)), seed=0)["selection"] != cut(list(range(50)), seed=1)["selection"]


def test_too_few_questions_is_an_error():
    with pytest.raises(ConfigError, match=r"the data has 5 distinct.*selection_size = 3 and data\.final_size = 2 are"):
        cut([1, 2, 3, 4, 5, 5, 5], selection_size=3, final_size=2)
    with pytest.raises(ConfigError, match=r"data\.selection_size = -1 must not be negative"):
        cut([1, 2, 3], selection_size=-1)
