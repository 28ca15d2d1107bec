"""Tests of the internal issuer."""
