"""Promises of the pure core, most of them for any input rather than for examples."""
