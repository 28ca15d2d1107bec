"""Kubernetes Events on pods: what the authority and the node drivers report to the owners of pods.

Recording an event never delays or fails the operation that it reports.
"""
