"""Authentication of pods, node drivers and the Secrets controller by their service-account tokens, and their rate limits; no policy decisions."""
