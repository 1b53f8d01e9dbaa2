"""Benchmarks of the replay buffer: ratios against its peers, measured in turns within one run.

`python -m tests.benchmarks.replay all` runs everything and prints tables; `../replay.md` keeps results. The peers live
in environments of their own, made by `environments.py`; `worker.py` drives each of them alike.
"""
