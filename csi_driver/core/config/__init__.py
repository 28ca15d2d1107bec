"""Parsers for configuration files that administrators write."""
