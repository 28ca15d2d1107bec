"""What a large cluster asks of the authority: a simulation with the node's own clocks, pace and formulas."""
