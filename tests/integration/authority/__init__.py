"""Tests of the authority over the real wire."""
