"""Kubernetes Events on objects of users. Recording one never delays or fails the operation that it reports."""
