"""Kubernetes Events on pods. Recording an event never delays or fails the operation that it reports."""
