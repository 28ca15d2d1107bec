"""Promises of several parts together, over real sockets, TLS and mounts."""
