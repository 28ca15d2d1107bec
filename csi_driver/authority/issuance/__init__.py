"""The path of an issuance request from tokens to a certificate. Start with pipeline.py.

This package knows no protobuf and no Kubernetes API.
"""
