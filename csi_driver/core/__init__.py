"""The rules of certmount, pure: names, attributes, identity, policy, keys, checks and formulas.

Nothing here does I/O, reads a clock or knows an event loop; time and randomness are arguments.
"""
