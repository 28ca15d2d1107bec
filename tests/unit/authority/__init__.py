"""Tests of the authority's parts, each alone."""
