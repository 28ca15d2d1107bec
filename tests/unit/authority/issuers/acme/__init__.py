"""Tests of the ACME issuer's rules, without a CA."""
