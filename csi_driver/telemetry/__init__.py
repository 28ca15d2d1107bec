"""Logs, metrics and health, fed by facts that the other layers report.

It may not decide anything, and no token or key may pass through it.
"""
