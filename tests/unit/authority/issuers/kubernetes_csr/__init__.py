"""Both sides of certificates.k8s.io: the issuer, and the approver and signer of our own name."""
