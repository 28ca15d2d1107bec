"""CertificateSigningRequests: their cache and their client."""
