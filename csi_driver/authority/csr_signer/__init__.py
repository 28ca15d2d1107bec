"""Approver and signer of CertificateSigningRequests for ``certmount.dev/pod``, for pods that use the Kubernetes API directly.

The requester is what the API server recorded, not what the request contains. The policy for volumes applies, and the
internal CA signs. Requests for other signers are ignored.
"""
