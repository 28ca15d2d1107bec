"""Keys, CSRs, root sets, and the verification of certificates."""
