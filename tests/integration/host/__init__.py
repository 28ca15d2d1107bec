"""Tests with real mounts in the test's own directory. All need root."""
