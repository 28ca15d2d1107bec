"""Promises shown to programs of others."""
