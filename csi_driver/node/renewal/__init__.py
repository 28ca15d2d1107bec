"""Renew the certificates of published volumes, and report failures to the authority."""
