"""Promises that hold without a socket, a mount or another process."""
