import asyncio
import threading

import pytest

from vpd.environments import Environment, judge_all
from vpd.types import Task, Verdict

TASK = Task("t", [{"role": "user", "content": "?"}])


class Judge(Environment):
    """An environment that judges by a given function, so that each test states its own."""

    def __init__(self, function):
        self.function = function

    def tasks(self, split):
        return [TASK]

    def judge(self, task, completion):
        return self.function(completion)


def rewards(function, completions):
    outcomes = judge_all(Judge(function), [(TASK, completion) for completion in completions])
    return [outcome.reward if isinstance(outcome, Verdict) else type(outcome) for outcome in outcomes]


def grade(completion):
    return Verdict(float(completion))


async def grade_later(completion):
    # Later completions finish first, so that the verdicts are in order only if somebody keeps them in order.
    await asyncio.sleep(0.01 / (1 + abs(float(completion))))
    return grade(completion)


@pytest.mark.parametrize("function", [grade, grade_later, lambda c: grade_later(c) if float(c) > 1 else grade(c)])
def test_order_is_kept_and_a_broken_judgement_stands_alone(function):
    assert rewards(function, ["0", "1", "x", "3", "inf", "nan", "2"]) == [
        0.0, 1.0, ValueError, 3.0, ValueError, ValueError, 2.0,
    ]  # fmt: skip


def test_async_judges_run_at_the_same_time():
    barrier = asyncio.Barrier(8)

    async def wait_for_the_others(completion):
        await asyncio.wait_for(barrier.wait(), timeout=5)
        return Verdict(1.0)

    assert rewards(wait_for_the_others, ["0"] * 8) == [1.0] * 8


def test_works_inside_a_running_loop_and_keeps_one_loop():
    loops = set()

    async def note_the_loop(completion):
        loops.add(asyncio.get_running_loop())
        return Verdict(1.0)

    async def notebook_cell():
        return rewards(note_the_loop, ["0"])

    assert asyncio.run(notebook_cell()) == [1.0]
    assert rewards(note_the_loop, ["0"]) == [1.0]
    assert len(loops) == 1


def test_what_is_no_verdict_is_a_broken_judge():
    assert rewards(lambda completion: 1.0, ["0"]) == [TypeError]
    assert rewards(lambda completion: Verdict(None), ["0"]) == [ValueError]  # pyright: ignore[reportArgumentType]


def test_a_cancelled_judge_is_broken():
    async def cancelled(completion):
        raise asyncio.CancelledError

    assert rewards(cancelled, ["0"]) == [RuntimeError]


def test_an_interrupt_is_not_swallowed():
    def interrupted(completion):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rewards(interrupted, ["0"])


def test_nothing_to_judge_starts_no_thread():
    before = threading.active_count()
    assert judge_all(Judge(grade), []) == []
    assert threading.active_count() == before


def test_judges_that_hang_leave_their_rollouts_ungraded_and_the_others_are_judged():
    release = threading.Event()

    def hang(completion):
        if completion == "x":
            release.wait(60)
        return grade(completion)

    async def hang_later(completion):
        await asyncio.sleep(60 if completion == "x" else 0)
        return grade(completion)

    for function in (hang, hang_later):
        outcomes = judge_all(Judge(function), [(TASK, completion) for completion in ("1", "x", "2")], seconds=0.2)
        assert [type(outcome) for outcome in outcomes] == [Verdict, TimeoutError, Verdict]
        assert "0.2 s" in str(outcomes[1])
    release.set()


def test_async_judges_that_wait_for_each_other_do_not_hang():
    turn = asyncio.Semaphore(1)

    async def one_at_a_time(completion):
        async with turn:
            await asyncio.sleep(0.05)
        return Verdict(1.0)

    # All judgements together take longer than the limit of one.
    outcomes = judge_all(Judge(one_at_a_time), [(TASK, "0")] * 8, seconds=0.2)
    assert all(isinstance(outcome, Verdict) for outcome in outcomes)


def test_a_judge_that_needs_the_main_thread_gets_it():
    seen = []

    def note_the_thread(completion):
        seen.append(threading.current_thread() is threading.main_thread())
        return Verdict(1.0)

    for needs_it in (True, False):
        judge = Judge(note_the_thread)
        judge.judges_on_main_thread = needs_it
        judge_all(judge, [(TASK, "0")], seconds=5)
    assert seen == [True, False]
