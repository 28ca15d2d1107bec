"""The internal CA as an issuer."""
