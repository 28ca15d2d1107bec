"""The internal CA: its keys and certificates, where they are stored, its rotation, and the certificates that it signs."""
