"""Obtain certificates from the authority. Modules of this package write no files."""
