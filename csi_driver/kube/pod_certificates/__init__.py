"""PodCertificateRequests and ClusterTrustBundles at the API server."""
