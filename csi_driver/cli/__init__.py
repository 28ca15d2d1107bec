"""The command line: one module a command, each importing only what it runs.

It parses options into values and prints; it may not hold rules of its own.
"""
