"""Tests of the kubernetes_csr issuer with a fake cluster."""
