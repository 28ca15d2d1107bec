"""Tests of the Secrets controller."""
