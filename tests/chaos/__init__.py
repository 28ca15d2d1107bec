"""Chaos: a cluster in which everything fails in turn, while pods talk mutual TLS."""
