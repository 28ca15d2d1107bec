"""step_ca."""
