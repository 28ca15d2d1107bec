"""What tests of all kinds share. Nothing here is a test."""
