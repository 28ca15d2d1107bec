"""Authentication of pods and node drivers by their service-account tokens, and their rate limits.

A token is verified offline first and then by a TokenReview. This package makes no policy decisions.
"""
