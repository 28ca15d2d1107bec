"""Logs, metrics and health endpoints. No token or key may reach this package."""
