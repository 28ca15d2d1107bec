"""Tests of the step-ca issuer without a real step-ca."""
