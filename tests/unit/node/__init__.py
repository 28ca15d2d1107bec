"""Promises of the node driver's parts."""
