"""Benchmarks: ``python -m tests.bench`` prints every figure beside its budget. No figure fails a run, only a wrong result does."""
