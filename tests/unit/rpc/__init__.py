"""Calls between the components."""
