"""Measures how costs grow with the number of nodes, pods, accounts and policy rules."""
