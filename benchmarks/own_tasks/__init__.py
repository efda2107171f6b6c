"""A suite of small tasks of one's own: is the trainer's default safe and useful on a task that nobody has tuned it for?

``python -m benchmarks.own_tasks`` trains SmolLM2-135M-Instruct on each task with several algorithms and seeds, all with
the same number of rollouts, and ``python -m benchmarks.own_tasks.table`` compares what came out.
"""
