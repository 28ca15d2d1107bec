"""Simulate the load of a large cluster on the authority, with the node driver's own queues, schedules and formulas."""
