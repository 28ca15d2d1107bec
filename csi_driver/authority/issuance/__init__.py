"""From an issuance request to a certificate, without protobuf and the Kubernetes API. Start with pipeline.py."""
