"""What the driver does to its host: mounts, the mount table, targets, generations of files, records.

All of it is synchronous and may block on the kernel; callers run it in threads. Nothing here knows gRPC, an event loop,
Kubernetes or certificates: it moves bytes, modes and mounts, and asks the world (mountinfo, records) and not memory.
"""
