"""The ACME issuer's rules, without a CA."""
