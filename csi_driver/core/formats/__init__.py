"""Renderers for the files of a volume."""
