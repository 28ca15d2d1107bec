"""The command line: one module for each command, which imports only what it runs.

It parses options and prints. It contains no rules.
"""
