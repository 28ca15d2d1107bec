"""Approver and signer of CertificateSigningRequests for ``certmount.dev/pod``. It ignores requests for other signers."""
