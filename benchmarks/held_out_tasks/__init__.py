"""A second suite of small tasks of one's own: no default was chosen on it, so that it can judge the default.

    python -m benchmarks.held_out_tasks --methods grpo sdpo vpd default --seeds 0 1 2 --out runs/held-out-tasks --jobs 2

The methods, and how rollouts are counted, are those of :mod:`benchmarks.own_tasks`, the suite on which the default was
chosen. Each task is an environment as a user would write it: a generator of questions, and a judge whose text says what
is wrong with this attempt, or what was checked in a right one (:mod:`.base`). :mod:`.suite` lists the tasks with the
settings of their starts, :mod:`.jobs` runs one method on one task, and :mod:`.table` sets the methods side by side.
"""
