"""One whole training step, timed side by side with TRL's trainers on the same work.

python -m benchmarks.step --against trl --workload a
"""
