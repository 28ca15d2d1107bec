"""Access to the host: mounts, the mount table, target paths, volume directories and their files.

All functions block; call them in threads. This package does not know gRPC, event loops, Kubernetes or certificates.
It reads mountinfo and records instead of keeping state in memory.
"""
