"""The files of a volume, as bytes."""
