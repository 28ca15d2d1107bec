"""The host's side of a volume: tmpfs and bind mounts, generations of files, records, mountinfo.

It knows paths, bytes, modes and owners; it may not know certificates' meaning, gRPC or Kubernetes.
"""
