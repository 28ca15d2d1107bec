"""The Secrets controller."""
