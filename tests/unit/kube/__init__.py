"""Tests of the Kubernetes client against a fake API server on loopback."""
