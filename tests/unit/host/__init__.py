"""Promises of the host layer that need no root: what is parsed, checked, written as files, and kept as records."""
