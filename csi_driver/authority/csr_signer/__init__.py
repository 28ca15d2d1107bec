"""Approver and signer of CertificateSigningRequests for ``certmount.dev/pod``, for pods that use the Kubernetes API directly.

The API server states who made a request; nothing in the request itself is used for that. The same policy decides as for
volumes, and the internal CA signs. This package reads and changes no requests for other signers.
"""
