"""Benchmarks: ``python -m tests.bench`` prints each figure with its budget. Only a wrong result fails a run."""
