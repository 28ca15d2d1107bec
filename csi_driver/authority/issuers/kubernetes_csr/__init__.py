"""A signer of the cluster as an issuer, by the API certificates.k8s.io/v1: cert-manager's, a cloud provider's, or your own.

The authority creates a CertificateSigningRequest from the node's CSR, approves it or waits for an approval, waits for the
signer, verifies the certificate, and deletes the CertificateSigningRequest. Labels only help to find it: anyone can set them.
"""
