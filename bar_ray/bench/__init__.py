"""Measurements against named peers, each in one run and on one machine: `jobs/bench.py`."""
