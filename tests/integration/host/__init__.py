"""Promises about real mounts. All of them need root, and lie in the test's own folder."""
