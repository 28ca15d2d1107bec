"""Authentication of pods and node drivers by their service-account tokens, and their rate limits; no policy decisions."""
