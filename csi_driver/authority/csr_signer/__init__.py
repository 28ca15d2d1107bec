"""Approver and signer of CertificateSigningRequests for ``certmount.dev/pod``: the authority's desk for those without a volume.

Who asks is what the API server has stamped on the request, never what the request says; names are decided by the same policy as
for volumes, and the internal CA signs. Requests for other signers are neither read nor touched.
"""
