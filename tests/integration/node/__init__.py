"""Promises of the node driver as a process: a real unix socket, a real TLS authority, and as root real mounts."""
