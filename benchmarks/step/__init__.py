"""This benchmark times a whole training step side by side with TRL's trainers on the same work.

python -m benchmarks.step --against trl --workload a
"""
