"""The policy: patterns, rules, evaluation, and the parsers of its files."""
